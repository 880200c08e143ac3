"""Makes process groups of a group's own members, in its own order, without needing anyone else.

`torch.distributed.new_group` needs every rank of the world, or derives a group's name from counters
that only its members share if they have made the same groups before; it sorts the ranks; and where
the world is bound to devices it splits the world's communicator, which all of its ranks must do.
Here the members settle a name that nobody has used before, and the group is made on that name's
part of the store.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from torch_eplb.values.errors import PeerLostError

__all__ = ["abort_group", "default_store", "make_group", "settle_name"]

_POLL_SECONDS = 0.005
# torch 2.6 to 2.15 call it one or the other.
_OPTIONS = next(
    name
    for name in ("backend_options", "pg_options")
    if name in inspect.signature(c10d._new_process_group_helper).parameters
)


def default_store() -> dist.Store:
    """The store by which the default process group was made."""
    return c10d._get_default_store()


def settle_name(group: dist.ProcessGroup, timeout: float) -> str:
    """A name that all members agree on and that no earlier call has given. Collective.

    Every member offers a fresh number; the first one waits for offers that it has not seen, and
    answers each. What is left of calls that failed is told from what is new by that.

    Args:
        group: whose members call this.
        timeout: seconds to wait for the others.

    Raises:
        PeerLostError: a member did not come; names it.
    """
    rank, ranks = dist.get_rank(group), dist.get_process_group_ranks(group)
    members = hashlib.sha1(f"{group.group_name} {ranks}".encode()).hexdigest()[:16]
    store = dist.PrefixStore(f"torch_eplb/{members}", default_store())
    deadline = time.monotonic() + timeout
    offer = uuid.uuid4().hex
    store.set(f"offer/{rank}", offer)
    if rank == 0:
        offers = [_fresh_offer(store, member, deadline, timeout) for member in range(len(ranks))]
        name = f"torch_eplb/{uuid.uuid4().hex}"
        for member, offered in enumerate(offers):
            store.set(f"seen/{member}", offered)
            store.set(f"answer/{offered}", name)
        return name
    _await(store, f"answer/{offer}", deadline, timeout, lost=0)
    name = store.get(f"answer/{offer}").decode()
    store.delete_key(f"answer/{offer}")
    return name


def _fresh_offer(store: dist.Store, member: int, deadline: float, timeout: float) -> str:
    """The member's offer that has not been answered yet."""
    while True:
        _await(store, f"offer/{member}", deadline, timeout, lost=member)
        offered = store.get(f"offer/{member}").decode()
        seen = store.get(f"seen/{member}").decode() if store.check([f"seen/{member}"]) else ""
        if offered != seen:
            return offered
        _pause(deadline, timeout, lost=member)


def _await(store: dist.Store, key: str, deadline: float, timeout: float, *, lost: int) -> None:
    while not store.check([key]):
        _pause(deadline, timeout, lost=lost)


def _pause(deadline: float, timeout: float, *, lost: int) -> None:
    if time.monotonic() > deadline:
        raise PeerLostError(
            f"rank {lost} did not come to torch_eplb.wrap within {timeout:g} s; every rank of the "
            "process group must call it",
            ranks=(lost,),
        )
    time.sleep(_POLL_SECONDS)


def make_group(
    name: str, ranks: Sequence[int], backend: str, options: Any, timeout: float
) -> dist.ProcessGroup:
    """A group of the members that settled ``name``, with ``ranks`` in their order. Collective.

    Args:
        name: used for no other group.
        ranks: of the whole world, in the order of the new group's ranks.
        backend: "gloo", "nccl", "hccl", "fake".
        options: of the backend, or None.
        timeout: of the group's operations, in seconds.
    """
    ranks = list(ranks)
    rank = ranks.index(dist.get_rank())
    helper: Any = c10d._new_process_group_helper  # its signature is not the same in all versions
    with _unbound():
        group, _ = helper(
            len(ranks),
            rank,
            ranks,
            dist.Backend(backend),
            default_store(),
            name,
            timeout=timedelta(seconds=timeout),
            group_desc="torch_eplb",
            **{_OPTIONS: options},
        )
    c10d._world.pg_group_ranks[group] = {member: index for index, member in enumerate(ranks)}
    return group


def abort_group(group: dist.ProcessGroup, device: torch.device) -> None:
    """End what an accelerator's group is doing: streams that wait for a lost peer go on.

    Otherwise the backend's watchdog ends the process when the group's own time limit is over.
    """
    backend: Any = group._get_backend(device)
    if hasattr(backend, "abort_hccl_comm"):
        backend.abort_hccl_comm("a peer was lost")
    else:
        backend.abort()


@contextlib.contextmanager
def _unbound() -> Iterator[None]:
    """Hide that the world is bound to a device: a new group would be split from its communicator,
    which takes every rank of the world."""
    world = dist.group.WORLD
    assert world is not None
    device = world.bound_device_id
    if device is None:
        yield
        return
    world.bound_device_id = None
    try:
        yield
    finally:
        world.bound_device_id = device
