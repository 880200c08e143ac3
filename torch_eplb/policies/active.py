"""Active experts where every one is active on one rank only: their least number on the fullest
rank, and placements that lower it.

An optimal semi-matching of experts and ranks (Harvey, Ladner, Lovasz, Tamir 2003): as long as a
chain of experts that change ranks leads from a fullest rank to one with at least two fewer, follow
it. Where none does, the fullest rank cannot be relieved, except by another replica.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["least_active", "make_room"]


def least_active(experts: NDArray[np.int32], active: NDArray[np.bool_]) -> int:
    """Active experts on the fullest rank.

    Args:
        experts: ``[ranks, slots]``, a layer's placement.
        active: ``[experts]``, which have tokens.

    >>> placement = np.array([[0, 1, 2], [2, 3, 0]])  # experts 0 and 2 may be on either rank
    >>> least_active(placement, np.array([True, True, True, False]))
    2
    """
    return max(len(held) for held in _assign(experts, active)[0])


def make_room(
    experts: NDArray[np.int32],
    active: NDArray[np.bool_],
    load: NDArray[np.float64],
    ranks_per_node: int,
) -> NDArray[np.int32]:
    """A placement whose fullest rank has no more active experts than the mean, rounded up.

    Replicas that level tokens may leave a rank with more experts that are nowhere else than it has
    without any redundancy; as long as all are active, that is what its steps cost. One slot
    changes for each expert too many: a replica that is not needed makes room for one of an expert
    on the fullest rank, or on one that a chain leads to.

    Args:
        experts: ``[ranks, slots]``, a layer's placement.
        active: ``[experts]``, which are active.
        load: ``[experts]``: of the replicas that may go, that of the least load goes.
        ranks_per_node: experts stay on their nodes, of so many ranks each.

    Returns:
        ``[ranks, slots]``; the same where no slot can help.

    Rank 0 alone has experts 0, 1 and 2, while two ranks share the others:

    >>> placement = np.array([[0, 1, 2], [3, 4, 5], [3, 4, 5]])
    >>> make_room(placement, np.ones(6, dtype=bool), np.arange(6.0), 3).tolist()
    [[0, 1, 2], [3, 4, 5], [2, 4, 5]]
    """
    result = experts.copy()
    goal = -(-int(active.sum()) // len(experts))
    for _ in range(experts.size):
        on, where = _assign(result, active)
        source = max(range(len(on)), key=lambda rank: len(on[rank]))
        if len(on[source]) <= goal:
            break
        change = _exchange(result, on, where, source, load, ranks_per_node)
        if change is None:
            break
        rank, slot, expert = change
        result[rank, slot] = expert
    return result


def _exchange(
    experts: NDArray[np.int32],
    on: list[set[int]],
    where: list[list[int]],
    source: int,
    load: NDArray[np.float64],
    ranks_per_node: int,
) -> tuple[int, int, int] | None:
    """The rank and slot whose replica makes room for which expert; None if there is none."""
    most = len(on[source])
    reached = _reached(on, where, source)
    for rank in sorted(range(len(on)), key=lambda rank: len(on[rank])):
        if len(on[rank]) > most - 2:
            return None
        held = experts[rank].tolist()
        spare = [e for e in held if e not in on[rank] and len(where[e]) > 1]
        if not spare:
            continue
        slot = held.index(min(spare, key=lambda expert: (load[expert], expert)))
        for giver in reached:
            if giver // ranks_per_node != rank // ranks_per_node:
                continue
            given = [e for e in sorted(on[giver]) if e not in held]
            if given:  # the hottest also gains most from another replica
                return rank, slot, max(given, key=lambda expert: (load[expert], -expert))
    return None


def _assign(
    experts: NDArray[np.int32], active: NDArray[np.bool_]
) -> tuple[list[set[int]], list[list[int]]]:
    """The active experts on each rank, as level as can be, and the ranks of each expert."""
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
    return on, where


def _reached(on: list[set[int]], where: list[list[int]], source: int) -> list[int]:
    """The ranks that chains of experts lead to."""
    queue = [source]
    for rank in queue:
        for expert in sorted(on[rank]):
            queue += [other for other in where[expert] if other not in queue]
    return queue


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
