from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.programs import example

from torch_eplb.routing import costs
from torch_eplb.routing.costs import (
    active_experts,
    rank_costs,
    split_batch,
    split_batch_host,
)
from torch_eplb.routing.layouts import Layout
from torch_eplb.routing.quotas import solve_quotas_host
from torch_eplb.routing.relief import relieve

Ints = NDArray[np.int64]


@st.composite
def batches(draw: st.DrawFn) -> tuple[Ints, Ints, int, int, int]:
    """Counts, slots, ranks, slots per rank, and W."""
    ranks = draw(st.integers(2, 6))
    per_rank = draw(st.integers(2, 5))
    experts = draw(st.integers(per_rank, ranks * per_rank))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows: list[list[int]] = [[] for _ in range(experts)]
    first = rng.permutation(ranks * per_rank)[:experts]
    for expert, slot in enumerate(first):
        rows[expert].append(int(slot))
    for slot in set(range(ranks * per_rank)) - set(first.tolist()):
        free = [
            e for e in range(experts) if all(s // per_rank != slot // per_rank for s in rows[e])
        ]
        if free:
            rows[int(rng.choice(free))].append(slot)
    slots = np.full((experts, max(map(len, rows))), -1, dtype=np.int64)
    for expert, row in enumerate(rows):
        slots[expert, : len(row)] = sorted(row)
    most = draw(st.sampled_from([1, 4, 40, 400]))
    counts = rng.integers(0, most + 1, experts) * (rng.random(experts) < draw(st.floats(0.2, 1)))
    return counts.astype(np.int64), slots, ranks, per_rank, draw(st.sampled_from([1, 7, 50, 300]))


def cost(quotas: Ints, slots: Ints, ranks: int, per_rank: int, weight: int) -> int:
    return int(rank_costs(quotas, slots, ranks, per_rank, weight).max())


def assert_whole(quotas: Ints, counts: Ints, slots: Ints) -> None:
    assert (quotas >= 0).all()
    assert (quotas[slots < 0] == 0).all()
    assert (quotas.sum(axis=1) == counts).all()


@settings(max_examples=300)
@given(batches())
def test_a_split_is_whole_and_never_costs_more_than_by_tokens_or_by_active_experts(
    batch: tuple[Ints, Ints, int, int, int],
) -> None:
    counts, slots, ranks, per_rank, weight = batch
    quotas = split_batch_host(counts, slots, ranks, per_rank, weight)
    assert_whole(quotas, counts, slots)
    by_tokens = solve_quotas_host(counts, slots, ranks, per_rank)
    active = solve_quotas_host((counts > 0).astype(np.int64), slots, ranks, per_rank)
    ours = cost(quotas, slots, ranks, per_rank, weight)
    for other in (by_tokens, active * counts[:, None]):
        assert ours <= 1.02 * cost(other, slots, ranks, per_rank, weight)


@settings(max_examples=100)
@given(batches())
def test_a_device_splits_as_well(batch: tuple[Ints, Ints, int, int, int]) -> None:
    counts, slots, ranks, per_rank, weight = batch
    tensors = torch.from_numpy(counts), torch.from_numpy(slots)
    quotas = costs._split_on_device(*tensors, ranks, per_rank, weight).numpy()
    assert (quotas >= 0).all()
    assert (quotas.sum(axis=1) == counts).all()
    by_tokens = solve_quotas_host(counts, slots, ranks, per_rank)
    active = solve_quotas_host((counts > 0).astype(np.int64), slots, ranks, per_rank)
    ours = cost(quotas, slots, ranks, per_rank, weight)
    for other in (by_tokens, active * counts[:, None]):
        assert ours <= cost(other, slots, ranks, per_rank, weight)


def least(counts: Ints, slots: Ints, ranks: int, per_rank: int, weight: int) -> int:
    """The least possible cost where every expert is small: all choices of one replica each."""
    choices = [
        [slot // per_rank for slot in row if slot >= 0]
        for row, count in zip(slots.tolist(), counts.tolist(), strict=True)
        if count
    ]
    loads = (np.bincount(which, minlength=ranks).max() for which in itertools.product(*choices))
    return int(min(loads)) * weight


def test_few_tokens_activate_the_least_possible_number_of_experts_per_rank() -> None:
    rng = np.random.default_rng(5)
    for _ in range(40):
        slots = np.full((8, 2), -1, dtype=np.int64)
        ranks_of = np.array([rng.permutation(4)[:2] for _ in range(8)])
        taken = [0] * 4
        for expert, (one, two) in enumerate(np.sort(ranks_of, axis=1).tolist()):
            slots[expert] = one * 8 + taken[one], two * 8 + taken[two]
            taken[one], taken[two] = taken[one] + 1, taken[two] + 1
        counts = rng.integers(0, 4, 8)
        quotas = split_batch_host(counts, slots, 4, 8, 100)
        assert ((quotas > 0).sum(axis=1) == (counts > 0)).all()
        assert cost(quotas, slots, 4, 8, 100) == least(counts, slots, 4, 8, 100)
        assert active_experts(quotas, slots, 4, 8).sum() == (counts > 0).sum()


def test_many_tokens_are_split_by_tokens() -> None:
    rng = np.random.default_rng(6)
    slots = np.array([[0, 7], [1, -1], [2, 5], [3, -1], [4, -1], [6, -1]])
    for _ in range(20):
        counts = rng.integers(500, 2000, 6)
        expected = solve_quotas_host(counts, slots, 2, 4)
        assert (split_batch_host(counts, slots, 2, 4, 16) == expected).all()


@pytest.mark.parametrize("weight", [0, 4, 64])
def test_a_compiled_rank_splits_as_an_eager_one(weight: int) -> None:
    slots = torch.tensor([[0, 7], [1, -1], [2, 5], [3, -1], [4, -1], [6, -1]])

    def split(counts: torch.Tensor) -> torch.Tensor:
        return split_batch(counts, slots, 2, 4, weight)

    compiled = torch.compile(split, backend="aot_eager", fullgraph=True)
    for seed in range(5):
        counts = torch.randint(0, 30, (6,), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(compiled(counts), split(counts))


@settings(max_examples=300)
@given(batches())
def test_relieving_keeps_tokens_and_never_costs_more(
    batch: tuple[Ints, Ints, int, int, int],
) -> None:
    counts, slots, ranks, per_rank, weight = batch
    rng = np.random.default_rng(int(counts.sum()))
    place = rng.integers(0, (slots >= 0).sum(axis=1))
    before = np.zeros_like(slots)
    before[np.arange(len(slots)), place] = counts
    after = relieve(before, Layout.of(slots, ranks, per_rank), weight, 0)
    assert_whole(after, counts, slots)
    assert cost(after, slots, ranks, per_rank, weight) <= cost(
        before, slots, ranks, per_rank, weight
    )


def test_a_split_costs_little_more_than_the_cheapest_there_is() -> None:
    cheapest_split = example("benchmarks/optimum.py").cheapest_split
    rng = np.random.default_rng(8)
    above = []
    for _ in range(40):
        ranks, experts = 4, int(rng.integers(8, 13))
        slots = np.full((experts, 2), -1, dtype=np.int64)
        slots[:, 0] = rng.permutation(ranks * 4)[:experts]
        for slot in sorted(set(range(ranks * 4)) - set(slots[:, 0].tolist())):
            free = (slots[:, 1] < 0) & (slots[:, 0] // 4 != slot // 4)
            if free.any():
                slots[rng.choice(np.flatnonzero(free)), 1] = slot
        slots[slots[:, 1] >= 0] = np.sort(slots[slots[:, 1] >= 0], axis=1)
        popular = rng.lognormal(0, 1, experts)
        counts = rng.poisson(rng.choice([30, 100, 300]) * popular / popular.mean())
        quotas = split_batch_host(counts, slots, ranks, 4, 100)
        best, proven = cheapest_split(counts, slots, ranks, 4, 60.0, weight=100)
        assert best <= proven * (1 + 2e-4)
        above.append(cost(quotas, slots, ranks, 4, 100) / best - 1)
    assert np.mean(above) < 0.02
    assert np.max(above) < 0.15
    assert np.min(above) > -1e-3
