"""What the hot path, the boundaries and the commits make the host wait for, and what the device is
asked to compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from npu_sim import control
from npu_sim.ranks import run_on_npus
from support.few_kernels import HIDDEN
from support.models import QUICK, skewed_batch
from support.on_device import make, serve

import torch_eplb
from torch_eplb.routing.tables import RoutingTables
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology

# What reads something back, once per layer: the counts of all ranks, sizes of what is to be sent,
# or how many choices are local.
READS = {
    ("all_to_all", "batch", "FewKernelExperts"): ["layers/all_to_all.py:_choose_together"],
    ("all_to_all", "local", "FewKernelExperts"): ["layers/all_to_all.py:_plan"],
    ("all_to_all", "table", "FewKernelExperts"): ["layers/all_to_all.py:_plan"],
    ("all_to_all", "even", "FewKernelExperts"): ["layers/all_to_all.py:_plan"],
    ("all_gather", "table", "FewKernelExperts"): ["routing/rows.py:arrivals"],
    ("all_gather", "table", "SentinelExperts"): [],
    ("all_gather", "even", "SentinelExperts"): [],
    ("all_reduce", "batch", "SentinelExperts"): [],
    ("all_reduce", "table", "FewKernelExperts"): ["routing/rows.py:arrivals"],
    ("all_reduce", "table", "SentinelExperts"): [],
    ("all_reduce", "even", "SentinelExperts"): [],
    ("external", "local", "ExternalExperts"): [],
    ("external", "table", "ExternalExperts"): [],
    ("external", "even", "ExternalExperts"): [],
}

# Replica choices that solve quotas on the device, which is never the default there.
SOLVED = [("all_to_all", "local"), ("all_reduce", "batch"), ("external", "local")]

# Ascend's cores have no kernels for these with 64-bit integers; they run on its AI CPU.
SLOW_IN_64_BITS = {
    "addcmul_",
    "argsort",
    "cumsum",
    "floor_divide",
    "floor_divide_",
    "remainder",
    "scatter_add",
    "scatter_add_",
    "sort",
}


def count(rank: int, world_size: int, dispatch: str, choice: str, experts: str) -> None:
    options: dict[str, Any] = {"dispatch": dispatch, "replica_choice": choice}
    if dispatch == "all_gather":
        options["max_tokens_per_rank"] = 8
    model, _ = make(experts)
    balancer = torch_eplb.wrap(model, num_redundant_experts=4, **options)
    x = skewed_batch(8, HIDDEN, 0 if dispatch == "all_reduce" else rank).npu()
    with torch.inference_mode():
        balancer(x)
        with control.host_waits() as waits, control.operators() as operators:
            balancer(x)
    # A copy that waits has waited for its stream before.
    places = [wait.partition(" in ")[2] for wait in waits if not wait.startswith("copy")]
    assert places == 2 * READS[dispatch, choice, experts]
    slow = {name for name, dtype in operators if dtype is torch.int64 and name in SLOW_IN_64_BITS}
    assert not slow or (dispatch, choice) in SOLVED


@pytest.mark.parametrize(("dispatch", "choice", "experts"), READS)
def test_a_forward_waits_as_often_as_is_documented_and_computes_in_32_bits(
    dispatch: str, choice: str, experts: str
) -> None:
    run_on_npus(count, 2, dispatch, choice, experts)


def boundaries(rank: int, world_size: int, options: dict[str, Any]) -> None:
    model, plain = make("ExternalExperts")
    balancer = torch_eplb.wrap(model, **{**QUICK, **options}, dispatch="external")
    assert balancer.eplb_config.replica_choice == "table"  # the default on NPUs
    with control.host_waits() as waits:
        serve(balancer, plain, rank, 2)
    assert balancer.stats().experts_moved > 0
    assert [wait for wait in waits if not wait.endswith("elsewhere")] == []


@pytest.mark.parametrize("options", [{}, {"verify": True, "direct": False}], ids=str)
def test_nothing_of_a_rebalance_makes_the_host_wait_for_the_device(options: dict[str, Any]) -> None:
    run_on_npus(boundaries, 2, options)


def updates(rank: int, world_size: int) -> None:
    placements = [Placement.initial(2, 8, 2, 6)]
    for shift in range(1, 6):
        placements.append(Placement((placements[0].experts + shift) % 8, 8))
    tables = RoutingTables(
        placements[0],
        device="npu",
        rank=0,
        replica_choice="table",
        max_replicas=2,
        topology=Topology(2),
    )
    control.delay("host copies", (30.0, 30.0))
    seen = []
    with control.host_waits() as waits:
        for placement in placements:
            tables.update(placement)
            seen.append([table.clone() for table in tables.tensors()])
            assert torch.equal(tables.host_slots_LEM, seen_on_host(placement))
    assert waits == []
    for placement, copies in zip(placements, seen, strict=True):
        assert torch.equal(copies[0].cpu(), seen_on_host(placement))


def seen_on_host(placement: Placement) -> torch.Tensor:
    tables = RoutingTables(
        placement,
        device="cpu",
        rank=0,
        replica_choice="table",
        max_replicas=2,
        topology=Topology(2),
    )
    assert isinstance(placement.experts, np.ndarray)
    return tables.slots_LEM


def test_a_table_update_neither_waits_nor_overtakes_the_one_before() -> None:
    run_on_npus(updates, 1, delays=False)
