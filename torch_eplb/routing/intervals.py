"""Which source sends how many tokens to which slot, from counts and quotas alone.

An expert's tokens stand in one order, source rank by source rank, and so do its replicas' quotas;
both cut the same line into intervals, and the overlap of a source's interval with a replica's
is what the one sends to the other. Before that, the same is done within each rank, then within
each node: tokens travel only where nearer replicas have no quota left. All in integers, so every
rank finds the same answer from the same counts, and needs no further message.

The counts and quotas of an expert are one column each, by rank ("dense"): `RoutingTables` keeps at
most one live replica of an expert per rank. Suffixes are those of `torch_eplb.routing.tables`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_eplb.routing.choose import choose_by_quota
from torch_eplb.routing.host import on_host, stable_order
from torch_eplb.routing.quotas import solve_quotas, solve_quotas_host

__all__ = ["DispatchPlan", "choose_locally", "interval_counts", "plan_dispatch"]


class DispatchPlan(NamedTuple):
    """What the all-to-all dispatch of one batch needs.

    Attributes:
        order_N: int64, flat positions (token * K + choice) in the order of sending: by
            destination rank, then slot, then position.
        send_RS: int64, choices that this rank sends to each slot of each rank.
        receive_RS: int64, choices that this rank's slots receive from each source rank.
    """

    order_N: Tensor
    send_RS: Tensor
    receive_RS: Tensor


def choose_locally(
    topk_ids_TK: Tensor, counts_E: Tensor, slots_EM: Tensor, num_ranks: int, slots_per_rank: int
) -> Tensor:
    """Physical ids that balance this batch alone over all ranks.

    Without communication: parts that are balanced one by one add up to a balanced whole. A
    function of the ids and the table only.

    Args:
        topk_ids_TK: int64 ``[tokens, top-k]``, logical ids.
        counts_E: int64 ``[experts]``, their `count_hits`.
        slots_EM: int64 ``[experts, M]``, physical ids padded with -1.
        num_ranks: R.
        slots_per_rank: S.

    Returns:
        int64 ``[tokens, top-k]``.

    >>> from torch_eplb.routing import count_hits
    >>> slots = torch.tensor([[0, 3], [1, -1], [2, -1]])   # 2 ranks of 2 slots
    >>> ids = torch.tensor([[0], [0], [2], [0], [0]])
    >>> choose_locally(ids, count_hits(ids, 3), slots, 2, 2).flatten().tolist()
    [0, 0, 2, 0, 3]
    """
    quotas_EM = solve_quotas(counts_E, slots_EM, num_ranks, slots_per_rank)
    return choose_by_quota(topk_ids_TK, quotas_EM, slots_EM)


def plan_dispatch(
    topk_ids_TK: Tensor,
    counts_RE: Tensor,
    source: int,
    slots_EM: Tensor,
    num_ranks: int,
    slots_per_rank: int,
    ranks_per_node: int | None = None,
) -> DispatchPlan:
    """Balance the batch of all ranks exactly, and say what this rank sends and receives.

    Args:
        topk_ids_TK: int64 ``[tokens, top-k]``, this rank's logical ids.
        counts_RE: int64 ``[ranks, experts]``, every rank's `count_hits`; row ``source`` is that of
            ``topk_ids_TK``. The same on all ranks, or they will wait for rows that never come.
        source: this rank.
        slots_EM: int64 ``[experts, M]``, physical ids padded with -1, one per rank.
        num_ranks: R.
        slots_per_rank: S.
        ranks_per_node: ranks on each node, to keep tokens on their node; None if all are on one.

    Two ranks of two slots; expert 0 sits in slots 0 and 3, and rank 1 has most of its tokens:

    >>> slots = torch.tensor([[0, 3], [1, -1], [2, -1]])
    >>> counts = torch.tensor([[1, 0, 1], [3, 1, 0]])    # 6 choices: 3 for each rank
    >>> plan = plan_dispatch(torch.tensor([[0], [1], [0], [0]]), counts, 1, slots, 2, 2)
    >>> plan.send_RS.tolist()           # one choice of 0 and that of 1 leave rank 1
    [[1, 1], [0, 2]]
    >>> plan.receive_RS.tolist()        # rank 0 sends expert 2's, rank 1 keeps two of expert 0's
    [[1, 0], [0, 2]]
    >>> plan.order_N.tolist()
    [0, 1, 2, 3]
    """
    groups = (ranks_per_node, num_ranks) if ranks_per_node else (num_ranks,)
    if on_host(topk_ids_TK):
        return _plan_host(
            topk_ids_TK.reshape(-1).long().numpy(),
            counts_RE.numpy(),
            source,
            slots_EM.numpy(),
            slots_per_rank,
            groups,
        )
    return _plan_device(
        topk_ids_TK.reshape(-1).long(), counts_RE, source, slots_EM, slots_per_rank, groups
    )


def interval_counts(
    counts_RE: Tensor,
    quotas_EM: Tensor,
    slots_EM: Tensor,
    num_ranks: int,
    slots_per_rank: int,
    ranks_per_node: int | None = None,
) -> Tensor:
    """How many choices every source rank sends to every physical expert.

    Row ``source`` and the columns of ``source`` are what `plan_dispatch` computes there.

    Args:
        counts_RE: int64 ``[ranks, experts]``, choices of every source rank.
        quotas_EM: int64 ``[experts, M]`` of all sources together (`solve_quotas`).
        slots_EM: int64 ``[experts, M]``, physical ids padded with -1.
        num_ranks: R.
        slots_per_rank: S.
        ranks_per_node: as in `plan_dispatch`.

    Returns:
        int64 ``[source ranks, ranks * slots]``.

    >>> slots = torch.tensor([[0, 3], [1, -1], [2, -1]])
    >>> counts = torch.tensor([[1, 0, 1], [3, 1, 0]])
    >>> interval_counts(counts, torch.tensor([[2, 2], [1, 0], [1, 0]]), slots, 2, 2).tolist()
    [[1, 0, 1, 0], [1, 1, 0, 2]]
    """
    groups = (ranks_per_node, num_ranks) if ranks_per_node else (num_ranks,)
    quotas_RE = _dense(quotas_EM, slots_EM, num_ranks, slots_per_rank)
    experts_RS = _experts_of_slots(slots_EM, num_ranks, slots_per_rank)
    none = counts_RE.new_zeros(num_ranks, 1)
    rows = []
    for source in range(num_ranks):
        send_RE, _ = _match(torch, counts_RE, quotas_RE, source, groups)
        rows.append(torch.cat((send_RE, none), 1).gather(1, experts_RS).reshape(-1))
    return torch.stack(rows)


def _dense(quotas_EM: Tensor, slots_EM: Tensor, num_ranks: int, slots_per_rank: int) -> Tensor:
    """Quotas by rank, ``[R, E]``; padding lands in an extra row."""
    ranks_ME = torch.where(slots_EM >= 0, slots_EM // slots_per_rank, num_ranks).t()
    result = quotas_EM.new_zeros(num_ranks + 1, quotas_EM.shape[0])
    return result.scatter_(0, ranks_ME, quotas_EM.t())[:num_ranks]


def _experts_of_slots(slots_EM: Tensor, num_ranks: int, slots_per_rank: int) -> Tensor:
    """The logical expert of every slot, ``[R, S]``; E where a slot gets no tokens."""
    num_experts, most = slots_EM.shape
    physical = num_ranks * slots_per_rank
    experts = torch.arange(num_experts, device=slots_EM.device).unsqueeze(1).expand(-1, most)
    result = slots_EM.new_full((physical + 1,), num_experts)
    index = torch.where(slots_EM >= 0, slots_EM, physical)
    result.scatter_(0, index.reshape(-1), experts.reshape(-1))
    return result[:physical].view(num_ranks, slots_per_rank)


def _match(
    xp: Any, counts_RE: Any, quotas_RE: Any, source: int, groups: Sequence[int]
) -> tuple[Any, Any]:
    """What ``source`` sends to each rank, and receives from each rank, per expert: two ``[R, E]``.

    Args:
        xp: ``torch`` or ``numpy``, whose arrays the others are.
        counts_RE: choices of every source rank.
        quotas_RE: what every rank's replica shall get; columns sum to those of ``counts_RE``.
        source: this rank.
        groups: ranks in each group of near ranks, ascending; the last is all of them.
    """
    num_ranks, num_experts = counts_RE.shape
    kept_RE = xp.minimum(counts_RE, quotas_RE)
    send_RE, receive_RE = xp.zeros_like(counts_RE), xp.zeros_like(counts_RE)
    send_RE[source] = kept_RE[source]
    receive_RE[source] = kept_RE[source]
    counts, quotas = counts_RE - kept_RE, quotas_RE - kept_RE
    for size in groups:
        shape = (num_ranks // size, size, num_experts)
        counts_GE, quotas_GE = counts.reshape(shape), quotas.reshape(shape)
        counts_end, quotas_end = counts_GE.cumsum(1), quotas_GE.cumsum(1)
        counts_begin, quotas_begin = counts_end - counts_GE, quotas_end - quotas_GE
        group, member = source // size, source % size
        peers = slice(group * size, group * size + size)
        begin = xp.maximum(counts_begin[group, member], quotas_begin[group])
        overlap = xp.minimum(counts_end[group, member], quotas_end[group]) - begin
        send_RE[peers] += overlap * (overlap > 0)
        begin = xp.maximum(counts_begin[group], quotas_begin[group, member])
        overlap = xp.minimum(counts_end[group], quotas_end[group, member]) - begin
        receive_RE[peers] += overlap * (overlap > 0)
        if size < num_ranks:
            # Both lines are used up from their beginning to where the shorter one ends.
            met = xp.minimum(counts_end[:, -1:], quotas_end[:, -1:])
            for left, ends, begins in (
                (counts, counts_end, counts_begin),
                (quotas, quotas_end, quotas_begin),
            ):
                left -= (xp.minimum(ends, met) - xp.minimum(begins, met)).reshape(left.shape)
    return send_RE, receive_RE


def _plan_device(
    ids_N: Tensor,
    counts_RE: Tensor,
    source: int,
    slots_EM: Tensor,
    slots_per_rank: int,
    groups: Sequence[int],
) -> DispatchPlan:
    """`plan_dispatch` in torch operations, without a host sync."""
    num_ranks = counts_RE.shape[0]
    counts_E = counts_RE.sum(0)
    quotas_EM = solve_quotas(counts_E, slots_EM, num_ranks, slots_per_rank)
    quotas_RE = _dense(quotas_EM, slots_EM, num_ranks, slots_per_rank)
    send_RE, receive_RE = _match(torch, counts_RE, quotas_RE, source, groups)
    experts_RS = _experts_of_slots(slots_EM, num_ranks, slots_per_rank)
    none = counts_E.new_zeros(num_ranks, 1)  # column E: slots without a live replica
    send_RS = torch.cat((send_RE, none), 1).gather(1, experts_RS)
    receive_RS = torch.cat((receive_RE, none), 1)[:, experts_RS[source]]

    # Rows sorted by expert hold each (expert, replica) in one piece, replicas ascending. Sending
    # takes the pieces in the order of slots: a piece's shift is where it starts minus where it
    # will start.
    by_expert_N = torch.sort(ids_N, stable=True).indices
    pieces_ER = send_RE.t().reshape(-1)
    starts_ER = (pieces_ER.cumsum(0) - pieces_ER).view(-1, num_ranks)
    starts_RE = torch.cat((starts_ER.t(), none), 1)
    sizes = send_RS.reshape(-1)
    shift = starts_RE.gather(1, experts_RS).reshape(-1) - (sizes.cumsum(0) - sizes)
    count = ids_N.shape[0]
    shift_N = torch.repeat_interleave(shift, sizes, output_size=count)
    order_N = by_expert_N[shift_N + torch.arange(count, device=ids_N.device)]
    return DispatchPlan(order_N, send_RS, receive_RS)


def _plan_host(
    ids_N: NDArray[np.int64],
    counts_RE: NDArray[np.int64],
    source: int,
    slots_EM: NDArray[np.int64],
    slots_per_rank: int,
    groups: Sequence[int],
) -> DispatchPlan:
    """`plan_dispatch` in numpy; intervals are computed for replicated experts only."""
    num_ranks, num_experts = counts_RE.shape
    own_E = counts_RE[source]
    first_E = slots_EM[:, 0]
    # By slot: what is sent to it, and where that begins among the rows sorted by expert.
    sent = np.zeros(num_ranks * slots_per_rank, dtype=np.int64)
    start = np.zeros_like(sent)
    sent[first_E] = own_E
    start[first_E] = own_E.cumsum() - own_E
    expert_of = np.full_like(sent, -1)
    expert_of[first_E] = np.arange(num_experts)
    mine_S = expert_of.reshape(num_ranks, slots_per_rank)[source]
    receive_RS = counts_RE[:, mine_S] * (mine_S >= 0)

    experts_X = np.flatnonzero(slots_EM[:, 1] >= 0) if slots_EM.shape[1] > 1 else first_E[:0]
    if len(experts_X):
        quotas_EM = solve_quotas_host(counts_RE.sum(0), slots_EM, num_ranks, slots_per_rank)
        slots_XM = slots_EM[experts_X]
        present_XM = slots_XM >= 0
        row, physical = np.nonzero(present_XM)[0], slots_XM[present_XM]
        rank = physical // slots_per_rank
        quotas_RX = np.zeros((num_ranks, len(experts_X)), dtype=np.int64)
        quotas_RX[rank, row] = quotas_EM[experts_X][present_XM]
        send_RX, receive_RX = _match(np, counts_RE[:, experts_X], quotas_RX, source, groups)
        sent[physical] = send_RX[rank, row]
        mine = rank == source
        receive_RS[:, physical[mine] - source * slots_per_rank] = receive_RX[:, row[mine]]
        pieces_XM = np.zeros_like(slots_XM)
        pieces_XM[present_XM] = sent[physical]
        starts_XM = start[slots_XM[:, :1]] + pieces_XM.cumsum(1) - pieces_XM
        start[physical] = starts_XM[present_XM]

    shift = start - (sent.cumsum() - sent)
    order_N = stable_order(ids_N)[np.repeat(shift, sent) + np.arange(len(ids_N))]
    return DispatchPlan(
        torch.from_numpy(order_N),
        torch.from_numpy(sent.reshape(num_ranks, slots_per_rank)),
        torch.from_numpy(receive_RS),
    )
