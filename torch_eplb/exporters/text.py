"""A balancer's state as a table for people: `report`.

Imports numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.exporters.heat import relative
from torch_eplb.values.metrics import Stats
from torch_eplb.values.placement import Placement

__all__ = ["human_bytes", "report"]

Load = tuple[NDArray[Any], NDArray[Any]]

_MOST_LAYERS = 12


def report(stats: Stats, placement: Placement, load: Load | None = None) -> str:
    """What ``balancer.report()`` prints.

    Args:
        stats: ``balancer.stats()``.
        placement: ``balancer.placement``.
        load: tokens by logical expert ``[layers, experts]`` and by rank ``[layers, ranks]``, of the
            last window or since wrapping; None leaves the columns about them out.

    Returns:
        Lines of at most 100 characters.
    """
    layers, ranks, slots = placement.experts.shape
    head = (
        f"torch_eplb: {layers} layers, {placement.num_experts} experts and "
        f"{placement.num_redundant_experts} redundant ones on {ranks} ranks of {slots} slots"
    )
    lines = [head, f"step {stats.step:,}: {stats.stage}"]
    lines += [f"{name} {reason}" for name, reason in _troubles(stats)]
    lines += ["", *_balance(stats), "", *_totals(stats), "", *_layers(stats, placement, load)]
    return "\n".join(lines)


def human_bytes(size: float) -> str:
    """A size with a unit, three digits.

    >>> human_bytes(0), human_bytes(2048), human_bytes(3.5 * 2**30)
    ('0 B', '2.00 KiB', '3.50 GiB')
    """
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1023.5 and len(units) > 1:
        size /= 1024
        del units[0]
    digits = 0 if units[0] == "B" or size >= 100 else 1 if size >= 10 else 2
    return f"{size:.{digits}f} {units[0]}"


def _troubles(stats: Stats) -> list[tuple[str, str]]:
    troubles = [("STALLED:", stats.stalled), ("OFF FOR GOOD:", stats.disabled)]
    return [(name, reason) for name, reason in troubles if reason is not None]


def _balance(stats: Stats) -> list[str]:
    rows = [("PAR (1 is perfect)", "mean", "worst layer")]
    for label, name in (
        ("last steps", "par_now"),
        ("last window", "par_measured"),
        ("expected by the last plan", "par_predicted"),
    ):
        values = np.asarray(getattr(stats, name), dtype=np.float64)
        if np.isfinite(values).any():
            worst = int(np.nanargmax(values))
            at = f"{values[worst]:.3f} (layer {worst})"
            rows.append((label, f"{np.nanmean(values):.3f}", at))
    if len(rows) == 1:
        return ["PAR: not known before the first collection window has ended"]
    return _columns(rows, left=1)


def _totals(stats: Stats) -> list[str]:
    age = stats.seconds_since_rebalance
    last = "" if age is None else f", the last {age:,.0f} s ago"
    rows = [
        ("rebalances", f"{stats.rebalances:,}{last}; planned early: "
         f"{stats.early_plans:,}"),
        ("experts moved", f"{stats.experts_moved:,} in {stats.placement_version:,} rounds"),
        ("this rank's traffic", f"{human_bytes(stats.bytes_sent)} sent, "
         f"{human_bytes(stats.bytes_received)} received"),
        ("staging", f"{human_bytes(stats.staging_bytes_peak)} used at most of "
         f"{human_bytes(stats.staging_bytes)}"),
        ("time", f"{stats.plan_seconds:.2f} s planning beside the model, {stats.hook_seconds:.2f} s"
         f" at step boundaries ({stats.migration_seconds:.2f} s moving)"),
        ("faults", f"plans failed: {stats.plans_failed}, planner restarts: "
         f"{stats.planner_restarts}, rebalances abandoned: {stats.rebalances_abandoned}"),
    ]  # fmt: skip
    if stats.active_experts is not None:
        active = f"{stats.active_experts:.1f} on the rank with most, mean over layers' calls"
        rows.insert(2, ("active experts", active))
    return _columns(rows, left=2)


def _layers(stats: Stats, placement: Placement, load: Load | None) -> list[str]:
    measured = np.asarray(stats.par_measured, dtype=np.float64)
    predicted = np.asarray(stats.par_predicted, dtype=np.float64)
    most = int(placement.replica_counts().max())
    header = ["layer", "PAR", "expected", "experts with replicas"]
    counts = placement.replica_counts()
    order = np.arange(placement.num_layers)
    title = "layers"
    if len(order) > _MOST_LAYERS:
        order = np.argsort(-np.nan_to_num(measured, nan=0.0), kind="stable")[:_MOST_LAYERS]
        title = f"the {_MOST_LAYERS} layers with the largest PAR, of {placement.num_layers}"
    rows = []
    for layer in order.tolist():
        replicated = int((counts[layer] > 1).sum())
        rows.append([
            str(layer), _ratio(measured, layer), _ratio(predicted, layer),
            f"{replicated} (up to {most})" if replicated else "none",
        ])  # fmt: skip
    if load is not None:
        header += ["hottest expert", "its load / mean", "ranks' load / mean"]
        experts, ranks = (np.asarray(part) for part in load)
        for layer, row in zip(order.tolist(), rows, strict=True):
            row += _load_columns(experts[layer], ranks[layer], counts[layer])
    return [title, *_columns([tuple(header), *map(tuple, rows)], left=0)]


def _load_columns(
    experts: NDArray[Any], ranks: NDArray[Any], counts: NDArray[np.int32]
) -> list[str]:
    if not experts.sum():
        return ["no load", "", ""]
    hottest = int(experts.argmax())
    shares = relative(ranks)
    return [
        f"{hottest} ({counts[hottest]} slots)" if counts[hottest] > 1 else str(hottest),
        f"{relative(experts)[hottest]:.2f}",
        f"{shares.min():.2f} to {shares.max():.2f}",
    ]


def _ratio(values: NDArray[np.float64], layer: int) -> str:
    return f"{values[layer]:.3f}" if np.isfinite(values[layer]) else "-"


def _columns(rows: Sequence[tuple[str, ...]], left: int) -> list[str]:
    """Aligned columns, the first ``left`` of them to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
