"""Policy "swift": a few moves per rebalance, as vLLM-Ascend's swift balancer makes them.

Written from its published description: start from the live placement; give redundant slots to
the experts that are hottest per replica; then pair the hottest rank with the coldest, the next
hottest with the next coldest, and so on, and let every pair exchange at most one expert each way.
It judges the mean load, split evenly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from torch_eplb.policies.deepseek import groups_on_nodes, node_bound, place
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology

__all__ = ["MIN_IMPROVEMENT", "plan"]

MIN_IMPROVEMENT = 0.01
"""A swap must narrow its pair's difference by this part of the mean rank load; this also bounds
how much hotter per replica an expert must be to take over a redundant slot."""


def plan(load: NDArray[np.float64], current: Placement, topology: Topology) -> Placement:
    """The placement after at most one replacement per redundant slot and one swap per pair.

    Args:
        load: ``[samples, layers, experts]``.
        current: the placement that is live now.
        topology: with expert groups bound to nodes, experts move within their node only; a
            placement that does not keep groups on nodes yet is planned anew.
    """
    weight = load.mean(axis=0)
    bound = node_bound(current, topology)
    nodes = topology.num_nodes if bound else 1
    experts = np.array(current.experts)
    if bound:
        stray = ~groups_on_nodes(current, topology)
        experts[stray] = place(weight, current, topology).experts[stray]
    for layer in range(len(experts)):
        for node in np.split(np.arange(topology.num_ranks), nodes):
            part = experts[layer, node]
            _replicate_hottest(part, weight[layer])
            _swap_pairs(part, weight[layer])
            experts[layer, node] = part
    return Placement(experts, current.num_experts)


def _replicate_hottest(experts: NDArray[np.int32], weight: NDArray[np.float64]) -> None:
    """Hand replicas of the coolest replicated experts over to the hottest ones, in place.

    experts: ``[ranks, slots]``; weight: ``[experts]``.
    """
    ranks, slots = experts.shape
    flat = experts.reshape(-1)
    rank_of = np.repeat(np.arange(ranks), slots)
    counts = np.bincount(flat, minlength=len(weight))
    held = np.zeros((len(weight), ranks), dtype=bool)
    held[flat, rank_of] = True
    margin = MIN_IMPROVEMENT * weight.sum() / ranks
    changed = np.zeros(len(flat), dtype=bool)
    # Per replica: now, where one more is possible; and with one less, where one can be spared.
    each = np.where((counts > 0) & (counts < ranks), weight / np.maximum(counts, 1), -1.0)
    without = np.where(counts > 1, weight / np.maximum(counts - 1, 1), np.inf)
    for _ in range(len(flat) - int((counts > 0).sum())):
        hot = int(each.argmax())
        after = np.where(changed | held[hot, rank_of], np.inf, without[flat])
        coolest = after.min()
        if each[hot] < 0 or np.isinf(coolest) or each[hot] <= coolest + margin:
            return
        givers = np.flatnonzero(after == coolest)
        if len(givers) > 1:  # equally cool: free the slot on the lightest rank
            load = (weight / np.maximum(counts, 1))[experts].sum(axis=1)
            givers = givers[load[rank_of[givers]].argmin()][None]
        slot = givers[0]
        cold, rank = flat[slot], rank_of[slot]
        held[cold, rank], held[hot, rank] = False, True
        flat[slot] = hot
        changed[slot] = True
        for expert, more in ((cold, -1), (hot, 1)):
            count = counts[expert] = counts[expert] + more
            each[expert] = weight[expert] / count if count < ranks else -1.0
            without[expert] = weight[expert] / (count - 1) if count > 1 else np.inf


def _swap_pairs(experts: NDArray[np.int32], weight: NDArray[np.float64]) -> None:
    """Level the hottest rank with the coldest by one swap, and so on inwards, in place."""
    counts = np.bincount(experts.reshape(-1), minlength=len(weight))
    each = (weight / np.maximum(counts, 1))[experts]
    rank_load = each.sum(axis=1)
    margin = MIN_IMPROVEMENT * rank_load.mean()
    order = np.argsort(rank_load, kind="stable")
    for cold, hot in zip(order[: len(order) // 2], order[::-1], strict=False):
        difference = rank_load[hot] - rank_load[cold]
        # [slots of hot, slots of cold]: the difference that is left after the swap
        left = np.abs(difference - 2 * (each[hot][:, None] - each[cold][None, :]))
        same = experts[hot][:, None] == experts[cold]
        left[same.any(axis=1)] = np.inf  # the other rank has it already
        left[:, same.any(axis=0)] = np.inf
        a, b = np.unravel_index(left.argmin(), left.shape)
        if left[a, b] + margin < difference:
            experts[hot, a], experts[cold, b] = experts[cold, b], experts[hot, a]
