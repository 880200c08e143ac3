"""Full experts from sharded ones.

Experts travel one by one, each from one of its replicas to every rank, straight to where they are
to stay. So nothing is needed besides the result, or, where experts must not stay on the device or
not on this rank at all, besides one expert's tensor.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from torch_eplb.comm.communicator import Communicator
from torch_eplb.layers.experts import ExpertLayer
from torch_eplb.layers.slots import SlotTensors, byte_view, in_tiles, read_bytes, write_bytes

_WHAT = (
    "gathering the experts (every rank has to call it: where a program saves from rank 0 only, as "
    "transformers' Trainer.save_model does, call balancer.save_pretrained(folder), "
    "torch_eplb.full_state_dict(balancer, rank0_only=True) or unwrap() on every rank instead)"
)

__all__ = ["gather_layer", "gather_tensor"]


def gather_layer(
    layer: ExpertLayer,
    experts: NDArray[np.int32],
    live: NDArray[np.bool_],
    comm: Communicator,
) -> list[SlotTensors]:
    """What a layer has per expert, of all experts, on every rank. Collective.

    Args:
        layer: the sharded layer.
        experts: ``[ranks, slots]``, the logical expert in every slot.
        live: ``[ranks, slots]``, False where a slot's content is not to be used.
        comm: gives the group.

    Raises:
        PeerLostError: a rank did not come within the time limit.
    """
    full = []
    for part, size in zip(layer.parts(), layer.full_sizes, strict=True):
        result = part.empty(size, part.tensors[0].device)
        gather_tensor(part, experts, live, comm, result)
        full.append(result)
    return full


def gather_tensor(
    part: SlotTensors,
    experts: NDArray[np.int32],
    live: NDArray[np.bool_],
    comm: Communicator,
    result: SlotTensors | None,
    scratch: torch.Tensor | None = None,
) -> None:
    """Fill ``result`` with one expert-indexed tensor in logical order. Collective.

    A broadcast per expert, also where only one rank wants them: point-to-point operations would
    open connections (with NCCL and HCCL: buffers) that the model's group may not have.

    Args:
        part: this rank's slots.
        experts, live, comm: see `gather_layer`.
        result: ``part.empty(experts, device)`` on any device, or None to pass the experts on and
            keep none. May differ between ranks. Entries beyond become zeros.
        scratch: flat uint8 for one expert's tensor at least, on the device of ``part``; needed
            where ``result`` is not on that device.

    Raises:
        PeerLostError: a rank did not come within the time limit.
    """
    comm.check_process()
    held = np.where(live, experts, -1)
    first = part.tensors[0]
    tiles = in_tiles(first)
    here = result is not None and result.tensors[0].device == first.device
    in_place = here and not tiles
    if tiles and scratch is None:
        scratch = torch.empty(part.slot_nbytes, dtype=torch.uint8, device=first.device)
    pending: list[dist.Work | None] = []
    num_experts = int(experts.max()) + 1
    if result is not None and len(result) > num_experts:
        for unused in range(num_experts, len(result)):
            byte_view(result.slot(unused)).zero_()  # not every dtype can be filled
    for expert in range(num_experts):
        owner, slot = np.argwhere(held == expert)[0].tolist()
        target = result.slot(expert) if result is not None else None
        if owner == comm.rank:
            parcel = read_bytes(part.slot(slot))
            if target is not None:
                write_bytes(target, parcel)
        elif in_place:
            assert target is not None
            parcel = byte_view(target)
        else:
            assert scratch is not None
            parcel = scratch[: part.slot_nbytes]
        pending.append(
            dist.broadcast(parcel, comm.global_ranks[owner], group=comm.group, async_op=True)
        )
        if owner != comm.rank and not in_place:
            _finish(pending, comm)
            if target is not None:
                write_bytes(target, parcel)
    _finish(pending, comm)


def _finish(pending: list[dist.Work | None], comm: Communicator) -> None:
    for work in pending:
        comm.wait_in_line(work, _WHAT)
    pending.clear()
