"""A progress bar on stderr: rich's where it is installed, a plain line otherwise."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

__all__ = ["Progress", "progress_bar"]

Progress = Callable[[str, int, int], None]
"""Called with a label, the steps done and the steps in all."""


@contextlib.contextmanager
def progress_bar(stream: TextIO | None = None) -> Iterator[Progress | None]:
    """Shows progress while the block runs, when ``stream`` is a terminal.

    Args:
        stream: where to draw; stderr by default, so that results can be piped.

    Yields:
        A function ``(label, done, total)`` that moves the bar of ``label``; None when nobody looks.
    """
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars
    except ImportError:
        yield _plain(stream)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(file=stream)) as bars:
        tasks = {}

        def update(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done)

        yield update


def _plain(stream: TextIO) -> Progress:
    def update(label: str, done: int, total: int) -> None:
        bar = "#" * (30 * done // total)
        end = "\n" if done >= total else ""
        stream.write(f"\r{label:<16} [{bar:<30}] {done}/{total} steps{end}")
        stream.flush()

    return update
