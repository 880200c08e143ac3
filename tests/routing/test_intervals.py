from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_eplb.routing import count_hits, interval_counts, plan_dispatch, solve_quotas

RANKS, SLOTS, EXPERTS, TOP_K = 4, 4, 11, 2


def random_layer(seed: int) -> torch.Tensor:
    """[experts, M] physical ids: random, one replica per rank, one slot drained."""
    rng = np.random.default_rng(seed)
    while True:
        flat = np.concatenate([np.arange(EXPERTS), rng.integers(EXPERTS, size=5)])
        rng.shuffle(flat)
        by_rank = flat.reshape(RANKS, SLOTS)
        if all(len(set(row)) == SLOTS for row in by_rank.tolist()):
            break
    lists: list[list[int]] = [[] for _ in range(EXPERTS)]
    for physical, expert in enumerate(flat.tolist()):
        lists[expert].append(physical)
    longest = max(lists, key=len)
    longest.pop(int(rng.integers(len(longest))))
    return torch.tensor([row + [-1] * (RANKS - len(row)) for row in lists])


def random_batches(seed: int, sizes: list[int]) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(EXPERTS, 0.4)) + 1e-3
    weights /= weights.sum()
    return [
        torch.from_numpy(
            np.stack(
                [rng.choice(EXPERTS, TOP_K, replace=False, p=weights) for _ in range(size)]
            ).astype(np.int64)
            if size
            else np.empty((0, TOP_K), dtype=np.int64)
        )
        for size in sizes
    ]


BATCHES = given(
    seed=st.integers(0, 5000),
    sizes=st.lists(st.integers(0, 40), min_size=RANKS, max_size=RANKS),
    ranks_per_node=st.sampled_from([None, 1, 2]),
)


@BATCHES
@settings(max_examples=60)
def test_what_each_rank_sends_the_others_expect(
    seed: int, sizes: list[int], ranks_per_node: int | None
) -> None:
    slots_EM = random_layer(seed)
    batches = random_batches(seed, sizes)
    counts_RE = torch.stack([count_hits(ids, EXPERTS) for ids in batches])
    plans = [
        plan_dispatch(ids, counts_RE, rank, slots_EM, RANKS, SLOTS, ranks_per_node)
        for rank, ids in enumerate(batches)
    ]
    for rank, plan in enumerate(plans):
        for other, theirs in enumerate(plans):
            assert torch.equal(plan.send_RS[other], theirs.receive_RS[rank])
    quotas_EM = solve_quotas(counts_RE.sum(0), slots_EM, RANKS, SLOTS)
    together = interval_counts(counts_RE, quotas_EM, slots_EM, RANKS, SLOTS, ranks_per_node)
    assert torch.equal(torch.stack([plan.send_RS.view(-1) for plan in plans]), together)
    present = slots_EM >= 0
    assert torch.equal(together.sum(0)[slots_EM[present]], quotas_EM[present])
    assert together.sum() == quotas_EM.sum()


@BATCHES
@settings(max_examples=60)
def test_the_order_brings_each_choice_to_a_slot_of_its_expert(
    seed: int, sizes: list[int], ranks_per_node: int | None
) -> None:
    slots_EM = random_layer(seed)
    batches = random_batches(seed, sizes)
    counts_RE = torch.stack([count_hits(ids, EXPERTS) for ids in batches])
    for rank, ids in enumerate(batches):
        plan = plan_dispatch(ids, counts_RE, rank, slots_EM, RANKS, SLOTS, ranks_per_node)
        assert torch.equal(plan.order_N.sort().values, torch.arange(ids.numel()))
        sizes_P = plan.send_RS.view(-1)
        physical = torch.repeat_interleave(torch.arange(RANKS * SLOTS), sizes_P)
        experts = ids.view(-1)[plan.order_N]
        assert (slots_EM[experts] == physical.unsqueeze(1)).any(1).all()


def test_tokens_stay_on_their_rank_and_node_as_far_as_quotas_allow() -> None:
    # 4 ranks of 1 slot, expert 0 everywhere: every rank can keep all of its own tokens ...
    slots_EM = torch.tensor([[0, 1, 2, 3]])
    even = torch.full((4, 1), 10)
    quotas = torch.full((1, 4), 10)
    assert torch.equal(interval_counts(even, quotas, slots_EM, 4, 1), 10 * torch.eye(4).long())
    # ... and where one has too many, its node mate takes them before another node does.
    counts = torch.tensor([[0], [20], [20], [0]])
    assert interval_counts(counts, quotas, slots_EM, 4, 1, ranks_per_node=2).tolist() == [
        [0, 0, 0, 0],
        [10, 10, 0, 0],
        [0, 0, 10, 10],
        [0, 0, 0, 0],
    ]
