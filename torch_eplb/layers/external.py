"""Layers that dispatch by themselves."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from torch_eplb.layers.context import LayerContext, recomputing
from torch_eplb.layers.experts import ExpertLayer
from torch_eplb.layers.hooks import Dispatch
from torch_eplb.routing import PADDING, on_host, zero_compute

__all__ = ["External"]


class External(Dispatch):
    """The layer dispatches by itself: logical ids are exchanged for physical ids, nothing else.

    It gets them in the dtype of its router's, and -1 for choices that nobody shall compute. Its
    zero-compute experts, E.. to the router, come after the physical ones: R * S..

    A layer that knows how many tokens its slots got hands that over after its forward; then its ids
    are not counted.
    """

    returns = False

    def __init__(self, layer: ExpertLayer, index: int, context: LayerContext) -> None:
        super().__init__(layer, index, context)
        self._last: weakref.ref[torch.Tensor] | None = None
        if layer.spec.token_counts is not None:
            self._handles.append(layer.module.register_forward_hook(self._take_counts))

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        spec, arguments = self.layer.spec, self.layer.arguments
        ids = arguments.get(spec.expert_ids, args, kwargs)
        self._require_room(ids.dtype)
        self._begin()
        ids_TK = self._logical(ids.flatten(0, -2))
        if spec.token_counts is None:
            counted_T = self._tokens(len(ids_TK), args, kwargs)
            physical = self._choose(ids_TK, counted_T).view(ids.shape)
        else:
            self._refuse_mask()
            physical = self._choose_replicas(ids_TK, None).view(ids.shape)
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

    def _refuse_mask(self) -> None:
        if self.context.tokens.is_given:
            raise ValueError(
                f"layer {self.layer.name}: balancer.tokens(mask) cannot tell which of the tokens "
                "that arrived are padding, and the layer hands over its token_counts. Give rows of "
                "padding the expert id -1, which goes to no slot, or make the forward without it"
            )

    def _take_counts(self, module: nn.Module, args: Any, output: Any) -> None:
        """After the forward: what arrived here is the load."""
        counts_S = self._token_counts(module, output)
        if recomputing():
            return
        tables = self.context.tables
        assert tables.experts_LS is not None
        experts_S = tables.experts_LS[self.index]
        self.context.counters.add_arrived(self.index, counts_S, experts_S, tables.rank)

    def _token_counts(self, module: nn.Module, output: Any) -> torch.Tensor:
        """Integers ``[S]``, of the forward that has just ended.

        Raises:
            TypeError, ValueError: the layer does not hold to what `register_layer` says.
        """
        named = self.layer.spec.token_counts
        counts = named(module, output) if callable(named) else getattr(module, str(named), None)
        what = f"layer {self.layer.name}: token_counts={named!r}"
        remedy = (
            "the layer must tell after each forward how many tokens each local slot got, as "
            f"integers [{self.context.tables.num_slots}] on {self.context.counters.values.device}"
        )
        if not isinstance(counts, torch.Tensor):
            raise TypeError(f"{what} gave {type(counts).__name__} and no tensor; {remedy}")
        kind = counts.dtype
        if kind.is_floating_point or kind.is_complex or kind is torch.bool:
            raise TypeError(f"{what} gave {kind}; {remedy}")
        if counts.shape != (self.context.tables.num_slots,):
            raise ValueError(f"{what} gave the shape {tuple(counts.shape)}; {remedy}")
        if counts.device != self.context.counters.values.device:
            raise ValueError(f"{what} gave a tensor on {counts.device}; {remedy}")
        if on_host(counts) and bool((counts < 0).any()):
            raise ValueError(f"{what} gave {counts.tolist()}, with numbers below 0; {remedy}")
        if isinstance(named, str) and not torch.compiler.is_compiling():
            self._refuse_stale(module, named, counts, what)
        return counts

    def _refuse_stale(self, module: nn.Module, name: str, counts: torch.Tensor, what: str) -> None:
        """A forward that did not set the attribute would be counted as the one before it."""
        stale = self._last is not None and self._last() is counts
        if stale and name not in module._buffers:
            raise ValueError(
                f"{what} is the same tensor as after the forward before: each forward must set the "
                "attribute anew. If forward writes in place, make it a buffer: "
                f"register_buffer({name!r}, ..., persistent=False)"
            )
        self._last = weakref.ref(counts)
