"""Forked processes, several models in one process, and wrappers that nobody closes."""

from __future__ import annotations

import copy
import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.forks import in_fork
from support.models import QUICK, ToyModel, skewed_batch
from support.ranks import run_ranks
from support.resources import levels
from torch.utils.checkpoint import checkpoint

import torch_eplb

CLOSE: dict[str, float] = {"atol": 1e-5, "rtol": 1e-4}


def forked(rank: int, world_size: int, dispatch: str) -> int:
    model = ToyModel()
    reference = copy.deepcopy(model)
    balancer = torch_eplb.wrap(model, **QUICK, dispatch=dispatch)

    def serve(steps: int) -> None:
        for step in range(steps):
            x = skewed_batch(12, 16, step)
            torch.testing.assert_close(balancer(x), reference(x), **CLOSE)

    def use() -> None:
        uses: list[Callable[[], Any]] = [
            lambda: balancer(skewed_batch(12, 16, 0)),
            balancer.state_dict,
            balancer.unwrap,
        ]
        if balancer.engine.is_open:
            uses += [balancer.step, lambda: balancer.load_state_dict(reference.state_dict())]
        for refused in uses:
            with pytest.raises(torch_eplb.EPLBError, match=r"was forked from .* unwrap"):
                refused()
        # What needs no other rank works, and nothing of the parent's is touched in the end.
        assert balancer.stats().disabled is None
        assert balancer.placement.num_experts == 8
        balancer.close()
        with pytest.raises(torch_eplb.EPLBError, match="was forked from"):
            balancer(skewed_batch(12, 16, 0))
        balancer.engine._give_groups_back()

    with torch.no_grad():
        while not balancer.engine._migration.in_flight:
            serve(1)
        in_fork(use)
        before = balancer.stats().rebalances
        while balancer.stats().rebalances < before + 2:
            serve(1)
        balancer.close()
        in_fork(use)
        serve(1)
        in_fork(lambda: reference(skewed_batch(12, 16, 0)))
        balancer.unwrap()
        in_fork(lambda: model(skewed_batch(12, 16, 0)))
    return balancer.stats().rebalances


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_refused_at_once_and_its_parent_goes_on() -> None:
    results = run_ranks(forked, 2, "all_to_all")
    assert results[0] == results[1] >= 2
    run_ranks(forked, 2, "all_reduce")


def two_models(rank: int, world_size: int) -> tuple[int, int]:
    """Both over the same ranks, balanced in turn, one of them under another dispatch."""
    models = [ToyModel(seed=1), ToyModel(3, seed=2)]
    references = copy.deepcopy(models)
    first = torch_eplb.wrap(models[0], **QUICK)
    second = torch_eplb.wrap(models[1], **{**QUICK, "collect_interval": 3}, dispatch="all_reduce")
    step = 0
    with torch.no_grad():
        while min(first.stats().rebalances, second.stats().rebalances) < 3:
            for balancer, reference, source in zip(
                (first, second), references, (rank, 0), strict=True
            ):
                x = skewed_batch(12, 16, 10 * step + source)
                torch.testing.assert_close(balancer(x), reference(x), **CLOSE)
            step += 1
        first.close()
        moved = second.stats().experts_moved
        while second.stats().experts_moved == moved:
            x = skewed_batch(12, 16, step)
            torch.testing.assert_close(first(x), references[0](x), **CLOSE)
            torch.testing.assert_close(second(x), references[1](x), **CLOSE)
        assert torch.equal(second.unwrap()(x), references[1](x))
    return first.stats().rebalances, second.stats().rebalances


def test_two_models_in_one_process_are_balanced_side_by_side() -> None:
    results = run_ranks(two_models, 2)
    assert results[0] == results[1]


def drop(rank: int, world_size: int, times: int) -> tuple[dict[str, int], dict[str, int]]:
    """Wrap and drop; every tenth wrapper has a process that plans, and experts in flight."""
    before: dict[str, int] = {}
    for number in range(times):
        model = ToyModel(1)
        policy = "random" if number % 10 == 0 else (lambda load, placement, topology: placement)
        if number == times - 1:
            gc.collect()
            dist.barrier()
        balancer = torch_eplb.wrap(model, **{**QUICK, "policy": policy})
        if number == times - 1:  # and no layer asks which of several models the ranks are in
            assert len(balancer.engine._roster._models) == 1
        if number % 10 == 0:
            with torch.no_grad():
                while not balancer.engine._migration.in_flight:
                    balancer(skewed_batch(6, 16, rank))
        dist.barrier()
        del model, balancer
        if number == times // 2:  # allocators have grown to what they need
            before = settled(None)
    return before, settled(before)


def dropped_after_recomputation(rank: int, world_size: int) -> list[bool]:
    """Whether models are gone whose last forwards were made inside a checkpoint."""
    gone = []
    for steps in range(7, 12):  # some end with an agreement of the ranks under way
        balancer = torch_eplb.wrap(ToyModel(1), **{**QUICK, "policy": "random"})
        for parameter in balancer.expert_parameters():
            parameter.requires_grad_(False)
        for step in range(steps):
            x = skewed_batch(6, 16, step + rank).requires_grad_()
            checkpoint(balancer, x, use_reentrant=False).sum().backward()
        dist.barrier()
        left = weakref.ref(balancer)
        del balancer, parameter
        gc.collect()
        gone.append(left() is None)
    return gone


def test_a_model_that_was_recomputed_as_a_whole_can_be_dropped() -> None:
    for gone in run_ranks(dropped_after_recomputation, 2):
        assert all(gone), gone


def settled(like: dict[str, int] | None) -> dict[str, int]:
    """The levels, once the threads of the last wrapper have noticed its end."""
    deadline = time.monotonic() + (20 if like else 0)
    while (now := levels()) and time.monotonic() < deadline:
        if like is not None and all(now[name] <= like[name] for name in like if name != "MiB"):
            break
        time.sleep(0.05)
    return now


def test_wrapping_and_dropping_a_hundred_times_leaves_nothing() -> None:
    for before, after in run_ranks(drop, 2, 111, timeout=150):
        for name, level in before.items():
            # Pages that came with the fork server count when they are first touched.
            assert after[name] <= level + (20 if name == "MiB" else 0), (before, after)
