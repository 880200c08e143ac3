"""Helpers for users' own unit tests: a balanced model on any number of ranks, in one process.

torch's ``fake`` process group stands for a group of any size: collectives return at once and move
nothing between ranks. With it, construction, hooks, the step clock, planning (in its real
process) and the exchange's decisions run as they would on that rank of a real group; what the
experts of other ranks would have computed is missing from outputs. A test of a model of yours:

    def test_my_model_can_be_balanced_on_64_ranks():
        with torch_eplb.testing.fake_process_group(world_size=64, rank=3):
            model = torch_eplb.wrap(MyModel(), num_redundant_experts=64, collect_interval=8)
            posted = torch_eplb.testing.record_operations(model)
            torch_eplb.testing.run_until(
                lambda: model.stats().rebalances >= 1, lambda: model(batch)
            )
        assert all(op.nbytes == EXPERT_BYTES for op in posted)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from torch_eplb.balancer import ExpertLoadBalancer

__all__ = ["Operation", "fake_process_group", "record_operations", "run_until"]


@contextlib.contextmanager
def fake_process_group(world_size: int, rank: int = 0) -> Iterator[dist.ProcessGroup]:
    """Be ``rank`` of a fake group of ``world_size`` ranks inside the ``with``.

    Raises:
        RuntimeError: a default process group exists already.
        ValueError: ``rank`` is outside of the group.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
    if dist.is_initialized():
        raise RuntimeError(
            "a default process group exists: call torch.distributed.destroy_process_group() first"
        )
    # Importing it registers the backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        group = dist.group.WORLD
        assert group is not None
        yield group
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Operation:
    """One point-to-point operation that a rank posts.

    Attributes:
        round_index: the round, counted within its rebalance.
        kind: "send" or "receive".
        peer: the other rank, in the whole world.
        nbytes: size of the message.
        staged: it is received into the staging pool, and copied when its round is committed.
    """

    round_index: int
    kind: str
    peer: int
    nbytes: int
    staged: bool = False


def record_operations(balancer: ExpertLoadBalancer) -> list[Operation]:
    """A list that grows by every point-to-point operation that the wrapped model posts from now on.

    Lists of the two ranks of a pair match one by one: the n-th send to a peer is its n-th receive.
    """
    recorded: list[Operation] = []

    def on_post(round_index: int, operations: list[dist.P2POp]) -> None:
        for operation in operations:
            kind = "send" if operation.op is dist.isend else "receive"
            nbytes = operation.tensor.numel() * operation.tensor.element_size()
            staged = balancer.engine.exchange.is_staged(operation.tensor)
            recorded.append(Operation(round_index, kind, operation.peer, nbytes, staged))

    balancer.engine.exchange.on_post = on_post
    return recorded


def run_until(
    condition: Callable[[], bool], forward: Callable[[], Any], *, timeout: float = 60.0
) -> int:
    """Call ``forward`` until ``condition`` holds; returns how often.

    Raises:
        TimeoutError: it did not within ``timeout`` seconds (the planner works in real time).
    """
    deadline = time.monotonic() + timeout
    forwards = 0
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"the condition did not hold after {forwards} forwards in {timeout:g} s"
            )
        forward()
        forwards += 1
    return forwards
