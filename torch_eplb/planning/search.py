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

from torch_eplb.planning.judges import Judge

__all__ = ["Search"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_PROMISING = 0.3
_CANDIDATES = 32
"""Changes of each kind that are rated exactly per step."""


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
        self, experts: NDArray[np.int32], load: Floats, allowed: Bools | None, price: float,
        most: float, origin: NDArray[np.int32] | None = None,
    ) -> None:  # fmt: skip
        ranks, slots = experts.shape
        self.load = load
        self.slots = experts.reshape(-1).astype(np.int64)
        self.ranks = np.repeat(np.arange(ranks), slots)
        self.held = _held(experts, load.shape[1])
        self.origin = self.held.copy() if origin is None else _held(origin, load.shape[1])
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
        """Go on from another placement."""
        self.slots = experts.reshape(-1).astype(np.int64)
        self.held = _held(experts, self.load.shape[1])

    def run(self, judge: Judge, target: float, steps: int) -> float:
        """Make up to ``steps`` changes, while they pay; returns the mean PAR as judged."""
        pressure = judge.weights(self.held).T @ self.load.T  # [P, samples]
        for _ in range(steps):
            peak = pressure.max(axis=0)
            value = float(np.maximum(peak, 1.0).mean())
            if value <= target:
                return value
            changes = self._candidates(judge, pressure, peak)
            if changes is None:
                return value
            delta = self._deltas(judge, changes)
            after = np.maximum((pressure + delta).max(axis=1), 1.0).mean(axis=1)
            cost = self._costs(changes)
            net = value - after - self.price * cost
            net[self.moved + cost > self.most] = -np.inf
            best = int(net.argmax())
            if net[best] <= 1e-9 or value - after[best] <= 1e-9:
                return value
            self._apply(changes, best)
            pressure = pressure + delta[best]
        return float(np.maximum(pressure.max(axis=0), 1.0).mean())

    def _candidates(self, judge: Judge, pressure: Floats, peak: Floats) -> _Changes | None:
        over = peak > 1.0 + 1e-9
        if not over.any():
            return None
        pressed = pressure[:, over].argmax(axis=0)
        add, remove, move = judge.slopes(
            self.held, self.load[over], pressed, self.slots, self.ranks
        )
        free = self.held == 0
        if self.allowed is not None:
            free &= self.allowed
        return _join(self._replacements(add, remove, free), self._swaps(move, free))

    def _replacements(self, add: Floats, remove: Floats, free: Bools) -> list[Ints]:
        spare = np.flatnonzero(remove > -np.inf)
        rank = self.ranks[spare]
        score = np.where(free[:, rank], add[:, rank] + remove[spare], -np.inf)
        expert, index = _best(score, _CANDIDATES)
        slot = spare[index]
        none = np.full(len(slot), -1)
        return [expert, self.slots[slot], slot, self.ranks[slot], none, none]

    def _swaps(self, move: Floats, free: Bools) -> list[Ints]:
        # One side of a swap must relieve a peak: only the slots that would do most of that.
        relief = np.where(free[self.slots], move, -np.inf).max(axis=1)
        sources = np.argsort(-relief, kind="stable")[: 2 * _CANDIDATES]
        score = move[sources][:, self.ranks] + move[:, self.ranks[sources]].T
        fits = free[self.slots[sources]][:, self.ranks] & free[self.slots][:, self.ranks[sources]].T
        index, slot = _best(np.where(fits, score, -np.inf), _CANDIDATES)
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

    def _deltas(self, judge: Judge, changes: _Changes) -> Floats:
        """``[K, P, samples]``: how each change changes the pressures."""
        rows = self._rows(changes)
        before_first, after_first, before_second, after_second = np.split(
            judge.weights(np.concatenate(rows)), 4
        )
        change = np.stack((after_first - before_first, after_second - before_second), axis=2)
        loads = np.stack((self.load[:, changes.first].T, self.load[:, changes.second].T), axis=1)
        return np.matmul(change, loads)  # [K, P, 2] @ [K, 2, samples]

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


def _held(experts: NDArray[np.int32], num_experts: int) -> Floats:
    held = np.zeros((num_experts, len(experts)))
    held[experts, np.arange(len(experts))[:, None]] = 1.0
    return held


def _best(score: Floats, count: int) -> tuple[Ints, Ints]:
    """Row and column of the ``count`` highest positive scores."""
    flat = score.reshape(-1)
    index = np.flatnonzero(flat > max(0.0, _PROMISING * float(flat.max(initial=0.0))))
    if len(index) > count:
        index = index[np.argpartition(-flat[index], count)[:count]]
    row, column = np.divmod(index, score.shape[1])
    return row, column


def _join(one: list[Ints], other: list[Ints]) -> _Changes | None:
    parts = [np.concatenate(pair) for pair in zip(one, other, strict=True)]
    return _Changes(*parts) if len(parts[0]) else None
