"""The host's solver as it was first written: slower, and what the one in use has to equal.

`torch_eplb.routing.quotas.solve_quotas_host` skips what would not change anything and reads what it
knows of a placement from lists that are made once. Not one integer may change by that.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["plain_quotas"]

_TOLERANCE_BITS = 10
_MAX_SWEEPS = 3
_MAX_PUSHES = 512


def plain_quotas(
    counts_E: NDArray[np.int64],
    slots_EM: NDArray[np.int64],
    num_ranks: int,
    slots_per_rank: int,
) -> NDArray[np.int64]:
    """What `solve_quotas_host` says of itself, without its short cuts.

    >>> slots = np.array([[0, 3], [1, -1], [2, -1]])
    >>> plain_quotas(np.array([100, 10, 50]), slots, 2, 2).tolist()
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
    """Pour tokens onto loads so that the highest touched one is as low as possible."""
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
