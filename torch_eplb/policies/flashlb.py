"""Policy "flashlb": mean, variance and covariance of the load, as vLLM-Ascend's FlashLB uses them.

Written from the description of FlashLB in vLLM-Ascend (``vllm_ascend/eplb/core/policy/``, pull
requests 3042 and 6477), in our vocabulary and vectorised over layers and candidates. In words:

1. A layer whose ranks are level enough stays as it is.
2. Experts are ranked by their risk, mean + z * standard deviation over the samples, and cut into
   `DEPTH` groups. Group by group, hottest first, it is searched how many of the redundant slots
   the group gets: every candidate number is tried out as a whole placement, with the rest of the
   slots handed to the experts that follow, and rated by its mean PAR over the samples.
3. A placement puts replicas, heaviest first, on the rank with the least risk after it. The
   covariance of experts counts there: two experts that are hot at different times make a steadier
   rank than two that are hot together.
4. The new ranks are named after the old ones that hold most of the same experts.

Splits are taken to be even. FlashLB remembers what a layer's PAR was when it was placed; a pure
function cannot, so here it is compared with what a new placement would reach.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.policies.deepseek import (
    groups_on_nodes,
    node_bound,
    part_siblings,
    place,
    replicate,
)
from torch_eplb.policies.split import even_split, judged_par
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology

__all__ = ["place_by_risk", "plan"]

Z_SCORE = 0.6745
"""Risk is the load that a normal distribution stays below three times out of four."""

DEPTH = 4
"""Groups of experts, in the search for replica counts."""

OFFSETS = (0, -1, 1, -2, 2, -4, 4, -8, 8)
"""Redundant slots tried for a group, relative to what the greedy allotment gives it."""

GOOD = 0.9
"""A layer below this mean / peak is placed anew if that makes it any better."""

WORTHWHILE = 0.95
"""Any other layer only if PAR falls to this part of what it is."""

_CHUNK = 1 << 18
"""Numbers that the placements of one go work on, about: what caches hold."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def plan(load: Floats, current: Placement, topology: Topology) -> Placement:
    """The placement after replacing the layers that are not level enough.

    Args:
        load: ``[samples, layers, experts]``.
        current: the placement that is live now.
        topology: with expert groups bound to nodes, every node is planned by itself; a layer that
            does not keep groups on nodes yet, or whose nodes differ too much, gets new nodes, too.
    """
    experts = np.array(current.experts)
    nodes, stray = 1, np.zeros(len(experts), dtype=bool)
    if node_bound(current, topology):
        nodes, stray = topology.num_nodes, ~groups_on_nodes(current, topology)
    if current.num_slots * nodes >= current.num_experts and not stray.any():
        return current  # every rank holds every expert (of its node)
    before = _mean_par(load, current)
    tries = [current.experts]
    if nodes > 1:
        tries.append(place(load.mean(axis=0), current, topology).experts)
    for where in tries:
        redo = np.flatnonzero(stray | (before > 1.0 / WORTHWHILE))
        if where is current.experts:
            redo = redo[~stray[redo]]
        if not len(redo):
            continue
        found = place_by_risk(load[:, redo], where[redo], current.experts[redo], nodes)
        after = _mean_par(load[:, redo], Placement(found, current.num_experts))
        better = after < WORTHWHILE * before[redo]
        better |= (before[redo] > 1.0 / GOOD) & (after < before[redo])
        better |= stray[redo]
        experts[redo[better]], before[redo[better]] = found[better], after[better]
        stray[redo[better]] = False
    return Placement(experts, current.num_experts)


def _mean_par(load: Floats, placement: Placement) -> Floats:
    """``[layers]``: mean over the samples of PAR under the even split."""
    return judged_par(load, placement, even_split(placement), "even").mean(axis=0)


def place_by_risk(
    load: Floats,
    where: NDArray[np.int32],
    live: NDArray[np.int32],
    nodes: int = 1,
    depth: int = DEPTH,
    loyalty: float = 0.0,
) -> NDArray[np.int32]:
    """New placements ``[layers, ranks, slots]``.

    Args:
        load: ``[samples, layers, experts]``.
        where: ``[layers, ranks, slots]``, says which experts belong to which node.
        live: ``[layers, ranks, slots]``, what the new ranks shall resemble.
        nodes: planned each by itself.
        depth: groups of experts in the search for replica counts; 1 is the greedy allotment.
        loyalty: a replica goes to a rank that holds its expert live, unless that has by this much
            more risk than another one; in units of ``load``. FlashLB has none.
    """
    layers, ranks, slots = where.shape
    own = np.sort(where.reshape(layers * nodes, -1), axis=1)
    first = np.diff(own, axis=1, prepend=-1) > 0
    logical = own[first].reshape(layers * nodes, -1)  # the experts of each node, ascending
    x = load.transpose(1, 2, 0)[np.repeat(np.arange(layers), nodes)[:, None], logical]
    weight = x.mean(axis=2) + Z_SCORE * x.std(axis=2)
    order = np.argsort(-weight, axis=1, kind="stable")
    x = np.take_along_axis(x, order[:, :, None], axis=1)
    logical = np.take_along_axis(logical, order, axis=1)
    on_node = ranks // nodes
    counts = _replica_counts(x, np.take_along_axis(weight, order, axis=1), on_node, slots, depth)
    found = np.empty((len(x), on_node, slots), dtype=np.int32)
    live = live.reshape(found.shape)
    lure = None
    if loyalty:
        held = np.zeros((len(x), int(where.max()) + 1, on_node), dtype=bool)
        held[np.arange(len(x))[:, None, None], live, np.arange(on_node)[:, None]] = True
        lure = loyalty * np.take_along_axis(held, logical[:, :, None], axis=1)
    rank, expert = (part[:, 0] for part in _place(x, counts[:, None], on_node, lure)[:2])
    for index, mean in enumerate(x.mean(axis=2)):
        each = (mean / counts[index])[expert[index]]
        part_siblings(rank[index], np.zeros_like(rank[index]), expert[index], each, on_node)
        by_rank = expert[index, np.argsort(rank[index], kind="stable")]
        new = logical[index, by_rank].reshape(on_node, slots)
        if not loyalty:
            new = new[_namesakes(new, live[index], int(where.max()) + 1)]
        found[index] = new
    return found.reshape(where.shape)


def _replica_counts(x: Floats, weight: Floats, ranks: int, slots: int, depth: int) -> Ints:
    """Replicas of every expert, ``[rows, experts]``, by the tree search.

    Args:
        x: ``[rows, experts, samples]``, experts in descending order of ``weight``.
        weight: ``[rows, experts]``, their risks.
        ranks, slots: to place on.
        depth: groups of experts; less than 2 for no search.
    """
    rows, experts, _ = x.shape
    row = np.arange(rows)
    left = np.full(rows, ranks * slots - experts)
    counts = _allotments(weight, int(left.max()), ranks)[:, -1]
    size = -(-experts // depth)
    for start in range(0, experts - size, size):
        if not left.any():
            break
        most = int(left.max())
        after = start + size
        whole = _allotments(weight[:, start:], most, ranks)
        here = _allotments(weight[:, start:after], most, ranks)
        rest = _allotments(weight[:, after:], most, ranks)
        greedy = whole[row, left, :size].sum(axis=1) - size
        low = np.maximum(left - (experts - after) * (ranks - 1), 0)
        high = np.minimum(left, size * (ranks - 1))
        tried = np.clip(greedy[:, None] + np.array(OFFSETS), low[:, None], high[:, None])
        trial = np.repeat(counts[:, None], len(OFFSETS), axis=1)
        trial[:, :, start:after] = here[row[:, None], tried]
        trial[:, :, after:] = rest[row[:, None], left[:, None] - tried]
        best = _rate(x, trial, ranks).argmin(axis=1)
        counts = trial[row, best]
        left = left - tried[row, best]
    return counts


def _allotments(weight: Floats, most: int, ranks: int) -> Ints:
    """``[rows, most + 1, experts]``: replica counts for 0, 1, ... redundant slots.

    Each next slot goes to the expert with the highest weight per replica. Numbers that do not fit
    (``ranks`` replicas of an expert at most) are nonsense.
    """
    experts = weight.shape[1]
    given = replicate(weight, experts + most, ranks)[0][:, experts:]
    steps = given[:, :, None] == np.arange(experts)
    none = np.zeros((len(weight), 1, experts), dtype=np.int64)
    return 1 + np.concatenate((none, steps.cumsum(axis=1)), axis=1)


def _rate(x: Floats, counts: Ints, ranks: int) -> Floats:
    """``[rows, candidates]``: mean PAR of the placements of replica counts.

    Args:
        x: ``[rows, experts, samples]``.
        counts: ``[rows, candidates, experts]``.
    """
    rows, tries, _ = counts.shape
    par = np.empty((rows, tries))
    mean = np.maximum(x.sum(axis=1) / ranks, np.finfo(float).tiny)  # [rows, samples]
    chunk = max(1, _CHUNK // (tries * ranks * x.shape[2]))
    for at in range(0, rows, chunk):
        part = slice(at, at + chunk)
        loads = _place(x[part], counts[part], ranks)[2]
        par[part] = (loads.max(axis=2) / mean[part, None]).mean(axis=2)
    return par


def _place(
    x: Floats, counts: Ints, ranks: int, lure: Floats | None = None
) -> tuple[Ints, Ints, Floats]:
    """Put replicas, heaviest first, on the rank with the least risk after it.

    Args:
        x: ``[rows, experts, samples]``.
        counts: ``[rows, candidates, experts]``, replicas; the same sum everywhere.
        ranks: to place on.
        lure: ``[rows, experts, ranks]``, what is taken off a rank's risk for an expert.

    Returns:
        rank and expert of every replica ``[rows, candidates, replicas]``; the ranks' load
        ``[rows, candidates, ranks, samples]``. An expert sits on a rank twice only where no other
        rank has room.
    """
    rows, tries, experts = counts.shape
    samples = x.shape[2]
    counts = counts.reshape(-1, experts)
    some = np.arange(len(counts))
    row = some // tries
    each = x.mean(axis=2)[row] / counts
    order = np.argsort(-each, axis=1, kind="stable")
    times = np.take_along_axis(counts, order, axis=1)
    expert = np.repeat(order.reshape(-1), times.reshape(-1)).reshape(len(counts), -1)
    slots = expert.shape[1] // ranks
    around = x - x.mean(axis=2, keepdims=True)
    mean = np.zeros((len(counts), ranks))  # infinite when full
    apart = np.zeros((len(counts), ranks, samples))  # each sample's distance from the mean
    square = np.zeros((len(counts), ranks))  # its sum of squares
    used = np.zeros((len(counts), ranks), dtype=np.int64)
    holds = np.zeros((len(counts), ranks), dtype=bool)
    rank = np.empty_like(expert)
    loads = np.zeros_like(apart)
    last = np.full(len(counts), -1)
    for index, now in enumerate(expert.T):
        holds[now != last] = False
        last = now
        part = around[row, now] / counts[some, now][:, None]
        spread = square + (part * part).sum(axis=1)[:, None]
        spread += 2 * np.matmul(apart, part[:, :, None])[:, :, 0]
        risk = mean + Z_SCORE * np.sqrt(np.maximum(spread, 0.0) / samples)
        if lure is not None:
            risk -= lure[row, now]
        risk[holds] = np.inf
        to = risk.argmin(axis=1)
        stuck = np.isinf(risk[some, to])
        if stuck.any():
            to[stuck] = mean[stuck].argmin(axis=1)
        rank[:, index] = to
        apart[some, to] += part
        square[some, to] = spread[some, to]
        holds[some, to] = True
        used[some, to] += 1
        mean[some, to] += each[some, now]
        loads[some, to] += part + each[some, now][:, None]
        full = used[some, to] == slots
        mean[some[full], to[full]] = np.inf
    shape = (rows, tries, -1)
    return rank.reshape(shape), expert.reshape(shape), loads.reshape(rows, tries, ranks, samples)


def _namesakes(new: Ints, live: NDArray[np.int32], num_experts: int) -> Ints:
    """``[ranks]``: which of the new ranks each live rank shall become, to move little.

    Pairs that share most experts first; then pairs exchange partners while that helps.

    Args:
        new, live: ``[ranks, slots]``.
    """
    ranks = len(new)
    shared = _held(live, num_experts) @ _held(new, num_experts).T
    partner = np.full(ranks, -1)
    free = np.ones(ranks, dtype=bool)
    pairs = np.argwhere(shared > 0)
    for mine, theirs in pairs[np.argsort(-shared[shared > 0], kind="stable")].tolist():
        if partner[mine] < 0 and free[theirs]:
            partner[mine] = theirs
            free[theirs] = False
    partner[partner < 0] = np.flatnonzero(free)
    for _ in range(ranks):
        got = shared[:, partner]  # what rank i shares with the partner of rank j
        own = np.diagonal(got)
        gain = got + got.T - own[:, None] - own
        one, other = np.unravel_index(gain.argmax(), gain.shape)
        if gain[one, other] <= 0:
            break
        partner[[one, other]] = partner[[other, one]]
    return partner


def _held(experts: NDArray[Any], num_experts: int) -> Floats:
    held = np.zeros((len(experts), num_experts))
    np.put_along_axis(held, experts, 1.0, axis=1)
    return held
