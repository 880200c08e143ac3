"""The local search of policy "flow" where replicas share evenly, whatever the batch.

What it lowers is a soft maximum of the rank loads, softness * log(sum of exp(load / softness)),
mean over the samples: any rank near the peak may become it in the steps to come. In exp the parts
of a rank's load multiply, so that the effect of *every* swap of two slots comes out of one matrix
product; no estimate decides which changes are looked at.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from torch_eplb.policies.layer import Layer, best_entries

__all__ = ["FixedSearch"]

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_SCATTER = 0.75
"""Softness, in parts of how far a rank's load scatters over the samples (standard deviation)."""

_LEVEL = 0.3
"""Softness is at least this part of the distance from balance: far above it many ranks may tie at
the peak, where no single change would count."""

_LEAST_SOFT = 0.01

_PAIRS = 1 << 16
"""Swaps that are rated per step, about: sets how many of the most loaded ranks take part."""

_CANDIDATES = 48
"""Changes of each kind that are considered for being made in one step."""

_TOGETHER = 8
"""Changes made in one step, at most. They touch different ranks, so that their effects add up."""

_HIGHEST = 60.0
"""Exponents stay below it: single precision is ample for comparing changes, and ends at 88."""


class _Change(NamedTuple):
    """``slot`` exchanges its expert with slot ``other``, or, if that is -1, takes in ``expert``."""

    net: float
    cost: int
    slot: int
    other: int
    expert: int


class FixedSearch(Layer):
    """One layer's search. Arguments are those of `Layer`."""

    def par(self) -> float:
        """The mean over samples of PAR."""
        return _mean(self.loads())

    def loads(self) -> Floats:
        """``[ranks, samples]``."""
        return self.held.T.astype(np.float64) @ self._parts()

    def _parts(self) -> Floats:
        """``[experts, samples]``: tokens of each of an expert's replicas."""
        return self.load / self.held.sum(axis=1)[:, None]

    def run(self, target: float, steps: int) -> int:
        """Make changes while they pay and PAR is above ``target``; returns the steps used.

        First with the softness that the distance from balance asks for, then with less.
        """
        loads = self.loads()
        scatter = _SCATTER * float(loads.std(axis=1).mean())
        used = 0
        for level in (_LEVEL * (_mean(loads) - 1.0), 0.0):
            soft = max(scatter, level, _LEAST_SOFT, float(self.load.max(initial=0.0)) / _HIGHEST)
            used += self._run(soft, target, steps - used)
            if scatter >= level:
                break
        return used

    def _run(self, soft: float, target: float, steps: int) -> int:
        loads = self.loads()
        value, together = _soft_peak(loads, soft), _TOGETHER
        for step in range(steps):
            if _mean(loads) <= target:
                return step
            before, moved = self.experts, self.moved
            if not self._make(self._changes(loads, soft), together):
                return step
            loads = self.loads()
            now = _soft_peak(loads, soft)
            if value - now > self.price * (self.moved - moved):
                value, together = now, _TOGETHER
                continue
            # Replacements whose experts meet on a third rank are not rated exactly.
            self.reset(before)
            if together == 1:
                return step
            loads, together = self.loads(), 1
        return steps

    def _changes(self, loads: Floats, soft: float) -> list[_Change]:
        """Changes that pay, best first."""
        power = np.exp(((loads - loads.max(axis=0)) / soft).astype(np.float32))
        power /= power.sum(axis=0) * np.float32(loads.shape[1])
        grown = np.exp((self._parts() / soft).astype(np.float32))
        changes = self._swaps(power, grown, soft) + self._replacements(power, grown, soft)
        return sorted(changes, key=lambda change: -change.net)

    def _swaps(self, power: Singles, grown: Singles, soft: float) -> list[_Change]:
        """Every swap of a slot on one of the hottest ranks.

        Args:
            power: ``[ranks, samples]``, exp of the loads, summing to 1 over all.
            grown: ``[experts, samples]``, exp of a replica's part.
        """
        heat = power.sum(axis=1)
        count = max(8, _PAIRS // (len(self.slots) * self.num_slots))
        hottest = np.argsort(-heat, kind="stable")[:count]
        hot = (hottest[:, None] * self.num_slots + np.arange(self.num_slots)).reshape(-1)
        into = grown[self.slots]
        left = power[self.ranks] / into
        after = left[hot] @ into.T + into[hot] @ left.T
        np.subtract(heat[self.ranks], after, out=after)
        after += heat[self.ranks[hot]][:, None]
        fits, cost = self.swaps(hot)
        net = self.nets(after, cost, fits, soft)
        row, slot = best_entries(net, _CANDIDATES)
        none = np.full(len(row), -1)
        return _listed(net[row, slot], cost[row, slot], hot[row], slot, none)

    def _replacements(self, power: Singles, grown: Singles, soft: float) -> list[_Change]:
        """Every replacement; exact unless both experts sit on a third rank, too."""
        spare = self.spare()
        if not len(spare):
            return []
        count = self.held.sum(axis=1)[:, None]
        expert, rank = self.slots[spare], self.ranks[spare]
        total = self.held.astype(np.float32) @ power  # [experts, samples]: of all its ranks
        more = np.exp((self.load / (count + 1) / soft).astype(np.float32))
        relief = (total * (1.0 - more / grown)).sum(axis=1)
        fewer = np.exp((self.load[expert] / (count[expert] - 1) / soft).astype(np.float32))
        burden = ((total[expert] - power[rank]) * (fewer / grown[expert] - 1.0)).sum(axis=1)
        own = more @ (power[rank] / grown[expert]).T  # [experts, spare]
        np.subtract(power.sum(axis=1)[rank] - burden, own, out=own)
        own += relief[:, None]
        fits, cost = self.replacements(spare)
        net = self.nets(own, cost, fits, soft)
        row, index = best_entries(net, _CANDIDATES)
        none = np.full(len(row), -1)
        return _listed(net[row, index], cost[row, index], spare[index], none, row)

    def _make(self, changes: list[_Change], most: int) -> int:
        """Make the first change, then others on ranks that are still as they were."""
        touched = np.zeros(self.num_ranks, dtype=bool)
        moved, made = self.moved, 0
        for change in changes:
            if made == most:
                break
            first, second = self.slots[change.slot], change.expert
            ranks = self.ranks[[change.slot, change.other]]
            if change.other < 0:  # then all replicas' parts change
                ranks = np.flatnonzero(self.held[first] | self.held[second])
            if touched[ranks].any() or moved + change.cost > self.most:
                continue
            touched[ranks] = True
            moved, made = moved + change.cost, made + 1
            if change.other >= 0:
                second = int(self.slots[change.other])
                self.put(change.other, int(first))
            self.put(change.slot, int(second))
        return made


def _listed(*columns: NDArray[np.generic]) -> list[_Change]:
    return [_Change(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]


def _mean(loads: Floats) -> float:
    return float(np.maximum(loads.max(axis=0), 1.0).mean())


def _soft_peak(loads: Floats, soft: float) -> float:
    top = loads.max(axis=0)
    return float((top + soft * np.log(np.exp((loads - top) / soft).sum(axis=0))).mean())
