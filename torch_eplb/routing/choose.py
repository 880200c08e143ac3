"""From a router's logical ids to physical ids: counting and choosing, on the device.

Runs once per layer and step, so: no host sync, no Python loop over experts, no shape that depends
on data, and as few operations as possible. Suffixes are those of `torch_eplb.routing.tables`.

Logical ids are what `torch_eplb.routing.ids.logical_ids` gives: int64 in 0..E, where E is the bin
of choices that go to no slot. Their physical id is R * S, the bin behind all slots.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torch_eplb.routing.host import on_host, stable_order

__all__ = ["choose_by_quota", "choose_from_table", "count_hits", "order_by_id"]


def count_hits(topk_ids_TK: Tensor, num_experts: int) -> Tensor:
    """How many tokens chose each expert; whoever is in the bin is not counted.

    Args:
        topk_ids_TK: integers ``[tokens, top-k]``, ids in ``0 .. num_experts``, the bin's included.
        num_experts: logical experts (or slots, or ranks: whatever the ids are).

    Returns:
        int64 ``[experts]``.

    >>> count_hits(torch.tensor([[0, 2], [2, 3], [4, 4]]), 4).tolist()
    [1, 0, 2, 1]
    """
    ids_N = topk_ids_TK.reshape(-1).long()
    if on_host(ids_N):
        return torch.from_numpy(np.bincount(ids_N.numpy(), minlength=num_experts)[:num_experts])
    # Not torch.bincount: on CUDA it reads the largest id back to size its result.
    hits = ids_N.new_zeros(num_experts + 1).scatter_add_(0, ids_N, torch.ones_like(ids_N))
    return hits[:num_experts]


def choose_from_table(topk_ids_TK: Tensor, choice_EP: Tensor) -> Tensor:
    """Physical ids, by the token's position in the batch.

    A function of ids and positions only: ranks with the same tokens and tables choose the same.

    Args:
        topk_ids_TK: int64 ``[tokens, top-k]``, logical ids.
        choice_EP: int64 ``[experts + 1, P]``, physical ids (`RoutingTables.choice_LBP` of a
            layer). Without its last row, the bin's, no id may be in the bin.

    Returns:
        int64 ``[tokens, top-k]``: ``choice_EP[id, t % P]`` for token t.

    >>> choice = torch.tensor([[0, 5], [1, 1], [2, 2]])
    >>> choose_from_table(torch.tensor([[0, 1], [0, 2], [2, 0]]), choice).tolist()
    [[0, 1], [5, 2], [2, 0]]
    """
    length = choice_EP.shape[1]
    if on_host(topk_ids_TK):
        turns = np.arange(topk_ids_TK.shape[0]) % length
        index = topk_ids_TK.numpy() * length + turns[:, None]
        return torch.from_numpy(choice_EP.numpy().reshape(-1).take(index))
    turn_T = torch.arange(topk_ids_TK.shape[0], device=topk_ids_TK.device) % length
    index_TK = torch.add(turn_T.unsqueeze(1), topk_ids_TK, alpha=length)
    return choice_EP.view(-1).gather(0, index_TK.view(-1)).view(topk_ids_TK.shape)


def choose_by_quota(
    topk_ids_TK: Tensor,
    quotas_EM: Tensor,
    slots_EM: Tensor,
    offset_E: Tensor | None = None,
    *,
    bin_id: int = -1,
) -> Tensor:
    """Physical ids, so that every replica gets exactly its quota.

    An expert's tokens stand in one order; its replicas take contiguous intervals of that order,
    whose lengths are the quotas, in the order of ``slots_EM``.

    Args:
        topk_ids_TK: int64 ``[tokens, top-k]``, logical ids; this source's part of the batch.
        quotas_EM: int64 ``[experts, M]``, at least 0. Without ``offset_E`` each row must sum to
            this source's tokens of the expert.
        slots_EM: int64 ``[experts, M]``, physical ids (`RoutingTables.slots_LEM` of a layer).
        offset_E: int64 ``[experts]``, where this source's tokens begin in the global order when
            the quotas are those of all sources together; rows then sum to the tokens of all.
        bin_id: the physical id of choices that go to no slot.

    Returns:
        int64 ``[tokens, top-k]``.

    >>> ids = torch.tensor([[0], [1], [0], [0]])
    >>> quotas, slots = torch.tensor([[2, 1], [1, 0]]), torch.tensor([[0, 5], [1, -1]])
    >>> choose_by_quota(ids, quotas, slots).flatten().tolist()
    [0, 1, 0, 5]
    >>> quotas = torch.tensor([[4, 3], [2, 0]])   # of all sources: 7 tokens of expert 0
    >>> choose_by_quota(ids, quotas, slots, offset_E=torch.tensor([3, 0])).flatten().tolist()
    [0, 1, 5, 5]
    """
    ids_N = topk_ids_TK.reshape(-1).long()
    if offset_E is not None:
        counts_E = count_hits(topk_ids_TK, quotas_EM.shape[0])
        quotas_EM = _own_quotas(quotas_EM, offset_E, counts_E)
    if on_host(ids_N):
        chosen = np.full(ids_N.shape[0], bin_id, dtype=np.int64)
        by_slot = np.repeat(slots_EM.numpy().reshape(-1), quotas_EM.numpy().reshape(-1))
        chosen[stable_order(ids_N.numpy())[: len(by_slot)]] = by_slot
        return torch.from_numpy(chosen).view(topk_ids_TK.shape)
    order_N = order_by_id(ids_N)
    # In the order of experts, replicas' intervals follow one another: no search per token. The
    # bin's interval comes last.
    rest = ids_N.shape[0] - quotas_EM.sum()
    slots_N = torch.repeat_interleave(
        torch.cat((slots_EM.reshape(-1), slots_EM.new_full((1,), bin_id))),
        torch.cat((quotas_EM.reshape(-1), rest.view(1))),
        output_size=ids_N.shape[0],
    )
    return torch.empty_like(ids_N).scatter_(0, order_N, slots_N).view(topk_ids_TK.shape)


def order_by_id(ids_N: Tensor) -> Tensor:
    """Positions in ascending order of id, equal ids in their order: what a dispatch sends by.

    Args:
        ids_N: int64 ``[N]``, at least 0.

    Returns:
        int64 ``[N]``.

    >>> order_by_id(torch.tensor([2, 0, 2, 1])).tolist()
    [1, 3, 0, 2]
    """
    if on_host(ids_N):
        return torch.from_numpy(stable_order(ids_N.numpy()))
    return torch.sort(ids_N, stable=True).indices


def _own_quotas(quotas_EM: Tensor, offset_E: Tensor, counts_E: Tensor) -> Tensor:
    """The part of each replica's interval that falls on this source's tokens, ``[E, M]``."""
    end_EM = quotas_EM.cumsum(1)
    first = offset_E.unsqueeze(1)
    last = first + counts_E.unsqueeze(1)
    begin = torch.maximum(end_EM - quotas_EM, first)
    return (torch.minimum(end_EM, last) - begin).clamp_(min=0)
