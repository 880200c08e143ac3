"""Policy "swift": a few moves per rebalance, as vLLM-Ascend's swift balancer makes them.

Written from its published description: start from the live placement; give redundant slots to
the experts that are hottest per replica; then pair the hottest rank with the coldest, the next
hottest with the next coldest, and so on, and let every pair exchange at most one expert each way.
It judges the mean load, split evenly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from torch_eplb.placement import Placement
from torch_eplb.planning.deepseek import groups_on_nodes, node_bound, place
from torch_eplb.planning.plan import Topology

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
    counts = np.bincount(experts.reshape(-1), minlength=len(weight))
    held = np.zeros((ranks, len(weight)), dtype=bool)
    held[np.arange(ranks)[:, None], experts] = True
    margin = MIN_IMPROVEMENT * weight.sum() / ranks
    changed = np.zeros(experts.shape, dtype=bool)
    for _ in range(ranks * slots - len(np.unique(experts))):
        here = counts > 0
        hot = int(np.where(here & (counts < ranks), weight / np.maximum(counts, 1), -1.0).argmax())
        spare = (counts[experts] > 1) & ~held[:, hot][:, None] & ~changed
        if not here[hot] or counts[hot] >= ranks or not spare.any():
            return
        # What a replica of the giver gets once it has one less.
        after = np.where(spare, weight[experts] / np.maximum(counts[experts] - 1, 1), np.inf)
        coolest = after.min()
        if weight[hot] / counts[hot] <= coolest + margin:
            return
        rank_load = (weight / np.maximum(counts, 1))[experts].sum(axis=1)
        # Among equally cool givers, free the slot on the lightest rank.
        rank, slot = np.argwhere(after == coolest)[
            rank_load[np.argwhere(after == coolest)[:, 0]].argmin()
        ]
        cold = experts[rank, slot]
        counts[cold] -= 1
        counts[hot] += 1
        held[rank, cold] = False
        held[rank, hot] = True
        experts[rank, slot] = hot
        changed[rank, slot] = True


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
        doubles = np.isin(experts[hot], experts[cold])[:, None] | np.isin(
            experts[cold], experts[hot]
        )
        left[doubles] = np.inf
        a, b = np.unravel_index(left.argmin(), left.shape)
        if left[a, b] + margin < difference:
            experts[hot, a], experts[cold, b] = experts[cold, b], experts[hot, a]
