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
from torch_eplb.layers.experts import ExpertLayer, byte_view

_WHAT = (
    "gathering the experts (every rank has to call it: where a program saves from rank 0 only, as "
    "transformers' Trainer.save_model does, call balancer.save_pretrained(folder), "
    "torch_eplb.full_state_dict(balancer, rank0_only=True) or unwrap() on every rank instead)"
)

__all__ = ["empty_full", "gather_layer", "gather_tensor"]


def gather_layer(
    layer: ExpertLayer,
    experts: NDArray[np.int32],
    live: NDArray[np.bool_],
    comm: Communicator,
) -> list[torch.Tensor]:
    """A layer's full tensors, ``[experts, ...]`` each, on every rank. Collective.

    Args:
        layer: the sharded layer.
        experts: ``[ranks, slots]``, the logical expert in every slot.
        live: ``[ranks, slots]``, False where a slot's content is not to be used.
        comm: gives the group.

    Raises:
        PeerLostError: a rank did not come within the time limit.
    """
    full = []
    for tensor, size in zip(layer.tensors(), layer.full_sizes, strict=True):
        result = empty_full(tensor, size, tensor.device)
        gather_tensor(tensor, experts, live, comm, result)
        full.append(result)
    return full


def gather_tensor(
    tensor: torch.Tensor,
    experts: NDArray[np.int32],
    live: NDArray[np.bool_],
    comm: Communicator,
    result: torch.Tensor | None,
    scratch: torch.Tensor | None = None,
) -> None:
    """Fill ``result`` with one expert-indexed tensor in logical order. Collective.

    A broadcast per expert, also where only one rank wants them: point-to-point operations would
    open connections (with NCCL and HCCL: buffers) that the model's group may not have.

    Args:
        tensor: ``[slots, ...]``, this rank's.
        experts, live, comm: see `gather_layer`.
        result: ``[experts, ...]`` with the strides of `empty_full`, on any device, or None to pass
            the experts on and keep none. May differ between ranks. Entries beyond become zeros.
        scratch: flat uint8 for one expert's tensor at least, on the device of ``tensor``; needed
            where ``result`` is not on that device.

    Raises:
        PeerLostError: a rank did not come within the time limit.
    """
    comm.check_process()
    held = np.where(live, experts, -1)
    in_place = result is not None and result.device == tensor.device
    pending: list[dist.Work | None] = []
    num_experts = int(experts.max()) + 1
    if result is not None and len(result) > num_experts:
        for entry in result[num_experts:]:
            byte_view(entry).zero_()  # not every dtype can be filled
    for expert in range(num_experts):
        owner, slot = np.argwhere(held == expert)[0].tolist()
        target = byte_view(result[expert]) if result is not None else None
        if owner == comm.rank:
            parcel = byte_view(tensor[slot])
            if target is not None:
                target.copy_(parcel)
        elif in_place:
            assert target is not None
            parcel = target
        else:
            assert scratch is not None
            parcel = scratch[: byte_view(tensor[0]).numel()]
        pending.append(
            dist.broadcast(parcel, comm.global_ranks[owner], group=comm.group, async_op=True)
        )
        if owner != comm.rank and not in_place:
            _finish(pending, comm)
            if target is not None:
                target.copy_(parcel)
    _finish(pending, comm)


def empty_full(tensor: torch.Tensor, size: int, device: torch.device) -> torch.Tensor:
    """Uninitialised ``[size, ...]`` where each expert has the strides it has in ``tensor``."""
    stride = (tensor[0].numel(), *tensor.stride()[1:])
    with torch.inference_mode(False):
        shape = (size, *tensor.shape[1:])
        return torch.empty_strided(shape, stride, dtype=tensor.dtype, device=device)


def _finish(pending: list[dist.Work | None], comm: Communicator) -> None:
    for work in pending:
        comm.wait_in_line(work, _WHAT)
    pending.clear()
