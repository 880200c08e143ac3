"""Ids that a router may give: any integer dtype, padding, and those that mean nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_eplb.routing import (
    RoutingTables,
    choose_from_table,
    choose_locally,
    count_hits,
    logical_ids,
    plan_dispatch,
)
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology

EXPERTS, RANKS, SLOTS = 12, 4, 4
BIN = RANKS * SLOTS
DTYPES = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64]


def tables(choice: str, experts: int = EXPERTS, slots: int = SLOTS) -> RoutingTables:
    return RoutingTables(
        Placement.initial(1, experts, RANKS, slots),
        device="cpu",
        rank=0,
        replica_choice=choice,
        max_replicas=RANKS,
        topology=Topology(RANKS),
    )


def on_device(ids: torch.Tensor) -> torch.Tensor:
    """`logical_ids` as it runs where the host does not look."""
    run = torch.compile(lambda ids: logical_ids(ids, EXPERTS, 2), backend="eager", fullgraph=True)
    return run(ids)


@pytest.mark.parametrize("dtype", DTYPES)
def test_narrow_ids_are_computed_with_in_int64(dtype: torch.dtype) -> None:
    experts = min(512, torch.iinfo(dtype).max + 1)
    table = tables("even", experts, experts // RANKS)
    assert table.choice_LBP is not None
    ids = torch.arange(experts).view(-1, 2).to(dtype)
    logical = logical_ids(ids, experts)
    assert logical.dtype == torch.int64
    # The initial placement without redundancy: slot i holds expert i.
    assert torch.equal(choose_from_table(logical, table.choice_LBP[0]), ids.long())
    assert count_hits(logical, experts).tolist() == [1] * experts


def test_padding_goes_to_the_bin_and_what_means_nothing_is_named() -> None:
    assert logical_ids(torch.tensor([[0, -1], [11, 3]]), EXPERTS).tolist() == [[0, 12], [11, 3]]
    for wrong in (12, -2, 400, 2**40, -(2**40)):
        with pytest.raises(ValueError, match=rf"layer a\.b: .* expert {wrong}, .* 0\.\.11"):
            logical_ids(torch.tensor([[0, wrong]]), EXPERTS, layer="a.b")
    with pytest.raises(ValueError, match="expert 255"):
        logical_ids(torch.tensor([[255]], dtype=torch.uint8), EXPERTS)
    for floating in (torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.bool)):
        with pytest.raises(TypeError, match="must be integers"):
            logical_ids(floating, EXPERTS)


def test_ids_of_zero_compute_experts_are_known_where_a_layer_has_them() -> None:
    assert logical_ids(torch.tensor([[12, 13, 5]]), EXPERTS, 2).tolist() == [[12, 12, 5]]
    with pytest.raises(ValueError, match=r"expert 14, .* 12\.\.13 are zero-compute"):
        logical_ids(torch.tensor([[14]]), EXPERTS, 2)


def test_on_a_device_no_id_reaches_memory_that_is_not_its_own() -> None:
    wild = torch.tensor([[0, -1], [11, 12], [2**62, -(2**62)], [127, 5]])
    assert on_device(wild).tolist() == [[0, 12], [11, 12], [12, 12], [12, 5]]


def padded(seed: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand((tokens, EXPERTS), generator=generator).topk(3).indices
    return ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -1)


@pytest.mark.parametrize("compiled", [False, True])
@given(seed=st.integers(0, 1000), tokens=st.integers(0, 40))
@settings(max_examples=25)
def test_padding_is_neither_counted_nor_sent(compiled: bool, seed: int, tokens: int) -> None:
    ids = padded(seed, tokens)
    logical = logical_ids(ids, EXPERTS)
    table = tables("even")
    assert table.choice_LBP is not None

    def choose(ids_TK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        assert table.choice_LBP is not None
        hits = count_hits(ids_TK, EXPERTS)
        local = choose_locally(ids_TK, hits, table.slots_LEM[0], RANKS, SLOTS)
        return hits, choose_from_table(ids_TK, table.choice_LBP[0]), local

    if compiled:
        choose = torch.compile(choose, backend="eager", fullgraph=True, dynamic=True)
    hits, *chosen = choose(logical)
    assert torch.equal(hits, torch.bincount(ids[ids >= 0], minlength=EXPERTS))
    for physical in chosen:
        assert torch.equal(physical == BIN, ids < 0)
        assert torch.equal(physical[ids >= 0] % EXPERTS, ids[ids >= 0])


@given(seed=st.integers(0, 1000), tokens=st.integers(0, 40))
@settings(max_examples=40)
def test_a_batch_plan_sends_what_is_no_padding(seed: int, tokens: int) -> None:
    batches = [logical_ids(padded(seed + rank, tokens), EXPERTS) for rank in range(RANKS)]
    counts = torch.stack([count_hits(ids, EXPERTS) for ids in batches])
    slots = tables("batch").slots_LEM[0]
    for rank, ids in enumerate(batches):
        plan = plan_dispatch(ids, counts, rank, slots, RANKS, SLOTS)
        sent = ids.view(-1)[plan.order_N]
        assert torch.equal(plan.order_N.sort().values, (ids.view(-1) < EXPERTS).nonzero().view(-1))
        physical = torch.repeat_interleave(torch.arange(BIN), plan.send_RS.view(-1))
        assert torch.equal(physical % EXPERTS, sent)
