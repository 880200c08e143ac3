"""The models of the soak test: narrow ids, dropped choices, recomputation, kinds of experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from support.models import Experts
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_eplb

HIDDEN, TOP_K = 16, 2


class PaddedExperts(Experts):
    """Nobody computes an id of -1, and the weight that comes with it is not looked at."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return compute(self, top_k_index >= 0, hidden_states, top_k_index, top_k_weights)


class SentinelExperts(PaddedExperts):
    """Skips the id past its last expert, too: what all_reduce marks foreign choices with."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        kept = (top_k_index >= 0) & (top_k_index < self.num_experts)
        return compute(self, kept, hidden_states, top_k_index, top_k_weights)


torch_eplb.register_layer(SentinelExperts, skips_sentinel=True)


class PhysicalExperts(PaddedExperts):
    """Dispatches by itself: fetches all slots of all ranks, and computes by physical id."""

    group: dist.ProcessGroup

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        slots = {}
        for name in ("gate_up_proj", "down_proj", "down_bias", "scale"):
            mine = getattr(self, name).detach()
            everyone = [torch.empty_like(mine) for _ in range(self.group.size())]
            dist.all_gather(everyone, mine, group=self.group)
            slots[name] = torch.cat(everyone)
        experts = SimpleNamespace(**slots)
        return compute(experts, top_k_index >= 0, hidden_states, top_k_index, top_k_weights)


def compute(
    experts: Any, kept: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """`Experts.forward` for the choices that are kept."""
    ids, weights = ids.long().masked_fill(~kept, 0), weights.masked_fill(~kept, 0.0)
    # Without rows, the weights are used all the same: DDP waits for every parameter's gradient.
    return Experts.forward(experts, x, ids, weights) + 0.0 * weights.sum()


class Layer(nn.Module):
    """A router that gives ids of a dtype of its own, and drops choices that it is told to."""

    def __init__(self, experts: type[Experts], num_experts: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, num_experts, bias=False)
        self.experts = experts(num_experts, HIDDEN, 4)
        self.dtype = dtype

    def forward(self, x: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K, dim=-1)
        ids = ids.to(self.dtype)
        if kept is not None:
            ids = ids.masked_fill(~kept, -1)
            weights = weights.masked_fill(~kept, float("nan"))
        return self.experts(x, ids, weights)


class Model(nn.Module):
    """A stack of residual MoE layers on rows ``[T, HIDDEN]``.

    Args:
        num_layers, num_experts: its size.
        dtype: of expert ids.
        experts: class of the experts modules.
        seed: of its weights.

    Attributes:
        recomputes: whether layers are run again for the backward pass.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        dtype: torch.dtype,
        experts: type[Experts],
        seed: int,
    ) -> None:
        super().__init__()
        self.recomputes = False
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(
                Layer(experts, num_experts, dtype) for _ in range(num_layers)
            )

    def forward(self, x: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Args:
        x: ``[T, HIDDEN]``.
        kept: bool ``[T, TOP_K]``, choices that the routers do not drop; None keeps all.
        """
        for layer in self.layers:
            rows = torch.nn.functional.rms_norm(x, x.shape[-1:])
            if self.recomputes and torch.is_grad_enabled():
                x = x + checkpoint(layer, rows, kept, use_reentrant=False)
            else:
                x = x + layer(rows, kept)
        return x
