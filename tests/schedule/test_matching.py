"""The matching against every choice there is, on graphs small enough to try them all."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from torch_eplb.schedule.matching import match_departures


def possible_receivers(
    left: list[int], edges: dict[int, list[int]], open_right: frozenset[int]
) -> list[dict[int, int]]:
    """Every choice in which each receiver is one rank's and has room."""
    found = []
    for choice in product(*([rank, *edges[rank]] for rank in left)):
        served = {rank: to for rank, to in zip(left, choice, strict=True) if rank != to}
        receivers = list(served.values())
        has_room = all(to in open_right or to in served for to in receivers)
        if has_room and len(set(receivers)) == len(receivers):
            found.append(served)
    return found


@settings(max_examples=500)
@given(st.data())
def test_it_serves_the_most_urgent_ranks_that_can_be_served_together(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 6))
    ranks = data.draw(st.permutations(range(size)))
    left = ranks[: data.draw(st.integers(0, size))]
    open_right = frozenset(ranks[len(left) :])
    edges = {
        rank: data.draw(
            st.lists(st.sampled_from([r for r in ranks if r != rank]), max_size=3)
            if size > 1
            else st.just([])
        )
        for rank in left
    }

    served = match_departures(left, edges, open_right)

    choices = possible_receivers(left, edges, open_right)
    assert served in choices
    best = max([rank in choice for rank in left] for choice in choices)
    assert [rank in served for rank in left] == best


def test_a_rank_that_was_swept_along_yields_to_a_more_urgent_one() -> None:
    edges = {0: [2, 1], 1: [0], 2: [0]}  # rank 0 can turn with 2 or with 1
    assert match_departures([0, 1, 2], edges, frozenset()) == {0: 1, 1: 0}


def test_a_long_cycle_turns_at_once() -> None:
    ranks = list(range(500))
    edges = {rank: [(rank + 1) % 500] for rank in ranks}
    assert match_departures(ranks, edges, frozenset()) == {rank: edges[rank][0] for rank in ranks}


def test_receivers_outside_the_round_are_ignored() -> None:
    assert match_departures([0], {0: [7]}, frozenset()) == {}
