"""A bipartite matching that turns as many ranks as possible in one round. Pure Python, no numpy."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

__all__ = ["match_departures"]


def match_departures(
    left: Sequence[int], edges: Mapping[int, Sequence[int]], open_right: frozenset[int]
) -> dict[int, int]:
    """Choose the ranks that may give up a last copy, and who receives it.

    Every rank of ``left`` is on both sides: it either idles, matched to itself, or is matched along
    an edge to the rank that receives what it gives up. A rank that receives must have a slot to
    receive into: it is in ``open_right`` (has a free departure), or is matched itself.

    Ranks are served in the order of ``left``, along shortest augmenting paths (Kuhn, "The Hungarian
    method for the assignment problem", 1955). A rank that has been served is never given up for a
    later one: no other choice serves a rank that this one leaves out without leaving out a more
    urgent one.

    Args:
        left: ranks without a free departure, the most urgent first.
        edges: of each rank in ``left``, the ranks that could receive one of its last copies. Ranks
            that are neither in ``left`` nor in ``open_right`` are ignored.
        open_right: ranks that have a free departure; disjoint from ``left``.

    Returns:
        receiver of every rank that is served.

    Two ranks that want each other's expert, and one that nobody makes room for:

    >>> match_departures([0, 1, 2], {0: [1], 1: [0], 2: [0]}, frozenset())
    {0: 1, 1: 0}
    """
    receiver = {rank: rank for rank in left}
    giver: dict[int, int | None] = {rank: rank for rank in left}
    giver.update((rank, None) for rank in open_right)
    served: set[int] = set()
    for rank in left:
        if receiver[rank] == rank:
            giver[rank] = None
            if not _augment(rank, edges, receiver, giver, served):
                # It cannot be served beside the more urgent ones, whatever comes later, so
                # nobody else can use the slot that it keeps.
                del receiver[rank], giver[rank]
                continue
        served.add(rank)
    return {rank: receiver[rank] for rank in left if rank in receiver}


def _augment(
    start: int,
    edges: Mapping[int, Sequence[int]],
    receiver: dict[int, int],
    giver: dict[int, int | None],
    served: set[int],
) -> bool:
    """Find a shortest augmenting path from ``start`` and apply it to ``receiver``, ``giver``."""
    reached_from: dict[int, int] = {}
    queue = deque([start])
    while queue:
        rank = queue.popleft()
        # A rank that was only swept along by a path may fall back to idling.
        idle = [rank] if rank != start and rank not in served else []
        for right in [*edges[rank], *idle]:
            if right in reached_from or right not in giver:
                continue
            reached_from[right] = rank
            holder = giver[right]
            if holder is not None:
                queue.append(holder)
                continue
            while True:
                rank = reached_from[right]
                before = receiver[rank]
                receiver[rank], giver[right] = right, rank
                if rank == start:
                    return True
                right = before
    return False
