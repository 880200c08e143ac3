"""Splitting by what batches cost: in real groups, with moves under way."""

from __future__ import annotations

import copy
from typing import Any

import torch
from support.models import QUICK, ToyModel, skewed_batch
from support.ranks import run_ranks

import torch_eplb

CLOSE: dict[str, float] = {"atol": 1e-5, "rtol": 1e-4}


def serve(rank: int, world_size: int, cost: Any, choice: str, tokens: int) -> tuple[float, int]:
    """Active experts on the busiest rank, and W."""
    model = ToyModel(2)
    reference = copy.deepcopy(model)
    settings = {**QUICK, "num_redundant_experts": 8, "cost": cost, "replica_choice": choice}
    balancer = torch_eplb.wrap(model, **settings)
    with torch.no_grad():
        for step in range(40):
            x = skewed_batch(tokens, 16, 2 * step + rank)
            torch.testing.assert_close(balancer(x), reference(x), **CLOSE)
    weight = balancer.engine._tables.weight_tokens
    stats = balancer.stats()
    assert stats.rebalances > 0
    assert (stats.active_experts is None) == (choice != "batch")
    balancer.close()
    return stats.active_experts or 0.0, weight


def test_small_batches_activate_fewer_experts_and_large_ones_are_split_by_tokens() -> None:
    for choice in ("batch", "local"):
        few = [run_ranks(serve, 2, cost, choice, 3) for cost in (None, (50.0, 1.0))]
        assert [{weight for _, weight in ranks} for ranks in few] == [{0}, {50}]
        if choice == "batch":
            by_tokens, by_cost = (ranks[0][0] for ranks in few)
            assert by_cost < by_tokens - 0.5


def test_measuring_agrees_on_one_number_everywhere() -> None:
    results = run_ranks(serve, 2, "measured", "batch", 3)
    weights = {weight for _, weight in results}
    assert len(weights) == 1
    assert min(weights) >= 1
