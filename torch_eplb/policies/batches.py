"""The best split of many batches at once: a solver vectorised over samples and layers.

The planner's counterpart of `torch_eplb.routing.quotas`: shares, not whole tokens, and any number
of batches in one go. Numbers that depend on the sample have samples as their *last* axis, so that
gathering by rank or expert copies whole rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Replicas", "blocks", "level", "solve_batches", "tightest_cuts"]

Floats = NDArray[Any]
"""Double, or single precision where that is enough."""

Ints = NDArray[np.int64]

TOLERANCE = 1e-3
"""`solve_batches` stops within this part of a proven lower bound on the peak."""

MAX_ITERATIONS = 2000
_CHECK_EVERY = 8


@dataclass(frozen=True)
class Replicas:
    """The replicated experts of all layers, as flat arrays.

    An *item* is a replicated expert of a layer, a *row* one of its replicas. Items are ordered by
    their number of replicas; the rows of items with equally many are a rectangle ``[replicas,
    items]``: sums over an expert's replicas then run over the first axis, in long strides.

    Attributes:
        num_ranks: R. Ranks of all layers are numbered ``layer * R + rank``.
        groups: ``(replicas, items)`` of each rectangle, in order.
        expert: ``[items]``, ``layer * experts + expert``.
        row_item, row_rank, row_slot: ``[rows]``: the row's item, rank, and slot (an index into
            the flattened placement).
        turns: rows by rank, as lists that hold at most one row of each rank, longest first: the
            i-th row of ``turns[k]`` is on rank ``order[i]``.
        order: ``[layers * R]``, ranks by their number of rows, most first.
        crowd: ``[items, 1]``, the most rows on any of the item's ranks.
        single_rank: ``[layers, experts]``, the rank of an expert with one slot, else R.
    """

    num_ranks: int
    groups: tuple[tuple[int, int], ...]
    expert: Ints
    row_item: Ints
    row_rank: Ints
    row_slot: Ints
    turns: tuple[Ints, ...]
    order: Ints
    crowd: Floats
    single_rank: Ints

    @classmethod
    def of(cls, experts: NDArray[np.int32], num_experts: int) -> Replicas:
        """From a placement ``[layers, ranks, slots]``."""
        layers, ranks, slots = experts.shape
        key = (experts + np.arange(layers)[:, None, None] * num_experts).reshape(-1)
        counts = np.bincount(key, minlength=layers * num_experts)
        single = np.full(layers * num_experts, ranks)
        alone = np.flatnonzero(counts[key] == 1)
        single[key[alone]] = alone // slots % ranks

        slot = np.flatnonzero(counts[key] > 1)
        slot = slot[np.lexsort((key[slot], counts[key[slot]]))]
        sizes, rows_of = np.unique(counts[key[slot]], return_counts=True)
        groups = tuple(zip(sizes.tolist(), (rows_of // sizes).tolist(), strict=True))
        none = np.zeros(0, dtype=np.int64)
        expert, row_item, taken = [none], [none], [none]
        row = item = 0
        for size, items in groups:
            block = slot[row : row + size * items].reshape(items, size)
            expert.append(key[block[:, 0]])
            taken.append(block.T.reshape(-1))
            row_item.append(np.tile(np.arange(item, item + items), size))
            row, item = row + size * items, item + items
        row_slot = np.concatenate(taken)
        rank = row_slot // slots
        per_rank = np.bincount(rank, minlength=layers * ranks)
        crowd = none.astype(np.float64)
        if row:
            busy = per_rank[rank].astype(np.float64)
            crowd = np.concatenate([part.max(axis=0) for part in blocks(busy, groups)])
        return cls(
            num_ranks=ranks,
            groups=groups,
            expert=np.concatenate(expert),
            row_item=np.concatenate(row_item),
            row_rank=rank,
            row_slot=row_slot,
            turns=_turns(rank, per_rank),
            order=np.argsort(-per_rank, kind="stable"),
            crowd=crowd[:, None],
            single_rank=single.reshape(layers, num_experts),
        )

    def fixed_loads(self, load: Floats) -> Floats:
        """``[layers * R, samples]``: what ranks get from experts with one slot.

        load: ``[layers, experts, samples]``.
        """
        hot = self.single_rank[:, None, :] == np.arange(self.num_ranks)[:, None]
        return np.matmul(hot.astype(load.dtype), load).reshape(-1, load.shape[2])

    def scatter(self, parts: Floats) -> Floats:
        """``[layers * R, samples]``: sums over each rank of parts ``[rows, samples]``."""
        sums = np.zeros((len(self.order), parts.shape[1]), parts.dtype)
        for rows in self.turns:
            sums[: len(rows)] += parts[rows]
        result = np.empty_like(sums)
        result[self.order] = sums
        return result


def _turns(rank: Ints, per_rank: Ints) -> tuple[Ints, ...]:
    """See `Replicas`."""
    order = np.argsort(-per_rank, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    by_rank = np.lexsort((np.arange(len(rank)), place[rank]))
    turn = np.arange(len(rank)) - np.repeat(
        per_rank[order].cumsum() - per_rank[order], per_rank[order]
    )
    return tuple(by_rank[turn == k] for k in range(int(per_rank.max(initial=0))))


def blocks(rows: NDArray[Any], groups: tuple[tuple[int, int], ...]) -> Iterator[NDArray[Any]]:
    """Views of ``rows [rows, ...]`` by group, ``[replicas, items, ...]``."""
    at = 0
    for size, items in groups:
        yield rows[at : at + size * items].reshape(size, items, *rows.shape[1:])
        at += size * items


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
    item = 0
    for here, out in zip(blocks(floor, groups), blocks(parts, groups), strict=True):
        pour = total[item : item + here.shape[1]]
        if len(here) == 2:
            half = (pour + here[1] - here[0]) / 2
            np.minimum(np.maximum(half, 0.0), pour, out=out[0])
            np.subtract(pour, out[0], out=out[1])
        else:
            _level_many(pour, here, out)
        item += here.shape[1]
    return parts


def _level_many(total: Floats, floor: Floats, out: Floats) -> None:
    """Water-filling of ``[size, items, samples]``: drop dry floors until none is left.

    The level of all floors is too high only because of floors above it, so leaving those out
    lowers it towards the answer from above (Michelot 1986); at most ``size`` rounds.
    """
    size = len(floor)
    # The level is at least the lowest floor, which rounding must not leave dry.
    low = floor.min(axis=0)
    height = np.maximum((total + floor.sum(axis=0)) / size, low)
    wet = size * height.size
    for _ in range(size):
        below = floor <= height
        count = below.sum(axis=0, dtype=floor.dtype)
        now = int(count.sum(dtype=np.float64))
        if now == wet:
            break
        wet = now
        lower = (total + np.where(below, floor, 0.0).sum(axis=0)) / count
        # Never upwards: rounding would bring a floor that lies at the level back, for ever.
        height = np.maximum(np.minimum(lower, height), low)
    np.maximum(height - floor, 0.0, out=out)


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
        load: ``[layers, experts, samples]``, in single precision if that is enough.
        experts: the placement, ``[layers, ranks, slots]``.

    Returns:
        rank loads ``[layers, R, samples]``; parts ``[rows, samples]``, rows as in `Replicas`.
    """
    layers, num_experts, samples = load.shape
    ranks = experts.shape[1]
    layout = Replicas.of(experts, num_experts)
    load = np.ascontiguousarray(load)
    base = layout.fixed_loads(load)
    parts = np.zeros((len(layout.row_rank), samples), load.dtype)
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
        replicas = np.repeat([size for size, _ in layout.groups], [n for _, n in layout.groups])
        self.parts = (total / replicas[:, None].astype(total.dtype))[layout.row_item]
        self.ahead = self.parts
        self.age = np.zeros_like(total)
        self.weight = layout.crowd[layout.row_item].astype(total.dtype)

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
        floor = loads[layout.row_rank]
        floor /= self.weight
        floor -= self.ahead
        new = level(self.total, floor, layout.groups)
        moved = new - self.parts
        # Restart an expert where its momentum points uphill.
        uphill = (self.ahead - new) * moved
        sums = np.concatenate([part.sum(axis=0) for part in blocks(uphill, layout.groups)])
        self.age = np.where(sums > 0, 0.0, self.age + 1.0)
        moved *= (self.age / (self.age + 3.0))[layout.row_item]
        self.ahead = new + moved
        self.parts = new

    def done(self) -> tuple[Floats, NDArray[np.bool_]]:
        """Rank loads ``[layers, R, samples]``, and which layers are within the tolerance."""
        loads = self.base + self.layout.scatter(self.parts)
        loads = loads.reshape(-1, self.layout.num_ranks, loads.shape[1])
        bound = tightest_cuts(loads, self.base, self.total, self.layout)[0]
        return loads, (loads.max(axis=1) <= bound * (1 + TOLERANCE)).all(axis=1)


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
        # The item's least loaded rank.
        last = np.concatenate([part.max(axis=0) for part in blocks(by_row, layout.groups)])
        layer = layout.expert // layout.single_rank.shape[1]
        cell = (layer[:, None] * ranks + last) * samples + np.arange(samples)
        inside = inside + np.bincount(
            cell.reshape(-1), weights=total.reshape(-1), minlength=inside.size
        ).reshape(inside.shape)
    per_rank = inside.cumsum(axis=1) / np.arange(1, ranks + 1)[:, None]
    return per_rank.max(axis=1), per_rank, place
