"""Splits conserve tokens, and those of single batches reach the linear programme's optimum."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linprog

from torch_eplb.policies.batches import level
from torch_eplb.policies.registry import make_policy
from torch_eplb.policies.split import (
    as_samples,
    batch_rank_loads,
    even_split,
    judged_par,
    par,
    rank_loads,
    solve_split,
)
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology

Instance = tuple[NDArray[np.float64], Placement]


def _instance(seed: int, *, samples: int = 3, layers: int = 2) -> Instance:
    """Random sizes, skew and replicas."""
    rng = np.random.default_rng(seed)
    ranks = int(rng.integers(2, 9))
    experts = int(rng.integers(2, 33))
    slots = min(-(-experts // ranks) + int(rng.integers(0, 3)), experts)
    current = Placement.initial(layers, experts, ranks, slots)
    load = np.floor(rng.lognormal(3, rng.uniform(0.2, 2.5), (samples, layers, experts)))
    heat = rng.exponential(size=(1, layers, experts))
    return load, make_policy("random")(heat, current, Topology(ranks)).placement


instances = st.integers(0, 2**32 - 1).map(_instance)


def _least_peak(load: NDArray[np.float64], experts: NDArray[np.int32]) -> float:
    """The least peak of one batch and layer, by linear programming."""
    ranks, slots = experts.shape
    flat = experts.reshape(-1)
    cost = np.zeros(flat.size + 1)
    cost[-1] = 1.0
    peaks = np.zeros((ranks, flat.size + 1))
    peaks[np.repeat(np.arange(ranks), slots), np.arange(flat.size)] = 1.0
    peaks[:, -1] = -1.0
    sums = np.zeros((len(load), flat.size + 1))
    sums[flat, np.arange(flat.size)] = 1.0
    done = linprog(cost, A_ub=peaks, b_ub=np.zeros(ranks), A_eq=sums, b_eq=load, method="highs")
    assert done.status == 0
    return float(done.fun)


@pytest.mark.parametrize("seed", range(40))
def test_the_peak_of_every_batch_is_near_the_linear_programmes(seed: int) -> None:
    load, placement = _instance(seed)
    peaks = batch_rank_loads(load, placement).max(axis=2)
    least = np.array(
        [
            [_least_peak(row, part) for row, part in zip(sample, placement.experts, strict=True)]
            for sample in load
        ]
    )
    assert (peaks >= least * (1 - 1e-7) - 1e-7).all()
    assert (peaks <= least * 1.005 + 1e-7).all()


@given(instance=instances)
@settings(max_examples=60)
def test_no_split_makes_or_loses_tokens(instance: Instance) -> None:
    load, placement = instance
    total = load.sum(axis=2)
    for loads in (
        batch_rank_loads(load, placement),
        rank_loads(load, placement, even_split(placement)),
        rank_loads(load, placement, solve_split(load, placement)),
    ):
        assert loads.shape == (*load.shape[:2], placement.num_ranks)
        assert (loads >= -1e-9 * (1 + total[..., None])).all()
        assert np.allclose(loads.sum(axis=2), total, rtol=1e-9)


@given(instance=instances)
@settings(max_examples=60)
def test_shares_are_not_negative_and_sum_to_one(instance: Instance) -> None:
    load, placement = instance
    for split in (even_split(placement), solve_split(load, placement)):
        assert (split >= 0).all()
        for part, experts in zip(split, placement.experts, strict=True):
            sums = np.bincount(experts.reshape(-1), weights=part.reshape(-1))
            assert np.allclose(sums, 1.0)


@given(instance=instances)
@settings(max_examples=25)
def test_no_fixed_split_beats_splitting_every_batch(instance: Instance) -> None:
    load, placement = instance
    fixed = solve_split(load, placement)
    batch, table, even = (
        judged_par(load, placement, fixed, choice) for choice in ("batch", "table", "even")
    )
    assert (batch <= np.minimum(table, even) * 1.001 + 1e-9).all()


def test_one_batch_is_served_by_the_fixed_split_as_well_as_can_be() -> None:
    for seed in range(10):
        load, placement = _instance(seed, samples=1)
        fixed = solve_split(load, placement)
        table = judged_par(load, placement, fixed, "table")
        assert np.allclose(table, judged_par(load, placement, fixed, "batch"), rtol=2e-3)


def test_the_fixed_split_beats_the_even_one() -> None:
    gains = []
    for seed in range(20):
        load, placement = _instance(seed)
        fixed = solve_split(load, placement)
        table, even = (
            judged_par(load, placement, fixed, choice).mean(axis=0) for choice in ("table", "even")
        )
        gains.extend(even / table)
    assert np.mean(gains) > 1.02
    assert np.mean(np.array(gains) > 0.999) > 0.9


@pytest.mark.parametrize("load", [np.zeros((2, 1, 4)), np.eye(4)[:1, None] * 2.0**40])
def test_empty_and_huge_batches_are_split(load: NDArray[np.float64]) -> None:
    placement = Placement(np.array([[[0, 1], [2, 0], [3, 0]]]), 4)
    loads = batch_rank_loads(load, placement)
    assert np.allclose(loads.sum(axis=2), load.sum(axis=2))
    assert np.allclose(par(loads), 1.0)
    assert np.isfinite(solve_split(load, placement)).all()


def test_a_floor_at_the_water_level_does_not_come_and_go_for_ever() -> None:
    # The level of all three floors rounds to just above the second floor, that of the other two
    # to just below it.
    floor = np.array([[102.66666666666666], [136.66666666666669], [135.66666666666669]])
    parts = level(np.array([[35.0]]), floor, ((3, 1),))
    assert np.allclose(parts[:, 0], [34.0, 0.0, 1.0])


def test_many_samples_are_split_as_they_are_one_by_one() -> None:
    load, placement = _instance(5, samples=300)
    together = batch_rank_loads(load, placement).max(axis=2)
    alone = np.concatenate(
        [batch_rank_loads(row[None], placement).max(axis=2) for row in load[::50]]
    )
    assert np.allclose(together[::50], alone, rtol=2e-3)


def test_without_replicas_there_is_nothing_to_split() -> None:
    placement = Placement.initial(1, 4, 2, 2)
    load = np.array([[[1.0, 2.0, 3.0, 4.0]]])
    assert batch_rank_loads(load, placement).tolist() == [[[3.0, 7.0]]]
    assert (solve_split(load, placement) == 1.0).all()


def test_par_is_the_peak_over_the_mean() -> None:
    assert par(np.array([[1.0, 3.0], [2.0, 2.0], [0.0, 0.0]])).tolist() == [1.5, 1.0, 1.0]
    assert par(np.array([5, 0, 1])) == 2.5


def test_rank_loads_follow_the_shares() -> None:
    placement = Placement(np.array([[[0, 1], [2, 0]]]), 3)
    split = np.array([[[0.25, 1.0], [1.0, 0.75]]])
    assert rank_loads(np.array([[40.0, 1.0, 2.0]]), placement, split).tolist() == [[[11.0, 32.0]]]


def test_a_split_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"split must have .*\[1, 2, 2\], got \[2, 2\]"):
        rank_loads(np.ones((1, 4)), Placement.initial(1, 4, 2, 2), np.ones((2, 2)))


def test_an_unknown_replica_choice_is_refused() -> None:
    placement = Placement.initial(1, 4, 2, 2)
    with pytest.raises(ValueError, match=r"replica_choice must be one of 'batch'.*'most'"):
        judged_par(np.ones((1, 4)), placement, even_split(placement), "most")


def test_counts_of_any_integer_type_are_taken_without_overflow() -> None:
    counts = np.full((1, 1, 4), np.iinfo(np.uint16).max, dtype=np.uint16)
    samples = as_samples(counts, Placement.initial(1, 4, 2, 2))
    assert samples.dtype == np.float64
    assert samples.sum() == 4 * 65535


@pytest.mark.parametrize("slots", [3, 4, 6])
def test_equal_loads_are_split_in_a_moment_whatever_rounding_does_to_their_levels(
    slots: int,
) -> None:
    placement = Placement.initial(2, 9, 3, slots)
    load = np.ones((1, 2, 9))
    for _ in range(40):
        plan = make_policy("random")(load, placement, Topology(3))  # solves the split as well
        placement, split = plan.placement, plan.split
        shares = np.zeros((2, 9))
        for layer in range(2):
            np.add.at(shares[layer], placement.experts[layer], split[layer])
        np.testing.assert_allclose(shares, 1.0)
