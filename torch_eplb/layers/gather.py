"""Full experts from sharded ones."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from torch_eplb.comm import Planes, all_gather_single, wait_for
from torch_eplb.layers.experts import ExpertLayer, byte_view

__all__ = ["gather_layer"]


def gather_layer(
    layer: ExpertLayer,
    experts: NDArray[np.int32],
    live: NDArray[np.bool_],
    planes: Planes,
) -> list[torch.Tensor]:
    """A layer's full tensors, ``[experts, ...]`` each, on every rank. Collective.

    Args:
        layer: the sharded layer.
        experts: ``[ranks, slots]``, the logical expert in every slot.
        live: ``[ranks, slots]``, False where a slot's content is not to be used.
        planes: gives the group.
    """
    held = np.where(live, experts, -1).reshape(-1)
    source = [int(np.flatnonzero(held == e)[0]) for e in range(layer.num_experts)]
    full = []
    for tensor in layer.tensors():
        num_slots = tensor.shape[0]
        own = torch.stack([byte_view(tensor[slot]) for slot in range(num_slots)])
        everyone = own.new_empty((planes.num_ranks * num_slots, own.shape[1]))
        work = all_gather_single(everyone, own, group=planes.group, async_op=True)
        wait_for(work, planes, "gathering the experts")
        shape = (layer.num_experts, *tensor.shape[1:])
        stride = (tensor[0].numel(), *tensor.stride()[1:])
        with torch.inference_mode(False):
            result = torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device)
        for expert, physical in enumerate(source):
            byte_view(result[expert]).copy_(everyone[physical])
        full.append(result)
    return full
