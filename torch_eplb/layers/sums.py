"""Sums over the rows of a token: results of its choices, or of the ranks that computed them.

Nothing of the size of all choices is made besides the rows themselves; sums are made in at least
float32, each in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

__all__ = ["Bags", "add_up", "weigh_back", "weighted_sum"]


@dataclass(frozen=True)
class Bags:
    """Which rows are summed together; every row is in one bag.

    Attributes:
        index: int64 ``[rows]``, the rows, bag by bag.
        begin: int64 ``[bags + 1]``, where each bag begins in ``index``.
        owner: int64 ``[rows]``, the bag of each row.
    """

    index: torch.Tensor
    begin: torch.Tensor
    owner: torch.Tensor


def add_up(rows: torch.Tensor, bags: Bags, weights: torch.Tensor | None = None) -> torch.Tensor:
    """``[bags, H]``, the sum of each bag's rows ``[rows, H]``, times ``weights [rows]``.

    Of the rows' dtype; not differentiable.
    """
    dtype = rows.dtype
    if weights is not None and weights.dtype != dtype:
        common = torch.promote_types(dtype, weights.dtype)
        rows, weights = rows.to(common), weights.to(common)
    if rows.device.type in ("cpu", "cuda"):
        summed = embedding_bag(
            bags.index,
            rows.contiguous(),
            bags.begin,
            mode="sum",
            per_sample_weights=None if weights is None else weights.index_select(0, bags.index),
            include_last_offset=True,
        )
    else:
        # Rows one after the other, in the order of bags, where bags are no operation.
        wide = torch.promote_types(rows.dtype, torch.float32)
        terms = rows.to(wide) if weights is None else rows.to(wide) * weights.unsqueeze(1)
        summed = terms.new_zeros((len(bags.begin) - 1, rows.shape[1]))
        summed.index_add_(0, bags.owner[bags.index], terms[bags.index])
    return summed.to(dtype)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor, bags: Bags) -> torch.Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.bags = bags
        return add_up(rows, bags, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        rows, weights = ctx.saved_tensors
        return *weigh_back(grad.index_select(0, ctx.bags.owner), rows, weights), None


def weigh_back(
    grad: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of rows ``[rows, H]`` and weights, from those of their products."""
    wide = torch.promote_types(torch.promote_types(rows.dtype, weights.dtype), torch.float32)
    to_weights = torch.linalg.vecdot(grad.to(wide), rows.to(wide))
    return (grad * weights.unsqueeze(1)).to(rows.dtype), to_weights.to(weights.dtype)


def weighted_sum(rows: torch.Tensor, weights: torch.Tensor, bags: Bags) -> torch.Tensor:
    """`add_up`, differentiable in rows and weights."""
    return _WeightedSum.apply(rows, weights, bags)
