"""Layers that dispatch by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torch_eplb.layers.hooks import Dispatch
from torch_eplb.routing import PADDING, zero_compute

__all__ = ["External"]


class External(Dispatch):
    """The layer dispatches by itself: logical ids are exchanged for physical ids, nothing else.

    It gets them in the dtype of its router's, and -1 for choices that nobody shall compute. Its
    zero-compute experts, E.. to the router, come after the physical ones: R * S..
    """

    returns = False

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        spec, arguments = self.layer.spec, self.layer.arguments
        ids = arguments.get(spec.expert_ids, args, kwargs)
        self._require_room(ids.dtype)
        self._begin()
        ids_TK = self._logical(ids.flatten(0, -2))
        counted_T = self._tokens(len(ids_TK), args, kwargs)
        physical = self._choose(ids_TK, counted_T).view(ids.shape)
        physical = physical.masked_fill(physical == self._bin, PADDING)
        if self.layer.num_zero_experts:
            num_experts = self.layer.num_experts
            zero = zero_compute(ids, num_experts, self.layer.num_zero_experts)
            physical = torch.where(zero, ids.long() + (self._bin - num_experts), physical)
        return arguments.replace(args, kwargs, {spec.expert_ids: physical.to(ids.dtype)})

    def _require_room(self, dtype: torch.dtype) -> None:
        """Refuse a dtype in which some physical id would be another one."""
        largest = self._bin + self.layer.num_zero_experts - 1
        if torch.iinfo(dtype).max >= largest:
            return
        zero = ", then zero-compute experts" if self.layer.num_zero_experts else ""
        enough = next(d for d in (torch.int16, torch.int32) if torch.iinfo(d).max >= largest)
        raise ValueError(
            f"layer {self.layer.name}: its expert ids are {dtype}, which cannot hold the physical "
            f"ids 0..{largest} of {self.context.comm.num_ranks} ranks with "
            f"{self.context.tables.num_slots} slots each{zero}. "
            f"Give the layer ids of {enough} or wider"
        )
