"""A slow rank delays commits and nothing else; every rank commits the same rounds at one step."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import QUICK, Experts, MoELayer, ToyModel, skewed_batch
from support.ranks import run_ranks

import torch_eplb
import torch_eplb.testing
from torch_eplb.comm.transport import GlooTransfer

DELAY = 5
"""Polls for which a slow link's transfers look unfinished."""


def slow_down_the_link() -> None:
    """From now on every round's transfers look unfinished in this process, `DELAY` times."""
    finished = GlooTransfer.finished
    polls: dict[int, Any] = {}

    def late(self: GlooTransfer) -> bool:
        # The counter keeps the watcher: an id may be used again otherwise.
        counter = polls.setdefault(id(self), (self, itertools.count()))[1]
        return next(counter) >= DELAY and finished(self)

    GlooTransfer.finished = late  # type: ignore[method-assign]


def serve_with_a_slow_rank(
    rank: int, world_size: int, slow: int | None, options: dict[str, Any]
) -> list[tuple[str, int]]:
    """Stage and committed rounds after every step."""
    if rank == slow:
        slow_down_the_link()
    model = ToyModel()
    reference = copy.deepcopy(model)
    balancer = torch_eplb.wrap(model, **{**QUICK, **options})
    history = []
    with torch.no_grad():
        while balancer.stats().rebalances < 2:
            x = skewed_batch(12, 16, 100 * len(history) + rank)
            torch.testing.assert_close(balancer(x), reference(x), atol=1e-5, rtol=1e-4)
            stats = balancer.stats()
            assert stats.step == len(history) + 1
            assert stats.stalled is None
            history.append((stats.stage, stats.placement_version))
    # Tokens were counted in every step, whatever was under way.
    by_expert, _ = balancer.load()
    assert (by_expert.sum(axis=1) == len(history) * 12 * 2).all()
    balancer.close()
    return history


def steps_of_commits(history: list[tuple[str, int]]) -> list[int]:
    versions = [0, *(version for _, version in history)]
    # Never two rounds in one step.
    assert {b - a for a, b in itertools.pairwise(versions)} == {0, 1}
    return [step for step, (a, b) in enumerate(itertools.pairwise(versions)) if b > a]


@pytest.mark.parametrize(("world_size", "slow"), [(2, 1), (4, 0)])
def test_a_slow_link_delays_the_commit_and_forwards_go_on(world_size: int, slow: int) -> None:
    histories = run_ranks(serve_with_a_slow_rank, world_size, slow, {})
    assert all(history == histories[0] for history in histories)
    history = histories[0]
    commits = steps_of_commits(history)
    assert len(commits) >= 3
    for commit in commits:
        # A round is polled when it is posted and at each step from then on; the step after the
        # first poll that finds it finished commits it.
        pending = history[commit - DELAY : commit]
        assert all(stage == "moving experts" for stage, _ in pending)
        assert len({version for _, version in pending}) == 1
    assert all(b - a > DELAY for a, b in itertools.pairwise(commits))


@pytest.mark.parametrize("slow", [None, 1])
def test_without_overlap_a_round_is_posted_in_one_step_and_committed_in_the_next(
    slow: int | None,
) -> None:
    histories = run_ranks(
        serve_with_a_slow_rank, 3, slow, {"overlap": False, "num_redundant_experts": 1}
    )
    assert histories[0] == histories[1] == histories[2]
    commits = steps_of_commits(histories[0])
    moving = [step for step, (stage, _) in enumerate(histories[0]) if stage == "moving experts"]
    # The agreement has a forward's time; no step passes without a commit, however slow a rank is.
    assert {step + 1 for step in moving} == set(commits)
    assert moving


class ExternalExperts(Experts):
    """Talks to no other rank, so that ranks need not be in the same forward."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return hidden_states


def always_a_step_behind(rank: int, world_size: int, verify: bool) -> list[tuple[str, int]]:
    """Rank 1 begins a step only when rank 0 has ended its own."""
    torch.manual_seed(0)
    layer = MoELayer(8, 16, 8, 2)
    layer.experts = ExternalExperts(8, 16, 8)
    balancer = torch_eplb.wrap(layer, dispatch="external", verify=verify, **QUICK)
    store = dist.distributed_c10d._get_default_store()
    history: list[tuple[str, int]] = []
    with torch.no_grad():
        while balancer.stats().rebalances < 2:
            if rank == 1:
                store.wait([f"ended {len(history)}"])
            balancer(skewed_batch(12, 16, 100 * len(history) + rank))
            if rank == 0:
                store.set(f"ended {len(history)}", "yes")
            stats = balancer.stats()
            history.append((stats.stage, stats.placement_version))
    balancer.close()
    return history


@pytest.mark.parametrize("verify", [False, True])
def test_a_rank_that_is_a_step_behind_holds_nobody_up(verify: bool) -> None:
    ahead, behind = run_ranks(always_a_step_behind, 2, verify)
    assert ahead == behind
    assert len(steps_of_commits(ahead)) >= 2


def bytes_per_round(
    rank: int, world_size: int, experts_per_step: float | None, overlap: bool
) -> tuple[int, list[int]]:
    """Bytes of an expert, and what this rank sent in each round of one rebalance."""
    balancer = torch_eplb.wrap(
        ToyModel(num_experts=16), **{**QUICK, "overlap": overlap, "num_redundant_experts": 0}
    )
    expert_bytes = balancer.stats().staging_bytes
    balancer.unwrap()
    bound = None if experts_per_step is None else int(experts_per_step * expert_bytes)
    balancer = torch_eplb.wrap(
        ToyModel(num_experts=16),
        **{**QUICK, "overlap": overlap},
        bytes_per_step=bound,
        staging_bytes=8 * expert_bytes,
    )
    posted = torch_eplb.testing.record_operations(balancer)
    x = skewed_batch(12, 16, rank)
    with torch.no_grad():
        torch_eplb.testing.run_until(lambda: balancer.stats().rebalances >= 1, lambda: balancer(x))
    sent = [0] * balancer.stats().placement_version
    for operation in posted:
        sent[operation.round_index] += operation.nbytes if operation.kind == "send" else 0
    balancer.close()
    return expert_bytes, sent


@pytest.mark.parametrize("overlap", [True, False])
def test_bytes_per_step_bounds_what_a_round_sends(overlap: bool) -> None:
    free = run_ranks(bytes_per_round, 2, None, overlap)
    bounded = run_ranks(bytes_per_round, 2, 2.5, overlap)
    tight = run_ranks(bytes_per_round, 2, 0.5, overlap)
    for expert_bytes, sent in free:
        assert max(sent) > 3 * expert_bytes
    for expert_bytes, sent in bounded:
        assert max(sent) == 2 * expert_bytes
    for expert_bytes, sent in tight:
        # One expert is sent even where the bound is below it, or nothing would ever move.
        assert max(sent) == expert_bytes
