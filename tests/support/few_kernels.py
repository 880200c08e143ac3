"""Models in few operations and without host syncs, for devices that are simulated or captured."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

EXPERTS, HIDDEN, WIDTH, TOP_K = 8, 16, 8, 2


class FewKernelExperts(nn.Module):
    """Gated experts that fetch the weights of every choice; several tensors per expert."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5)
        self.register_buffer("scale", torch.rand(EXPERTS) + 0.5)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return compute(
            hidden_states,
            top_k_index,
            top_k_weights * self.scale[top_k_index],
            self.gate_up_proj,
            self.down_proj,
        )


class SentinelExperts(FewKernelExperts):
    """Skips choices of the id past its last expert; to be registered so."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        # Their weight is 0 as well.
        return super().forward(
            hidden_states, top_k_index.clamp(max=self.num_experts - 1), top_k_weights
        )


class ExternalExperts(FewKernelExperts):
    """Dispatches by itself: fetches all slots of all ranks, and computes by physical id."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        gate_up, down, scale = (
            gather_slots(t.detach()) for t in (self.gate_up_proj, self.down_proj, self.scale)
        )
        return compute(
            hidden_states, top_k_index, top_k_weights * scale[top_k_index], gate_up, down
        )


def compute(
    hidden_states: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
) -> torch.Tensor:
    """``[T, hidden]``: the weighted sum over each token's K experts."""
    gate, up = (gate_up_proj[ids] @ hidden_states[:, None, :, None]).chunk(2, dim=-2)
    out = down_proj[ids] @ (torch.nn.functional.silu(gate) * up)
    return (out.squeeze(-1) * weights.unsqueeze(-1)).sum(1)


def gather_slots(mine: torch.Tensor) -> torch.Tensor:
    """The slots of all ranks, one behind the other."""
    everyone = mine.new_empty(dist.get_world_size() * mine.shape[0], *mine.shape[1:])
    dist.all_gather_into_tensor(everyone, mine.contiguous())
    return everyone


class FewKernelLayer(nn.Module):
    def __init__(self, experts: type[FewKernelExperts]) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K, dim=-1)
        return self.experts(x, ids, weights)


class FewKernelModel(nn.Module):
    """Residual MoE layers on rows ``[T, hidden]``."""

    def __init__(
        self, experts: type[FewKernelExperts] = FewKernelExperts, layers: int = 2, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(FewKernelLayer(experts) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x
