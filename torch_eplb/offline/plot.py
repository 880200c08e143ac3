"""Pictures of a simulation: load per expert, load per rank before and after, PAR over time.

Needs matplotlib, which is imported when a picture is drawn and not before.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.files.paths import PathLike, atomic_write, open_checked
from torch_eplb.offline.replay import NO_BALANCING

__all__ = ["plot_simulation", "read_simulation"]

MAX_STATS_BYTES = 256 * 2**20
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette, which colour-blind readers can tell apart; "none" is grey."""

_SMOOTHING = 15
"""Steps of the moving mean of PAR."""

_SERIES = ("par_series", "first_step", "rebalance_steps", "rank_load", "par_mean")


def read_simulation(path: PathLike) -> dict[str, Any]:
    """Reads what ``python -m torch_eplb simulate --json`` wrote, and checks what `plot` needs.

    Raises:
        OSError: the file is missing, unreadable or a directory.
        ValueError: not such a file; the message says what is missing.
    """
    name = os.fspath(path)
    with open_checked(path, "simulation", MAX_STATS_BYTES) as file:
        data = file.read(MAX_STATS_BYTES)
    remedy = "write one with: python -m torch_eplb simulate TRACE --ranks R --json FILE"
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: neither a trace nor JSON ({error}); {remedy}") from None
    try:
        _check(document)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{name}: is not the JSON of a simulation ({reason}); {remedy}") from None
    return dict(document)


def _check(document: Any) -> None:
    shape = _matrix(document["expert_load"], "expert_load").shape
    if not document["policies"]:
        raise ValueError("no policies")
    for label, entry in document["policies"].items():
        for key in _SERIES:
            entry[key]
        loads = _matrix(entry["rank_load"], f"rank_load of {label}")
        if len(loads) != shape[0]:
            raise ValueError(f"rank_load of {label} has {len(loads)} layers, not {shape[0]}")
        series = np.asarray(entry["par_series"], dtype=float)
        if series.ndim != 1 or not np.isfinite(series).all() or not series.size:
            raise ValueError(f"par_series of {label} is not a list of numbers")
        for key, kinds in (("par_mean", (int, float)), ("first_step", (int,))):
            if type(entry[key]) not in kinds or not np.isfinite(entry[key]):
                raise ValueError(f"{key} of {label} is not a number: {entry[key]!r}")
        np.asarray([0, *entry["rebalance_steps"]], dtype=int)


def _matrix(rows: Any, what: str) -> NDArray[np.float64]:
    matrix = np.asarray(rows, dtype=float)
    if matrix.ndim != 2 or not matrix.size or not (0 <= matrix).all():
        raise ValueError(f"{what} is not a table of numbers")
    return matrix


def plot_simulation(document: dict[str, Any], path: PathLike, *, dpi: int = 130) -> None:
    """Draws a simulation into a PNG file, written atomically.

    From top to bottom: load per expert; load per rank without balancing and with the policy whose
    mean PAR is least; PAR over time for every policy, the steps of its rebalances marked.

    Args:
        document: what `torch_eplb.offline.simulate.simulate` or `read_simulation` returns.
        path: the file to write.
        dpi: dots per inch of the picture, which is 11 inches wide.

    Raises:
        ImportError: matplotlib is missing; the message names the extra.
        OSError, ValueError: the path cannot be written.
    """
    matplotlib = _import_matplotlib()
    policies = document["policies"]
    best = min(policies, key=lambda label: policies[label]["par_mean"])
    before = NO_BALANCING if NO_BALANCING in policies else next(iter(policies))
    shown = [before] if best == before else [before, best]
    layers = len(document["expert_load"])
    height = float(np.clip(0.22 * layers, 1.4, 4.5))
    figure = matplotlib.figure.Figure(figsize=(11, 2 * height + 6.6), layout="constrained")
    rows = figure.subfigures(3, 1, height_ratios=[height + 0.9, height + 0.9, 4.2])
    figure.suptitle(_title(document), fontsize=13, fontweight="bold")
    _expert_heat(rows[0], _matrix(document["expert_load"], "expert_load"))
    _rank_heat(rows[1], {label: policies[label] for label in shown})
    _par_over_time(rows[2], policies)
    with atomic_write(path, "picture") as file:
        figure.savefig(file, format="png", dpi=dpi)


def _import_matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise ImportError(
            f"pictures need matplotlib ({error}); install it with: pip install torch-eplb[demo]"
        ) from None
    return matplotlib


def _title(document: dict[str, Any]) -> str:
    trace, settings = document.get("trace", {}), document.get("settings", {})
    parts = [
        (trace.get("layers"), "layers"),
        (trace.get("experts"), "experts"),
        (settings.get("num_ranks"), "ranks"),
        (settings.get("num_redundant_experts"), "redundant experts"),
    ]
    return "Expert load balancing: " + ", ".join(
        f"{n} {what}" for n, what in parts if n is not None
    )


def _expert_heat(part: Any, load: NDArray[np.float64]) -> None:
    from matplotlib.colors import TwoSlopeNorm

    axes = part.subplots()
    ordered = -np.sort(-load, axis=1)
    # The same colours as for ranks: white is the mean, red holds others up, blue waits.
    norm = TwoSlopeNorm(1, vmin=0, vmax=max(2, float(load.max())))
    image = axes.imshow(ordered, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    axes.set_title("Load per expert, hottest first in every layer", fontsize=11, loc="left")
    axes.set_xlabel("expert, by load")
    _layer_axis(axes, len(load))
    part.colorbar(image, ax=axes, label="load / mean", pad=0.01)


def _rank_heat(part: Any, shown: dict[str, Any]) -> None:
    from matplotlib.colors import TwoSlopeNorm

    loads = {label: _matrix(entry["rank_load"], label) for label, entry in shown.items()}
    # Symmetric around the mean, as far as loads can be: they are never negative.
    spread = max(0.02, *(float(np.abs(load - 1).max()) for load in loads.values()))
    every = np.atleast_1d(part.subplots(1, len(loads), sharey=True))
    for axes, (label, load) in zip(every, loads.items(), strict=True):
        norm = TwoSlopeNorm(1, vmin=max(0, 1 - spread), vmax=1 + spread)
        image = axes.imshow(load, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
        title = f"Load per rank, {_name(label)}: mean PAR {shown[label]['par_mean']:.3f}"
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("rank")
        if load.shape[1] <= 32:
            axes.set_xticks(range(load.shape[1]))
        if load.size <= 200:
            for (layer, rank), value in np.ndenumerate(load):
                colour = "white" if abs(value - 1) > 0.6 * spread else "black"
                axes.text(rank, layer, f"{value:.2f}", ha="center", va="center", color=colour,
                          fontsize=7)  # fmt: skip
    _layer_axis(every[0], len(next(iter(loads.values()))))
    part.colorbar(image, ax=list(every), label="load / mean", pad=0.01)


def _layer_axis(axes: Any, layers: int) -> None:
    axes.set_ylabel("layer")
    axes.set_yticks(range(0, layers, max(1, layers // 8)))


def _par_over_time(part: Any, policies: dict[str, Any]) -> None:
    axes = part.subplots()
    colours = iter(_COLOURS * len(policies))
    for label, entry in policies.items():
        series = np.asarray(entry["par_series"], dtype=float)
        steps = entry["first_step"] + np.arange(len(series))
        colour = "#7f7f7f" if label == NO_BALANCING else next(colours)
        # Single steps are noisy: they stay visible behind their moving mean.
        smooth = _moving_mean(series, _SMOOTHING)
        axes.plot(steps, series, color=colour, linewidth=0.6, alpha=0.3)
        name = f"{_name(label)}: mean {entry['par_mean']:.3f}"
        axes.plot(steps, smooth, color=colour, linewidth=1.8, label=name)
        marks = np.asarray(entry["rebalance_steps"], dtype=int) - entry["first_step"]
        marks = marks[(marks >= 0) & (marks < len(series))]
        axes.plot(steps[marks], smooth[marks], "v", color=colour, markersize=5, clip_on=False)
    axes.axhline(1, color="black", linewidth=0.8)
    title = f"PAR over time: mean over layers, each step (thin) and over {_SMOOTHING} steps (thick)"
    axes.set_title(f"{title}; triangles: experts move", fontsize=11, loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel("PAR (1.0 is perfect)")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.margins(x=0.01)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, fontsize=9, frameon=False)


def _moving_mean(series: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Centred mean over up to ``width`` neighbours; fewer at both ends."""
    ones = np.ones(min(width, len(series)))
    total = np.convolve(series, ones, mode="same")
    return total / np.convolve(np.ones(len(series)), ones, mode="same")


def _name(label: str) -> str:
    return "no balancing" if label == NO_BALANCING else label
