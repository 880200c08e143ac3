"""The published algorithm to the letter; and the policy's own care for duplicates and nodes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_eplb.policies.deepseek import groups_on_nodes, place
from torch_eplb.policies.rebalance import rebalance_experts
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology

# The example of DeepSeek's README.
WEIGHT = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
EXPECTED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_published_example_comes_out_exactly() -> None:
    physical, logical, counts = rebalance_experts(WEIGHT, 16, 4, 2, 8)
    assert physical.tolist() == EXPECTED
    assert counts.sum(axis=1).tolist() == [16, 16]
    for layer in range(2):
        for expert in range(12):
            slots = logical[layer, expert][: counts[layer, expert]]
            assert (physical[layer, slots] == expert).all()
            assert (logical[layer, expert][counts[layer, expert] :] == -1).all()


def test_the_policy_gives_the_published_example_where_it_has_no_duplicates() -> None:
    current = Placement.initial(2, 12, 8, 2)
    placed = place(WEIGHT, current, Topology(8, 2, 4))
    assert placed.experts.reshape(2, 16).tolist() == EXPECTED


def test_groups_that_do_not_divide_over_nodes_are_ignored() -> None:
    together = rebalance_experts(WEIGHT, 16, 1, 1, 8)[0]
    assert np.array_equal(rebalance_experts(WEIGHT, 16, 3, 2, 8)[0], together)


@given(seed=st.integers(0, 2**32 - 1), skew=st.floats(0.1, 4.0))
@settings(max_examples=40)
def test_the_raw_function_covers_every_expert_on_its_groups_node(seed: int, skew: float) -> None:
    weight = np.random.default_rng(seed).lognormal(0, skew, size=(2, 12))
    physical, _, counts = rebalance_experts(weight, 16, 4, 2, 8)
    assert (counts >= 1).all()
    node_of_group = np.full((2, 4), -1)
    for layer in range(2):
        for node, experts in enumerate(physical[layer].reshape(2, 8)):
            for group in set(experts // 3):
                assert node_of_group[layer, group] == -1, "a group on two nodes"
                node_of_group[layer, group] = node


@given(seed=st.integers(0, 2**32 - 1), skew=st.floats(0.1, 4.0))
@settings(max_examples=40)
def test_the_policy_never_doubles_an_expert_on_a_rank(seed: int, skew: float) -> None:
    weight = np.random.default_rng(seed).lognormal(0, skew, size=(2, 12))
    current = Placement.initial(2, 12, 4, 5)
    for topology in (Topology(4), Topology(4, 2, 4)):
        # A Placement with a duplicate would not have been made.
        placed = place(weight, current, topology)
        assert placed.replica_counts().max() <= topology.ranks_per_node * (
            1 if topology.hierarchical else topology.num_nodes
        )
    assert groups_on_nodes(placed, Topology(4, 2, 4)).all()


def test_a_hot_expert_gets_the_replicas() -> None:
    weight = np.array([[800.0, 100.0, 100.0, 100.0, 100.0, 100.0]])
    current = Placement.initial(1, 6, 4, 2)
    counts = place(weight, current, Topology(4)).replica_counts()[0]
    assert counts.tolist() == [3, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("numbers", "named"),
    [
        ((15, 4, 2, 8), r"num_replicas \(15\) must be a multiple of num_gpus \(8\)"),
        ((16, 5, 5, 8), r"experts \(12\) must be a multiple of num_groups \(5\)"),
        ((18, 3, 3, 2), r"num_gpus \(2\) must be a multiple of num_nodes \(3\)"),
        ((8, 4, 2, 8), r"num_replicas \(8\) cannot hold 12 experts"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    numbers: tuple[int, int, int, int], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        rebalance_experts(WEIGHT, *numbers)


def test_weights_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[layers, experts\] .* got \[12\]"):
        rebalance_experts(WEIGHT[0], 16, 4, 2, 8)


@pytest.mark.parametrize("slots", [2, 3])
def test_ranks_with_room_for_every_expert_hold_every_expert(slots: int) -> None:
    one_hot = np.array([[1000.0, 0.0]])
    doubled = np.zeros((1, 2, slots), dtype=int)
    doubled[0, 1, 0] = 1
    for current in (
        Placement.initial(1, 2, 2, slots),
        Placement(doubled, 2, allow_duplicates=True),
    ):
        assert place(one_hot, current, Topology(2)).held().all()
