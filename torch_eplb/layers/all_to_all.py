"""Every rank has its own tokens; they travel to the ranks of their choices, and results back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import pad

from torch_eplb.layers.collectives import all_gather_counts, exchange_counts
from torch_eplb.layers.computing import ComputesChoices, shaped, without_padding
from torch_eplb.layers.graphs import outside_graphs
from torch_eplb.layers.journey import Journey
from torch_eplb.routing import count_hits, departures, divide, meet, plan_dispatch, to_device

__all__ = ["AllToAll"]

# Bytes of rows that may travel without carrying anything, so that sizes need not be asked for: an
# exchange and a wait take as long.
_IN_VAIN = {"cpu": 128 << 10}
_IN_VAIN_ON_DEVICES = 4 << 20


class _Split(NamedTuple):
    """A batch of all ranks, shared out.

    Attributes:
        physical_TK: the slots of this rank's choices.
        sent_R: how many choices go to each rank.
        send_R, receive_R: on the host, the same, and how many come from each rank.
        tokens_R: on the host, the tokens of each rank.
    """

    physical_TK: torch.Tensor
    sent_R: torch.Tensor
    send_R: torch.Tensor
    receive_R: torch.Tensor
    tokens_R: torch.Tensor


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
            row_bytes = 2 * hidden_TH.shape[1] * hidden_TH.element_size()
            journey = self._plan(ids_TK, counted_T, row_bytes)
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

    def _plan(
        self, ids_TK: torch.Tensor, counted_T: torch.Tensor | None, row_bytes: int
    ) -> Journey:
        """Choose replicas, count, and agree with the other ranks on the sizes of the exchange.

        Args:
            row_bytes: of a row, there and back.

        Raises:
            EPLBError: ranks are not in the same layer of the same step.
        """
        context, comm, num_slots = self.context, self.context.comm, self.context.tables.num_slots
        room_R = None
        if context.tables.replica_choice == "batch":
            split = self._choose_together(ids_TK, counted_T)
            physical_TK, num_choices = split.physical_TK, int(split.receive_R.sum())
            met_RT = meet(physical_TK, comm.num_ranks, num_slots)
            if self._sizes_may_be_bounds(split, row_bytes):
                send = split.send_R.clamp(max=len(ids_TK)).tolist()
                receive = torch.minimum(split.receive_R, split.tokens_R).tolist()
                room_R = split.sent_R.clamp(max=len(ids_TK))
            else:
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
        rows = departures(physical_TK, met_RT, sum(send), num_slots, room_R)
        return Journey(rows, send, receive, num_choices, num_slots, comm)

    def _sizes_may_be_bounds(self, split: _Split, row_bytes: int) -> bool:
        """Whether the ranks send as many rows as there may be, which all of them know.

        A rank gets no more rows than choices, and no more than there are tokens. How many fewer it
        gets is only known where the choices are: an answer takes an exchange and a wait. Without
        it, rows that carry nothing fill up; the more ranks or the fewer choices of a token, the
        fewer they are. The same on all ranks.
        """
        ranks, top_k = self.context.comm.num_ranks, split.physical_TK.shape[1]
        if ranks == 1:
            return True
        met = ranks * (1 - (1 - 1 / ranks) ** top_k)  # by a token whose choices are spread evenly
        in_vain = int(split.tokens_R.max()) * (min(ranks, top_k) - met)
        device = split.physical_TK.device.type
        return in_vain * row_bytes <= _IN_VAIN.get(device, _IN_VAIN_ON_DEVICES)

    def _choose_together(self, ids_TK: torch.Tensor, counted_T: torch.Tensor | None) -> _Split:
        """Share the choices out on the counts of all ranks."""
        context, comm, tables = self.context, self.context.comm, self.context.tables
        hits_E = count_hits(ids_TK, self.layer.num_experts)
        position = context.position.enter(self.index)
        header = pad(pad(hits_E, (0, 1), value=len(ids_TK)), (0, 1), value=position)
        counts = all_gather_counts(header, comm).cpu()
        context.position.compare(counts[:, -1].tolist())
        order_N, send_RS, receive_RS, most_active = plan_dispatch(
            ids_TK,
            counts[:, :-2],
            comm.rank,
            tables.host_slots(self.index),
            comm.num_ranks,
            tables.num_slots,
            tables.topology.ranks_per_node,
            tables.weight_tokens,
        )
        context.traffic.add_active(most_active)
        sent_RS, send_R = to_device(send_RS, ids_TK.device), send_RS.sum(1)
        sent_R = sent_RS.sum(1)
        physical_TK = self._in_place(order_N, sent_RS, int(send_R.sum()), ids_TK)
        if counted_T is None:
            self._count(hits_E, sent_R)
        else:
            self._count_some(ids_TK, divide(physical_TK, tables.num_slots), counted_T)
        return _Split(physical_TK, sent_R, send_R, receive_RS.sum(1), counts[:, -2])

    def _in_place(
        self, order_N: torch.Tensor, sent_RS: torch.Tensor, num_sent: int, ids_TK: torch.Tensor
    ) -> torch.Tensor:
        """Physical ids ``[T, K]`` of choices that stand in the order of sending; what is in the bin
        is not sent, or stands behind."""
        slots = torch.arange(self._bin, device=ids_TK.device)
        in_order = torch.repeat_interleave(slots, sent_RS.view(-1), output_size=num_sent)
        physical_N = order_N.new_full((ids_TK.numel(),), self._bin)
        return physical_N.scatter_(0, order_N[:num_sent], in_order).view(ids_TK.shape)
