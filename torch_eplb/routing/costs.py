"""The split of one batch by what it costs: a rank reads the weights of each of its active experts.

Where batches are small, as in decoding, a replica's time is that of reading its weights, however
few tokens it has: levelling tokens then activates more replicas than need be (METRO,
arXiv:2512.09277). A replica with q tokens is taken to cost max(W, q), in units of a token's time,
where W tokens take as long to compute as the weights to read (a roofline: a grouped product reads
ahead while it computes, so the two overlap and do not add up). A rank costs the sum over its
active replicas, and the batch what its costliest rank does.

Two splits are made, and the cheaper is taken: that by tokens; and one replica for each active
expert, their number levelled, from which the costliest rank is then relieved (`relief`), whole
experts first. Where one of them costs as little as any split can, the other is not made. A device
makes both at once, and one in units of W tokens, where small experts are one unit that cannot be
split, and large ones several that can; it does not relieve. All come from one solver, for active
experts and units are counts like any others. Integers throughout. Suffixes are those of
`torch_eplb.routing.tables`.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_eplb.routing.host import on_host
from torch_eplb.routing.layouts import Layout
from torch_eplb.routing.quotas import solve_layout, solve_quotas
from torch_eplb.routing.relief import relieve

__all__ = ["active_experts", "rank_costs", "split_batch", "split_batch_host", "split_layout"]

Ints = NDArray[np.int64]

_NEAR_BITS = 6  # a split is good enough within 2^-6 of what none can beat


def split_batch(
    counts_E: Tensor, slots_EM: Tensor, num_ranks: int, slots_per_rank: int, weight_tokens: int = 0
) -> Tensor:
    """How many of an expert's tokens each of its replicas gets, so that the batch costs least.

    Args:
        counts_E: int64 ``[experts]``, tokens of each expert in the batch; see `solve_quotas`.
        slots_EM: int64 ``[experts, M]``, physical ids of the replicas, likewise.
        num_ranks: R.
        slots_per_rank: S.
        weight_tokens: W, tokens whose computing takes as long as reading an expert's weights; 0
            where only tokens count.

    Returns:
        int64 ``[experts, M]``; each row sums to the expert's count, 0 where there is no replica.

    Rank 0 has slots 0 and 1, rank 1 has slots 2 and 3; expert 0 sits in slots 0 and 3:

    >>> slots, counts = torch.tensor([[0, 3], [1, -1], [2, -1]]), torch.tensor([9, 2, 4])
    >>> split_batch(counts, slots, 2, 2).tolist()  # 8 and 7 tokens, 2 active experts on each
    [[6, 3], [2, 0], [4, 0]]
    >>> split_batch(counts, slots, 2, 2, weight_tokens=16).tolist()  # 2 active experts, and 1
    [[9, 0], [2, 0], [4, 0]]
    """
    if not weight_tokens or slots_EM.shape[1] == 1:
        return solve_quotas(counts_E, slots_EM, num_ranks, slots_per_rank)
    split = _split_on_device
    if counts_E.device.type == "cpu":
        split = _split_on_host if on_host(counts_E) else _split_batch
    return split(counts_E, slots_EM, num_ranks, slots_per_rank, weight_tokens)


def _split_on_host(
    counts_E: Tensor, slots_EM: Tensor, num_ranks: int, slots_per_rank: int, weight_tokens: int
) -> Tensor:
    arrays = counts_E.numpy(), slots_EM.numpy()
    return torch.from_numpy(split_batch_host(*arrays, num_ranks, slots_per_rank, weight_tokens))


# Opaque to compiled graphs, so that they split as eager ranks do.
_split_batch = torch.library.custom_op(
    "torch_eplb::split_batch", _split_on_host, mutates_args=(), device_types="cpu"
)


@_split_batch.register_fake
def _(
    counts_E: Tensor, slots_EM: Tensor, num_ranks: int, slots_per_rank: int, weight_tokens: int
) -> Tensor:
    return torch.empty_like(slots_EM)


def split_batch_host(
    counts_E: Ints, slots_EM: Ints, num_ranks: int, slots_per_rank: int, weight_tokens: int
) -> Ints:
    """`split_batch` on the host. Most batches need one split: those whose experts all have few
    tokens, or whose ranks all have many.

    >>> slots = np.array([[0, 3], [1, -1], [2, -1]])
    >>> split_batch_host(np.array([9, 2, 4]), slots, 2, 2, 16).tolist()
    [[9, 0], [2, 0], [4, 0]]
    """
    return split_layout(counts_E, Layout.of(slots_EM, num_ranks, slots_per_rank), weight_tokens)


def split_layout(counts_E: Ints, layout: Layout, weight_tokens: int) -> Ints:
    """`split_batch_host` for whoever has the layout of the slots at hand.

    >>> layout = Layout.of(np.array([[0, 3], [1, -1], [2, -1]]), 2, 2)
    >>> split_layout(np.array([9, 2, 4]), layout, 16).tolist()
    [[9, 0], [2, 0], [4, 0]]
    """
    slots_EM, num_ranks = layout.slots_EM, layout.num_ranks
    sizes = num_ranks, layout.slots_per_rank
    if not weight_tokens or not len(layout.experts_X):
        return solve_layout(counts_E, layout)
    if counts_E.max(initial=0) <= weight_tokens:
        return _one_replica_each(counts_E, layout)
    alone_E = np.maximum(counts_E, weight_tokens) * (counts_E > 0)
    # No split costs less than the mean rank, nor than a rank's experts that are nowhere else.
    fixed_R = np.bincount(
        layout.first_rank_E, weights=alone_E * layout.single_E, minlength=num_ranks
    )
    least = max(-(-int(alone_E.sum()) // num_ranks), int(fixed_R.max()))
    best, cost = None, 0
    # First what is likelier to be enough.
    many = int(counts_E.sum()) >= weight_tokens * np.count_nonzero(slots_EM >= 0)
    for by_tokens in (True, False) if many else (False, True):
        enough = least + (least >> _NEAR_BITS)
        if by_tokens:
            quotas = solve_layout(counts_E, layout)
            # Nor than the fullest rank has tokens, when they are levelled.
            least = max(least, int(rank_costs(quotas, slots_EM, *sizes, 0).max()))
            enough = least + (least >> _NEAR_BITS)
        else:
            quotas = relieve(_one_replica_each(counts_E, layout), layout, weight_tokens, enough)
        other = int(rank_costs(quotas, slots_EM, *sizes, weight_tokens).max())
        if best is None or other < cost:
            best, cost = quotas, other
        if cost <= enough:
            break
    assert best is not None
    return best


def _one_replica_each(counts_E: Ints, layout: Layout) -> Ints:
    """Active experts are jobs of one unit: a whole split of them has the least number per rank."""
    return solve_layout((counts_E > 0).astype(np.int64), layout) * counts_E[:, None]


def rank_costs(
    quotas_EM: Ints, slots_EM: Ints, num_ranks: int, slots_per_rank: int, weight_tokens: int
) -> Ints:
    """``[R]``: what each rank costs, in tokens' time.

    >>> slots, quotas = np.array([[0, 3], [1, -1], [2, -1]]), np.array([[6, 3], [2, 0], [4, 0]])
    >>> rank_costs(quotas, slots, 2, 2, 5).tolist()
    [11, 10]
    """
    active = quotas_EM > 0
    ranks, parts = slots_EM[active] // slots_per_rank, quotas_EM[active]
    costs = np.bincount(ranks, weights=np.maximum(parts, weight_tokens), minlength=num_ranks)
    return costs.astype(np.int64)


def active_experts(quotas_EM: Ints, slots_EM: Ints, num_ranks: int, slots_per_rank: int) -> Ints:
    """``[R]``: replicas with tokens on each rank."""
    return np.bincount(slots_EM[quotas_EM > 0] // slots_per_rank, minlength=num_ranks)


def _split_on_device(
    counts_E: Tensor, slots_EM: Tensor, num_ranks: int, slots_per_rank: int, weight_tokens: int
) -> Tensor:
    """`split_batch` without a host sync: all three splits, of which the cheapest is selected."""
    sizes = num_ranks, slots_per_rank
    active_E = (counts_E > 0).to(counts_E.dtype)
    units_E = (counts_E + (weight_tokens - 1)) // weight_tokens
    units_EM = solve_quotas(units_E, slots_EM, *sizes)
    ends_EM = units_EM.cumsum(1) * counts_E.unsqueeze(1) // units_E.clamp(min=1).unsqueeze(1)
    splits = (
        solve_quotas(counts_E, slots_EM, *sizes),
        solve_quotas(active_E, slots_EM, *sizes) * counts_E.unsqueeze(1),
        torch.diff(ends_EM, dim=1, prepend=torch.zeros_like(ends_EM[:, :1])),
    )
    ranks_EM = torch.where(slots_EM < 0, num_ranks, slots_EM // slots_per_rank).view(-1)
    best, least = splits[0], None
    for quotas_EM in splits:
        costs_EM = torch.where(quotas_EM > 0, quotas_EM.clamp(min=weight_tokens), 0)
        costs_R = counts_E.new_zeros(num_ranks + 1).scatter_add(0, ranks_EM, costs_EM.view(-1))
        cost = costs_R[:num_ranks].amax()
        if least is None:
            least = cost
            continue
        best = torch.where(cost < least, quotas_EM, best)
        least = torch.minimum(cost, least)
    return best
