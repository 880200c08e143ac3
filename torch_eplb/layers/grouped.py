"""The arithmetic of fused gated experts on rows that are ordered by slot: two grouped products.

A module's own forward takes rows in any order: it sorts, gathers, multiplies by weights and gathers
back. Ours arrive sorted, with weights of one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from torch_eplb.routing import count_hits
from torch_eplb.values.choices import ExpertsName

__all__ = ["can_group", "grouped_experts", "misfit", "why_not"]

_ALIGNMENT = 16  # bytes; rows of a grouped product must begin at multiples of it
# Their own arithmetic is this one, so ours takes its place; others are somebody's choice.
_SAME_ARITHMETIC = (None, "grouped_mm")


def why_not(
    module: nn.Module, says_so: bool, asked: ExpertsName, device: torch.device
) -> str | None:
    """What keeps a module from being computed by `grouped_experts`, as of now; None if nothing.

    Args:
        module: an experts module.
        says_so: its class was registered as fused.
        asked: what the user wants; "grouped" goes before an implementation that the model selects.
        device: where it computes.
    """
    if asked == "module":
        return "that is what was asked for"
    selected = _selected(module)
    if asked != "grouped" and selected not in _SAME_ARITHMETIC:
        return f"the model selects the experts implementation {selected!r}"
    return misfit(module, says_so, device)


def misfit(module: nn.Module, says_so: bool, device: torch.device) -> str | None:
    """What keeps it from being so computed for good: its class, its weights or the device."""
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if not says_so and not _is_fused(module):
        return f"{type(module).__name__} is not known to be a fused gate-up and down projection"
    first, down = _weights(module)
    if not (isinstance(first, torch.Tensor) and isinstance(down, torch.Tensor)):
        return "its weights are a list with a tensor per expert"
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    if first.dtype != down.dtype or first.dtype not in dtypes:
        return f"weights are {first.dtype} and {down.dtype}"
    for weight in (first, down):
        if any(size * weight.element_size() % _ALIGNMENT for size in weight.shape[1:]):
            return f"a weight of shape {tuple(weight.shape[1:])} is not aligned to 16 bytes"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "grouped_mm needs compute capability 8.0"
        if first.dtype != torch.bfloat16:
            return f"grouped_mm computes {first.dtype} in a loop on this device"
    elif device.type != "cpu":
        return f"grouped_mm is not known to work on {device.type}"
    return None


def can_group(module: nn.Module, asked: ExpertsName, rows: torch.Tensor) -> bool:
    """Whether that is how these rows are computed, of a module that fits.

    The implementation may be selected at any time, and under autocast rows may be of another dtype.
    """
    if rows.dtype != _weights(module)[0].dtype or torch.is_autocast_enabled(rows.device.type):
        return False
    return asked == "grouped" or _selected(module) in _SAME_ARITHMETIC


def _selected(module: nn.Module) -> str | None:
    """The implementation that a model of transformers' selects."""
    return getattr(getattr(module, "config", None), "_experts_implementation", None)


def grouped_experts(
    module: nn.Module, rows_CH: torch.Tensor, slots_C: torch.Tensor
) -> torch.Tensor:
    """Each row's expert applied to it, ``[C, H]``.

    Args:
        module: for which `why_not` found nothing.
        rows_CH: rows in ascending order of slot.
        slots_C: their slots.
    """
    first, down = _weights(module)
    slots_C = slots_C.long()
    ends_S = count_hits(slots_C, first.shape[0]).cumsum(0).int()
    is_transposed = bool(getattr(module, "is_transposed", False))

    def product(rows: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        weight = weight if is_transposed else weight.transpose(-2, -1)
        result = F.grouped_mm(rows, weight, offs=ends_S)
        return result if bias is None else result + bias[slots_C]

    biased = bool(getattr(module, "has_bias", False))
    has_gate = bool(getattr(module, "has_gate", True))
    name = "gate_up_proj" if has_gate else "up_proj"
    inner = product(rows_CH, first, getattr(module, f"{name}_bias") if biased else None)
    if not has_gate:
        inner = module.act_fn(inner)  # type: ignore[operator]
    elif hasattr(module, "_apply_gate"):
        inner = module._apply_gate(inner)  # type: ignore[operator]
    else:
        gate, up = inner.chunk(2, dim=-1)
        inner = getattr(module, "act_fn", F.silu)(gate) * up
    return product(inner, down, module.down_proj_bias if biased else None)


def _is_fused(module: nn.Module) -> bool:
    """Whether it is a class of transformers' that says how its projections are laid out."""
    says = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
    return (
        all(hasattr(module, name) for name in says)
        and not getattr(module, "has_post_expert_norm", False)
        and isinstance(getattr(module, "down_proj", None), torch.Tensor)
    )


def _weights(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second projection of all slots."""
    name = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    return getattr(module, name), module.down_proj  # type: ignore[return-value]
