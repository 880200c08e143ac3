"""The split of one batch: integer quotas that make the most loaded rank as light as possible.

An expert's tokens may go to any of its replicas. The least possible peak is the optimum of a small
linear programme (restricted assignment with divisible jobs); two solvers here come within 0.1% (on
the host) and 0.5% (on a device) of it. Both compute with integers only, so that ranks that
start from the same counts cannot disagree. Suffixes are those of `torch_eplb.routing.tables`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import chain
from operator import sub
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_eplb.routing.host import on_host
from torch_eplb.routing.layouts import Layout

__all__ = ["solve_layout", "solve_quotas", "solve_quotas_device", "solve_quotas_host"]

_Solver = Callable[[Tensor, Tensor, int, int], Tensor]
_Job = list[Any]
"""An expert's ranks, `Layout.read_X`, parts, and the loads of its ranks when it levelled them."""

_TOLERANCE_BITS = 10  # the host stops within 2^-10 of the lower bound on the peak
_MAX_SWEEPS = 3
_MAX_PUSHES = 512  # far above what any instance has needed; bounds the worst case
_ITERATIONS = 32
_GROUPS = 8
_ABSENT = 1 << 52  # a load that no batch reaches; 1024 of them still fit in 63 bits


def solve_quotas(counts_E: Tensor, slots_EM: Tensor, num_ranks: int, slots_per_rank: int) -> Tensor:
    """How many of an expert's tokens each of its replicas gets, minimising the peak rank load.

    Args:
        counts_E: int64 ``[experts]``, tokens of each expert in the batch; their sum must stay
            below 2^42.
        slots_EM: int64 ``[experts, M]``, physical ids of the replicas, ascending, padded with -1;
            an expert's replicas sit on different ranks (`RoutingTables.solver_LEM` of a layer).
        num_ranks: R.
        slots_per_rank: S.

    Returns:
        int64 ``[experts, M]``; each row sums to the expert's count, 0 where there is no replica.

    Rank 0 has slots 0 and 1, rank 1 has slots 2 and 3; expert 0 sits in slots 0 and 3:

    >>> slots = torch.tensor([[0, 3], [1, -1], [2, -1]])
    >>> solve_quotas(torch.tensor([100, 10, 50]), slots, 2, 2).tolist()  # ranks get 80 each
    [[70, 30], [10, 0], [50, 0]]
    """
    if on_host(counts_E):
        quotas = solve_quotas_host(counts_E.numpy(), slots_EM.numpy(), num_ranks, slots_per_rank)
        return torch.from_numpy(quotas)
    if counts_E.device.type in ("cpu", "cuda"):
        return _solve_quotas(counts_E, slots_EM, num_ranks, slots_per_rank)
    return solve_quotas_device(counts_E, slots_EM, num_ranks, slots_per_rank)


# One opaque operation of a compiled graph, so that a rank that runs compiled code gets the same
# quotas as one that runs eagerly.
@torch.library.custom_op("torch_eplb::solve_quotas", mutates_args=(), device_types="cpu")
def _solve_quotas(
    counts_E: Tensor, slots_EM: Tensor, num_ranks: int, slots_per_rank: int
) -> Tensor:
    return torch.from_numpy(
        solve_quotas_host(counts_E.numpy(), slots_EM.numpy(), num_ranks, slots_per_rank)
    )


@_solve_quotas.register_kernel("cuda")
def _(counts_E: Tensor, slots_EM: Tensor, num_ranks: int, slots_per_rank: int) -> Tensor:
    solve = _fused_solver(slots_EM.shape[0], num_ranks, slots_per_rank) or solve_quotas_device
    return solve(counts_E.contiguous(), slots_EM.contiguous(), num_ranks, slots_per_rank)


@_solve_quotas.register_fake
def _(counts_E: Tensor, slots_EM: Tensor, num_ranks: int, slots_per_rank: int) -> Tensor:
    return torch.empty_like(slots_EM)


@lru_cache
def _fused_solver(num_experts: int, num_ranks: int, slots_per_rank: int) -> _Solver | None:
    """The Triton kernel, or None without Triton or where its tiles would not fit."""
    try:
        from torch_eplb.routing import quotas_triton
    except ImportError:
        return None
    if not quotas_triton.fits(num_experts, num_ranks, slots_per_rank):
        return None
    return quotas_triton.solve_quotas_triton


def solve_quotas_host(
    counts_E: NDArray[np.int64],
    slots_EM: NDArray[np.int64],
    num_ranks: int,
    slots_per_rank: int,
) -> NDArray[np.int64]:
    """`solve_quotas` with Python's integers: at these sizes faster than any array library.

    Two or three sweeps of water-filling, expert by expert and heaviest first, are optimal for most
    batches. Where the peak still exceeds the lower bound, tokens are pushed along shortest
    paths of replicas from ranks above the bound to ranks below it (Edmonds and Karp's
    augmentation). A rank from which no path leads below the bound proves a higher one: the mean
    load of all ranks that it reaches (Dinkelbach's method on the cut), and the search goes on
    with that.

    >>> slots = np.array([[0, 3], [1, -1], [2, -1]])
    >>> solve_quotas_host(np.array([100, 10, 50]), slots, 2, 2).tolist()
    [[70, 30], [10, 0], [50, 0]]
    """
    return solve_layout(counts_E, Layout.of(slots_EM, num_ranks, slots_per_rank))


def solve_layout(counts_E: NDArray[np.int64], layout: Layout) -> NDArray[np.int64]:
    """`solve_quotas_host` for whoever has the layout of the slots at hand.

    >>> layout = Layout.of(np.array([[0, 3], [1, -1], [2, -1]]), 2, 2)
    >>> solve_layout(np.array([100, 10, 50]), layout).tolist()
    [[70, 30], [10, 0], [50, 0]]
    """
    quotas = np.zeros(layout.slots_EM.shape, dtype=np.int64)
    quotas[:, 0] = counts_E
    batch = _Batch(counts_E, layout)
    if batch.order:
        batch.water_fill()
        batch.push()
        parts = np.fromiter(chain.from_iterable(batch.parts), np.int64, len(layout.flat_F))
        quotas.reshape(-1)[layout.flat_F] = parts
    return quotas


class _Batch:
    """The tokens of one batch's replicated experts, and the loads that they make.

    Args:
        counts_E: tokens of every expert.
        layout: where their replicas are.

    Attributes:
        order: replicated experts that have tokens, as places in `Layout.experts_X`: those with
            most tokens first.
        parts: per replicated expert, the tokens of each replica; at first the first one has all.
        loads: per rank; replicated experts count from when they are first levelled.
        bound: no split has a peak below it.
    """

    def __init__(self, counts_E: NDArray[np.int64], layout: Layout) -> None:
        self.layout = layout
        num_ranks = layout.num_ranks
        counts_X = counts_E[layout.experts_X]
        self.order = np.argsort(-counts_X, kind="stable")[: np.count_nonzero(counts_X)].tolist()
        self.parts = [
            [count] + [0] * (len(where) - 1)
            for count, where in zip(counts_X.tolist(), layout.ranks_X, strict=True)
        ]
        # bincount adds in float64, exact below 2^53.
        single_E = counts_E * layout.single_E
        loads_R = np.bincount(layout.first_rank_E, weights=single_E, minlength=num_ranks)
        self.loads = loads_R.astype(np.int64).tolist()
        self.bound = max(-(-int(counts_E.sum()) // num_ranks), *self.loads)
        self.place = [-1] * len(self.parts)  # of each expert in `order`
        self.held_R: list[list[tuple[int, int]] | None] = [None] * num_ranks

    @property
    def goal(self) -> int:
        """The peak that is good enough."""
        return self.bound + (self.bound >> _TOLERANCE_BITS)

    def water_fill(self) -> None:
        """Level each expert's ranks in turn, until the peak is good or hardly falls.

        An expert whose ranks have not changed since it levelled them would find the same again:
        from the second sweep on that is half of all.
        """
        layout, loads, goal = self.layout, self.loads, self.goal
        jobs: list[_Job] = [
            [layout.ranks_X[row], layout.read_X[row], self.parts[row], None] for row in self.order
        ]
        previous = 0
        for sweep in range(_MAX_SWEEPS):
            for job in jobs:
                where, read, parts, known = job
                if not sweep:
                    loads[where[0]] += parts[0]
                if read is None:  # two replicas, as nearly all have
                    one, two = where
                    move = (loads[two] - loads[one] + 1) >> 1
                    if move:
                        move = min(move, parts[1]) if move > 0 else max(move, -parts[0])
                        parts[0] += move
                        parts[1] -= move
                        loads[one] += move
                        loads[two] -= move
                    continue
                here = read(loads)
                if here != known:
                    below = list(map(sub, here, parts))
                    level = _level(sum(here), below)
                    parts[:] = map(sub, level, below)
                    for rank, load in zip(where, level, strict=True):
                        loads[rank] = load
                    job[3] = tuple(level)
            peak = max(loads)
            if peak <= goal or (sweep and peak >= previous - (previous >> 8)):
                return
            previous = peak

    def push(self) -> None:
        """Move tokens along paths of replicas until no rank is above the goal."""
        loads, goal = self.loads, self.goal
        over = [rank for rank, load in enumerate(loads) if load > goal]
        if not over:
            return
        for place, expert in enumerate(self.order):
            self.place[expert] = place
        for _ in range(_MAX_PUSHES):
            while over and loads[over[-1]] <= self.goal:
                over.pop()
            if not over:
                return
            reached, came_from, end = self._search(over[-1])
            if end < 0:
                self.bound = -(-sum(loads[rank] for rank in reached) // len(reached))
            else:
                self._move(over[-1], end, came_from)

    def _held(self, rank: int) -> list[tuple[int, int]]:
        """`Layout.at_R` of a rank, the expert with most tokens first."""
        held = self.held_R[rank]
        if held is None:
            place = self.place
            held = sorted(self.layout.at_R[rank], key=lambda replica: place[replica[0]])
            self.held_R[rank] = held
        return held

    def _search(self, source: int) -> tuple[list[int], list[tuple[int, int] | None], int]:
        """Breadth first over the ranks that could take over tokens, directly or in a chain.

        Returns the ranks reached, the (rank, expert) that each was reached from, and the first
        one below the bound, or -1.
        """
        loads, parts, ranks, bound = self.loads, self.parts, self.layout.ranks_X, self.bound
        came_from: list[tuple[int, int] | None] = [None] * len(loads)
        came_from[source] = source, -1
        queue = [source]
        seen = [False] * len(parts)
        for rank in queue:
            for expert, index in self._held(rank):
                if seen[expert] or not parts[expert][index]:
                    continue
                seen[expert] = True
                step = rank, expert
                for other in ranks[expert]:
                    if came_from[other] is None:
                        came_from[other] = step
                        queue.append(other)
                        if loads[other] < bound:
                            return queue, came_from, other
        return queue, came_from, -1

    def _move(self, source: int, end: int, came_from: list[tuple[int, int] | None]) -> None:
        """Push as much from ``source`` to ``end`` as both loads and the path's parts allow."""
        amount = min(self.loads[source] - self.bound, self.bound - self.loads[end])
        path = []
        rank = end
        while rank != source:
            step = came_from[rank]
            assert step is not None
            before, expert = step
            where, parts = self.layout.ranks_X[expert], self.parts[expert]
            path.append((parts, where.index(before), where.index(rank)))
            amount = min(amount, parts[path[-1][1]])
            rank = before
        for parts, giver, taker in path:
            parts[giver] -= amount
            parts[taker] += amount
        self.loads[source] -= amount
        self.loads[end] += amount


def _level(total: int, below: list[int]) -> list[int]:
    """Pour an expert's tokens onto the loads of its ranks without them, so that the highest
    touched one is as low as possible.

    Args:
        total: the loads' sum, and the tokens.
        below: the loads.

    >>> _level(23, [4, 0, 9])  # 10 tokens
    [7, 7, 9]
    """
    size, highest = len(below), max(below)
    if highest * size < total:  # nearly always: every rank is below what the tokens reach
        level, rest = divmod(total, size)
        if not rest:
            return [level] * size
        # The lowest get one more. Who they are needs no order where it is one, or all but one.
        if rest == 1:
            loads = [level] * size
            loads[below.index(min(below))] += 1
            return loads
        if rest == size - 1:
            loads = [level + 1] * size
            below.reverse()
            loads[size - 1 - below.index(highest)] = level
            below.reverse()
            return loads
    order = sorted(range(size), key=below.__getitem__)
    used = size
    # As long as the highest load is above what the tokens would make of the others.
    while used > 1 and (highest := below[order[used - 1]]) * used >= total:
        total -= highest
        used -= 1
    level, rest = divmod(total, used)
    loads = below.copy()
    for index in order[:used]:
        loads[index] = level
    for index in order[:rest]:
        loads[index] += 1
    return loads


def solve_quotas_device(
    counts_E: Tensor, slots_EM: Tensor, num_ranks: int, slots_per_rank: int
) -> Tensor:
    """`solve_quotas` in torch operations: no host sync, a fixed number of steps, static shapes.

    First minimises the sum of squared rank loads, whose minimum also has the least peak, by
    projected gradient steps on all experts at once with Nesterov's momentum (Beck and Teboulle
    2009); the projection is a water-filling. A rank is moved by several experts at once, so each
    takes a step of one part in ``weight``. Then experts level their ranks group by group, which
    undoes most of what rounding many experts at once has cost.

    >>> slots = torch.tensor([[0, 3], [1, -1], [2, -1]])
    >>> solve_quotas_device(torch.tensor([100, 10, 50]), slots, 2, 2).tolist()
    [[70, 30], [10, 0], [50, 0]]
    """
    num_experts, most = slots_EM.shape
    # At most this many experts can have a second replica.
    replicated = min(num_experts, num_ranks * slots_per_rank - num_experts)
    quotas_EM = torch.cat((counts_E.unsqueeze(1), counts_E.new_zeros(num_experts, most - 1)), dim=1)
    if replicated <= 0 or most == 1:
        return quotas_EM
    present_EM = slots_EM >= 0
    rows_X = present_EM.sum(1).topk(replicated).indices
    # Padding works on an extra rank, R, whose load no batch reaches.
    ranks_EM = (slots_EM // slots_per_rank).masked_fill(~present_EM, num_ranks)
    fixed_R = counts_E.new_zeros(num_ranks + 1).scatter_add(
        0, ranks_EM[:, 0], counts_E.scatter(0, rows_X, 0)
    )
    fixed_R[num_ranks] = _ABSENT
    tokens_X1, present_XM, ranks_XM = (
        counts_E[rows_X].unsqueeze(1),
        present_EM[rows_X],
        ranks_EM[rows_X],
    )
    movers_R = torch.zeros_like(fixed_R).scatter_add(
        0, ranks_XM.reshape(-1), present_XM.reshape(-1).long()
    )
    weight_X1 = movers_R[ranks_XM].amax(1, keepdim=True)

    parts = ahead = tokens_X1 // present_XM.sum(1, keepdim=True) * present_XM
    for step in range(_ITERATIONS):
        loads_R = fixed_R.scatter_add(0, ranks_XM.reshape(-1), ahead.reshape(-1))
        floor = loads_R[ranks_XM] - ahead * weight_X1
        level = _levels(tokens_X1 * weight_X1, floor.sort(dim=1).values)
        new = (level - floor).clamp(min=0) // weight_X1
        ahead = new + (new - parts) * step // (step + 3)
        parts = new

    # Rounding down lost less than two tokens a replica; the lighter ranks take them.
    replicas_X1 = present_XM.sum(1, keepdim=True)
    place = loads_R[ranks_XM].argsort(dim=1, stable=True).argsort(dim=1)
    lost = tokens_X1 - parts.sum(1, keepdim=True)
    parts = parts + (lost // replicas_X1 + (place < lost % replicas_X1)) * present_XM
    loads_R = fixed_R.scatter_add(0, ranks_XM.reshape(-1), parts.reshape(-1))
    for group in range(min(_GROUPS, replicated)):
        tokens, ranks = tokens_X1[group::_GROUPS], ranks_XM[group::_GROUPS]
        old = parts[group::_GROUPS]
        floor, order = (loads_R[ranks] - old).sort(dim=1, stable=True)
        ordered = (_levels(tokens, floor) - floor).clamp(min=0)
        rest = tokens - ordered.sum(1, keepdim=True)
        ordered += torch.arange(most, device=rest.device) < rest
        new = torch.empty_like(old).scatter(1, order, ordered)
        changed_R = loads_R.scatter_add(0, ranks.reshape(-1), (new - old).reshape(-1))
        # Experts of a group that share a rank may overshoot together: then nothing changes.
        better = changed_R[:num_ranks].amax() <= loads_R[:num_ranks].amax()
        parts[group::_GROUPS] = torch.where(better, new, old)
        loads_R = torch.where(better, changed_R, loads_R)
    return quotas_EM.index_copy(0, rows_X, parts)


def _levels(tokens_X1: Tensor, sorted_XM: Tensor) -> Tensor:
    """How high tokens stand when poured onto ascending loads, rounded down, ``[X, 1]``.

    The level is the least of the means over the first 1, 2, ... loads: another load lowers the
    mean exactly as long as it is below the level.
    """
    used_M = torch.arange(1, sorted_XM.shape[1] + 1, device=sorted_XM.device)
    return ((sorted_XM.cumsum(1) + tokens_X1) // used_M).amin(1, keepdim=True)
