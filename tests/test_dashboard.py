"""The Grafana dashboard asks for metrics that exist, in queries that parse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from torch_eplb.exporters.metrics import METRICS, PREFIX

FILE = Path(__file__).parents[1] / "examples" / "grafana" / "torch_eplb.json"
BY_NAME = {PREFIX + metric.name: metric for metric in METRICS}


@pytest.fixture(scope="module")
def dashboard() -> Any:
    return json.loads(FILE.read_text())


def queries(dashboard: Any) -> list[str]:
    found = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", [])]
    found += [annotation["expr"] for annotation in dashboard["annotations"]["list"]]
    return found


def test_every_metric_and_label_that_it_asks_for_exists(dashboard: Any) -> None:
    for query in queries(dashboard):
        names = re.findall(rf"{PREFIX}\w+", query)
        assert names
        assert set(names) <= set(BY_NAME), query
        labels = {label for name in names for label in BY_NAME[name].labels} | {"rank"}
        for by in re.findall(r"by \(([^)]*)\)", query):
            assert set(by.split(", ")) <= labels, query
        # Counters are looked at as rates, or as the totals that they are.
        for function in re.findall(r"(?:rate|increase)\((\w+)", query):
            assert BY_NAME[function].kind == "counter", query


def test_its_queries_are_promql(dashboard: Any) -> None:
    parser = pytest.importorskip("promql_parser")
    for query in queries(dashboard):
        for variable, value in (("$__rate_interval", "1m"), ("$job", ".*"), ("$rank", ".*")):
            query = query.replace(variable, value)
        parser.parse(query)


def test_panels_have_places_of_their_own(dashboard: Any) -> None:
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        mine = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & mine, panel["title"]
        cells |= mine
