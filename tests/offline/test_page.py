"""``report``: one HTML page, whole in itself, with what the snapshots say."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.running import EXPERTS, LAYERS, LOAD, RANK_LOAD, Fresh, Running

from torch_eplb.exporters import JsonLinesExporter, Snapshot, snapshot
from torch_eplb.exporters.heat import heat, relative
from torch_eplb.offline.chart import Line, bars, lines, ticks
from torch_eplb.offline.cli import main
from torch_eplb.offline.page import page, runs_of


def course(rank: int = 0) -> list[Snapshot]:
    """Of a run with a fault in its middle."""
    start = snapshot(Fresh(), rank=rank)  # type: ignore[arg-type]
    shots = [start]
    source = Running(rebalances=0, experts_moved=0, plans_failed=0, planner_restarts=0)
    for number in range(1, 6):
        source.change(step=100 * number, rebalances=number // 2, experts_moved=4 * (number // 2))
        source.window = (LOAD * (1 + number // 3), RANK_LOAD)
        if number == 3:
            source.change(stalled="<b>waiting</b> & waiting", planner_restarts=1)
        if number == 4:
            source.change(stalled=None)
        taken = snapshot(source, rank=rank)  # type: ignore[arg-type]
        shots.append(dataclasses.replace(taken, time=start.time + number))
    return shots


class Checked(HTMLParser):
    """Fails on tags that do not close, and collects what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href", "srcset")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(text: str) -> Checked:
    checked = Checked()
    checked.feed(text)
    assert checked.open == []
    return checked


def test_the_page_is_whole_in_itself_and_says_what_happened() -> None:
    checked = read(page([course()]))
    assert all(source.startswith("data:image/png;base64,") for source in checked.fetched)
    text = " ".join(" ".join(checked.text).split())
    assert "3 layers; 8 experts and 2 redundant ones on 2 ranks of 5 slots" in text
    assert "6 snapshots from step 3" in text
    for words in ("PAR over time", "Moves", "Load per expert", "Load per rank", "Replicas",
                  "Layers", "Ranks", "Events", "1.250", "planner restarted: 1"):  # fmt: skip
        assert words in text
    assert "stalled: <b>waiting</b> & waiting" in text  # as text, not as markup
    assert "step 200: 4 experts, 0 B received by rank 0" in text


def test_heat_maps_are_the_loads_and_every_window_can_be_seen() -> None:
    from PIL import Image

    text = page([course()])
    data = re.findall(r'data-windows="([^"]*)"', text)
    pictures, captions = json.loads(html.unescape(data[0]))
    assert captions == [
        f"the window known at step 100: {LOAD.sum():,} tokens",
        f"the window known at step 300: {2 * LOAD.sum():,} tokens",
    ]
    image = Image.open(io.BytesIO(base64.b64decode(pictures[0].partition(",")[2])))
    assert np.array_equal(np.asarray(image), heat(relative(LOAD), 4.0))
    assert image.size == (EXPERTS, LAYERS)
    assert len(data) == 1  # the load per rank had one window only


def test_of_many_windows_some_are_shown() -> None:
    shots = []
    for number in range(200):
        source = Running(step=number)
        source.window = (LOAD + number, RANK_LOAD)
        shots.append(snapshot(source))  # type: ignore[arg-type]
    data = re.findall(r'data-windows="([^"]*)"', page([shots]))
    pictures, captions = json.loads(html.unescape(data[0]))
    assert len(pictures) == 40
    assert captions[0].startswith("the window known at step 0:")
    assert captions[-1].startswith("the window known at step 199:")


def test_before_anything_is_known_the_page_says_so() -> None:
    checked = read(page([[snapshot(Fresh())]]))  # type: ignore[arg-type]
    text = " ".join(checked.text)
    assert "Not known before the first collection window has ended." in text
    assert "No expert has moved between two snapshots." in text
    assert "Nothing went wrong." in text
    assert "Load per expert" not in text


def test_a_process_that_was_started_anew_is_an_event() -> None:
    shots = course()
    again = dataclasses.replace(shots[0], time=shots[-1].time + 1)
    assert "another run begins" in page([[*shots, again]])


def test_ranks_have_a_row_each() -> None:
    text = " ".join(read(page([course(0), course(3)])).text)
    assert "of ranks 0, 3." in text


def test_snapshots_are_sorted_by_rank_and_time_and_balancers_are_told_apart() -> None:
    shots = course(1)
    runs = runs_of([*course(2), *reversed(shots)])
    assert [run[0].rank for run in runs] == [1, 2]
    assert [taken.time for taken in runs[0]] == [taken.time for taken in shots]
    named = [dataclasses.replace(taken, labels={"model": "draft"}) for taken in shots]
    with pytest.raises(ValueError, match=r"several balancers \(no labels; model=draft\)"):
        runs_of([*shots, *named])
    assert [len(run) for run in runs_of([*shots, *named], ["model=draft"])] == [len(named)]
    with pytest.raises(ValueError, match="no snapshots with model=other"):
        runs_of(named, ["model=other"])
    with pytest.raises(ValueError, match="label 'draft' is not KEY=VALUE"):
        runs_of(named, ["draft"])


def test_report_as_a_user_runs_it(tmp_path: Path, capsys: Any) -> None:
    files = []
    for rank in range(2):
        files.append(str(tmp_path / f"stats.{rank}.jsonl"))
        exporter = JsonLinesExporter(files[-1])
        for taken in course(rank):
            exporter.export(taken)
        exporter.close()
    out = tmp_path / "page.html"
    assert main(["report", *files, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    read(out.read_text())
    assert main(["report", str(out), "--out", str(tmp_path / "x")]) == 2
    assert "page.html: holds a line that is no snapshot" in capsys.readouterr().err
    assert main(["report", *files, "--out", str(tmp_path)]) == 2
    assert main(["report", *files, "--label", "a=b", "--out", str(out)]) == 2


# ---- charts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (1, 1.0001), (0, 12345), (-3, 7), (1e-6, 3e-6), (5, 5), (0, 1e12)]
)
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 1 <= len(found) <= 13
    assert all(low - 1e-9 <= tick <= high * (1 + 1e-9) for tick in found)
    steps = np.diff(found)
    assert len(steps) == 0 or np.allclose(steps, steps[0])


def test_points_are_where_their_numbers_are() -> None:
    line = Line("a & b", [(0, 1.0), (50, 1.5), (100, 2.0)], "main")
    text = lines([line], [50.0, 500.0], "step", "PAR", least=1.0)
    points = re.search(r'<polyline class="line main" points="([^"]*)"', text)
    assert points is not None
    (x0, y0), (x1, y1), (x2, y2) = (map(float, p.split(",")) for p in points[1].split())
    assert (x0, x1, x2) == (60.0, pytest.approx(520.0), 980.0)
    assert (y0, y1, y2) == (260.0, pytest.approx(137.0), 14.0)
    assert "a &amp; b" in text
    assert text.count('class="mark"') == 1  # what lies outside is not drawn


def test_bars_stand_on_zero() -> None:
    text = bars([10.0, 20.0], [5.0, 10.0], ["one", "two"], (0.0, 20.0), "step", "experts")
    heights = [float(h) for h in re.findall(r'height="([\d.]+)"><title>', text)]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
