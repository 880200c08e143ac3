"""Grouped products in place of a module's forward: equal outputs and gradients, and who refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.models import Experts
from support.versions import needs_grouped
from torch import nn

import torch_eplb
from torch_eplb.testing import fake_process_group

pytestmark = needs_grouped


class Fused(nn.Module):
    """A user's own class."""

    def __init__(self, experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * width, hidden) / 4)
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, width) / 4)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, choice = torch.where(top_k_index == expert)
            both = hidden_states[token] @ self.gate_up_proj[expert].T
            gate, up = both.chunk(2, dim=-1)
            result = (torch.nn.functional.silu(gate) * up) @ self.down_proj[expert].T
            result = result * top_k_weights[token, choice, None]
            out = out.index_add(0, token, result.to(out.dtype))
        return out


def experts_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "registered":
        torch_eplb.register_layer(Fused, fused=True)
        return Fused(8, 32, 16)
    from transformers import AutoConfig

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1}
    if name == "gpt_oss":
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

        config = AutoConfig.for_model("gpt_oss", num_local_experts=8, intermediate_size=16, **sizes)
        module: nn.Module = GptOssExperts(config)
    else:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        config = AutoConfig.for_model("qwen3_moe", num_experts=8, moe_intermediate_size=16, **sizes)
        module = Qwen3MoeExperts(config)
    config._experts_implementation = "grouped_mm"
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.25)
    return module


def inputs(tokens: int, dtype: torch.dtype, weights: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, 32, generator=generator).to(dtype)
    shares, ids = torch.rand(tokens, 8, generator=generator).topk(3, dim=-1)
    return hidden, ids, shares.to(weights)


@pytest.mark.parametrize(
    ("name", "dispatch", "dtype"),
    [
        ("registered", "all_to_all", torch.float32),
        ("qwen3_moe", "all_to_all", torch.bfloat16),
        ("gpt_oss", "all_to_all", torch.float32),
        ("qwen3_moe", "all_reduce", torch.float32),
        ("gpt_oss", "all_reduce", torch.bfloat16),
    ],
)
def test_outputs_and_gradients_are_those_of_the_module(
    name: str, dispatch: Any, dtype: torch.dtype
) -> None:
    plain = experts_of(name).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 0.08

    def run(module: Any, tokens: int) -> list[torch.Tensor]:
        hidden, ids, weights = inputs(tokens, dtype, torch.float32)
        out = module(hidden.requires_grad_(), ids, weights.requires_grad_())
        out.float().square().sum().backward()
        grads = [parameter.grad.clone() for parameter in module.parameters()]
        module.zero_grad()
        return [out.detach(), hidden.grad, weights.grad, *grads]

    module = copy.deepcopy(plain)
    with fake_process_group(world_size=1):
        wrapped = torch_eplb.wrap(module, experts="grouped", dispatch=dispatch, policy="static")
        assert "experts computed by grouped products" in repr(wrapped)
        # Few tokens, and enough for all_reduce to pick its own choices.
        for tokens in (5, 400):
            for ours, theirs in zip(run(wrapped, tokens), run(plain, tokens), strict=True):
                assert ours.dtype == theirs.dtype
                scale = float(theirs.abs().max())
                torch.testing.assert_close(ours, theirs, atol=tolerance * scale, rtol=tolerance)
        if dispatch == "all_to_all":  # under all_reduce it is the module that meets no tokens
            assert [len(result) for result in run(wrapped, 0)[:3]] == [0, 0, 0]
        wrapped.unwrap()
        assert "forward" not in vars(module)


def test_errors_against_double_precision_are_no_larger_than_the_unwrapped_modules() -> None:
    plain = experts_of("qwen3_moe").bfloat16()
    exact = copy.deepcopy(plain).double()
    exact.config._experts_implementation = "eager"  # type: ignore[union-attr]
    hidden, ids, weights = inputs(256, torch.bfloat16, torch.bfloat16)
    with torch.no_grad(), fake_process_group(world_size=1):
        truth = exact(hidden.double(), ids, weights.double())

        def error(module: nn.Module) -> float:
            return float((module(hidden, ids, weights).double() - truth).square().mean().sqrt())

        unwrapped = error(copy.deepcopy(plain))
        for experts in ("module", "grouped"):
            with torch_eplb.wrap(
                copy.deepcopy(plain), experts=experts, policy="static"
            ) as balancer:
                assert error(balancer) <= 1.01 * unwrapped


def test_auto_respects_what_the_model_selects_and_says_why() -> None:
    def choice(module: nn.Module, **options: Any) -> str:
        with fake_process_group(world_size=2):
            with torch_eplb.wrap(module, policy="static", **options) as balancer:
                return repr(balancer).partition("experts computed by ")[2].partition(";")[0]

    assert choice(experts_of("qwen3_moe")) == "grouped products"
    chosen, overruled = experts_of("qwen3_moe"), experts_of("qwen3_moe")
    for module in (chosen, overruled):
        module.config._experts_implementation = "batched_mm"  # type: ignore[union-attr]
    assert choice(chosen).endswith("selects the experts implementation 'batched_mm'")
    assert choice(overruled, experts="grouped") == "grouped products"
    assert "Experts is not known to be a fused" in choice(Experts(8, 16, 8))
    assert choice(experts_of("qwen3_moe"), experts="module") == (
        "the module: that is what was asked for"
    )
    assert "float64" in choice(experts_of("qwen3_moe").double())
    narrow = experts_of("qwen3_moe")
    narrow.down_proj = nn.Parameter(torch.randn(8, 32, 6))
    assert "not aligned" in choice(narrow)


def test_grouped_is_refused_where_it_cannot_be() -> None:
    with fake_process_group(world_size=2):
        with pytest.raises(ValueError, match=r"experts='grouped': layer  cannot.*fused=True"):
            torch_eplb.wrap(Experts(8, 16, 8), experts="grouped")
    with pytest.raises(ValueError, match="the layer computes its experts by itself"):
        torch_eplb.Config(experts="grouped", dispatch="external")
    with pytest.raises(ValueError, match="experts must be one of 'auto', 'module', 'grouped'"):
        torch_eplb.Config(experts="fast")  # type: ignore[arg-type]
