"""What is indexed by expert, seen by slot: one stacked tensor, or a list with a tensor per expert.

    stacked   up [slots, ...]                 slot s is up[s]
    listed    up = [[...], [...], ...]        slot s is up[s], an object of its own; the list may
                                              also be spread over modules (`layers.submodules`)

Whoever moves, saves or counts experts asks here, and need not know which of the two a layer has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import nn

__all__ = [
    "Listed",
    "SlotTensors",
    "Stacked",
    "byte_view",
    "copy_bytes",
    "entry_layout",
    "in_tiles",
    "is_list",
    "read_bytes",
    "tile_format",
    "write_bytes",
]

_NPU_PLAIN_FORMATS = (-1, 0, 1, 2, 27, 30)
"""ND and its names for images: elements lie in memory as their strides say."""
_ND = 2


class Stacked:
    """One tensor ``[slots, ...]``.

    Attributes:
        tensors: all of its tensors, which is one.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensors: list[torch.Tensor] = [tensor]

    def __len__(self) -> int:
        return self.tensors[0].shape[0] if self.tensors[0].dim() else 0

    def slot(self, slot: int) -> torch.Tensor:
        """One expert's tensor, in place."""
        return self.tensors[0][slot]

    @property
    def inner_shape(self) -> torch.Size:
        """The shape of one expert's tensor."""
        return self.tensors[0].shape[1:]

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one expert's tensor."""
        return self.tensors[0].nbytes // self.tensors[0].shape[0]

    @property
    def layout(self) -> str:
        """Dtype, shape and strides of one expert's tensor, for comparing ranks."""
        tensor = self.tensors[0]
        return f"{tensor.dtype}:{tuple(tensor.shape[1:])}:{tensor.stride()[1:]}"

    def empty(self, size: int, device: torch.device) -> Stacked:
        """The same for ``size`` experts, uninitialised, where each has the strides it has here."""
        tensor = self.tensors[0]
        stride = (tensor[0].numel(), *tensor.stride()[1:])
        with torch.inference_mode(False):
            shape = (size, *tensor.shape[1:])
            return Stacked(torch.empty_strided(shape, stride, dtype=tensor.dtype, device=device))

    def select(self, experts: Sequence[int]) -> Stacked:
        """A new one with the given entries, one per slot."""
        # Experts are written in place later: they must not be born as inference tensors.
        with torch.inference_mode(False), torch.no_grad():
            tensor = self.tensors[0]
            result = self.empty(len(experts), tensor.device)
            if not tensor.is_meta:
                # Byte-sized floats and packed integers have no index_select on every device.
                for slot, expert in enumerate(experts):
                    result.slot(slot).copy_(tensor[expert])
        return result


class Listed:
    """A tensor for each slot, all of one shape, dtype and format.

    Attributes:
        tensors: the entries, by slot.
    """

    def __init__(self, entries: Sequence[torch.Tensor]) -> None:
        self.tensors = list(entries)

    def __len__(self) -> int:
        return len(self.tensors)

    def slot(self, slot: int) -> torch.Tensor:
        """One expert's tensor, in place."""
        return self.tensors[slot]

    @property
    def inner_shape(self) -> torch.Size:
        """The shape of one expert's tensor."""
        return self.tensors[0].shape

    @property
    def slot_nbytes(self) -> int:
        """Bytes of one expert's tensor."""
        return self.tensors[0].nbytes

    @property
    def layout(self) -> str:
        """Dtype, shape and strides of one expert's tensor, for comparing ranks."""
        return f"list of {entry_layout(self.tensors[0])}"

    def empty(self, size: int, device: torch.device) -> Listed:
        """The same for ``size`` experts, uninitialised, each in the format it has here."""
        with torch.inference_mode(False), torch.no_grad():
            like = self.tensors[0].detach()
            if device == like.device:
                return Listed([torch.empty_like(like) for _ in range(size)])
            return Listed(
                [
                    torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
                    for _ in range(size)
                ]
            )

    def select(self, experts: Sequence[int]) -> Listed:
        """The given entries, one per slot: the objects themselves, and copies where they recur."""
        entries: list[torch.Tensor] = []
        used: set[int] = set()
        with torch.inference_mode(False), torch.no_grad():
            for expert in experts:
                entry = self.tensors[expert]
                if expert in used or entry.is_inference():
                    copy = torch.empty_like(entry.detach())
                    copy.copy_(entry.detach())
                    if isinstance(entry, nn.Parameter):
                        copy = nn.Parameter(copy, requires_grad=entry.requires_grad)
                    entry = copy
                used.add(expert)
                entries.append(entry)
        return Listed(entries)


SlotTensors: TypeAlias = Stacked | Listed


def is_list(value: object) -> bool:
    """Whether an attribute may hold experts one by one."""
    return isinstance(value, (nn.ParameterList, list)) or type(value) is tuple


def entry_layout(entry: torch.Tensor) -> str:
    """What all entries of a list must have in common."""
    number = tile_format(entry)
    tiles = "" if number is None else f":format {number}"
    return f"{entry.dtype}:{tuple(entry.shape)}:{entry.stride()}{tiles}"


def byte_view(tensor: torch.Tensor) -> torch.Tensor:
    """A flat uint8 view of a tensor's memory, in the order of its strides.

    >>> byte_view(torch.zeros(2, 3, dtype=torch.float16).t()).shape
    torch.Size([12])

    Raises:
        ValueError: the tensor has gaps or overlaps, so its bytes cannot be moved in one piece, or
            lies in tiles.
    """
    if in_tiles(tensor):
        raise ValueError(f"a tensor in the NPU's format {tile_format(tensor)} has no byte view")
    tensor = tensor.detach()
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    dense = tensor.permute(order)
    if not dense.is_contiguous():
        raise ValueError(
            f"an expert's tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is "
            "not dense in memory; make it contiguous before wrapping"
        )
    return dense.reshape(-1).view(torch.uint8)


def tile_format(tensor: torch.Tensor) -> int | None:
    """The number of the NPU's storage format in which elements lie in tiles; None for others."""
    if tensor.device.type != "npu":
        return None
    import torch_npu

    number = int(torch_npu.get_npu_format(tensor))
    return None if number in _NPU_PLAIN_FORMATS else number


def in_tiles(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory is in an order of the NPU's own, so that it has no byte view."""
    return tile_format(tensor) is not None


def read_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """One expert's tensor as flat uint8: its memory itself, or, of tiles, a copy in plain order.

    So tiles never travel as such: each backend moves plain bytes, with room and sums for them,
    whatever it would do to a tensor in a format of its own.
    """
    if not in_tiles(tensor):
        return byte_view(tensor)
    import torch_npu

    return byte_view(torch_npu.npu_format_cast(tensor.detach(), _ND))


def write_bytes(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Write what `read_bytes` gave on this or another rank into one expert's tensor, in place."""
    if not in_tiles(tensor):
        copy_bytes(byte_view(tensor), data)
        return
    if data.storage_offset() % tensor.element_size():
        data = data.clone()  # elements must be aligned
    tensor.detach().copy_(data.view(tensor.dtype).view(tensor.shape))


def copy_bytes(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a flat uint8 tensor, eight bytes at a time where it can be seen so: twice as fast."""
    if not any((target.numel() % 8, target.storage_offset() % 8, source.storage_offset() % 8)):
        target, source = target.view(torch.int64), source.view(torch.int64)
    target.copy_(source)
