"""Policy "flow": move the fewest experts that make the steps to come balanced.

It judges placements on the window's samples under the split that the runtime will use, starting
from the live placement: nothing moves in a layer that the split alone balances, and elsewhere only
what pays (`search`). A layer that is far from balance may start from another policy's placement, if
all that moves for it pays. Where the split of every batch is solved, what counts is not how even
the mean loads are but whether hot ranks can hand tokens on: see `objectives.CutObjective`.

Samples are sums over several steps, and single steps scatter more than sums do; so each sample's
distance from the mean is widened before judging (`SPREAD`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torch_eplb.policies import flashlb, swift
from torch_eplb.policies.batches import Replicas, solve_batches, tightest_cuts
from torch_eplb.policies.deepseek import groups_on_nodes, node_bound, place
from torch_eplb.policies.objectives import CutObjective, EvenObjective, Objective, all_sets
from torch_eplb.policies.search import Search
from torch_eplb.policies.split import even_split, judged_par
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology

__all__ = ["SPREAD", "Knobs", "plan"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Placed = NDArray[np.int32]


@dataclass(frozen=True)
class Knobs:
    """How eagerly experts move.

    Attributes:
        min_gain: least fall of a layer's mean PAR that every changed slot must bring.
        target_par: nothing moves in a layer whose predicted PAR is at most this.
        max_moves: most slots changed per layer and rebalance; None for no bound.
    """

    min_gain: float = 0.001
    target_par: float = 1.005
    max_moves: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("min_gain", 0.0), ("target_par", 1.0)):
            value = getattr(self, name)
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


SPREAD = {"batch": 2.0, "local": 3.0, "table": 2.0, "even": 2.0}
"""Factor on each sample's distance from the mean. A sum over k independent steps scatters less
than a step does by sqrt(k); "local" solves each rank's part of a batch, which scatters more yet.
Not fitted closely: 1.5 to 3 give much the same on recorded and synthetic load."""

_SMALL = 8
"""Up to this many ranks all sets of ranks are judged (255 of them)."""

_STEPS = 64
"""Search steps of a layer at most, per plan (and per round of cuts: `_STEPS_PER_ROUND`)."""

_STEPS_PER_ROUND = 12
_ROUNDS = 8

_FAR = 1.2
"""Mean PAR above which a layer does not start from where it is: see `_Task._restart`."""

_CUTS_COST = 3
"""What finding a layer's cuts costs, in search steps."""

_WORK = 2 << 26
"""Numbers that searching by cuts may look at per plan, about: under a second's worth. What is then
left undone is left to the next rebalance, worst layers first."""

_NEARLY = 0.97
"""Sets with less than this per rank, in units of the mean, do not bind."""

_CUT_ITERATIONS = 16
"""Of the solver, for finding cuts: any split's cuts are valid, only the tightest take longer."""


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
    x = widen(units(load, current.num_ranks), SPREAD[replica_choice])
    task = _Task(x, replica_choice, knobs, current, topology)
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
    """One plan's samples and bounds, and the search through all layers."""

    def __init__(
        self, x: Floats, choice: str, knobs: Knobs, current: Placement, topology: Topology
    ) -> None:
        self.x = x
        self.fixed = choice in ("even", "table")
        self.knobs = knobs
        self.num_ranks = current.num_ranks
        self.num_slots = current.num_slots
        self.num_experts = current.num_experts
        self.topology = topology if node_bound(current, topology) else None

    def improve(self, start: Placed, layers: Bools | None = None) -> tuple[Placed, Floats]:
        """Search from ``start [layers, ranks, slots]``, in the layers of the mask.

        Returns the placement and each layer's value (mean PAR as judged).
        """
        mask = np.ones(len(start), dtype=bool) if layers is None else layers
        experts = np.array(start)
        value = np.zeros(len(start))
        searches = {int(layer): self._search(start, int(layer)) for layer in np.flatnonzero(mask)}
        objective: Objective
        if self.fixed:
            objective = EvenObjective()
        elif self.num_ranks <= _SMALL:
            objective = CutObjective(all_sets(self.num_ranks))
        else:
            self._search_by_cuts(searches, experts, value)
            return experts, value

        def rate(layers: Ints, tried: Placed) -> Floats:
            for layer, placed in zip(layers.tolist(), tried, strict=True):
                searches[layer].reset(placed)
            return np.array([searches[layer].value(objective) for layer in layers.tolist()])

        self._restart(searches, experts, rate)
        for layer, search in searches.items():
            search.run(objective, self.knobs.target_par, _STEPS)
            experts[layer] = search.experts(self.num_slots)
            value[layer] = search.value(objective)
        return experts, value

    def _search(self, start: Placed, layer: int) -> Search:
        allowed = None
        if self.topology is not None:
            allowed = self._own_nodes(start[layer])
        most = np.inf if self.knobs.max_moves is None else self.knobs.max_moves
        return Search(
            start[layer],
            self.x[:, layer],
            allowed=allowed,
            price=self.knobs.min_gain,
            most=most,
        )

    def _own_nodes(self, experts: NDArray[np.int32]) -> Bools:
        """``[experts, ranks]``: the ranks of the node that holds the expert."""
        assert self.topology is not None
        held = np.zeros((self.num_experts, self.num_ranks), dtype=bool)
        held[experts, np.arange(self.num_ranks)[:, None]] = True
        nodes = held.reshape(self.num_experts, self.topology.num_nodes, -1).any(axis=2)
        return np.repeat(nodes, self.topology.ranks_per_node, axis=1)

    def _search_by_cuts(self, searches: dict[int, Search], experts: Placed, value: Floats) -> None:
        """Search, find the cuts that bind by solving the splits, and search on; in place.

        The search trusts the cuts that it knows, and so may spoil others: a round that made a
        layer worse is undone, with the cuts that showed it kept, and the next one is shorter.
        """
        objectives = {layer: CutObjective(np.eye(self.num_ranks, dtype=bool)) for layer in searches}
        best = dict.fromkeys(searches, np.inf)
        trust = dict.fromkeys(searches, _STEPS_PER_ROUND)
        tried = np.array(experts)
        live = list(searches)
        step_cost = 4 * self.x.shape[0] * self.num_experts * self.num_ranks
        budget = max(_WORK // step_cost, 3 * len(searches))
        self._restart(searches, tried, lambda layers, at: binding_cuts(self.x[:, layers], at)[0])
        for turn in range(_ROUNDS + 1):
            values, cuts = binding_cuts(self.x[:, live], tried[live])
            budget -= _CUTS_COST * len(live) if turn else 0
            pending = []
            for layer, now, sets in zip(live, values, cuts, strict=True):
                search = searches[layer]
                net = now + self.knobs.min_gain * search.moved
                if net < best[layer]:
                    best[layer], value[layer] = net, now
                    experts[layer] = tried[layer]
                    trust[layer] = min(2 * trust[layer], _STEPS_PER_ROUND)
                else:
                    search.reset(experts[layer])
                    trust[layer] = max(trust[layer] // 4, 1)
                objectives[layer] = objectives[layer].with_sets(sets)
                if value[layer] > self.knobs.target_par:
                    pending.append(layer)
            live = []
            # Worst first, as far as the budget goes.
            for layer in sorted(pending, key=lambda layer: -value[layer]):
                if turn == _ROUNDS or budget <= 0:
                    break
                used = searches[layer].run(objectives[layer], self.knobs.target_par, trust[layer])
                budget -= used
                tried[layer] = searches[layer].experts(self.num_slots)
                if used:
                    live.append(layer)
            if not live:
                return

    def _restart(
        self,
        searches: dict[int, Search],
        tried: Placed,
        rate: Callable[[Ints, Placed], Floats],
    ) -> None:
        """Start layers that are far from balance from elsewhere, if that pays; in place.

        A local search stays near where it starts, and takes its time over each move. Tried are
        the few moves of "swift" and a placement anew by risk ("flashlb" without its search).
        ``rate`` gives the layers' mean PAR.
        """
        layers = np.array(list(searches))
        net = rate(layers, tried[layers])
        far = net > max(_FAR, self.knobs.target_par)
        layers, net = layers[far], net[far]
        if not len(layers):
            return
        x, start = self.x[:, layers], Placement(tried[layers], self.num_experts)
        topology = self.topology or Topology(self.num_ranks)
        nodes = topology.num_nodes if self.topology else 1
        few = swift.plan(x, start, topology).experts
        anew = np.array(few)
        lasts = self._placing_anew_lasts(x, start, nodes)
        if lasts.any():
            where = start.experts[lasts]
            anew[lasts] = flashlb.place_by_risk(x[:, lasts], where, where, nodes, depth=1)
        for other in (few, anew):
            value = rate(layers, other)
            for index, layer in enumerate(layers.tolist()):
                search = searches[layer]
                search.reset(other[index])
                restart_net = value[index] + self.knobs.min_gain * search.moved
                if restart_net < net[index] and search.moved <= search.most:
                    net[index], tried[layer] = restart_net, other[index]
        for layer in layers.tolist():
            searches[layer].reset(tried[layer])

    def _placing_anew_lasts(self, x: Floats, start: Placement, nodes: int) -> Bools:
        """``[layers]``: whether a placement for every other sample pays on the samples between.

        A placement anew fits the samples so well that it always seems to pay, even where they are
        nothing but noise; then it would be made anew at every plan.
        """
        if len(x) < 2:
            return np.ones(x.shape[1], dtype=bool)
        seen, unseen = x[::2], x[1::2]
        anew = flashlb.place_by_risk(seen, start.experts, start.experts, nodes, depth=1)
        moved = _moved(start.experts, anew, self.num_experts)
        gain = self._mean_par(unseen, start.experts) - self._mean_par(unseen, anew)
        return gain > self.knobs.min_gain * moved

    def _mean_par(self, x: Floats, experts: Placed) -> Floats:
        """``[layers]``: mean PAR over samples ``x`` under the split that the runtime will use."""
        if self.fixed:
            placement = Placement(experts, self.num_experts)
            return judged_par(x, placement, even_split(placement), "even").mean(axis=0)
        loads, _ = solve_batches(
            np.ascontiguousarray(x.transpose(1, 2, 0)), experts, _CUT_ITERATIONS
        )
        return np.maximum(loads.max(axis=1), 1.0).mean(axis=1)


def binding_cuts(x: Floats, experts: Placed) -> tuple[Floats, list[Bools]]:
    """Mean PAR of each layer, split by the batch, and the sets of ranks that bind in its samples.

    Args:
        x: ``[samples, layers, experts]`` in units of the mean rank load.
        experts: ``[layers, ranks, slots]``.

    Returns:
        ``[layers]``; for each layer ``[sets, ranks]`` bool, two sets for a sample, without those
        that are far from binding.
    """
    load = np.ascontiguousarray(x.transpose(1, 2, 0))
    layout = Replicas.of(experts, load.shape[1])
    loads, _ = solve_batches(load, experts, _CUT_ITERATIONS)
    total = load.reshape(-1, load.shape[2])[layout.expert]
    _, per_rank, place = tightest_cuts(loads, layout.fixed_loads(load), total, layout)
    size = np.argsort(-per_rank, axis=1)[:, :2] + 1  # [layers, 2, samples]
    inside = place[:, None] < size[:, :, None]  # [layers, 2, R, samples]
    tight = np.take_along_axis(per_rank, size - 1, axis=1) > _NEARLY
    cuts = [
        np.unique(sets.transpose(0, 2, 1)[keep], axis=0)
        for sets, keep in zip(inside, tight, strict=True)
    ]
    return np.maximum(loads.max(axis=1), 1.0).mean(axis=1), cuts


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
