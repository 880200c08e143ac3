"""Searching several layers for better placements, as far as steps and time allow.

Layers know nothing of each other here, but that they share a budget: steps go to layers that gain
by them, worst first. Every answer is at least as good as the start, price of the moves included,
whenever the search ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from torch_eplb.policies import flashlb
from torch_eplb.policies.batches import solve_batches
from torch_eplb.policies.cuts import CutSearch, all_sets, binding_sets
from torch_eplb.policies.fixed import FixedSearch
from torch_eplb.policies.layer import Layer
from torch_eplb.policies.split import even_split, rank_loads
from torch_eplb.values.placement import Placement

__all__ = ["Rules", "improve", "is_far", "par"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Placed = NDArray[np.int32]
_Kind = TypeVar("_Kind", bound=Layer)

_SMALL = 8
"""Up to this many ranks all sets of ranks are judged (255 of them)."""

_STEPS = 96
"""Search steps of a layer at most, where replicas share evenly."""

_STEPS_PER_ROUND = 8
_PATIENCE = 8
"""Rounds without gain after which a layer is left."""

_BUDGET = 12
_LEAST_BUDGET = 480
"""Search steps by cuts, per layer and at least."""

_FAR = 1.2
"""Mean PAR above which a layer may start from elsewhere: see `_anew`."""

_LOYALTY = 2.5
"""How much more risk a rank may have than another before an expert leaves it, in units of the mean
load of a slot: the less, the more balance, and the more moves."""

_CLEAR = 0.1
"""A start that is better by this much is not compared with the other any further."""

_TRIAL = 8
"""Search steps that each of two starts gets before the better one goes on."""


@dataclass(frozen=True)
class Rules:
    """What a search may do.

    Attributes:
        fixed: whether every replica's share is the same in all samples, or there are no replicas.
        price: what a changed slot must gain in mean PAR.
        target: mean PAR at which a layer is good enough.
        most: most slots changed per layer.
        nodes: experts stay on their node, of this many.
        anew: layers that are far from balance may be placed anew.
        deadline: of `time.monotonic`.
    """

    fixed: bool
    price: float = 0.0
    target: float = 1.0
    most: float = math.inf
    nodes: int = 1
    anew: bool = True
    deadline: float = math.inf

    def over(self) -> bool:
        return time.monotonic() > self.deadline


def is_far(values: Floats, rules: Rules) -> Bools:
    """Which layers may be placed anew, by their mean PAR."""
    far: Bools = rules.anew & (values > max(_FAR, rules.target))
    return far


def improve(x: Floats, start: Placed, rules: Rules) -> tuple[Placed, Floats]:
    """Placements that are better than ``start``, and their mean PAR ``[layers]``.

    Args:
        x: ``[samples, layers, experts]`` in units of the mean rank load.
        start: ``[layers, ranks, slots]``.
        rules: bounds.
    """
    return _by_shares(x, start, rules) if rules.fixed else _by_cuts(x, start, rules)


def par(x: Floats, experts: Placed, fixed: bool) -> Floats:
    """``[samples, layers]``: PAR under the split that the runtime will use, nearly.

    Arguments as in `improve` and `Rules`.
    """
    if fixed:
        placement = Placement(experts, x.shape[2])
        peaks = rank_loads(x, placement, even_split(placement)).max(axis=2)
    else:
        peaks = solve_batches(_columns(x), experts, 16)[0].max(axis=1).T
    return np.maximum(peaks, 1.0)


def _by_shares(x: Floats, start: Placed, rules: Rules) -> tuple[Placed, Floats]:
    experts = np.array(start)
    values = par(x, experts, True).mean(axis=0)
    rival: dict[int, Placed] = {}
    for layer, placed, value in _anew(x, start, rules, values):
        if value < values[layer] - _CLEAR:
            experts[layer], values[layer] = placed, value
        else:
            rival[layer] = placed
    for layer in np.argsort(-values, kind="stable").tolist():  # worst first
        if rules.over():
            break
        search = _layer(FixedSearch, x[:, layer], start[layer], rules)
        search.reset(experts[layer])
        if layer in rival:
            _better_start(search, rival[layer], rules)
        search.run(rules.target, _STEPS)
        experts[layer], values[layer] = search.experts, search.par()
    return experts, values


def _better_start(search: FixedSearch, rival: Placed, rules: Rules) -> None:
    """Search a little from where it is and from the rival, and go on with what gets further."""
    best, least = rival, math.inf
    for placed in (search.experts, rival):
        search.reset(placed)
        search.run(rules.target, _TRIAL)
        net = search.par() + rules.price * search.moved
        if net < least:
            best, least = search.experts, net
    search.reset(best)


def _anew(
    x: Floats, start: Placed, rules: Rules, values: Floats
) -> Iterator[tuple[int, Placed, float]]:
    """Placements anew that stay near ``start``, of layers far from balance, and their mean PAR.

    A local search stays near where it starts, and takes its time over each move. Building a
    placement takes next to nothing.
    """
    far = np.flatnonzero(is_far(values, rules))
    if not len(far) or rules.over() or start.shape[2] * rules.nodes >= x.shape[2]:
        return  # the last: every rank holds every expert (of its node)
    found = flashlb.place_by_risk(
        x[:, far], start[far], start[far], rules.nodes, 1, _LOYALTY / start.shape[2]
    )
    moved = Placement(start[far], x.shape[2]).newly_held(Placement(found, x.shape[2]))
    allowed = moved <= rules.most
    after = par(x[:, far], found, True).mean(axis=0)
    for index in np.flatnonzero(allowed & (after + rules.price * moved < values[far])).tolist():
        yield int(far[index]), found[index], float(after[index])


@dataclass
class _Climb:
    """One layer's way up.

    Attributes:
        search: at the placement that is tried next.
        experts, value: the best placement so far, and its mean PAR.
        net: that and its moves' price.
        trust: steps of the next round.
        failures: rounds without gain since the last one with.
    """

    search: CutSearch
    experts: Placed
    value: float = math.inf
    net: float = math.inf
    trust: int = _STEPS_PER_ROUND
    failures: int = field(default=0)

    def judge(self, value: float, sets: Bools) -> None:
        """Take in what the split made of the placement, and the sets that bound it.

        The search trusts the sets that it knows, and so may spoil others: a round that made the
        layer worse is undone, with the sets that showed it kept, and the next one is shorter.
        """
        net = value + self.search.price * self.search.moved
        if net < self.net:
            self.value, self.net, self.experts = value, net, self.search.experts
            self.trust, self.failures = min(2 * self.trust, _STEPS_PER_ROUND), 0
        else:
            self.search.reset(self.experts)
            self.trust, self.failures = max(self.trust // 4, 1), self.failures + 1
        self.search.learn(sets)


def _by_cuts(x: Floats, start: Placed, rules: Rules) -> tuple[Placed, Floats]:
    """Search, find the sets that bind by solving the splits, and search on."""
    searches = [_layer(CutSearch, x[:, n], start[n], rules) for n in range(len(start))]
    _start(x, start, searches, rules)
    climbs = [_Climb(search, search.experts) for search in searches]
    ranks = start.shape[1]
    if ranks <= _SMALL:
        for search in searches:
            search.learn(all_sets(ranks))
    budget = max(_BUDGET * len(climbs), _LEAST_BUDGET)
    live = list(range(len(climbs)))
    while live:
        tried = np.stack([climbs[layer].search.experts for layer in live])
        values, sets = binding_sets(_columns(x[:, live]), tried)
        for layer, value, tight in zip(live, values.tolist(), sets, strict=True):
            climbs[layer].judge(value, tight)
        live = [
            layer
            for layer in live
            if climbs[layer].value > rules.target and climbs[layer].failures < _PATIENCE
        ]
        tired = set()
        for layer in sorted(live, key=lambda layer: -climbs[layer].value):  # worst first
            used = 0
            if budget > 0 and not rules.over():
                used = climbs[layer].search.run(rules.target, climbs[layer].trust)
            budget -= used
            if not used:
                tired.add(layer)
        live = [layer for layer in live if layer not in tired]
    return np.stack([climb.experts for climb in climbs]), np.array([c.value for c in climbs])


def _start(x: Floats, start: Placed, searches: list[CutSearch], rules: Rules) -> None:
    """Let layers far from balance start from what even shares ask for, if that pays."""
    net = par(x, start, rules.fixed).mean(axis=0)
    far = np.flatnonzero(is_far(net, rules))
    if not len(far) or rules.over():
        return
    there = x[:, far]
    other = _by_shares(there, start[far], rules)[0]
    value = par(there, other, rules.fixed).mean(axis=0)
    for index, layer in enumerate(far.tolist()):
        search = searches[layer]
        search.reset(other[index])
        if value[index] + rules.price * search.moved >= net[layer] or search.moved > rules.most:
            search.reset(start[layer])


def _layer(kind: type[_Kind], x: Floats, start: Placed, rules: Rules) -> _Kind:
    """A search of one layer, ``x [samples, experts]``, ``start [ranks, slots]``."""
    allowed = None if rules.nodes == 1 else _own_nodes(start, x.shape[1], rules.nodes)
    return kind(start, x, allowed=allowed, price=rules.price, most=rules.most)


def _own_nodes(experts: Placed, num_experts: int, nodes: int) -> Bools:
    """``[experts, ranks]``: the ranks of the node that holds the expert."""
    ranks = len(experts)
    held = np.zeros((num_experts, ranks), dtype=bool)
    held[experts, np.arange(ranks)[:, None]] = True
    return np.repeat(held.reshape(num_experts, nodes, -1).any(axis=2), ranks // nodes, axis=1)


def _columns(x: Floats) -> NDArray[np.float32]:
    """``[samples, layers, experts]`` to ``[layers, experts, samples]``."""
    return np.ascontiguousarray(x.transpose(1, 2, 0), dtype=np.float32)
