"""Variance and covariance count, replica counts are searched, and little moves without need."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from torch_eplb.policies import flashlb
from torch_eplb.policies.deepseek import groups_on_nodes, place
from torch_eplb.policies.split import even_split, judged_par
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology


def _par(load: NDArray[np.float64], placement: Placement) -> float:
    """Mean PAR under the even split, over samples and layers."""
    return float(judged_par(load, placement, even_split(placement), "even").mean())


def _skewed(seed: int, layers: int = 2, experts: int = 32) -> NDArray[np.float64]:
    """Load with a lasting skew and with noise, ``[16, layers, experts]``."""
    rng = np.random.default_rng(seed)
    heat = rng.lognormal(0, 1, (layers, experts))
    return rng.poisson(100 * heat * rng.lognormal(0, 0.2, (16, layers, experts))).astype(float)


def test_experts_that_are_hot_at_different_times_are_put_together() -> None:
    # Experts 0 and 1 are hot in even samples, 2 and 3 in odd ones; their means are equal.
    swing = np.array([[150.0, 150.0, 50.0, 50.0], [50.0, 50.0, 150.0, 150.0]] * 4)[:, None]
    current = Placement(np.array([[[0, 1], [2, 3]]]), 4)
    placed = flashlb.plan(swing, current, Topology(2))
    assert _par(swing, current) == pytest.approx(1.5)
    assert _par(swing, placed) == pytest.approx(1.0)


def test_of_equal_means_the_steady_experts_balance_the_unsteady() -> None:
    # All means are 100. Experts 0 and 1 swing in step: together on a rank they would swing twice.
    swing = np.full((8, 1, 4), 100.0)
    swing[::2, 0, :2], swing[1::2, 0, :2] = 180.0, 20.0
    placed = flashlb.plan(swing, Placement(np.array([[[0, 1], [2, 3]]]), 4), Topology(2))
    assert all(len({0, 1} & set(rank)) == 1 for rank in placed.experts[0].tolist())


def test_a_single_sample_is_placed_by_its_load() -> None:
    load = np.array([[[60.0, 50.0, 20.0, 10.0, 5.0, 5.0]]])
    placed = flashlb.plan(load, Placement.initial(1, 6, 2, 3), Topology(2))
    assert _par(load, placed) == pytest.approx(1.0)


def test_replica_counts_are_searched_together_with_the_placement() -> None:
    # The example of FlashLB's description: the greedy counts and a packing afterwards reach 232.
    load = np.array([[[600.0, 560.0, 120.0, 120.0, 20.0, 10.0, 10.0, 10.0]]])
    placed = flashlb.plan(load, Placement.initial(1, 8, 8, 2), Topology(8))
    peak = _par(load, placed) * load.sum() / 8
    assert peak <= 210


def test_a_replica_that_finds_room_only_beside_its_sibling_changes_places() -> None:
    load = np.array([[[59.0, 11.0, 303.0, 12.0, 11.0, 61.0, 19.0, 77.0, 230.0]]])
    current = Placement.initial(1, 9, 2, 5)
    # Placement refuses two replicas on a rank.
    placed = Placement(flashlb.place_by_risk(load, current.experts, current.experts), 9)
    assert _par(load, placed) < 1.05


@pytest.mark.parametrize("seed", range(8))
def test_it_beats_a_placement_by_mean_load(seed: int) -> None:
    load = _skewed(seed)
    current = Placement.initial(2, 32, 8, 5)
    ours = flashlb.plan(load, current, Topology(8))
    by_mean = place(load.mean(axis=0), current, Topology(8))
    assert _par(load, ours) <= _par(load, by_mean) + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_a_layer_that_was_just_placed_stays(seed: int) -> None:
    load = _skewed(seed)
    placed = flashlb.plan(load, Placement.initial(2, 32, 8, 5), Topology(8))
    assert flashlb.plan(load, placed, Topology(8)) == placed


def test_a_level_layer_stays_while_its_neighbour_is_placed_anew() -> None:
    load = np.ones((4, 2, 8))
    load[:, 1, :4] = 9.0
    current = Placement.initial(2, 8, 4, 2)
    placed = flashlb.plan(load, current, Topology(4))
    assert (current.newly_held(placed) > 0).tolist() == [False, True]


def test_new_ranks_are_named_after_the_old_ones_that_they_resemble() -> None:
    load = _skewed(0)
    current = flashlb.plan(load, Placement.initial(2, 32, 8, 5), Topology(8))
    renamed = Placement(np.roll(current.experts, 3, axis=1), 32)
    hotter = load.copy()
    hotter[:, :, current.experts[0, 0, 0]] *= 4  # so much that both layers are placed anew
    moved = renamed.newly_held(flashlb.plan(hotter, renamed, Topology(8)))
    unnamed = renamed.newly_held(
        Placement(np.roll(flashlb.plan(hotter, renamed, Topology(8)).experts, 1, axis=1), 32)
    )
    assert (moved > 0).all()
    assert (moved < unnamed).all()


def test_groups_that_are_not_on_nodes_are_put_there_and_then_stay() -> None:
    topology = Topology(4, 2, 4)
    load = _skewed(1, experts=16)
    placed = flashlb.plan(load, Placement.initial(2, 16, 4, 5), topology)
    assert groups_on_nodes(placed, topology).all()
    later = flashlb.plan(load[::-1] ** 1.1, placed, topology)
    assert groups_on_nodes(later, topology).all()


def test_whole_groups_change_nodes_where_that_levels_the_nodes() -> None:
    topology = Topology(4, 2, 4)
    current = Placement(np.arange(16).reshape(1, 4, 4), 16)  # groups 0 and 1, and 2 and 3
    load = np.ones((2, 1, 16))
    load[:, :, :8] = 5.0
    placed = flashlb.plan(load, current, topology)
    assert groups_on_nodes(placed, topology).all()
    assert _par(load, current) > 1.6
    assert _par(load, placed) == pytest.approx(1.0)
