"""The example of a layer that dispatches with MC2, on the simulated device."""

from __future__ import annotations

import torch
import torch.distributed as dist
from npu_sim import control
from npu_sim.ranks import run_on_npus
from support.programs import example


def served(rank: int, world_size: int) -> str:
    mc2 = example("ascend_mc2.py")
    args = mc2.parse_arguments(["--stand-in", "--hidden", "16", "--tokens", "8"])
    return mc2.serve(args, torch.device("npu", rank))


def test_replays_of_a_graph_with_an_mc2_layer_stay_right_while_experts_move() -> None:
    said = run_on_npus(served, 2)
    assert "steps on npu with the stand-in" in said[0]
    assert "outputs equal the unwrapped model's" in said[0]


def waits(rank: int, world_size: int) -> None:
    mc2 = example("ascend_mc2.py")
    args = mc2.parse_arguments(["--hidden", "16", "--tokens", "8"])
    group = dist.new_group([0, 1])
    model = mc2.Model(args, mc2.MC2(group, 20, torch.device("npu"), True)).npu()
    balancer = mc2.torch_eplb.wrap(model, dispatch="external", num_redundant_experts=4)
    x = mc2.batch(args, 0).npu()
    with torch.inference_mode():
        balancer(x)
        with control.host_waits() as found:
            balancer(x)
    assert found == []
    hits = torch.from_numpy(balancer.load()[0])
    dist.all_reduce(hits := hits.npu())
    assert hits.sum(1).tolist() == [2 * 8 * 4 * 2] * 2


def test_load_that_a_layer_hands_over_is_read_without_waiting() -> None:
    run_on_npus(waits, 2)


def signatures(rank: int, world_size: int) -> None:
    """What torch_npu itself says of the shapes."""
    mc2 = example("ascend_mc2.py")
    args = mc2.parse_arguments(["--hidden", "32"])
    group = dist.new_group([0])
    for device_name in ("Ascend910B1", "Ascend910_9391"):
        torch.npu.get_device_name = lambda name=device_name: name
        operators = mc2.MC2(group, 20, torch.device("npu"), False)
        assert operators.sends_weights == ("910B" in device_name)
        assert operators.shared["group_ep"]
        layer = mc2.MC2Experts(20, args.hidden, args.width, operators)
        layer.to("meta", torch.bfloat16)
        x = torch.empty(8, args.hidden, dtype=torch.bfloat16, device="meta")
        ids = torch.empty(8, args.top_k, dtype=torch.int64, device="meta")
        out = layer(x, ids, torch.empty(8, args.top_k, device="meta"))
        assert (out.shape, out.dtype) == (x.shape, torch.bfloat16)
        assert layer.expert_token_nums.shape == (20,)
        assert not layer.expert_token_nums.dtype.is_floating_point


def test_the_layer_calls_torch_npus_operators_as_they_are_declared() -> None:
    run_on_npus(signatures, 1)
