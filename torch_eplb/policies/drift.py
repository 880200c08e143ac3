"""Whether the load has left what the last plan was made for: `Drift`, fed with looks at PAR.

A look sums some steps up, and is read half a look and a little after they were made, when the
message that summed them over the ranks has long arrived.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["Drift", "cut_short", "look_steps", "read_after"]

Floats = NDArray[np.float64]

_LEAST_STEPS = 16
"""Steps that are looked at together, at least: a look costs an all-reduce."""

_UNDER_WAY = 2
"""Steps that a look's message has before it is read: nobody waits for it."""

_DEVIATIONS = 2.0
"""Of counting independent tokens: by less than so many a rise is chance."""


class Drift:
    """Compares PAR of the last steps with what the last plan promised.

    What counts is the mean over layers, as in the time of a step. A plan is held to what it has
    reached in its first look, where that is more than it promised: a promise that cannot be kept
    would ask for plan after plan.

    Args:
        num_layers: MoE layers.
        above: how many times what was promised is too much; None: nothing is.

    Attributes:
        promised: float64 ``[layers]``, PAR that is no reason to plan. Before the first plan a level
            load is taken to be within reach.
    """

    def __init__(self, num_layers: int, above: float | None) -> None:
        self._above = above
        self.promised: Floats = np.ones(num_layers)
        self._first_look = False

    def planned(self, predicted: Floats) -> None:
        """A plan is carried out that promises this PAR ``[layers]``."""
        self.promised = np.array(predicted)
        self._first_look = True

    def too_much(self, present: Floats, tokens: float) -> bool:
        """Take in a look; whether it is a reason to plan now. Same on all ranks for equal looks.

        Args:
            present: PAR of the look ``[layers]``; NaN where a layer is not known yet.
            tokens: of the look, per rank and summed over the layers.
        """
        known = np.isfinite(present) & np.isfinite(self.promised)
        if self._above is None or not known.any() or tokens <= 0:
            return False
        if self._first_look:
            self._first_look = False
            self.promised = np.fmax(self.promised, present)
            return False
        now, promised = float(present[known].mean()), float(self.promised[known].mean())
        if now <= self._above * promised + _DEVIATIONS / math.sqrt(tokens):
            return False
        # If no better plan is found, only a further rise is a reason for another.
        self.promised = np.fmax(self.promised, present)
        return True


def look_steps(length: int) -> int:
    """Steps of a look, where load is copied every ``length`` steps.

    >>> look_steps(19), look_steps(4)
    (19, 16)
    """
    return -(-_LEAST_STEPS // length) * length


def read_after(look: int) -> tuple[int, int]:
    """Steps after the end of a look of so many steps at which it is summed up, and read.

    >>> read_after(16)
    (8, 10)
    """
    return look // 2, look // 2 + _UNDER_WAY


def cut_short(window: int, sample: int) -> int:
    """Steps that a plan is made from when it is early: a third of a window, all of them new.

    Args:
        window: steps of a window.
        sample: steps of a sample.

    >>> cut_short(50, 2)
    16
    """
    return max(window // 3, sample)
