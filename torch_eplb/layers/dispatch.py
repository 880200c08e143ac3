"""The hooks of one MoE layer: count, choose replicas, bring tokens to experts and back.

One class per way of bringing tokens to experts, all with the same two hooks. A worked example of
`AllToAll` with 2 ranks of 3 slots, 4 experts, placement ``[[0, 1, 2], [3, 0, 1]]`` (so physical
experts 0..5 hold 0 1 2 | 3 0 1), top-1::

    rank 0 has tokens a b c for experts 0 0 3 and rank 1 has tokens d e for experts 0 2
    choose a replica:   a -> 0, b -> 4, c -> 3          d -> 4, e -> 2       (physical experts)
    send in slot order: a to rank 0, c b to rank 1      e to rank 0, d to rank 1
    rank 0 computes     a in slot 0, e in slot 2;       rank 1: c in slot 0, b and d in slot 1
    results travel back the same way, are put in the callers' order, weighted and summed over K.

What a router's ids may be besides experts, and the bin that such choices go to, is said in
`torch_eplb.routing.ids`.

Shape suffixes: T tokens, K choices per token, N = T * K, H hidden, E logical experts, R ranks,
S slots per rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.functional import pad

from torch_eplb.layers.collectives import (
    all_gather_counts,
    exchange_counts,
    exchange_rows,
    share_input,
    sum_output,
)
from torch_eplb.layers.context import LayerContext, Trips, recomputing
from torch_eplb.layers.experts import ExpertLayer
from torch_eplb.layers.graphs import note_traced, outside_graphs
from torch_eplb.routing import (
    PADDING,
    choose_from_table,
    choose_locally,
    count_hits,
    logical_ids,
    narrow,
    order_by_id,
    plan_dispatch,
    zero_compute,
)
from torch_eplb.values.choices import DispatchKind, DispatchName
from torch_eplb.values.errors import EPLBError

__all__ = ["BoundToRanks", "Dispatch", "make_dispatch"]


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
        if self.returns:
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
        spec = self.layer.spec
        if spec.needs_two_choices:  # the second is a zero-compute expert: past the local slots
            ids = pad(ids, (0, 1), value=self.context.tables.num_slots)
            weights = pad(weights, (0, 1))
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
        """Which rows are counted, bool ``[T]``; None is all."""
        named = self.layer.arguments.find(self.layer.spec.token_mask, args, kwargs)
        return self.context.tokens.rows(num_tokens, named, self.layer.name)

    def _choose(self, ids_TK: torch.Tensor, counted_T: torch.Tensor | None) -> torch.Tensor:
        """Physical ids ``[T, K]`` for logical ones of this rank's own tokens; counts them."""
        tables, num_ranks = self.context.tables, self.context.comm.num_ranks
        hits_E = count_hits(ids_TK, self.layer.num_experts)
        if tables.choice_LBP is not None:
            physical_TK = choose_from_table(ids_TK, tables.choice_LBP[self.index])
        else:
            physical_TK = choose_locally(
                ids_TK,
                hits_E,
                tables.slots_LEM[self.index],
                num_ranks,
                tables.num_slots,
                tables.solver_LEM[self.index],
            )
        ranks_TK = physical_TK // tables.num_slots
        if counted_T is None:
            self._count(hits_E, count_hits(ranks_TK, num_ranks))
        else:
            self._count_some(ids_TK, ranks_TK, counted_T)
        return physical_TK

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


class AllToAll(Dispatch):
    """Every rank has its own tokens; each (token, choice) travels to the rank of its slot.

    One row per choice makes every row the work of exactly one expert, so any module's forward can
    compute them, and the weighted sum over K happens at home in a fixed order.
    """

    def __init__(self, layer: ExpertLayer, index: int, context: LayerContext) -> None:
        super().__init__(layer, index, context)
        self._trips: Trips[_Trip] = Trips(layer.name)
        self._empty: tuple[torch.Tensor, ...] | None = None  # a call without tokens

    @outside_graphs
    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden_TH, router_ids, weights_TK = self._read(args, kwargs)
        self._begin()
        if self._empty is None:
            self._empty = tuple(x[:0].detach() for x in (hidden_TH, router_ids, weights_TK))
        with torch.no_grad():
            ids_TK = self._logical(router_ids)
            counted_T = self._tokens(len(ids_TK), args, kwargs)
            order_N, send_RS, receive_RS, positions_R = self._route(ids_TK, counted_T)
            *sizes, positions = torch.stack(
                (send_RS.sum(1), receive_RS.sum(1), positions_R)
            ).tolist()
            self.context.position.compare(positions)
            num_sent, num_received = sum(sizes[0]), sum(sizes[1])
            order_N = order_N[:num_sent]  # what is in the bin stands behind all that is sent
            slots = torch.arange(self.context.tables.num_slots, device=ids_TK.device)
            local_ids = torch.repeat_interleave(
                slots.repeat(self.context.comm.num_ranks),
                receive_RS.reshape(-1).to(ids_TK.device, non_blocking=True),
                output_size=num_received,
            )
        shape = self._hidden_states(args, kwargs).shape
        rows = hidden_TH.index_select(0, order_N // ids_TK.shape[1])
        rows = exchange_rows(rows, sizes[0], sizes[1], self.context.comm)
        ones = weights_TK.new_ones(num_received, 1)
        local_ids = narrow(local_ids, router_ids.dtype, self.context.tables.num_slots)
        rows, ids, ones = _never_empty(rows, local_ids.view(-1, 1), ones)
        identity = self._identity(hidden_TH, router_ids, weights_TK)
        self._trips.begin(rows, _Trip(order_N, sizes, weights_TK, shape, identity))
        return self._replace(args, kwargs, rows, ids, ones)

    def _route(
        self, ids_TK: torch.Tensor, counted_T: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """The order in which choices are sent, how many go to and come for every slot, and where
        every rank is.

        The order is on the device; for ``replica_choice="batch"`` the counts are on the host, where
        the split sizes are needed anyway.
        """
        context, comm, tables = self.context, self.context.comm, self.context.tables
        if tables.replica_choice == "batch":
            hits_E = count_hits(ids_TK, self.layer.num_experts)
            position = context.position.enter(self.index)
            counts = all_gather_counts(pad(hits_E, (0, 1), value=position), comm).cpu()
            order_N, send_RS, receive_RS = plan_dispatch(
                ids_TK,
                counts[:, :-1],
                comm.rank,
                tables.host_slots_LEM[self.index],
                comm.num_ranks,
                tables.num_slots,
                tables.topology.ranks_per_node,
            )
            sent_R = send_RS.sum(1).to(ids_TK.device)
            if counted_T is None:
                self._count(hits_E, sent_R)
            else:
                self._count_some(ids_TK, _ranks_of(order_N, sent_R, ids_TK), counted_T)
            return order_N, send_RS, receive_RS, counts[:, -1]
        physical_N = self._choose(ids_TK, counted_T).view(-1)
        send_RS = count_hits(physical_N, comm.num_ranks * tables.num_slots)
        send_RS = send_RS.view(comm.num_ranks, tables.num_slots)
        position = context.position.enter(self.index)
        received = exchange_counts(pad(send_RS, (0, 1), value=position), comm)
        return order_by_id(physical_N), send_RS, received[:, :-1], received[:, -1]

    def visit(self) -> None:
        if self._empty is None:
            raise EPLBError(
                f"layer {self.layer.name} has not been called on this rank yet, so the size and "
                "dtype of what the other ranks send are not known: make one forward on every rank "
                "first, a warm-up say"
            )
        spec = self.layer.spec
        assert spec.expert_weights is not None
        names = (spec.hidden_states, spec.expert_ids, spec.expert_weights)
        self.layer.module(**dict(zip(names, self._empty, strict=True)))

    @outside_graphs
    def after(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: torch.Tensor,
    ) -> torch.Tensor:
        trip = self._trips.end(self._hidden_states(args, kwargs))
        output = _without_padding(output, sum(trip.sizes[1]))
        rows = exchange_rows(output, trip.sizes[1], trip.sizes[0], self.context.comm)
        self.context.position.leave(self.index)
        rows, back_N, weights_TK = _at_home(rows, trip.order_N, trip.weights_TK)
        results_TKH = rows.index_select(0, back_N).view(*weights_TK.shape, rows.shape[1:].numel())
        summed = (results_TKH * weights_TK.unsqueeze(-1)).sum(1).to(output.dtype)
        return _shaped(summed, trip.identity, trip.shape, output)


@dataclass(frozen=True)
class _Trip:
    """What `AllToAll` keeps from the way there for the way back.

    Attributes:
        order_N: the choices whose results come back, in that order; fewer than N where some went
            to the bin.
        identity: what zero-compute experts add.
    """

    order_N: torch.Tensor
    sizes: list[list[int]]
    weights_TK: torch.Tensor
    shape: torch.Size
    identity: torch.Tensor | None


def _shaped(
    summed_TH: torch.Tensor,
    identity: torch.Tensor | None,
    shape: torch.Size,
    output: torch.Tensor,
) -> torch.Tensor:
    """The layer's result: rows as the caller's inputs ``shape`` has them, each as in ``output``."""
    if identity is not None:
        summed_TH = summed_TH + identity
    return summed_TH.view(*shape[:-1], *output.shape[1:])


def _ranks_of(order_N: torch.Tensor, sent_R: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """``[T, K]``: the rank that each choice goes to, R for the bin."""
    ranks_N = order_N.new_full((ids_TK.numel(),), len(sent_R))
    ranks = torch.arange(len(sent_R), device=order_N.device)
    ranks_N[order_N] = torch.repeat_interleave(ranks, sent_R, output_size=len(order_N))
    return ranks_N.view(ids_TK.shape)


def _at_home(
    rows: torch.Tensor, order_N: torch.Tensor, weights_TK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The results ``[rows, H]`` of the choices ``order_N``, the row of every choice, and weights.

    Choices that nobody computed get a row of zeros and the weight 0, whatever the router says.
    """
    num_rows, num_choices = len(order_N), weights_TK.numel()
    back_N = order_N.new_full((num_choices,), num_rows)
    back_N[order_N] = torch.arange(num_rows, device=back_N.device)
    if num_rows < num_choices:
        rows = torch.cat((rows, rows.new_zeros(1, *rows.shape[1:])))
        weights_TK = weights_TK.masked_fill((back_N == num_rows).view(weights_TK.shape), 0.0)
    return rows, back_N, weights_TK


class AllReduce(Dispatch):
    """Ranks share the tokens; each computes the choices that fell on its slots.

    The choice of replica is the same function of the token on every rank: a rank-dependent one
    would count an expert twice, or never.
    """

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        comm, num_slots = self.context.comm, self.context.tables.num_slots
        spec, arguments = self.layer.spec, self.layer.arguments
        self._begin()
        ids = arguments.get(spec.expert_ids, args, kwargs)
        ids_TK = self._logical(ids.flatten(0, -2))
        counted_T = self._tokens(len(ids_TK), args, kwargs)
        physical = self._choose(ids_TK, counted_T).view(ids.shape)
        local = physical - comm.rank * num_slots
        foreign = (local < 0) | (local >= num_slots)  # the bin as well
        weights = share_input(arguments.get(spec.expert_weights, args, kwargs), comm)
        hidden = share_input(arguments.get(spec.hidden_states, args, kwargs), comm)
        return self._replace(
            args,
            kwargs,
            hidden,
            narrow(local.masked_fill(foreign, num_slots), ids.dtype, num_slots),
            weights.masked_fill(foreign, 0.0),
        )

    def after(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: torch.Tensor,
    ) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            self.context.position.exchanged()
        return sum_output(output, self.context.comm)


class CompactAllReduce(AllReduce):
    """The same for modules that know no sentinel: only the local choices are computed.

    Their number depends on the data, so it must reach the host, and graphs break here.
    """

    def __init__(self, layer: ExpertLayer, index: int, context: LayerContext) -> None:
        super().__init__(layer, index, context)
        self._trips: Trips[_Chosen] = Trips(layer.name)

    @outside_graphs
    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        comm, num_slots = self.context.comm, self.context.tables.num_slots
        self._begin()
        hidden_TH, router_ids, weights_TK = self._read(args, kwargs)
        shape = self._hidden_states(args, kwargs).shape
        ids_TK = self._logical(router_ids)
        counted_T = self._tokens(len(ids_TK), args, kwargs)
        local_N = (self._choose(ids_TK, counted_T) - comm.rank * num_slots).view(-1)
        chosen = ((local_N >= 0) & (local_N < num_slots)).nonzero().view(-1)
        tokens = chosen // ids_TK.shape[1]
        rows = share_input(hidden_TH, comm).index_select(0, tokens)
        weights = share_input(weights_TK, comm).reshape(-1)[chosen].view(-1, 1)
        local_ids = narrow(local_N[chosen].view(-1, 1), router_ids.dtype, num_slots)
        rows, local_ids, weights = _never_empty(rows, local_ids, weights)
        identity = self._identity(hidden_TH, router_ids, weights_TK)
        self._trips.begin(rows, _Chosen(tokens, shape, identity))
        return self._replace(args, kwargs, rows, local_ids, weights)

    @outside_graphs
    def after(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: torch.Tensor,
    ) -> torch.Tensor:
        chosen = self._trips.end(self._hidden_states(args, kwargs))
        output = _without_padding(output, len(chosen.tokens))
        summed = output.new_zeros((chosen.shape[:-1].numel(), output.shape[1:].numel()))
        summed = summed.index_add(0, chosen.tokens, output.flatten(1))
        self.context.position.exchanged()
        summed = sum_output(summed, self.context.comm)
        return _shaped(summed, chosen.identity, chosen.shape, output)


@dataclass(frozen=True)
class _Chosen:
    """What `CompactAllReduce` keeps: the token of every local choice, the inputs' shape, and what
    zero-compute experts add."""

    tokens: torch.Tensor
    shape: torch.Size
    identity: torch.Tensor | None


class AskingAllReduce(CompactAllReduce):
    """The same for modules that may change their mind: asked at each call whether they know it."""

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kind = AllReduce if self.layer.skips_sentinel else CompactAllReduce
        return kind.before(self, module, args, kwargs)

    def after(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: torch.Tensor,
    ) -> torch.Tensor:
        kind = AllReduce if self.layer.skips_sentinel else CompactAllReduce
        return kind.after(self, module, args, kwargs, output)


def _never_empty(
    rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One zero row for slot 0 where there is none at all.

    Not every experts module takes an empty batch. The row also keeps this rank in the autograd
    graph, whose backward is a collective.
    """
    if rows.shape[0]:
        return rows, ids, weights
    rows = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))
    return rows, ids.new_zeros(1, 1), weights.new_zeros(1, 1) + 0.0 * weights.sum()


def _without_padding(output: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The other way round."""
    return output if num_rows else output[:0] + 0.0 * output.sum()


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


def make_dispatch(
    layer: ExpertLayer, index: int, context: LayerContext, kind: DispatchKind
) -> Dispatch:
    """Install the hooks of one layer."""
    if kind.communicates:
        layer.compute_locally(context.tables.num_slots)
    return _classes(layer)[kind.name](layer, index, context)


def _classes(layer: ExpertLayer) -> dict[DispatchName, type[Dispatch]]:
    by_sentinel = {True: AllReduce, False: CompactAllReduce, None: AskingAllReduce}
    return {
        "all_to_all": AllToAll,
        "all_reduce": by_sentinel[layer.spec.skips_sentinel],
        "external": External,
    }
