"""What accelerators do badly, done another way: integers of 64 bits on Ascend, and copies from the
host's ordinary memory.

Ascend's cores have no 64-bit floor division, remainder, multiplication-and-addition, scatter-add or
sort: such operations run on its AI CPU, some hundred times slower. All that the hot path counts
and divides fits into 32 bits, so there it is computed so; ids leave as int64, as everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["count_dtype", "divide", "remainder", "running_sum", "sort_key", "to_device"]

_NARROW = ("npu",)


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.device.type in _NARROW


def divide(ids: Tensor, by: int) -> Tensor:
    """``ids // by``, int64, for ids that fit into 32 bits.

    >>> divide(torch.tensor([7, 3]), 2).tolist()
    [3, 1]
    """
    return (ids.int() // by).long() if _is_narrow(ids) else ids // by


def remainder(ids: Tensor, by: int) -> Tensor:
    """``ids % by``, int64, likewise.

    >>> remainder(torch.tensor([7, 3]), 2).tolist()
    [1, 1]
    """
    return (ids.int() % by).long() if _is_narrow(ids) else ids % by


def running_sum(counts: Tensor, *, out: Tensor) -> None:
    """The sums of the first 1, 2, ... counts, which fit into 32 bits, into int64 ``out``.

    >>> sums = torch.zeros(3, dtype=torch.int64)
    >>> running_sum(torch.tensor([2, 0, 3]), out=sums)
    >>> sums.tolist()
    [2, 2, 5]
    """
    if _is_narrow(counts):
        out.copy_(counts.int().cumsum(0, dtype=torch.int32))
    else:
        torch.cumsum(counts, 0, out=out)


def count_dtype(ids: Tensor) -> torch.dtype:
    """What to count and multiply small integers in, where ``ids`` are."""
    return torch.int32 if _is_narrow(ids) else torch.int64


def sort_key(ids: Tensor) -> Tensor:
    """Numbers that stand in the same order as ids below 2^24: floats hold those exactly."""
    return ids.float() if _is_narrow(ids) else ids


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, or as it is if it is there.

    The host waits for nothing: a copy from pageable memory would, on Ascend for all that the stream
    was given before. Pinned memory comes from torch's own allocator, which gives it out again only
    when the copies that read it are done.
    """
    if tensor.device.type != "cpu" or device.type in ("cpu", "meta"):
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
