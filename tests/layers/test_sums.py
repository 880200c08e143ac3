"""Sums over the rows of a token: values, gradients, and what is empty or of two dtypes."""

from __future__ import annotations

import pytest
import torch

from torch_eplb.layers.sums import Bags, add_up, weighted_sum
from torch_eplb.routing import arrivals

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def some_bags(num_bags: int, top_k: int, seed: int = 0) -> tuple[Bags, torch.Tensor]:
    """Bags of up to ``top_k`` rows, empty ones among them; and the bags by row, per choice."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randint(0, 5, (num_bags, top_k), generator=generator)  # 3 and 4 are elsewhere
    found = arrivals(slots.clamp(max=3), 3)
    return Bags(found.by_row_C, found.begin_Q, found.row_C), slots


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights_dtype", [torch.float32, None])
def test_weighted_sums_are_those_of_double_precision(
    dtype: torch.dtype, weights_dtype: torch.dtype | None
) -> None:
    bags, _ = some_bags(40, 8)
    torch.manual_seed(0)
    rows = torch.randn(len(bags.owner), 24).to(dtype)
    weights = torch.rand(len(rows)).to(weights_dtype or dtype)
    exact = torch.zeros(40, 24, dtype=torch.float64)
    exact.index_add_(0, bags.owner, rows.double() * weights.double().unsqueeze(1))
    summed = weighted_sum(rows, weights, bags)
    assert summed.dtype == dtype
    # Rounded once, at the end.
    eps = max(torch.finfo(dtype).eps, 2**-23)
    assert ((summed.double() - exact).abs() <= 0.51 * eps * exact.abs() + 2e-6).all()
    assert torch.equal(add_up(rows, bags, weights), summed)
    ones = add_up(rows, bags, torch.ones(len(rows), dtype=dtype))
    assert torch.equal(add_up(rows, bags), ones)


@pytest.mark.parametrize("num_bags", [0, 1, 7])
def test_gradients_of_rows_and_weights(num_bags: int) -> None:
    bags, _ = some_bags(num_bags, 3)
    rows = torch.randn(len(bags.owner), 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(len(rows), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, w: weighted_sum(r, w, bags), (rows, weights))


def test_no_rows_at_all_sum_to_zeros() -> None:
    nothing = arrivals(torch.full((3, 2), 4), 4)
    bags = Bags(nothing.by_row_C, nothing.begin_Q, nothing.row_C)
    assert torch.equal(add_up(torch.empty(0, 5), bags), torch.zeros(3, 5))
    rows = torch.empty(0, 5, requires_grad=True)
    weighted_sum(rows, torch.empty(0), bags).sum().backward()
    assert rows.grad is not None
