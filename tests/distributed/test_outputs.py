"""Outputs stay those of the unwrapped model, before, during and after rebalances."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.models import ToyModel, skewed_batch
from support.ranks import run_ranks

import torch_eplb


def serve(rank: int, world_size: int, options: dict[str, Any]) -> dict[str, Any]:
    dtype = getattr(torch, options.pop("dtype", "float32"))
    uneven = options.pop("uneven", False)
    model = ToyModel().to(dtype)
    reference = copy.deepcopy(model)
    shared = options.get("dispatch") == "all_reduce"
    tolerance = (
        {"atol": 2e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}
    )
    moving = rows = 0
    balancer = torch_eplb.wrap(
        model, collect_interval=6, plan_interval=1, policy="random", timeout=30, **options
    )
    choices: list[torch.Tensor] = []
    for layer in model.layers:
        layer.experts.register_forward_pre_hook(
            lambda _, args: choices.append(args[1]), prepend=True
        )
    with torch.no_grad():
        step = 0
        while balancer.stats().rebalances < 3:
            step += 1
            assert step < 5000
            tokens = 24
            if uneven:
                tokens = 0 if (rank + step) % world_size == 0 else 7 * (rank + 1)
            x = skewed_batch(tokens, 16, 1000 * step + (0 if shared else rank), dtype=dtype)
            before = balancer.stats().placement_version
            out = balancer(x)
            moving += before != balancer.stats().placement_version
            torch.testing.assert_close(out, reference(x), **tolerance)
            check_slots(balancer, reference)
            rows += rows_to_others(balancer, choices)
    stats = balancer.stats()
    assert moving == stats.placement_version > 0
    assert stats.staging_bytes_peak <= stats.staging_bytes
    if options["dispatch"] == "all_to_all" and not options["num_redundant_experts"]:
        # Of every rank's tokens as many rows go to each rank, and come back, as may be needed.
        totals = torch.tensor([rows, stats.token_rows_sent, stats.token_bytes_sent])
        torch.distributed.all_reduce(totals)
        there = 4 * 16 + 2 * (4 + 4)  # hidden states, and per choice a weight and a slot
        assert totals.tolist()[1:] == [2 * totals[0], (there + 4 * 16) * totals[0]]
    with torch.no_grad():
        full = balancer.unwrap()
        for a, b in zip(full.state_dict().values(), reference.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        torch.testing.assert_close(full(x), reference(x))
    return {"placement": balancer.placement.experts, "stats": stats}


def rows_to_others(balancer: torch_eplb.ExpertLoadBalancer, choices: list[torch.Tensor]) -> int:
    """Of a forward's choices, one list of ids per layer: how many rows other ranks may need."""
    rank, rows = torch.distributed.get_rank(), 0
    for ids, experts in zip(choices, balancer.placement.experts, strict=True):
        holder = torch.empty(experts.size, dtype=torch.int64)
        holder[torch.from_numpy(experts.reshape(-1)).long()] = (
            torch.arange(experts.size) // experts.shape[1]
        )
        ranks = holder[ids] if experts.size == 8 else torch.zeros_like(ids)
        hits = torch.bincount(ranks.reshape(-1), minlength=len(experts)).clamp(max=len(ids))
        rows += int(hits.sum() - hits[rank])
    choices.clear()
    return rows


def check_slots(balancer: torch_eplb.ExpertLoadBalancer, reference: ToyModel) -> None:
    """Every slot holds, byte for byte, the expert that the placement names."""
    rank = torch.distributed.get_rank()
    for index, layer in enumerate(reference.layers):
        for expert in set(balancer.placement.experts[index, rank].tolist()):
            for name, tensor in balancer.expert(index, expert).items():
                assert torch.equal(tensor, getattr(layer.experts, name)[expert])


@pytest.mark.parametrize("redundant", [0, 4])
@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather", "all_reduce"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_outputs_equal_the_unwrapped_models_while_experts_move(
    world_size: int, dispatch: str, redundant: int
) -> None:
    results = run_ranks(
        serve, world_size, {"dispatch": dispatch, "num_redundant_experts": redundant}
    )
    for result in results:
        assert (result["placement"] == results[0]["placement"]).all()
