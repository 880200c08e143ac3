"""``python -m torch_eplb watch``: a running balancer as a live table.

Reads a Prometheus endpoint (needs prometheus-client) or a growing file of JSON lines, and draws
with rich; both are in the extra ``watch``.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch_eplb.exporters.jsonl import SnapshotLines
from torch_eplb.exporters.metrics import PREFIX, series
from torch_eplb.exporters.text import human_bytes

__all__ = ["View", "reader", "watch"]

_AXES = ("layer", "ep_rank", "expert", "stage")
_MAX_ANSWER_BYTES = 64 * 2**20
_SECONDS_TO_ANSWER = 5.0
_SPARKS = "▁▂▃▄▅▆▇█"


@dataclass
class View:
    """One balancer on one rank, by metric name: ``{labels on the table's axes: value}``."""

    name: str
    values: dict[str, dict[tuple[str, ...], float]] = field(default_factory=dict)

    def add(self, name: str, labels: tuple[str, ...], value: float) -> None:
        self.values.setdefault(name, {})[labels] = value

    def one(self, name: str) -> float | None:
        """The value of a metric without axes."""
        return self.values.get(name, {}).get(())

    def along(self, name: str) -> dict[int, float]:
        """The values of a metric with one axis, by layer or rank."""
        found = self.values.get(name, {})
        return {int(key[0]): found[key] for key in sorted(found, key=lambda k: int(k[0]))}

    @property
    def stage(self) -> str:
        return next(iter(self.values.get("stage", {})), ("",))[0]


Reader = Callable[[], list[View]]


def reader(source: str) -> Reader:
    """A function that asks ``source`` for its present views; [] while there is nothing yet.

    Args:
        source: http(s) address of an endpoint, or path of a file.

    Raises:
        ImportError: prometheus-client is missing.
        OSError, ValueError: there is no such file, or it is none of snapshots.
    """
    if source.startswith(("http://", "https://")):
        return _endpoint(source)
    if "://" in source:
        raise ValueError(f"{source}: is neither an http address nor a file")
    lines = SnapshotLines(source)
    views: dict[tuple[Any, ...], View] = {}

    def read() -> list[View]:
        for taken in lines.read():
            view = View(_name({"rank": str(taken.rank), **taken.labels}))
            for point in series(taken):
                view.add(point.metric.name, point.labels, point.value)
            views[taken.key] = view
        return list(views.values())

    return read


def _endpoint(address: str) -> Reader:
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError as error:
        raise ImportError(
            f"watching an endpoint needs prometheus-client ({error}); install it with: "
            "pip install torch-eplb[watch]"
        ) from None

    def read() -> list[View]:
        try:
            with urllib.request.urlopen(address, timeout=_SECONDS_TO_ANSWER) as response:
                text = response.read(_MAX_ANSWER_BYTES).decode()
            views: dict[str, View] = {}
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.name.startswith(PREFIX):
                        _add(views, sample.name.removeprefix(PREFIX), sample.labels, sample.value)
        except (urllib.error.URLError, OSError) as error:
            raise OSError(
                f"{address}: does not answer ({getattr(error, 'reason', error)})"
            ) from None
        except ValueError as error:
            raise ValueError(f"{address}: is no Prometheus endpoint ({error})") from None
        return list(views.values())

    return read


def _add(views: dict[str, View], metric: str, labels: Mapping[str, str], value: float) -> None:
    name = _name({key: text for key, text in labels.items() if key not in _AXES})
    axes = tuple(labels[axis] for axis in _AXES if axis in labels)
    views.setdefault(name, View(name)).add(metric, axes, value)


def _name(labels: Mapping[str, str]) -> str:
    others = [f"{key} {text}" for key, text in sorted(labels.items()) if key != "rank" and text]
    return ", ".join([f"rank {labels.get('rank', '?')}", *others])


@dataclass
class _History:
    """What single views do not tell: how fast steps come, and how PAR went."""

    steps: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=30))
    par: deque[float] = field(default_factory=lambda: deque(maxlen=40))

    def note(self, view: View, now: float) -> None:
        step = view.one("steps_total")
        if step is not None and (not self.steps or step != self.steps[-1][1]):
            self.steps.append((now, step))
        par = view.one("par_now_mean_ratio") or view.one("par_measured_mean_ratio")
        if par is not None and (not self.par or par != self.par[-1]):
            self.par.append(par)

    @property
    def rate(self) -> str:
        if len(self.steps) < 2:
            return ""
        (t0, s0), (t1, s1) = self.steps[0], self.steps[-1]
        return f" ({(s1 - s0) / (t1 - t0):.1f} per second)" if t1 > t0 and s1 > s0 else ""

    @property
    def sparks(self) -> str:
        if len(self.par) < 2:
            return ""
        low, high = min(self.par), max(self.par)
        scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0
        return "".join(_SPARKS[round((value - low) * scale)] for value in self.par)


def watch(source: str, *, interval: float = 2.0, once: bool = False, console: Any = None) -> None:
    """Draws until interrupted.

    Args:
        source: http(s) address of an endpoint, or path of a file.
        interval: seconds between two looks.
        once: draw once and return.
        console: rich console to draw on; None for stdout.

    Raises:
        ImportError: rich, or prometheus-client for an address, is missing.
        OSError, ValueError: there is nothing that can be read. Once drawing has begun, a source
            that is away is waited for.
    """
    if not 0 < interval < float("inf"):
        raise ValueError(f"interval must be a finite number of seconds above 0, got {interval}")
    rich = _import_rich()
    console = rich.Console(file=sys.stdout) if console is None else console
    read = reader(source)
    histories: dict[str, _History] = {}

    def draw(height: int | None) -> Any:
        views = read()
        for view in views:
            histories.setdefault(view.name, _History()).note(view, time.monotonic())
        if not views:
            return rich.Text(f"{os.path.basename(source)}: nothing yet")
        room = None if height is None else max(4, height // len(views) - 18)
        return rich.Group(*(_panel(rich, v, histories[v.name], room) for v in views))

    console_is_live = console.is_terminal and not once
    first = draw(console.height if console_is_live else None)
    if not console_is_live:
        console.print(first)
    if once:
        return
    live = rich.Live(first, console=console, auto_refresh=False) if console_is_live else None
    with live or contextlib.nullcontext():
        while True:
            time.sleep(interval)
            try:
                drawn = draw(console.height if console_is_live else None)
            except OSError as error:
                drawn = rich.Text(str(error), style="red")
            if live is None:
                console.print(drawn)  # a file or a pipe keeps every look
            else:
                live.update(drawn, refresh=True)


@dataclass(frozen=True)
class _Rich:
    Console: Any
    Group: Any
    Live: Any
    Panel: Any
    Table: Any
    Text: Any


def _import_rich() -> _Rich:
    try:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise ImportError(
            f"watch needs rich ({error}); install it with: pip install torch-eplb[watch]"
        ) from None
    return _Rich(Console, Group, Live, Panel, Table, Text)


def _panel(rich: _Rich, view: View, history: _History, room: int | None) -> Any:
    """One balancer; at most ``room`` layers."""
    step = view.one("steps_total") or 0
    parts = [rich.Text(f"step {step:,.0f}{history.rate}: {view.stage}")]
    for name, words in (
        ("stalled", "STALLED: see the log"),
        ("disabled", "OFF FOR GOOD: see the log"),
    ):
        if view.one(name):
            parts.append(rich.Text(words, style="bold red"))
    parts += [_balance(rich, view, history), _totals(rich, view)]
    parts += [table for table in (_ranks(rich, view), _layers(rich, view, room)) if table]
    return rich.Panel(rich.Group(*parts), title=f"torch_eplb, {view.name}", title_align="left")


def _balance(rich: _Rich, view: View, history: _History) -> Any:
    table = rich.Table(box=None, pad_edge=False, header_style="bold")
    for header, right in (("PAR (1 is perfect)", False), ("mean", True), ("worst layer", True)):
        table.add_column(header, justify="right" if right else "left")
    table.add_column(history.sparks, style="cyan", no_wrap=True)
    for label, name in (
        ("last steps", "par_now"),
        ("last window", "par_measured"),
        ("expected by the last plan", "par_predicted"),
    ):
        mean = view.one(f"{name}_mean_ratio")
        if mean is None:
            continue
        worst = max(view.along(f"{name}_ratio").values(), default=view.one(f"{name}_max_ratio"))
        table.add_row(label, f"{mean:.3f}", "" if worst is None else f"{worst:.3f}", "")
    if not table.row_count:
        table.add_row("not known before the first window has ended", "", "", "")
    return table


def _totals(rich: _Rich, view: View) -> Any:
    def number(name: str) -> float:
        return view.one(name) or 0.0

    age = view.one("rebalance_age_seconds")
    last = "" if age is None else f", the last {age:,.0f} s ago"
    rows = (
        ("rebalances", f"{number('rebalances_total'):,.0f}{last}; planned early: "
         f"{number('early_plans_total'):.0f}"),
        ("experts moved", f"{number('experts_moved_total'):,.0f} in "
         f"{number('placement_version'):,.0f} rounds"),
        ("traffic of this rank", f"{human_bytes(number('sent_bytes_total'))} sent, "
         f"{human_bytes(number('received_bytes_total'))} received"),
        ("staging", f"{human_bytes(number('staging_peak_bytes'))} used at most of "
         f"{human_bytes(number('staging_bytes'))}"),
        ("time", f"{number('planning_seconds_total'):.2f} s planning, "
         f"{number('hook_seconds_total'):.2f} s at step boundaries "
         f"({number('migration_seconds_total'):.2f} s moving)"),
        ("faults", f"plans failed: {number('plans_failed_total'):.0f}, planner restarts: "
         f"{number('planner_restarts_total'):.0f}, rebalances abandoned: "
         f"{number('rebalances_abandoned_total'):.0f}"),
    )  # fmt: skip
    table = rich.Table(box=None, pad_edge=False, show_header=False)
    for label, text in rows:
        table.add_row(label, text)
    return table


def _ranks(rich: _Rich, view: View) -> Any:
    tokens, active = view.along("rank_tokens"), view.along("active_experts")
    mean = sum(tokens.values()) / len(tokens) if tokens else 0
    if not mean:
        return None
    table = rich.Table(box=None, pad_edge=False, header_style="bold")
    for header in ("rank", "tokens", "load / mean", "active experts"):
        table.add_column(header, justify="right")
    table.add_column("")
    # Of many ranks those at both ends.
    order = sorted(tokens, key=lambda rank: -tokens[rank])
    shown = order if len(order) <= 8 else order[:4] + order[-4:]
    for rank in shown:
        share = tokens[rank] / mean
        used = f"{active[rank]:.1f}" if rank in active else ""
        table.add_row(str(rank), f"{tokens[rank]:,.0f}", f"{share:.3f}", used, _bar(share))
    return table


def _layers(rich: _Rich, view: View, room: int | None) -> Any:
    measured = view.along("par_measured_ratio")
    if not measured:
        return None
    expected, hottest = view.along("par_predicted_ratio"), view.along("expert_peak_ratio")
    table = rich.Table(box=None, pad_edge=False, header_style="bold")
    for header in ("layer", "PAR", "expected", "hottest expert / mean"):
        table.add_column(header, justify="right")
    table.add_column("")
    order = sorted(measured, key=lambda layer: -measured[layer])
    for layer in order if room is None else order[:room]:
        row = [str(layer), f"{measured[layer]:.3f}"]
        row += [f"{values[layer]:.3f}" if layer in values else "" for values in (expected, hottest)]
        table.add_row(*row, _bar(measured[layer]))
    return table


def _bar(ratio: float) -> str:
    """Ten cells for the mean, at most thirty."""
    return "█" * min(30, round(10 * ratio))
