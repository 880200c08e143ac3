"""Placement: which logical expert sits in which slot, for every layer.

The value object that planning, migration, routing and checkpoints speak. Pure numpy, immutable,
and it validates itself, so that a wrong placement cannot travel.

A tiny example with one layer, 4 experts, 3 ranks of 2 slots (experts 0 and 1 have a replica):

    >>> import numpy as np
    >>> p = Placement(np.array([[[0, 1], [2, 0], [3, 1]]]), num_experts=4)
    >>> p.replica_counts().tolist()
    [[2, 2, 1, 1]]
    >>> p.slots_of(0, 1)          # physical experts (rank * slots + slot) that hold expert 1
    [1, 5]
    >>> q = Placement(np.array([[[0, 1], [2, 3], [3, 1]]]), num_experts=4)
    >>> p.changed_slots(q).tolist()
    [1]

DeepSeek's EPLB says the same with three arrays, which `Placement.from_phy2log`, `phy2log`,
`log2phy` and `logcnt` speak:

    >>> p.phy2log.tolist()        # the logical expert of every physical one, rank after rank
    [[0, 1, 2, 0, 3, 1]]
    >>> p.log2phy.tolist()        # the physical experts of every logical one, filled up with -1
    [[[0, 3], [1, 5], [2, -1], [4, -1]]]
    >>> p.logcnt.tolist()
    [[2, 2, 1, 1]]
    >>> Placement.from_phy2log(p.phy2log, num_ranks=3) == p
    True
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.values.arrays import host_array

__all__ = ["Placement"]


class Placement:
    """Immutable map from slots to logical experts.

    Args:
        experts: integer array ``[layers, ranks, slots]``, the logical expert in every slot. Rank
            ``r`` owns the physical experts ``r * slots .. r * slots + slots - 1``.
        num_experts: logical experts per layer; ids run from 0 to ``num_experts - 1``.
        allow_duplicates: accept two replicas of an expert on one rank. They cost memory and
            balance nothing, so only states in the middle of a migration may hold them (and
            placements with more slots on a rank than there are experts, which cannot avoid them).

    Raises:
        TypeError: ``experts`` is not an integer array.
        ValueError: wrong shape, an id out of range, an expert without a slot, or a duplicate on a
            rank; the message names layer, rank and expert.
    """

    __slots__ = ("_experts", "_num_experts")

    def __init__(
        self, experts: NDArray[Any], num_experts: int, *, allow_duplicates: bool = False
    ) -> None:
        array = np.asarray(experts)
        if array.dtype.kind not in "iu":
            raise TypeError(
                "placement must be an integer array [layers, ranks, slots], "
                f"got dtype {array.dtype}"
            )
        if array.ndim != 3 or 0 in array.shape:
            raise ValueError(
                "placement must have the shape [layers, ranks, slots], each at least 1, "
                f"got {list(array.shape)}"
            )
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")
        if array.min() < 0 or array.max() >= num_experts:
            layer, rank, slot = np.argwhere((array < 0) | (array >= num_experts))[0]
            raise ValueError(
                f"layer {layer}, rank {rank}, slot {slot}: expert {array[layer, rank, slot]} "
                f"is not one of the {num_experts} experts (0..{num_experts - 1})"
            )
        array = np.array(array, dtype=np.int32, order="C")
        held = _held(array, num_experts)
        covered = held.any(axis=2)
        if not covered.all():
            layer, expert = np.argwhere(~covered)[0]
            raise ValueError(f"layer {layer}: expert {expert} has no slot on any rank")
        slots = array.shape[2]
        if not allow_duplicates and slots <= num_experts:
            distinct = held.sum(axis=1)
            if (distinct != slots).any():
                layer, rank = np.argwhere(distinct != slots)[0]
                ids, counts = np.unique(array[layer, rank], return_counts=True)
                raise ValueError(
                    f"layer {layer}, rank {rank}: expert {ids[counts > 1][0]} sits in "
                    f"{counts.max()} slots of the same rank; replicas belong on different ranks"
                )
        array.setflags(write=False)
        self._experts = array
        self._num_experts = int(num_experts)

    @classmethod
    def initial(
        cls, num_layers: int, num_experts: int, num_ranks: int, num_slots: int
    ) -> Placement:
        """The placement before anything is known: experts in order, wrapping around.

        Physical expert ``p`` holds logical expert ``p % num_experts``, so the redundant slots
        hold replicas of the first experts.

        >>> Placement.initial(1, 6, 2, 4).experts.tolist()
        [[[0, 1, 2, 3], [4, 5, 0, 1]]]
        """
        if num_ranks * num_slots < num_experts:
            raise ValueError(
                f"{num_ranks} ranks of {num_slots} slots cannot hold {num_experts} experts"
            )
        one = np.arange(num_ranks * num_slots, dtype=np.int32) % num_experts
        layers = np.broadcast_to(
            one.reshape(1, num_ranks, num_slots), (num_layers, num_ranks, num_slots)
        )
        return cls(layers, num_experts)

    @classmethod
    def from_phy2log(
        cls,
        phy2log: Any,
        num_ranks: int,
        num_experts: int | None = None,
        *,
        allow_duplicates: bool = False,
    ) -> Placement:
        """The placement that DeepSeek's ``phy2log`` (physical to logical map) describes.

        Args:
            phy2log: integers ``[layers, physical experts]``, the logical expert of every physical
                one; rank ``r`` owns the ``r``-th of ``num_ranks`` equal parts. A numpy array,
                nested lists, or a torch tensor on any device.
            num_ranks: ranks (GPUs) that the physical experts are spread over.
            num_experts: logical experts per layer; None for one more than the highest id.
            allow_duplicates: accept two replicas of an expert on one rank, which DeepSeek's
                algorithm may answer; `torch_eplb.from_rebalance_experts` parts them.

        Raises:
            TypeError: ``phy2log`` is not made of integers.
            ValueError: another shape, a length that does not divide over the ranks, or what
                `Placement` refuses.

        >>> Placement.from_phy2log([[0, 1, 2, 0, 3, 1]], num_ranks=3).experts.tolist()
        [[[0, 1], [2, 0], [3, 1]]]
        """
        try:
            array = host_array(phy2log)
        except ValueError as error:
            raise ValueError(
                f"phy2log must be an integer array [layers, physical experts]: {error}"
            ) from error
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(
                "phy2log must have the shape [layers, physical experts], each at least 1, "
                f"got {list(array.shape)}"
            )
        if array.dtype.kind not in "iu":
            raise TypeError(
                "phy2log must be an integer array [layers, physical experts], "
                f"got dtype {array.dtype}"
            )
        if num_ranks < 1:
            raise ValueError(f"num_ranks must be at least 1, got {num_ranks}")
        layers, physical = array.shape
        if physical % num_ranks:
            raise ValueError(
                f"phy2log has {physical} physical experts per layer, which must be a multiple of "
                f"num_ranks ({num_ranks})"
            )
        if num_experts is None:
            num_experts = max(int(array.max()) + 1, 1)
        experts = array.reshape(layers, num_ranks, physical // num_ranks)
        return cls(experts, num_experts, allow_duplicates=allow_duplicates)

    @property
    def experts(self) -> NDArray[np.int32]:
        """``[layers, ranks, slots]`` int32, read-only: the logical expert in every slot."""
        return self._experts

    @property
    def num_experts(self) -> int:
        """Logical experts per layer."""
        return self._num_experts

    @property
    def num_layers(self) -> int:
        return int(self._experts.shape[0])

    @property
    def num_ranks(self) -> int:
        return int(self._experts.shape[1])

    @property
    def num_slots(self) -> int:
        """Slots per rank."""
        return int(self._experts.shape[2])

    @property
    def num_redundant_experts(self) -> int:
        """Slots beyond one per expert, per layer."""
        return self.num_ranks * self.num_slots - self._num_experts

    @property
    def phy2log(self) -> NDArray[np.int64]:
        """``[layers, physical experts]``: DeepSeek's physical to logical map, a new array."""
        return self._experts.reshape(self.num_layers, -1).astype(np.int64)

    @property
    def log2phy(self) -> NDArray[np.int64]:
        """``[layers, experts, most replicas]``: DeepSeek's logical to physical map, a new array.

        The physical experts that hold each expert, ascending, filled up with -1 to the most
        replicas that any expert has in any layer.
        """
        physical, counts = self.phy2log, self.logcnt
        layer = np.arange(self.num_layers)[:, None]
        slot = np.argsort(physical, axis=1, kind="stable")
        expert = np.take_along_axis(physical, slot, axis=1)
        first = counts.cumsum(axis=1) - counts
        replica = np.arange(physical.shape[1]) - np.take_along_axis(first, expert, axis=1)
        result = np.full((*counts.shape, int(counts.max())), -1, dtype=np.int64)
        result[layer, expert, replica] = slot
        return result

    @property
    def logcnt(self) -> NDArray[np.int64]:
        """``[layers, experts]``: DeepSeek's count of every expert's replicas, a new array."""
        return self.replica_counts().astype(np.int64)

    def replica_counts(self) -> NDArray[np.int32]:
        """``[layers, experts]``: in how many slots each expert sits."""
        counts = np.zeros((self.num_layers, self._num_experts), dtype=np.int32)
        flat = self._experts.reshape(self.num_layers, -1)
        np.add.at(counts, (np.arange(self.num_layers)[:, None], flat), 1)
        return counts

    def held(self) -> NDArray[np.bool_]:
        """``[layers, experts, ranks]`` bool: whether a rank holds a replica of an expert."""
        return _held(self._experts, self._num_experts)

    def slots_of(self, layer: int, expert: int) -> list[int]:
        """The physical experts that hold ``expert`` in ``layer``, ascending."""
        return [int(p) for p in np.flatnonzero(self._experts[layer].reshape(-1) == expert)]

    def changed_slots(self, other: Placement) -> NDArray[np.int64]:
        """``[layers]``: how many slots hold another expert in ``other``."""
        self._check_same_shape(other)
        return (self._experts != other._experts).sum(axis=(1, 2))

    def newly_held(self, other: Placement) -> NDArray[np.int64]:
        """``[layers]``: (expert, rank) pairs that ``other`` has and this one has not.

        The least number of expert transfers that turns this placement into ``other``.
        """
        self._check_same_shape(other)
        return (other.held() & ~self.held()).sum(axis=(1, 2))

    def align(self, other: Placement) -> Placement:
        """``other`` with its slots permuted within each rank so that experts stay in their slot.

        An expert that a rank holds both before and after keeps its slot; the others fill the
        slots that are left, in ascending order.

        >>> a = Placement(np.array([[[0, 1], [2, 3]]]), 4)
        >>> a.align(Placement(np.array([[[1, 2], [3, 0]]]), 4)).experts.tolist()
        [[[2, 1], [0, 3]]]
        """
        self._check_same_shape(other)
        result = np.empty_like(other._experts)
        for layer in range(self.num_layers):
            for rank in range(self.num_ranks):
                old, new = self._experts[layer, rank], other._experts[layer, rank]
                if (old == new).all():
                    result[layer, rank] = new
                    continue
                left = new.tolist()
                free = []
                for slot, expert in enumerate(old.tolist()):
                    if expert in left:
                        left.remove(expert)
                        result[layer, rank, slot] = expert
                    else:
                        free.append(slot)
                result[layer, rank, free] = left
        return Placement(result, self._num_experts, allow_duplicates=True)

    def _check_same_shape(self, other: Placement) -> None:
        if self._experts.shape != other._experts.shape or self._num_experts != other._num_experts:
            raise ValueError(
                f"placements differ in shape: {list(self._experts.shape)} of {self._num_experts} "
                f"experts and {list(other._experts.shape)} of {other._num_experts} experts"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return self._num_experts == other._num_experts and np.array_equal(
            self._experts, other._experts
        )

    def __hash__(self) -> int:
        return hash((self._num_experts, self._experts.shape, self._experts.tobytes()))

    def __repr__(self) -> str:
        layers, ranks, slots = self._experts.shape
        return (
            f"Placement(layers={layers}, ranks={ranks}, slots={slots}, "
            f"experts={self._num_experts}, redundant={self.num_redundant_experts})"
        )


def _held(experts: NDArray[np.int32], num_experts: int) -> NDArray[np.bool_]:
    layers, ranks, slots = experts.shape
    held = np.zeros((layers, num_experts, ranks), dtype=bool)
    layer_index = np.arange(layers)[:, None]
    rank_index = np.repeat(np.arange(ranks), slots)[None, :]
    held[layer_index, experts.reshape(layers, -1), rank_index] = True
    return held
