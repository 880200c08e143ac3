"""Policy "flow": move the fewest experts that make the steps to come balanced.

It judges placements on the window's samples under the split that the runtime will use, starting
from the live placement: nothing moves in a layer that the split alone balances, and elsewhere only
what pays. Where replicas share evenly, or there are none, what counts is how high ranks' loads rise
together (`fixed`); where the split of every batch is solved, whether hot ranks can hand tokens on
(`cuts`). A layer that is far from balance may start from another placement, if all that moves for
it pays.

Three guards against chasing noise. Samples scatter less than the steps that they sum up, so each
sample's distance from the mean is widened before judging (`SPREAD`). A change must gain more than
its price. And a layer is left alone unless changes that were found on every other sample pay on the
samples between, beyond what chance gives.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torch_eplb.policies import flashlb
from torch_eplb.policies.batches import solve_batches
from torch_eplb.policies.cuts import CutSearch, all_sets, binding_sets
from torch_eplb.policies.deepseek import groups_on_nodes, node_bound, place
from torch_eplb.policies.fixed import FixedSearch
from torch_eplb.policies.layer import Layer
from torch_eplb.policies.split import even_split, rank_loads
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology

__all__ = ["SPREAD", "Knobs", "plan"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Placed = NDArray[np.int32]


@dataclass(frozen=True)
class Knobs:
    """How eagerly experts move, and how long that may be thought about.

    Attributes:
        min_gain: least fall of a layer's mean PAR that every changed slot must bring.
        target_par: nothing moves in a layer whose predicted PAR is at most this.
        max_moves: most slots changed per layer and rebalance; None for no bound.
        plan_seconds: a search that takes longer answers the best that it has found; None for no
            bound. What is then left undone is left to the next rebalance, worst layers first.
    """

    min_gain: float = 0.0003
    target_par: float = 1.005
    max_moves: int | None = None
    plan_seconds: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("min_gain", 0.0), ("target_par", 1.0), ("plan_seconds", 0.0)):
            value = getattr(self, name)
            if value is None and name == "plan_seconds":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not least <= value < math.inf:
                raise ValueError(f"{name} must be a finite number of at least {least}, got {value}")
        if self.max_moves is None:
            return
        if isinstance(self.max_moves, bool) or not isinstance(self.max_moves, int):
            raise TypeError(f"max_moves must be an int or None, got {self.max_moves!r}")
        if self.max_moves < 0:
            raise ValueError(f"max_moves must be at least 0, got {self.max_moves}")

    @classmethod
    def of(cls, **given: float | int | None) -> Knobs:
        """Knobs with defaults where the value is None."""
        return cls(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


SPREAD = 2.0
"""Factor on each sample's distance from the mean. A sum over k independent steps scatters less
than a step does by sqrt(k). Not fitted closely: 1.5 to 3 give much the same on recorded and
synthetic load."""

_SAMPLES = 32
"""Most samples that searching by cuts looks at: neighbours are added up."""

_SMALL = 8
"""Up to this many ranks all sets of ranks are judged (255 of them)."""

_STEPS = 96
"""Search steps of a layer at most."""

_STEPS_PER_ROUND = 12
_ROUNDS = 8

_BUDGET = 24
"""Search steps of a plan by cuts, per layer; layers far from balance may take those of others."""

_FAR = 1.2
"""Mean PAR above which a layer does not start from where it is: see `_Task._starts`."""

_SIGMAS = 3.0
"""How many standard errors a layer's gain on unseen samples must be above nothing."""


def plan(
    load: Floats,
    current: Placement,
    topology: Topology,
    replica_choice: str,
    knobs: Knobs,
) -> Placement:
    """The placement after the moves that pay.

    Args:
        load: ``[samples, layers, experts]``, at least 0 and finite.
        current: the placement that is live now.
        topology: with expert groups bound to nodes (`deepseek.node_bound`), experts only move
            within their group's node. Layers that do not keep groups on nodes yet are placed anew,
            whatever the knobs say; whole groups change nodes only where that pays, too.
        replica_choice: "batch", "local", "table" or "even".
        knobs: how eagerly experts move.
    """
    task = _Task(load, replica_choice, knobs, current, topology)
    if not node_bound(current, topology):
        return Placement(task.improve(current.experts)[0], current.num_experts)
    anew = current.align(place(load.mean(axis=0), current, topology)).experts
    kept = groups_on_nodes(current, topology)
    start = np.where(kept[:, None, None], current.experts, anew)
    experts, value = task.improve(start)
    # Groups never change nodes in the search. Where a layer is still unbalanced, try that.
    retry = kept & (value > knobs.target_par)
    if retry.any():
        other, other_value = task.improve(np.where(retry[:, None, None], anew, experts), retry)
        price = knobs.min_gain * _moved(current.experts, experts, current.num_experts)
        other_moved = _moved(current.experts, other, current.num_experts)
        better = retry & (other_value + knobs.min_gain * other_moved < value + price)
        if knobs.max_moves is not None:
            better &= other_moved <= knobs.max_moves
        experts = np.where(better[:, None, None], other, experts)
    return Placement(experts, current.num_experts)


class _Task:
    """One plan's samples and bounds, and the search through all layers.

    Attributes:
        fixed: whether every replica's share is the same in all samples, or there are no replicas.
        x: ``[samples, layers, experts]`` in units of the mean rank load, widened.
    """

    def __init__(
        self, load: Floats, choice: str, knobs: Knobs, current: Placement, topology: Topology
    ) -> None:
        self.fixed = choice in ("even", "table") or not current.num_redundant_experts
        spread = SPREAD
        if not self.fixed and len(load) > _SAMPLES:
            added = -(-len(load) // _SAMPLES)
            load = np.add.reduceat(load, np.arange(0, len(load), added), axis=0)
            spread *= math.sqrt(added)
        self.x = widen(units(load, current.num_ranks), spread)
        self.knobs = knobs
        self.current = current
        self.topology = topology if node_bound(current, topology) else None
        self.deadline = math.inf
        if knobs.plan_seconds is not None:
            self.deadline = time.monotonic() + knobs.plan_seconds

    def improve(self, start: Placed, layers: Bools | None = None) -> tuple[Placed, Floats]:
        """Search from ``start [layers, ranks, slots]``, in the layers of the mask.

        Returns the placement and each layer's value (mean PAR as judged).
        """
        experts = np.array(start)
        value = self.par(self.x, start).mean(axis=0)
        todo = value > self.knobs.target_par
        if layers is not None:
            todo &= layers
        todo[todo] = self._lasts(start, np.flatnonzero(todo))
        if not todo.any():
            return experts, value
        todo_layers = np.flatnonzero(todo)
        experts[todo], value[todo] = self._search(self.x, start, todo_layers)
        return experts, value

    def par(self, x: Floats, experts: Placed) -> Floats:
        """``[samples, layers]``: PAR under the split that the runtime will use, nearly."""
        if self.fixed:
            placement = Placement(experts, self.current.num_experts)
            peaks = rank_loads(x, placement, even_split(placement)).max(axis=2)
        else:
            peaks = solve_batches(_columns(x), experts, 16)[0].max(axis=1).T
        return np.maximum(peaks, 1.0)

    def _lasts(self, start: Placed, layers: Ints) -> Bools:
        """``[layers]``: whether what every other sample asks for pays on the samples between.

        A placement fits the samples that it was made for so well that it always seems to pay, even
        where they are nothing but noise.
        """
        if len(self.x) < 4 or not len(layers):
            return np.ones(len(layers), dtype=bool)
        found, _ = self._search(self.x[::2], start, layers)
        unseen = self.x[1::2][:, layers]
        gain = self.par(unseen, start[layers]) - self.par(unseen, found)
        error = gain.std(axis=0, ddof=1) / math.sqrt(len(gain))
        moved = _moved(start[layers], found, self.current.num_experts)
        lasts: Bools = gain.mean(axis=0) > _SIGMAS * error + self.knobs.min_gain * moved
        return lasts

    def _search(self, x: Floats, start: Placed, layers: Ints) -> tuple[Placed, Floats]:
        if self.fixed:
            return self._search_fixed(x, start, layers)
        return self._search_by_cuts(x, start, layers)

    def _layer(self, kind: type[Layer], x: Floats, start: Placed, layer: int) -> Layer:
        knobs = self.knobs
        return kind(
            start[layer],
            x[:, layer],
            allowed=None if self.topology is None else self._own_nodes(start[layer]),
            price=knobs.min_gain,
            most=math.inf if knobs.max_moves is None else knobs.max_moves,
        )

    def _own_nodes(self, experts: Placed) -> Bools:
        """``[experts, ranks]``: the ranks of the node that holds the expert."""
        assert self.topology is not None
        ranks = self.current.num_ranks
        held = np.zeros((self.current.num_experts, ranks), dtype=bool)
        held[experts, np.arange(ranks)[:, None]] = True
        nodes = held.reshape(len(held), self.topology.num_nodes, -1).any(axis=2)
        return np.repeat(nodes, self.topology.ranks_per_node, axis=1)

    def _search_fixed(self, x: Floats, start: Placed, layers: Ints) -> tuple[Placed, Floats]:
        experts = np.array(start[layers])
        values = self.par(x[:, layers], experts).mean(axis=0)
        for index in np.argsort(-values, kind="stable").tolist():
            if time.monotonic() > self.deadline:
                break
            search = self._layer(FixedSearch, x, start, int(layers[index]))
            assert isinstance(search, FixedSearch)
            search.run(self.knobs.target_par, _STEPS)
            experts[index], values[index] = search.experts, search.par()
        return experts, values

    def _search_by_cuts(self, x: Floats, start: Placed, layers: Ints) -> tuple[Placed, Floats]:
        """Search, find the sets that bind by solving the splits, and search on.

        The search trusts the sets that it knows, and so may spoil others: a round that made a
        layer worse is undone, with the sets that showed it kept, and the next one is shorter.
        """
        ranks = self.current.num_ranks
        searches = [self._layer(CutSearch, x, start, int(layer)) for layer in layers]
        tried = self._starts(x, start, layers, searches)
        experts, value = tried.copy(), np.full(len(layers), np.inf)
        best, trust = np.full(len(layers), np.inf), np.full(len(layers), _STEPS_PER_ROUND)
        budget = _BUDGET * len(layers)
        live = np.arange(len(layers))
        if ranks <= _SMALL:
            for search in searches:
                search.learn(all_sets(ranks))
        for turn in range(_ROUNDS + 1):
            now, sets = binding_sets(_columns(x[:, layers[live]]), tried[live])
            pending = []
            for index, par, tight in zip(live.tolist(), now.tolist(), sets, strict=True):
                search = searches[index]
                net = par + self.knobs.min_gain * search.moved
                if net < best[index]:
                    best[index], value[index], experts[index] = net, par, tried[index]
                    trust[index] = min(2 * trust[index], _STEPS_PER_ROUND)
                else:
                    search.reset(experts[index])
                    trust[index] = max(trust[index] // 4, 1)
                search.learn(tight)
                if value[index] > self.knobs.target_par:
                    pending.append(index)
            live = []
            for index in sorted(pending, key=lambda index: -value[index]):  # worst first
                if turn == _ROUNDS or budget <= 0 or time.monotonic() > self.deadline:
                    break
                used = searches[index].run(self.knobs.target_par, int(trust[index]))
                budget -= used
                if used:
                    tried[index] = searches[index].experts
                    live.append(index)
            live = np.array(live, dtype=np.int64)
            if not len(live):
                break
        return experts, value

    def _starts(
        self, x: Floats, start: Placed, layers: Ints, searches: list[CutSearch]
    ) -> Placed:
        """Where the searches start: layers far from balance from elsewhere, if that pays.

        A local search stays near where it starts, and takes its time over each move. Tried are
        what an even split asks for, and a placement anew by risk ("flashlb" without its search).
        """
        tried = np.array(start[layers])
        net = self.par(x[:, layers], tried).mean(axis=0)
        far = np.flatnonzero(net > max(_FAR, self.knobs.target_par))
        if not len(far):
            return tried
        nodes = 1 if self.topology is None else self.topology.num_nodes
        others = []
        if time.monotonic() < self.deadline:
            where = start[layers[far]]
            others.append(flashlb.place_by_risk(x[:, layers[far]], where, where, nodes, depth=1))
            others.append(self._search_fixed(x, start, layers[far])[0])
        for other in others:
            value = self.par(x[:, layers[far]], other).mean(axis=0)
            for index, par, placed in zip(far.tolist(), value.tolist(), other, strict=True):
                search = searches[index]
                search.reset(placed)
                par += self.knobs.min_gain * search.moved
                if par < net[index] and search.moved <= search.most:
                    net[index], tried[index] = par, placed
        for index in far.tolist():
            searches[index].reset(tried[index])
        return tried


def _columns(x: Floats) -> NDArray[np.float32]:
    """``[samples, layers, experts]`` to ``[layers, experts, samples]``."""
    return np.ascontiguousarray(x.transpose(1, 2, 0), dtype=np.float32)


def units(load: Floats, num_ranks: int) -> Floats:
    """The load in units of each sample's mean rank load; 0 where there is none."""
    mean = load.sum(axis=2, keepdims=True) / num_ranks
    return np.divide(load, mean, out=np.zeros_like(load), where=mean > 0)


def widen(x: Floats, spread: float) -> Floats:
    """Each sample's distance from the mean times ``spread``, cut off at 0; sums are kept.

    >>> widen(np.array([[[1.0, 3.0]], [[3.0, 1.0]]]), 1.5).tolist()
    [[[0.5, 3.5]], [[3.5, 0.5]]]
    """
    mean = x.mean(axis=0)
    wide = np.maximum(mean + spread * (x - mean), 0.0)
    total = wide.sum(axis=2, keepdims=True)
    scale = np.divide(
        x.sum(axis=2, keepdims=True), total, out=np.zeros_like(total), where=total > 0
    )
    return wide * scale


def _moved(before: Placed, after: Placed, num_experts: int) -> NDArray[np.int64]:
    """``[layers]``: slots whose expert its rank did not hold before."""
    return Placement(before, num_experts, allow_duplicates=True).newly_held(
        Placement(after, num_experts, allow_duplicates=True)
    )
