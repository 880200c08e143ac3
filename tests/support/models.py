"""Small MoE models for tests, with transformers' experts signature but without transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

QUICK: dict[str, Any] = {
    "collect_interval": 4,
    "plan_interval": 1,
    "policy": "random",
    "num_redundant_experts": 4,
    "timeout": 30,
}
"""Arguments of `torch_eplb.wrap` with which experts move early, often and far."""


SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
"""Sizes of a configuration of transformers, but for its experts."""


class Experts(nn.Module):
    """Gated experts, computed one by one; several tensors per expert."""

    def __init__(self, num_experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 2 * width, hidden) / hidden**0.5)
        self.down_proj = nn.Parameter(torch.randn(num_experts, hidden, width) / width**0.5)
        self.down_bias = nn.Parameter(torch.randn(num_experts, hidden) / 10)
        self.register_buffer("scale", torch.rand(num_experts) + 0.5)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, choice = torch.where(top_k_index == expert)
            gate, up = (hidden_states[token] @ self.gate_up_proj[expert].T).chunk(2, dim=-1)
            out = (torch.nn.functional.silu(gate) * up) @ self.down_proj[expert].T
            out = out * self.scale[expert].to(out.dtype) + self.down_bias[expert]
            result = result.index_add(0, token, out * top_k_weights[token, choice, None])
        return result


class Elsewhere(nn.Module):
    """Stands for experts that dispatch by themselves: there is nothing to compute."""

    def __init__(self, num_experts: int = 8) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.up = nn.Parameter(torch.zeros(num_experts, 2))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return hidden_states


class MoELayer(nn.Module):
    def __init__(self, num_experts: int, hidden: int, width: int, top_k: int) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, num_experts, bias=False)
        self.experts = Experts(num_experts, hidden, width)
        self.top_k = top_k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(x).float().softmax(-1).topk(self.top_k, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        return self.experts(x, ids, weights)


class ToyModel(nn.Module):
    """A stack of residual MoE layers on rows ``[T, hidden]``."""

    def __init__(
        self,
        num_layers: int = 2,
        num_experts: int = 8,
        hidden: int = 16,
        width: int = 8,
        top_k: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(
                MoELayer(num_experts, hidden, width, top_k) for _ in range(num_layers)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(torch.nn.functional.rms_norm(x, x.shape[-1:]))
        return x


class TwoTowers(nn.Module):
    """Text and vision with other numbers of experts; vision is reached by some inputs only."""

    def __init__(self, vision_experts: int = 4, seed: int = 0) -> None:
        super().__init__()
        self.text = ToyModel(2, 8, seed=seed)
        self.vision = ToyModel(2, vision_experts, seed=seed + 1)

    def forward(self, x: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
        return self.text(x if image is None else x + self.vision(image))


def skewed_batch(
    tokens: int, hidden: int, seed: int, strength: float = 2.0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Tokens around a few centres, so that some experts are hot; the centres change with seed."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(1, hidden, generator=generator)
    noise = torch.randn(tokens, hidden, generator=generator)
    return (centre * strength + noise).to(dtype)
