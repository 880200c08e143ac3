"""How policy "flow" rates a placement of one layer, and what a change of it would bring.

An objective turns a placement into *pressures* ``[P, samples]``; the highest of a sample's
pressures is its PAR. Every pressure is linear in the load: ``weights [P, experts] @ load``, and an
expert's weights depend only on the ranks that hold it. So a change that touches two experts changes
two columns of the weights, and rating it needs no new solution of the split.

* `EvenObjective`: fixed even shares. P is the ranks; weight = 1 / replicas on the ranks that hold
  it.
* `CutObjective`: every sample gets its best split. By the duality of flows and cuts a sample's PAR
  is the highest load per rank over all *sets* of ranks, where a set is loaded by the experts whose
  replicas all lie within it. P is a pool of such sets: weight = 1 / (ranks in the set) if the set
  encloses the expert. With few ranks the pool holds all sets; else those that a solved split
  has shown to be tight are added as the search goes (cutting planes; Kelley 1960).

Loads are in units of the mean rank load here, so a pressure of 1 is perfect balance.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["CutObjective", "EvenObjective", "Objective", "all_sets"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Objective(Protocol):
    """What the search asks of a objective. ``held`` is ``[experts, ranks]`` 0 or 1."""

    softness: float
    """In units of PAR; see `search._value`."""

    def weights(self, held: Floats) -> Floats:
        """``[n, P]``: the weights of experts that sit on the ranks ``held [n, ranks]``."""
        ...

    def slopes(
        self, held: Floats, heat: Floats, pressed: Ints, slots: Ints, ranks: Ints
    ) -> tuple[Floats, Floats, Floats]:
        """How much the pressures would fall, weighted by how much each matters.

        Args:
            held: ``[experts, ranks]``.
            heat: ``[n, experts]``, the load of each expert, summed over samples with the weight
                that each of the ``pressed`` pressures has in them.
            pressed: ``[n]``, the pressures that matter.
            slots, ranks: ``[J]``, expert and rank of each slot.

        Returns:
            add ``[experts, R]``, if the expert also sat on the rank; remove ``[J]``, if the slot
            lost its expert (minus infinity for the last replica); move ``[J, R]``, if the slot's
            expert sat on the rank instead.
        """
        ...


class EvenObjective:
    """Pressures of ranks under the even split.

    A fixed split does not level the chance of single steps: any rank near the peak may become it,
    so the maximum is a soft one.
    """

    softness = 0.03

    def weights(self, held: Floats) -> Floats:
        return held / np.maximum(held.sum(axis=1, keepdims=True), 1.0)

    def slopes(
        self, held: Floats, heat: Floats, pressed: Ints, slots: Ints, ranks: Ints
    ) -> tuple[Floats, Floats, Floats]:
        hot = np.zeros(held.shape)
        hot[:, pressed] = heat.T
        count = held.sum(axis=1)
        own = (held * hot).sum(axis=1)
        add = (own / (count * (count + 1)))[:, None] - hot / (count + 1)[:, None]
        mine, many = hot[slots, ranks], count[slots]
        rest = (own[slots] - mine) / np.where(many > 1, many * (many - 1), 1.0)
        remove = np.where(many > 1, mine / many - rest, -np.inf)
        move = (mine[:, None] - hot[slots]) / many[:, None]
        return add, remove, move


class CutObjective:
    """Pressures of sets of ranks when every sample is split as well as can be.

    Args:
        sets: ``[P, ranks]`` bool, none empty.
    """

    softness = 0.0

    def __init__(self, sets: Bools) -> None:
        self.sets = sets
        self.away = (~sets).astype(np.float64)  # [P, R]: the rank is outside of the set
        self.scale = 1.0 / sets.sum(axis=1)

    def with_sets(self, sets: Bools) -> CutObjective:
        """An objective that knows ``sets`` as well."""
        known = {row.tobytes() for row in np.packbits(self.sets, axis=1)}
        packed = [row.tobytes() for row in np.packbits(sets, axis=1)]
        new = [index for index, key in enumerate(packed) if key not in known]
        return CutObjective(np.concatenate((self.sets, sets[new]))) if new else self

    def weights(self, held: Floats) -> Floats:
        return (held @ self.away.T == 0) * self.scale

    def slopes(
        self, held: Floats, heat: Floats, pressed: Ints, slots: Ints, ranks: Ints
    ) -> tuple[Floats, Floats, Floats]:
        away = self.away[pressed]  # [n, R]
        scaled = (heat * self.scale[pressed][:, None]).T  # [experts, n]
        beyond = held @ away.T  # [experts, n]: replicas outside of the set
        add = (scaled * (beyond == 0)) @ away
        # A slot whose expert has no other replica outside: [J, n].
        pivot = (scaled * (beyond == 1))[slots] * away.T[ranks]
        several = held.sum(axis=1)[slots] > 1
        remove = np.where(several, -pivot.sum(axis=1), -np.inf)
        move = add[slots] - pivot @ (1.0 - away)
        return add, remove, move


def all_sets(num_ranks: int) -> Bools:
    """``[2^R - 1, R]``: every set of ranks but the empty one."""
    index = np.arange(1, 2**num_ranks)
    return (index[:, None] >> np.arange(num_ranks) & 1).astype(bool)
