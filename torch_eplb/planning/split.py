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

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.placement import Placement

__all__ = [
    "REPLICA_CHOICES",
    "as_samples",
    "batch_rank_loads",
    "even_split",
    "judged_par",
    "par",
    "rank_loads",
    "solve_split",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

REPLICA_CHOICES = ("batch", "local", "table", "even")

_TOLERANCE = 1e-3
"""`batch_rank_loads` stops within this part of a proven lower bound on the peak."""

_MAX_ITERATIONS = 2000
_CHECK_EVERY = 8
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

    The rank loads with the least sum of squares also have the least peak; they are found by
    projected gradient steps with restarted momentum (Beck and Teboulle 2009; O'Donoghue and
    Candes 2015). The projection of one expert's step is a water-filling. Stops at 0.1% above a
    lower bound that the loads themselves prove (see `tightest_cuts`).

    Returns:
        ``[samples, layers, ranks]``.
    """
    samples = as_samples(load, placement)
    layout = Replicas.of(placement)
    size = max(1, layout.experts.shape[0] * layout.ranks.shape[1] * layout.ranks.shape[2])
    step = max(1, min(128, _CHUNK // size))
    chunks = [
        _solve_batches(samples[at : at + step].transpose(1, 2, 0), layout)[0]
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
    layout = Replicas.of(placement)
    if not layout.ranks.shape[1]:
        return even_split(placement)
    mean = samples.sum(axis=2, keepdims=True) / placement.num_ranks
    x = np.divide(samples, mean, out=np.zeros_like(samples), where=mean > 0)
    x = np.ascontiguousarray(x.transpose(1, 2, 0))
    average = x.mean(axis=2, keepdims=True)
    parts = _solve_batches(average, layout)[1]
    counts = layout.present.sum(axis=2)[..., None, None]
    total = layout.replicated(average)[:, :, None]
    even = layout.present[..., None] / np.maximum(counts, 1)
    shares = np.where(total > 0, np.divide(parts, total, out=even.copy(), where=total > 0), even)
    if len(samples) > 1:
        shares = _descend(shares[..., 0], x, layout)[..., None]
    split = even_split(placement).reshape(placement.num_layers, -1)
    layer, expert, replica = np.nonzero(layout.present)
    split[layer, layout.slots[layer, expert, replica]] = shares[layer, expert, replica, 0]
    return split.reshape(placement.experts.shape)


_DESCENT_STEPS = 40


def _descend(shares: Floats, x: Floats, layout: Replicas) -> Floats:
    """Subgradient steps on mean PAR; shares ``[layers, X, M]``, x ``[layers, experts, samples]``.

    x is in units of the mean rank load, so PAR is the peak.
    """
    layers = len(shares)
    base, tokens = layout.fixed_loads(x), layout.replicated(x)
    weight = np.maximum(tokens.mean(axis=2), 1e-12)
    best, best_peak = shares.copy(), np.full(layers, np.inf)
    layer = np.arange(layers)[:, None, None]
    sample = np.arange(x.shape[2])
    for step in range(_DESCENT_STEPS):
        loads = base + layout.scatter(shares[..., None] * tokens[:, :, None])
        peak_rank = loads.argmax(axis=1)
        peak = np.take_along_axis(loads, peak_rank[:, None], 1)[:, 0].mean(axis=1)
        better = peak < best_peak
        best[better], best_peak[better] = shares[better], peak[better]
        # How much of the peak each rank is, per sample; then per share.
        marks = np.zeros((layers, layout.num_ranks + 1, x.shape[2]))
        marks[np.arange(layers)[:, None], peak_rank, sample] = 1.0 / x.shape[2]
        slope = (marks[layer, layout.ranks] * tokens[:, :, None]).sum(axis=3) / weight[..., None]
        length = 0.3 / (1.0 + step)
        floor = np.where(layout.present, slope * length - shares, 0.0)[..., None]
        shares = _level(np.ones((*weight.shape, 1)), floor, layout)[..., 0]
    return best


@dataclass(frozen=True)
class Replicas:
    """The replicated experts of a placement, padded to rectangles, for array arithmetic.

    X is the most replicated experts in any layer, M the most replicas of any expert; padding
    sits on rank R. Numbers that depend on the sample have samples as their *last* axis, so that
    gathering by rank or slot copies whole rows.

    Attributes:
        num_ranks: R.
        experts: ``[layers, X]`` ids, -1 for padding.
        present: ``[layers, X, M]`` bool, whether there is such a replica.
        ranks: ``[layers, X, M]``, the replica's rank, R for padding.
        slots: ``[layers, X, M]``, the replica's physical expert, 0 for padding.
        single_rank: ``[layers, experts]``, the rank of an expert with one slot, else R.
        at_rank: ``[layers, R, K]``, rows of a ``[layers * X * M + 1]`` array that are on a rank;
            the last row is for padding.
        crowd: ``[layers, X, 1]`` float, the most replicated slots on any rank of the expert.
    """

    num_ranks: int
    experts: Ints
    present: NDArray[np.bool_]
    ranks: Ints
    slots: Ints
    single_rank: Ints
    at_rank: Ints
    crowd: Floats

    @classmethod
    def of(cls, placement: Placement) -> Replicas:
        layers, num_ranks, num_slots = placement.experts.shape
        counts = placement.replica_counts()
        flat = placement.experts.reshape(layers, -1).astype(np.int64)
        layer = np.arange(layers)[:, None]
        rank_of = np.broadcast_to(np.repeat(np.arange(num_ranks), num_slots), flat.shape)
        single_rank = np.full((layers, placement.num_experts), num_ranks)
        alone = counts[layer, flat] == 1
        single_rank[np.nonzero(alone)[0], flat[alone]] = rank_of[alone]

        many = counts > 1
        width = int(many.sum(axis=1).max())
        depth = int(counts.max()) if width else 1
        row_of = np.where(many, many.cumsum(axis=1) - 1, -1)
        experts = np.full((layers, width), -1)
        at, which = np.nonzero(many)
        experts[at, row_of[at, which]] = which
        ranks = np.full((layers, width, depth), num_ranks)
        slots = np.zeros((layers, width, depth), dtype=np.int64)
        # Slots in the order (layer, expert): the place within the expert's run is its replica.
        at, slot = np.nonzero(~alone)
        expert = flat[at, slot]
        order = np.lexsort((slot, expert, at))
        at, slot, expert = at[order], slot[order], expert[order]
        key = at * placement.num_experts + expert
        replica = np.arange(len(key)) - np.searchsorted(key, key)
        row = row_of[at, expert]
        ranks[at, row, replica] = rank_of[at, slot]
        slots[at, row, replica] = slot

        # Rows by (layer, rank): the place within the rank's run is the column of at_rank.
        key = at * num_ranks + rank_of[at, slot]
        order = np.argsort(key, kind="stable")
        column = np.arange(len(key)) - np.searchsorted(key[order], key[order])
        most = int(column.max()) + 1 if len(key) else 0
        at_rank = np.full((layers * num_ranks, most), layers * width * depth)
        at_rank[key[order], column] = ((at * width + row) * depth + replica)[order]
        movers = np.zeros((layers, num_ranks + 1))
        movers[:, :num_ranks] = (at_rank < layers * width * depth).sum(axis=1).reshape(layers, -1)
        crowd = np.maximum(movers[layer[..., None], ranks].max(axis=2, initial=0.0), 1.0)
        at_rank = at_rank.reshape(layers, num_ranks, most)
        return cls(
            num_ranks, experts, ranks < num_ranks, ranks, slots, single_rank, at_rank,
            crowd[..., None],
        )  # fmt: skip

    def only(self, layers: NDArray[np.bool_]) -> Replicas:
        """The same, of the layers that the mask keeps."""
        stride = self.ranks.shape[1] * self.ranks.shape[2]
        padding = len(layers) * stride
        shift = (np.cumsum(layers) - 1 - np.arange(len(layers)))[layers] * stride
        at_rank = self.at_rank[layers]
        at_rank = np.where(
            at_rank == padding, int(layers.sum()) * stride, at_rank + shift[:, None, None]
        )
        return Replicas(
            self.num_ranks,
            self.experts[layers],
            self.present[layers],
            self.ranks[layers],
            self.slots[layers],
            self.single_rank[layers],
            at_rank,
            self.crowd[layers],
        )

    def fixed_loads(self, load: Floats) -> Floats:
        """``[layers, R, samples]``: what ranks get from experts with one slot.

        load: ``[layers, experts, samples]``.
        """
        hot = self.single_rank[:, None, :] == np.arange(self.num_ranks)[:, None]
        return np.matmul(hot.astype(np.float64), load)

    def replicated(self, load: Floats) -> Floats:
        """``[layers, X, samples]``: the tokens of the replicated experts, 0 for padding."""
        rows = load[np.arange(len(load))[:, None], self.experts]
        return np.where((self.experts >= 0)[..., None], rows, 0.0)

    def scatter(self, parts: Floats) -> Floats:
        """``[layers, R, samples]``: sums over each rank of parts ``[layers, X, M, samples]``."""
        rows = parts.reshape(-1, parts.shape[3])
        rows = np.concatenate((rows, np.zeros((1, rows.shape[1]))))
        return rows[self.at_rank].sum(axis=2)


def _solve_batches(load: Floats, layout: Replicas) -> tuple[Floats, Floats]:
    """Rank loads ``[layers, R, samples]`` and parts ``[layers, X, M, samples]`` of least peak.

    load: ``[layers, experts, samples]``.
    """
    loads = layout.fixed_loads(load)
    total = layout.replicated(load)
    parts = np.zeros((*layout.ranks.shape, load.shape[2]))
    if not layout.ranks.shape[1]:
        return loads, parts
    live = np.ones(len(load), dtype=bool)
    work = _Descent.start(loads, total, layout)
    for step in range(1, _MAX_ITERATIONS + 1):
        work.step()
        if step % _CHECK_EVERY and step < _MAX_ITERATIONS:
            continue
        done = work.done() | (step == _MAX_ITERATIONS)
        which = np.flatnonzero(live)[done]
        if len(which):
            loads[which] = work.loads(work.parts)[done]
            parts[which] = work.parts[done]
            live[which] = False
            if not live.any():
                break
            work = work.only(~done)
    return loads, parts


@dataclass
class _Descent:
    """Restarted accelerated gradient descent on the sum of squared rank loads, per layer."""

    base: Floats
    total: Floats
    layout: Replicas
    parts: Floats
    ahead: Floats
    age: Floats

    @classmethod
    def start(cls, base: Floats, total: Floats, layout: Replicas) -> _Descent:
        count = np.maximum(layout.present.sum(axis=2), 1)[..., None]
        parts = layout.present[..., None] * (total / count)[:, :, None]
        age = np.zeros((len(base), 1, 1, base.shape[2]))
        return cls(base, total, layout, parts, parts, age)

    def only(self, layers: NDArray[np.bool_]) -> _Descent:
        return _Descent(
            self.base[layers],
            self.total[layers],
            self.layout.only(layers),
            self.parts[layers],
            self.ahead[layers],
            self.age[layers],
        )

    def loads(self, parts: Floats) -> Floats:
        return self.base + self.layout.scatter(parts)

    def step(self) -> None:
        layout = self.layout
        gathered = _at_ranks(self.loads(self.ahead), layout)
        # Moving every expert at once changes a rank by up to `crowd` parts: divide by it.
        weight = layout.crowd[..., None]
        new = _level(self.total, gathered / weight - self.ahead, layout)
        moved = new - self.parts
        # Restart where momentum points uphill.
        uphill = ((self.ahead - new) * moved).sum(axis=(1, 2), keepdims=True) > 0
        self.age = np.where(uphill, 0.0, self.age + 1.0)
        self.ahead = new + moved * (self.age / (self.age + 3.0))
        self.parts = new

    def done(self) -> NDArray[np.bool_]:
        """``[layers]``: whether all samples are within the tolerance of their lower bound."""
        loads = self.loads(self.parts)
        bound = tightest_cuts(loads, self.base, self.total, self.layout)[0]
        return (loads.max(axis=1) <= bound * (1 + _TOLERANCE)).all(axis=1)


def _at_ranks(loads: Floats, layout: Replicas) -> Floats:
    """``[layers, X, M, samples]``: the load of each replica's rank, 0 for padding."""
    layers, ranks, samples = loads.shape
    rows = np.concatenate((loads, np.zeros((layers, 1, samples))), axis=1)
    return rows[np.arange(layers)[:, None, None], layout.ranks]


def _level(total: Floats, floor: Floats, layout: Replicas) -> Floats:
    """Pour ``total [layers, X, samples]`` onto ``floor [layers, X, M, samples]``: water-filling.

    Returns the parts ``[layers, X, M, samples]``: at least 0, summing to total, 0 for padding.
    """
    present = layout.present[..., None]
    if floor.shape[2] == 2:
        # Two replicas (padding is never alone in M=2 but for whole padded rows): closed form.
        half = (total + floor[:, :, 1] - floor[:, :, 0]) / 2
        first = np.minimum(np.maximum(half, 0.0), total)
        return np.stack((first, total - first), axis=2) * present
    floor = np.where(present, floor, np.inf)
    ordered = np.sort(floor, axis=2)
    finite = np.where(np.isinf(ordered), 0.0, ordered)
    depth = np.arange(1, floor.shape[2] + 1)[:, None]
    levels = (finite.cumsum(axis=2) + total[:, :, None]) / depth
    # The water stands at the least of these: further replicas are above it and only raise it.
    level = np.where(np.isinf(ordered), np.inf, levels).min(axis=2, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.where(present, np.maximum(level - floor, 0.0), 0.0)


def tightest_cuts(
    loads: Floats, base: Floats, total: Floats, layout: Replicas
) -> tuple[Floats, Ints, Ints]:
    """A lower bound on each sample's peak, from the sets of its most loaded ranks.

    Experts whose replicas all sit within a set of ranks load that set whatever the split, so the
    peak is at least their load divided by the ranks in the set. For the optimal split the bound
    is met by some set of the k most loaded ranks.

    Args:
        loads: ``[layers, R, samples]``, some split's rank loads.
        base, total: `Replicas.fixed_loads` and `Replicas.replicated` of the same samples.

    Returns:
        the bound ``[layers, samples]``; the size of the set ``[layers, samples]``; and each
        rank's place, most loaded first, ``[layers, R, samples]``: the set is ``place < size``.
    """
    layers, ranks, samples = loads.shape
    order = np.argsort(-loads, axis=1)
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(ranks)[None, :, None], axis=1)
    inside = np.take_along_axis(base, order, axis=1)
    rows = np.concatenate((place, np.full((layers, 1, samples), -1)), axis=1)
    last = rows[np.arange(layers)[:, None, None], layout.ranks].max(axis=2)
    # Padded experts have last = -1 and no tokens; count them anywhere.
    cell = np.arange(layers)[:, None, None] * ranks + np.maximum(last, 0)
    cell = cell * samples + np.arange(samples)
    inside = inside + np.bincount(
        cell.reshape(-1), weights=total.reshape(-1), minlength=inside.size
    ).reshape(inside.shape)
    per_rank = inside.cumsum(axis=1) / np.arange(1, ranks + 1)[:, None]
    size = per_rank.argmax(axis=1)
    bound = np.take_along_axis(per_rank, size[:, None], axis=1)[:, 0]
    return bound, size + 1, place
