"""One layer's placement while a search moves experts about, and what its moves cost.

Two kinds of change: *replace* (a slot whose expert has another replica takes in another expert)
and *swap* (two slots of different ranks exchange their experts). A change costs as many slots as
come to differ from the live placement through it: an expert that returns costs -1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAST", "Layer", "best_entries"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

LEAST = 1e-6
"""Gains below this are rounding."""


class Layer:
    """State that searches share.

    Args:
        experts: ``[ranks, slots]``, the live placement.
        load: ``[samples, experts]`` in units of the mean rank load.
        allowed: ``[experts, ranks]`` bool, where an expert may sit; None for anywhere.
        price: what a changed slot must gain in mean PAR.
        most: most slots that may change.

    Attributes:
        load: ``[experts, samples]``.
        slots, ranks: ``[J]``, expert and rank of each slot.
        held: ``[experts, ranks]`` bool, who holds a replica.
        foreign: ``[experts, ranks]`` bool, who does not hold one in the live placement.
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
        self.load = np.ascontiguousarray(load.T)
        self.num_ranks, self.num_slots = experts.shape
        self.ranks = np.repeat(np.arange(self.num_ranks), self.num_slots)
        self.allowed = allowed
        self.price = price
        self.most = most
        self.reset(experts)
        self.foreign = ~self.held

    def reset(self, experts: NDArray[np.int32]) -> None:
        """Go on from another placement; what counts as changed stays."""
        self.slots = experts.reshape(-1).astype(np.int64)
        self.held = np.zeros((len(self.load), self.num_ranks), dtype=bool)
        self.held[self.slots, self.ranks] = True

    @property
    def experts(self) -> NDArray[np.int32]:
        """``[ranks, slots]``."""
        return self.slots.reshape(self.num_ranks, self.num_slots).astype(np.int32)

    @property
    def moved(self) -> int:
        """Slots changed so far."""
        return int((self.held & self.foreign).sum())

    def free(self) -> Bools:
        """``[experts, ranks]``: who may take in a replica."""
        return ~self.held if self.allowed is None else ~self.held & self.allowed

    def swaps(self, sources: Ints) -> tuple[Bools, NDArray[np.int8]]:
        """Of every swap of a slot of ``sources`` with any slot, ``[sources, J]``.

        Returns whether it is possible, and its cost.
        """
        expert, rank = self.slots[sources], self.ranks[sources]
        fits = self.free()
        fits = fits[expert][:, self.ranks] & fits[self.slots][:, rank].T
        foreign = self.foreign.view(np.int8)
        arrive = foreign[expert][:, self.ranks] + foreign[self.slots][:, rank].T
        leave = foreign[expert, rank][:, None] + foreign[self.slots, self.ranks]
        return fits, arrive - leave

    def replacements(self, spare: Ints) -> tuple[Bools, NDArray[np.int8]]:
        """The same of every replacement in slots ``spare``: ``[experts, spare]``."""
        rank = self.ranks[spare]
        foreign = self.foreign.view(np.int8)
        return self.free()[:, rank], foreign[:, rank] - foreign[self.slots[spare], rank]

    def spare(self) -> Ints:
        """The slots whose expert has another replica."""
        return np.flatnonzero((self.held.sum(axis=1) > 1)[self.slots])

    def nets(
        self, gain: NDArray[np.float32], cost: NDArray[np.int8], fits: Bools, unit: float
    ) -> NDArray[np.float32]:
        """What changes gain beyond their price, 0 if that is nothing; in place of ``gain``.

        Args:
            gain: in units of ``unit``.
            cost, fits: see `swaps`.
        """
        # A change that undoes an earlier one has a negative price: it may lose less than that.
        gain *= np.float32(unit)
        gain -= cost * np.float32(self.price)
        fits &= gain > LEAST
        gain *= fits
        return gain

    def put(self, slot: int, expert: int) -> None:
        """Let a slot hold another expert."""
        rank = self.ranks[slot]
        self.held[self.slots[slot], rank] = False
        self.held[expert, rank] = True
        self.slots[slot] = expert


def best_entries(score: NDArray[np.floating], count: int) -> tuple[Ints, Ints]:
    """Row and column of the ``count`` highest positive scores, highest first.

    >>> [index.tolist() for index in best_entries(np.array([[1.0, 0.0], [3.0, 2.0]]), 2)]
    [[1, 1], [0, 1]]
    """
    flat = score.reshape(-1)
    index = np.flatnonzero(flat > 0)
    if len(index) > count:
        index = index[np.argpartition(-flat[index], count)[:count]]
    index = index[np.argsort(-flat[index], kind="stable")]
    row, column = np.divmod(index, score.shape[1])
    return row, column
