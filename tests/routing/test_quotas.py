from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linprog
from support.plain_solver import plain_quotas

from torch_eplb.routing.quotas import solve_quotas, solve_quotas_device, solve_quotas_host

Array = NDArray[np.int64]


def host(counts: Array, slots: Array, ranks: int, per_rank: int) -> Array:
    return solve_quotas_host(counts, slots, ranks, per_rank)


def device(counts: Array, slots: Array, ranks: int, per_rank: int) -> Array:
    result = solve_quotas_device(torch.from_numpy(counts), torch.from_numpy(slots), ranks, per_rank)
    return result.numpy()


SOLVERS = pytest.mark.parametrize("solve", [host, device], ids=["host", "device"])
Solver = Callable[[Array, Array, int, int], Array]


def random_slots(rng: np.random.Generator, experts: int, ranks: int, per_rank: int) -> Array:
    """[experts, M] physical ids of a random placement without duplicates on a rank."""
    held: list[list[int]] = [[] for _ in range(ranks)]
    for expert in rng.permutation(experts).tolist():
        lightest = min(range(ranks), key=lambda r: (len(held[r]), rng.random()))
        held[lightest].append(expert)
    for row in held:
        absent = [e for e in range(experts) if e not in row]
        row += rng.choice(absent, per_rank - len(row), replace=False).tolist()
    lists: list[list[int]] = [[] for _ in range(experts)]
    for rank, row in enumerate(held):
        for slot, expert in enumerate(row):
            lists[expert].append(rank * per_rank + slot)
    most = min(ranks, ranks * per_rank - experts + 1)
    return np.array([physical + [-1] * (most - len(physical)) for physical in lists])


def skewed_counts(rng: np.random.Generator, experts: int, tokens: int) -> Array:
    weights = rng.lognormal(0, rng.choice([0.3, 1.0, 2.0]), experts)
    return rng.multinomial(tokens, weights / weights.sum())


def rank_loads(quotas: Array, slots: Array, ranks: int, per_rank: int) -> Array:
    loads = np.zeros(ranks, dtype=np.int64)
    present = slots >= 0
    np.add.at(loads, slots[present] // per_rank, quotas[present])
    return loads


def optimal_peak(counts: Array, slots: Array, ranks: int, per_rank: int) -> float:
    """The linear programme's optimum: min p with sum of parts = counts and rank loads <= p."""
    expert, replica = np.nonzero(slots >= 0)
    rank = slots[expert, replica] // per_rank
    n = len(expert)
    scale = max(int(counts.sum()) / ranks, 1.0)
    below: NDArray[Any] = np.zeros((ranks, n + 1))
    below[rank, np.arange(n)] = 1.0
    below[:, n] = -1.0
    equal = np.zeros((len(slots), n + 1))
    equal[expert, np.arange(n)] = 1.0
    cost = np.zeros(n + 1)
    cost[n] = 1.0
    answer = linprog(cost, below, np.zeros(ranks), equal, counts / scale, method="highs")
    assert answer.success
    return float(answer.fun) * scale


def check_valid(quotas: Array, counts: Array, slots: Array) -> None:
    assert quotas.dtype == np.int64
    assert (quotas >= 0).all()
    assert (quotas[slots < 0] == 0).all()
    assert (quotas.sum(axis=1) == counts).all()


@SOLVERS
@given(
    seed=st.integers(0, 10_000),
    ranks=st.sampled_from([1, 2, 3, 4, 8]),
    per_rank=st.integers(2, 6),
    redundant=st.integers(0, 8),
    counts=st.lists(
        st.one_of(st.just(0), st.integers(0, 20), st.just(1 << 31)), min_size=48, max_size=48
    ),
)
@settings(max_examples=60)
def test_quotas_conserve_any_counts(
    solve: Solver, seed: int, ranks: int, per_rank: int, redundant: int, counts: list[int]
) -> None:
    experts = max(ranks * per_rank - min(redundant, (ranks - 1) * per_rank), per_rank)
    slots = random_slots(np.random.default_rng(seed), experts, ranks, per_rank)
    these = np.array(counts[:experts], dtype=np.int64)
    check_valid(solve(these, slots, ranks, per_rank), these, slots)


@pytest.mark.parametrize(
    ("experts", "ranks", "redundant"),
    [(8, 2, 2), (16, 4, 4), (32, 4, 8), (32, 8, 16), (64, 8, 16), (64, 16, 32), (64, 32, 64)],
)
@pytest.mark.parametrize("seed", range(4))
def test_the_host_peak_is_within_half_a_percent_of_the_optimum(
    seed: int, experts: int, ranks: int, redundant: int
) -> None:
    rng = np.random.default_rng(seed)
    per_rank = (experts + redundant) // ranks
    slots = random_slots(rng, experts, ranks, per_rank)
    for tokens in (97, 4096, 10_000_000):
        counts = skewed_counts(rng, experts, tokens)
        quotas = solve_quotas_host(counts, slots, ranks, per_rank)
        check_valid(quotas, counts, slots)
        # The best integer peak is the optimum rounded up.
        best = np.ceil(optimal_peak(counts, slots, ranks, per_rank) * (1 - 1e-9))
        assert rank_loads(quotas, slots, ranks, per_rank).max() <= best * 1.005


@pytest.mark.parametrize(
    ("experts", "ranks", "redundant"),
    [(16, 4, 4), (32, 8, 16), (64, 8, 16), (64, 16, 32), (64, 32, 64)],
)
@pytest.mark.parametrize("seed", range(4))
def test_the_device_peak_is_within_half_a_percent_and_rounding_of_the_optimum(
    seed: int, experts: int, ranks: int, redundant: int
) -> None:
    rng = np.random.default_rng(seed)
    per_rank = (experts + redundant) // ranks
    slots = random_slots(rng, experts, ranks, per_rank)
    replicated = (slots[:, 1] >= 0)[:, None] & (slots >= 0)
    rounding = np.bincount(slots[replicated] // per_rank).max()
    for tokens in (97, 4096, 10_000_000):
        counts = skewed_counts(rng, experts, tokens)
        quotas = device(counts, slots, ranks, per_rank)
        check_valid(quotas, counts, slots)
        best = optimal_peak(counts, slots, ranks, per_rank)
        assert rank_loads(quotas, slots, ranks, per_rank).max() <= best * 1.005 + rounding


@SOLVERS
def test_one_hot_load_is_spread_over_all_replicas(solve: Solver) -> None:
    slots = np.full((5, 4), -1)
    slots[:, 0] = [0, 1, 2, 4, 6]
    slots[0] = [0, 3, 5, 7]
    counts = np.array([1003, 0, 0, 0, 0])
    loads = rank_loads(solve(counts, slots, 4, 2), slots, 4, 2)
    assert sorted(loads.tolist()) == [250, 251, 251, 251]


@SOLVERS
def test_without_redundancy_all_tokens_go_to_the_only_slot(solve: Solver) -> None:
    slots = np.arange(6).reshape(6, 1)
    assert solve(np.arange(6), slots, 3, 2).tolist() == [[0], [1], [2], [3], [4], [5]]


@SOLVERS
def test_an_empty_batch_has_empty_quotas(solve: Solver) -> None:
    slots = random_slots(np.random.default_rng(0), 12, 4, 4)
    assert not solve(np.zeros(12, dtype=np.int64), slots, 4, 4).any()


def test_the_host_finds_long_chains_of_replicas() -> None:
    # Ranks 0..31 in a row, each pair of neighbours shares an expert; all load is at one end,
    # so every expert on the way must shift tokens by one rank.
    ranks = 32
    slots = np.array([[3 * r + 1, 3 * (r + 1)] for r in range(ranks - 1)])
    own = np.array([[3 * r + 2, -1] for r in range(ranks)])
    counts = np.array([1000] * (ranks - 1) + [ranks * 1000] + [0] * (ranks - 1))
    slots = np.concatenate([slots, own])
    quotas = solve_quotas_host(counts, slots, ranks, 3)
    best = optimal_peak(counts, slots, ranks, 3)
    assert rank_loads(quotas, slots, ranks, 3).max() <= best * 1.005


def test_the_same_counts_give_the_same_quotas_eager_and_compiled() -> None:
    rng = np.random.default_rng(4)
    slots = torch.from_numpy(random_slots(rng, 32, 8, 6))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(counts: torch.Tensor) -> torch.Tensor:
        return solve_quotas(counts, slots, 8, 6)

    for tokens in (0, 100, 1 << 20):
        counts = torch.from_numpy(skewed_counts(rng, 32, tokens))
        assert torch.equal(compiled(counts), solve_quotas(counts, slots, 8, 6))


@pytest.mark.parametrize(
    ("experts", "ranks", "redundant"),
    [(8, 2, 2), (32, 8, 16), (64, 8, 16), (64, 32, 64), (256, 128, 128), (64, 80, 96)],
)
def test_the_host_finds_the_integers_of_the_plain_solver(
    experts: int, ranks: int, redundant: int
) -> None:
    rng = np.random.default_rng(experts + ranks)
    per_rank = (experts + redundant) // ranks
    for placed in range(3):
        slots = random_slots(rng, experts, ranks, per_rank)
        if placed:  # drained slots: experts with other replicas lose their first
            many = (slots >= 0).sum(axis=1) > 2
            slots[many] = np.roll(slots[many], -1, axis=1)
            slots[many, -1] = -1
        for tokens in (5, 97, 300, 4096, 1_000_000) * 3:
            counts = skewed_counts(rng, experts, tokens)
            ours = solve_quotas_host(counts, slots, ranks, per_rank)
            assert (ours == plain_quotas(counts, slots, ranks, per_rank)).all()


def test_the_host_sees_that_slots_were_written_in_place() -> None:
    rng = np.random.default_rng(3)
    slots = random_slots(rng, 32, 8, 6)
    counts = skewed_counts(rng, 32, 4096)
    solve_quotas_host(counts, slots, 8, 6)
    for _ in range(3):
        slots[:] = random_slots(rng, 32, 8, 6)
        ours = solve_quotas_host(counts, slots, 8, 6)
        assert (ours == plain_quotas(counts, slots, 8, 6)).all()
