"""Exceptions in the user's forward: they arrive unchanged, and the next forward is right again."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.models import QUICK, ToyModel, skewed_batch
from support.moving import assert_same
from support.ranks import run_ranks
from torch import nn

import torch_eplb

LAYERS = 3


class OwnError(Exception):
    """The user's."""


@contextlib.contextmanager
def raising(module: nn.Module) -> Iterator[OwnError]:
    """The module raises the error when it is called, just before its own forward."""
    error = OwnError("the user's own")

    def fail(*_: Any) -> None:
        raise error

    handle = module.register_forward_pre_hook(fail)
    try:
        yield error
    finally:
        handle.remove()


def places(model: ToyModel) -> dict[str, nn.Module]:
    """Where a forward may raise."""
    return {
        "before any layer": model.layers[0],
        "router": model.layers[1].router,
        # Behind the dispatch's own pre-hook: tokens have travelled and wait for the way back.
        "experts": model.layers[1].experts,
    }


def until_rebalanced(balancer: torch_eplb.ExpertLoadBalancer) -> int:
    """Serve until the planner has got going; returns the steps made."""
    x = skewed_batch(12, 16, 0)
    while not balancer.stats().rebalances:
        balancer(x)
    return balancer.stats().step


def on_all_ranks(rank: int, world_size: int, options: dict[str, Any]) -> int:
    model = ToyModel(LAYERS)
    reference = copy.deepcopy(model)
    balancer = torch_eplb.wrap(model, **{**QUICK, **options})
    source = 0 if options["dispatch"] == "all_reduce" else rank
    with torch.no_grad():
        begin = until_rebalanced(balancer)
        for step in range(35):
            x = skewed_batch(12, 16, 10 * step + source)
            for number, module in enumerate(places(model).values()):
                if step % 7 == number:
                    with raising(module) as error, pytest.raises(OwnError) as caught:
                        balancer(x)
                    assert caught.value is error
            torch.testing.assert_close(balancer(x), reference(x), atol=1e-5, rtol=1e-4)
    stats = balancer.stats()
    balancer.close()
    # What raised before any exchange was no step: the next forward took its place.
    failed_late = sum(step % 7 in (1, 2) for step in range(35))
    assert stats.step == begin + 35 + failed_late
    assert stats.disabled is None
    return stats.rebalances


@pytest.mark.parametrize(
    "options",
    [
        {"dispatch": "all_to_all", "replica_choice": "table", "overlap": False},
        {"dispatch": "all_reduce"},
    ],
)
def test_an_exception_on_all_ranks_arrives_unchanged_and_the_next_forward_works(
    options: dict[str, Any],
) -> None:
    results = run_ranks(on_all_ranks, 2, options)
    assert results[0] == results[1] >= 1


def on_one_rank(rank: int, world_size: int, choice: str, overlap: bool) -> tuple[int, int, int]:
    model = ToyModel(LAYERS)
    reference = copy.deepcopy(model)
    balancer = torch_eplb.wrap(model, **QUICK, replica_choice=choice, overlap=overlap)
    apart = 0
    with torch.no_grad():
        begin = until_rebalanced(balancer)
        for step in range(35):
            x = skewed_batch(12, 16, 10 * step + rank)
            where = {2: "before any layer", 4: "router"}.get(step % 5)
            if where is not None and rank == 1:
                with raising(places(model)[where]) as error, pytest.raises(OwnError) as caught:
                    balancer(x)
                assert caught.value is error
            if where == "router":
                # The others wait in that layer; rank 1 comes along in the first one.
                with pytest.raises(torch_eplb.EPLBError, match=r"rank 1 in layer 0 of step \d+"):
                    balancer(x)
                apart += 1
            torch.testing.assert_close(balancer(x), reference(x), atol=1e-5, rtol=1e-4)
    stats = balancer.stats()
    balancer.close()
    assert stats.disabled is None
    return stats.step - begin, stats.rebalances, apart


@pytest.mark.parametrize(("choice", "overlap"), [("batch", True), ("local", False)])
def test_an_exception_on_one_rank_never_mixes_layers_and_ranks_find_together_again(
    choice: str, overlap: bool
) -> None:
    results = run_ranks(on_one_rank, 3, choice, overlap)
    assert results[0] == results[1] == results[2]
    # Per exception in the router there are two steps of rank 1 for one good one.
    steps, rebalances, apart = results[0]
    assert steps == 35 + 2 * apart
    assert rebalances >= 1


ACTIONS: dict[str, Callable[[torch_eplb.ExpertLoadBalancer, ToyModel], object]] = {
    "save": lambda balancer, reference: assert_same(balancer.state_dict(), reference.state_dict()),
    "load": lambda balancer, reference: balancer.load_state_dict(reference.state_dict()),
    "shards": lambda balancer, reference: torch_eplb.ShardedState(balancer).state_dict(),
    "unwrap": lambda balancer, reference: balancer.unwrap(),
    "close": lambda balancer, reference: balancer.close(),
}


def apart(rank: int, world_size: int, action: str, overlap: bool) -> None:
    """Rank 1 raises between two layers, and all ranks do something else than a forward next."""
    model = ToyModel(LAYERS)
    reference = copy.deepcopy(model)
    balancer = torch_eplb.wrap(model, **{**QUICK, "timeout": 10, "overlap": overlap})
    again = 6 if action in ("save", "load", "shards") else 1
    with torch.no_grad():
        for step in range(again):
            x = skewed_batch(12, 16, 10 * step + rank)
            # Rank 1 passes one boundary more than the others; at some of them messages go out.
            for _ in range(step):
                torch.testing.assert_close(balancer(x), reference(x), atol=1e-5, rtol=1e-4)
            while balancer.stats().stage == "collecting load":
                torch.testing.assert_close(balancer(x), reference(x), atol=1e-5, rtol=1e-4)
            if rank == 1:
                with raising(places(model)["router"]), pytest.raises(OwnError):
                    balancer(x)
            with pytest.raises(torch_eplb.EPLBError, match="not in the same forward"):
                balancer(x)
            ACTIONS[action](balancer, reference)
        torch.testing.assert_close(balancer(x), reference(x), atol=1e-5, rtol=1e-4)
        assert_same(balancer.unwrap().state_dict(), reference.state_dict())


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("action", ACTIONS)
def test_ranks_that_an_exception_drove_apart_find_together_for_any_call(
    action: str, overlap: bool
) -> None:
    run_ranks(apart, 2, action, overlap)


def inside_the_experts(rank: int, world_size: int) -> str:
    model = ToyModel(1)
    balancer = torch_eplb.wrap(model, **{**QUICK, "timeout": 2})
    x = skewed_batch(12, 16, rank)
    with torch.no_grad():
        balancer(x)
        if rank == 1:
            # Between the way there and the way back: the others wait for this rank's results.
            with raising(model.layers[0].experts), pytest.raises(OwnError):
                balancer(x)
        with pytest.raises(torch_eplb.PeerLostError) as caught:
            balancer(x)
    balancer.close()
    return str(caught.value)


def test_an_exception_inside_the_experts_of_one_rank_ends_the_wait_of_the_others_in_time() -> None:
    for message in run_ranks(inside_the_experts, 2):
        assert "within 2 s during the dispatch of tokens" in message
