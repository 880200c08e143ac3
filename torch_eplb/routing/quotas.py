"""The split of one batch: integer quotas that make the most loaded rank as light as possible.

An expert's tokens may go to any of its replicas. The least possible peak is the optimum of a small
linear programme (restricted assignment with divisible jobs); two solvers here come within 0.1% (on
the host) and 0.5% (on a device) of it. Both compute with integers only, so that ranks that
start from the same counts cannot disagree. Suffixes are those of `torch_eplb.routing.tables`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_eplb.routing.host import on_host

__all__ = ["solve_quotas", "solve_quotas_device", "solve_quotas_host"]

_Solver = Callable[[Tensor, Tensor, int, int], Tensor]

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
    quotas = np.zeros(slots_EM.shape, dtype=np.int64)
    quotas[:, 0] = counts_E
    if slots_EM.shape[1] == 1:
        return quotas
    experts = np.flatnonzero((slots_EM[:, 1] >= 0) & (counts_E > 0))
    if len(experts) == 0:
        return quotas
    experts = experts[np.argsort(-counts_E[experts], kind="stable")]
    # bincount adds in float64, exact below 2^53.
    loads = np.bincount(slots_EM[:, 0] // slots_per_rank, weights=counts_E, minlength=num_ranks)
    slots_XM = slots_EM[experts]
    present_XM = slots_XM >= 0
    ranks = (slots_XM[present_XM] // slots_per_rank).tolist()
    ends = present_XM.sum(axis=1).cumsum().tolist()
    batch = _Batch(
        counts_E[experts].tolist(),
        [ranks[begin:end] for begin, end in zip([0, *ends], ends, strict=False)],
        loads.astype(np.int64).tolist(),
    )
    batch.water_fill()
    batch.push()
    rows = np.zeros(slots_XM.shape, dtype=np.int64)
    rows[present_XM] = [part for parts in batch.parts for part in parts]
    quotas[experts] = rows
    return quotas


class _Batch:
    """The tokens of one batch's replicated experts, and the loads that they make.

    Attributes:
        tokens: per replicated expert.
        ranks: per replicated expert, the ranks of its replicas.
        parts: per replicated expert, the tokens of each replica.
        loads: per rank.
        bound: no split has a peak below it.
    """

    def __init__(self, tokens: list[int], ranks: list[list[int]], loads: list[int]) -> None:
        self.tokens = tokens
        self.ranks = ranks
        self.loads = loads
        self.parts = [[0] * len(where) for where in ranks]
        mean = -(-sum(loads) // len(loads))
        for count, where in zip(tokens, ranks, strict=True):
            loads[where[0]] -= count
        self.bound = max(mean, *loads)

    @property
    def goal(self) -> int:
        """The peak that is good enough."""
        return self.bound + (self.bound >> _TOLERANCE_BITS)

    def water_fill(self) -> None:
        """Level each expert's ranks in turn, until the peak is good or hardly falls."""
        loads, goal = self.loads, self.goal
        previous = 0
        for sweep in range(_MAX_SWEEPS):
            for count, where, parts in zip(self.tokens, self.ranks, self.parts, strict=True):
                if len(where) == 2:  # nearly all experts: worth a path of its own
                    one, two = where
                    load_one, load_two = loads[one] - parts[0], loads[two] - parts[1]
                    first = (count + load_two - load_one + 1) >> 1
                    first = 0 if first < 0 else count if first > count else first
                    parts[:] = first, count - first
                    loads[one] = load_one + first
                    loads[two] = load_two + count - first
                    continue
                below = [loads[rank] - part for rank, part in zip(where, parts, strict=True)]
                parts[:] = _level(count, below)
                for rank, load, part in zip(where, below, parts, strict=True):
                    loads[rank] = load + part
            peak = max(loads)
            if peak <= goal or (sweep and peak >= previous - (previous >> 8)):
                return
            previous = peak

    def push(self) -> None:
        """Move tokens along paths of replicas until no rank is above the goal."""
        loads = self.loads
        over = [rank for rank, load in enumerate(loads) if load > self.goal]
        if not over:
            return
        experts_at: list[list[int]] = [[] for _ in loads]
        for expert, where in enumerate(self.ranks):
            for rank in where:
                experts_at[rank].append(expert)
        for _ in range(_MAX_PUSHES):
            while over and loads[over[-1]] <= self.goal:
                over.pop()
            if not over:
                return
            reached, came_from, end = self._search(over[-1], experts_at)
            if end < 0:
                self.bound = -(-sum(loads[rank] for rank in reached) // len(reached))
            else:
                self._move(over[-1], end, came_from)

    def _search(
        self, source: int, experts_at: list[list[int]]
    ) -> tuple[list[int], dict[int, tuple[int, int]], int]:
        """Breadth first over the ranks that could take over tokens, directly or in a chain.

        Returns the ranks reached, the (rank, expert) that each was reached from, and the first
        one below the bound, or -1.
        """
        came_from: dict[int, tuple[int, int]] = {source: (source, -1)}
        queue = [source]
        seen = set()
        for rank in queue:
            for expert in experts_at[rank]:
                where = self.ranks[expert]
                if expert in seen or not self.parts[expert][where.index(rank)]:
                    continue
                seen.add(expert)
                for other in where:
                    if other not in came_from:
                        came_from[other] = (rank, expert)
                        queue.append(other)
                        if self.loads[other] < self.bound:
                            return queue, came_from, other
        return queue, came_from, -1

    def _move(self, source: int, end: int, came_from: dict[int, tuple[int, int]]) -> None:
        """Push as much from ``source`` to ``end`` as both loads and the path's parts allow."""
        amount = min(self.loads[source] - self.bound, self.bound - self.loads[end])
        path = []
        rank = end
        while rank != source:
            before, expert = came_from[rank]
            where, parts = self.ranks[expert], self.parts[expert]
            path.append((parts, where.index(before), where.index(rank)))
            amount = min(amount, parts[path[-1][1]])
            rank = before
        for parts, giver, taker in path:
            parts[giver] -= amount
            parts[taker] += amount
        self.loads[source] -= amount
        self.loads[end] += amount


def _level(count: int, loads: list[int]) -> list[int]:
    """Pour ``count`` tokens onto ``loads`` so that the highest touched one is as low as possible.

    >>> _level(10, [4, 0, 9])
    [3, 7, 0]
    """
    order = sorted(range(len(loads)), key=loads.__getitem__)
    total, used = count, 0
    for index in order:
        if used and loads[index] * used >= total:
            break
        total += loads[index]
        used += 1
    level, rest = divmod(total, used)
    parts = [0] * len(loads)
    for position, index in enumerate(order[:used]):
        parts[index] = level - loads[index] + (position < rest)
    return parts


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
