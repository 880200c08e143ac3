"""The two hooks of one MoE layer, and what every way of bringing tokens to experts needs.

What a router's ids may be besides experts, and the bin that such choices go to, is said in
`torch_eplb.routing.ids`.

Shape suffixes here and in the files of the ways: T tokens, K choices per token, N = T * K,
H hidden, E logical experts, R ranks, S slots per rank, C choices computed on this rank.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.functional import pad

from torch_eplb.layers.context import LayerContext, recomputing
from torch_eplb.layers.experts import ExpertLayer
from torch_eplb.layers.graphs import note_traced
from torch_eplb.routing import (
    choose_from_table,
    choose_locally,
    count_hits,
    divide,
    logical_ids,
    zero_compute,
)

__all__ = ["BoundToRanks", "Dispatch", "capturing"]


def capturing(device: torch.device) -> bool:
    """Whether a CUDA (or NPU) graph is being captured."""
    if device.type == "cpu":
        return False
    module = torch.get_device_module(device)
    return bool(getattr(module, "is_current_stream_capturing", lambda: False)())


class BoundToRanks:
    """Refuses to be copied and pickled: process groups and peers cannot be.

    Hooks are bound methods, so copying a wrapped model comes by here as well.
    """

    def __deepcopy__(self, memo: Any) -> Any:
        self._refuse("copied")

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._refuse("pickled or copied")

    def _refuse(self, what: str) -> NoReturn:
        raise TypeError(
            f"a model that is wrapped by torch_eplb cannot be {what}: it belongs to the process "
            "groups of this process. Call unwrap() first to copy the plain model, or save and load "
            "balancer.state_dict()"
        )


class Dispatch(BoundToRanks):
    """Hooks on one experts module. Subclasses say how tokens travel.

    Attributes:
        returns: whether results are brought back after the module's forward.
    """

    returns = True

    @property
    def computed_by(self) -> str:
        """Who computes the experts, in words."""
        return "the layer itself"

    def __init__(self, layer: ExpertLayer, index: int, context: LayerContext) -> None:
        self.layer = layer
        self.index = index
        self.context = context
        self._handles = [layer.module.register_forward_pre_hook(self.before, with_kwargs=True)]
        if self.returns:
            self._handles.append(layer.module.register_forward_hook(self.after, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off the module."""
        for handle in self._handles:
            handle.remove()

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        raise NotImplementedError

    def after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        raise NotImplementedError

    def _begin(self) -> None:
        """Note that the layer is entered, and make sure that all ranks are in this model."""
        position = self.context.position
        if torch.compiler.is_compiling():
            note_traced(position.number)
            return
        position.count_entry()
        # A graph cannot hold an answer that is read here.
        if self.returns and not capturing(self.context.comm.device):
            self.context.roster.call(position.at(self.index))

    def visit(self) -> None:
        """Enter the layer without tokens, for other ranks that have some.

        Raises:
            EPLBError: the layer has not been called yet on this rank.
        """
        raise NotImplementedError

    def _hidden_states(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        return self.layer.arguments.get(self.layer.spec.hidden_states, args, kwargs)

    def _read(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states ``[T, H]``, the router's ids ``[T, K]`` and weights ``[T, K]``."""
        spec, arguments = self.layer.spec, self.layer.arguments
        hidden = arguments.get(spec.hidden_states, args, kwargs)
        ids = arguments.get(spec.expert_ids, args, kwargs)
        weights = arguments.get(spec.expert_weights, args, kwargs)
        return hidden.flatten(0, -2), ids.flatten(0, -2), weights.flatten(0, -2)

    def _replace(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.layer.spec.needs_two_choices:
            # The second is a zero-compute expert: past the local slots.
            ids = pad(ids, (0, 1), value=self.context.tables.num_slots)
            weights = pad(weights, (0, 1))
        return self._with_inputs(args, kwargs, hidden, ids, weights)

    def _with_inputs(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments with these in place of what `_read` reads."""
        spec = self.layer.spec
        values = {spec.hidden_states: hidden, spec.expert_ids: ids}
        if spec.expert_weights is not None:
            values[spec.expert_weights] = weights
        return self.layer.arguments.replace(args, kwargs, values)

    def _logical(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """The router's ids as the hot path takes them."""
        layer = self.layer
        return logical_ids(ids_TK, layer.num_experts, layer.num_zero_experts, layer.name)

    def _identity(
        self, hidden_TH: torch.Tensor, router_ids: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor | None:
        """``[T, H]``: what zero-compute experts add to the output, at home; None without them."""
        layer = self.layer
        if not layer.num_zero_experts:
            return None
        chosen_TK = zero_compute(router_ids, layer.num_experts, layer.num_zero_experts)
        share_T = weights_TK.masked_fill(~chosen_TK, 0.0).sum(1, keepdim=True)
        return (hidden_TH * share_T).to(hidden_TH.dtype)

    @property
    def _bin(self) -> int:
        """The physical id of choices that go to no slot."""
        return self.context.comm.num_ranks * self.context.tables.num_slots

    def _tokens(
        self, num_tokens: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        """Which rows are counted, bool ``[T]``; None is all.

        Raises:
            ValueError: a mask is given, and the layer is called with rows that are no tokens.
        """
        form = self.layer.form
        if form is not None and form.read is not None and self.context.tokens.is_given:
            raise ValueError(
                f"layer {self.layer.name}: a {type(self.layer.module).__name__} is called with "
                "rows that are not the model's tokens in order, so that balancer.tokens(mask) "
                "cannot say which of them are padding; leave it out"
            )
        named = self.layer.arguments.find(self.layer.spec.token_mask, args, kwargs)
        return self.context.tokens.rows(num_tokens, named, self.layer.name)

    def _choose(self, ids_TK: torch.Tensor, counted_T: torch.Tensor | None) -> torch.Tensor:
        """Physical ids ``[T, K]`` for logical ones of this rank's own tokens; counts them."""
        tables, num_ranks = self.context.tables, self.context.comm.num_ranks
        hits_E = count_hits(ids_TK, self.layer.num_experts)
        physical_TK = self._choose_replicas(ids_TK, hits_E)
        ranks_TK = divide(physical_TK, tables.num_slots)
        if counted_T is None:
            self._count(hits_E, count_hits(ranks_TK, num_ranks))
        else:
            self._count_some(ids_TK, ranks_TK, counted_T)
        return physical_TK

    def _choose_replicas(self, ids_TK: torch.Tensor, hits_E: torch.Tensor | None) -> torch.Tensor:
        """Physical ids ``[T, K]``; ``hits_E`` are the ids' hits, where they are counted anyway."""
        tables = self.context.tables
        if tables.choice_LBP is not None:
            return choose_from_table(ids_TK, tables.choice_LBP[self.index])
        return choose_locally(
            ids_TK,
            count_hits(ids_TK, self.layer.num_experts) if hits_E is None else hits_E,
            tables.slots_LEM[self.index],
            self.context.comm.num_ranks,
            tables.num_slots,
            tables.solver_LEM[self.index],
            tables.weight_tokens,
            None if tables.home_LEM is None else tables.home_LEM[self.index],
        )

    def _count(self, hits_E: torch.Tensor, sent_R: torch.Tensor) -> None:
        """Add to the load: hits by logical expert, and by the rank that computes them."""
        if not recomputing():
            self.context.counters.add(self.index, hits_E, sent_R)

    def _count_some(
        self, ids_TK: torch.Tensor, ranks_TK: torch.Tensor, counted_T: torch.Tensor
    ) -> None:
        """The same for the rows ``counted_T`` only, of choices and of the ranks they go to."""
        num_experts, num_ranks = self.layer.num_experts, self.context.comm.num_ranks
        outside = ~counted_T.unsqueeze(1)
        self._count(
            count_hits(ids_TK.masked_fill(outside, num_experts), num_experts),
            count_hits(ranks_TK.masked_fill(outside, num_ranks), num_ranks),
        )
