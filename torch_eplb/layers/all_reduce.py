"""Ranks hold the same tokens; each computes what fell on its slots, and outputs are summed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_eplb.layers.collectives import share_input, sum_output
from torch_eplb.layers.computing import ComputesChoices, shaped, without_padding
from torch_eplb.layers.graphs import outside_graphs
from torch_eplb.layers.hooks import capturing
from torch_eplb.layers.sums import Bags, weighted_sum
from torch_eplb.routing import arrivals, narrow

__all__ = ["AllReduce", "AskingAllReduce", "CompactAllReduce"]

_MANY = 1024  # choices of a batch from which on looking for one's own pays


@dataclass(frozen=True)
class _Trip:
    """What is kept of a call whose local choices alone are computed.

    Attributes:
        bags: the choices of each token.
        weights_C: their weights.
        shape: of the inputs.
        identity: what zero-compute experts add.
    """

    bags: Bags
    weights_C: torch.Tensor
    shape: torch.Size
    identity: torch.Tensor | None


class AllReduce(ComputesChoices[_Trip]):
    """For modules that skip foreign choices: these are marked, and no shape depends on data.

    The choice of replica is the same function of the token on every rank: a rank-dependent one
    would count an expert twice, or never. Where a shape may depend on data, which nothing but
    eager code allows, and the batch is large, the module is called with the local choices alone:
    its results are the same, and it need not carry rows that it skips.
    """

    _top_k = 0  # of the last eager call
    _many = _MANY

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._begin()
        return self._localise(args, kwargs)

    def after(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: torch.Tensor,
    ) -> torch.Tensor:
        return self._finish(args, kwargs, output)

    def _share(self, value: torch.Tensor) -> torch.Tensor:
        """What all ranks hold, for what each does with it."""
        return share_input(value, self.context.comm)

    def _sum(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' results."""
        return sum_output(partial, self.context.comm)

    def _localise(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The module's arguments for what this rank computes of everybody's tokens."""
        ids = self.layer.arguments.get(self.layer.spec.expert_ids, args, kwargs)
        if torch.compiler.is_compiling():
            return self._mark_foreign(args, kwargs)
        self._top_k = ids.shape[-1]
        is_worth_it = self._top_k > 1 and ids.numel() >= self._many
        if is_worth_it and not capturing(ids.device):
            return self._pick_local(args, kwargs)
        return self._mark_foreign(args, kwargs)

    def _finish(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor:
        """The layer's result, of all ranks' outputs."""
        ids = self.layer.arguments.get(self.layer.spec.expert_ids, args, kwargs)
        if self._top_k > 1 and ids.shape[-1] == 1:  # one row per choice
            return self._sum_local(args, kwargs, output)
        if not torch.compiler.is_compiling():
            self.context.position.exchanged()
        return self._sum(output)

    def _local(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], ids_TK: torch.Tensor
    ) -> torch.Tensor:
        """Local slots ``[T, K]`` of the choices, S for those of others and of nobody; counts."""
        num_slots = self.context.tables.num_slots
        ids_TK = self._logical(ids_TK)
        counted_T = self._tokens(len(ids_TK), args, kwargs)
        local_TK = self._choose(ids_TK, counted_T) - self.context.comm.rank * num_slots
        return local_TK.masked_fill((local_TK < 0) | (local_TK >= num_slots), num_slots)

    def _mark_foreign(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        num_slots = self.context.tables.num_slots
        spec, arguments = self.layer.spec, self.layer.arguments
        ids = arguments.get(spec.expert_ids, args, kwargs)
        local = self._local(args, kwargs, ids.flatten(0, -2)).view(ids.shape)
        weights = self._share(arguments.get(spec.expert_weights, args, kwargs))
        hidden = self._share(arguments.get(spec.hidden_states, args, kwargs))
        return self._replace(
            args,
            kwargs,
            hidden,
            narrow(local, ids.dtype, num_slots),
            weights.masked_fill(local == num_slots, 0.0),
        )

    @outside_graphs
    def _pick_local(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden_TH, router_ids, weights_TK = self._read(args, kwargs)
        with torch.no_grad():
            local_TK = self._local(args, kwargs, router_ids)
            found = arrivals(local_TK, self.context.tables.num_slots)
        rows_CH = self._share(hidden_TH).index_select(0, found.row_C)
        weights_C = self._share(weights_TK).reshape(-1).index_select(0, found.flat_C)
        bags = Bags(found.by_row_C, found.begin_Q, found.row_C)
        identity = self._identity(hidden_TH, router_ids, weights_TK)
        trip = _Trip(bags, weights_C, self._result_shape(args, kwargs), identity)
        return self._enter(args, kwargs, rows_CH, found.slots_C, trip)

    def _result_shape(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Size:
        return self._hidden_states(args, kwargs).shape

    @outside_graphs
    def _sum_local(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor:
        trip = self._leave(args, kwargs)
        results_CH = without_padding(output, len(trip.weights_C))
        summed = weighted_sum(results_CH, trip.weights_C, trip.bags)
        self.context.position.exchanged()
        return shaped(self._sum(summed), trip.identity, trip.shape, output)


class CompactAllReduce(AllReduce):
    """The same for modules that know no sentinel: only the local choices are ever computed.

    Their number depends on the data, so it must reach the host, and graphs break here.
    """

    before = outside_graphs(AllReduce.before)
    after = outside_graphs(AllReduce.after)

    def _localise(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self._pick_local(args, kwargs)

    def _finish(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor:
        return self._sum_local(args, kwargs, output)


class AskingAllReduce(CompactAllReduce):
    """The same for modules that may change their mind: asked at each call whether they know it."""

    @property
    def _kind(self) -> type[AllReduce]:
        return AllReduce if self.layer.skips_sentinel else CompactAllReduce

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self._kind.before(self, module, args, kwargs)

    def after(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: torch.Tensor,
    ) -> torch.Tensor:
        return self._kind.after(self, module, args, kwargs, output)

    def _localise(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self._kind._localise(self, args, kwargs)

    def _finish(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor:
        return self._kind._finish(self, args, kwargs, output)
