"""Policy "flow" (first, provisional version)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torch_eplb.placement import Placement
from torch_eplb.planning.deepseek import place
from torch_eplb.planning.judges import CutJudge, EvenJudge, all_sets
from torch_eplb.planning.search import Search
from torch_eplb.planning.batches import Replicas, solve_batches, tightest_cuts
from torch_eplb.planning.plan import Topology

__all__ = ["Knobs", "plan"]


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


SPREAD = {"batch": 2.0, "local": 3.0, "table": 1.5, "even": 1.5}
ROUNDS = 4
STEPS = 64
TOLERANCE = 1e-3
_SMALL = 8


def plan(
    load: NDArray[np.float64],
    current: Placement,
    topology: Topology,
    replica_choice: str,
    knobs: Knobs,
) -> Placement:
    x = widen(units(load, current.num_ranks), SPREAD[replica_choice])
    if replica_choice in ("even", "table"):
        return _plan_even(x, current, knobs)
    return _plan_batch(x, current, knobs)


def _searches(x, current, knobs):
    most = np.inf if knobs.max_moves is None else knobs.max_moves
    return [
        Search(current.experts[layer], x[:, layer], None, knobs.min_gain, most)
        for layer in range(current.num_layers)
    ]


def _plan_even(x, current, knobs):
    judge = EvenJudge()
    searches = _searches(x, current, knobs)
    for search in searches:
        search.run(judge, knobs.target_par, STEPS)
    return Placement(np.stack([s.experts(current.num_slots) for s in searches]), current.num_experts)


TIMES = {}
import time
FIRST=16
ITER=24
CUTS=1
REVERT=True
def _plan_batch(x, current, knobs):
    ranks = current.num_ranks
    searches = _searches(x, current, knobs)
    small = ranks <= _SMALL
    base = all_sets(ranks) if small else np.eye(ranks, dtype=bool)
    judges = [CutJudge(base) for _ in searches]
    experts = np.array(current.experts)
    best = np.array(experts)
    best_net = np.full(len(experts), np.inf)
    live = np.arange(len(experts))
    trust = np.full(len(experts), STEPS if small else FIRST)
    believed = np.zeros(len(experts))
    trace = []
    for turn in range(ROUNDS + 1):
        t=time.time()
        value, cuts = _exact(x[:, live], Placement(experts[live], current.num_experts), ITER)
        TIMES[turn,'exact']=time.time()-t
        t=time.time()
        go_on = []
        for index, layer in enumerate(live):
            search = searches[layer]
            net = value[index] + knobs.min_gain * search.moved
            if net < best_net[layer]:
                best_net[layer] = net
                best[layer] = experts[layer]
                if turn and not small: trust[layer] = min(trust[layer]*2, FIRST)
            else:
                trust[layer] = max(trust[layer]//2, 1)
                if REVERT: search.reset(best[layer])
            if value[index] <= knobs.target_par or turn == ROUNDS:
                continue
            if small and turn: continue
            if not small:
                judges[layer] = judges[layer].with_sets(cuts[index])
            believed[layer] = search.run(judges[layer], knobs.target_par, trust[layer])
            experts[layer] = search.experts(current.num_slots)
            if (experts[layer]==best[layer]).all(): continue
            go_on.append(layer)
        TIMES[turn,'search']=time.time()-t, len(live), value.mean(), np.mean([len(j.sets) for j in judges])
        live = np.array(go_on, dtype=int)
        if not len(live):
            break
    return Placement(best, current.num_experts)


def _exact(x, placement, iterations=2000):
    load = np.ascontiguousarray(x.transpose(1, 2, 0))
    layout = Replicas.of(placement.experts, placement.num_experts)
    loads, _ = solve_batches(load, placement.experts, iterations)
    total = load.reshape(-1, load.shape[2])[layout.expert]
    _, per_rank, place = tightest_cuts(loads, layout.fixed_loads(load), total, layout)
    value = np.maximum(loads.max(axis=1), 1.0).mean(axis=1)
    cuts = []
    top = np.argsort(-per_rank, axis=1)[:, :CUTS] + 1
    for l in range(len(place)):
        cuts.append(np.unique(np.concatenate([(place[l] < top[l, c]).T for c in range(top.shape[1])]), axis=0))
    return value, cuts


def units(load, num_ranks):
    mean = load.sum(axis=2, keepdims=True) / num_ranks
    return np.divide(load, mean, out=np.zeros_like(load), where=mean > 0)


def widen(x, spread):
    mean = x.mean(axis=0)
    wide = np.maximum(mean + spread * (x - mean), 0.0)
    total = wide.sum(axis=2, keepdims=True)
    return np.divide(wide * x.sum(axis=2, keepdims=True), total, out=np.zeros_like(x), where=total > 0)
