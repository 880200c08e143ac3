"""Experts that are held one by one, quantised, as engines with kernels for lists hold them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from support.few_kernels import EXPERTS, HIDDEN, FewKernelModel, gather_slots
from torch import nn

import torch_eplb
from torch_eplb.values.placement import Placement

TENSORS = ["up", "up_scale", "up_offset", "bias"]


class Quantised(nn.Module):
    """An expert is ``silu((up - up_offset) * up_scale @ x + bias)``; all experts, stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        up = torch.randint(-128, 128, (EXPERTS, HIDDEN, HIDDEN), dtype=torch.int8)
        self.up = nn.Parameter(up, requires_grad=False)
        self.register_buffer("up_scale", torch.rand(EXPERTS, HIDDEN, 1) / 256)
        self.register_buffer("up_offset", torch.rand(EXPERTS, HIDDEN, 1))
        self.register_buffer("bias", torch.randn(EXPERTS, HIDDEN, 1))

    def slots(self) -> list[torch.Tensor]:
        """The four tensors of what the ids of a forward mean."""
        return [self.up, self.up_scale, self.up_offset, self.bias]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        up, scale, offset, bias = (tensor[top_k_index] for tensor in self.slots())
        out = ((up.float() - offset) * scale) @ hidden_states[:, None, :, None] + bias
        return (torch.nn.functional.silu(out).squeeze(-1) * top_k_weights.unsqueeze(-1)).sum(1)


class Listed(Quantised):
    """The same with a tensor per expert: in a ParameterList, in lists, in a tuple."""

    def hold(self, experts: Sequence[int]) -> None:
        """Keep these experts, one per slot."""
        weights = [self.up[e].clone() for e in experts]
        scale, offset, bias = (
            [tensor[e].clone() for e in experts]
            for tensor in (self.up_scale, self.up_offset, self.bias)
        )
        del self.up, self.up_scale, self.up_offset, self.bias
        self.up = nn.ParameterList(nn.Parameter(w, requires_grad=False) for w in weights)
        self.up_scale, self.up_offset, self.bias = scale, tuple(offset), bias

    def slots(self) -> list[torch.Tensor]:
        return [torch.stack(list(getattr(self, name))) for name in TENSORS]


class ListedOutside(Listed):
    """Fetches all slots of all ranks, and computes by physical id."""

    def slots(self) -> list[torch.Tensor]:
        return [gather_slots(tensor) for tensor in super().slots()]


def make_listed(
    kind: type[Listed], held: Sequence[Sequence[int]], seed: int = 0
) -> tuple[FewKernelModel, FewKernelModel]:
    """A model whose layers hold ``held``, one per slot, and the same with all experts stacked."""
    torch_eplb.register_layer(kind, tensors=TENSORS)
    model, plain = (FewKernelModel(each, len(held), seed) for each in (kind, Quantised))
    for layer, experts in zip(model.layers, held, strict=True):
        layer.experts.hold(experts)
    return model, plain


def first_slots(rank: int, num_ranks: int, redundant: int, layers: int = 2) -> list[list[int]]:
    """What a rank holds in the first placement."""
    slots = (EXPERTS + redundant) // num_ranks
    return Placement.initial(layers, EXPERTS, num_ranks, slots).experts[:, rank].tolist()
