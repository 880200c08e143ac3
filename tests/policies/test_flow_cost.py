"""Placements for small batches, which are judged by what batches cost."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_eplb.policies import flow
from torch_eplb.policies.active import least_active, make_room
from torch_eplb.policies.registry import make_policy
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology


def batches(seed: int, samples: int, experts: int, tokens: int) -> np.ndarray:
    """``[samples, 1, experts]``: experts are equally popular by halves, the first three times."""
    popular = np.where(np.arange(experts) < experts // 2, 3.0, 1.0)
    rng = np.random.default_rng(seed)
    return rng.multinomial(tokens, popular / popular.sum(), (samples, 1)).astype(np.float64)


def most_active(load: np.ndarray, placement: Placement) -> float:
    """Active experts on the busiest rank, if every one is where its first replica is."""
    first = [placement.slots_of(0, e)[0] // placement.num_slots for e in range(load.shape[2])]
    ranks = np.eye(placement.num_ranks)[first]
    return float(((load[:, 0] > 0) @ ranks).max(axis=1).mean())


def test_active_experts_are_levelled_where_weights_are_what_costs() -> None:
    start = Placement.initial(1, 64, 8, 8)  # the popular ones are on the first four ranks
    seen, to_come = batches(1, 25, 64, 48), batches(2, 200, 64, 48)
    answer = {}
    for weight in (None, 100):
        policy = make_policy("flow", weight_tokens=weight, sample_steps=1)
        answer[weight] = policy(seen, start, Topology(8)).placement
    assert most_active(to_come, answer[100]) < most_active(to_come, start) - 0.3
    assert most_active(to_come, answer[100]) <= most_active(to_come, answer[None])


def test_a_sample_of_several_steps_costs_its_weights_once_in_each_active_one() -> None:
    rng = np.random.default_rng(3)
    steps = rng.poisson(0.5, (4000, 1, 6)).astype(np.float64)
    exact = flow.worked(steps, 20.0, 1).reshape(1000, 4, 6).sum(axis=1).mean(axis=0)
    summed = flow.worked(steps.reshape(1000, 4, 1, 6).sum(axis=1), 20.0, 4)[:, 0].mean(axis=0)
    assert np.abs(summed / exact - 1).max() < 0.15


def test_shares_that_do_not_follow_the_batch_are_judged_by_tokens() -> None:
    load, start = batches(4, 25, 64, 500), Placement.initial(1, 64, 8, 9)
    plans = [
        make_policy("flow", replica_choice="table", weight_tokens=weight)(load, start, Topology(8))
        for weight in (None, 100)
    ]
    assert plans[0].placement == plans[1].placement


@given(st.integers(0, 2**32 - 1))
def test_the_fullest_rank_has_as_few_active_experts_as_can_be(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ranks, slots, experts = 3, 4, 7
    placed = np.stack([rng.permutation(experts)[:slots] for _ in range(ranks)]).astype(np.int32)
    active = np.isin(np.arange(experts), placed) & (rng.random(experts) < 0.8)
    choices = [np.flatnonzero((placed == e).any(axis=1)) for e in np.flatnonzero(active)]
    best = min(
        np.bincount(np.array(which, dtype=np.int64), minlength=ranks).max()
        for which in itertools.product(*choices)
    )
    assert least_active(placed, active) == best


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4]))
def test_room_is_made_for_as_few_active_experts_as_the_mean(seed: int, per_node: int) -> None:
    rng = np.random.default_rng(seed)
    ranks, slots = 4, 4
    nodes, experts = ranks // per_node, 12 if per_node == 2 else 11
    placed = np.empty((ranks, slots), dtype=np.int32)
    for node in range(nodes):
        own = np.arange(experts)[node::nodes]
        free = np.repeat(np.arange(per_node), slots)
        while True:
            held = np.concatenate([own, rng.choice(own, per_node * slots - len(own))])
            rows = rng.permutation(held)[np.argsort(free, kind="stable")].reshape(per_node, slots)
            if all(len(set(row)) == slots for row in rows.tolist()):
                break
        placed[node * per_node : (node + 1) * per_node] = rows
    active = np.ones(experts, dtype=bool)
    roomy = make_room(placed, active, rng.random(experts), per_node)
    assert least_active(roomy, active) == -(-experts // ranks)
    assert (roomy != placed).sum() <= 8
    for node in range(nodes):
        there = slice(node * per_node, (node + 1) * per_node)
        assert set(roomy[there].reshape(-1).tolist()) == set(range(node, experts, nodes))
    assert all(len(set(row)) == slots for row in roomy.tolist())


@pytest.mark.parametrize("nodes", [1, 2])
def test_no_rank_keeps_more_active_experts_than_without_replicas(nodes: int) -> None:
    """Even if there is no time to search."""
    topology = Topology(8, num_nodes=nodes, num_expert_groups=nodes)
    held = np.arange(32).reshape(8, 4).tolist()
    size = 8 // nodes
    for first in range(0, 8, size):
        # Of each node's ranks the first has five experts that are nowhere else.
        held[first].append(held[first + 1].pop(0))
        held[first + 1] += [held[first + 2][0], held[first + 3][0]]
        for rank in range(2, size):
            held[first + rank].append(held[first + 2 + (rank - 1) % (size - 2)][1])
    start = Placement(np.array([held]), 32)
    load = np.random.default_rng(9).poisson(100.0, (25, 1, 32)).astype(np.float64)
    policy = make_policy("flow", weight_tokens=120, plan_seconds=0.0, max_moves=2)
    answer = policy(load, start, topology).placement
    every = np.ones(32, dtype=bool)
    assert least_active(start.experts[0], every) == 5
    assert least_active(answer.experts[0], every) == 4
    node = answer.experts[0].reshape(nodes, -1) * nodes // 32
    assert (node == np.arange(nodes)[:, None]).all()


def test_replicas_are_not_placed_where_one_more_active_expert_costs_more_than_they_bring() -> None:
    """All experts are active, a few with twice as many tokens, and weights cost most."""
    homes = Placement.initial(1, 32, 4, 8).experts
    start = Placement(np.concatenate([homes, np.roll(homes, 1, axis=1)[..., :1]], axis=2), 32)
    rng = np.random.default_rng(7)
    load = rng.poisson(np.where(np.arange(32) < 8, 90.0, 30.0), (25, 1, 32)).astype(np.float64)
    active = np.ones(32, dtype=bool)
    assert least_active(start.experts[0], active) == 8
    answer = make_policy("flow", weight_tokens=100)(load, start, Topology(4)).placement
    assert least_active(answer.experts[0], active) == 8


def test_searching_by_tokens_as_well_does_not_take_twice_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deadlines = []

    def recorded(x: np.ndarray, start: np.ndarray, rules: flow.Rules) -> tuple[Any, Any]:
        deadlines.append(rules.deadline)
        return improve(x, start, rules)

    improve = flow.improve
    monkeypatch.setattr(flow, "improve", recorded)
    load, start = batches(5, 25, 64, 2000), Placement.initial(1, 64, 8, 9)
    make_policy("flow", weight_tokens=40, plan_seconds=60)(load, start, Topology(8))
    assert len(deadlines) >= 2
    assert len(set(deadlines)) == 1
