"""The library on device "npu" over "hccl": outputs and state while experts move."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from npu_sim import control
from npu_sim.ranks import run_on_npus
from support.few_kernels import HIDDEN, FewKernelModel
from support.models import QUICK, skewed_batch
from support.on_device import CLOSE, assert_same, make, serve

import torch_eplb


def lead_a_life(rank: int, world_size: int, experts: str, options: dict[str, Any]) -> None:
    # The device's solver is some 600 operations, which are slow here.
    solves = (options.get("dispatch"), options["replica_choice"]) in SOLVED
    model, plain = make(experts, layers=1 if solves else 2)
    balancer = torch_eplb.wrap(model, **{**QUICK, **options})
    serve(balancer, plain, rank, 1 if solves else 2)
    assert balancer.stats().bytes_received > 0
    assert control.repeated_messages() == 0
    unwrapped = balancer.unwrap()
    if balancer.eplb_config.dispatch_kind.communicates:
        x = skewed_batch(8, HIDDEN, 1)
        torch.testing.assert_close(unwrapped(x.npu()).cpu(), plain(x), **CLOSE)
    assert_same(unwrapped.state_dict(), plain)


SOLVED = (("all_to_all", "local"), ("all_reduce", "batch"), ("external", "local"))
WAYS = [
    ("all_to_all", "batch", "FewKernelExperts"),
    ("all_to_all", "local", "FewKernelExperts"),
    ("all_to_all", "table", "FewKernelExperts"),
    ("all_to_all", "even", "FewKernelExperts"),
    ("all_reduce", "batch", "FewKernelExperts"),
    ("all_reduce", "table", "SentinelExperts"),
    ("all_reduce", "even", "SentinelExperts"),
    ("external", "local", "ExternalExperts"),
    ("external", "table", "ExternalExperts"),
    ("external", "even", "ExternalExperts"),
]


@pytest.mark.parametrize(("dispatch", "choice", "experts"), WAYS)
def test_outputs_stay_the_models_while_experts_move(
    dispatch: str, choice: str, experts: str
) -> None:
    options = {"dispatch": dispatch, "replica_choice": choice}
    # Those that solve quotas take half a minute of one core's time.
    run_on_npus(lead_a_life, 2, experts, options, timeout=240.0)


def test_four_ranks_move_experts_too() -> None:
    run_on_npus(lead_a_life, 4, "FewKernelExperts", {"replica_choice": "table"})


@pytest.mark.parametrize(
    ("options", "coalesced"),
    [
        ({"verify": True, "direct": False}, False),
        ({"verify": True, "overlap": False}, True),
        ({"verify": True, "staging_bytes": "64KiB", "layers_per_step": 2}, False),
        ({"overlap": False, "direct": False, "num_redundant_experts": 0}, False),
        ({"transport": "gloo", "verify": True}, True),
        ({"transport": "gloo", "overlap": False, "num_redundant_experts": 0}, True),
    ],
    ids=str,
)
def test_every_way_of_moving_experts_is_right(options: dict[str, Any], coalesced: bool) -> None:
    options = {"replica_choice": "table", **options}
    run_on_npus(lead_a_life, 2, "FewKernelExperts", options, coalesced=coalesced)


def save_and_load(rank: int, world_size: int, folder: str) -> None:
    model, plain = make("FewKernelExperts")
    with torch_eplb.wrap(model, **QUICK, replica_choice="table") as balancer:
        serve(balancer, plain, rank, 1)
        state = balancer.state_dict()
        assert_same(state, plain)
        sharded = torch_eplb.ShardedState(balancer)
        dist.checkpoint.save({"model": sharded}, checkpoint_id=folder)
        other = FewKernelModel(seed=1)
        balancer.load_state_dict(other.state_dict())
        serve(balancer, other, rank, 2)
        dist.checkpoint.load({"model": torch_eplb.ShardedState(balancer)}, checkpoint_id=folder)
        serve(balancer, plain, rank, 3)


def test_states_are_saved_and_loaded_whole(tmp_path) -> None:
    run_on_npus(save_and_load, 2, str(tmp_path / "checkpoint"))


def train(rank: int, world_size: int, dispatch: str) -> None:
    model, plain = make("FewKernelExperts")
    batches = [skewed_batch(6, HIDDEN, 0 if dispatch == "all_reduce" else r) for r in range(2)]
    balancer = torch_eplb.wrap(model, policy="static", dispatch=dispatch, replica_choice="table")
    x = batches[rank].npu().requires_grad_()
    balancer(x).square().sum().backward()
    for layer in balancer.engine.layers:
        # Of this rank's experts: from the tokens of all ranks.
        first = rank * len(layer.tensors()[0])
        for name, tensor in zip(layer.tensor_names, layer.tensors(), strict=True):
            if not tensor.requires_grad:
                continue
            own = [copy.deepcopy(plain) for _ in batches]
            for one, batch in zip(own, batches, strict=True):
                one(batch).square().sum().backward()
            grads = [one.get_parameter(f"{layer.name}.{name}").grad for one in own]
            if dispatch == "all_reduce":
                grads = grads[:1]
            assert tensor.grad is not None
            expected = sum(g[first : first + len(tensor)] for g in grads if g is not None)
            torch.testing.assert_close(tensor.grad.cpu(), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_reduce"])
def test_gradients_reach_the_experts(dispatch: str) -> None:
    run_on_npus(train, 2, dispatch)


def small(rank: int, world_size: int) -> None:
    model, plain = make("FewKernelExperts")
    torch.npu.synchronize()
    before = control.communicators()
    balancer = torch_eplb.wrap(model, **QUICK, replica_choice="table", hccl_buffer_size=7)
    (data,) = [comm for comm in control.communicators() if comm not in before]
    assert (data.ranks, data.rank, data.buffer) == (world_size, rank, 7)
    serve(balancer, plain, rank, 1)
    # The default group's, for tokens, was made by the first forward.
    assert len(control.communicators()) == len(before) + 2
    balancer.close()
    assert data not in control.communicators()


def test_weights_move_over_one_small_communicator_that_close_gives_back() -> None:
    run_on_npus(small, 2)


def apart(rank: int, world_size: int) -> None:
    halves = [dist.new_group([0, 2]), dist.new_group([3, 1])]
    mine = halves[rank % 2]
    model, plain = make("FewKernelExperts")
    balancer = torch_eplb.wrap(model, mine, **QUICK, replica_choice="table")
    serve(balancer, plain, rank, 1 + rank % 2)
    balancer.unwrap()
    assert_same(model.state_dict(), plain)


def test_parts_of_the_world_are_balanced_apart() -> None:
    run_on_npus(apart, 4)
