"""Layers that dispatch by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torch_eplb.layers.hooks import Dispatch
from torch_eplb.routing import PADDING

__all__ = ["External"]


class External(Dispatch):
    """The layer dispatches by itself: logical ids are exchanged for physical ids, nothing else.

    It gets them in the dtype of its router's, and -1 for choices that nobody shall compute.
    """

    returns = False

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        spec, arguments = self.layer.spec, self.layer.arguments
        ids = arguments.get(spec.expert_ids, args, kwargs)
        self._require_room(ids.dtype)
        ids_TK = self._logical(ids.flatten(0, -2))
        counted_T = self._tokens(len(ids_TK), args, kwargs)
        physical = self._choose(ids_TK, counted_T).view(ids.shape)
        physical = physical.masked_fill(physical == self._bin, PADDING)
        return arguments.replace(args, kwargs, {spec.expert_ids: physical.to(ids.dtype)})

    def _require_room(self, dtype: torch.dtype) -> None:
        """Refuse a dtype in which some physical id would be another one."""
        largest = self._bin - 1
        if torch.iinfo(dtype).max >= largest:
            return
        enough = next(d for d in (torch.int16, torch.int32) if torch.iinfo(d).max >= largest)
        raise ValueError(
            f"layer {self.layer.name}: its expert ids are {dtype}, which cannot hold the physical "
            f"ids 0..{largest} of {self.context.comm.num_ranks} ranks with "
            f"{self.context.tables.num_slots} slots each. Give the layer ids of {enough} or wider"
        )
