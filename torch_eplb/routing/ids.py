"""What ids a router may give, and what the hot path makes of them.

    0 .. E-1        a logical expert
    -1              nobody: a row of padding, or a choice that the router has dropped
    E .. E+Z-1      a zero-compute expert, for layers that have Z of them (LongCat-Flash)
    anything else   an error where the host can see it

The hot path computes with int64, whatever dtype the router gives, and with one id for all choices
that go to no slot: the bin. The bin comes after all experts: E among logical ids, and R * S among
physical ids. So it is counted in a place that is not read, stands last in any order, and on a
device, where looking would be waiting, no id can reach memory that is not its own.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torch_eplb.routing.host import on_host

__all__ = ["PADDING", "logical_ids", "narrow", "zero_compute"]

PADDING = -1
"""The id of a choice that nobody computes."""


def logical_ids(
    ids_TK: Tensor, num_experts: int, num_zero_experts: int = 0, layer: str = ""
) -> Tensor:
    """A router's ids as the hot path takes them.

    On the host an id that means nothing is an error. On a device such an id goes to the bin, as
    -1 does: it is counted nowhere and computed nowhere.

    Args:
        ids_TK: ``[tokens, top-k]`` of any integer dtype.
        num_experts: logical experts E.
        num_zero_experts: zero-compute experts Z.
        layer: its name, for messages.

    Returns:
        int64 ``[tokens, top-k]`` in 0..E; E is the bin.

    Raises:
        TypeError: the ids are no integers.
        ValueError: an id is neither an expert's nor -1; on the host only.

    >>> logical_ids(torch.tensor([[0, 3], [-1, 2]], dtype=torch.int8), 4).tolist()
    [[0, 3], [4, 2]]
    """
    if ids_TK.dtype.is_floating_point or ids_TK.dtype.is_complex or ids_TK.dtype is torch.bool:
        raise TypeError(
            f"layer {layer}: expert ids must be integers, got {ids_TK.dtype}; pass the indices "
            "that topk returns"
        )
    ids_TK = ids_TK.long()
    if not on_host(ids_TK):
        return ids_TK.clamp(max=num_experts).masked_fill(ids_TK < 0, num_experts)
    ids = ids_TK.numpy()
    # Seen as unsigned, negative ids are large: one look tells that all of them are experts.
    if not ids.size or ids.view(np.uint64).max() < num_experts:
        return ids_TK
    wrong = (ids < PADDING) | (ids >= num_experts + num_zero_experts)
    if wrong.any():
        zero = f", {num_experts}..{num_experts + num_zero_experts - 1} are zero-compute experts"
        raise ValueError(
            f"layer {layer}: the router chose expert {ids[wrong][0]}, but there are {num_experts} "
            f"experts, 0..{num_experts - 1}{zero if num_zero_experts else ''} (and {PADDING} is a "
            "choice that nobody computes). Zero-compute experts are told with "
            "torch_eplb.register_layer(..., num_zero_experts=)"
        )
    return torch.from_numpy(np.where(ids < 0, num_experts, np.minimum(ids, num_experts)))


def zero_compute(ids_TK: Tensor, num_experts: int, num_zero_experts: int) -> Tensor:
    """Which of a router's choices are zero-compute experts, bool ``[tokens, top-k]``.

    >>> zero_compute(torch.tensor([[0, 4], [-1, 6]]), 4, 2).tolist()
    [[False, True], [False, False]]
    """
    ids_TK = ids_TK.long()
    return (ids_TK >= num_experts) & (ids_TK < num_experts + num_zero_experts)


def narrow(ids: Tensor, like: torch.dtype, largest: int) -> Tensor:
    """int64 ids in the dtype of the router's, where it holds ``largest``; else as they are.

    >>> narrow(torch.tensor([3]), torch.int8, 127).dtype, narrow(ids=torch.tensor([3]),
    ...     like=torch.int8, largest=128).dtype
    (torch.int8, torch.int64)
    """
    return ids.to(like) if torch.iinfo(like).max >= largest else ids
