"""The local search of policy "flow": which experts of one layer to move.

Two kinds of change: *replace* (a slot whose expert has another replica takes in another expert)
and *swap* (two slots of different ranks exchange their experts). Each step rates all changes to
first order, the most promising ones exactly, and makes the best; what is gained must be worth the
slots that change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torch_eplb.policies.objectives import Objective

__all__ = ["Search"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_CANDIDATES = (16, 512)
"""Least and most changes of each kind that are rated exactly per step."""

_WORK = 50_000
"""Numbers that rating the changes of a kind may take, about; sets how many are rated."""

_PROMISING = 0.3
"""Changes whose slope is below this part of the best one's are not rated, if there are many."""

_PAIRS = 6144
"""Pairs whose first-order gain is looked at, about: sets how many experts (or slots, in a swap)
are considered as the one to leave a peak, the most promising first."""

_TOGETHER = 32
"""Changes that are considered for being made in one step."""

_NEARLY = 0.02
"""How far below the peak, in units of PAR, a pressure still matters for what is tried."""

_LEAST = 1e-6
"""Gains below this are rounding."""


@dataclass(frozen=True)
class _Changes:
    """Candidates: ``first`` goes to rank ``to`` (from rank ``via``, or as one more replica if -1);
    ``second`` leaves slot ``slot`` on rank ``to`` (for ``via``, or for good if that is -1)."""

    first: Ints
    second: Ints
    slot: Ints
    to: Ints
    source: Ints
    via: Ints


class Search:
    """One layer's placement while experts are moved about.

    Args:
        experts: ``[ranks, slots]``, the live placement.
        load: ``[samples, experts]`` in units of the mean rank load.
        allowed: ``[experts, ranks]`` bool, where an expert may sit; None for anywhere.
        price: what a changed slot must gain in mean PAR.
        most: most slots that may change.
    """

    def __init__(
        self,
        experts: NDArray[np.int32],
        load: Floats,
        *,
        allowed: Bools | None,
        price: float,
        most: float,
    ) -> None:
        ranks, slots = experts.shape
        self.load = load
        self.by_expert = np.ascontiguousarray(load.T, dtype=np.float32)
        self.slots = experts.reshape(-1).astype(np.int64)
        self.ranks = np.repeat(np.arange(ranks), slots)
        self.held = _held(experts, load.shape[1])
        self.origin = self.held.copy()
        self.allowed = allowed
        self.price = price
        self.most = most

    @property
    def moved(self) -> int:
        """Slots changed so far."""
        return int(((self.held > 0) & (self.origin == 0)).sum())

    def experts(self, slots: int) -> NDArray[np.int32]:
        return self.slots.reshape(-1, slots).astype(np.int32)

    def reset(self, experts: NDArray[np.int32]) -> None:
        """Go on from another placement; what counts as changed stays."""
        self.slots = experts.reshape(-1).astype(np.int64)
        self.held = _held(experts, self.load.shape[1])

    def value(self, objective: Objective) -> float:
        """The mean over samples of PAR, as judged."""
        return float(_value(self._pressure(objective), objective.softness))

    def _pressure(self, objective: Objective) -> Floats:
        """``[P, samples]``; single precision is ample for comparing changes."""
        weights: Floats = objective.weights(self.held).T.astype(np.float32) @ self.by_expert
        return weights

    def run(self, objective: Objective, target: float, steps: int) -> int:
        """Make changes while they pay and the value is above ``target``.

        Returns how many of the ``steps`` were used: an answer below ``steps`` means that nothing
        more pays.
        """
        pressure = self._pressure(objective)
        for step in range(steps):
            value = float(_value(pressure, objective.softness))
            changes = self._candidates(objective, pressure) if value > target else None
            if changes is None:
                return step
            delta = self._deltas(objective, changes)
            cost = self._costs(changes)
            net = self._nets(value, pressure, delta, cost, objective.softness)
            made = self._make(changes, delta, cost, net, pressure, objective.softness)
            if made is None:
                return step
            pressure = made
        return steps

    def _nets(
        self, value: float, pressure: Floats, delta: Floats, cost: Ints, softness: float
    ) -> Floats:
        """``[K]``: what each change gains beyond its price; minus infinity if not allowed."""
        gain = value - _value(pressure[:, None] + delta, softness)
        net = gain - self.price * cost
        # A change that only undoes an earlier one has a negative price, but must not make it worse.
        return np.where((gain > _LEAST) & (self.moved + cost <= self.most), net, -np.inf)

    def _make(
        self, changes: _Changes, delta: Floats, cost: Ints, net: Floats, pressure: Floats,
        softness: float,
    ) -> Floats | None:  # fmt: skip
        """Make the best change, then the best of those that still pay after it, and so on.

        A change's effect on the pressures depends on its two experts only, so those of other
        experts are still exact. Returns the new pressures, None if nothing pays.
        """
        made = None
        order = np.argsort(-net, kind="stable")[:_TOGETHER]
        net = net[order]
        while len(order) and net.max() > _LEAST:
            best = order[net.argmax()]
            self._apply(changes, int(best))
            pressure = made = pressure + delta[:, best]
            touched = (changes.first[best], changes.second[best])
            apart = ~np.isin(changes.first[order], touched)
            order = order[apart & ~np.isin(changes.second[order], touched)]
            value = float(_value(pressure, softness))
            net = self._nets(value, pressure, delta[:, order], cost[order], softness)
        return made

    def _candidates(self, objective: Objective, pressure: Floats) -> _Changes | None:
        top = pressure.max(axis=0)
        over = top > 1.0 + _LEAST
        if not over.any():
            return None
        # Peaks that are nearly as high come next: look for changes that relieve them, too.
        weight = np.exp((pressure[:, over] - top[over]) * np.float32(1 / _NEARLY))
        weight[weight < 0.05] = 0.0
        pressed = np.flatnonzero(weight.any(axis=1))
        add, remove, move = objective.slopes(
            self.held, weight[pressed] @ self.load[over], pressed, self.slots, self.ranks
        )
        free = self.held == 0
        if self.allowed is not None:
            free &= self.allowed
        count = int(np.clip(_WORK // pressure.size, *_CANDIDATES))
        return _join(self._replacements(add, remove, free, count), self._swaps(move, free, count))

    def _replacements(self, add: Floats, remove: Floats, free: Bools, count: int) -> list[Ints]:
        spare = np.flatnonzero(remove > -np.inf)
        most = np.where(free, add, -np.inf).max(axis=1)
        experts = _highest(most, _PAIRS // max(len(spare), 1))
        rank = self.ranks[spare]
        fits = free[experts][:, rank]
        score = np.where(fits, add[experts][:, rank] + remove[spare], -np.inf)
        row, index = _best(score, count)
        expert = experts[row]
        slot = spare[index]
        none = np.full(len(slot), -1)
        return [expert, self.slots[slot], slot, self.ranks[slot], none, none]

    def _swaps(self, move: Floats, free: Bools, count: int) -> list[Ints]:
        # One side of a swap must relieve a peak: only the slots that would do most of that.
        relief = np.where(free[self.slots], move, -np.inf).max(axis=1)
        sources = _highest(relief, _PAIRS // len(self.slots))
        score = move[sources][:, self.ranks] + move[:, self.ranks[sources]].T
        fits = free[self.slots[sources]][:, self.ranks] & free[self.slots][:, self.ranks[sources]].T
        index, slot = _best(np.where(fits, score, -np.inf), count)
        source = sources[index]
        return [
            self.slots[source], self.slots[slot], slot, self.ranks[slot], source,
            self.ranks[source],
        ]  # fmt: skip

    def _rows(self, changes: _Changes) -> tuple[Floats, Floats, Floats, Floats]:
        """Held rows before and after, of both experts of each change, ``[K, ranks]``."""
        index = np.arange(len(changes.first))
        swap = changes.via >= 0
        first, second = self.held[changes.first], self.held[changes.second]
        first_after, second_after = first.copy(), second.copy()
        first_after[index, changes.to] = 1.0
        first_after[index[swap], changes.via[swap]] = 0.0
        second_after[index, changes.to] = 0.0
        second_after[index[swap], changes.via[swap]] = 1.0
        return first, first_after, second, second_after

    def _deltas(self, objective: Objective, changes: _Changes) -> Floats:
        """``[P, K, samples]``: how each change changes the pressures."""
        rows = np.concatenate(self._rows(changes))
        before_first, after_first, before_second, after_second = np.split(
            objective.weights(rows).T.astype(np.float32), 4, axis=1
        )
        delta = (after_first - before_first)[:, :, None] * self.by_expert[changes.first]
        delta += (after_second - before_second)[:, :, None] * self.by_expert[changes.second]
        return delta

    def _costs(self, changes: _Changes) -> Ints:
        """``[K]``: how many more slots differ from the live placement."""
        foreign = self.origin == 0
        cost = foreign[changes.first, changes.to].astype(np.int64)
        cost -= foreign[changes.second, changes.to]
        swap = changes.via >= 0
        back = foreign[changes.second, changes.via].astype(np.int64)
        back -= foreign[changes.first, changes.via]
        return cost + np.where(swap, back, 0)

    def _apply(self, changes: _Changes, index: int) -> None:
        first, second = changes.first[index], changes.second[index]
        to, via = changes.to[index], changes.via[index]
        self.slots[changes.slot[index]] = first
        self.held[first, to], self.held[second, to] = 1.0, 0.0
        if via >= 0:
            self.slots[changes.source[index]] = second
            self.held[first, via], self.held[second, via] = 0.0, 1.0


def _value(pressure: Floats, softness: float) -> Floats:
    """Mean over samples of the highest pressure, ``[P, ..., samples]`` to ``[...]``.

    With softness it is a smooth maximum (softness * log-sum-exp): what the highest comes to when
    pressures may yet rise by about that much.
    """
    top = pressure.max(axis=0)
    if softness:
        spread = np.exp((pressure - top) * np.float32(1.0 / softness)).sum(axis=0)
        top = top + np.float32(softness) * np.log(spread)
    return np.maximum(top, 1.0).mean(axis=-1, dtype=np.float64)


def _held(experts: NDArray[np.int32], num_experts: int) -> Floats:
    held = np.zeros((num_experts, len(experts)))
    held[experts, np.arange(len(experts))[:, None]] = 1.0
    return held


def _highest(value: Floats, count: int) -> Ints:
    """Indices of the ``count`` highest values, at least 16 if there are as many."""
    return np.argsort(-value, kind="stable")[: max(count, 16)]


def _best(score: Floats, count: int) -> tuple[Ints, Ints]:
    """Row and column of the ``count`` highest positive scores."""
    flat = score.reshape(-1)
    index = np.flatnonzero(flat > 0)
    if len(index) > count:
        index = index[flat[index] > _PROMISING * flat[index].max()]
    if len(index) > count:
        index = index[np.argpartition(-flat[index], count)[:count]]
    row, column = np.divmod(index, score.shape[1])
    return row, column


def _join(one: list[Ints], other: list[Ints]) -> _Changes | None:
    parts = [np.concatenate(pair) for pair in zip(one, other, strict=True)]
    return _Changes(*parts) if len(parts[0]) else None
