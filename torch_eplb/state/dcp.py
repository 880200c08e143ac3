"""State for `torch.distributed.checkpoint` (DCP): saved from the live slots and read into them.

    dcp.save({"model": ShardedState(balancer)}, checkpoint_id=path)
    dcp.load({"model": ShardedState(balancer)}, checkpoint_id=path)

The checkpoint has the unwrapped model's keys and shapes, so that it loads into a model over other
ranks, with other redundancy, or not wrapped at all, and the other way round. With 4 experts on 2
ranks of 3 slots, placement ``[[2, 1, 0], [3, 0, 1]]``, an expert tensor ``[4, ...]`` is

    saved     by rank 0: experts 0, 2      by rank 1: experts 3, 1         once, by one owner
    loaded    by rank 0: experts 2, 1, 0   by rank 1: experts 3, 0..1      every replica

"0..1": experts in order in neighbouring slots are read in one piece, which matters where the
checkpoint has all experts in one piece, because DCP reads a saved piece as a whole.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from torch_eplb.files.expert_map import format_expert_map, parse_expert_map
from torch_eplb.runtime.engine import Life
from torch_eplb.state.full import ExpertTensor, expert_tensors, refuse_lists
from torch_eplb.state.wrapped import Wrapped, engines_of

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem


__all__ = ["ExpertShards", "PlacementState", "ShardedState"]

logger = logging.getLogger("torch_eplb")


class ShardedState:
    """A wrapped model as DCP takes it: an entry of the dictionary for ``dcp.save``, ``dcp.load``.

    Nothing is gathered. Saving hands the live slots to DCP, which copies and writes one expert's
    tensor after the other. Loading holds one saved piece at a time: one expert's tensor, or, in a
    checkpoint of the unwrapped model, one tensor of all experts. ``dcp.async_save`` copies this
    rank's slots first, as it copies any tensor.

    Every rank saves or loads at the same step. A round of transfers in flight is brought to its
    end first, which gives the rest of that rebalance up; otherwise balancing is not disturbed.

    Args:
        balancer: the wrapped model.
    """

    def __init__(self, balancer: Wrapped) -> None:
        self._balancer = balancer

    def state_dict(self) -> dict[str, Any]:
        """The model's own keys; expert tensors as `ExpertShards`. DCP calls it.

        Collective while experts are moving. Good until experts move again; then make another.

        Raises:
            RuntimeError: the model has no values yet (meta device), or holds experts one by one.
            PeerLostError: a rank did not come within ``timeout``.
        """
        balancer = self._balancer
        for engine in engines_of(balancer):
            engine.catch_up()
            if engine.in_flight:
                engine.settle()
        local = balancer.module.state_dict(keep_vars=True)
        refuse_lists(balancer, local, "save or load with torch.distributed.checkpoint")
        experts = expert_tensors(balancer, local)
        owners = {
            (engine, layer): choose_owners(engine.placement.experts[layer], engine.live[layer])
            for engine, layer in {(tensor.engine, tensor.layer) for tensor in experts.values()}
        }
        state: dict[str, Any] = {}
        for key, value in local.items():
            if isinstance(value, torch.Tensor):
                if value.is_meta:
                    raise RuntimeError(
                        f"{key} is on the meta device: give the model its values with "
                        "torch_eplb.load_pretrained, or its memory, before a load, with "
                        "torch_eplb.materialize.materialize(balancer.module, device)"
                    )
                value = value.detach()
            if key in experts:
                value = ExpertShards(experts[key], owners[experts[key].engine, experts[key].layer])
            state[key] = value
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Finish a load: DCP calls it when it has read into the tensors of `state_dict`."""
        balancer = self._balancer
        local = balancer.module.state_dict(keep_vars=True)
        rest: OrderedDict[str, Any] = OrderedDict(state_dict)
        for key, tensor in expert_tensors(balancer, local).items():
            if isinstance(rest.get(key), ExpertShards):
                rest[key].copy_to_duplicates()
                rest[key] = tensor.live
        for key, value in local.items():
            # Tensors were read in place. The rest, and what the model's hooks make of it, is left
            # to the model, which copies its tensors onto themselves.
            if isinstance(rest.get(key), torch.Tensor) and _same_memory(rest[key], value):
                rest[key] = value
        balancer.module.load_state_dict(rest)


class PlacementState:
    """The placement as an entry of the dictionary for DCP, next to the model's.

    Saved as an expert map. Loading it moves experts to where they were when it was saved, after
    their weights have been read; leaving it out ignores the saved placement, and so, with a
    warning, does loading it over other ranks or with other redundancy.

        state = {"model": ShardedState(balancer), "placement": PlacementState(balancer)}

    Args:
        balancer: the wrapped model.
    """

    def __init__(self, balancer: Wrapped) -> None:
        self._balancer = balancer

    def state_dict(self) -> dict[str, Any]:
        """The present placement. DCP calls it."""
        return {"expert_map": format_expert_map(self._balancer.engine.placement)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Move experts to the saved placement; DCP calls it. Collective.

        Raises:
            PeerLostError: a rank did not come within ``timeout``.
        """
        balancer, present = self._balancer, self._balancer.engine.placement
        try:
            saved = parse_expert_map(
                str(state_dict["expert_map"]),
                num_layers=present.num_layers,
                num_experts=present.num_experts,
                num_ranks=present.num_ranks,
                num_slots=present.num_slots,
            )
        except ValueError as error:
            if balancer.engine.comm.rank == 0:
                logger.warning("the saved placement does not fit here and is ignored: %s", error)
            return
        moved = balancer.engine.move_to(saved)
        if balancer.engine.comm.rank == 0:
            logger.info("the saved placement is restored: %d experts moved", moved)


class ExpertShards(torch.Tensor):
    """An expert tensor ``[experts, ...]`` of which this rank has some, for DCP only.

    It has the methods by which DCP asks a tensor for its pieces, and no values of its own. Which
    pieces there are depends on what is planned last: to save, single experts; to load, runs.
    """

    def __new__(cls, tensor: ExpertTensor, owners: Any) -> ExpertShards:
        live = _as_saved(tensor)
        return cls._wrapper(live, tensor.logical_shape, live.device)

    def __init__(self, tensor: ExpertTensor, owners: NDArray[np.int64]) -> None:
        engine, rank = tensor.engine, tensor.engine.comm.rank
        self._live = _as_saved(tensor)
        self._rows = tensor.live.shape[1] if tensor.is_flat else 1
        self._address = self._live.data_ptr()
        self._layer = tensor.layer
        self._engine = weakref.ref(engine)
        self._experts = engine.placement.experts[tensor.layer].copy()
        self._was_live = engine.live[tensor.layer].copy()
        self._owned = np.flatnonzero(owners == rank).tolist()
        self._runs = find_runs(self._experts[rank], self._was_live[rank])
        self._slots = {
            run.expert + i: run.slot + i for run in self._runs for i in range(run.length)
        }
        self._rank = rank
        self._saving = False

    @classmethod
    def _wrapper(cls, live: torch.Tensor, shape: torch.Size, device: Any) -> ExpertShards:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            shape,
            strides=(live[0].numel(), *live.stride()[1:]),
            dtype=live.dtype,
            device=device,
        )

    # ---- what DCP asks for --------------------------------------------------------------------

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        self._refuse_if_stale()
        self._saving = True
        properties = TensorProperties.create_from_tensor(self._live)
        items = []
        for expert in self._owned:
            chunk = self._chunk(expert, 1)
            data = TensorWriteData(chunk=chunk, properties=properties, size=self.size())
            index = MetadataIndex(fqn, chunk.offsets)
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        return items

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        self._refuse_if_stale()
        self._saving = False
        return [self._chunk(run.expert, run.length) for run in self._runs]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        self._refuse_if_stale()
        if index.offset is None:
            raise ValueError(f"{index.fqn} is sharded: it is read and written by expert")
        expert = index.offset[0] // self._rows
        slot, length = self._slots[expert], 1
        if not self._saving:
            length = next(run.length for run in self._runs if run.expert == expert)
        return self._live[slot * self._rows : (slot + length) * self._rows]

    def copy_to_duplicates(self) -> None:
        """Write the other slots of experts that have several on this rank, from the first."""
        for slot, expert in enumerate(self._experts[self._rank].tolist()):
            if self._slots[expert] != slot:
                self._refuse_if_stale()
                live = self._live.unflatten(0, (-1, self._rows))
                live[slot].copy_(live[self._slots[expert]])

    # ---- what it is ---------------------------------------------------------------------------

    def _chunk(self, expert: int, length: int) -> ChunkStorageMetadata:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        inner, rows = self.shape[1:], self._rows
        return ChunkStorageMetadata(
            offsets=torch.Size((expert * rows, *(0 for _ in inner))),
            sizes=torch.Size((length * rows, *inner)),
        )

    def _refuse_if_stale(self) -> None:
        """Raise if slots do not hold any more what they held when this was made."""
        engine = self._engine()
        if engine is None or self._live.data_ptr() != self._address:
            return  # nobody moves experts any more, or a copy that async_save has made
        layer = self._layer
        if (
            engine.life is Life.UNWRAPPED
            or (engine.placement.experts[layer] != self._experts).any()
            or (engine.live[layer] != self._was_live).any()
        ):
            raise RuntimeError(
                "experts have moved since this state was made: make it anew for every save and "
                "load, as an entry ShardedState(balancer) does"
            )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        name = func.overloadpacket.__name__
        if name in ("new_empty", "detach", "alias"):
            # async_save makes an empty one first and copies the attributes into it.
            source = args[0]
            device = (kwargs or {}).get("device") or source.device
            result = cls._wrapper(source._live, source.shape, device)
            result.__dict__.update(source.__dict__)
            return result
        raise _for_dcp_only(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise _for_dcp_only("pickling")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ExpertShards(shape={tuple(self.shape)}, here={sorted(self._slots)})"


class Run(NamedTuple):
    """Experts ``expert``.. in slots ``slot``.., ``length`` of them."""

    expert: int
    slot: int
    length: int


def find_runs(experts: NDArray[np.int32], live: NDArray[np.bool_]) -> list[Run]:
    """One slot for each expert of a rank, a live one if there is one, in runs.

    >>> find_runs(np.array([0, 1, 2, 7, 1]), np.array([True, True, True, True, True]))
    [Run(expert=0, slot=0, length=3), Run(expert=7, slot=3, length=1)]

    Args:
        experts, live: ``[slots]``, this rank's.
    """
    slots: dict[int, int] = {}
    for slot in [*np.flatnonzero(live).tolist(), *np.flatnonzero(~live).tolist()]:
        slots.setdefault(int(experts[slot]), slot)
    runs: list[Run] = []
    for expert, slot in sorted(slots.items()):
        last = runs[-1] if runs else Run(-1, -1, 0)
        if (expert, slot) == (last.expert + last.length, last.slot + last.length):
            runs[-1] = last._replace(length=last.length + 1)
        else:
            runs.append(Run(expert, slot, 1))
    return runs


def choose_owners(experts: NDArray[np.int32], live: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The rank that saves each expert: it has a live replica, and ranks save evenly many.

    >>> experts = np.array([[2, 1, 0], [3, 0, 1]])
    >>> choose_owners(experts, np.ones((2, 3), dtype=bool)).tolist()
    [0, 1, 0, 1]

    Args:
        experts, live: ``[ranks, slots]``; the same on all ranks.

    Returns:
        ``[experts]``
    """
    holders = [
        np.flatnonzero(((experts == expert) & live).any(axis=1)).tolist()
        for expert in range(int(experts.max()) + 1)
    ]
    owned = [0] * len(experts)
    owners = np.zeros(len(holders), dtype=np.int64)
    # Those with no choice first.
    for expert in sorted(range(len(holders)), key=lambda expert: len(holders[expert])):
        owner = min(holders[expert], key=lambda rank: owned[rank])
        owners[expert] = owner
        owned[owner] += 1
    return owners


def _for_dcp_only(action: str) -> RuntimeError:
    return RuntimeError(
        f"{action}: an expert tensor of ShardedState.state_dict() has no values of its own and is "
        "for torch.distributed.checkpoint only; balancer.state_dict() has all experts"
    )


def _as_saved(tensor: ExpertTensor) -> torch.Tensor:
    """The live slots with the dimensions that the unwrapped model's tensor has."""
    live = tensor.live.detach()
    return live.flatten(0, 1) if tensor.is_flat else live


def _same_memory(one: torch.Tensor, other: Any) -> bool:
    return (
        isinstance(other, torch.Tensor)
        and type(one) is torch.Tensor
        and one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )
