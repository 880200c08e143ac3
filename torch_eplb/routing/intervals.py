"""Which source sends how many tokens to which slot, from counts and quotas alone.

An expert's tokens stand in one order, source rank by source rank, and so do its replicas' quotas;
both cut the same line into intervals, and the overlap of a source's interval with a replica's
is what the one sends to the other. Before that, the same is done within each rank, then within
each node: tokens travel only where nearer replicas have no quota left. All in integers, so every
rank finds the same answer from the same counts, and needs no further message.

The counts and the quotas of an expert are one column each, by rank: `RoutingTables` keeps at most
one live replica of an expert per rank. Suffixes are those of `torch_eplb.routing.tables`, and X
counts replicated experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_eplb.routing.choose import choose_by_quota, order_by_id
from torch_eplb.routing.costs import active_experts, split_batch, split_layout
from torch_eplb.routing.device import to_device
from torch_eplb.routing.host import on_host, stable_order
from torch_eplb.routing.layouts import Layout
from torch_eplb.routing.quotas import solve_quotas

__all__ = ["DispatchPlan", "choose_locally", "interval_counts", "plan_dispatch"]


class DispatchPlan(NamedTuple):
    """What the all-to-all dispatch of one batch needs.

    Attributes:
        order_N: int64 on the device of the ids, flat positions (token * K + choice) in the order of
            sending: by destination rank, then slot, then position. Those in the bin are left out.
        send_RS: int64 on the host, choices that this rank sends to each slot of each rank.
        receive_RS: int64 on the host, choices that this rank's slots receive from each source.
        most_active: the most slots with choices on any rank.
    """

    order_N: Tensor
    send_RS: Tensor
    receive_RS: Tensor
    most_active: int


def choose_locally(
    topk_ids_TK: Tensor,
    counts_E: Tensor,
    slots_EM: Tensor,
    num_ranks: int,
    slots_per_rank: int,
    solver_EM: Tensor | None = None,
    weight_tokens: int = 0,
    home_EM: Tensor | None = None,
) -> Tensor:
    """Physical ids that balance this batch alone over all ranks.

    Without communication: parts that are balanced one by one add up to a balanced whole. A
    function of the ids and the tables only.

    Args:
        topk_ids_TK: int64 ``[tokens, top-k]``, logical ids.
        counts_E: int64 ``[experts]``, their `count_hits`.
        slots_EM: int64 ``[experts, M]``, physical ids padded with -1. Where it makes no difference
            to the balance, an expert's first replicas get the tokens.
        num_ranks: R.
        slots_per_rank: S.
        solver_EM: the same with ranks renamed so that rows ascend (`RoutingTables.solver_LEM` of a
            layer); None where they do.
        weight_tokens: W of `split_batch`.
        home_EM: int64 ``[experts, M]``, 1 at the replica that an expert with few tokens keeps to
            (`RoutingTables.home_LEM` of a layer); None if the batch is that of all ranks, which
            then agree without it.

    Returns:
        int64 ``[tokens, top-k]``; R * S for choices that are in the bin.

    >>> from torch_eplb.routing import count_hits
    >>> slots = torch.tensor([[0, 3], [1, -1], [2, -1]])   # 2 ranks of 2 slots
    >>> ids = torch.tensor([[0], [0], [2], [0], [0]])
    >>> choose_locally(ids, count_hits(ids, 3), slots, 2, 2).flatten().tolist()
    [0, 0, 2, 0, 3]
    """
    seen_EM = slots_EM if solver_EM is None else solver_EM
    if home_EM is None:
        quotas_EM = split_batch(counts_E, seen_EM, num_ranks, slots_per_rank, weight_tokens)
    else:
        # Other ranks' batches are taken to be as large as this one: so all of them let an expert's
        # tokens meet at its home where they do not fill the time that its weights take.
        quotas_EM = solve_quotas(counts_E, seen_EM, num_ranks, slots_per_rank)
        few_E1 = (counts_E * num_ranks <= weight_tokens).unsqueeze(1)
        quotas_EM = torch.where(few_E1, home_EM * counts_E.unsqueeze(1), quotas_EM)
    bin_id = num_ranks * slots_per_rank
    return choose_by_quota(topk_ids_TK, quotas_EM, slots_EM, bin_id=bin_id)


def plan_dispatch(
    topk_ids_TK: Tensor,
    counts_RE: Tensor,
    source: int,
    slots_EM: Tensor,
    num_ranks: int,
    slots_per_rank: int,
    ranks_per_node: int | None = None,
    weight_tokens: int = 0,
) -> DispatchPlan:
    """Balance the batch of all ranks exactly, and say what this rank sends and receives.

    Sizes are computed on the host, which needs them anyway to post the exchange: reading the
    counts is the only host sync, and the quotas take less time there than on a device.

    Args:
        topk_ids_TK: int64 ``[tokens, top-k]``, this rank's logical ids.
        counts_RE: int64 ``[ranks, experts]``, every rank's `count_hits`; row ``source`` is that of
            ``topk_ids_TK``. The same on all ranks, or they will wait for rows that never come.
        source: this rank.
        slots_EM: int64 ``[experts, M]``, physical ids padded with -1, one per rank; on the host
            (`RoutingTables.host_slots` of a layer), or it costs another sync.
        num_ranks: R.
        slots_per_rank: S.
        ranks_per_node: ranks on each node, to keep tokens on their node; None if all are on one.
        weight_tokens: W of `split_batch`.

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
    counts, slots = counts_RE.cpu().numpy(), slots_EM.cpu().numpy()
    layout = Layout.of(slots, num_ranks, slots_per_rank)
    quotas = split_layout(counts.sum(0), layout, weight_tokens)
    groups = _groups(num_ranks, ranks_per_node)
    sent, shift, received = _sizes(counts, quotas, source, layout, groups)
    return DispatchPlan(
        _order_of_sending(topk_ids_TK.reshape(-1).long(), shift, sent),
        torch.from_numpy(sent.reshape(num_ranks, slots_per_rank)),
        torch.from_numpy(received),
        int(active_experts(quotas, slots, num_ranks, slots_per_rank).max()),
    )


def _order_of_sending(
    ids_N: Tensor, shift_P: NDArray[np.int64], sent_P: NDArray[np.int64]
) -> Tensor:
    """`DispatchPlan.order_N`: rows sorted by expert hold what goes to one slot in one piece, and
    the shift of `_sizes` says where."""
    num_sent = int(sent_P.sum())
    if on_host(ids_N):
        place_N = shift_P.repeat(sent_P)
        place_N += np.arange(num_sent)
        return torch.from_numpy(stable_order(ids_N.numpy()).take(place_N))
    pieces = to_device(torch.from_numpy(np.stack((shift_P, sent_P))), ids_N.device)
    begin_N = torch.repeat_interleave(pieces[0], pieces[1], output_size=num_sent)
    begin_N += torch.arange(num_sent, device=ids_N.device)
    return order_by_id(ids_N).gather(0, begin_N)


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
    groups = _groups(num_ranks, ranks_per_node)
    arrays = counts_RE.cpu().numpy(), quotas_EM.cpu().numpy()
    layout = Layout.of(slots_EM.cpu().numpy(), num_ranks, slots_per_rank)
    rows = [_sizes(*arrays, source, layout, groups)[0] for source in range(num_ranks)]
    return torch.from_numpy(np.stack(rows))


def _groups(num_ranks: int, ranks_per_node: int | None) -> tuple[int, ...]:
    """Ranks in each group of near ranks, ascending; the last is all of them."""
    if ranks_per_node is None or ranks_per_node >= num_ranks:
        return (num_ranks,)
    return (ranks_per_node, num_ranks)


def _sizes(
    counts_RE: NDArray[np.int64],
    quotas_EM: NDArray[np.int64],
    source: int,
    layout: Layout,
    groups: Sequence[int],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """What ``source`` sends and receives.

    Returns:
        - ``[R * S]``, choices sent to each physical expert;
        - ``[R * S]``, for the choices of each physical expert, their position among this rank's
          choices sorted by expert, less their position in the order of sending;
        - ``[R, S]``, choices that the slots of ``source`` receive from each rank.
    """
    own_E = counts_RE[source]
    first_E, per_rank = layout.slots_EM[:, 0], layout.slots_per_rank
    # All by physical expert. An expert without replicas has one interval: all of its tokens.
    sent: NDArray[np.int64] = np.zeros(layout.num_ranks * per_rank, dtype=np.int64)
    start: NDArray[np.int64] = np.zeros_like(sent)
    sent[first_E] = own_E
    start[first_E] = own_E.cumsum() - own_E
    mine_S = layout.expert_P[source * per_rank : (source + 1) * per_rank]
    received_RS = counts_RE[:, mine_S] * (mine_S >= 0)
    if len(layout.experts_X):
        lines = _Lines(counts_RE, source, layout, quotas_EM)
        sent_F, received_RM = lines.match(groups)
        sent[layout.physical_F] = sent_F
        received_RS[:, layout.physical_F[lines.mine] - source * per_rank] = received_RM
        # An expert's replicas take contiguous pieces of its tokens, in ascending order.
        before_F = _running_sums(sent_F, layout.head_F) - sent_F
        start[layout.physical_F] = start[layout.physical_F[layout.head_F]] + before_F
    shift: NDArray[np.int64] = np.subtract(start, sent.cumsum() - sent)
    return sent, shift, received_RS


class _Lines:
    """The tokens and the quotas of experts with replicas, as lines that meet piece by piece.

    Only what ``source`` sends and receives is worked out: of the other ranks' tokens just where
    they end, and all ranks' tokens for the replicas on ``source``. Suffixes: F replicas, those of
    an expert one after another by rank; X their experts; G groups of ranks; M replicas here.

    Args:
        counts_RE: choices of every source rank.
        source: this rank.
        layout: where the replicas are.
        quotas_EM: what each replica shall get; rows sum to the experts' counts.
    """

    def __init__(
        self,
        counts_RE: NDArray[np.int64],
        source: int,
        layout: Layout,
        quotas_EM: NDArray[np.int64],
    ) -> None:
        self.counts_RE, self.source, self.experts_X = counts_RE, source, layout.experts_X
        self.row_F, self.rank_F, self.head_F = layout.row_F, layout.rank_F, layout.head_F
        quota_F = quotas_EM.reshape(-1).take(layout.flat_F)
        # First of all a rank keeps what its own replica may get.
        self.kept_F = np.minimum(counts_RE[layout.rank_F, layout.expert_F], quota_F)
        self.quota_F = quota_F - self.kept_F
        self.mine = np.flatnonzero(layout.rank_F == source)

    def match(self, groups: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What ``source`` sends to each replica, and what its own receive from each rank.

        Args:
            groups: ranks in each group of near ranks, ascending; the last is all of them. A group
                is matched by itself before a larger one is.

        Returns:
            ``[F]``; ``[R, M]``.
        """
        mine, source = self.mine, self.source
        own_X = self.counts_RE[source, self.experts_X]
        own_X[self.row_F[mine]] -= self.kept_F[mine]
        theirs_RM = self._left_for_mine()
        sent_F = np.zeros_like(self.quota_F)
        sent_F[mine] = self.kept_F[mine]
        received_RM = np.zeros_like(theirs_RM)
        received_RM[source] = self.kept_F[mine]
        begin_X = self._before(source)
        if len(groups) > 1:
            size = groups[0]
            group, first = source // size, source // size * size
            met_GX = self._met(size)
            in_group_X = begin_X - self._before(first)
            line_F = self.row_F * len(met_GX) + self.rank_F // size
            quotas_end_F = _running_sums(self.quota_F, np.searchsorted(line_F, line_F))
            near_F = self.rank_F // size == group
            sent_F += near_F * _overlap(
                in_group_X[self.row_F], own_X[self.row_F], quotas_end_F, self.quota_F
            )
            counts_end_RM = _by_group(theirs_RM, size)
            peers = slice(first, first + size)
            received_RM[peers] += _overlap(
                counts_end_RM[peers] - theirs_RM[peers], theirs_RM[peers],
                quotas_end_F[mine], self.quota_F[mine],
            )  # fmt: skip
            # Both lines are used up from their beginning to where the shorter one ends.
            met_X = met_GX[group]
            begin_X = begin_X - in_group_X - met_GX[:group].sum(0)
            begin_X += np.maximum(in_group_X, met_X) - met_X
            own_X = np.maximum(in_group_X + own_X, met_X) - np.maximum(in_group_X, met_X)
            met_F = met_GX[self.rank_F // size, self.row_F]
            self.quota_F = _past(quotas_end_F, self.quota_F, met_F)
            met_RM = met_GX[:, self.row_F[mine]].repeat(size, axis=0)
            theirs_RM = _past(counts_end_RM, theirs_RM, met_RM)
        quotas_end_F = _running_sums(self.quota_F, self.head_F)
        sent_F += _overlap(begin_X[self.row_F], own_X[self.row_F], quotas_end_F, self.quota_F)
        received_RM += _overlap(
            theirs_RM.cumsum(0) - theirs_RM, theirs_RM, quotas_end_F[mine], self.quota_F[mine]
        )
        return sent_F, received_RM

    def _before(self, rank: int) -> NDArray[np.int64]:
        """``[X]``: what the ranks before this one have not kept."""
        sums_X: NDArray[np.int64] = self.counts_RE[:rank].sum(0)[self.experts_X]
        there = self.rank_F < rank
        np.subtract.at(sums_X, self.row_F[there], self.kept_F[there])
        return sums_X

    def _left_for_mine(self) -> NDArray[np.int64]:
        """``[R, M]``: of the experts of this rank's replicas, what every rank has not kept."""
        place = np.full(len(self.experts_X), -1)
        rows = self.row_F[self.mine]
        place[rows] = np.arange(len(rows))
        left = self.counts_RE[:, self.experts_X[rows]]
        here = place[self.row_F]
        siblings = np.flatnonzero(here >= 0)
        left[self.rank_F[siblings], here[siblings]] -= self.kept_F[siblings]
        return left

    def _met(self, size: int) -> NDArray[np.int64]:
        """``[G, X]``: how much of both lines meets within each group."""
        groups = len(self.counts_RE) // size
        counts_GX = self.counts_RE.reshape(groups, size, -1).sum(1)[:, self.experts_X]
        quotas_GX = np.zeros_like(counts_GX)
        cell = self.rank_F // size, self.row_F
        np.subtract.at(counts_GX, cell, self.kept_F)
        np.add.at(quotas_GX, cell, self.quota_F)
        return np.minimum(counts_GX, quotas_GX)


def _running_sums(values_F: NDArray[np.int64], head_F: NDArray[np.int64]) -> NDArray[np.int64]:
    """``[F]``: sums up to and with each value over its line; values of a line are in a row, and
    ``head_F`` is where it begins."""
    sums_F = values_F.cumsum()
    within: NDArray[np.int64] = sums_F - (sums_F[head_F] - values_F[head_F])
    return within


def _overlap(
    begin: NDArray[np.int64],
    length: NDArray[np.int64],
    other_end: NDArray[np.int64],
    other_length: NDArray[np.int64],
) -> NDArray[np.int64]:
    """How much two intervals have in common."""
    ends = np.minimum(begin + length, other_end)
    common: NDArray[np.int64] = ends - np.maximum(begin, other_end - other_length)
    return np.maximum(common, 0, out=common)


def _past(
    end: NDArray[np.int64], length: NDArray[np.int64], met: NDArray[np.int64]
) -> NDArray[np.int64]:
    """How much of an interval lies past ``met``."""
    past: NDArray[np.int64] = np.maximum(end, met) - np.maximum(end - length, met)
    return past


def _by_group(values_RM: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Running sums over each group of ranks."""
    shape = values_RM.shape
    sums: NDArray[np.int64] = values_RM.reshape(shape[0] // size, size, shape[1]).cumsum(1)
    return sums.reshape(shape)
