"""Policy "flow": move the fewest experts that make the steps to come balanced.

It judges placements on the window's samples under the split that the runtime will use, starting
from the live placement: nothing moves in a layer that the split alone balances, and elsewhere only
what pays. Where replicas share evenly, or there are none, what counts is how high ranks' loads rise
together (`fixed`); where the split of every batch is solved, whether hot ranks can hand tokens on
(`cuts`). A layer that is far from balance may start from another placement, if all that moves for
it pays.

Three guards against chasing noise. Samples scatter less than the steps that they sum up, so each
sample's distance from the mean is widened before judging (`SPREAD`). A change must gain more than
its price. And where the samples scatter much as independent tokens would (`dispersion`),
every token is dealt to one of two halves, and a layer is left alone unless what pays on one half
also pays on the other, beyond chance: the halves share what moves the load, but not the noise.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from torch_eplb.policies.active import least_active, make_room
from torch_eplb.policies.deepseek import groups_on_nodes, node_bound, place
from torch_eplb.policies.improve import Rules, improve, is_far, par
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology

__all__ = ["SPREAD", "Knobs", "plan"]

Floats = NDArray[np.float64]
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
        weight_tokens: tokens that take as long as an expert's weights, where batches are split by
            what they cost; see `worked`.
        sample_steps: steps that a sample sums up.
    """

    min_gain: float = 0.0003
    target_par: float = 1.005
    max_moves: int | None = None
    plan_seconds: float | None = None
    weight_tokens: int = 0
    sample_steps: int = 1

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

_DOUBT = 3.0
"""How many standard errors a layer's gain on unseen tokens must be above nothing, where the samples
scatter as independent tokens do; in parts of that where they scatter more, or less."""

_LITTLE = 0.001
"""Added to the standard error: smaller gains are not worth a plan."""

_LOOKED_AT = 16
"""Samples in which whole experts are counted."""

_UNLIKE = 0.25
"""Nothing is doubted where samples scatter this much less, or as many times more."""


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
    by_cost = task.weight and not task.rules.fixed
    if not node_bound(current, topology):
        experts = task.improve(current.experts)[0]
        if by_cost:
            by_tokens, _ = task.by_tokens().improve(current.experts)
            experts = task.cheapest(current.experts, [current.experts, experts, by_tokens])
        return Placement(experts, current.num_experts)
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
    if by_cost:
        by_tokens, _ = task.by_tokens().improve(start)
        experts = task.cheapest(current.experts, [start, experts, by_tokens])
    return Placement(experts, current.num_experts)


class _Task:
    """One plan's samples and rules.

    Attributes:
        load: ``[samples, layers, experts]``, perhaps with neighbouring samples added up.
        x: the same in units of the mean rank load, widened.
    """

    def __init__(
        self, load: Floats, choice: str, knobs: Knobs, current: Placement, topology: Topology
    ) -> None:
        fixed = choice in ("even", "table") or not current.num_redundant_experts
        deadline = math.inf
        if knobs.plan_seconds is not None:
            deadline = time.monotonic() + knobs.plan_seconds
        self.rules = Rules(
            fixed,
            price=knobs.min_gain,
            target=knobs.target_par,
            most=math.inf if knobs.max_moves is None else knobs.max_moves,
            nodes=topology.num_nodes if node_bound(current, topology) else 1,
            deadline=deadline,
        )
        self.spread = SPREAD
        self.weight = knobs.weight_tokens if choice in ("batch", "local") else 0
        self.steps = knobs.sample_steps
        if not fixed and len(load) > _SAMPLES:
            added = -(-len(load) // _SAMPLES)
            load = np.add.reduceat(load, np.arange(0, len(load), added), axis=0)
            self.spread *= math.sqrt(added)
            self.steps *= added
        self.num_ranks = current.num_ranks
        self.load = load
        self.x = self.judged(load)

    def by_tokens(self) -> _Task:
        """The same, with weights that cost nothing; time that is over is over for both."""
        other = copy.copy(self)
        other.weight = 0
        other.x = other.judged(self.load)
        return other

    def judged(self, load: Floats, part: float = 1.0) -> Floats:
        """Load, or a ``part`` of its tokens, as it is searched with."""
        if self.weight:
            load = worked(load, part * self.weight, self.steps)
        return widen(units(load, self.num_ranks), self.spread)

    def improve(self, start: Placed, layers: Bools | None = None) -> tuple[Placed, Floats]:
        """Search from ``start [layers, ranks, slots]``, in the layers of the mask.

        Returns the placement and each layer's value (mean PAR as judged).
        """
        experts = np.array(start)
        value = par(self.x, start, self.rules.fixed).mean(axis=0)
        todo = value > self.rules.target
        if layers is not None:
            todo &= layers
        careful = replace(self.rules, anew=False)
        for rules in (self.rules, careful):
            lasts = todo.copy()
            lasts[todo] = self._lasts(start[todo], self.load[:, todo], rules)
            if lasts.any():
                experts[lasts], value[lasts] = improve(self.x[:, lasts], start[lasts], rules)
            # Placed anew a layer fits its samples best, and noise, too: then with few moves.
            todo &= ~lasts & is_far(value, self.rules)
            if not todo.any():
                break
        return experts, value

    def cheapest(self, current: Placed, candidates: list[Placed]) -> Placed:
        """Each layer's placement that costs least, moves away from ``current`` included.

        Searching takes active experts for jobs that can be split. Here they are whole: where nearly
        all of them are active, one more on a rank costs as much as any imbalance of tokens. So each
        candidate is also tried with room for what is active more often than not.
        """
        looked = np.linspace(0, len(self.load) - 1, min(len(self.load), _LOOKED_AT)).astype(int)
        load = self.load[looked]
        work = worked(load, self.weight, self.steps)
        mean, x = work.sum(axis=2) / self.num_ranks, units(work, self.num_ranks)
        part = activity(load, self.steps)
        active = np.random.default_rng(0).random(load.shape) < part
        tokens = self.load.mean(axis=0)
        often = activity(self.load, self.steps).mean(axis=0) > 0.5
        per_node = self.num_ranks // self.rules.nodes
        for experts in candidates[:]:
            roomy = [
                make_room(placed, often[layer], tokens[layer], per_node)
                for layer, placed in enumerate(experts)
            ]
            if not np.array_equal(roomy, experts):
                candidates.append(np.stack(roomy))
        costs = []
        for experts in candidates:
            most = [
                [least_active(placed, here) for placed, here in zip(experts, there, strict=True)]
                for there in active
            ]
            whole = np.array(most) * (self.weight * self.steps) / np.maximum(mean, 1.0)
            cost = np.maximum(whole, par(x, experts, False)).mean(axis=0)
            moved = _moved(current, experts, load.shape[2])
            price = self.rules.price * moved
            costs.append(np.where(moved > self.rules.most, math.inf, cost + price))
            if len(costs) == 1:
                enough = cost <= self.rules.target
            else:
                costs[-1][enough] = math.inf
        best = np.argmin(costs, axis=0)
        chosen: Placed = np.stack(candidates)[best, np.arange(len(best))]
        return chosen

    def _lasts(self, start: Placed, load: Floats, rules: Rules) -> Bools:
        """``[layers]``: whether what half of the tokens ask for pays for the other half, too.

        A placement fits the samples that it was made for so well that it always seems to pay, even
        where they are nothing but noise.
        """
        lasts = np.ones(len(start), dtype=bool)
        if len(load) < 2 or (load != np.rint(load)).any():
            return lasts  # no counts of tokens
        scatter = dispersion(load)
        alike = np.minimum(scatter, 1.0 / np.maximum(scatter, np.finfo(float).tiny))
        doubtful = alike > _UNLIKE
        if not doubtful.any():
            return lasts
        start, load = start[doubtful], load[:, doubtful]
        half = np.random.default_rng(0).binomial(load.astype(np.int64), 0.5).astype(np.float64)
        found, _ = improve(self.judged(half, 0.5), start, rules)
        unseen = self.judged(load - half, 0.5)
        gain = par(unseen, start, rules.fixed) - par(unseen, found, rules.fixed)
        error = gain.std(axis=0, ddof=1) / math.sqrt(len(gain)) + _LITTLE
        least = _DOUBT * alike[doubtful] * error
        least += rules.price * _moved(start, found, load.shape[2])
        lasts[doubtful] = gain.mean(axis=0) > least
        return lasts


def units(load: Floats, num_ranks: int) -> Floats:
    """The load in units of each sample's mean rank load; 0 where there is none."""
    mean = load.sum(axis=2, keepdims=True) / num_ranks
    return np.divide(load, mean, out=np.zeros_like(load), where=mean > 0)


def worked(load: Floats, weight_tokens: float, steps: int) -> Floats:
    """What experts cost, in tokens' time: their tokens, or their weights where those take longer.

    An active expert is a job that should not be split; as one that can be, it gives the same
    peaks, but for rounding: the least number of jobs on the fullest rank is the greatest mean over
    a set of ranks of the jobs that only they can do, rounded up.

    Args:
        load: ``[samples, layers, experts]``, tokens.
        weight_tokens: as in `Knobs`.
        steps: steps of a sample.

    >>> worked(np.array([[[0.0, 3.0, 20.0]]]), 8.0, 1).tolist()
    [[[0.0, 8.0, 20.0]]]
    >>> worked(np.array([[[0.0, 2.0, 40.0]]]), 8.0, 2).round(1).tolist()  # 2 in 2 steps: in 1.26
    [[[0.0, 10.1, 40.0]]]
    """
    return np.maximum(load, activity(load, steps) * (steps * weight_tokens))


def activity(load: Floats, steps: int) -> Floats:
    """Part of a sample's steps in which an expert has tokens: as if they were independent.

    >>> activity(np.array([0.0, 2.0]), 1).tolist()
    [0.0, 1.0]
    """
    if steps == 1:
        return (load > 0).astype(np.float64)
    part: Floats = -np.expm1(-load / steps)
    return part


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


def dispersion(counts: Floats) -> Floats:
    """``[layers]``: how much samples scatter, in parts of what independent tokens would.

    Args:
        counts: ``[samples, layers, experts]``, tokens; at least two samples.
    """
    of_all = counts.sum(axis=(0, 2), keepdims=True)
    share = np.divide(
        counts.sum(axis=0), of_all[0], out=np.zeros_like(counts[0]), where=of_all[0] > 0
    )
    expected = counts.sum(axis=2, keepdims=True) * share
    apart = (counts - expected) ** 2
    each = np.divide(apart, expected, out=np.zeros_like(apart), where=expected > 0)
    freedom = (len(counts) - 1) * np.maximum((share > 0).sum(axis=1) - 1, 1)
    scatter: Floats = each.sum(axis=(0, 2)) / freedom
    return scatter


def _moved(before: Placed, after: Placed, num_experts: int) -> NDArray[np.int64]:
    """``[layers]``: slots whose expert its rank did not hold before."""
    return Placement(before, num_experts, allow_duplicates=True).newly_held(
        Placement(after, num_experts, allow_duplicates=True)
    )
