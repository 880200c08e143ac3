"""Schedules, executed on values instead of weights: a slot holds the number of its expert.

The executor below is as unkind as a real one may be: a drained slot is garbage from the moment the
round begins until it has been received into.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from torch_eplb.schedule.schedule import (
    LAYER,
    SOURCE_RANK,
    TARGET_RANK,
    Round,
    Schedule,
    check_schedule,
    make_schedule,
)
from torch_eplb.values.placement import Placement

GARBAGE = -1


def random_placement(
    rng: np.random.Generator, layers: int, ranks: int, slots: int, num_experts: int
) -> Placement:
    """Any number of replicas of any expert, none twice on a rank unless there is no other way."""
    out = np.empty((layers, ranks, slots), dtype=np.int32)
    for layer in range(layers):
        out[layer] = np.arange(ranks * slots).reshape(ranks, slots) % num_experts
        for _ in range(4 * ranks * slots):
            (r, q), (s, t) = rng.integers(ranks, size=2), rng.integers(slots, size=2)
            mine, other = out[layer, r, s], out[layer, q, t]
            if other in out[layer, r]:
                continue
            if (out[layer] == mine).sum() > 1 and rng.random() < 0.3:
                out[layer, r, s] = other  # one replica less of one expert, one more of another
            elif mine not in out[layer, q]:
                out[layer, r, s], out[layer, q, t] = other, mine
        out[layer] = rng.permutation(num_experts)[out[layer]]
    return Placement(out, num_experts)


def contents(experts: NDArray[np.int32]) -> NDArray[np.int64]:
    """``[layers, ranks, slots]``: what the weights of every slot must be."""
    layers = np.arange(len(experts))[:, None, None]
    return 1_000_000 * (1 + layers) + experts


def assert_every_expert_answers(
    live: NDArray[np.int64], routed: NDArray[np.bool_], placement: Placement
) -> None:
    """Routed slots hold what the placement says, and every expert has one."""
    assert (live == contents(placement.experts))[routed].all()
    for layer in range(placement.num_layers):
        answering = np.unique(placement.experts[layer][routed[layer]])
        assert len(answering) == placement.num_experts


def execute(schedule: Schedule, sizes: NDArray[np.int64], staging_bytes: int) -> None:
    """Run the rounds on values, with every invariant checked at every point."""
    placement, live = schedule.start, contents(schedule.start.experts)
    for rnd, after in zip(schedule.rounds, schedule.placements(), strict=True):
        layer, _, source_rank, source_slot, target_rank, target_slot = rnd.transfers.T
        sources, targets = (layer, source_rank, source_slot), (layer, target_rank, target_slot)
        routed = np.ones(live.shape, dtype=bool)
        drained = tuple(index[rnd.direct] for index in targets)
        routed[drained] = False
        assert_every_expert_answers(live, routed, placement)
        live[drained] = GARBAGE
        messages = live[sources]
        assert (messages != GARBAGE).all()
        staging = np.zeros(schedule.start.num_ranks, dtype=np.int64)
        np.add.at(staging, target_rank[~rnd.direct], sizes[layer[~rnd.direct]])
        assert staging.max() <= staging_bytes
        live[drained] = messages[rnd.direct]
        assert_every_expert_answers(live, routed, placement)
        live[tuple(index[~rnd.direct] for index in targets)] = messages[~rnd.direct]
        placement = after
        assert_every_expert_answers(live, np.ones(live.shape, dtype=bool), placement)
    assert placement == schedule.target


@st.composite
def problems(draw: st.DrawFn) -> tuple[Placement, Placement, dict[str, Any]]:
    """Two placements of one shape, and bounds for `make_schedule`."""
    layers, ranks, slots = draw(st.integers(1, 4)), draw(st.integers(1, 8)), draw(st.integers(1, 5))
    num_experts = draw(st.integers(1, ranks * slots))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    current, wanted = (random_placement(rng, layers, ranks, slots, num_experts) for _ in range(2))
    sizes = draw(
        st.one_of(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=layers, max_size=layers))
    )
    largest = max(sizes) if isinstance(sizes, list) else sizes
    bounds = {
        "expert_bytes": sizes,
        "staging_bytes": largest + draw(st.integers(0, 3 * largest)),
        "direct": draw(st.booleans()),
        "layers_per_round": draw(st.none() | st.integers(1, 4)),
        "send_bytes_per_round": draw(st.none() | st.integers(1, 30)),
        "ranks_per_node": draw(st.none() | st.sampled_from([n for n in (1, 2, 4) if n <= ranks])),
    }
    return current, wanted, bounds


def check(schedule: Schedule, bounds: dict[str, Any]) -> None:
    kinds = ("expert_bytes", "staging_bytes", "layers_per_round", "send_bytes_per_round")
    check_schedule(schedule, **{name: bounds[name] for name in kinds})


@settings(max_examples=300)
@given(problems())
def test_every_round_leaves_a_model_that_answers_and_the_last_one_is_the_wanted(
    problem: tuple[Placement, Placement, dict[str, Any]],
) -> None:
    current, wanted, bounds = problem
    schedule = make_schedule(current, wanted, **bounds)

    sizes = np.broadcast_to(np.array(bounds["expert_bytes"]), current.num_layers)
    execute(schedule, sizes, bounds["staging_bytes"])
    check(schedule, bounds)
    assert (np.sort(schedule.target.experts) == np.sort(wanted.experts)).all()
    stays = current.experts == current.align(wanted).experts
    assert (schedule.target.experts == current.experts)[stays].all()
    if not bounds["direct"]:
        assert not any(rnd.direct.any() for rnd in schedule.rounds)


@settings(max_examples=100)
@given(problems())
def test_no_expert_is_sent_to_a_rank_that_holds_it_or_will_not(
    problem: tuple[Placement, Placement, dict[str, Any]],
) -> None:
    current, wanted, bounds = problem
    schedule = make_schedule(current, wanted, **bounds)
    sent = sum(
        int((rnd.transfers[:, SOURCE_RANK] != rnd.transfers[:, TARGET_RANK]).sum())
        for rnd in schedule.rounds
    )
    minimum = int(current.newly_held(wanted).sum())
    assert sent == minimum or (sent >= minimum and current.num_slots > current.num_experts)


@settings(max_examples=100)
@given(problems(), st.booleans())
def test_a_layer_takes_as_many_rounds_as_the_busiest_rank_has_arrivals_with_staging_for_one(
    problem: tuple[Placement, Placement, dict[str, Any]], direct: bool
) -> None:
    current, wanted, _ = problem
    if current.num_slots > current.num_experts:
        return
    schedule = make_schedule(
        current, wanted, expert_bytes=1, staging_bytes=1, direct=direct, layers_per_round=1
    )
    arrivals = (current.experts != schedule.target.experts).sum(axis=2)
    busiest = int(arrivals.max(axis=1).sum())
    assert len(schedule.rounds) <= busiest if direct else len(schedule.rounds) == busiest


@settings(max_examples=50)
@given(problems())
def test_equal_arguments_give_equal_schedules_and_the_wire_changes_nothing(
    problem: tuple[Placement, Placement, dict[str, Any]],
) -> None:
    current, wanted, bounds = problem
    schedule = make_schedule(current, wanted, **bounds)
    wire = schedule.to_array()
    assert np.array_equal(wire, make_schedule(current, wanted, **bounds).to_array())
    again = Schedule.from_array(wire, current, schedule.target)
    assert np.array_equal(again.to_array(), wire)
    assert again.placements() == schedule.placements()


@settings(max_examples=50)
@given(problems(), st.data())
def test_a_migration_that_was_given_up_half_way_can_go_anywhere(
    problem: tuple[Placement, Placement, dict[str, Any]], data: st.DataObject
) -> None:
    current, wanted, bounds = problem
    placements = make_schedule(current, wanted, **bounds).placements()
    half_way = data.draw(st.sampled_from([current, *placements]))
    sizes = np.broadcast_to(np.array(bounds["expert_bytes"]), current.num_layers)
    execute(make_schedule(half_way, current, **bounds), sizes, bounds["staging_bytes"])


def one_layer(*ranks: list[int], num_experts: int) -> Placement:
    return Placement(np.array([ranks]), num_experts)


def test_nothing_to_move_is_no_round() -> None:
    current = one_layer([0, 1], [2, 3], num_experts=4)
    schedule = make_schedule(
        current, one_layer([1, 0], [2, 3], num_experts=4), expert_bytes=1, staging_bytes=1
    )
    assert schedule.rounds == ()
    assert schedule.target == current
    assert Schedule.from_array(schedule.to_array(), current, current).rounds == ()


def test_slots_with_a_live_replica_elsewhere_are_received_into_directly() -> None:
    current = one_layer([0, 1], [2, 0], [3, 1], num_experts=4)
    wanted = one_layer([0, 1], [2, 3], [3, 2], num_experts=4)
    (rnd,) = make_schedule(current, wanted, expert_bytes=1, staging_bytes=1).rounds
    assert rnd.direct.all()


def test_a_swap_without_replicas_is_staged() -> None:
    current, wanted = one_layer([0], [1], num_experts=2), one_layer([1], [0], num_experts=2)
    (rnd,) = make_schedule(current, wanted, expert_bytes=1, staging_bytes=1).rounds
    assert len(rnd) == 2
    assert not rnd.direct.any()


def test_two_copies_of_an_expert_that_leaves_are_not_both_drained() -> None:
    current = one_layer([0], [0], [1], [2], num_experts=3)
    wanted = one_layer([1], [2], [0], [2], num_experts=3)
    schedule = make_schedule(current, wanted, expert_bytes=1, staging_bytes=1)
    execute(schedule, np.ones(1, dtype=np.int64), 1)
    assert sum(int(rnd.direct.sum()) for rnd in schedule.rounds) > 0


def test_an_expert_that_many_ranks_need_spreads_as_a_tree_when_sends_are_bounded() -> None:
    ranks = 16
    current = Placement(np.array([[[0, 1]] + [[1, 2]] * (ranks - 1)]), 3)
    wanted = Placement(np.array([[[0, 2]] + [[0, 1 + r % 2] for r in range(1, ranks)]]), 3)
    schedule = make_schedule(
        current, wanted, expert_bytes=10, staging_bytes=10, send_bytes_per_round=10
    )
    holders = [int((p.experts == 0).sum()) for p in schedule.placements()]
    assert holders == [2, 4, 8, 16]


def test_without_a_bound_sends_of_an_expert_are_spread_over_its_replicas() -> None:
    current = one_layer([0, 1], [0, 1], [2, 1], [2, 1], [2, 1], [2, 1], num_experts=3)
    wanted = one_layer([0, 1], [0, 1], [0, 2], [0, 2], [0, 2], [0, 2], num_experts=3)
    (rnd,) = make_schedule(current, wanted, expert_bytes=1, staging_bytes=1).rounds
    assert np.bincount(rnd.transfers[:, SOURCE_RANK]).tolist() == [2, 2]


@pytest.mark.parametrize(("ranks_per_node", "source"), [(None, 0), (2, 2)])
def test_a_source_on_the_same_node_is_preferred(ranks_per_node: int | None, source: int) -> None:
    current = one_layer([0, 1], [1, 2], [0, 1], [1, 2], num_experts=3)
    wanted = one_layer([0, 1], [1, 2], [0, 1], [0, 2], num_experts=3)
    (rnd,) = make_schedule(
        current, wanted, expert_bytes=1, staging_bytes=1, ranks_per_node=ranks_per_node
    ).rounds
    assert rnd.transfers[:, (SOURCE_RANK, TARGET_RANK)].tolist() == [[source, 3]]


def test_a_second_copy_on_a_rank_is_a_local_copy() -> None:
    current = one_layer([0, 1, 0], [1, 0, 1], num_experts=2)
    wanted = one_layer([0, 1, 1], [1, 0, 0], num_experts=2)
    (rnd,) = make_schedule(current, wanted, expert_bytes=1, staging_bytes=1).rounds
    assert (rnd.transfers[:, SOURCE_RANK] == rnd.transfers[:, TARGET_RANK]).all()


def test_more_staging_means_fewer_rounds() -> None:
    rng = np.random.default_rng(3)
    current, wanted = (random_placement(rng, 2, 8, 8, 64) for _ in range(2))
    rounds = [
        len(make_schedule(current, wanted, expert_bytes=10, staging_bytes=budget).rounds)
        for budget in (10, 20, 40, 160)
    ]
    assert rounds == sorted(rounds, reverse=True)
    assert rounds[-1] == 1


def test_layers_may_have_experts_of_different_sizes() -> None:
    rng = np.random.default_rng(4)
    current, wanted = (random_placement(rng, 2, 4, 4, 16) for _ in range(2))
    schedule = make_schedule(current, wanted, expert_bytes=[10, 1], staging_bytes=10)
    check_schedule(schedule, expert_bytes=[10, 1], staging_bytes=10)
    with pytest.raises(ValueError, match=r"round \d+, rank \d: staged receives take"):
        check_schedule(schedule, expert_bytes=[10, 10], staging_bytes=10)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"staging_bytes": 9}, ValueError, "largest layer, 10 bytes, got 9"),
        ({"expert_bytes": 0}, ValueError, "expert_bytes must be at least 1"),
        ({"expert_bytes": 1.5}, TypeError, "expert_bytes must be integers"),
        ({"expert_bytes": [10, 10]}, ValueError, r"one per layer \(1\)"),
        ({"layers_per_round": 0}, ValueError, "layers_per_round must be at least 1"),
        ({"send_bytes_per_round": 0}, ValueError, "send_bytes_per_round must be at least 1"),
        ({"ranks_per_node": 0}, ValueError, "ranks_per_node must be at least 1"),
        ({"wanted": one_layer([0, 1, 2], num_experts=3)}, ValueError, "differ in shape"),
    ],
)
def test_bounds_that_cannot_work_are_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {
        "current": one_layer([0], [1], num_experts=2),
        "wanted": one_layer([1], [0], num_experts=2),
        "expert_bytes": 10,
        "staging_bytes": 10,
    }
    with pytest.raises(error, match=message):
        make_schedule(**(arguments | change))


# The experts 1 and 2 have two replicas, 0 and 3 have one.
START = one_layer([0, 1], [1, 2], [3, 2], num_experts=4)


@pytest.mark.parametrize(
    ("rows", "direct", "message"),
    [
        ([], [], "round 0: has no transfers"),
        ([[0, 4, 0, 0, 1, 0]], [0], "is outside"),
        ([[0, 0, 0, 0, 3, 0]], [0], "is outside"),
        ([[0, 2, 0, 0, 1, 0]], [0], "rank 0: the source slot does not hold the expert"),
        ([[0, 0, 0, 0, 1, 0], [0, 3, 2, 0, 1, 0]], [0, 0], "rank 1: a slot is the target of two"),
        (
            [[0, 0, 0, 0, 1, 0], [0, 1, 1, 0, 2, 1]],
            [1, 0],
            "rank 1: the source slot is drained in the same round",
        ),
        ([[0, 1, 1, 0, 0, 0]], [0], "expert 0 has no live slot after the commit"),
        (
            [[0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]],
            [1, 0],
            "the source slot is drained in the same round",
        ),
        (
            [[0, 0, 0, 0, 0, 1], [0, 3, 2, 0, 1, 0]],
            [1, 1],
            "expert 1 has no live slot once the direct targets are drained",
        ),
        ([[0, 0, 0, 0, 1, 0]], [0], "after the last round layer 0, rank 1, slot 0 holds expert 0"),
    ],
)
def test_a_round_that_breaks_an_invariant_is_refused_by_name(
    rows: list[list[int]], direct: list[int], message: str
) -> None:
    transfers = np.array(rows, dtype=np.int32).reshape(-1, 6)
    schedule = Schedule(START, START, (Round(transfers, np.array(direct, dtype=bool)),))
    with pytest.raises(ValueError, match=message):
        check_schedule(schedule, expert_bytes=1, staging_bytes=10)
    with pytest.raises(ValueError, match=message):
        schedule.placements()
    if rows:
        with pytest.raises(ValueError, match=message):
            Schedule.from_array(schedule.to_array(), START, START)


def test_bounds_that_a_schedule_exceeds_are_named() -> None:
    rng = np.random.default_rng(5)
    current, wanted = (random_placement(rng, 3, 4, 4, 14) for _ in range(2))
    schedule = make_schedule(current, wanted, expert_bytes=10, staging_bytes=40)
    check_schedule(schedule, expert_bytes=10, staging_bytes=40)
    for bound, message in (
        ({"layers_per_round": 1}, r"round \d+: touches \d layers, layers_per_round is 1"),
        ({"send_bytes_per_round": 15}, r"round \d+, rank \d: sends take \d+ bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            check_schedule(schedule, expert_bytes=10, staging_bytes=40, **bound)


def test_one_expert_may_be_sent_whatever_the_bound() -> None:
    current, wanted = one_layer([0], [1], num_experts=2), one_layer([1], [0], num_experts=2)
    schedule = make_schedule(
        current, wanted, expert_bytes=10, staging_bytes=10, send_bytes_per_round=1
    )
    check_schedule(schedule, expert_bytes=10, staging_bytes=10, send_bytes_per_round=1)


@pytest.mark.parametrize(
    "garbage",
    [
        np.zeros(0, dtype=np.int64),
        np.zeros(5, dtype=np.int64),
        np.zeros(5),
        np.zeros((2, 2), dtype=np.int64),
        np.array([2**63], dtype=np.uint64),
        np.array(["rounds"]),
    ],
)
def test_an_array_that_is_no_schedule_is_refused(garbage: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="schedule"):
        Schedule.from_array(garbage, START, START)


@settings(max_examples=300)
@given(problems(), st.data())
def test_a_damaged_array_is_refused_or_is_a_valid_schedule(
    problem: tuple[Placement, Placement, dict[str, Any]], data: st.DataObject
) -> None:
    current, wanted, bounds = problem
    schedule = make_schedule(current, wanted, **bounds)
    wire = schedule.to_array()
    where = data.draw(st.integers(0, len(wire) - 1))
    kind = data.draw(st.sampled_from(["value", "cut", "longer", "swap"]))
    if kind == "cut":
        wire = wire[:where]
    elif kind == "longer":
        wire = np.append(wire, wire[where])
    elif kind == "swap":
        other = data.draw(st.integers(0, len(wire) - 1))
        wire[[where, other]] = wire[[other, where]]
    else:
        wire[where] = data.draw(st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 40))
    try:
        survived = Schedule.from_array(wire, current, schedule.target)
    except ValueError:
        return
    execute(survived, np.zeros(current.num_layers, dtype=np.int64), 0)


def test_transfers_are_in_the_order_of_layer_and_target() -> None:
    rng = np.random.default_rng(6)
    current, wanted = (random_placement(rng, 3, 4, 4, 12) for _ in range(2))
    for rnd in make_schedule(current, wanted, expert_bytes=1, staging_bytes=4).rounds:
        keys = rnd.transfers[:, (LAYER, TARGET_RANK, TARGET_RANK + 1)].tolist()
        assert keys == sorted(keys)


def test_a_round_of_the_wrong_shape_cannot_be_made() -> None:
    with pytest.raises(ValueError, match=r"\[n, 6\]"):
        Round(np.zeros((2, 5), dtype=np.int32), np.zeros(2, dtype=bool))
    with pytest.raises(ValueError, match="one per transfer"):
        Round(np.zeros((2, 6), dtype=np.int32), np.zeros(3, dtype=bool))


def test_scheduling_imports_no_torch() -> None:
    code = "import sys, torch_eplb.schedule.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
