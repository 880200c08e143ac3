"""The best split of many batches at once: a solver vectorised over samples and layers.

The planner's counterpart of `torch_eplb.routing.quotas`: shares, not whole tokens, and any number
of batches in one go. Numbers that depend on the sample have samples as their *last* axis, so that
gathering by rank or expert copies whole rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Replicas", "level", "solve_batches", "tightest_cuts"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TOLERANCE = 1e-3
"""`solve_batches` stops within this part of a proven lower bound on the peak."""

MAX_ITERATIONS = 2000
_CHECK_EVERY = 8


@dataclass(frozen=True)
class Replicas:
    """The replicated experts of all layers, as flat arrays.

    An *item* is a replicated expert of a layer, a *row* one of its replicas. Items are ordered by
    their number of replicas, so that a group of equal numbers is a rectangle ``[items, replicas]``.

    Attributes:
        num_ranks: R. Ranks of all layers are numbered ``layer * R + rank``.
        groups: ``(replicas, items)`` of each group, in order.
        expert: ``[items]``, ``layer * experts + expert``.
        row_item, row_rank, row_slot: ``[rows]``: the row's item, rank, and slot (an index into
            the flattened placement).
        at_rank: ``[layers * R, K]``: the rows on a rank, padded with the number of rows.
        crowd: ``[items, 1]``, the most rows on any of the item's ranks.
        single_rank: ``[layers, experts]``, the rank of an expert with one slot, else R.
    """

    num_ranks: int
    groups: tuple[tuple[int, int], ...]
    expert: Ints
    row_item: Ints
    row_rank: Ints
    row_slot: Ints
    at_rank: Ints
    crowd: Floats
    single_rank: Ints

    @classmethod
    def of(cls, experts: NDArray[np.int32], num_experts: int) -> Replicas:
        """From a placement ``[layers, ranks, slots]``."""
        layers, ranks, slots = experts.shape
        key = (experts + np.arange(layers)[:, None, None] * num_experts).reshape(-1)
        counts = np.bincount(key, minlength=layers * num_experts)
        many = counts[key] > 1
        slot = np.flatnonzero(many)
        slot = slot[np.lexsort((key[slot], counts[key[slot]]))]
        rank = slot // slots
        first = np.flatnonzero(np.diff(key[slot], prepend=-1))
        item = np.repeat(np.arange(len(first)), counts[key[slot[first]]])
        sizes, items = np.unique(counts[key[slot[first]]], return_counts=True)

        rows = len(slot)
        order = np.argsort(rank, kind="stable")
        column = np.arange(rows) - np.searchsorted(rank[order], rank[order])
        at_rank = np.full((layers * ranks, int(column.max(initial=-1)) + 1), rows)
        at_rank[rank[order], column] = order
        movers = np.bincount(rank, minlength=layers * ranks)[rank].astype(np.float64)
        crowd = np.maximum.reduceat(movers, first) if rows else movers

        single = np.full(layers * num_experts, ranks)
        alone = np.flatnonzero(~many)
        single[key[alone]] = alone // slots % ranks
        return cls(
            num_ranks=ranks,
            groups=tuple(zip(sizes.tolist(), items.tolist(), strict=True)),
            expert=key[slot[first]],
            row_item=item,
            row_rank=rank,
            row_slot=slot,
            at_rank=at_rank,
            crowd=crowd[:, None],
            single_rank=single.reshape(layers, num_experts),
        )

    def fixed_loads(self, load: Floats) -> Floats:
        """``[layers * R, samples]``: what ranks get from experts with one slot.

        load: ``[layers, experts, samples]``.
        """
        hot = self.single_rank[:, None, :] == np.arange(self.num_ranks)[:, None]
        return np.matmul(hot.astype(np.float64), load).reshape(-1, load.shape[2])

    def scatter(self, parts: Floats) -> Floats:
        """``[layers * R, samples]``: sums over each rank of parts ``[rows, samples]``."""
        rows = np.concatenate((parts, np.zeros((1, parts.shape[1]))))
        return rows[self.at_rank].sum(axis=1)


def level(total: Floats, floor: Floats, groups: tuple[tuple[int, int], ...]) -> Floats:
    """Pour each item's total onto the floors of its rows: water-filling.

    Args:
        total: ``[items, samples]``, at least 0.
        floor: ``[rows, samples]``.
        groups: as in `Replicas`.

    Returns:
        ``[rows, samples]``: at least 0, summing to the total over each item's rows.

    >>> level(np.array([[10.0]]), np.array([[4.0], [0.0], [9.0]]), ((3, 1),)).T.tolist()
    [[3.0, 7.0, 0.0]]
    """
    parts = np.empty_like(floor)
    row = item = 0
    for size, items in groups:
        here = floor[row : row + size * items].reshape(items, size, -1)
        pour = total[item : item + items]
        out = parts[row : row + size * items].reshape(items, size, -1)
        if size == 2:
            half = (pour + here[:, 1] - here[:, 0]) / 2
            np.minimum(np.maximum(half, 0.0), pour, out=out[:, 0])
            np.subtract(pour, out[:, 0], out=out[:, 1])
        else:
            _level_many(pour, here, out)
        row += size * items
        item += items
    return parts


def _level_many(total: Floats, floor: Floats, out: Floats) -> None:
    """Water-filling of ``[items, size, samples]``: drop dry floors until none is left.

    The level of all floors is too high only because of floors above it, so leaving those out
    lowers it towards the answer from above (Michelot 1986); at most ``size`` rounds.
    """
    size = floor.shape[1]
    # The level is at least the lowest floor, which rounding must not leave dry.
    low = floor.min(axis=1)
    height = np.maximum((total + floor.sum(axis=1)) / size, low)
    wet = size * height.size
    for _ in range(size):
        below = floor <= height[:, None]
        count = below.sum(axis=1)
        now = int(count.sum())
        if now == wet:
            break
        wet = now
        lower = (total + np.where(below, floor, 0.0).sum(axis=1)) / count
        # Never upwards: rounding would bring a floor that lies at the level back, for ever.
        height = np.maximum(np.minimum(lower, height), low)
    np.maximum(height[:, None] - floor, 0.0, out=out)


def solve_batches(
    load: Floats, experts: NDArray[np.int32], iterations: int = MAX_ITERATIONS
) -> tuple[Floats, Floats]:
    """The split with the least peak rank load, for every layer and sample on its own.

    The rank loads with the least sum of squares also have the least peak; they are found by
    projected gradient steps with restarted momentum (Beck and Teboulle 2009; O'Donoghue and
    Candes 2015). The projection of one expert's step is a water-filling. A layer is done when
    each sample's peak is within `TOLERANCE` of a lower bound that its loads prove
    (`tightest_cuts`), or after ``iterations``.

    Args:
        load: ``[layers, experts, samples]``.
        experts: the placement, ``[layers, ranks, slots]``.

    Returns:
        rank loads ``[layers, R, samples]``; parts ``[rows, samples]``, rows as in `Replicas`.
    """
    layers, num_experts, samples = load.shape
    ranks = experts.shape[1]
    layout = Replicas.of(experts, num_experts)
    load = np.ascontiguousarray(load)
    base = layout.fixed_loads(load)
    parts = np.zeros((len(layout.row_rank), samples))
    loads = base.reshape(layers, ranks, samples).copy()
    if not len(parts):
        return loads, parts
    total = load.reshape(layers * num_experts, samples)[layout.expert]
    work = _Descent(base, total, layout)
    live, rows = np.arange(layers), np.arange(len(parts))
    for step in range(1, iterations + 1):
        work.step()
        if step % _CHECK_EVERY and step < iterations:
            continue
        now, done = work.done()
        if step == iterations:
            done[:] = True
        if not done.any():
            continue
        loads[live[done]] = now[done]
        row_layer = work.layout.row_rank // ranks
        parts[rows[done[row_layer]]] = work.parts[done[row_layer]]
        rows, live = rows[~done[row_layer]], live[~done]
        if not len(rows):
            loads[live] = now[~done]  # layers without replicas
            break
        work = work.only(~done, Replicas.of(experts[live], num_experts))
    return loads, parts


class _Descent:
    """Restarted accelerated gradient descent on the sum of squared rank loads."""

    def __init__(self, base: Floats, total: Floats, layout: Replicas) -> None:
        self.base = base
        self.total = total
        self.layout = layout
        share = np.repeat(
            1.0 / np.array([size for size, items in layout.groups for _ in range(items)]),
            np.bincount(layout.row_item),
        )
        self.parts = total[layout.row_item] * share[:, None]
        self.ahead = self.parts
        self.age = np.zeros_like(total)
        self.weight = layout.crowd[layout.row_item]

    def only(self, layers: NDArray[np.bool_], layout: Replicas) -> _Descent:
        """The same, of the layers that the mask keeps; ``layout`` is theirs."""
        old = self.layout
        ranks = old.num_ranks
        rows = layers[old.row_rank // ranks]
        items = layers[old.expert // old.single_rank.shape[1]]
        kept = _Descent(self.base[np.repeat(layers, ranks)], self.total[items], layout)
        kept.parts, kept.ahead, kept.age = self.parts[rows], self.ahead[rows], self.age[items]
        return kept

    def step(self) -> None:
        layout = self.layout
        loads = self.base + layout.scatter(self.ahead)
        # Moving every expert at once changes a rank by up to `crowd` parts: divide by it.
        new = level(self.total, loads[layout.row_rank] / self.weight - self.ahead, layout.groups)
        moved = new - self.parts
        # Restart an expert where its momentum points uphill.
        uphill = _item_sums((self.ahead - new) * moved, layout.groups) > 0
        self.age = np.where(uphill, 0.0, self.age + 1.0)
        self.ahead = new + moved * (self.age / (self.age + 3.0))[layout.row_item]
        self.parts = new

    def done(self) -> tuple[Floats, NDArray[np.bool_]]:
        """Rank loads ``[layers, R, samples]``, and which layers are within the tolerance."""
        loads = self.base + self.layout.scatter(self.parts)
        loads = loads.reshape(-1, self.layout.num_ranks, loads.shape[1])
        bound = tightest_cuts(loads, self.base, self.total, self.layout)[0]
        return loads, (loads.max(axis=1) <= bound * (1 + TOLERANCE)).all(axis=1)


def _item_sums(rows: Floats, groups: tuple[tuple[int, int], ...]) -> Floats:
    """``[items, samples]``: sums over each item's rows."""
    sums = []
    row = 0
    for size, items in groups:
        sums.append(rows[row : row + size * items].reshape(items, size, -1).sum(axis=1))
        row += size * items
    return np.concatenate(sums)


def tightest_cuts(
    loads: Floats, base: Floats, total: Floats, layout: Replicas
) -> tuple[Floats, Floats, Ints]:
    """A lower bound on each sample's peak, from the sets of its most loaded ranks.

    Experts whose replicas all sit within a set of ranks load that set whatever the split, so the
    peak is at least their load divided by the ranks in the set. For the optimal split the bound
    is met by some set of the k most loaded ranks.

    Args:
        loads: ``[layers, R, samples]``, some split's rank loads.
        base: ``[layers * R, samples]``, see `Replicas.fixed_loads`.
        total: ``[items, samples]``, the replicated experts' tokens.
        layout: of the placement.

    Returns:
        the bound ``[layers, samples]``; what the set of the k + 1 most loaded ranks has per rank,
        ``[layers, R, samples]`` by k; each rank's place, most loaded first, in the same shape.
    """
    _layers, ranks, samples = loads.shape
    order = np.argsort(-loads, axis=1)
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(ranks)[None, :, None], axis=1)
    inside = np.take_along_axis(base.reshape(loads.shape), order, axis=1)
    if len(total):
        by_row = place.reshape(-1, samples)[layout.row_rank]
        first = np.flatnonzero(np.diff(layout.row_item, prepend=-1))
        last = np.maximum.reduceat(by_row, first, axis=0)  # the item's least loaded rank
        layer = layout.row_rank[first] // ranks
        cell = (layer[:, None] * ranks + last) * samples + np.arange(samples)
        inside = inside + np.bincount(
            cell.reshape(-1), weights=total.reshape(-1), minlength=inside.size
        ).reshape(inside.shape)
    per_rank = inside.cumsum(axis=1) / np.arange(1, ranks + 1)[:, None]
    return per_rank.max(axis=1), per_rank, place
