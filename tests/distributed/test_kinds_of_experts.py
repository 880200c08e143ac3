"""Experts modules that do something in a way of their own, under every dispatch."""

from __future__ import annotations

import copy
import importlib
import types
from typing import Any

import pytest
import torch
from support.models import QUICK, Experts, skewed_batch
from support.ranks import preload, run_ranks
from torch import nn

import torch_eplb
from torch_eplb.testing import fake_process_group

HIDDEN = 16
FAMILIES = {"GptOss": "gpt_oss", "NemotronH": "nemotron_h", "LongcatFlash": "longcat_flash"}


def code_of(name: str) -> str:
    return f"transformers.models.{FAMILIES[name]}.modeling_{FAMILIES[name]}"


preload(*map(code_of, FAMILIES))


def transformers_experts(name: str, implementation: str = "eager", **sizes: Any) -> nn.Module:
    """One experts module of transformers, its weights drawn."""
    module = importlib.import_module(code_of(name))
    config = types.SimpleNamespace(
        hidden_size=HIDDEN,
        intermediate_size=8,
        moe_intermediate_size=8,
        expert_ffn_hidden_size=8,
        num_local_experts=8,
        n_routed_experts=8,
        zero_expert_num=4,
        moe_latent_size=None,
        hidden_act="silu",
        mlp_hidden_act="silu",
        swiglu_alpha=1.7,
        swiglu_limit=7.0,
        _experts_implementation=implementation,
    )
    experts = getattr(module, f"{name}Experts")(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


class Standing(Experts):
    """Returns ``[N, 1, H]``, as a product of matrices in batches does."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return super().forward(hidden_states, top_k_index, top_k_weights).unsqueeze(1)


class Kinds(nn.Module):
    """Routers, each over all the ids that an experts module takes, and the modules."""

    def __init__(self) -> None:
        super().__init__()
        longcat = transformers_experts("LongcatFlash")
        longcat.gate_up_proj.data[8:] = 0.0  # what nobody reads is not kept
        self.gpt_oss = transformers_experts("GptOss", "grouped_mm")
        in_two_places = Experts(8, HIDDEN, 4)
        self.experts = nn.ModuleList(
            [
                longcat,
                transformers_experts("NemotronH"),
                Standing(8, HIDDEN, 4),
                self.gpt_oss,
                in_two_places,
                in_two_places,
            ]
        )
        self.routers = nn.ModuleList(
            nn.Linear(HIDDEN, 12 if experts is longcat else 8) for experts in self.experts
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for router, experts in zip(self.routers, self.experts, strict=True):
            x = torch.nn.functional.rms_norm(x, x.shape[-1:])
            weights, ids = router(x).softmax(-1).topk(3, dim=-1)
            x = x + experts(x, ids, weights).view_as(x)
        return x


def all_kinds(rank: int, world_size: int) -> None:
    for dispatch in ("all_to_all", "all_gather", "all_reduce"):
        torch.manual_seed(0)
        model = Kinds()
        reference = copy.deepcopy(model)
        options: Any = {**QUICK, "dispatch": dispatch, "allow_training_with_moves": True}
        balancer = torch_eplb.wrap(model, **options)
        step = 0
        while balancer.stats().rebalances < 4:
            step += 1
            # As transformers' set_experts_implementation does, at any time.
            implementation = ("grouped_mm", "eager", "batched_mm", "eager")[step % 4]
            for each in (model, reference):
                each.gpt_oss.config._experts_implementation = implementation
            x = skewed_batch(6, HIDDEN, 10 * step + (0 if dispatch == "all_reduce" else rank))
            x.requires_grad_(step % 5 == 0)
            with torch.set_grad_enabled(x.requires_grad):
                actual, expected = balancer(x), reference(x)
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
            if x.requires_grad:
                (ours,) = torch.autograd.grad(actual.sin().sum(), x)
                (theirs,) = torch.autograd.grad(expected.sin().sum(), x)
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
        hits, sent = (counts.sum(axis=1) for counts in balancer.load())
        assert (hits == sent).all()
        choices = 6 * 3 * step * (world_size if dispatch == "all_gather" else 1)
        # The first is gpt-oss's; LongCat's other choices are zero-compute experts.
        assert [*hits[:1], *hits[2:]] == [choices, choices, choices, 2 * choices]
        assert 0 < hits[1] < choices
        state = balancer.state_dict()
        full = balancer.unwrap().state_dict()
        for key, value in reference.state_dict().items():
            assert torch.equal(state[key], value), key
            assert torch.equal(full[key], value), key


def test_experts_of_every_kind_are_served_while_they_move() -> None:
    run_ranks(all_kinds, 2)


class Remembers(nn.Module):
    """Dispatches by itself, and keeps the ids that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.copies = 12, 3
        self.weight = nn.Parameter(torch.rand(12, 2))
        self.seen = torch.empty(0)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        self.seen = top_k_index
        return hidden_states


def test_an_external_layer_gets_its_zero_compute_experts_after_the_physical_ones() -> None:
    torch_eplb.register_layer(Remembers, num_experts="experts", num_zero_experts="copies")
    with fake_process_group(world_size=4, rank=1):
        layer = Remembers()
        options: Any = {"dispatch": "external", "num_redundant_experts": 4}
        with torch_eplb.wrap(layer, **options) as balancer:
            for dtype in (torch.int32, torch.uint8):
                ids = torch.tensor([[0, 12], [14, 11], [13, 3]], dtype=dtype)
                layer(torch.zeros(3, 2), ids, torch.ones(3, 2))
                assert layer.seen.dtype == dtype
                zero = ids >= 12
                assert torch.equal(layer.seen[zero], ids[zero] + 4)  # 16 physical experts
                assert (layer.seen[~zero] < 16).all()
            hits, sent = balancer.load()
            assert hits.sum() == sent.sum() == 6
            assert hits[0, [0, 3, 11]].tolist() == [2, 2, 2]
            with pytest.raises(ValueError, match=r"chose expert 15, .* 12\.\.14 are zero-compute"):
                layer(torch.zeros(1, 2), torch.tensor([[15]]), torch.ones(1, 1))


def test_the_id_past_the_experts_cannot_mean_two_things() -> None:
    with pytest.raises(ValueError, match="skips_sentinel=True and num_zero_experts='copies'"):
        torch_eplb.register_layer(Remembers, skips_sentinel=True, num_zero_experts="copies")
