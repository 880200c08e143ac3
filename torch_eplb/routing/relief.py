"""Relieving the costliest rank: from a split with one replica for each expert to a cheaper one.

A replica with q tokens costs max(W, q) (`torch_eplb.routing.costs`), so of what a rank does some
can be handed to another replica whole, and of a part above W the surplus. As long as a rank costs
most of all, it hands on what leaves both ranks below that; where no part can go alone, the rank
that takes it hands on another in turn. Integers throughout. Suffixes are those of
`torch_eplb.routing.layouts`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from torch_eplb.routing.layouts import Layout

__all__ = ["relieve"]

Ints = NDArray[np.int64]

_MOST = 4  # times the number of ranks: so many parts are handed on at most


def relieve(quotas_EM: Ints, layout: Layout, weight_tokens: int, enough: int) -> Ints:
    """A split that costs no more.

    Args:
        quotas_EM: int64 ``[experts, M]``, a split.
        layout: where the replicas are.
        weight_tokens: W, at least 1.
        enough: a cost that is good enough.

    Returns:
        int64 ``[experts, M]``.

    Three experts of 3 tokens each on rank 0, of which rank 1 has one, too; W = 4:

    >>> layout = Layout.of(np.array([[0, 4], [1, -1], [2, -1]]), 2, 4)
    >>> relieve(np.array([[3, 0], [3, 0], [3, 0]]), layout, 4, 0).tolist()
    [[0, 3], [3, 0], [3, 0]]
    """
    work = _Work(quotas_EM, layout, weight_tokens)
    for _ in range(_MOST * layout.num_ranks):
        peak = max(work.costs)
        if peak <= enough or not work.relieve(work.costs.index(peak), peak):
            break
    relieved = quotas_EM.copy()
    parts = [part for parts in work.parts for part in parts]
    relieved.reshape(-1)[layout.flat_F] = parts
    return relieved


class _Work:
    """A split as lists.

    Attributes:
        costs: per rank, in tokens' time.
        parts: per replicated expert, the tokens of each replica.
    """

    def __init__(self, quotas_EM: Ints, layout: Layout, weight_tokens: int) -> None:
        self.layout, self.weight = layout, weight_tokens
        active = quotas_EM > 0
        costs = np.bincount(
            layout.slots_EM[active] // layout.slots_per_rank,
            weights=np.maximum(quotas_EM[active], weight_tokens),
            minlength=layout.num_ranks,
        )
        self.costs: list[int] = costs.astype(np.int64).tolist()
        flat = iter(quotas_EM.reshape(-1)[layout.flat_F].tolist())
        self.parts = [[next(flat) for _ in where] for where in layout.ranks_X]

    def relieve(self, rank: int, peak: int) -> bool:
        """Hand on a part of the ``rank`` that costs ``peak``, the highest; False if none can be."""
        return self._alone(rank, peak) or self._in_turn(rank, peak)

    def _alone(self, rank: int, peak: int) -> bool:
        """Hand on what leaves the higher of both ranks as low as any other would."""
        found = best = None
        lowest = peak
        for expert, place in self.layout.at_R[rank]:
            part = self.parts[expert][place]
            if not part:
                continue
            for other, there in enumerate(self.layout.ranks_X[expert]):
                if other == place:
                    continue
                moved, here, gain = self._handed(part, self.parts[expert][other], peak, there)
                higher = max(peak - here, self.costs[there] + gain)
                if moved and here > 0 and higher < lowest:
                    lowest, found, best = higher, (expert, place, other), (moved, here, gain)
        if found is None or best is None:
            return False
        self._move(*found, *best)
        return True

    def _handed(self, part: int, theirs: int, peak: int, there: int) -> tuple[int, int, int]:
        """How many tokens of a part to hand to the rank ``there``, what that saves, and costs."""
        weight, room = self.weight, peak - self.costs[there]
        # Of the surplus above W what levels both; but a part that is new there costs W at least.
        surplus = min(part - weight, room >> 1 if theirs else max(weight, room >> 1))
        if surplus > 0:
            gain = max(weight, theirs + surplus) - (max(weight, theirs) if theirs else 0)
            if gain < room:
                return surplus, surplus, gain
        gain = max(weight, theirs + part) - (max(weight, theirs) if theirs else 0)
        return (part, max(weight, part), gain) if gain < room else (0, 0, 0)

    def _in_turn(self, rank: int, peak: int) -> bool:
        """Hand on a whole part to a rank that hands on one of its own, and so on, along a shortest
        chain to where there is room."""
        costs, weight, ranks_X = self.costs, self.weight, self.layout.ranks_X
        came_from: dict[int, tuple[int, int, int]] = {rank: (rank, -1, -1)}
        queue = [(rank, 0)]
        for giver, excess in queue:  # more than the excess has to leave it
            for expert, place in self.layout.at_R[giver]:
                parts = self.parts[expert]
                cost = max(weight, parts[place])
                if not parts[place] or cost <= excess:
                    continue
                for other, there in enumerate(ranks_X[expert]):
                    if there in came_from or parts[other]:
                        continue
                    came_from[there] = giver, expert, place
                    if costs[there] + cost >= peak:
                        queue.append((there, costs[there] + cost - peak))
                        continue
                    while there != rank:
                        before, expert, place = came_from[there]
                        part = self.parts[expert][place]
                        cost = max(weight, part)
                        other = ranks_X[expert].index(there)
                        self._move(expert, place, other, part, cost, cost)
                        there = before
                    return True
        return False

    def _move(
        self, expert: int, place: int, other: int, tokens: int, saved: int, gain: int
    ) -> None:
        where, parts = self.layout.ranks_X[expert], self.parts[expert]
        parts[place] -= tokens
        parts[other] += tokens
        self.costs[where[place]] -= saved
        self.costs[where[other]] += gain
