"""`solve_quotas_device` in one CUDA kernel: some 600 small operations cost too many launches.

Imported only where Triton is there and the counts are on a CUDA device. The method is the same,
with two changes that suit one thread block: experts by ranks is a dense tile (X by R) instead of
lists of replicas, and steps are divided by powers of two. All in 64-bit integers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["fits", "solve_quotas_triton", "tiles"]

_MOST_REPLICATED, _MOST_ALL = 2048, 8192
"""Most entries of the two dense tiles: below these nothing is spilled, compiled for sm_90 and for
gfx942; some sizes above spill."""

_ITERATIONS = 32
_GROUPS = 8
_ABSENT = tl.constexpr(1 << 52)


def fits(num_experts: int, num_ranks: int, slots_per_rank: int) -> bool:
    """Whether the kernel is made for this size: its tiles stay in registers.

    >>> fits(256, 32, 9), fits(256, 64, 5)
    (True, False)
    """
    replicated, everything = tiles(num_experts, num_ranks, slots_per_rank)
    return replicated <= _MOST_REPLICATED and everything <= _MOST_ALL


def tiles(num_experts: int, num_ranks: int, slots_per_rank: int) -> tuple[int, int]:
    """Entries of the dense tiles: replicated experts by ranks, and all experts by ranks.

    >>> tiles(64, 8, 10)
    (128, 512)
    """
    columns = _tile_columns(num_ranks)
    rows = _tile_rows(num_experts, num_ranks, slots_per_rank)
    return rows * columns, triton.next_power_of_2(num_experts) * columns


def _tile_rows(num_experts: int, num_ranks: int, slots_per_rank: int) -> int:
    # At most this many experts can have a second replica.
    replicated = min(num_experts, num_ranks * slots_per_rank - num_experts)
    return triton.next_power_of_2(max(replicated, 2))


def _tile_columns(num_ranks: int) -> int:
    return triton.next_power_of_2(max(num_ranks, 2))


def solve_quotas_triton(
    counts_E: Tensor, slots_EM: Tensor, num_ranks: int, slots_per_rank: int
) -> Tensor:
    """See `torch_eplb.routing.solve_quotas`; all tensors on one CUDA device and contiguous."""
    num_experts, most = slots_EM.shape
    quotas_EM = torch.empty_like(slots_EM)
    rows_X = counts_E.new_empty(_tile_rows(num_experts, num_ranks, slots_per_rank))
    grid: Any = _kernel[(1,)]
    grid(
        counts_E,
        slots_EM,
        quotas_EM,
        rows_X,
        num_experts,
        num_ranks,
        slots_per_rank,
        M=most,
        X=len(rows_X),
        R_PAD=_tile_columns(num_ranks),
        E_PAD=triton.next_power_of_2(num_experts),
        ITERATIONS=_ITERATIONS,
        GROUPS=_GROUPS,
        num_warps=8,
    )
    return quotas_EM


@triton.jit
def _pour(tokens, floor, present, LOOPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The level of ``tokens`` poured onto each row of ``floor``: Newton's method from above."""
    active = present
    level = tokens
    for _ in range(LOOPS):
        used = tl.maximum(tl.sum(active.to(tl.int64), 1), 1)
        level = (tokens + tl.sum(tl.where(active, floor, 0), 1)) // used
        active = present & (floor < level[:, None])
    return level


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    counts_ptr,
    slots_ptr,
    quotas_ptr,
    rows_ptr,
    num_experts,
    num_ranks,
    slots_per_rank,
    M: tl.constexpr,
    X: tl.constexpr,
    R_PAD: tl.constexpr,
    E_PAD: tl.constexpr,
    ITERATIONS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    experts = tl.arange(0, E_PAD)
    real = experts < num_experts
    counts = tl.load(counts_ptr + experts, mask=real, other=0)
    first = tl.load(slots_ptr + experts * M, mask=real, other=-1) // slots_per_rank
    second = tl.full((E_PAD,), -1, tl.int64)
    if M > 1:
        second = tl.load(slots_ptr + experts * M + 1, mask=real, other=-1)
    replicated = real & (second >= 0)
    for column in range(M):
        value = tl.where(column == 0, counts, 0)
        tl.store(quotas_ptr + experts * M + column, value, mask=real)

    # The replicated experts' ids, one behind the other; -1 for the rest of the tile.
    lines = tl.arange(0, X)
    tl.store(rows_ptr + lines, tl.full((X,), -1, tl.int64))
    tl.debug_barrier()
    place = tl.cumsum(replicated.to(tl.int32), 0) - 1
    tl.store(rows_ptr + place, experts.to(tl.int64), mask=replicated)
    tl.debug_barrier()
    rows = tl.load(rows_ptr + lines)
    used = rows >= 0
    rows = tl.where(used, rows, 0)
    tokens = tl.load(counts_ptr + rows, mask=used, other=0)

    ranks = tl.arange(0, R_PAD)
    alone = (real & (second < 0))[:, None] & (first[:, None] == ranks[None, :])
    fixed = tl.sum(tl.where(alone, counts[:, None], 0), 0)
    present = tl.full((X, R_PAD), 0, tl.int1)
    for column in range(M):
        slot = tl.load(slots_ptr + rows * M + column, mask=used, other=-1)
        here = (slot // slots_per_rank)[:, None] == ranks[None, :]
        present = present | (here & (slot >= 0)[:, None])

    # A step is one part in 2^shift, at least as many parts as experts move a rank.
    movers = tl.sum(present.to(tl.int64), 0)
    weight = tl.max(tl.where(present, movers[None, :], 1), 1)
    shift = tl.zeros((X,), tl.int64)
    for bit in range(9):
        shift += (weight > (1 << bit)).to(tl.int64)
    replicas = tl.maximum(tl.sum(present.to(tl.int64), 1), 1)
    parts = tl.where(present, (tokens // replicas)[:, None], 0)
    ahead = parts
    for step in range(ITERATIONS):
        loads = fixed + tl.sum(ahead, 0)
        floor = tl.where(present, loads[None, :] - (ahead << shift[:, None]), _ABSENT)
        level = _pour(tokens << shift, floor, present, 4)
        new = tl.maximum(level[:, None] - floor, 0) >> shift[:, None]
        ahead = new + (((new - parts) * (step * 256 // (step + 3))) >> 8)
        parts = new

    # What rounding lost or an unfinished level has too much: made up evenly, then by levelling.
    lost = tokens - tl.sum(parts, 1)
    order = tl.cumsum(present.to(tl.int64), 1)
    spare = tl.maximum(lost, 0)
    each = spare // replicas
    parts += tl.where(present, each[:, None], 0)
    parts += (present & (order <= (spare - each * replicas)[:, None])).to(tl.int64)
    # The excess comes off the replicas in turn, as far as each has tokens.
    excess = tl.maximum(-lost, 0)
    before = tl.cumsum(parts, 1) - parts
    parts -= tl.minimum(tl.maximum(excess[:, None] - before, 0), parts)

    for group in range(GROUPS):
        mine = (lines % GROUPS == group) & used
        loads = fixed + tl.sum(parts, 0)
        floor = tl.where(present, loads[None, :] - parts, _ABSENT)
        level = _pour(tokens, floor, present, 8)
        new = tl.maximum(level[:, None] - floor, 0)
        rest = tokens - tl.sum(new, 1)
        active = new > 0
        turn = tl.cumsum(active.to(tl.int64), 1)
        new += (active & (turn <= rest[:, None])).to(tl.int64)
        # Exact or not at all: many replicas may need more rounds than `_pour` makes.
        exact = mine & (tl.sum(new, 1) == tokens)
        new = tl.where(exact[:, None], new, parts)
        changed = fixed + tl.sum(new, 0)
        better = tl.max(changed, 0) <= tl.max(loads, 0)
        parts = tl.where(better, new, parts)

    # Replicas ascend by rank, so an expert's n-th present rank is its n-th column.
    target = quotas_ptr + rows[:, None] * M + order - 1
    tl.debug_barrier()
    tl.store(target, parts, mask=present & used[:, None])
