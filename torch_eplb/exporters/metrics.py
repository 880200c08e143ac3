"""The one table of metrics that all exporters use, and the series that a snapshot has.

Names carry their unit, counters end in ``_total``. A metric with labels has one series per layer,
rank or expert; those that would have more than ``max_series`` are left out as a whole, and every
one of them has a summary without labels.

Imports numpy only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from torch_eplb.exporters.snapshots import Snapshot

__all__ = ["MAX_SERIES", "METRICS", "PREFIX", "Metric", "Point", "series"]

logger = logging.getLogger("torch_eplb")

PREFIX = "torch_eplb_"

MAX_SERIES = 2000
"""Most series of one metric, unless told otherwise: 60 layers x 32 ranks."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: without the prefix.
        kind: "counter" (never falls while the process lives) or "gauge".
        unit: of the values, as in UCUM: "s", "By", "1" for ratios, "{token}".
        help: one sentence.
        labels: what the axes of an array are.
        value: of a snapshot: a number, an array with an axis per label, a dict by label, or None
            if the source does not tell.
    """

    name: str
    kind: Literal["counter", "gauge"]
    unit: str
    help: str
    labels: tuple[str, ...]
    value: Callable[[Snapshot], Any]


@dataclass(frozen=True)
class Point:
    """One value of one series."""

    metric: Metric
    labels: tuple[str, ...]
    value: float


def series(
    snapshot: Snapshot,
    max_series: int = MAX_SERIES,
    metrics: Iterable[Metric] | None = None,
) -> Iterator[Point]:
    """Every value of a snapshot; what is not known (yet) is left out.

    Args:
        snapshot: where values come from.
        max_series: a metric with more values than this is left out.
        metrics: None for all of `METRICS`.
    """
    for metric in METRICS if metrics is None else metrics:
        value = metric.value(snapshot)
        if value is None:
            continue
        if isinstance(value, dict):
            yield from (Point(metric, (key,), float(v)) for key, v in value.items())
            continue
        array = np.asarray(value, dtype=np.float64)
        if array.size > max_series:
            _say_once(metric, array.size, max_series)
            continue
        for index, number in np.ndenumerate(array):
            if np.isfinite(number):
                yield Point(metric, tuple(map(str, index)), float(number))


_said: set[str] = set()


def _say_once(metric: Metric, size: int, most: int) -> None:
    if metric.name not in _said:
        _said.add(metric.name)
        logger.info(
            "%s%s is not exported: it has %d series, more than max_series=%d; its summaries are",
            PREFIX, metric.name, size, most,
        )  # fmt: skip


# ---- what a snapshot knows --------------------------------------------------------------------


def _stat(name: str) -> Callable[[Snapshot], Any]:
    return lambda snapshot: snapshot.stats.get(name)


def _flag(name: str) -> Callable[[Snapshot], Any]:
    return lambda snapshot: float(snapshot.stats.get(name) is not None)


def _layers(name: str) -> Callable[[Snapshot], Any]:
    def value(snapshot: Snapshot) -> NDArray[np.float64] | None:
        found = snapshot.stats.get(name)
        return None if found is None else np.asarray(found, dtype=np.float64)

    return value


def _over_layers(
    name: str, reduce: Callable[[NDArray[np.float64]], Any]
) -> Callable[[Snapshot], Any]:
    def value(snapshot: Snapshot) -> Any:
        found = _layers(name)(snapshot)
        return None if found is None or np.isnan(found).all() else reduce(found)

    return value


def _stage(snapshot: Snapshot) -> dict[str, float]:
    # One series per stage that was seen would grow with wording; the present one is enough.
    return {str(snapshot.stats["stage"]): 1.0}


def _rank_tokens(snapshot: Snapshot) -> Any:
    return None if snapshot.rank_load is None else snapshot.rank_load.sum(axis=0)


def _hottest(snapshot: Snapshot) -> NDArray[np.float64] | None:
    if snapshot.load is None:
        return None
    mean = snapshot.load.mean(axis=1)
    peak = snapshot.load.max(axis=1)
    return np.divide(peak, mean, out=np.full(len(mean), np.nan), where=mean > 0)


def _hottest_max(snapshot: Snapshot) -> Any:
    ratios = _hottest(snapshot)
    return None if ratios is None or np.isnan(ratios).all() else np.nanmax(ratios)


def _active(snapshot: Snapshot) -> NDArray[np.float64] | None:
    load, experts = snapshot.load, snapshot.placement
    if load is None or experts is None:
        return None
    used = load[np.arange(len(load))[:, None, None], experts] > 0
    return used.sum(axis=2).mean(axis=0)


def _redundant(snapshot: Snapshot) -> Any:
    experts = snapshot.placement
    if experts is None:
        return None
    return float(experts[0].size - (int(experts.max()) + 1))


_WINDOW = "in the last collection window, over all ranks"

METRICS: tuple[Metric, ...] = (
    Metric("steps_total", "counter", "{step}", "Forwards made.", (), _stat("step")),
    Metric("stage", "gauge", "1", "What the rebalance cycle is doing; always 1.", ("stage",),
           _stage),
    # Balance.
    Metric("par_measured_mean_ratio", "gauge", "1",
           "Peak-to-average ratio of rank load in the last collection window, mean over layers.",
           (), _over_layers("par_measured", np.nanmean)),
    Metric("par_measured_max_ratio", "gauge", "1",
           "Peak-to-average ratio of rank load in the last collection window, worst layer.",
           (), _over_layers("par_measured", np.nanmax)),
    Metric("par_measured_ratio", "gauge", "1",
           "Peak-to-average ratio of rank load in the last collection window.",
           ("layer",), _layers("par_measured")),
    Metric("par_predicted_mean_ratio", "gauge", "1",
           "Peak-to-average ratio that the last plan expected, mean over layers.",
           (), _over_layers("par_predicted", np.nanmean)),
    Metric("par_predicted_max_ratio", "gauge", "1",
           "Peak-to-average ratio that the last plan expected, worst layer.",
           (), _over_layers("par_predicted", np.nanmax)),
    Metric("par_predicted_ratio", "gauge", "1",
           "Peak-to-average ratio that the last plan expected.",
           ("layer",), _layers("par_predicted")),
    Metric("par_now_mean_ratio", "gauge", "1",
           "Peak-to-average ratio of rank load over the last steps, mean over layers.",
           (), _over_layers("par_now", np.nanmean)),
    Metric("par_now_max_ratio", "gauge", "1",
           "Peak-to-average ratio of rank load over the last steps, worst layer.",
           (), _over_layers("par_now", np.nanmax)),
    Metric("par_now_ratio", "gauge", "1",
           "Peak-to-average ratio of rank load over the last steps.",
           ("layer",), _layers("par_now")),
    # Load.
    Metric("rank_tokens", "gauge", "{token}", f"Tokens that a rank's slots got {_WINDOW}.",
           ("ep_rank",), _rank_tokens),
    Metric("layer_rank_tokens", "gauge", "{token}",
           f"Tokens that a rank's slots got in a layer {_WINDOW}.",
           ("layer", "ep_rank"), lambda s: s.rank_load),
    Metric("active_experts", "gauge", "{expert}",
           f"Slots of a rank whose expert got tokens {_WINDOW}; mean over layers.",
           ("ep_rank",), _active),
    Metric("expert_peak_max_ratio", "gauge", "1",
           f"Tokens of the hottest expert / mean of its layer {_WINDOW}, worst layer.",
           (), _hottest_max),
    Metric("expert_peak_ratio", "gauge", "1",
           f"Tokens of a layer's hottest expert / mean of the layer {_WINDOW}.",
           ("layer",), _hottest),
    Metric("expert_tokens", "gauge", "{token}", f"Tokens routed to an expert {_WINDOW}.",
           ("layer", "expert"), lambda s: s.load),
    # Moves.
    Metric("rebalances_total", "counter", "{rebalance}",
           "Plans carried out, those included that only changed the split.",
           (), _stat("rebalances")),
    Metric("early_plans_total", "counter", "{plan}",
           "Plans that did not wait for collect_interval, because the load had drifted.",
           (), _stat("early_plans")),
    Metric("placement_version", "gauge", "{round}", "Rounds committed.",
           (), _stat("placement_version")),
    Metric("redundant_experts", "gauge", "{slot}", "Slots beyond one per expert, per layer.",
           (), _redundant),
    Metric("experts_moved_total", "counter", "{expert}", "Transfers of one expert in one layer.",
           (), _stat("experts_moved")),
    Metric("sent_bytes_total", "counter", "By", "Expert weights that this rank sent.",
           (), _stat("bytes_sent")),
    Metric("received_bytes_total", "counter", "By", "Expert weights that this rank received.",
           (), _stat("bytes_received")),
    Metric("token_rows_sent_total", "counter", "{row}",
           "Tokens and results that this rank sent to other ranks.", (), _stat("token_rows_sent")),
    Metric("token_sent_bytes_total", "counter", "By",
           "Bytes of tokens and results that this rank sent to other ranks.",
           (), _stat("token_bytes_sent")),
    Metric("active_experts_per_call", "gauge", "{expert}",
           "Experts with tokens on the rank that has most, mean over layers' calls.",
           (), _stat("active_experts")),
    Metric("staging_bytes", "gauge", "By", "Size of this rank's staging pool.",
           (), _stat("staging_bytes")),
    Metric("staging_peak_bytes", "gauge", "By", "Most of the staging pool that a round used.",
           (), _stat("staging_bytes_peak")),
    Metric("rebalance_age_seconds", "gauge", "s", "Time since the last rebalance ended.",
           (), _stat("seconds_since_rebalance")),
    # Cost.
    Metric("planning_seconds_total", "counter", "s", "Time spent planning, beside the model.",
           (), _stat("plan_seconds")),
    Metric("hook_seconds_total", "counter", "s",
           "Time that this rank's host spent at step boundaries.", (), _stat("hook_seconds")),
    Metric("migration_seconds_total", "counter", "s",
           "Time that this rank's host spent at step boundaries with experts to move.",
           (), _stat("migration_seconds")),
    # Faults.
    Metric("plans_failed_total", "counter", "{plan}", "Cycles that ended without a usable plan.",
           (), _stat("plans_failed")),
    Metric("planner_restarts_total", "counter", "{restart}", "Restarts of the planner process.",
           (), _stat("planner_restarts")),
    Metric("rebalances_abandoned_total", "counter", "{rebalance}",
           "Rebalances given up because a checksum did not match.",
           (), _stat("rebalances_abandoned")),
    Metric("writes_failed_total", "counter", "{write}",
           "Loads and maps that could not be written to files.",
           (), _stat("writes_failed")),
    Metric("stalled", "gauge", "1", "1 if nothing has progressed for long.", (), _flag("stalled")),
    Metric("disabled", "gauge", "1", "1 if balancing is off for good.", (), _flag("disabled")),
)  # fmt: skip
"""All metrics, in the order in which they are exported."""
