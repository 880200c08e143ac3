"""Under torch.compile the hooks with all_reduce and external dispatch break no graph."""

from __future__ import annotations

import copy

import pytest
import torch
from support.models import skewed_batch
from support.ranks import run_ranks
from torch import nn

import torch_eplb
from torch_eplb.testing import fake_process_group


class BatchedExperts(nn.Module):
    """Experts without data-dependent shapes, so that the model itself is one graph."""

    def __init__(self, num_experts: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.up = nn.Parameter(torch.randn(num_experts, hidden, hidden) / 4)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        ids = top_k_index.clamp(max=self.num_experts - 1)  # a sentinel has weight 0
        out = torch.einsum("th,tkhg->tkg", hidden_states, self.up[ids])
        return (out * top_k_weights.unsqueeze(-1)).sum(1)


class ExternalExperts(BatchedExperts):
    """Stands for a layer that dispatches by itself: keeps the physical ids it was given."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return torch.cat((hidden_states[:, :1] * 0 + top_k_index[:, :1], hidden_states[:, 1:]), 1)


class Model(nn.Module):
    def __init__(self, experts: type[BatchedExperts]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.routers = nn.ModuleList(nn.Linear(16, 8, bias=False) for _ in range(2))
        self.experts = nn.ModuleList(experts() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for router, experts in zip(self.routers, self.experts, strict=True):
            weights, ids = router(x).softmax(-1).topk(2, dim=-1)
            x = x + experts(x, ids, weights)
        return x


torch_eplb.register_layer(BatchedExperts, skips_sentinel=True)


def compiled(rank: int, world_size: int, choice: str, backend: str) -> None:
    model = Model(BatchedExperts)
    reference = copy.deepcopy(model)
    balancer = torch_eplb.wrap(
        model,
        dispatch="all_reduce",
        replica_choice=choice,
        num_redundant_experts=4,
        policy="random",
        collect_interval=4,
        plan_interval=1,
    )
    run = torch.compile(balancer, fullgraph=True, backend=backend)
    step = 0
    with torch.no_grad():
        while balancer.stats().rebalances < 2:
            step += 1
            x = skewed_batch(12, 16, step)
            torch.testing.assert_close(run(x), reference(x), atol=1e-4, rtol=1e-4)
            # The graph's one opaque operation is the step clock: it runs at every call.
            assert balancer.stats().step == step
    hits, _ = balancer.load()
    assert hits.sum() > 0
    balancer.close()


@pytest.mark.parametrize(
    ("choice", "backend"), [("batch", "inductor"), ("table", "aot_eager"), ("even", "eager")]
)
def test_a_model_with_all_reduce_dispatch_is_one_graph_and_is_balanced(
    choice: str, backend: str
) -> None:
    run_ranks(compiled, 2, choice, backend, timeout=400)


@pytest.mark.parametrize("choice", ["local", "table"])
def test_external_layers_break_no_graph(choice: str) -> None:
    with fake_process_group(world_size=4, rank=1):
        with torch_eplb.wrap(
            Model(ExternalExperts),
            dispatch="external",
            replica_choice=choice,
            num_redundant_experts=4,
        ) as balancer:
            run = torch.compile(balancer, fullgraph=True, backend="aot_eager")
            with torch.no_grad():
                for step in range(3):
                    run(skewed_batch(12, 16, step))
            assert balancer.stats().step == 3
            hits, _ = balancer.load()
            assert hits.sum(axis=1).tolist() == [3 * 12 * 2] * 2
