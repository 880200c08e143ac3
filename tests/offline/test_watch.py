"""``watch``: the live table shows what the endpoint or the file says."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.running import Fresh, Running

from torch_eplb.exporters import JsonLinesExporter, PrometheusExporter, snapshot
from torch_eplb.offline import watch as watching
from torch_eplb.offline.cli import main
from torch_eplb.offline.watch import _History, reader, watch

rich = pytest.importorskip("rich.console")


def console(terminal: bool = False) -> Any:
    return rich.Console(file=io.StringIO(), width=100, height=40, force_terminal=terminal)


def drawn(source: str) -> str:
    screen = console()
    watch(source, once=True, console=screen)
    return str(screen.file.getvalue())


@pytest.fixture
def file(tmp_path: Path) -> Any:
    path = tmp_path / "stats.jsonl"
    exporter = JsonLinesExporter(path)
    yield lambda source, **more: (exporter.export(snapshot(source, **more)), str(path))[1]
    exporter.close()


@pytest.fixture
def endpoint() -> Any:
    exporter = PrometheusExporter()
    port = exporter.serve(0)
    address = f"http://127.0.0.1:{port}/metrics"
    yield lambda source, **more: (exporter.export(snapshot(source, **more)), address)[1]
    exporter.close()


@pytest.fixture(params=["file", "endpoint"])
def shown(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_the_table_shows_balance_moves_cost_and_faults(shown: Any) -> None:
    text = drawn(shown(Running(), rank=0))
    for words in (
        "torch_eplb, rank 0",
        "step 1,234: collecting load",
        "last steps                 1.500        2.000",
        "last window                1.250        1.500",
        "expected by the last plan  1.010        1.020",
        "3, the last 75 s ago",
        "21 in 7 rounds",
        "3.00 MiB sent, 2.00 MiB received",
        "512 KiB used at most of 1.00 MiB",
        "0.25 s planning, 1.50 s at step boundaries (0.50 s moving)",
        "plans failed: 1, planner restarts: 2, rebalances abandoned: 0",
    ):
        assert words in text
    # Ranks and layers, the worst one first.
    rows = [line.strip("│ \n") for line in text.splitlines()]
    assert [row.split()[:3] for row in rows if row.startswith(("0 ", "1 ", "2 "))] == [
        ["1", "174", "1.160"],
        ["0", "126", "0.840"],
        ["0", "1.500", "1.010"],
        ["1", "1.250", "1.020"],
        ["2", "1.000", "1.000"],
    ]


def test_before_the_first_window_and_in_trouble(shown: Any) -> None:
    text = drawn(shown(Fresh()))
    assert "not known before the first window has ended" in text
    assert "active experts" not in text
    text = drawn(shown(Running(stalled="waiting", disabled="lost rank 1")))
    assert "STALLED" in text
    assert "OFF FOR GOOD" in text


def test_every_rank_and_balancer_has_its_panel(shown: Any) -> None:
    shown(Running(), rank=0, labels={"model": "large"})
    text = drawn(shown(Running(step=5), rank=1, labels={"model": "draft"}))
    assert "rank 0, model large" in text
    assert "rank 1, model draft" in text


def test_a_growing_file_is_followed_and_the_last_line_counts(file: Any) -> None:
    read = reader(file(Running(step=1)))
    assert read()[0].one("steps_total") == 1
    file(Running(step=2))
    file(Running(step=3))
    assert read()[0].one("steps_total") == 3
    assert read()[0].one("steps_total") == 3


def test_an_empty_file_has_nothing_yet(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    path.touch()
    assert "stats.jsonl: nothing yet" in drawn(str(path))


@pytest.mark.parametrize("terminal", [True, False])
def test_the_live_table_goes_on_while_the_endpoint_is_away(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    answers: Any = iter(["ok", OSError("http://x: does not answer"), "ok", KeyboardInterrupt()])

    def read() -> list[Any]:
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer
        return []

    monkeypatch.setattr(watching, "reader", lambda source: read)
    screen = console(terminal)
    with pytest.raises(KeyboardInterrupt):
        watch("http://x", interval=1e-3, console=screen)
    before, _, after = screen.file.getvalue().partition("does not answer")
    assert "nothing yet" in before
    assert "nothing yet" in after


def test_layers_are_cut_to_the_room_that_there_is() -> None:
    view = reader_of(Running())
    full = screen_of(watching._panel(watching._import_rich(), view, _History(), None))
    cut = screen_of(watching._panel(watching._import_rich(), view, _History(), 1))
    assert len(full.splitlines()) == len(cut.splitlines()) + 2


def reader_of(source: Any) -> watching.View:
    from torch_eplb.exporters import series

    view = watching.View("rank 0")
    for point in series(snapshot(source)):
        view.add(point.metric.name, point.labels, point.value)
    return view


def screen_of(renderable: Any) -> str:
    screen = console()
    screen.print(renderable)
    return str(screen.file.getvalue())


def test_speed_and_the_course_of_par_come_from_what_was_seen() -> None:
    history = _History()
    assert (history.rate, history.sparks) == ("", "")
    for second, (step, par) in enumerate([(0, 2.0), (50, 1.5), (100, 1.0)]):
        source = Running(step=step, par_now=[par] * 3)
        history.note(reader_of(source), float(second))
    assert history.rate == " (50.0 per second)"
    assert history.sparks == "█▅▁"


class Elsewhere(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/page" else 404)
        self.end_headers()
        self.wfile.write(b"<html>{not metrics</html>")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def elsewhere() -> Any:
    server = HTTPServer(("127.0.0.1", 0), Elsewhere)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{none}", "No such file"),
        ("{folder}", "is a directory"),
        ("{text}", "holds a line that is no snapshot"),
        ("ftp://host/x", "is neither an http address nor a file"),
        ("{url}/missing", "does not answer (Not Found)"),
        ("{url}/page", "is no Prometheus endpoint"),
        ("http://127.0.0.1:1/metrics", "does not answer"),
    ],
)
def test_what_cannot_be_watched_is_one_line(
    tmp_path: Path, capsys: Any, elsewhere: str, source: str, message: str
) -> None:
    names = {"none": tmp_path / "none", "folder": tmp_path, "text": tmp_path / "text"}
    names["text"].write_text("hello\n")
    assert main(["watch", source.format(url=elsewhere, **names), "--once"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_wrong_interval_is_one_line(file: Any, capsys: Any) -> None:
    assert main(["watch", file(Running()), "--interval", "0"]) == 2
    assert "interval must be a finite number of seconds above 0" in capsys.readouterr().err


def test_watch_as_a_user_runs_it(file: Any) -> None:
    command = [sys.executable, "-m", "torch_eplb", "watch", file(Running()), "--once"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "step 1,234: collecting load" in result.stdout
    assert result.stderr == ""
