"""`attach`: the model's steps do nothing for it, and it ends when the balancer does."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
from support.running import Collected, Running

from torch_eplb.exporters import JsonLinesExporter, Snapshot, attach


class Signalling(Collected):
    """Tells when a snapshot has come."""

    def __init__(self) -> None:
        super().__init__()
        self.came = threading.Semaphore(0)

    def export(self, snapshot: Snapshot) -> None:
        super().export(snapshot)
        self.came.release()


def wait(semaphore: threading.Semaphore) -> None:
    assert semaphore.acquire(timeout=30)


def test_the_first_snapshot_comes_at_once_and_the_last_at_close() -> None:
    source, exporter = Running(), Signalling()
    with attach(source, exporter, every="1h", rank=2, labels={"model": "x"}) as attachment:
        wait(exporter.came)
        source.change(step=2000)
        assert not attachment.closed
    assert attachment.closed
    assert [shot.stats["step"] for shot in exporter.snapshots] == [1234, 2000]
    assert {shot.key for shot in exporter.snapshots} == {(2, ("model", "x"))}
    attachment.close()


def test_snapshots_come_every_so_many_seconds() -> None:
    exporter = Signalling()
    source = Running()
    with attach(source, exporter, every=0.01):
        for _ in range(5):
            wait(exporter.came)


def test_snapshots_come_every_so_many_steps() -> None:
    source, exporter = Running(step=0), Signalling()
    looks = threading.Semaphore(0)
    stats = source.stats

    def looked() -> Any:
        looks.release()
        return stats()

    source.stats = looked  # type: ignore[method-assign]
    with attach(source, exporter, every="100 steps"):
        wait(exporter.came)
        source.change(step=99)
        # Whatever looked before the change may have been under way; the second look was not.
        wait(looks), wait(looks), wait(looks)
        assert len(exporter.snapshots) == 1
        source.change(step=150)
        wait(exporter.came)
        source.change(step=249)
        wait(looks), wait(looks)
        source.change(step=250)
        wait(exporter.came)
    assert [shot.stats["step"] for shot in exporter.snapshots][:3] == [0, 150, 250]


def test_it_ends_with_the_balancer_after_a_last_snapshot() -> None:
    source, exporter = Running(), Signalling()
    attachment = attach(source, exporter, every=0.01)
    wait(exporter.came)
    source.change(stage="closed", step=3000)
    attachment._thread.join(30)
    assert attachment.closed
    assert exporter.snapshots[-1].stats["step"] == 3000


def test_it_keeps_no_balancer_alive_and_ends_when_it_is_gone() -> None:
    source: Any = Running()
    exporter = Signalling()
    attachment = attach(source, exporter, every=0.01)
    wait(exporter.came)
    gone = weakref.ref(source)
    source = None
    attachment._thread.join(30)
    gc.collect()
    assert attachment.closed
    assert gone() is None


def test_an_exporter_that_fails_is_said_once_and_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Failing(Signalling):
        def export(self, snapshot: Snapshot) -> None:
            super().export(snapshot)
            if len(self.snapshots) <= 3:
                raise OSError("disk full")

    exporter = Failing()
    source = Running()
    with caplog.at_level(logging.WARNING, "torch_eplb"), attach(source, exporter, every=0.01):
        for _ in range(5):
            wait(exporter.came)
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == ["exporting to Failing failed: OSError('disk full')"]


def test_it_ends_in_silence_when_the_exporter_was_closed_before_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exporter, source = JsonLinesExporter(tmp_path / "stats.jsonl"), Running()
    exporter.close()
    with caplog.at_level(logging.WARNING, "torch_eplb"):
        attachment = attach(source, exporter, every=0.01)
        attachment._thread.join(30)
    assert attachment.closed
    assert caplog.records == []


def test_a_balancer_that_fails_to_answer_does_not_end_the_thread() -> None:
    source, exporter = Running(), Signalling()
    answers = iter([RuntimeError("in a forward"), None, None])
    stats = source.stats

    def sometimes() -> Any:
        error = next(answers, None)
        if error is not None:
            raise error
        return stats()

    source.stats = sometimes  # type: ignore[method-assign]
    with attach(source, exporter, every=0.01):
        wait(exporter.came)


def test_a_thread_that_an_exporter_holds_up_is_not_waited_for() -> None:
    release = threading.Event()

    class Stuck(Signalling):
        def export(self, snapshot: Snapshot) -> None:
            super().export(snapshot)
            release.wait(60)

    exporter = Stuck()
    source = Running()
    attachment = attach(source, exporter, every=0.01)
    wait(exporter.came)
    attachment.close(timeout=0.05)
    assert not attachment.closed
    release.set()
    attachment._thread.join(30)


@pytest.mark.parametrize(
    "every", [0, -1, "0 steps", "1.5 steps", "soon", "10 parsecs", "", "nan", float("inf")]
)
def test_what_is_no_interval_is_an_error(every: Any) -> None:
    with pytest.raises(ValueError, match='is no interval; write seconds, "10s", "5min" or "500'):
        attach(Running(), Collected(), every=every)


@pytest.mark.parametrize("every", [None, True, [1]])
def test_what_is_no_number_or_text_is_an_error(every: Any) -> None:
    with pytest.raises(TypeError, match="every must be a number of seconds"):
        attach(Running(), Collected(), every=every)


@pytest.mark.parametrize(("every", "seconds"), [("250ms", 0.25), ("2 min", 120), (1.5, 1.5)])
def test_intervals_have_units(every: Any, seconds: float) -> None:
    from torch_eplb.exporters.attaching import _Every

    assert _Every.parse(every).seconds == seconds
