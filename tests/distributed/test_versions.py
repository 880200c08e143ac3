"""Experts that are written between a forward and its backward make the backward raise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.models import ToyModel, skewed_batch
from support.ranks import run_ranks

import torch_eplb
from torch_eplb.values.placement import Placement


def versions(balancer: torch_eplb.ExpertLoadBalancer) -> list[list[int]]:
    return [[t._version for t in layer.tensors()] for layer in balancer.engine.layers]


def moved_in_between(rank: int, world_size: int, redundant: int, inference: bool) -> None:
    model = ToyModel(num_layers=3)
    options = {"num_redundant_experts": redundant, "allow_training_with_moves": True}
    with torch_eplb.wrap(model, policy="static", **options) as balancer:  # type: ignore[arg-type]
        experts = balancer.placement.experts.copy()
        experts[2] = experts[2, ::-1]  # the ranks of the last layer change places
        x = skewed_batch(10, 16, rank)
        before = versions(balancer)
        out = balancer(x)
        assert versions(balancer) == before
        with torch.inference_mode(inference):
            assert balancer.engine.move_to(Placement(experts, 8)) > 0
        after = versions(balancer)
        assert after[:2] == before[:2]
        assert all(np.array(after[2]) > before[2])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
        balancer(x).sum().backward()  # the next forward sees the new experts


@pytest.mark.parametrize("redundant", [0, 4])  # staged swaps; received directly
@pytest.mark.parametrize("inference", [False, True])
def test_a_backward_over_experts_that_have_moved_raises(redundant: int, inference: bool) -> None:
    run_ranks(moved_in_between, 2, redundant, inference)


def drained(rank: int, world_size: int) -> None:
    """A round with direct transfers is posted, and not yet committed."""
    model = ToyModel(num_layers=1)
    options = {"collect_interval": 2, "plan_interval": 0, "num_redundant_experts": 4}
    with torch_eplb.wrap(model, policy="random", **options) as balancer:  # type: ignore[arg-type]
        migration = balancer.engine._migration
        for step in range(2000):
            out = balancer(skewed_batch(10, 16, 10 * step + rank))
            before, live = versions(balancer), migration.live[0].copy()
            balancer.step()
            # Every rank receives from now on into a slot that the forward has used.
            if migration.in_flight and (live & ~migration.live[0]).any(axis=1).all():
                break
        assert (np.array(versions(balancer)) > before).all()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_a_backward_over_a_drained_slot_raises() -> None:
    run_ranks(drained, 2)
