"""Where the replicas of a layer's experts are, in the forms that splits of a batch are solved with.

They follow from the placement alone, and a placement serves many batches. Suffixes are those of
`torch_eplb.routing.tables`; X counts the experts with replicas, in ascending order, and F their
replicas, those of one expert after another's.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

__all__ = ["Layout"]

Ints = NDArray[np.int64]

_KEPT = 256  # layouts that are kept: 100 KiB each with 320 ranks and 256 experts


class Layout:
    """What is known of a layer's replicas before any batch.

    Args:
        slots_EM: int64 ``[experts, M]``, physical ids ascending, padded with -1.
        num_ranks: R.
        slots_per_rank: S.

    Attributes:
        slots_EM: a copy.
        first_rank_E: the rank of each expert's first replica.
        single_E: whether it has no other.
        experts_X: the experts that have.
        row_F: of each of their replicas, the expert's place in ``experts_X``.
        head_F: where the expert's first replica stands in F.
        expert_F: the expert.
        physical_F: its physical id.
        rank_F: its rank.
        flat_F: its place in the flattened ``slots_EM``.
        expert_P: of each physical id, the expert whose first replica it is, or -1.
        ranks_X: the ranks of each expert's replicas.
        read_X: reads the elements of a list that belong to those ranks; None for two replicas.
        at_R: the replicas on each rank, as the expert's place in ``experts_X`` and the replica's
            among the expert's.

    >>> layout = Layout.of(np.array([[0, 3], [1, -1], [2, -1]]), 2, 2)
    >>> layout.experts_X.tolist(), layout.ranks_X, layout.at_R
    ([0], [(0, 1)], [[(0, 0)], [(0, 1)]])
    """

    def __init__(self, slots_EM: Ints, num_ranks: int, slots_per_rank: int) -> None:
        self.slots_EM = slots_EM = np.array(slots_EM)
        self.num_ranks, self.slots_per_rank = num_ranks, slots_per_rank
        self.first_rank_E = slots_EM[:, 0] // slots_per_rank
        second = slots_EM[:, 1] if slots_EM.shape[1] > 1 else np.full(len(slots_EM), -1)
        self.single_E = second < 0
        self.experts_X = np.flatnonzero(~self.single_E)
        slots_XM = slots_EM[self.experts_X]
        self.row_F, place_F = np.nonzero(slots_XM >= 0)
        self.physical_F = slots_XM[self.row_F, place_F]
        self.rank_F = self.physical_F // slots_per_rank
        self.expert_F = self.experts_X[self.row_F]
        self.head_F = np.searchsorted(self.row_F, self.row_F)
        self.expert_P = np.full(num_ranks * slots_per_rank, -1)
        self.expert_P[slots_EM[:, 0]] = np.arange(len(slots_EM))
        self.flat_F = self.expert_F * slots_EM.shape[1] + place_F
        ranks = self.rank_F.tolist()
        ends = (slots_XM >= 0).sum(axis=1).cumsum().tolist()
        self.ranks_X = [tuple(ranks[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
        self.read_X: list[Callable[[list[int]], tuple[int, ...]] | None] = [
            itemgetter(*where) if len(where) > 2 else None for where in self.ranks_X
        ]
        self.at_R: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]
        for expert, where in enumerate(self.ranks_X):
            for place, rank in enumerate(where):
                self.at_R[rank].append((expert, place))

    @classmethod
    def of(cls, slots_EM: Ints, num_ranks: int, slots_per_rank: int) -> Layout:
        """The layout of these slots: the one that was made before, if they are still the same.

        Tables are written in place, so those of one address are compared, every time.
        """
        key = slots_EM.__array_interface__["data"][0], slots_EM.shape, num_ranks, slots_per_rank
        layout = _known.get(key)
        if layout is None or not np.array_equal(layout.slots_EM, slots_EM):
            if layout is None and len(_known) >= _KEPT:
                _known.clear()
            _known[key] = layout = cls(slots_EM, num_ranks, slots_per_rank)
        return layout


_known: dict[tuple[int, tuple[int, ...], int, int], Layout] = {}
