"""``python -m torch_eplb report``: a run's snapshots as one HTML page that needs nothing else.

Pictures are drawn here, as SVG and as PNG files inside the page; a few lines of script move between
the windows of the heat maps, and without script the last window is shown.

Imports numpy only.
"""

from __future__ import annotations

import base64
import html
import json
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.exporters.heat import RAMP, heat, png, relative
from torch_eplb.exporters.snapshots import Snapshot
from torch_eplb.exporters.text import human_bytes
from torch_eplb.offline.chart import Line, bars, lines
from torch_eplb.offline.style import SCRIPT, STYLE

__all__ = ["page", "runs_of"]

_MOST_WINDOWS = 40
_EXPERT_HEAT, _RANK_HEAT = 4.0, 1.5
"""Load / mean that gets the darkest red; the same on every page, so that pages compare."""


def runs_of(snapshots: Iterable[Snapshot], wanted: Iterable[str] = ()) -> list[list[Snapshot]]:
    """The snapshots of one balancer, a list per rank, each in order of time.

    Args:
        snapshots: of any ranks and balancers.
        wanted: labels as "key=value" that they must have.

    Raises:
        ValueError: snapshots of several balancers or of none, or a label without "=".
    """
    labels = dict(_label(text) for text in wanted)
    runs: dict[int, list[Snapshot]] = {}
    seen: dict[tuple[tuple[str, str], ...], None] = {}
    for taken in snapshots:
        if labels.items() <= taken.labels.items():
            runs.setdefault(taken.rank, []).append(taken)
            seen[tuple(sorted(taken.labels.items()))] = None
    if len(seen) > 1:
        named = "; ".join(", ".join(f"{k}={v}" for k, v in key) or "no labels" for key in seen)
        raise ValueError(f"there are snapshots of several balancers ({named}); choose with --label")
    if not seen:
        raise ValueError(f"there are no snapshots with {', '.join(wanted) or 'any label'}")
    return [sorted(runs[rank], key=lambda taken: taken.time) for rank in sorted(runs)]


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"label {text!r} is not KEY=VALUE")
    return key, value


def page(runs: Sequence[Sequence[Snapshot]]) -> str:
    """A page about one balancer.

    Args:
        runs: as `runs_of` gives them. What is the same on all ranks is taken from the lowest one.
    """
    ranks = [run[0].rank for run in runs]
    run = runs[0]
    last = run[-1]
    parts = [
        _head(run, ranks),
        _tiles(last),
        _section("PAR over time", _par(run)),
        _section("Moves", _moves(run)),
        _section("Load per expert", _heat(run, "load", "expert", _EXPERT_HEAT)),
        _section("Load per rank", _heat(run, "rank_load", "rank", _RANK_HEAT)),
        _section("Replicas", _replicas(last)),
        _section("Layers", _layers(last)),
        _section("Ranks", _ranks([r[-1] for r in runs])),
        _section("Events", _events(run)),
    ]
    body = "\n".join(part for part in parts if part)
    title = f"torch_eplb: {_text(_words(last))}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n{body}\n"
        f"<script>{SCRIPT}</script>\n</body></html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _words(last: Snapshot) -> str:
    labels = ", ".join(f"{key} {value}" for key, value in sorted(last.labels.items()))
    return labels or f"step {last.stats['step']:,}"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}\n</section>" if content else ""


def _head(run: Sequence[Snapshot], ranks: list[int]) -> str:
    first, last = run[0], run[-1]
    when = [time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(s.time)) for s in (first, last)]
    shape = ""
    if last.placement is not None:
        layers, num_ranks, slots = last.placement.shape
        experts = int(last.placement.max()) + 1
        shape = (
            f"{layers} layers; {experts} experts and {num_ranks * slots - experts} redundant ones "
            f"on {num_ranks} ranks of {slots} slots. "
        )
    word = "rank" if len(ranks) == 1 else "ranks"
    files = f"{word} {', '.join(map(str, ranks))}" if len(ranks) < 9 else f"{len(ranks)} ranks"
    return (
        f"<header><h1>Expert load balancing: {_text(_words(last))}</h1>"
        f"<p>{shape}{len(run)} snapshots from step {first.stats['step']:,} ({when[0]} UTC) to "
        f"{last.stats['step']:,} ({when[1]} UTC), of {files}.</p></header>"
    )


def _tiles(last: Snapshot) -> str:
    stats = last.stats
    par = [_mean(stats.get(name)) for name in ("par_measured", "par_predicted")]
    tiles = [
        ("PAR, last window", par[0], "mean over layers; 1 is perfect"),
        ("PAR, expected", par[1], "by the last plan"),
        ("Rebalances", f"{stats.get('rebalances', 0):,}", f"now: {stats['stage']}"),
        ("Experts moved", f"{stats.get('experts_moved', 0):,}",
         f"in {stats.get('placement_version', 0):,} rounds"),
        ("Received", human_bytes(stats.get("bytes_received", 0)), f"by rank {last.rank}"),
        ("Staging", human_bytes(stats.get("staging_bytes_peak", 0)),
         f"used at most, of {human_bytes(stats.get('staging_bytes', 0))}"),
        ("At step boundaries", f"{stats.get('hook_seconds', 0):.2f} s", "of the host's time"),
        ("Planning", f"{stats.get('plan_seconds', 0):.2f} s", "beside the model"),
    ]  # fmt: skip
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{_text(value)}</dd><small>{_text(note)}</small></div>"
        for name, value, note in tiles
    )
    troubles = [(n, stats.get(n)) for n in ("stalled", "disabled") if stats.get(n)]
    alarm = "".join(f'<p class="alarm">{name}: {_text(why)}</p>' for name, why in troubles)
    return f'{alarm}<dl class="tiles">{cells}</dl>'


def _mean(values: Any) -> str:
    numbers = np.asarray([] if values is None else values, dtype=np.float64)
    return f"{np.nanmean(numbers):.3f}" if np.isfinite(numbers).any() else "not known yet"


# ---- over time --------------------------------------------------------------------------------


def _per_step(run: Sequence[Snapshot], name: str, reduce: Any) -> list[tuple[float, float]]:
    points = []
    for taken in run:
        values = np.asarray(taken.stats.get(name) or [], dtype=np.float64)
        if np.isfinite(values).any():
            points.append((float(taken.stats["step"]), float(reduce(values))))
    return points


def _par(run: Sequence[Snapshot]) -> str:
    drawn = [
        Line("worst layer, measured", _per_step(run, "par_measured", np.nanmax), "light"),
        Line("mean, measured", _per_step(run, "par_measured", np.nanmean), "main"),
        Line("mean, expected by the plan", _per_step(run, "par_predicted", np.nanmean), "dashed"),
        Line("mean, last steps", _per_step(run, "par_now", np.nanmean), "other"),
    ]
    drawn = [line for line in drawn if line.points]
    if not drawn:
        return "<p>Not known before the first collection window has ended.</p>"
    marks = [
        float(after.stats["step"])
        for before, after in pairwise(run)
        if after.stats.get("rebalances", 0) > before.stats.get("rebalances", 0)
    ]
    note = "<p>Peak-to-average ratio of rank load, by step; triangles mark rebalances.</p>"
    return note + lines(drawn, marks, "step", "PAR", least=1.0)


def _moves(run: Sequence[Snapshot]) -> str:
    steps, moved, sizes = [], [], []
    for before, after in pairwise(run):
        count = after.stats.get("experts_moved", 0) - before.stats.get("experts_moved", 0)
        if count > 0:
            steps.append(float(after.stats["step"]))
            moved.append(float(count))
            received = [t.stats.get("bytes_received", 0) for t in (before, after)]
            sizes.append(received[1] - received[0])
    if not steps:
        return "<p>No expert has moved between two snapshots.</p>"
    titles = [
        f"step {step:,.0f}: {count:,.0f} experts, {human_bytes(max(size, 0))} received by rank "
        f"{run[0].rank}"
        for step, count, size in zip(steps, moved, sizes, strict=True)
    ]
    start, end = float(run[0].stats["step"]), float(run[-1].stats["step"])
    note = "<p>Experts moved between two snapshots, all layers and ranks.</p>"
    return note + bars(steps, moved, titles, (start, end), "step", "experts")


# ---- heat maps --------------------------------------------------------------------------------


def _windows(run: Sequence[Snapshot], name: str) -> list[tuple[int, NDArray[Any]]]:
    """Each window once, at the first step that has it; evenly thinned out."""
    found: list[tuple[int, NDArray[Any]]] = []
    for taken in run:
        load = getattr(taken, name)
        if load is not None and (not found or not np.array_equal(found[-1][1], load)):
            found.append((int(taken.stats["step"]), load))
    if len(found) > _MOST_WINDOWS:
        chosen = np.linspace(0, len(found) - 1, _MOST_WINDOWS).round().astype(int)
        found = [found[i] for i in chosen]
    return found


def _heat(run: Sequence[Snapshot], name: str, column: str, most: float) -> str:
    windows = _windows(run, name)
    if not windows:
        return ""
    pictures = [_picture(heat(relative(load), most)) for _, load in windows]
    rows, columns = windows[-1][1].shape
    captions = [
        f"the window known at step {step:,}: {load.sum():,} tokens" for step, load in windows
    ]
    control = ""
    if len(windows) > 1:
        data = _text(json.dumps([pictures, captions]))
        control = (
            f'<input type="range" min="0" max="{len(windows) - 1}" value="{len(windows) - 1}" '
            f'aria-label="window" data-windows="{data}">'
        )
    return (
        f"<p>Load / mean of its layer. {_legend(f'{most:g} and more')}</p>"
        f'<figure class="heat">{control}<figcaption>{captions[-1]}</figcaption>'
        f"{_framed(pictures[-1], rows, columns, column)}</figure>"
    )


def _framed(picture: str, rows: int, columns: int, column: str) -> str:
    height = min(480, max(rows * 10, 60))
    return (
        '<div class="frame">'
        f'<span class="rows"><b>layer 0</b><b>{rows - 1 if rows > 1 else ""}</b></span>'
        f'<img src="{picture}" style="height:{height}px" '
        f'alt="{rows} layers by {columns} {column}s">'
        f'<span class="columns"><b>{column} 0</b><b>{columns - 1}</b></span></div>'
    )


def _picture(colours: NDArray[np.uint8]) -> str:
    return "data:image/png;base64," + base64.b64encode(png(colours)).decode()


def _legend(more: str) -> str:
    stops = ", ".join(f"rgb({r:.0f},{g:.0f},{b:.0f})" for r, g, b in RAMP)
    return (
        f'<span class="legend">0 <i style="background:linear-gradient(90deg,{stops})"></i> {more}'
        ", white is the mean</span>"
    )


def _replicas(last: Snapshot) -> str:
    if last.placement is None:
        return ""
    layers = len(last.placement)
    experts = int(last.placement.max()) + 1
    counts = np.zeros((layers, experts))
    np.add.at(counts, (np.arange(layers)[:, None], last.placement.reshape(layers, -1)), 1)
    if counts.max() < 2:
        return "<p>Every expert has one slot.</p>"
    picture = _picture(heat(counts, float(counts.max())))
    return (
        f"<p>Slots of each expert in the present placement: white has one, the darkest red "
        f"{counts.max():.0f}.</p>"
        f'<figure class="heat">{_framed(picture, layers, experts, "expert")}</figure>'
    )


# ---- tables -----------------------------------------------------------------------------------


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _layers(last: Snapshot) -> str:
    measured = np.asarray(last.stats.get("par_measured") or [], dtype=np.float64)
    predicted = np.asarray(last.stats.get("par_predicted") or [], dtype=np.float64)
    header = ["layer", "PAR", "expected"]
    columns = [measured, predicted]
    if last.load is not None:
        header += ["hottest expert", "its load / mean", "tokens"]
    rows = []
    for layer in range(len(measured)):
        row = [layer, *(f"{c[layer]:.3f}" if np.isfinite(c[layer]) else "" for c in columns)]
        if last.load is not None:
            load = last.load[layer]
            share = relative(load)[load.argmax()]
            row += [int(load.argmax()), f"{share:.2f}", f"{load.sum():,}"]
        rows.append(row)
    return _table(header, rows) if rows else ""


def _ranks(lasts: Sequence[Snapshot]) -> str:
    tokens = lasts[0].rank_load
    header = [
        "rank of the process",
        "sent",
        "received",
        "staging used",
        "at step boundaries",
        "step",
    ]
    rows = [
        [
            taken.rank,
            human_bytes(taken.stats.get("bytes_sent", 0)),
            human_bytes(taken.stats.get("bytes_received", 0)),
            human_bytes(taken.stats.get("staging_bytes_peak", 0)),
            f"{taken.stats.get('hook_seconds', 0):.2f} s",
            f"{taken.stats['step']:,}",
        ]
        for taken in lasts
    ]
    table = _table(header, rows)
    if tokens is not None and tokens.shape[1] <= 64:
        shares = relative(tokens.sum(axis=0))
        rows = [[r, f"{t:,}", f"{s:.3f}"] for r, (t, s) in
                enumerate(zip(tokens.sum(axis=0).tolist(), shares, strict=True))]  # fmt: skip
        table += _table(["expert-parallel rank", "tokens, last window", "load / mean"], rows)
    return table


def _events(run: Sequence[Snapshot]) -> str:
    """What went wrong, and when it was first seen."""
    counted = {"plans_failed": "plans failed", "planner_restarts": "planner restarted",
               "rebalances_abandoned": "rebalances abandoned"}  # fmt: skip
    rows = []
    for before, after in zip([None, *run[:-1]], run, strict=True):
        old = {} if before is None else before.stats
        step = f"{after.stats['step']:,}"
        for name, words in counted.items():
            more = after.stats.get(name, 0) - old.get(name, 0)
            if more > 0:
                rows.append([step, f"{words}: {more}"])
        rows += [
            [step, f"{name}: {after.stats[name]}"]
            for name in ("stalled", "disabled")
            if after.stats.get(name) and after.stats.get(name) != old.get(name)
        ]
        if before is not None and after.stats["step"] < before.stats["step"]:
            rows.append([step, "another run begins"])
    if not rows:
        return "<p>Nothing went wrong.</p>"
    return f'<div class="words">{_table(["seen at step", "event"], rows)}</div>'
