"""The split of one batch by what it costs: a rank reads the weights of each of its active experts.

Where batches are small, as in decoding, a replica's time is that of reading its weights, however
few tokens it has: levelling tokens then activates more replicas than need be (METRO,
arXiv:2512.09277). A replica with q tokens is taken to cost max(W, q), in units of a token's time,
where W tokens take as long to compute as the weights to read (a roofline: a grouped product reads
ahead while it computes, so the two overlap and do not add up). A rank costs the sum over its
active replicas, and the batch what its costliest rank does.

Splits are compared, and the cheapest is taken: that by tokens; one replica for each active expert,
their number levelled; and one in units of W tokens, where small experts are one unit that cannot be
split, and large ones several that can, as it is and with its replicas levelled by tokens. All come
from one solver, for units are counts like any others. Integers throughout. Suffixes are those of
`torch_eplb.routing.tables`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_eplb.routing.host import on_host
from torch_eplb.routing.quotas import solve_quotas, solve_quotas_host

__all__ = ["active_experts", "rank_costs", "split_batch", "split_batch_host"]

Ints = NDArray[np.int64]

_NEAR_BITS = 6  # by tokens is good enough within 2^-6 of what no split can beat


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
    sizes = num_ranks, slots_per_rank
    if not weight_tokens or slots_EM.shape[1] == 1:
        return solve_quotas_host(counts_E, slots_EM, *sizes)
    if counts_E.max(initial=0) <= weight_tokens:
        return _one_replica_each(counts_E, slots_EM, *sizes)
    # No split costs less than the tokens of the fullest rank by tokens, nor than the mean rank.
    best = solve_quotas_host(counts_E, slots_EM, *sizes)
    total = int(np.maximum(counts_E, weight_tokens)[counts_E > 0].sum())
    least = max(int(rank_costs(best, slots_EM, *sizes, 0).max()), -(-total // num_ranks))
    enough = least + (least >> _NEAR_BITS)
    cost = int(rank_costs(best, slots_EM, *sizes, weight_tokens).max())
    for quotas in _others(counts_E, slots_EM, *sizes, weight_tokens) if cost > enough else ():
        other = int(rank_costs(quotas, slots_EM, *sizes, weight_tokens).max())
        if other < cost:
            best, cost = quotas, other
        if cost <= enough:
            break
    return best


def _others(
    counts_E: Ints, slots_EM: Ints, num_ranks: int, per_rank: int, weight_tokens: int
) -> Iterator[Ints]:
    """Splits that may cost less than that by tokens."""
    units_E = -(-counts_E // weight_tokens)
    units_EM = solve_quotas_host(units_E, slots_EM, num_ranks, per_rank)
    yield _in_proportion(counts_E, units_E, units_EM)
    yield _level_within(counts_E, units_EM, slots_EM, num_ranks, per_rank)
    yield _one_replica_each(counts_E, slots_EM, num_ranks, per_rank)


def _one_replica_each(counts_E: Ints, slots_EM: Ints, num_ranks: int, per_rank: int) -> Ints:
    """Active experts are jobs of one unit: a whole split of them has the least number per rank."""
    active_E = (counts_E > 0).astype(np.int64)
    chosen_EM = solve_quotas_host(active_E, slots_EM, num_ranks, per_rank)
    return chosen_EM * counts_E[:, None]


def _in_proportion(counts_E: Ints, units_E: Ints, units_EM: Ints) -> Ints:
    """Tokens in proportion to units, rounded so that rows sum to the counts."""
    ends = units_EM.cumsum(1) * counts_E[:, None] // np.maximum(units_E, 1)[:, None]
    return np.diff(ends, axis=1, prepend=0)


def _level_within(
    counts_E: Ints, units_EM: Ints, slots_EM: Ints, num_ranks: int, per_rank: int
) -> Ints:
    """Split by tokens over the replicas that have got units."""
    used_EM = units_EM > 0
    used_EM[:, 0] |= ~used_EM.any(axis=1)
    order_EM = np.argsort(~used_EM, axis=1, kind="stable")  # used ones first, in their order
    kept_EM = np.where(used_EM, slots_EM, -1)
    quotas = solve_quotas_host(
        counts_E, np.take_along_axis(kept_EM, order_EM, axis=1), num_ranks, per_rank
    )
    result = np.zeros_like(quotas)
    np.put_along_axis(result, order_EM, quotas, axis=1)
    return result


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
