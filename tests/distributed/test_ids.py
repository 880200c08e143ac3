"""Narrow ids, padding and what else a router may say: outputs and counts under every dispatch."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from support.models import QUICK, Experts, skewed_batch
from support.ranks import run_ranks
from torch import nn

import torch_eplb
from torch_eplb.testing import fake_process_group

CHOICES = {
    "all_to_all": ("batch", "local", "table"),
    "all_gather": ("batch", "table"),
    "all_reduce": ("batch", "even"),
}


class Masked(Experts):
    """Computes padding as nobody does: an id of -1 is skipped."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        kept = top_k_index >= 0
        return super().forward(
            hidden_states,
            top_k_index.long().masked_fill(~kept, 0),
            top_k_weights.masked_fill(~kept, 0.0),
        )


class Layer(nn.Module):
    """A router that may drop choices: their id is -1 and their weight is not to be looked at."""

    def __init__(self, num_experts: int, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.router = nn.Linear(16, num_experts, bias=False)
        self.experts = Masked(num_experts, 16, 4)
        self.dtype = dtype

    def forward(self, x: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2, dim=-1)
        ids = ids.to(self.dtype)
        if kept is not None:
            ids = ids.masked_fill(~kept, -1)
            weights = weights.masked_fill(~kept, float("nan"))
        return x + self.experts(x, ids, weights)


class Model(nn.Module):
    def __init__(self, num_experts: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(num_experts, dtype, seed) for seed in range(2))

    def forward(self, x: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self.layers:
            x = layer(torch.nn.functional.rms_norm(x, x.shape[-1:]), kept)
        return x


def serve(rank: int, world_size: int, dispatch: str, num_experts: int, dtype_name: str) -> None:
    dtype = getattr(torch, dtype_name)
    for choice in CHOICES[dispatch]:
        model = Model(num_experts, dtype)
        reference = copy.deepcopy(model)
        options: dict[str, Any] = {**QUICK, "dispatch": dispatch, "replica_choice": choice}
        options["staging_bytes"] = "1MiB"
        with torch_eplb.wrap(model, **options) as balancer, torch.no_grad():
            step = counted = 0
            while balancer.stats().rebalances < 2:
                step += 1
                seed = 10 * step + (0 if dispatch == "all_reduce" else rank)
                x = skewed_batch(10, 16, seed)
                kept = None
                if dtype.is_signed:
                    generator = torch.Generator().manual_seed(seed)
                    # At times a rank has nothing but padding.
                    share = 0.0 if (step + seed) % 5 == 0 else 0.6
                    kept = torch.rand(10, 2, generator=generator) < share
                torch.testing.assert_close(
                    balancer(x, kept), reference(x, kept), atol=1e-5, rtol=1e-4
                )
                counted += 20 if kept is None else int(kept.sum())
            if dispatch == "all_gather":  # every rank counts what it sees
                total = torch.tensor(counted)
                torch.distributed.all_reduce(total)
                counted = int(total)
            hits, sent = balancer.load()
            assert hits.sum(axis=1).tolist() == [counted] * 2
            assert sent.sum(axis=1).tolist() == [counted] * 2


@pytest.mark.parametrize(
    ("dispatch", "num_experts", "dtype"),
    [
        *itertools.product(["all_to_all", "all_reduce"], [8], ["uint8", "int64"]),
        *itertools.product(["all_to_all", "all_reduce"], [512], ["int16"]),
        ("all_gather", 8, "uint8"),
        ("all_gather", 512, "int16"),
    ],
)
def test_narrow_ids_and_padding_are_served_while_experts_move(
    dispatch: str, num_experts: int, dtype: str
) -> None:
    run_ranks(serve, 2, dispatch, num_experts, dtype)


class Remembers(Experts):
    """Dispatches by itself, and keeps the ids that it was given."""

    seen: torch.Tensor

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        self.seen = top_k_index
        return hidden_states


@pytest.mark.parametrize("choice", ["local", "table", "even"])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8])
def test_an_external_layer_gets_its_own_dtype_and_padding_back(
    choice: str, dtype: torch.dtype
) -> None:
    with fake_process_group(world_size=4, rank=1):
        experts = Remembers(12, 16, 4)
        options: dict[str, Any] = {"dispatch": "external", "replica_choice": choice}
        with torch_eplb.wrap(experts, num_redundant_experts=4, **options) as balancer:
            ids = torch.arange(12).view(6, 2).to(dtype)
            if dtype.is_signed:
                ids[2, 1], ids[4] = -1, -1
            experts(torch.zeros(6, 16), ids, torch.ones(6, 2))
            assert experts.seen.dtype == dtype
            assert torch.equal(experts.seen < 0, ids < 0)
            assert torch.equal(experts.seen[ids >= 0] % 12, ids[ids >= 0])
            hits, sent = balancer.load()
            assert hits.sum() == sent.sum() == (ids >= 0).sum()


def test_a_dtype_that_cannot_hold_every_physical_id_is_refused() -> None:
    with fake_process_group(world_size=8):
        experts = Remembers(120, 4, 4)
        with torch_eplb.wrap(experts, num_redundant_experts=16, dispatch="external") as balancer:
            x, ids = torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.int8)
            with pytest.raises(
                ValueError, match=r"torch\.int8.* 0\.\.135 .* torch\.int16 or wider"
            ):
                experts(x, ids, torch.ones(3, 2))
            assert balancer.load()[0].sum() == 0
            experts(x, ids.to(torch.uint8), torch.ones(3, 2))


def test_an_id_that_means_nothing_names_its_layer() -> None:
    with fake_process_group(world_size=2):
        model = nn.ModuleDict({"moe": Experts(8, 4, 4)})
        with torch_eplb.wrap(model) as balancer:
            with pytest.raises(ValueError, match="layer moe: the router chose expert 8, but"):
                model["moe"](torch.zeros(1, 4), torch.tensor([[8]]), torch.ones(1, 1))
            assert balancer.load()[0].sum() == 0
