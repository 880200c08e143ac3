"""Expert-parallel groups that are a part of the world, in any order, in several lives."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.models import QUICK, ToyModel, skewed_batch
from support.ranks import run_ranks
from support.versions import UNSORTED, needs_unsorted

import torch_eplb
from torch_eplb.files.trace import read_trace


def serve(group: dist.ProcessGroup, seed: int, tokens: int = 8, **options: object) -> None:
    """Wrap, serve until experts have moved twice, compare all outputs, unwrap."""
    model = ToyModel()
    reference = copy.deepcopy(model)
    balancer = torch_eplb.wrap(model, group, **{**QUICK, **options})  # type: ignore[arg-type]
    step = 0
    with torch.no_grad():
        while balancer.stats().rebalances < 2:
            x = skewed_batch(tokens, 16, 100 * step + seed)
            torch.testing.assert_close(balancer(x), reference(x), atol=1e-5, rtol=1e-4)
            step += 1
    assert torch.equal(balancer.unwrap()(x), reference(x))


def live_several_lives(rank: int, world_size: int) -> None:
    pair = dist.new_group([0, 1])
    # Rank 0 belongs to one more group than its peer, so that torch's own counters differ.
    further = dist.new_group([0, 2])
    if rank < 2:
        for life in range(3):
            serve(pair, 10 * life + rank)
    if rank != 1:
        serve(further, 50 + rank)


def test_a_part_of_the_world_wraps_again_and_again_whatever_other_groups_there_are() -> None:
    run_ranks(live_several_lives, 3)


def serve_side_by_side(rank: int, world_size: int) -> list[int]:
    # Interleaved, and the second in descending order; both at once.
    first = dist.new_group([0, 2])
    second = dist.new_group([3, 1], **UNSORTED)
    mine = first if rank % 2 == 0 else second
    serve(mine, rank)
    with torch_eplb.wrap(ToyModel(), mine, timeout=30) as balancer:
        return balancer.engine.comm.global_ranks


@needs_unsorted
def test_groups_side_by_side_interleaved_and_in_any_order_balance_by_themselves() -> None:
    assert run_ranks(serve_side_by_side, 4) == [[0, 2], [3, 1], [0, 2], [3, 1]]


def record_in_another_order(rank: int, world_size: int, path: str) -> None:
    group = dist.new_group([1, 0], **UNSORTED)
    serve(group, rank, tokens=4 if rank == 0 else 8, record_path=path)
    dist.barrier()
    if rank == 0:
        counts = read_trace(path).counts.sum(axis=(0, 2, 3))
        # Rank 1 of the world is the group's first, and had twice as many tokens.
        assert counts[0] == 2 * counts[1]


@needs_unsorted
def test_a_trace_speaks_of_the_groups_ranks(tmp_path: Path) -> None:
    run_ranks(record_in_another_order, 2, str(tmp_path / "trace.npz"))


def wrap_without_a_member(rank: int, world_size: int) -> None:
    if rank == 2:
        return
    with pytest.raises(torch_eplb.PeerLostError, match=r"rank 2 did not come|rank 0 did not come"):
        torch_eplb.wrap(ToyModel(), timeout=1)
    pair = dist.new_group([0, 1], use_local_synchronization=True)
    serve(pair, rank)


def test_a_member_that_does_not_come_is_named_and_the_others_can_go_on() -> None:
    run_ranks(wrap_without_a_member, 3)
