"""The Ascend path, on a stand-in for HCCL: group options, warm-up, a migration."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from support import hccl
from support.models import ToyModel, skewed_batch
from support.ranks import run_ranks

import torch_eplb


def serve_on_hccl(rank: int, world_size: int, store: str) -> None:
    hccl.install()
    dist.init_process_group("hccl", init_method=f"file://{store}", rank=rank, world_size=world_size)
    model = ToyModel()
    reference = copy.deepcopy(model)
    made_before = len(hccl.created)
    with torch_eplb.wrap(
        model,
        num_redundant_experts=4,
        hccl_buffer_size=7,
        policy="random",
        collect_interval=4,
        plan_interval=1,
        timeout=30,
    ) as balancer:
        # One group was made on HCCL, the data plane; the control plane stays off the device.
        options = hccl.created[made_before:]
        assert [o.hccl_config for o in options] == [{"hccl_buffer_size": 7}]
        assert dist.get_backend(balancer.engine.comm.data) == "hccl"
        assert dist.get_backend(balancer.engine.comm.control) == "gloo"
        step = 0
        with torch.no_grad():
            while balancer.stats().rebalances < 2:
                step += 1
                x = skewed_batch(16, 16, 10 * step + rank)
                torch.testing.assert_close(balancer(x), reference(x), atol=1e-5, rtol=1e-4)
        assert balancer.stats().bytes_sent > 0
        full = balancer.unwrap()
    for ours, theirs in zip(full.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_hccl_path_makes_small_groups_and_moves_experts(tmp_path) -> None:
    run_ranks(serve_on_hccl, 2, str(tmp_path / "store"), backend="")
