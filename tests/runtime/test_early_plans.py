"""Plans that do not wait for the clock: the first one, and those after the load has changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.models import Experts
from support.ranks import run_ranks
from torch import nn

import torch_eplb
from torch_eplb.policies.drift import Drift

MANY = 1e9  # tokens: nothing is chance


def test_before_the_first_plan_a_level_load_is_promised() -> None:
    drift = Drift(2, 1.05)
    assert not drift.too_much(np.array([1.03, 1.05]), MANY)
    assert drift.too_much(np.array([1.03, 1.15]), MANY)


def test_a_plan_is_held_to_what_it_has_reached() -> None:
    drift = Drift(2, 1.05)
    drift.planned(np.array([1.1, 1.0]))
    assert not drift.too_much(np.array([1.3, 1.0]), MANY)  # the first look after it
    assert drift.promised.tolist() == [1.3, 1.0]
    assert not drift.too_much(np.array([1.4, 1.0]), MANY)
    assert drift.too_much(np.array([1.4, 1.1]), MANY)


def test_what_no_plan_mended_is_no_reason_for_the_next() -> None:
    drift = Drift(1, 1.05)
    assert drift.too_much(np.array([1.5]), MANY)
    assert not drift.too_much(np.array([1.5]), MANY)
    assert drift.too_much(np.array([1.6]), MANY)


def test_chance_and_nothing_are_no_reasons() -> None:
    drift = Drift(1, 1.05)
    assert not drift.too_much(np.array([1.5]), 16.0)
    assert not drift.too_much(np.array([2.0]), 0.0)
    assert not drift.too_much(np.array([np.nan]), MANY)
    assert not Drift(1, None).too_much(np.array([9.0]), MANY)


def test_layers_without_a_prediction_do_not_count() -> None:
    drift = Drift(2, 1.05)
    drift.planned(np.array([np.nan, 1.0]))
    assert not drift.too_much(np.array([np.nan, 1.0]), MANY)
    assert not drift.too_much(np.array([3.0, 1.0]), MANY)  # known from now on
    assert drift.too_much(np.array([3.5, 1.1]), MANY)


class Layer(nn.Module):
    """An MoE layer whose routing is told."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts(8, 8, 4)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.experts(x, ids[:, None], x.new_ones(len(ids), 1))


def follow(rank: int, world_size: int) -> dict[str, Any]:
    torch.manual_seed(0)
    balancer = torch_eplb.wrap(Layer(), plan_interval=200)
    said: dict[str, Any] = {"early": [], "plans": [], "par": []}

    def serve(steps: int, hot: torch.Tensor, plans: int = 0) -> None:
        """Every other token goes to the hot experts, the rest to all of them."""
        for step in range(2000):
            if step >= steps and balancer.stats().rebalances >= plans:
                break
            ids = torch.arange(step, step + 64) % 8
            ids[::2] = hot[torch.arange(32) % len(hot)]
            with torch.no_grad():
                balancer(torch.ones(64, 8), ids)
        stats = balancer.stats()
        said["early"].append(stats.early_plans)
        said["plans"].append(stats.rebalances)
        said["par"].append(stats.par_now[0])

    for _ in range(2):
        hot = torch.tensor(balancer.placement.experts[0, 0].tolist())  # all on the first rank
        serve(45, hot, said["plans"][-1] + 1 if said["plans"] else 1)
        serve(100, hot)
    balancer.close()
    return said


def test_plans_follow_the_load_and_not_the_clock() -> None:
    for said in run_ranks(follow, 2):
        # Each plan was early, and a load that stays brings no further one.
        assert said["early"] == said["plans"] == [1, 1, 2, 2]
        assert max(said["par"][1], said["par"][3]) < 1.05


def test_a_wrong_factor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"replan_above must be a finite number of at least 1"):
        torch_eplb.Config(replan_above=0.9)
    with pytest.raises(TypeError, match="replan_above must be a number or None, got 'no'"):
        torch_eplb.Config(replan_above="no")  # type: ignore[arg-type]
