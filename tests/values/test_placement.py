"""Placement refuses what cannot be, and answers where experts are and what would have to move."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from torch_eplb.values.placement import Placement

GOOD = np.array([[[0, 1], [2, 0], [3, 1]]] * 2)  # 2 layers, 3 ranks, 2 slots, 4 experts


def _with(rank: int, slot: int, expert: int) -> NDArray[Any]:
    experts = GOOD.copy()
    experts[1, rank, slot] = expert
    return experts


@st.composite
def placements(draw: st.DrawFn, count: int = 1) -> list[Placement]:
    """Valid placements of the same shape."""
    ranks, layers = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    experts = draw(st.integers(1, 12))
    fewest = -(-experts // ranks)
    slots = draw(st.integers(fewest, min(fewest + 2, experts)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    made = []
    for _ in range(count):
        rows = Placement.initial(layers, experts, ranks, slots).experts.copy()
        for row in rows:
            row[:] = rng.permutation(experts)[row]  # other experts get the replicas
            rng.shuffle(row)  # ranks
            for rank in row:
                rng.shuffle(rank)
        made.append(Placement(rows, experts))
    return made


# Validation.


@pytest.mark.parametrize(
    ("experts", "error", "says"),
    [
        (GOOD.astype(float), TypeError, "integer array .* got dtype float64"),
        (GOOD[0], ValueError, r"shape \[layers, ranks, slots\].* got \[3, 2\]"),
        (GOOD[:0], ValueError, r"each at least 1, got \[0, 3, 2\]"),
        (_with(1, 1, 4), ValueError, r"layer 1, rank 1, slot 1: expert 4 .* 4 experts \(0\.\.3\)"),
        (_with(0, 0, -1), ValueError, "layer 1, rank 0, slot 0: expert -1"),
        (_with(1, 0, 3), ValueError, "layer 1: expert 2 has no slot"),
        (_with(0, 0, 1), ValueError, "layer 1, rank 0: expert 1 sits in 2 slots"),
    ],
)
def test_an_impossible_placement_is_refused_by_name(
    experts: NDArray[Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        Placement(experts, 4)


def test_no_experts_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        Placement(GOOD, 0)


def test_duplicates_on_a_rank_are_accepted_where_they_are_asked_for_or_unavoidable() -> None:
    doubled = _with(0, 0, 1)
    assert Placement(doubled, 4, allow_duplicates=True).slots_of(1, 1) == [0, 1, 5]
    assert Placement(np.array([[[0, 1, 0]]]), 2).num_redundant_experts == 1
    with pytest.raises(ValueError, match="has no slot"):  # coverage is never waived
        Placement(np.zeros((1, 2, 2), dtype=int), 2, allow_duplicates=True)


def test_the_initial_placement_needs_room_for_every_expert() -> None:
    with pytest.raises(ValueError, match="2 ranks of 2 slots cannot hold 5 experts"):
        Placement.initial(1, 5, 2, 2)


@given(made=placements(2))
@settings(max_examples=30)
def test_other_shapes_are_not_compared_but_refused(made: list[Placement]) -> None:
    one = made[0]
    wider = np.concatenate((one.experts, one.experts))
    other = Placement(wider, one.num_experts)
    for method in (one.changed_slots, one.newly_held, one.align):
        with pytest.raises(ValueError, match="placements differ in shape"):
            method(other)
    assert one != other


# A value object.


def test_it_cannot_be_changed_and_does_not_follow_its_source() -> None:
    source = GOOD.copy()
    placement = Placement(source, 4)
    source[0, 0, 0] = 3
    assert placement.experts[0, 0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        placement.experts[0, 0, 0] = 3


def test_any_integer_type_is_taken_and_stored_alike() -> None:
    kinds = (np.uint8, np.int16, np.int64)
    made = {Placement(GOOD.astype(kind), 4) for kind in kinds}
    assert len(made) == 1
    assert made.pop().experts.dtype == np.int32


@given(made=placements(2))
@settings(max_examples=30)
def test_equal_means_the_same_experts_in_the_same_slots(made: list[Placement]) -> None:
    one, other = made
    assert one == Placement(one.experts.tolist(), one.num_experts)
    assert hash(one) == hash(Placement(one.experts.copy(), one.num_experts))
    assert (one == other) == (one.changed_slots(other).sum() == 0)
    assert one != "a placement"


def test_its_repr_tells_the_sizes() -> None:
    assert repr(Placement(GOOD, 4)) == (
        "Placement(layers=2, ranks=3, slots=2, experts=4, redundant=2)"
    )


# Where experts are.


@given(made=placements())
@settings(max_examples=60)
def test_slots_replicas_and_ranks_tell_the_same_story(made: list[Placement]) -> None:
    (placement,) = made
    counts, held = placement.replica_counts(), placement.held()
    assert (
        counts.sum(axis=1).tolist()
        == [placement.num_ranks * placement.num_slots] * placement.num_layers
    )
    assert placement.num_redundant_experts == counts[0].sum() - placement.num_experts
    for layer in range(placement.num_layers):
        for expert in range(placement.num_experts):
            slots = placement.slots_of(layer, expert)
            assert slots == sorted(slots)
            assert len(slots) == counts[layer, expert] >= 1
            ranks = {slot // placement.num_slots for slot in slots}
            assert set(np.flatnonzero(held[layer, expert])) == ranks
            assert len(ranks) == len(slots)  # no two replicas on a rank
            flat = placement.experts[layer].reshape(-1)
            assert (flat[slots] == expert).all()


@pytest.mark.parametrize("shape", [(4, 2, 2), (6, 2, 4), (7, 3, 3), (2, 4, 2), (5, 1, 5)])
def test_the_initial_placement_has_experts_in_order(shape: tuple[int, int, int]) -> None:
    experts, ranks, slots = shape
    placement = Placement.initial(3, experts, ranks, slots)
    flat = placement.experts.reshape(3, -1)
    assert (flat == np.arange(ranks * slots) % experts).all()


# DeepSeek's triple.


@given(made=placements(), doubled=st.booleans())
@settings(max_examples=60)
def test_the_triple_says_what_the_placement_says_and_leads_back_to_it(
    made: list[Placement], doubled: bool
) -> None:
    (placement,) = made
    if doubled:  # an expert twice on a rank, as DeepSeek's algorithm may answer
        rows = np.concatenate((placement.experts, placement.experts[:, :, :1]), axis=2)
        placement = Placement(rows, placement.num_experts, allow_duplicates=True)
    phy2log, log2phy, logcnt = placement.phy2log, placement.log2phy, placement.logcnt
    layers, experts = placement.num_layers, placement.num_experts
    assert phy2log.shape == (layers, placement.num_ranks * placement.num_slots)
    assert log2phy.shape == (layers, experts, logcnt.max())
    assert logcnt.shape == (layers, experts)
    assert phy2log.dtype == log2phy.dtype == logcnt.dtype == np.int64
    for layer in range(layers):
        for expert in range(experts):
            slots = placement.slots_of(layer, expert)
            padding = [-1] * (logcnt.max() - len(slots))
            assert logcnt[layer, expert] == len(slots)
            assert log2phy[layer, expert].tolist() == slots + padding
    for given_as in (phy2log, phy2log.tolist(), torch.from_numpy(phy2log), phy2log.astype("u1")):
        for num_experts in (experts, None):
            again = Placement.from_phy2log(
                given_as, placement.num_ranks, num_experts, allow_duplicates=doubled
            )
            assert again == placement


def test_the_triple_is_new_at_each_look() -> None:
    placement = Placement(GOOD, 4)
    for name in ("phy2log", "log2phy", "logcnt"):
        getattr(placement, name)[:] = 9
    assert placement == Placement(GOOD, 4)
    assert placement.phy2log.tolist() == [[0, 1, 2, 0, 3, 1]] * 2


FLAT = GOOD.reshape(2, 6)


@pytest.mark.parametrize(
    ("phy2log", "num_ranks", "error", "says"),
    [
        (FLAT.astype(float), 3, TypeError, "phy2log must be an integer array .* dtype float64"),
        (torch.ones(2, 6, requires_grad=True), 3, TypeError, "phy2log must .* dtype float32"),
        (GOOD, 3, ValueError, r"phy2log must have the shape .* got \[2, 3, 2\]"),
        (FLAT[:0], 3, ValueError, r"each at least 1, got \[0, 6\]"),
        ([[0, 1], [0]], 1, ValueError, "phy2log must be an integer array .* inhomogeneous"),
        (FLAT, 0, ValueError, "num_ranks must be at least 1, got 0"),
        (
            FLAT,
            4,
            ValueError,
            r"phy2log has 6 physical experts .* must be a multiple of num_ranks \(4\)",
        ),
        (FLAT - 4, 3, ValueError, "layer 0, rank 0, slot 0: expert -4 is not one of the 1 experts"),
        (FLAT * 2, 3, ValueError, "layer 0: expert 1 has no slot on any rank"),
        (FLAT[:, [0, 3, 1, 2, 4, 5]], 3, ValueError, "rank 0: expert 0 sits in 2 slots"),
    ],
)
def test_an_array_that_is_no_phy2log_is_refused_by_name(
    phy2log: Any, num_ranks: int, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        Placement.from_phy2log(phy2log, num_ranks)


# What would have to move.


@given(made=placements(2))
@settings(max_examples=80)
def test_aligning_keeps_stayers_in_their_slots_and_experts_on_their_ranks(
    made: list[Placement],
) -> None:
    before, after = made
    aligned = before.align(after)
    assert np.array_equal(np.sort(aligned.experts, axis=2), np.sort(after.experts, axis=2))
    for was, now in zip(before.experts.reshape(-1, before.num_slots),
                        aligned.experts.reshape(-1, before.num_slots), strict=True):  # fmt: skip
        for slot, expert in enumerate(was.tolist()):
            assert now[slot] == expert or expert not in now
    assert before.align(aligned) == aligned
    assert before.align(before) == before


@given(made=placements(2))
@settings(max_examples=60)
def test_what_is_newly_held_is_the_least_that_changes(made: list[Placement]) -> None:
    before, after = made
    new, changed = before.newly_held(after), before.changed_slots(after)
    assert (new <= changed).all()
    assert np.array_equal(new, before.changed_slots(before.align(after)))
    assert before.newly_held(before).sum() == 0
    # As many (expert, rank) pairs are given up as are taken on: all slots are always full.
    assert np.array_equal(new, after.newly_held(before))


def test_new_experts_fill_the_slots_that_are_left_in_their_order() -> None:
    before = Placement(np.array([[[0, 1, 2, 3], [4, 5, 6, 7]]]), 8)
    after = Placement(np.array([[[7, 2, 5, 0], [3, 4, 1, 6]]]), 8)
    assert before.align(after).experts.tolist() == [[[0, 7, 2, 5], [4, 3, 6, 1]]]


def test_a_duplicate_that_stays_once_stays_in_one_slot() -> None:
    before = Placement(np.array([[[0, 0], [1, 2]]]), 3, allow_duplicates=True)
    after = Placement(np.array([[[1, 0], [1, 2]]]), 3)
    assert before.align(after).experts.tolist() == [[[0, 1], [1, 2]]]
