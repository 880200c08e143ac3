"""The least number of active experts on the fullest rank, if every one is active on one rank only.

An optimal semi-matching of experts and ranks (Harvey, Ladner, Lovasz, Tamir 2003): as long as a
chain of experts that change ranks leads from a fullest rank to one with at least two fewer, follow
it. Where none does, the fullest rank cannot be relieved.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["least_active"]


def least_active(experts: NDArray[np.int32], active: NDArray[np.bool_]) -> int:
    """Active experts on the fullest rank.

    Args:
        experts: ``[ranks, slots]``, a layer's placement.
        active: ``[experts]``, which have tokens.

    >>> placement = np.array([[0, 1, 2], [2, 3, 0]])  # experts 0 and 2 may be on either rank
    >>> least_active(placement, np.array([True, True, True, False]))
    2
    """
    where: list[list[int]] = [[] for _ in active]
    for rank, held in enumerate(experts.tolist()):
        for expert in held:
            where[expert].append(rank)
    on: list[set[int]] = [set() for _ in experts]
    chosen = np.flatnonzero(active).tolist()
    for expert in sorted(chosen, key=lambda expert: len(where[expert])):
        on[min(where[expert], key=lambda rank: len(on[rank]))].add(expert)
    while _relieve(on, where):
        pass
    return max(len(held) for held in on)


def _relieve(on: list[set[int]], where: list[list[int]]) -> bool:
    """Take one expert from a fullest rank along a shortest chain; False if there is none."""
    source = max(range(len(on)), key=lambda rank: len(on[rank]))
    most = len(on[source])
    came_from: dict[int, tuple[int, int]] = {source: (source, -1)}
    queue = [source]
    for rank in queue:
        for expert in on[rank]:
            for other in where[expert]:
                if other in came_from:
                    continue
                came_from[other] = (rank, expert)
                if len(on[other]) > most - 2:
                    queue.append(other)
                    continue
                while other != source:
                    before, moved = came_from[other]
                    on[before].remove(moved)
                    on[other].add(moved)
                    other = before
                return True
    return False
