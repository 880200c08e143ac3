"""Every rank has its own tokens; they travel to the ranks of their choices, and results back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from torch_eplb.layers.collectives import all_gather_counts, exchange_counts
from torch_eplb.layers.computing import ComputesChoices, shaped, without_padding
from torch_eplb.layers.graphs import outside_graphs
from torch_eplb.layers.journey import Journey
from torch_eplb.routing import count_hits, departures, divide, meet, plan_dispatch, to_device

__all__ = ["AllToAll"]


@dataclass(frozen=True)
class _Trip:
    """What `AllToAll` keeps from the way there for the way back.

    Attributes:
        journey: of the call's rows.
        weights_C: weights of the choices that are computed here.
        shape: of the inputs.
        identity: what zero-compute experts add.
    """

    journey: Journey
    weights_C: torch.Tensor
    shape: torch.Size
    identity: torch.Tensor | None


class AllToAll(ComputesChoices[_Trip]):
    """Sends every token once to each rank that holds a slot it goes to; see `Journey`."""

    @outside_graphs
    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden_TH, router_ids, weights_TK = self._read(args, kwargs)
        self._begin()
        self._remember(hidden_TH, router_ids, weights_TK)
        with torch.no_grad():
            ids_TK = self._logical(router_ids)
            counted_T = self._tokens(len(ids_TK), args, kwargs)
            journey = self._plan(ids_TK, counted_T)
        rows_CH, weights_C = journey.send(hidden_TH, weights_TK)
        identity = self._identity(hidden_TH, router_ids, weights_TK)
        shape = self._hidden_states(args, kwargs).shape
        trip = _Trip(journey, weights_C, shape, identity)
        return self._enter(args, kwargs, rows_CH, journey.found.slots_C, trip)

    @outside_graphs
    def after(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: torch.Tensor,
    ) -> torch.Tensor:
        trip = self._leave(args, kwargs)
        results_CH = without_padding(output, len(trip.weights_C))
        summed = trip.journey.bring_back(results_CH, trip.weights_C)
        self.context.position.leave(self.index)
        self.context.traffic.add(trip.journey.num_rows, trip.journey.nbytes)
        return shaped(summed, trip.identity, trip.shape, output)

    # ---- who goes where -------------------------------------------------------------------------

    def _plan(self, ids_TK: torch.Tensor, counted_T: torch.Tensor | None) -> Journey:
        """Choose replicas, count, and agree with the other ranks on the sizes of the exchange.

        Raises:
            EPLBError: ranks are not in the same layer of the same step.
        """
        context, comm, num_slots = self.context, self.context.comm, self.context.tables.num_slots
        if context.tables.replica_choice == "batch":
            physical_TK, num_choices = self._choose_together(ids_TK, counted_T)
            met_RT = meet(physical_TK, comm.num_ranks, num_slots)
            rows_R = met_RT.sum(1)
            send, receive = torch.stack((rows_R, exchange_counts(rows_R, comm))).tolist()
        else:
            physical_TK = self._choose(ids_TK, counted_T)
            met_RT = meet(physical_TK, comm.num_ranks, num_slots)
            rows_R = met_RT.sum(1)
            choices_R = count_hits(divide(physical_TK, num_slots), comm.num_ranks)
            here = torch.full_like(rows_R, context.position.enter(self.index))
            theirs = exchange_counts(torch.stack((rows_R, choices_R, here), dim=1), comm)
            send, receive, choices, positions = torch.cat(
                (rows_R.unsqueeze(0), theirs.t())
            ).tolist()
            context.position.compare(comm.heard(positions))
            num_choices = sum(choices)
        rows = departures(physical_TK, met_RT, sum(send), num_slots)
        return Journey(rows, send, receive, num_choices, num_slots, comm)

    def _choose_together(
        self, ids_TK: torch.Tensor, counted_T: torch.Tensor | None
    ) -> tuple[torch.Tensor, int]:
        """Physical ids ``[T, K]`` on the counts of all ranks, and how many choices come here."""
        context, comm, tables = self.context, self.context.comm, self.context.tables
        hits_E = count_hits(ids_TK, self.layer.num_experts)
        position = context.position.enter(self.index)
        counts = all_gather_counts(pad(hits_E, (0, 1), value=position), comm).cpu()
        context.position.compare(counts[:, -1].tolist())
        order_N, send_RS, receive_RS, most_active = plan_dispatch(
            ids_TK,
            counts[:, :-1],
            comm.rank,
            tables.host_slots(self.index),
            comm.num_ranks,
            tables.num_slots,
            tables.topology.ranks_per_node,
            tables.weight_tokens,
        )
        context.traffic.add_active(most_active)
        physical_TK = self._in_place(order_N, send_RS, ids_TK)
        if counted_T is None:
            self._count(hits_E, to_device(send_RS.sum(1), ids_TK.device))
        else:
            self._count_some(ids_TK, divide(physical_TK, tables.num_slots), counted_T)
        return physical_TK, int(receive_RS.sum())

    def _in_place(
        self, order_N: torch.Tensor, send_RS: torch.Tensor, ids_TK: torch.Tensor
    ) -> torch.Tensor:
        """Physical ids ``[T, K]`` of choices that stand in the order of sending."""
        num_sent = int(send_RS.sum())  # what is in the bin is not, or stands behind
        slots = torch.arange(self._bin, device=ids_TK.device)
        sizes = to_device(send_RS.reshape(-1), ids_TK.device)
        in_order = torch.repeat_interleave(slots, sizes, output_size=num_sent)
        physical_N = order_N.new_full((ids_TK.numel(),), self._bin)
        return physical_N.scatter_(0, order_N[:num_sent], in_order).view(ids_TK.shape)
