"""Every rank has its own tokens, and all of them go to all ranks; their sums come back to each.

For small batches, as in decoding: two exchanges of fixed sizes, no count of what goes where, and
nothing that graphs cannot hold. From the gathered tokens on a rank does what it does under
all-reduce: every rank sees all choices, so the split of the whole batch needs no message, and
one rank's counts are everybody's.

Batches of different sizes are padded with tokens that chose nobody. How many the largest has is
asked in an exchange of its own, unless ``max_tokens_per_rank`` says so.

Shape suffixes as in `hooks`, and P tokens of the largest batch, A = R * P tokens of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from torch_eplb.layers.all_reduce import AllReduce, AskingAllReduce, CompactAllReduce
from torch_eplb.layers.collectives import all_gather_counts, gather_tokens, register, scatter_sums
from torch_eplb.layers.computing import shaped
from torch_eplb.layers.context import LayerContext, Trips
from torch_eplb.layers.experts import ExpertLayer
from torch_eplb.layers.graphs import outside_graphs
from torch_eplb.layers.hooks import Dispatch
from torch_eplb.routing import PADDING

__all__ = ["AgreeingAllGather", "AllGather", "AskingAllGather", "CompactAllGather"]


@dataclass(frozen=True)
class _Call:
    """This rank's own part of a call.

    Attributes:
        tokens: T.
        shape: of its hidden states.
        identity: what zero-compute experts add to its tokens.
    """

    tokens: int
    shape: torch.Size
    identity: torch.Tensor | None


class _Gathers(AllReduce):
    """Goes before a way of all-reduce: that takes what is gathered for what all ranks hold."""

    def __init__(self, layer: ExpertLayer, index: int, context: LayerContext) -> None:
        super().__init__(layer, index, context)
        self._number = register(context.comm)
        self._calls: Trips[_Call] = Trips(layer.name)
        self._traced: _Call | None = None  # of the call that is a part of a graph
        self._counted: torch.Tensor | None = None
        if context.comm.device.type == "cpu":
            self._many = 0  # nothing is waited for to learn how many choices are local

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._begin()
        hidden_TH, router_ids, weights_TK = self._read(args, kwargs)
        call = _Call(
            len(hidden_TH),
            self._hidden_states(args, kwargs).shape,
            Dispatch._identity(self, hidden_TH, router_ids, weights_TK),
        )
        with torch.no_grad():
            integers = self._integers(router_ids, args, kwargs)
        if torch.compiler.is_compiling():
            self._traced = call
        else:
            self._remember(hidden_TH, router_ids, weights_TK)
        most = self._most_tokens(call.tokens)
        rows = (0, 0, 0, most - call.tokens)
        hidden_AH, weights_AK, integers = gather_tokens(
            pad(hidden_TH, rows),
            pad(weights_TK, rows),
            pad(integers, rows, value=PADDING),
            self.context.comm,
            self._number,
        )
        self._counted = integers[:, -1] > 0
        ids_AK = integers[:, :-1].long()
        args, kwargs = self._with_inputs(args, kwargs, hidden_AH, ids_AK, weights_AK)
        args, kwargs = self._localise(args, kwargs)
        self._counted = None
        if not torch.compiler.is_compiling():
            self._calls.begin(self._hidden_states(args, kwargs), call)
            self._add_traffic(hidden_AH, weights_AK, most)
        return args, kwargs

    def after(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: torch.Tensor,
    ) -> torch.Tensor:
        if torch.compiler.is_compiling():
            call, self._traced = self._traced, None
            assert call is not None
        else:
            call = self._calls.end(self._hidden_states(args, kwargs))
        own_TH = self._finish(args, kwargs, output)[: call.tokens]
        return shaped(own_TH.flatten(1), call.identity, call.shape, output)

    # ---- what all-reduce asks -------------------------------------------------------------------

    def _share(self, value: torch.Tensor) -> torch.Tensor:
        return value  # gathering adds up what the ranks' gradients are

    def _sum(self, partial: torch.Tensor) -> torch.Tensor:
        return scatter_sums(partial, self.context.comm, self._number)

    def _tokens(
        self, num_tokens: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        return self._counted

    def _identity(
        self, hidden_TH: torch.Tensor, router_ids: torch.Tensor, weights_TK: torch.Tensor
    ) -> None:
        return None  # added at home

    def _result_shape(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Size:
        gathered, hidden = self._hidden_states(args, kwargs).shape
        return torch.Size((gathered // self.context.comm.num_ranks, hidden))

    # ---- gathering ------------------------------------------------------------------------------

    def _integers(
        self, router_ids: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """int32 ``[T, K + 1]``: ids, `PADDING` for choices of no slot; 1 for rows that count."""
        ids_TK = self._logical(router_ids)
        ids_TK = ids_TK.masked_fill(ids_TK == self.layer.num_experts, PADDING)
        counted_T = super()._tokens(len(ids_TK), args, kwargs)
        counts_T1 = ids_TK.new_ones((len(ids_TK), 1))
        if counted_T is not None:
            counts_T1 = counted_T.view(-1, 1).to(ids_TK.dtype)
        return torch.cat((ids_TK, counts_T1), dim=1).int()

    def _most_tokens(self, tokens: int) -> int:
        """P, and a check that ranks are in the same layer where they exchange anything for it.

        Raises:
            EPLBError: they are not.
            ValueError: more tokens than ``max_tokens_per_rank``.
        """
        most = self.context.max_tokens_per_rank
        if most is None:
            return self._ask(tokens)
        if tokens > most:
            raise ValueError(
                f"layer {self.layer.name} was called with {tokens} tokens, and "
                f"max_tokens_per_rank={most}: pass more in wrap, or None for sizes that are agreed "
                "on in every call"
            )
        return most

    def _ask(self, tokens: int) -> int:
        position, comm = self.context.position, self.context.comm
        here = torch.tensor([tokens, position.enter(self.index)], device=comm.device)
        sizes, positions = all_gather_counts(here, comm).t().tolist()
        position.compare(comm.heard(positions))
        return max(1, *sizes)

    def _add_traffic(self, hidden_AH: torch.Tensor, weights_AK: torch.Tensor, most: int) -> None:
        others, top_k = self.context.comm.num_ranks - 1, weights_AK.shape[1]
        there = hidden_AH.shape[1] * hidden_AH.element_size()
        with_it = top_k * weights_AK.element_size() + 4 * (top_k + 1)
        self.context.traffic.add(2 * others * most, others * most * (2 * there + with_it))


class AllGather(_Gathers):
    """For modules that skip foreign choices, with ``max_tokens_per_rank``: no graph breaks."""


class AgreeingAllGather(_Gathers):
    """The same where sizes are agreed on in every call; graphs break here."""

    before = outside_graphs(_Gathers.before)
    after = outside_graphs(_Gathers.after)


class CompactAllGather(_Gathers, CompactAllReduce):
    """For modules that know no sentinel; graphs break here."""

    before = outside_graphs(_Gathers.before)
    after = outside_graphs(_Gathers.after)


class AskingAllGather(_Gathers, AskingAllReduce):
    """For modules that may change their mind; graphs break here, too."""

    before = outside_graphs(_Gathers.before)
    after = outside_graphs(_Gathers.after)
