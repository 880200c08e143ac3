"""The local search of policy "flow" where every batch gets its best split.

By the duality of flows and cuts a sample's PAR is the highest load per rank over all *sets* of
ranks, where a set is loaded by the experts whose replicas all lie within it. So what a change
brings needs no new solution of the split: it changes which sets enclose its two experts. The search
knows a pool of sets: all of them with few ranks, else those that a solved split has shown to be
tight, more of them as it goes on (cutting planes; Kelley 1960).

A set's *pressure* in a sample is its load per rank, in units of the mean rank load. Changes are
chosen as in `fixed.FixedSearch`, by a soft maximum of the pressures, where one matrix product rates
all swaps and another one all replacements; the best of them are then rated by the maximum itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torch_eplb.policies.batches import Replicas, solve_batches, tightest_cuts
from torch_eplb.policies.layer import LEAST, Layer, best_entries

__all__ = ["CutSearch", "all_sets", "binding_sets"]

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_SOFT = 0.15
"""Softness of the maximum, in parts of the distance from balance: far above it many sets may tie at
the peak, where no single change would count."""

_LEAST_SOFT = 0.01
"""In units of the mean rank load."""

_SETS = 4
"""Sets of several ranks that choosing changes looks at in each sample, of the highest pressures."""

_PAIRS = 1 << 14
"""Swaps that are rated per step, about: sets how many slots are considered as the one that leaves
a peak, those that would do most of that first."""

_CANDIDATES = 16
"""Changes of each kind that are rated by the maximum of the pool's pressures, per step."""

_HIGHEST = np.float32(40.0)
"""Exponents are cut off there: beyond, a change is a disaster or a relief, whatever else."""

_NEARLY = 0.97
"""Sets with less than this per rank, in units of the mean, do not bind."""

_TIGHT = 2
"""Sets that are learnt from each sample at most."""

_ITERATIONS = 16
"""Of the solver, for finding sets: any split's sets are valid, only the tightest take longer."""


class _Changes(NamedTuple):
    """Candidates: ``first`` goes to rank ``to`` (from rank ``via``, or as one more replica if -1);
    ``second`` leaves slot ``slot`` on rank ``to`` (for slot ``source`` on ``via``, or for good if
    that is -1). ``cost`` as in `Layer`."""

    first: Ints
    second: Ints
    to: Ints
    via: Ints
    slot: Ints
    source: Ints
    cost: Ints


class _Power(NamedTuple):
    """exp(pressure / softness), in parts of each sample's sum, which are the weights of the soft
    maximum; columns are pairs of a set of several ranks and a sample.

    Attributes:
        weight: ``[columns]``, of these sets.
        outside: ``[R, columns]``, 1 where the rank is not in the set.
        beyond: ``[experts, columns]``, replicas outside of the set.
        rise: ``[experts, columns]``, the exponent by which the expert would raise the set.
        single: ``[R, samples]``, weights of the ranks alone.
        single_rise: ``[experts, samples]``.
        alone: ``[experts]``, whether the expert has one slot.
    """

    weight: Singles
    outside: Singles
    beyond: Singles
    rise: Singles
    single: Singles
    single_rise: Singles
    alone: Bools


class CutSearch(Layer):
    """One layer's search. Arguments are those of `Layer`.

    Attributes:
        sets: ``[P, R]`` bool, the pool; the first R are the ranks alone.
        beyond: ``[experts, P]``, how many replicas are outside of the set: none, and it is loaded.
        pressure: ``[P, samples]``.
    """

    def __init__(
        self,
        experts: NDArray[np.int32],
        load: Floats,
        *,
        allowed: Bools | None = None,
        price: float = 0.0,
        most: float = np.inf,
    ) -> None:
        self.by_expert = np.ascontiguousarray(load.T, dtype=np.float32)
        self.sets = np.zeros((0, len(experts)), dtype=bool)
        self.soft = np.float32(_LEAST_SOFT)
        super().__init__(experts, load, allowed=allowed, price=price, most=most)
        self._pool(np.eye(self.num_ranks, dtype=bool))

    def _pool(self, sets: Bools) -> None:
        self.sets = sets
        self.away = (~sets).T.astype(np.float32)  # [R, P]: the rank is outside of the set
        self.scale = (1.0 / sets.sum(axis=1)).astype(np.float32)
        self._measure()

    def _measure(self) -> None:
        self.beyond = self.held.astype(np.float32) @ self.away
        self.pressure = ((self.beyond == 0) * self.scale).T @ self.by_expert

    def reset(self, experts: NDArray[np.int32]) -> None:
        super().reset(experts)
        if len(self.sets):
            self._measure()

    def learn(self, sets: Bools) -> None:
        """Add ``sets [n, ranks]`` bool, none empty, to the pool."""
        known = {row.tobytes() for row in np.packbits(self.sets, axis=1)}
        packed = [row.tobytes() for row in np.packbits(sets, axis=1)]
        new = [index for index, key in enumerate(packed) if key not in known]
        if new:
            self._pool(np.concatenate((self.sets, sets[new])))

    def par(self) -> float:
        """The mean over samples of PAR, as far as the pool knows: never too high."""
        return float(_mean(self.pressure.max(axis=0)))

    def run(self, target: float, steps: int) -> int:
        """Make changes while they pay and PAR is above ``target``; returns the steps used."""
        self.soft = np.float32(max(_SOFT * (self.par() - 1.0), _LEAST_SOFT))
        for step in range(steps):
            if self.par() <= target or not self._make(self._candidates()):
                return step
        return steps

    def _make(self, changes: _Changes) -> bool:
        """Make the best change, then the best of those that still pay after it, and so on.

        A change's effect on the pressures depends on its two experts only, so those of other
        experts are still exact.
        """
        if not len(changes.first):
            return False
        first, second = changes.first, changes.second
        cost = changes.cost.astype(np.int64)
        one = self._shifts(first, changes.to, changes.via)
        other = self._shifts(second, changes.via, changes.to)
        x_one, x_other = self.by_expert[first], self.by_expert[second]
        reach = self.scale[:, None] * np.maximum(x_one.max(axis=0), x_other.max(axis=0))
        near = ((self.pressure + reach) >= self.pressure.max(axis=0)).any(axis=1)
        rows, rest = np.flatnonzero(near), np.flatnonzero(~near)
        delta = one[:, rows, None] * x_one[:, None] + other[:, rows, None] * x_other[:, None]
        value, moved, made = float(self._peak(self.pressure[rows])), self.moved, False
        live = np.arange(len(first))
        while len(live):
            after = self._peak(self.pressure[rows] + delta[live])
            net = value - after - self.price * cost[live]
            net[moved + cost[live] > self.most] = 0.0
            if net.max() <= LEAST:
                break
            index = int(net.argmax())
            best = live[index]
            made, moved, value = True, moved + cost[best], after[index]
            self.pressure += one[best][:, None] * x_one[best]
            self.pressure += other[best][:, None] * x_other[best]
            self._apply(changes, best)
            same = (first[live] == first[best]) | (first[live] == second[best])
            same |= (second[live] == first[best]) | (second[live] == second[best])
            live = live[~same & (net > 0)]
            # Several changes may bring up a set that one of them could not.
            if (self.pressure[rest] + reach[rest] >= self.pressure.max(axis=0)).any():
                break
        return made

    def _peak(self, pressure: Singles) -> Floats:
        """``[..., sets, samples]`` to ``[...]``: mean of the soft maximum."""
        top = pressure.max(axis=-2, keepdims=True)
        above = np.exp((pressure - top) / self.soft).sum(axis=-2)
        peak: Floats = (top[..., 0, :] + self.soft * np.log(above)).mean(axis=-1, dtype=np.float64)
        return peak

    def _shifts(self, expert: Ints, to: Ints, via: Ints) -> Singles:
        """``[K, P]``: how the weights of experts change that come to rank ``to``, leave ``via``."""
        before = self.beyond[expert]
        away = np.concatenate((self.away, np.zeros((1, self.away.shape[1]), np.float32)))
        after = before + away[to] - away[via]  # -1 is no rank
        return ((after == 0).astype(np.float32) - (before == 0)) * self.scale

    def _apply(self, changes: _Changes, index: int) -> None:
        first, second = int(changes.first[index]), int(changes.second[index])
        self.put(int(changes.slot[index]), first)
        if changes.source[index] >= 0:
            self.put(int(changes.source[index]), second)
        pair = [first, second]
        self.beyond[pair] = self.held[pair].astype(np.float32) @ self.away

    def _candidates(self) -> _Changes:
        power = self._power()
        parts = zip(self._replacements(power), self._swaps(power), strict=True)
        return _Changes(*(np.concatenate(pair) for pair in parts))

    def _power(self) -> _Power:
        ranks, samples = self.num_ranks, self.pressure.shape[1]
        several = self.pressure[ranks:]
        count = min(_SETS, len(several))
        near = np.zeros((0, samples), dtype=np.int64)
        if count:
            near = np.argpartition(-several, count - 1, axis=0)[:count] + ranks
        top = self.pressure.max(axis=0)
        high = self.pressure[near, np.arange(samples)]
        weight = np.exp(np.maximum((high - top) / self.soft, -_HIGHEST))
        single = np.exp(np.maximum((self.pressure[:ranks] - top) / self.soft, -_HIGHEST))
        total = (weight.sum(axis=0) + single.sum(axis=0)) * np.float32(samples)
        sets = near.reshape(-1)
        rise = self.by_expert / self.soft
        return _Power(
            weight=(weight / total).reshape(-1),
            outside=self.away[:, sets],
            beyond=self.beyond[:, sets],
            rise=np.tile(rise, count) * self.scale[sets],
            single=single / total,
            single_rise=np.minimum(rise, _HIGHEST),
            alone=self.held.sum(axis=1) == 1,
        )

    def _replacements(self, power: _Power) -> _Changes:
        spare = self.spare()
        rank, expert = self.ranks[spare], self.slots[spare]
        outside = power.outside[rank]
        there = outside * power.weight  # of sets without the rank
        inside = power.beyond[expert] == outside  # all other replicas are in the set
        risen = there * np.exp(np.minimum(inside * power.rise[expert], _HIGHEST))
        fallen = np.exp(np.maximum((power.beyond == 0) * -power.rise, -_HIGHEST))
        gain = there.sum(axis=1) - fallen @ risen.T  # [experts, spare]
        # A rank alone is relieved of an expert that gets its first replica, and has to bear all
        # of one that loses its last.
        home = self.held.argmax(axis=1)
        relief = power.single[home] * (1.0 - np.exp(-power.single_rise))
        gain += (power.alone * relief.sum(axis=1))[:, None]
        pair = np.flatnonzero(self.held.sum(axis=1)[expert] == 2)
        rest = self.held[expert[pair]]
        rest[np.arange(len(pair)), rank[pair]] = False
        burden = np.exp(power.single_rise[expert[pair]]) - 1.0
        gain[:, pair] -= (power.single[rest.argmax(axis=1)] * burden).sum(axis=1)
        fits, cost = self.replacements(spare)
        first, index = best_entries(self.nets(gain, cost, fits, float(self.soft)), _CANDIDATES)
        slot, none = spare[index], np.full(len(index), -1)
        return _Changes(
            first,
            self.slots[slot],
            self.ranks[slot],
            none,
            slot,
            none,
            cost[first, index].astype(np.int64),
        )

    def _swaps(self, power: _Power) -> _Changes:
        expert, rank = self.slots, self.ranks
        outside = power.outside[rank]
        others_inside = power.beyond[expert] == outside
        grown = np.exp(np.minimum(others_inside * power.rise[expert], _HIGHEST))
        there = (1.0 - outside) * power.weight  # of sets with the slot's rank
        alone = np.exp(power.alone[expert][:, None] * power.single_rise[expert])
        single = power.single[rank]
        # Sets with the one rank and without the other lose one expert and take in the other.
        giving = np.concatenate((there, there / grown, single, single / alone), axis=1)
        taking = np.concatenate((outside, outside * grown, np.ones_like(alone), alone), axis=1)
        width, samples = outside.shape[1], alone.shape[1]
        sign = np.repeat(np.array([1, -1, 1, -1], np.float32), [width, width, samples, samples])
        count = max(16, _PAIRS // len(expert))
        hot = np.argsort(-(giving @ sign), kind="stable")[:count]
        gain = (giving[hot] * sign) @ taking.T + (taking[hot] * sign) @ giving.T
        fits, cost = self.swaps(hot)
        row, slot = best_entries(self.nets(gain, cost, fits, float(self.soft)), _CANDIDATES)
        source = hot[row]
        return _Changes(
            expert[source],
            expert[slot],
            rank[slot],
            rank[source],
            slot,
            source,
            cost[row, slot].astype(np.int64),
        )


def _mean(top: Singles) -> Floats:
    """Mean over samples, the last axis, of highest pressures; at least 1."""
    mean: Floats = np.maximum(top, np.float32(1.0)).mean(axis=-1, dtype=np.float64)
    return mean


def all_sets(num_ranks: int) -> Bools:
    """``[2^R - 1, R]``: every set of ranks but the empty one, those of one rank first."""
    index = np.arange(1, 2**num_ranks)
    sets = (index[:, None] >> np.arange(num_ranks) & 1).astype(bool)
    return sets[np.argsort(sets.sum(axis=1), kind="stable")]


def binding_sets(load: NDArray[Any], experts: NDArray[np.int32]) -> tuple[Floats, list[Bools]]:
    """Mean PAR of each layer, split by the batch, and the sets of ranks that bind in its samples.

    Args:
        load: ``[layers, experts, samples]`` in units of the mean rank load.
        experts: ``[layers, ranks, slots]``.

    Returns:
        ``[layers]``; for each layer ``[sets, ranks]`` bool, two sets for a sample, without those
        that are far from binding.
    """
    layout = Replicas.of(experts, load.shape[1])
    loads, _ = solve_batches(load, experts, _ITERATIONS)
    total = load.reshape(-1, load.shape[2])[layout.expert]
    _, per_rank, place = tightest_cuts(loads, layout.fixed_loads(load), total, layout)
    size = np.argsort(-per_rank, axis=1)[:, :_TIGHT] + 1  # [layers, tight, samples]
    inside = place[:, None] < size[:, :, None]  # [layers, tight, R, samples]
    tight = np.take_along_axis(per_rank, size - 1, axis=1) > _NEARLY
    sets = [
        np.unique(both.transpose(0, 2, 1)[keep], axis=0)
        for both, keep in zip(inside, tight, strict=True)
    ]
    return _mean(loads.max(axis=1)), sets
