"""What the adapters share: maps that are none are mended, plans that fail leave the live map."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_eplb.adapters.planning import Planner, replica_tables, usable_placement
from torch_eplb.policies.rebalance import rebalance_experts
from torch_eplb.policies.registry import make_policy
from torch_eplb.policies.split import even_split, par, rank_loads
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology

LAYERS, EXPERTS, RANKS, SLOTS = 3, 16, 4, 5
RNG = np.random.default_rng(0)
HEAT = RNG.gamma(0.5, 1.0, (1, LAYERS, EXPERTS))
LOAD = RNG.poisson(400 * HEAT, (40, LAYERS, EXPERTS))
START = Placement.initial(LAYERS, EXPERTS, RANKS, SLOTS)


def explode(load: Any, current: Placement, topology: Topology) -> Placement:
    raise RuntimeError("no plan today")


def even_par(load: Any, placement: Placement) -> float:
    return float(par(rank_loads(load, placement, even_split(placement))).mean())


def plan(load: Any = LOAD, table: Any = None, policy: Any = "flow", **more: Any) -> Placement:
    sizes = {"num_slots": RANKS * SLOTS, "num_ranks": RANKS, **more}
    return Planner(policy).plan(load, table, **sizes)


def test_the_plan_is_the_policys_on_the_live_map() -> None:
    table = np.roll(START.experts.reshape(LAYERS, -1), SLOTS, axis=1)
    live = Placement(table.reshape(START.experts.shape), EXPERTS)
    samples = LOAD[:32]
    expected = make_policy("flow", replica_choice="even")(samples, live, Topology(RANKS))
    assert plan(samples, table) == expected.placement
    assert even_par(LOAD, plan(LOAD, table)) < even_par(LOAD, live)


def test_many_steps_are_summed_to_few_samples() -> None:
    seen = []

    def look(load: Any, current: Placement, topology: Topology) -> Placement:
        seen.append(load.shape)
        return current

    plan(LOAD, policy=look)
    plan(LOAD.astype(np.float32), policy=look)
    assert [shape[0] <= 32 for shape in seen] == [True, True]


def test_averages_are_not_cut_to_whole_numbers() -> None:
    shares = LOAD / LOAD.sum()
    assert plan(shares.sum(axis=0)) == plan(LOAD.sum(axis=0))


def test_steps_without_load_do_not_count_and_without_any_load_nothing_moves() -> None:
    padded = np.concatenate([np.zeros_like(LOAD), LOAD])
    assert plan(padded) == plan(LOAD)
    table = START.experts.reshape(LAYERS, -1)
    assert plan(np.zeros_like(LOAD), table) == START


def test_layers_without_load_stay_as_they_are() -> None:
    dense = LOAD.copy()
    dense[:, 0] = 0
    assert np.array_equal(plan(dense).experts[0], START.experts[0])


def test_a_policy_that_raises_leaves_the_live_map(caplog: pytest.LogCaptureFixture) -> None:
    table = np.roll(START.experts.reshape(LAYERS, -1), SLOTS, axis=1)
    with caplog.at_level(logging.ERROR, "torch_eplb"):
        kept = plan(LOAD, table, policy=explode)
    assert np.array_equal(kept.experts.reshape(LAYERS, -1), table)
    assert "no new plan" in caplog.text
    assert "no plan today" in caplog.text


def test_groups_stay_on_nodes_where_they_fill_them() -> None:
    spread = plan(policy="deepseek", num_nodes=2, num_groups=4)
    group = spread.experts // (EXPERTS // 4)
    for layer in group:
        left, right = set(layer[:2].ravel()), set(layer[2:].ravel())
        assert not left & right
    # Numbers that do not divide are taken as one node, one group.
    assert plan(policy="deepseek", num_nodes=3) == plan(policy="deepseek")
    assert plan(policy="deepseek", num_nodes=2, num_groups=5) == plan(policy="deepseek")


@pytest.mark.parametrize(
    ("load", "more", "message"),
    [
        (LOAD[0, 0], {}, r"got shape \[16\]"),
        (LOAD, {"num_slots": 18}, "18 slots must divide evenly over 4 ranks"),
        (LOAD, {"num_slots": 12}, "12 slots must divide evenly over 4 ranks and hold 16 experts"),
        (LOAD, {"num_ranks": 0}, "0 ranks"),
    ],
)
def test_shapes_that_cannot_be_are_errors(load: Any, more: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(load, **more)


def test_wrong_options_are_errors_at_once() -> None:
    with pytest.raises(ValueError, match="policy must be a callable or one of"):
        Planner("flows")
    with pytest.raises(ValueError, match="target_par"):
        Planner("flow", target_par=0.5)


def test_a_planner_can_be_pickled() -> None:
    copy = pickle.loads(pickle.dumps(Planner("deepseek", target_par=1.1)))
    sizes = {"num_slots": RANKS * SLOTS, "num_ranks": RANKS}
    assert copy.plan(LOAD, None, **sizes) == plan(policy="deepseek")


@settings(max_examples=200)
@given(st.data())
def test_any_table_becomes_a_placement_that_keeps_what_it_can(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 9))
    ranks = data.draw(st.integers(1, 4))
    slots = data.draw(st.integers(-(-experts // ranks), experts + 2))
    cells = st.lists(st.integers(-1, experts - 1), min_size=ranks * slots, max_size=ranks * slots)
    table = np.array([data.draw(cells) for _ in range(2)])
    placement = usable_placement(table, 2, experts, ranks, ranks * slots)
    shaped = table.reshape(placement.experts.shape)
    for layer in range(2):
        row = shaped[layer]
        distinct = all(len(set(rank)) == slots for rank in row.tolist())
        whole = (row >= 0).all() and len(np.unique(row)) == experts
        if whole and (distinct or slots > experts):
            assert np.array_equal(placement.experts[layer], row)
    if slots <= experts:
        assert all(
            len(set(rank)) == slots for layer in placement.experts.tolist() for rank in layer
        )


def test_a_mended_map_keeps_the_first_replica_on_a_rank_in_its_slot() -> None:
    table = np.array([[0, 1, 0, 2, 3, 4], [0, 1, 2, 3, 4, -1]])
    mended = usable_placement(table, 2, 5, 2, 6)
    assert mended.experts.tolist() == [[[0, 1, 2], [2, 3, 4]], [[0, 1, 2], [3, 4, 0]]]


@pytest.mark.parametrize("table", [np.zeros((2, 9), int), np.full((2, 6), 9), np.ones((2, 6))])
def test_what_does_not_fit_is_not_looked_at(table: Any) -> None:
    assert usable_placement(table, 2, 5, 2, 6) == Placement.initial(2, 5, 2, 3)


def test_the_three_tables_are_those_of_deepseeks_algorithm() -> None:
    weight = LOAD.sum(axis=0)
    physical, logical, counts = rebalance_experts(weight, RANKS * SLOTS, 1, 1, RANKS)
    shaped = physical.reshape(LAYERS, RANKS, SLOTS)
    ours = replica_tables(Placement(shaped, EXPERTS, allow_duplicates=True))
    assert np.array_equal(ours[0], physical)
    assert np.array_equal(ours[2], counts)
    assert np.array_equal(np.sort(ours[1], axis=2), np.sort(logical, axis=2))


def test_adapters_import_no_torch() -> None:
    names = "planning, plugin, sglang, vllm, vllm_ascend"
    code = f"from torch_eplb.adapters import {names}; import sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
