"""The table of metrics: names say their units, series are bounded, unknown values are left out."""

from __future__ import annotations

import dataclasses
import logging
import re
import subprocess
import sys

import numpy as np
import pytest
from support.running import EXPERTS, LAYERS, LOAD, RANK_LOAD, RANKS, Fresh, Running

from torch_eplb.exporters import metrics
from torch_eplb.exporters.metrics import METRICS, Point, series
from torch_eplb.exporters.snapshots import Snapshot, snapshot
from torch_eplb.values.metrics import Stats


def values(taken: Snapshot, name: str) -> dict[tuple[str, ...], float]:
    return {point.labels: point.value for point in series(taken) if point.metric.name == name}


def test_names_are_prometheus_names_that_carry_kind_and_unit() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"[a-z][a-z_]*", metric.name)
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert ("seconds" in metric.name) == (metric.unit == "s")
        assert ("bytes" in metric.name) == (metric.unit == "By")
        assert metric.help.endswith(".")


def test_every_field_of_stats_is_exported() -> None:
    # A field that is added to Stats is to be added to the table, or to this list.
    for field in dataclasses.fields(Stats):
        taken = snapshot(Running())  # type: ignore[arg-type]
        before = list(series(taken))
        changed = {"stalled": "s", "disabled": "d", "stage": "x"}.get(field.name)
        if field.name in ("par_now", "par_measured", "par_predicted"):
            changed = [9.0] * LAYERS  # type: ignore[assignment]
        elif changed is None:
            changed = 99  # type: ignore[assignment]
        taken.stats[field.name] = changed
        assert list(series(taken)) != before, field.name


def test_values_are_those_of_the_balancer() -> None:
    taken = snapshot(Running(), rank=3)  # type: ignore[arg-type]
    assert taken.rank == 3
    assert values(taken, "steps_total") == {(): 1234.0}
    assert values(taken, "stage") == {("collecting load",): 1.0}
    assert values(taken, "par_measured_ratio") == {("0",): 1.5, ("1",): 1.25, ("2",): 1.0}
    assert values(taken, "par_measured_mean_ratio") == {(): 1.25}
    assert values(taken, "par_predicted_max_ratio") == {(): 1.02}
    assert values(taken, "par_now_mean_ratio") == {(): 1.5}
    assert values(taken, "par_now_max_ratio") == {(): 2.0}
    assert values(taken, "rebalance_age_seconds") == {(): 75.0}
    assert values(taken, "migration_seconds_total") == {(): 0.5}
    assert values(taken, "received_bytes_total") == {(): 2.0 * 2**20}
    assert values(taken, "stalled") == {(): 0.0}
    assert values(taken, "redundant_experts") == {(): 2.0}
    totals = RANK_LOAD.sum(axis=0)
    assert values(taken, "rank_tokens") == {("0",): totals[0], ("1",): totals[1]}
    assert values(taken, "layer_rank_tokens")[("2", "1")] == RANK_LOAD[2, 1]
    assert values(taken, "expert_tokens")[("1", "7")] == LOAD[1, 7]
    hottest = LOAD.max(axis=1) / LOAD.mean(axis=1)
    assert list(values(taken, "expert_peak_ratio").values()) == pytest.approx(hottest)
    assert values(taken, "expert_peak_max_ratio")[()] == pytest.approx(hottest.max())


def test_active_experts_are_slots_whose_expert_got_tokens() -> None:
    source = Running()
    load = LOAD.copy()
    load[0, :4] = 0  # rank 0 has experts 0..4, rank 1 has 5, 6, 7, 0, 1
    source.window = (load, RANK_LOAD)
    taken = snapshot(source)  # type: ignore[arg-type]
    assert values(taken, "active_experts") == {("0",): (1 + 5 + 5) / 3, ("1",): (3 + 5 + 5) / 3}


def test_what_is_not_known_yet_is_left_out() -> None:
    taken = snapshot(Fresh())  # type: ignore[arg-type]
    names = {point.metric.name for point in series(taken)}
    assert "steps_total" in names
    assert not {
        n for n in names if n.startswith(("par_", "expert_", "rank_tokens", "rebalance_age"))
    }
    assert all(np.isfinite(point.value) for point in series(taken))


def test_a_metric_with_too_many_series_is_left_out_as_a_whole_and_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_said", set())
    taken = snapshot(Running())  # type: ignore[arg-type]
    with caplog.at_level(logging.INFO, "torch_eplb"):
        for _ in range(3):
            names = [point.metric.name for point in series(taken, LAYERS * RANKS)]
    assert "expert_tokens" not in names
    assert names.count("layer_rank_tokens") == LAYERS * RANKS
    assert "expert_peak_ratio" in names
    assert len(caplog.records) == 1
    assert f"expert_tokens is not exported: it has {LAYERS * EXPERTS} series" in caplog.text


def test_a_subset_of_metrics_can_be_asked_for() -> None:
    taken = snapshot(Running())  # type: ignore[arg-type]
    assert list(series(taken, metrics=METRICS[:1])) == [Point(METRICS[0], (), 1234.0)]


def test_exporters_import_no_torch() -> None:
    code = (
        "import sys; from torch_eplb import exporters; exporters.attach, exporters.report; "
        "exporters.JsonLinesExporter('x.jsonl').close(); exporters.PrometheusExporter().close(); "
        "exporters.OpenTelemetryExporter().close(); exporters.TensorBoardExporter; "
        "assert 'torch' not in sys.modules"
    )
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


def test_all_names_of_the_package_can_be_had() -> None:
    from torch_eplb import exporters

    assert all(getattr(exporters, name) is not None for name in exporters.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        exporters.nothing  # noqa: B018
