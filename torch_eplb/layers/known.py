"""Experts modules of transformers that are called, or keep their weights, in a form of their own.

Each is known by its class's name and its forward's arguments, without importing transformers. A
form says how a call of theirs is one of rows, expert ids and weights, as all others are, and how
their forward computes rows that are ordered by slot. Of forms that do not come to that, `why_not`
says the reason.

Shape suffixes: N rows of a call, C rows computed on this rank, H hidden, E experts, S slots.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from torch_eplb.routing import PADDING, count_hits

__all__ = ["Form", "form_of", "why_not"]

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Form:
    """What is different about a class of experts modules.

    Attributes:
        arguments: of its forward; one of another version has others.
        tensors: names of those that are indexed by expert.
        read: from the module and its forward's arguments to hidden states ``[N, H]``, ids
            ``[N, K]`` and weights ``[N, K]`` of the choices. None: they are forward's first three.
        compute: by means of the module's forward, ``[C, H]`` for rows ``[C, H]`` that are ordered
            by slot, and their slots ``[C]``.
        flat: whether the tensors' dim 0 is expert and row in one, ``[E * rows, ...]``. While
            wrapped they are ``[S, rows, ...]``, which forward takes as well.
        fits: tells a class whose forward does what is known from one of another version, where the
            arguments' names do not. None: they do.
        remark: what a user of it should know, or None.
    """

    arguments: tuple[str, ...]
    tensors: tuple[str, ...]
    compute: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
    read: Callable[..., Rows] | None = None
    flat: bool = False
    fits: Callable[[type[nn.Module]], bool] | None = None
    remark: str | None = None


def form_of(module: nn.Module) -> Form | None:
    """The form of an experts module, or None if it has none of its own."""
    form = _FORMS.get(type(module).__name__)
    if form is None or not isinstance(getattr(module, "num_experts", None), int):
        return None
    if tuple(inspect.signature(type(module).forward).parameters)[1:] != form.arguments:
        return None
    if form.fits is not None and not form.fits(type(module)):
        return None
    return form


def why_not(model: nn.Module) -> Iterator[str]:
    """A sentence on each class of experts in a model that is known and cannot be balanced."""
    seen = set()
    for name, module in model.named_modules():
        kind = type(module).__name__
        reason = _OF_ANOTHER_VERSION if kind in _FORMS else _REFUSED.get(kind)
        if reason is not None and kind not in seen:
            seen.add(kind)
            yield f"{name or 'the model'} is a {kind}: {reason}"


# ---- Llama 4: every expert is called with every token, times its score, which is 0 if not chosen


def _read_scaled(module: Any, hidden_states: torch.Tensor) -> Rows:
    """A row of each token for each expert, expert by expert, of which the zeros compute to zero.

    The score is in the row already, and an expert is not linear in it: weights are ones.
    """
    rows_NH, num_experts = hidden_states.flatten(0, -2), module.full_experts
    each_N = torch.arange(num_experts, device=rows_NH.device)
    each_N = each_N.repeat_interleave(len(rows_NH) // num_experts)
    ids_N = each_N.masked_fill(~rows_NH.detach().any(1), PADDING)
    return rows_NH, ids_N.unsqueeze(1), torch.ones_like(rows_NH[:, :1])


def _compute_padded(module: Any, rows_CH: torch.Tensor, slots_C: torch.Tensor) -> torch.Tensor:
    """Its forward wants as many rows of every slot."""
    hits_S = count_hits(slots_C, module.num_experts)
    most, begin_S = int(hits_S.max()), hits_S.cumsum(0) - hits_S
    place_C = torch.arange(len(slots_C), device=slots_C.device) + (
        most * slots_C - begin_S[slots_C]
    )
    padded = rows_CH.new_zeros((module.num_experts * most, rows_CH.shape[1]))
    return type(module).forward(module, padded.index_copy(0, place_C, rows_CH))[place_C]


# ---- JetMoE: one projection of all experts, called with rows that are sorted by expert -----------


def _read_sorted(module: Any, inputs: torch.Tensor, expert_size: list[int]) -> Rows:
    each = torch.arange(module.full_experts, device=inputs.device)
    sizes = torch.tensor(expert_size, device=inputs.device)
    ids_N = each.repeat_interleave(sizes, output_size=len(inputs))
    return inputs, ids_N.unsqueeze(1), torch.ones_like(inputs[:, :1])


def _compute_sorted(module: Any, rows_CH: torch.Tensor, slots_C: torch.Tensor) -> torch.Tensor:
    sizes = count_hits(slots_C, module.num_experts).tolist()
    return type(module).forward(module, rows_CH, sizes)


# ---- DBRX: the result has the first dimension of the input, and whatever comes of it next ------


def _compute_standing(module: Any, rows_CH: torch.Tensor, slots_C: torch.Tensor) -> torch.Tensor:
    ones = torch.ones_like(rows_CH[:, :1])
    return type(module).forward(module, rows_CH, slots_C.unsqueeze(1), ones).squeeze(1)


# ---- Switch Transformers: one-hot rows, of zeros where a choice was dropped for lack of room -----


def _read_mask(
    module: Any,
    hidden_states: torch.Tensor,
    selected_experts: torch.Tensor,
    routing_weights: torch.Tensor,
) -> Rows:
    """The router has dropped what is over an expert's capacity, sequence by sequence, before."""
    num_experts = module.full_experts
    if selected_experts.dim() != 3 or selected_experts.shape[2] != num_experts:
        raise ValueError(
            f"selected_experts of a {type(module).__name__} must be one-hot rows "
            f"[tokens, choices, {num_experts}], got {tuple(selected_experts.shape)}: its caller "
            "is of a version of transformers that is not known"
        )
    chosen_NK, ids_NK = selected_experts.max(2)
    return hidden_states, ids_NK.masked_fill(chosen_NK == 0, PADDING), routing_weights


def _compute_masked(module: Any, rows_CH: torch.Tensor, slots_C: torch.Tensor) -> torch.Tensor:
    mask_C1S = torch.nn.functional.one_hot(slots_C, module.num_experts).unsqueeze(1)
    return type(module).forward(module, rows_CH, mask_C1S, torch.ones_like(rows_CH[:, :1]))


# ---- NLLB-MoE: ids and weights, of which most are zero -------------------------------------------


def _read_chosen(
    module: Any, hidden_states: torch.Tensor, router_mask: torch.Tensor, router_probs: torch.Tensor
) -> Rows:
    """Choices of weight 0 add nothing, and get no gradient: they are masked products."""
    return hidden_states, router_mask.masked_fill(router_probs == 0, PADDING), router_probs


def _compute_chosen(module: Any, rows_CH: torch.Tensor, slots_C: torch.Tensor) -> torch.Tensor:
    ones = torch.ones_like(rows_CH[:, :1])
    return type(module).forward(module, rows_CH, slots_C.unsqueeze(1), ones)


class _Scales(dict[str, Callable[[torch.Tensor], torch.Tensor]]):
    """Stands in for an experts module: expert e multiplies by ``10 ** e``."""

    num_experts, moe_token_dropout, training = 3, 0.0, False

    def __init__(self) -> None:
        super().__init__({f"expert_{e}": partial(torch.mul, other=10.0**e) for e in range(3)})


def _takes_ids(kind: type[nn.Module]) -> bool:
    """Whether forward takes ``router_mask[n, k]`` for the id of an expert, as it is today.

    If a version to come reads it as the mask that it is, by the same names, this form is wrong.
    """
    with torch.no_grad():
        row = torch.ones((1, 1), device="cpu")
        ids = torch.tensor([[2, 0, 1]], device="cpu")
        weights = torch.tensor([[1.0, 2.0, 3.0]], device="cpu")
        try:
            result = kind.forward(_Scales(), row, ids, weights)
            return bool(result == 100.0 + 2.0 + 30.0)
        except Exception:  # whatever another version's forward makes of a stand-in
            return False


_FORMS = {
    "Llama4TextExperts": Form(
        ("hidden_states",),
        ("gate_up_proj", "down_proj"),
        _compute_padded,
        read=_read_scaled,
    ),
    "JetMoeParallelExperts": Form(
        ("inputs", "expert_size"), ("weight",), _compute_sorted, read=_read_sorted
    ),
    "DbrxExperts": Form(
        ("hidden_states", "top_k_index", "top_k_weights"),
        ("mlp.w1", "mlp.v1", "mlp.w2"),
        _compute_standing,
        flat=True,
    ),
    "SwitchTransformersExperts": Form(
        ("hidden_states", "selected_experts", "routing_weights"),
        ("expert_{}.wi.weight", "expert_{}.wo.weight"),
        _compute_masked,
        read=_read_mask,
    ),
    "NllbMoeExperts": Form(
        ("hidden_states", "router_mask", "router_probs"),
        (
            "expert_{}.fc1.weight",
            "expert_{}.fc1.bias",
            "expert_{}.fc2.weight",
            "expert_{}.fc2.bias",
        ),
        _compute_chosen,
        read=_read_chosen,
        fits=_takes_ids,
        remark="transformers' router of NLLB-MoE gives a mask, and its experts take the mask for "
        "ids: experts 0 and 1 compute all tokens, wrapped or not, and the others none",
    ),
}

_REFUSED = {
    "VitPoseNaiveMoe": "the data set of the whole batch chooses one expert, and its module "
    "computes all of them; there is no load to balance",
    "DogeCDMoE": "an expert is one row of an embedding, which costs as much to send as a token; "
    "there is nothing to gain by moving it",
}
_OF_ANOTHER_VERSION = (
    "this version of it is called, or computes, otherwise than those that are known; torch_eplb "
    "knows transformers 5.0 to 5.24"
)
