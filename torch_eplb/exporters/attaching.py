"""`attach`: snapshots from a thread of their own, so that the model's steps do nothing for them.

The thread reads attributes of the balancer and nothing else. It makes no tensor, waits for no
stream and takes no lock that a step takes; an exporter that is slow or fails delays only itself.
"""

from __future__ import annotations

import logging
import re
import threading
import time
import types
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

from torch_eplb.exporters.snapshots import Exporter, Snapshot, Source, snapshot

__all__ = ["Attachment", "attach"]

logger = logging.getLogger("torch_eplb")

_UNITS = {"": 1.0, "s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "min": 60.0, "h": 3600.0}

_LOOK_EVERY = 0.1
"""Seconds between two looks at the step, where snapshots are taken every so many steps."""


@dataclass(frozen=True)
class _Every:
    seconds: float
    steps: int | None

    @classmethod
    def parse(cls, every: float | str) -> _Every:
        if isinstance(every, bool) or not isinstance(every, (int, float, str)):
            raise TypeError(
                f'every must be a number of seconds, or text like "10s" or "500 steps", '
                f"got {every!r}"
            )
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)\s*", str(every))
        number, unit = (float(match[1]), match[2]) if match else (0.0, "")
        if number > 0 and unit in ("step", "steps") and number == int(number):
            return cls(_LOOK_EVERY, int(number))
        if number > 0 and unit in _UNITS:
            return cls(number * _UNITS[unit], None)
        raise ValueError(
            f'every={every!r} is no interval; write seconds, "10s", "5min" or "500 steps"'
        )


class Attachment:
    """A running export; made by `attach`. Also a context manager."""

    def __init__(self, thread: threading.Thread, stop: threading.Event) -> None:
        self._thread = thread
        self._stop = stop

    @property
    def closed(self) -> bool:
        """Whether the thread has ended: after `close`, or because the balancer is gone."""
        return not self._thread.is_alive()

    def close(self, timeout: float = 10.0) -> None:
        """Exports once more and ends the thread. The exporter stays open. Idempotent.

        Args:
            timeout: seconds to wait for an exporter that is busy; its thread ends with the process.
        """
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self.close()


def attach(
    source: Source,
    exporter: Exporter,
    *,
    every: float | str = 10.0,
    rank: int | None = None,
    labels: Mapping[str, str] | None = None,
) -> Attachment:
    """Exports snapshots of a balancer from a thread, until it is closed or gone.

    The first snapshot is taken at once, the last one when the balancer or the attachment is closed;
    so close the attachment before the exporter.
    A balancer that is dropped is not kept alive. After a fork the copy has no such thread.

    Args:
        source: the balancer.
        exporter: where snapshots go. An exception that it raises is logged, once per failure in a
            row, and the next snapshot is tried all the same.
        every: seconds, or text: "10s", "5min", "500 steps". Steps are looked at ten times a second.
        rank: label of this process; None asks torch.distributed.
        labels: what tells this balancer from others in the program.

    Raises:
        TypeError, ValueError: ``every`` is no interval.
    """
    interval = _Every.parse(every)
    stop = threading.Event()
    thread = threading.Thread(
        target=_run,
        args=(weakref.ref(source), exporter, interval, rank, dict(labels or {}), stop),
        name="torch_eplb exporter",
        daemon=True,
    )
    thread.start()
    return Attachment(thread, stop)


def _run(
    source: weakref.ref[Source],
    exporter: Exporter,
    every: _Every,
    rank: int | None,
    labels: dict[str, str],
    stop: threading.Event,
) -> None:
    due, due_step = time.monotonic(), 0
    failing = ended = False
    while not ended:
        stopped = stop.wait(max(0.0, due - time.monotonic()))
        due = max(due + every.seconds, time.monotonic())
        try:
            # In a function, so that between two snapshots nothing here keeps the model alive.
            taken = _take(source, rank, labels)
            if taken is None:
                return
            if getattr(exporter, "closed", False):
                return  # before its attachment: there is nothing to tell it any more
            ended = stopped or taken.stats["stage"] == "closed"
            if every.steps is not None and not ended and taken.stats["step"] < due_step:
                continue
            due_step = taken.stats["step"] + (every.steps or 0)
            exporter.export(taken)
            failing = False
        except Exception as error:
            ended = ended or stopped
            if not failing:
                logger.warning("exporting to %s failed: %r", type(exporter).__name__, error)
            failing = True


def _take(source: weakref.ref[Source], rank: int | None, labels: dict[str, str]) -> Snapshot | None:
    balancer = source()
    return None if balancer is None else snapshot(balancer, rank=rank, labels=labels)
