"""Few moves: at most one swap per pair of ranks, one handover per redundant slot."""

from __future__ import annotations

import numpy as np
import pytest

from torch_eplb.policies.deepseek import groups_on_nodes
from torch_eplb.policies.split import even_split, judged_par
from torch_eplb.policies.swift import plan
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology


def _even_par(load: np.ndarray, placement: Placement) -> np.ndarray:
    return judged_par(load.mean(axis=0), placement, even_split(placement), "even")[0]


def test_balanced_load_moves_nothing() -> None:
    current = Placement.initial(2, 16, 4, 4)
    assert plan(np.ones((3, 2, 16)), current, Topology(4)) == current


def test_the_hottest_rank_swaps_with_the_coldest() -> None:
    current = Placement.initial(1, 8, 4, 2)
    load = np.array([[[50.0, 50.0, 30.0, 30.0, 20.0, 20.0, 10.0, 10.0]]])
    # Rank 0 (100) with rank 3 (20) and rank 1 (60) with rank 2 (40): one expert each way.
    placed = plan(load, current, Topology(4))
    assert current.newly_held(placed).tolist() == [4]
    assert _even_par(load, placed)[0] == pytest.approx(1.0909, abs=1e-4)


def test_a_redundant_slot_goes_to_the_hottest_expert() -> None:
    current = Placement(np.array([[[0, 1], [2, 3], [4, 0]]]), 5)
    load = np.array([[[5.0, 10.0, 10.0, 10.0, 60.0]]])
    placed = plan(load, current, Topology(3))
    assert placed.replica_counts()[0].tolist() == [1, 1, 1, 1, 2]


@pytest.mark.parametrize("seed", range(20))
def test_moves_stay_few_and_balance_does_not_suffer(seed: int) -> None:
    rng = np.random.default_rng(seed)
    load = rng.lognormal(0, 1, size=(4, 3, 32))
    current = Placement.initial(3, 32, 8, 5)
    placed = plan(load, current, Topology(8))
    moved = current.newly_held(placed)
    assert (moved <= 8 + 8).all()  # a handover per redundant slot, two slots per pair
    assert (_even_par(load, placed) <= _even_par(load, current) + 1e-9).all()


def test_experts_stay_within_their_groups_node() -> None:
    topology = Topology(4, 2, 4)
    load = np.random.default_rng(0).lognormal(0, 1.5, size=(2, 2, 16))
    placed = plan(load, Placement.initial(2, 16, 4, 5), topology)
    assert groups_on_nodes(placed, topology).all()
    later = plan(load[::-1] ** 1.5, placed, topology)
    assert groups_on_nodes(later, topology).all()
