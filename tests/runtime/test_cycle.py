"""When the cycle does what, and what it does when ranks are not where they should be."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from support.models import QUICK, ToyModel, skewed_batch
from support.ranks import run_ranks

import torch_eplb
from torch_eplb.testing import fake_process_group, run_until
from torch_eplb.values.placement import Placement


def test_a_plan_waits_for_plan_interval_to_pass() -> None:
    x = skewed_batch(4, 16, 0)

    def other_way_round(load: object, placement: Placement, topology: object) -> Placement:
        return Placement(placement.experts[:, ::-1].copy(), placement.num_experts)

    options = {"policy": other_way_round, "collect_interval": 2, "plan_interval": 300}
    with (
        torch.no_grad(),
        fake_process_group(world_size=2),
        torch_eplb.wrap(ToyModel(1), dispatch="all_reduce", **options) as balancer,  # type: ignore[arg-type]
    ):

        def step() -> None:
            balancer(x)
            time.sleep(0.01)  # the planner works in real time, and is to be done in 300 steps

        run_until(lambda: "plan_interval" in balancer.stats().stage, step)
        assert balancer.stats().step < 302
        while balancer.stats().step < 302:
            assert balancer.stats().stage == "waiting for plan_interval to pass"
            balancer(x)
        balancer(x)
        assert balancer.stats().stage == "moving experts"


def apart(rank: int, world_size: int) -> None:
    ready = threading.Event()

    def policy(load: object, placement: Placement, topology: object) -> Placement:
        ready.wait(20)
        return placement

    x = skewed_batch(4, 16, 0)
    options = {**QUICK, "policy": policy, "dispatch": "all_reduce"}
    with torch.no_grad(), torch_eplb.wrap(ToyModel(1), **options) as balancer:
        while balancer.stats().stage != "waiting for the plan":
            balancer(x)
        if rank == 1:  # it has forgotten a forward, or made one more
            balancer.engine.position.step += 1
        balancer(x)  # posts where it is
        with pytest.raises(torch_eplb.EPLBError, match="different numbers of forwards"):
            balancer(x)
        ready.set()


def test_ranks_with_different_numbers_of_forwards_are_told_on_every_rank() -> None:
    run_ranks(apart, 2)
