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


SPREAD = 1.0
ROUNDS = 8
STEPS = 64


def plan(
    load: NDArray[np.float64],
    current: Placement,
    topology: Topology,
    replica_choice: str,
    knobs: Knobs,
) -> Placement:
    x = widen(units(load, current.num_ranks), SPREAD)
    experts = np.array(current.experts)
    sets = all_sets(current.num_ranks)
    for layer in range(len(experts)):
        search = Search(
            experts[layer], x[:, layer], None, knobs.min_gain,
            np.inf if knobs.max_moves is None else knobs.max_moves,
        )  # fmt: skip
        judge = CutJudge(sets) if replica_choice in ("batch", "local") else EvenJudge()
        search.run(judge, knobs.target_par, STEPS)
        experts[layer] = search.experts(current.num_slots)
    return Placement(experts, current.num_experts)


def units(load, num_ranks):
    mean = load.sum(axis=2, keepdims=True) / num_ranks
    return np.divide(load, mean, out=np.zeros_like(load), where=mean > 0)


def widen(x, spread):
    mean = x.mean(axis=0)
    wide = np.maximum(mean + spread * (x - mean), 0.0)
    total = wide.sum(axis=2, keepdims=True)
    return np.divide(wide * x.sum(axis=2, keepdims=True), total, out=np.zeros_like(x), where=total > 0)
