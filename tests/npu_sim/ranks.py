"""Runs a test's function on several ranks, each with a simulated NPU of its own.

    def body(rank, world_size, argument): ...      # module level, in the test's file
    results = run_on_npus(body, 2, argument)

As `support.ranks.run_ranks`; in ``body`` the device "npu" is rank's own and the default group
speaks HCCL. Processes come from a fork server that has torch_npu imported already.
"""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType
from typing import Any

from support import ranks

from npu_sim import runtime

__all__ = ["DELAYS", "run_on_npus"]

DELAYS = {"host copies": 1, "transfers": 1, "device copies": 16}
"""Of each kind one in so many tasks is late by 2 to 20 ms. A forward copies on the device often."""

ranks._context.set_forkserver_preload(
    ["torch", "torch.distributed", "torch_eplb.balancer", "npu_sim.preload"]
)


def run_on_npus(
    body: Callable[..., Any],
    world_size: int,
    *args: Any,
    delays: bool = True,
    coalesced: bool = True,
    timeout: float = 90.0,
    group_timeout: float | None = None,
    may_die: tuple[int, ...] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> list[Any]:
    """Call ``body(rank, world_size, *args)`` on every rank.

    Args:
        body, world_size, args, timeout, may_die: see `support.ranks.run_ranks`.
        delays: hold up tasks as `DELAYS` says.
        coalesced: which of torch_npu's two ways ``batch_isend_irecv`` goes: since CANN 9
            single operations between HcclGroupStart and HcclGroupEnd, before it one
            HcclBatchSendRecv.
        group_timeout: seconds after which the default group's watchdog ends the process; None is
            ``timeout``.
        environment: variables that are set before the first process group is made.

    Returns:
        What each rank returned.
    """
    source = inspect.getsourcefile(body)
    assert source is not None
    with tempfile.TemporaryDirectory() as folder:
        settings = _Settings(
            source=source,
            body=body.__qualname__,
            store=os.path.join(folder, "store"),
            delays=delays,
            coalesced=coalesced,
            group_timeout=group_timeout or timeout,
            environment=dict(environment),
        )
        return ranks.run_ranks(
            _on_npu, world_size, settings, args, timeout=timeout, backend="", may_die=may_die
        )


@dataclass(frozen=True)
class _Settings:
    source: str
    body: str
    store: str
    delays: bool
    coalesced: bool
    group_timeout: float
    environment: dict[str, str]


def _on_npu(rank: int, world_size: int, settings: _Settings, args: tuple[Any, ...]) -> Any:
    """What each process does."""
    os.environ.update(settings.environment)
    runtime.load()
    import torch
    import torch.distributed as dist
    import torch_npu

    from npu_sim import control

    # The wheel looks at the version of CANN once, at its import in the fork server.
    torch_npu.distributed.distributed_c10d._CANN_VERSION = settings.coalesced
    torch.npu.set_device(rank)
    if settings.delays:
        for kind, one_in in DELAYS.items():
            control.delay(kind, (2.0, 20.0), one_in, seed=rank)
    dist.init_process_group(
        "hccl",
        init_method=f"file://{settings.store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=settings.group_timeout),
    )
    return getattr(ranks._load(settings.source), settings.body)(rank, world_size, *args)
