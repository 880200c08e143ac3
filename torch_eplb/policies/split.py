"""Splits: how the tokens of a replicated expert are shared among its slots, and what that gives.

Pure numpy, vectorised over samples and layers. `batch_rank_loads` is the planner's view of the
runtime's ``replica_choice="batch"``: every sample is split on its own, as well as can be.
`solve_split` finds the one split that serves all samples (``replica_choice="table"``).

One layer, 2 ranks of 2 slots; expert 0 sits on both ranks:

    >>> placement = Placement(np.array([[[0, 1], [2, 0]]]), 3)
    >>> load = np.array([[[60.0, 10.0, 30.0]], [[20.0, 70.0, 10.0]]])  # two samples
    >>> rank_loads(load, placement, even_split(placement)).tolist()
    [[[40.0, 60.0]], [[80.0, 20.0]]]
    >>> batch_rank_loads(load, placement).round(6).tolist()
    [[[50.0, 50.0]], [[70.0, 30.0]]]
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.policies.batches import Replicas, level, solve_batches
from torch_eplb.values.choices import REPLICA_CHOICES
from torch_eplb.values.placement import Placement

__all__ = [
    "as_samples",
    "batch_rank_loads",
    "even_split",
    "judged_par",
    "par",
    "rank_loads",
    "solve_split",
]

Floats = NDArray[np.float64]

_DESCENT_STEPS = 40

_CHUNK = 1 << 20
"""Numbers per array and chunk of samples, about: what caches still help with."""


def as_samples(load: NDArray[Any], placement: Placement) -> Floats:
    """``load`` as float64 ``[samples, layers, experts]``, checked against ``placement``.

    Args:
        load: ``[samples, layers, experts]`` or ``[layers, experts]``: tokens routed to each
            logical expert.
        placement: gives layers and experts.

    Raises:
        TypeError: not numbers.
        ValueError: another shape, no sample, or a value that is negative or not finite.
    """
    array = np.asarray(load)
    if array.dtype.kind not in "iufb":
        raise TypeError(f"load must be an array of numbers, got dtype {array.dtype}")
    if array.ndim == 2:
        array = array[None]
    shape = (placement.num_layers, placement.num_experts)
    if array.ndim != 3 or array.shape[1:] != shape or not len(array):
        raise ValueError(
            f"load must have the shape [samples, layers, experts] = [at least 1, {shape[0]}, "
            f"{shape[1]}] (or without samples), got {list(np.shape(load))}"
        )
    array = array.astype(np.float64)
    wrong = ~(np.isfinite(array) & (array >= 0))
    if wrong.any():
        sample, layer, expert = np.argwhere(wrong)[0]
        raise ValueError(
            f"load must be finite and not negative, got {array[sample, layer, expert]} at sample "
            f"{sample}, layer {layer}, expert {expert}"
        )
    return array


def par(loads: NDArray[Any]) -> Floats:
    """Peak-to-average ratio over the last axis: ``[..., ranks]`` to ``[...]``; 1 without load."""
    loads = np.asarray(loads, dtype=np.float64)
    mean = loads.mean(axis=-1)
    return np.divide(loads.max(axis=-1), mean, out=np.ones_like(mean), where=mean > 0)


def even_split(placement: Placement) -> Floats:
    """``[layers, ranks, slots]``: every slot gets the same share of its expert's tokens."""
    layer = np.arange(placement.num_layers)[:, None, None]
    return 1.0 / placement.replica_counts()[layer, placement.experts]


def rank_loads(load: NDArray[Any], placement: Placement, split: NDArray[Any]) -> Floats:
    """Tokens per rank under a fixed split.

    Args:
        load: ``[samples, layers, experts]`` or ``[layers, experts]``.
        placement: where experts are.
        split: ``[layers, ranks, slots]``, each slot's share of its expert's tokens.

    Returns:
        ``[samples, layers, ranks]``.

    Raises:
        ValueError: shapes that do not fit the placement.
    """
    samples = as_samples(load, placement)
    shares = np.asarray(split, dtype=np.float64)
    if shares.shape != placement.experts.shape:
        raise ValueError(
            f"split must have the placement's shape {list(placement.experts.shape)}, "
            f"got {list(shares.shape)}"
        )
    layers, ranks, _ = shares.shape
    table = np.zeros((layers, placement.num_experts, ranks))
    where = (np.arange(layers)[:, None, None], placement.experts, np.arange(ranks)[:, None])
    np.add.at(table, where, shares)
    # [layers, samples, experts] @ [layers, experts, ranks]
    return np.matmul(samples.swapaxes(0, 1), table).swapaxes(0, 1)


def judged_par(
    load: NDArray[Any], placement: Placement, split: NDArray[Any], replica_choice: str
) -> Floats:
    """PAR of every sample under what the runtime does with it.

    "batch" solves every sample on its own. "local" is judged the same way: samples do not say
    which rank a token came from, so this is what "local" reaches when all ranks' batches look
    alike. "table" uses ``split``, "even" the even split.

    Returns:
        ``[samples, layers]``.

    Raises:
        ValueError: an unknown replica choice, or shapes that do not fit.
    """
    if replica_choice in ("batch", "local"):
        return par(batch_rank_loads(load, placement))
    if replica_choice == "table":
        return par(rank_loads(load, placement, split))
    if replica_choice == "even":
        return par(rank_loads(load, placement, even_split(placement)))
    raise ValueError(
        f"replica_choice must be one of {', '.join(map(repr, REPLICA_CHOICES))}, "
        f"got {replica_choice!r}"
    )


def batch_rank_loads(load: NDArray[Any], placement: Placement) -> Floats:
    """Tokens per rank when every sample gets the split that makes its peak least.

    Within 0.1% of the least possible peak (see `batches.solve_batches`).

    Args:
        load: ``[samples, layers, experts]`` or ``[layers, experts]``.
        placement: where experts are.

    Returns:
        ``[samples, layers, ranks]``.
    """
    samples = as_samples(load, placement)
    step = max(1, min(128, _CHUNK // max(1, placement.experts.size)))
    chunks = [
        solve_batches(samples[at : at + step].transpose(1, 2, 0), placement.experts)[0]
        for at in range(0, len(samples), step)
    ]
    return np.ascontiguousarray(np.concatenate(chunks, axis=2).transpose(2, 0, 1))


def solve_split(load: NDArray[Any], placement: Placement) -> Floats:
    """The fixed shares that make the mean over samples of PAR small.

    Starts from the split that levels the mean load, then follows subgradients of the mean PAR
    (diminishing steps, projected on each expert's shares), and answers the best split seen.

    Args:
        load: ``[samples, layers, experts]`` or ``[layers, experts]``.
        placement: where experts are.

    Returns:
        ``[layers, ranks, slots]``, at least 0, summing to 1 over each expert's slots.
    """
    samples = as_samples(load, placement)
    layers, experts = samples.shape[1:]
    split = even_split(placement)
    layout = Replicas.of(placement.experts, experts)
    if not len(layout.row_rank):
        return split
    mean = samples.sum(axis=2, keepdims=True) / placement.num_ranks
    x = np.divide(samples, mean, out=np.zeros_like(samples), where=mean > 0)
    x = np.ascontiguousarray(x.transpose(1, 2, 0))
    average = x.mean(axis=2, keepdims=True)
    parts = solve_batches(average, placement.experts)[1]
    total = average.reshape(layers * experts, 1)[layout.expert][layout.row_item]
    even = split.reshape(-1)[layout.row_slot][:, None]
    shares = np.divide(parts, total, out=even.copy(), where=total > 0)[:, 0]
    if len(samples) > 1:
        shares = _descend(shares, x, layout)
    flat = split.reshape(-1)
    flat[layout.row_slot] = shares
    return flat.reshape(placement.experts.shape)


def _descend(shares: Floats, x: Floats, layout: Replicas) -> Floats:
    """Subgradient steps on mean PAR; shares ``[rows]``, x ``[layers, experts, samples]``.

    x is in units of the mean rank load, so PAR is the peak.
    """
    layers, experts, samples = x.shape
    ranks = layout.num_ranks
    base = layout.fixed_loads(x)
    tokens = x.reshape(layers * experts, samples)[layout.expert][layout.row_item]
    weight = np.maximum(tokens.mean(axis=1), 1e-12)
    row_layer = layout.row_rank // ranks
    best, best_peak = shares, np.full(layers, np.inf)
    first = np.arange(layers)[:, None] * ranks
    sample = np.arange(samples)
    one = np.ones((len(layout.expert), 1))
    for step in range(_DESCENT_STEPS):
        loads = (base + layout.scatter(shares[:, None] * tokens)).reshape(layers, ranks, samples)
        peak_rank = loads.argmax(axis=1)
        peak = np.take_along_axis(loads, peak_rank[:, None], 1)[:, 0].mean(axis=1)
        better = peak < best_peak
        best = np.where(better[row_layer], shares, best)
        best_peak = np.minimum(peak, best_peak)
        marks = np.zeros((layers * ranks, samples))
        marks[first + peak_rank, sample] = 1.0 / samples
        # How fast mean PAR rises with each share, in the share's own tokens.
        slope = (marks[layout.row_rank] * tokens).sum(axis=1) / weight
        floor = (0.3 / (1.0 + step)) * slope - shares
        shares = level(one, floor[:, None], layout.groups)[:, 0]
    return best
