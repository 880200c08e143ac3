from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_eplb.policies.registry import make_policy
from torch_eplb.routing import (
    RoutingTables,
    choose_by_quota,
    choose_from_table,
    choose_locally,
    count_hits,
)
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology

EXPERTS, RANKS, SLOTS = 12, 4, 5


def layer_tables(replica_choice: str = "even") -> RoutingTables:
    placement = Placement.initial(1, EXPERTS, RANKS, SLOTS)
    return RoutingTables(
        placement,
        device="cpu",
        rank=0,
        replica_choice=replica_choice,
        max_replicas=RANKS,
        topology=Topology(RANKS),
    )


def random_ids(seed: int, tokens: int, top_k: int = 3) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.full(EXPERTS, 0.3), size=1)[0] + 1e-3
    keys = rng.random((tokens, EXPERTS)) ** (1 / weights)
    return torch.from_numpy(np.argsort(-keys, axis=1)[:, :top_k].copy())


@given(seed=st.integers(0, 1000), tokens=st.integers(0, 70))
@settings(max_examples=50)
def test_hits_are_the_number_of_choices_of_each_expert(seed: int, tokens: int) -> None:
    ids = random_ids(seed, tokens)
    expected = np.bincount(ids.numpy().reshape(-1), minlength=EXPERTS)
    assert count_hits(ids, EXPERTS).tolist() == expected.tolist()
    assert count_hits(ids.int(), EXPERTS).tolist() == expected.tolist()


@given(seed=st.integers(0, 1000), tokens=st.integers(0, 300))
@settings(max_examples=50)
def test_a_table_choice_is_a_replica_of_the_chosen_expert(seed: int, tokens: int) -> None:
    tables = layer_tables()
    assert tables.choice_LEP is not None
    ids = random_ids(seed, tokens)
    physical = choose_from_table(ids, tables.choice_LEP[0])
    assert physical.shape == ids.shape
    assert physical.dtype == torch.int64
    # The initial placement is physical % EXPERTS.
    assert torch.equal(physical % EXPERTS, ids)


def test_a_table_choice_depends_on_the_tokens_position_only() -> None:
    tables = layer_tables()
    assert tables.choice_LEP is not None
    ids = random_ids(5, 64)
    choice = tables.choice_LEP[0]
    whole = choose_from_table(ids, choice)
    assert torch.equal(choose_from_table(ids[:40], choice), whole[:40])


def test_a_long_batch_of_one_expert_is_shared_evenly() -> None:
    tables = layer_tables()
    assert tables.choice_LEP is not None
    physical = choose_from_table(torch.zeros((1000, 1), dtype=torch.int64), tables.choice_LEP[0])
    assert sorted(torch.unique(physical).tolist()) == [0, 12]
    assert abs((physical == 0).sum().item() - 500) <= 1


@given(seed=st.integers(0, 1000), tokens=st.integers(0, 70))
@settings(max_examples=50)
def test_quotas_are_met_exactly(seed: int, tokens: int) -> None:
    slots_EM = layer_tables().slots_LEM[0]
    ids = random_ids(seed, tokens)
    counts = count_hits(ids, EXPERTS).numpy()
    rng = np.random.default_rng(seed)
    quotas = np.zeros(slots_EM.shape, dtype=np.int64)
    for expert in range(EXPERTS):
        live = int((slots_EM[expert] >= 0).sum())
        quotas[expert, :live] = rng.multinomial(counts[expert], np.full(live, 1 / live))
    physical = choose_by_quota(ids, torch.from_numpy(quotas), slots_EM)
    assert torch.equal(physical % EXPERTS, ids)
    got = count_hits(physical, RANKS * SLOTS)
    present = slots_EM >= 0
    assert torch.equal(got[slots_EM[present]], torch.from_numpy(quotas)[present])


@given(seed=st.integers(0, 1000), sizes=st.lists(st.integers(0, 30), min_size=1, max_size=4))
@settings(max_examples=40)
def test_sources_with_offsets_meet_the_quotas_together(seed: int, sizes: list[int]) -> None:
    slots_EM = layer_tables().slots_LEM[0]
    ids = random_ids(seed, sum(sizes))
    quotas = torch.zeros_like(slots_EM)
    counts = count_hits(ids, EXPERTS)
    quotas[:, 0], quotas[:, 1] = counts - counts // 3, 0
    quotas[slots_EM[:, 1] >= 0, 1] = (counts // 3)[slots_EM[:, 1] >= 0]
    quotas[slots_EM[:, 1] < 0, 0] = counts[slots_EM[:, 1] < 0]
    offset = torch.zeros(EXPERTS, dtype=torch.int64)
    parts = []
    for part in ids.split(sizes):
        parts.append(choose_by_quota(part, quotas, slots_EM, offset))
        offset = offset + count_hits(part, EXPERTS)
    assert torch.equal(torch.cat(parts), choose_by_quota(ids, quotas, slots_EM))


@pytest.mark.parametrize("tokens", [0, 1, 7, 500])
def test_the_torch_path_chooses_what_the_numpy_path_chooses(tokens: int) -> None:
    slots_EM = layer_tables().slots_LEM[0]
    ids = random_ids(9, tokens)
    eager = choose_locally(ids, count_hits(ids, EXPERTS), slots_EM, RANKS, SLOTS)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(ids: torch.Tensor) -> torch.Tensor:
        return choose_locally(ids, count_hits(ids, EXPERTS), slots_EM, RANKS, SLOTS)

    assert torch.equal(compiled(ids), eager)


def test_local_choice_balances_the_batch() -> None:
    slots_EM = layer_tables().slots_LEM[0]
    ids = torch.tensor([[0]] * 50 + [[4]] * 20 + [[9]] * 30)
    physical = choose_locally(ids, count_hits(ids, EXPERTS), slots_EM, RANKS, SLOTS)
    assert count_hits(physical // SLOTS, RANKS).max() <= 40


def mean_par(choice: str, tokens: int) -> float:
    """PAR over 32 ranks that have few tokens each, with hot experts replicated."""
    experts, ranks, slots = 128, 32, 5
    rng = np.random.default_rng(0)
    popularity = rng.dirichlet(np.full(experts, 0.5))
    load = (popularity * 1e5).astype(np.int64)
    initial = Placement.initial(1, experts, ranks, slots)
    placement = make_policy("deepseek")(load[None, None], initial, Topology(ranks)).placement
    tables = [
        RoutingTables(
            placement,
            device="cpu",
            rank=rank,
            replica_choice=choice,
            max_replicas=ranks,
            topology=Topology(ranks),
            prefer_local=True,
        )
        for rank in range(ranks)
    ]
    generator, chances = torch.Generator().manual_seed(1), torch.from_numpy(popularity)
    pars = []
    for _ in range(30):
        load_R = torch.zeros(ranks, dtype=torch.int64)
        for table in tables:
            ids = torch.multinomial(chances.expand(tokens, experts), 8, generator=generator)
            if table.choice_LBP is not None:
                physical = choose_from_table(ids, table.choice_LBP[0])
            else:
                slots_EM, solver_EM = table.slots_LEM[0], table.solver_LEM[0]
                hits = count_hits(ids, experts)
                physical = choose_locally(ids, hits, slots_EM, ranks, slots, solver_EM)
            load_R += count_hits(physical // slots, ranks)
        pars.append(float(load_R.max() / load_R.double().mean()))
    return float(np.mean(pars))


@pytest.mark.parametrize("tokens", [1, 4])
def test_sources_with_few_tokens_do_not_all_start_at_the_same_replica(tokens: int) -> None:
    assert mean_par("local", tokens) < 1.01 * mean_par("table", tokens)
