"""What is common to ways that compute choices on this rank: one row each, ordered by slot.

So every row is the work of exactly one expert, any module's forward can compute it, and weights
are applied to results afterwards. The module itself sees ones, of its rows' dtype: others would
make it promote rows, or round weights.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch

from torch_eplb.layers.context import LayerContext, Trips
from torch_eplb.layers.experts import ExpertLayer
from torch_eplb.layers.grouped import can_group, grouped_experts, misfit, why_not
from torch_eplb.layers.hooks import Dispatch
from torch_eplb.routing import narrow
from torch_eplb.values.errors import EPLBError

__all__ = ["ComputesChoices", "shaped", "without_padding"]

_Trip = TypeVar("_Trip")


class ComputesChoices(Dispatch, Generic[_Trip]):
    """Calls the module with one row per choice.

    Where grouped products can compute them, the module's forward is replaced by one that does so
    for such calls, and is the class's for all others.
    """

    def __init__(self, layer: ExpertLayer, index: int, context: LayerContext) -> None:
        super().__init__(layer, index, context)
        self._trips: Trips[_Trip] = Trips(layer.name)
        self._empty: tuple[torch.Tensor, ...] | None = None  # a call without tokens
        fits = misfit(layer.module, layer.spec.fused, context.comm.device) is None
        is_plain = "forward" not in vars(layer.module)  # or somebody has replaced it
        if fits and is_plain and context.experts != "module":
            layer.module.forward = self._forward

    @property
    def computed_by(self) -> str:
        """Who computes the experts, in words."""
        layer, context = self.layer, self.context
        reason = why_not(layer.module, layer.spec.fused, context.experts, context.comm.device)
        if reason is None and vars(layer.module).get("forward") != self._forward:
            reason = "somebody has replaced its forward"
        return "grouped products" if reason is None else f"the module: {reason}"

    def remove(self) -> None:
        super().remove()
        if vars(self.layer.module).get("forward") == self._forward:
            del self.layer.module.forward

    def _remember(self, *inputs: torch.Tensor) -> None:
        """Of what `_read` has read: how a call without tokens looks, for `visit`."""
        if self._empty is None:
            self._empty = tuple(x[:0].detach() for x in inputs)

    def visit(self) -> None:
        if self._empty is None:
            raise EPLBError(
                f"layer {self.layer.name} has not been called on this rank yet, so the size and "
                "dtype of what the other ranks send are not known: make one forward on every rank "
                "first, a warm-up say"
            )
        args, kwargs = self._with_inputs((), {}, *self._empty)
        self.layer.module(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self.layer.module
        if not torch.compiler.is_compiling():
            rows = self._hidden_states(args, kwargs)
            if self._trips.holds(rows) and can_group(module, self.context.experts, rows):
                ids = self.layer.arguments.get(self.layer.spec.expert_ids, args, kwargs)
                return grouped_experts(module, rows, ids[:, 0])
        return type(module).forward(module, *args, **kwargs)

    def _enter(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rows_CH: torch.Tensor,
        slots_C: torch.Tensor,
        trip: _Trip,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The module's arguments for these rows; ``trip`` is kept until `_leave`."""
        router_ids = self.layer.arguments.get(self.layer.spec.expert_ids, args, kwargs)
        rows_CH, slots_C = _never_empty(rows_CH, slots_C)
        ids = narrow(slots_C, router_ids.dtype, self.context.tables.num_slots).view(-1, 1)
        self._trips.begin(rows_CH, trip)
        return self._replace(args, kwargs, rows_CH, ids, rows_CH.new_ones(len(rows_CH), 1))

    def _leave(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Trip:
        """What `_enter` was given for the call that has returned."""
        return self._trips.end(self._hidden_states(args, kwargs))


def _never_empty(rows_CH: torch.Tensor, slots_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One zero row for slot 0 where there is none at all.

    Not every experts module takes an empty batch. The row also keeps this rank in the autograd
    graph, whose backward is a collective.
    """
    if rows_CH.shape[0]:
        return rows_CH, slots_C
    return torch.cat((rows_CH, rows_CH.new_zeros(1, rows_CH.shape[1]))), slots_C.new_zeros(1)


def without_padding(output: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The other way round, ``[C, H]``: results without that of the zero row."""
    return (output if num_rows else output[:0] + 0.0 * output.sum()).flatten(1)


def shaped(
    summed_TH: torch.Tensor,
    identity: torch.Tensor | None,
    shape: torch.Size,
    output: torch.Tensor,
) -> torch.Tensor:
    """The layer's result: rows as the caller's inputs ``shape`` has them, each as in ``output``.

    Args:
        identity: what zero-compute experts add, or None.
    """
    if identity is not None:
        summed_TH = summed_TH + identity
    return summed_TH.view(*shape[:-1], *output.shape[1:])
