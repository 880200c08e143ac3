"""Ranks that die or stall, with real signals: the others say so in time and keep their weights."""

from __future__ import annotations

import copy
import itertools
import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import ToyModel, skewed_batch
from support.ranks import RankFailed, run_ranks
from torch import nn

import torch_eplb
from torch_eplb.runtime.cycle import _ROUNDS


class Detached(nn.Module):
    """External experts that need no communication, so that only the balancer's own can fail."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.num_experts = 8
        self.up = nn.Parameter(torch.randn(8, 64, 64, generator=generator))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return hidden_states


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Detached(seed) for seed in range(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.zeros(len(ids), 64)
        for experts in self.experts:
            x = experts(x, ids, torch.ones_like(ids).float())
        return x


def lose_a_rank(rank: int, world_size: int, how: int, dispatch: str) -> dict[str, Any]:
    """Rank 1 is struck in the middle of a round; the others go on until they notice."""
    model: nn.Module = Model() if dispatch == "external" else ToyModel(num_layers=4)
    original = copy.deepcopy(model)
    balancer = torch_eplb.wrap(
        model,
        dispatch=dispatch,
        num_redundant_experts=4 if world_size == 2 else 1,
        policy="random",
        collect_interval=3,
        plan_interval=1,
        timeout=4,
    )
    generator = torch.Generator().manual_seed(rank)

    def forward(step: int) -> None:
        if dispatch == "external":
            balancer(torch.randint(0, 8, (50, 2), generator=generator))
        else:
            source = 0 if dispatch == "all_reduce" else rank
            balancer(skewed_batch(10, 16, 100 * step + source))

    def in_the_middle_of_a_round() -> bool:
        # Not yet reported as finished, so that the others cannot have committed it either.
        migration = balancer.engine._migration
        unfinished = balancer.engine._cycle._progress <= _ROUNDS + migration.round
        return balancer.stats().rebalances > 0 and migration.in_flight and unfinished

    def serve_until_a_rank_is_lost() -> None:
        deadline = time.monotonic() + 40
        step = 0
        while time.monotonic() < deadline:
            forward(step)
            step += 1
            if rank == 1 and in_the_middle_of_a_round():
                os.kill(os.getpid(), how)

    with torch.no_grad(), pytest.raises(torch_eplb.PeerLostError) as caught:
        serve_until_a_rank_is_lost()
    assert caught.value.ranks == (1,)
    assert caught.value.round_index == balancer.engine._migration.round
    assert f"in round {caught.value.round_index}" in str(caught.value)
    # The live slots hold what the last committed placement says; what was lost can be replaced.
    experts = original.experts if dispatch == "external" else [x.experts for x in original.layers]
    for index, layer in enumerate(experts):
        for expert in range(8):
            for name, tensor in balancer.expert(index, expert).items():
                assert torch.equal(tensor, getattr(layer, name)[expert])
    version = balancer.stats().placement_version
    balancer.close()
    return {"version": version, "message": str(caught.value)}


@pytest.mark.parametrize("dispatch", ["external", "all_to_all", "all_reduce"])
def test_when_a_rank_is_killed_in_a_round_the_others_raise_and_keep_their_weights(
    dispatch: str,
) -> None:
    results = run_ranks(lose_a_rank, 3, signal.SIGKILL, dispatch, may_die=(1,))
    survivors = [results[0], results[2]]
    assert results[1] == -signal.SIGKILL
    assert survivors[0]["version"] == survivors[1]["version"]
    assert all("did not answer within 4 s" in survivor["message"] for survivor in survivors)


def serve_until_killed(rank: int, world_size: int, dispatch: str) -> tuple[tuple[int, ...], bool]:
    """Rank 2 is killed in the middle of a forward, with the default time limit of a minute."""
    model = ToyModel(num_layers=3)
    if rank == 2:
        seen = itertools.count()

        def strike(*_: Any) -> None:
            if next(seen) == 7:
                os.kill(os.getpid(), signal.SIGKILL)

        model.layers[1].register_forward_pre_hook(strike)
    options: Any = {"dispatch": dispatch, "policy": "static", "num_redundant_experts": 2}
    balancer = torch_eplb.wrap(model, **options)

    def serve() -> None:
        for step in itertools.count():
            balancer(skewed_batch(6, 16, 10 * step + (rank if dispatch == "all_to_all" else 0)))

    with torch.no_grad(), pytest.raises(torch_eplb.PeerLostError) as caught:
        serve()
    stats = balancer.stats()
    balancer.close()
    return caught.value.ranks, str(caught.value) == stats.disabled


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_reduce"])
def test_all_survivors_notice_a_death_at_once_and_name_the_dead_only(dispatch: str) -> None:
    # In a ring only the dead rank's neighbours are told by the backend.
    results = run_ranks(serve_until_killed, 5, dispatch, may_die=(2,), timeout=50)
    assert results.pop(2) == -signal.SIGKILL
    assert results == [((2,), True)] * 4


def leave_early(rank: int, world_size: int) -> None:
    """Rank 1's process ends in good order while the others are still at work with each other."""
    from torch_eplb.comm.communicator import make_communicator

    assert dist.group.WORLD is not None
    comm = make_communicator(dist.group.WORLD, torch.device("cpu"), 20.0)
    if rank == 1:
        comm._losses.leave()
        os._exit(0)
    while not comm._losses._beside[1].is_gone():
        time.sleep(0.01)
    pair = make_pair(comm)
    if rank == 2:
        time.sleep(1.0)  # longer than a slice and the grace after it: what is waited for is late
    values = torch.ones(1)
    comm.wait_for(dist.all_reduce(values, group=pair, async_op=True), "the sum")
    assert values.item() == 2
    assert comm.failure is None


def make_pair(comm: Any) -> Any:
    from torch_eplb.comm.groups import make_group

    return make_group("test/pair", [0, 2], "gloo", None, 20.0)


def test_a_process_that_has_left_in_good_order_is_not_taken_for_lost() -> None:
    with pytest.raises(RankFailed, match="1 of 3 ranks failed\\n--- rank 1: died with exit code 0"):
        run_ranks(leave_early, 3)


def stall(rank: int, world_size: int) -> str:
    """Rank 1 is stopped until the other one has noticed."""
    if rank == 1:
        child = os.fork()
        if child == 0:
            # Wakes rank 1 up, long after its peer's time limit.
            os.setsid()
            time.sleep(12)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
    model = ToyModel(num_layers=2)
    balancer = torch_eplb.wrap(
        model, num_redundant_experts=4, collect_interval=3, policy="random", timeout=3
    )

    def serve() -> None:
        for step in range(1000):
            balancer(skewed_batch(10, 16, 100 * step + rank))
            if rank == 1 and step == 6:
                os.kill(os.getpid(), signal.SIGSTOP)

    with torch.no_grad(), pytest.raises(torch_eplb.PeerLostError) as caught:
        serve()
    return str(caught.value)


def test_a_rank_that_stalls_longer_than_the_time_limit_is_lost() -> None:
    results = run_ranks(stall, 2)
    assert "rank 1 died, or did not answer within 3 s" in results[0]


def drop(rank: int, world_size: int) -> None:
    import gc

    import psutil

    process = psutil.Process()
    model = ToyModel(num_layers=1)
    reference = copy.deepcopy(model)

    def levels() -> tuple[int, int, int]:
        gc.collect()
        return process.num_fds(), process.num_threads(), len(process.children())

    before = None
    for number in range(24):
        with torch_eplb.wrap(model, num_redundant_experts=2, collect_interval=2) as balancer:
            with torch.no_grad():
                for step in range(4):
                    balancer(skewed_batch(6, 16, step))
            model = balancer.unwrap()
        dist.barrier()
        if number == 7:
            before = levels()
    after = levels()
    assert before is not None
    assert all(b >= a for a, b in zip(after, before, strict=True)), (before, after)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_wrapping_and_unwrapping_many_times_leaks_nothing() -> None:
    run_ranks(drop, 2, timeout=120)
