"""The device paths neither wait for the host nor take shapes from data, and they compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from torch_eplb.routing import (
    RoutingTables,
    choose_by_quota,
    choose_from_table,
    choose_locally,
    count_hits,
    solve_quotas,
)
from torch_eplb.routing.quotas import solve_quotas_device
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology

EXPERTS, RANKS, SLOTS, TOKENS, TOP_K = 12, 4, 4, 10, 2


@pytest.fixture
def tables() -> RoutingTables:
    return RoutingTables(
        Placement.initial(1, EXPERTS, RANKS, SLOTS),
        device="cpu",
        rank=0,
        replica_choice="even",
        max_replicas=RANKS,
        topology=Topology(RANKS),
    )


@pytest.mark.parametrize("tokens", [0, 1, TOKENS])
def test_nothing_reads_a_tensors_values_on_the_host(tables: RoutingTables, tokens: int) -> None:
    # Meta tensors have no values: whatever would wait for them (item, nonzero, a bool) raises.
    ids = torch.empty((tokens, TOP_K), dtype=torch.int64, device="meta")
    slots = tables.slots_LEM[0].to("meta")
    assert tables.choice_LEP is not None
    choice = tables.choice_LEP[0].to("meta")
    hits = count_hits(ids, EXPERTS)
    assert hits.shape == (EXPERTS,)
    assert choose_from_table(ids, choice).shape == ids.shape
    quotas = solve_quotas(hits, slots, RANKS, SLOTS)
    assert quotas.shape == slots.shape
    assert choose_by_quota(ids, quotas, slots).shape == ids.shape
    assert choose_by_quota(ids, quotas, slots, torch.zeros_like(hits)).shape == ids.shape
    assert choose_locally(ids, hits, slots, RANKS, SLOTS).shape == ids.shape


Route = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@pytest.mark.parametrize("choice", ["table", "batch"])
def test_counting_and_choosing_compile_to_one_graph(tables: RoutingTables, choice: str) -> None:
    def route(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hits = count_hits(ids, EXPERTS)
        if choice == "table":
            assert tables.choice_LEP is not None
            return hits, choose_from_table(ids, tables.choice_LEP[0])
        return hits, choose_locally(ids, hits, tables.slots_LEM[0], RANKS, SLOTS)

    compiled: Route = torch.compile(route, backend="aot_eager", fullgraph=True, dynamic=True)
    generator = torch.Generator().manual_seed(0)
    for tokens in (TOKENS, 33):
        ids = torch.rand((tokens, EXPERTS), generator=generator).topk(TOP_K).indices
        for got, expected in zip(compiled(ids), route(ids), strict=True):
            assert torch.equal(got, expected)
    # The tables change in place: a compiled graph sees it.
    tables.update(Placement((Placement.initial(1, EXPERTS, RANKS, SLOTS).experts + 5) % 12, 12))
    for got, expected in zip(compiled(ids), route(ids), strict=True):
        assert torch.equal(got, expected)


def test_the_device_solver_compiles_to_one_graph(tables: RoutingTables) -> None:
    compiled = torch.compile(solve_quotas_device, backend="eager", fullgraph=True)
    counts = torch.arange(EXPERTS) ** 3
    slots = tables.slots_LEM[0]
    expected = solve_quotas_device(counts, slots, RANKS, SLOTS)
    assert torch.equal(compiled(counts, slots, RANKS, SLOTS), expected)
