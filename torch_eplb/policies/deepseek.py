"""DeepSeek's expert parallelism load balancer: hierarchical and global placement.

Written after the description and the published example of https://github.com/deepseek-ai/EPLB,
vectorised over layers. `published` is their algorithm, tie by tie (under their signature it is
`rebalance.rebalance_experts`); `place` is the policy, which besides never puts two replicas of an
expert on one rank when that can be avoided.

In words: pack the expert groups onto nodes, replicate the heaviest experts within each node, and
pack the replicas onto the node's ranks, heaviest first, onto the lightest rank that has room.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology

__all__ = [
    "groups_on_nodes",
    "node_bound",
    "pack",
    "part_siblings",
    "place",
    "published",
    "replicate",
]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def published(
    weight: Floats, num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int
) -> Ints:
    """The published algorithm; two replicas of an expert may share a rank, as there.

    Args:
        weight: ``[layers, experts]``, tokens routed to each logical expert.
        num_replicas: slots over all ranks, a multiple of ``num_ranks``.
        num_groups: expert groups of the router, a multiple of ``num_nodes``; divides the experts.
        num_nodes: nodes that the ranks sit on.
        num_ranks: ranks, a multiple of ``num_nodes``.

    Returns:
        ``[layers, num_replicas]``: the logical expert of every physical one.
    """
    return _place(weight, num_replicas, num_groups, num_nodes, num_ranks, distinct=False)


def place(weight: NDArray[Any], current: Placement, topology: Topology) -> Placement:
    """The policy's placement for the load ``weight [layers, experts]``."""
    slots, experts = current.num_slots, current.num_experts
    if slots >= experts:  # then every rank is to hold every expert
        if current.held().all():
            return current
        return Placement.initial(current.num_layers, experts, current.num_ranks, slots)
    nodes, groups = topology.num_nodes, topology.num_expert_groups
    if not node_bound(current, topology):
        nodes = groups = 1
    ranks = topology.num_ranks
    physical = _place(
        np.asarray(weight, dtype=np.float64),
        ranks * slots, groups, nodes, ranks, distinct=True,
    )  # fmt: skip
    return Placement(physical.reshape(len(physical), ranks, slots), experts)


def node_bound(current: Placement, topology: Topology) -> bool:
    """Whether expert groups are to stay whole on nodes.

    Not with more slots on a rank than a node has experts: nodes would have to hold duplicates.
    """
    return (
        topology.hierarchical
        and current.num_experts % topology.num_expert_groups == 0
        and current.num_slots * topology.num_nodes <= current.num_experts
    )


def groups_on_nodes(placement: Placement, topology: Topology) -> NDArray[np.bool_]:
    """``[layers]``: whether every node holds whole expert groups, equally many, each only once."""
    layers = placement.num_layers
    size = placement.num_experts // topology.num_expert_groups
    group = placement.experts.reshape(layers, topology.num_nodes, -1) // size
    held = np.zeros((layers, topology.num_nodes, topology.num_expert_groups), dtype=bool)
    np.put_along_axis(held, group, True, axis=2)
    per_node = topology.num_expert_groups // topology.num_nodes
    return (held.sum(axis=1) == 1).all(axis=1) & (held.sum(axis=2) == per_node).all(axis=1)


def _place(
    weight: Floats, replicas: int, groups: int, nodes: int, ranks: int, *, distinct: bool
) -> Ints:
    """``[layers, replicas]``: the logical expert of every physical one."""
    layers, experts = weight.shape
    size = experts // groups
    per_group = weight.reshape(layers, groups, size).sum(axis=2)
    node, place = pack(per_group, nodes)
    # Experts in the order of nodes: [layers, experts], logical id of the node's i-th expert.
    group_at = np.empty_like(node)
    np.put_along_axis(group_at, node * (groups // nodes) + place, np.arange(groups)[None], axis=1)
    logical = (group_at[:, :, None] * size + np.arange(size)).reshape(layers, experts)
    local = np.take_along_axis(weight, logical, axis=1).reshape(layers * nodes, -1)
    most = ranks // nodes if distinct else None
    expert, counts = replicate(local, replicas // nodes, most)
    each = np.take_along_axis(local / counts, expert, axis=1)
    rank, place = pack(each, ranks // nodes, expert if distinct else None)
    slot = rank * (replicas // ranks) + place
    at_slot = np.empty_like(slot)
    np.put_along_axis(at_slot, slot, expert, axis=1)
    by_node = at_slot.reshape(layers, nodes, -1) + np.arange(nodes)[:, None] * (experts // nodes)
    return np.take_along_axis(logical, by_node.reshape(layers, -1), axis=1)


def replicate(weight: Floats, num_replicas: int, most: int | None = None) -> tuple[Ints, Ints]:
    """Give the next replica to the expert with the most load per replica, until all are given.

    Args:
        weight: ``[rows, experts]``.
        num_replicas: replicas in all, at least one for each expert.
        most: replicas that one expert may have; None for no bound.

    Returns:
        the expert of each replica ``[rows, num_replicas]``, experts in order first; replicas of
        each expert ``[rows, experts]``.
    """
    rows, experts = weight.shape
    row = np.arange(rows)
    expert = np.empty((rows, num_replicas), dtype=np.int64)
    expert[:, :experts] = np.arange(experts)
    counts = np.ones((rows, experts), dtype=np.int64)
    each = weight.copy()
    if most == 1:
        each[:] = -1.0
    for index in range(experts, num_replicas):
        heaviest = each.argmax(axis=1)
        expert[:, index] = heaviest
        counts[row, heaviest] += 1
        each[row, heaviest] = weight[row, heaviest] / counts[row, heaviest]
        if most is not None:
            full = counts[row, heaviest] >= most
            each[row[full], heaviest[full]] = -1.0
    return expert, counts


def pack(weight: Floats, num_packs: int, kind: Ints | None = None) -> tuple[Ints, Ints]:
    """Put items into packs of equal numbers, heaviest first into the lightest pack with room.

    Args:
        weight: ``[rows, items]``.
        num_packs: divides items.
        kind: ``[rows, items]``; items of the same kind go to different packs where they can. No
            kind may have more than ``num_packs`` items.

    Returns:
        each item's pack and its place within the pack, both ``[rows, items]``.
    """
    rows, items = weight.shape
    room = items // num_packs
    if room == 1 and kind is None:
        pack_of = np.broadcast_to(np.arange(items), weight.shape)
        return pack_of.copy(), np.zeros(weight.shape, dtype=np.int64)
    row = np.arange(rows)
    pack_of = np.empty((rows, items), dtype=np.int64)
    place = np.empty((rows, items), dtype=np.int64)
    load = np.zeros((rows, num_packs))  # infinite when full
    used = np.zeros((rows, num_packs), dtype=np.int64)
    taken = None
    if kind is not None:
        taken = np.zeros((rows, int(kind.max()) + 1, num_packs), dtype=bool)
    for item in np.argsort(-weight, axis=1, kind="stable").T:
        if taken is None or kind is None:
            lightest = load.argmin(axis=1)
        else:
            seen = taken[row, kind[row, item]]
            lightest = np.where(seen, np.inf, load).argmin(axis=1)
            stuck = seen[row, lightest] | np.isinf(load[row, lightest])
            if stuck.any():  # only packs with a sibling have room: a duplicate, parted below
                lightest[stuck] = load[stuck].argmin(axis=1)
            taken[row, kind[row, item], lightest] = True
        pack_of[row, item] = lightest
        place[row, item] = used[row, lightest]
        used[row, lightest] += 1
        load[row, lightest] += weight[row, item]
        full = used[row, lightest] == room
        load[row[full], lightest[full]] = np.inf
    if kind is not None:
        for index in range(rows):
            part_siblings(pack_of[index], place[index], kind[index], weight[index], num_packs)
    return pack_of, place


def part_siblings(pack_of: Ints, place: Ints, kind: Ints, weight: Floats, num_packs: int) -> None:
    """Exchange items, in place, until no pack holds two of a kind.

    Every exchange removes a surplus: some pack lacks the kind; either that one has a surplus of
    its own to give, or it has more kinds than the pack with the surplus, so one that is missing
    there.
    """
    key = pack_of * (int(kind.max()) + 1) + kind
    if len(np.unique(key)) == len(key):
        return
    held = np.zeros((num_packs, int(kind.max()) + 1), dtype=np.int64)
    np.add.at(held, (pack_of, kind), 1)
    while (held > 1).any():
        pack, double = np.argwhere(held > 1)[0]
        item = np.flatnonzero((pack_of == pack) & (kind == double))[-1]
        spare = held[pack_of, kind] > 1
        fits = (held[pack_of, double] == 0) & ((held[pack, kind] == 0) | spare)
        others = np.flatnonzero(fits)
        other = others[np.abs(weight[others] - weight[item]).argmin()]
        for index, old, new in ((item, pack, pack_of[other]), (other, pack_of[other], pack)):
            held[old, kind[index]] -= 1
            held[new, kind[index]] += 1
        pack_of[item], pack_of[other] = pack_of[other], pack_of[item]
        place[item], place[other] = place[other], place[item]
