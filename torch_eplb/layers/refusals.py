"""Experts that could not be moved as a whole: refused by name before the model is touched.

What moves with an expert are entries of plain tensors. Whatever else depends on which expert is
meant would stay where it is, and meet another expert after the first move, without an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

__all__ = [
    "adapter_around",
    "in_norm",
    "refuse_offloaded",
    "refuse_parts",
    "refuse_shared_entries",
    "refuse_tied",
]

_REGISTER = "torch_eplb.register_layer(..., tensors=[...])"
_MANY = 1024  # entries of a container that is not looked into: a vocabulary, say
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def refuse_parts(
    module: nn.Module,
    where: str,
    num_experts: int,
    expert_tensors: Sequence[str],
    token_counts: object = None,
) -> None:
    """Refuse an experts module that holds more per expert than its stacked tensors.

    Args:
        module: the experts module.
        where: its name, for messages.
        num_experts: logical experts E.
        expert_tensors: names of its tensors that are indexed by expert.
        token_counts: the name of its attribute with tokens per slot, which is none of experts'.

    Raises:
        ValueError: names what it found, and the remedy.
    """
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        if hasattr(part, "parametrizations"):
            raise ValueError(
                f"layer {where}: {prefix}{next(iter(part.parametrizations))} is parametrized, and "
                "what it is computed from would not move with its expert; call "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
        if isinstance(part, _CONTAINERS) and len(part) == num_experts:
            raise ValueError(
                f"layer {where}: {path or 'it'} is a {type(part).__name__} with one entry per "
                f"expert, which move only if they are named, with {_REGISTER}: a ParameterList or "
                f"list of tensors by its name, modules by all of their tensors, as in "
                f"'{prefix}{{}}.weight' with {{}} for the number. Or stack what the entries hold "
                f"into parameters of {num_experts} entries on dim 0. If it has nothing to do with "
                "experts, name those that do"
            )
        for name, value in vars(part).items():
            if part is module and name == token_counts:
                continue
            if name not in _OF_TORCH and _is_per_expert(value, num_experts):
                raise ValueError(
                    f"layer {where}: its attribute {prefix}{name} ({type(value).__name__}) has an "
                    f"entry for each of {num_experts} experts, but is no parameter or buffer, so "
                    "that it would not move with them: make it one tensor and register_buffer it, "
                    f"or name it, if it is a list of tensors, with {_REGISTER}. If it has nothing "
                    "to do with experts, name those that do"
                )
    if expert_tensors:
        _refuse_other_parameters(module, where, num_experts, expert_tensors)


# What nn.Module itself keeps.
_OF_TORCH = frozenset(vars(nn.Module()))


def _refuse_other_parameters(
    module: nn.Module, where: str, num_experts: int, expert_tensors: Sequence[str]
) -> None:
    for name, parameter in module.named_parameters():
        if name not in expert_tensors and not in_norm(module, name):
            raise ValueError(
                f"layer {where}: its parameter {name} {tuple(parameter.shape)} does not have "
                f"{num_experts} entries on dim 0 as {expert_tensors[0]} has: either it holds "
                "experts in another form (quantised, packed, an adapter), which cannot be moved, "
                f"or all experts share it; then name those of experts with {_REGISTER}"
            )
    for name in expert_tensors:
        # A quantised weight may be an object of its own, beside a bias or scales that are tensors.
        weight = name.removesuffix("_bias").removesuffix("_scales").removesuffix("_scale")
        path, _, leaf = weight.rpartition(".")
        held = vars(module.get_submodule(path)).get(leaf)
        if weight != name and held is not None:
            raise ValueError(
                f"layer {where}: {name} is indexed by expert, but {weight} is a "
                f"{type(held).__name__} and no parameter, so that it would not move with it: "
                "unpack the quantised weights before wrapping, or tell all tensors that are "
                f"indexed by expert with {_REGISTER}"
            )


def _is_per_expert(value: Any, num_experts: int, depth: int = 0) -> bool:
    """Whether something that is no parameter has an entry per expert, as far as can be seen."""
    if isinstance(value, nn.Module):
        return False
    shape = getattr(value, "shape", None)  # tensors, arrays, and what wraps them
    if isinstance(shape, Sequence):
        return len(shape) > 0 and shape[0] == num_experts
    if isinstance(value, (list, tuple, Mapping)):
        entries = list(value.values() if isinstance(value, Mapping) else value)
        if len(entries) == num_experts and all(_holds_weights(entry, depth) for entry in entries):
            return True
        if depth == 2 or len(entries) > _MANY:
            return False
        return any(_is_per_expert(entry, num_experts, depth + 1) for entry in entries)
    inside = getattr(value, "__dict__", None)
    if depth < 2 and isinstance(inside, dict):
        return any(_is_per_expert(entry, num_experts, depth + 1) for entry in inside.values())
    return False


def _holds_weights(entry: Any, depth: int) -> bool:
    # Inside of other objects numbers mean all sorts of things, in configurations above all.
    return isinstance(entry, (torch.Tensor, nn.Module)) or (isinstance(entry, float) and not depth)


def refuse_tied(model: nn.Module, experts: Mapping[str, torch.Tensor]) -> None:
    """Refuse expert tensors that the model has in a second place.

    One experts module in several places is one layer, and all right.

    Args:
        model: the model.
        experts: its expert tensors, by name.

    Raises:
        ValueError: names both places.
    """
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                names.setdefault(id(tensor), []).append(f"{path}.{leaf}".lstrip("."))
    for tensor in experts.values():
        places = names.get(id(tensor), [])
        if len(places) > 1:
            raise ValueError(
                f"{places[0]} and {places[1]} are one tensor: experts cannot be tied, because "
                "each layer places its own. Use one experts module in both places, or give each a "
                "tensor of its own"
            )


def refuse_shared_entries(model: nn.Module, entries: Mapping[str, torch.Tensor]) -> None:
    """Refuse experts in lists that share memory with each other, or with anything of the model.

    What arrived for one would be seen in the other; and a tensor that is registered under another
    name would be saved as if it belonged to no expert.

    Args:
        model: the model.
        entries: the tensors of all such lists, by name.

    Raises:
        ValueError: names both.
    """
    if not entries:
        return
    tensors = {
        f"{path}.{leaf}".lstrip("."): tensor
        for path, module in model.named_modules()
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items())
        if type(tensor) in (torch.Tensor, nn.Parameter)
    }
    spans = sorted(
        (_memory(tensor), *_span(tensor), name)
        for name, tensor in {**tensors, **entries}.items()
        if tensor.numel()
    )
    last = (0, 0, 0, "")
    for span in spans:
        name, other = span[3], last[3]
        if span[0] == last[0] and span[1] < last[2] and (name in entries or other in entries):
            raise ValueError(
                f"{other} and {name} share memory, and one of them is an expert's that is held by "
                "itself: it must be a tensor of its own that nothing else of the model has. Clone "
                "it, or take the other out (del module.weight)"
            )
        if span[0] != last[0] or span[2] > last[2]:
            last = span


def _memory(tensor: torch.Tensor) -> int:
    """What tensors have in common that may share memory: on the meta device only themselves."""
    return -id(tensor) if tensor.is_meta else tensor.untyped_storage().data_ptr()


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The first and the last byte of a dense tensor, from its storage's beginning."""
    start = int(tensor.storage_offset()) * tensor.element_size()
    reach = sum((n - 1) * int(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * tensor.element_size()


def refuse_offloaded(model: nn.Module, path: str) -> None:
    """Refuse an experts module whose weights accelerate keeps elsewhere between forwards.

    Args:
        model: the model.
        path: the experts module's name in it.

    Raises:
        ValueError: names the layer.
    """
    own = model.get_submodule(path)
    for module in (*_above(model, path), *own.modules()):
        for hook in _hooks(getattr(module, "_hf_hook", None)):
            inside = module is own or any(module is part for part in own.modules())
            if getattr(hook, "offload", False) and (
                inside or getattr(hook, "place_submodules", False)
            ):
                raise ValueError(
                    f"layer {path}: accelerate keeps its weights on the CPU or on disk and brings "
                    "them for each forward, where experts could not be moved. Load the model "
                    "without offloading (a device_map with one device, or none): sharded over the "
                    "ranks, it needs less memory. torch_eplb.load_pretrained fills a model from "
                    "the meta device"
                )


def _hooks(hook: Any) -> Iterable[Any]:
    """The hook that accelerate has attached, or all of a sequence of them."""
    return getattr(hook, "hooks", (hook,)) if hook is not None else ()


def adapter_around(model: nn.Module, path: str) -> str | None:
    """What adapts the experts module ``path`` from outside, as peft does; None if nothing does.

    Such a module computes weights from its own and the experts' before each forward, or calls a
    copy of its own.
    """
    for module in _above(model, f"{path}."):
        if {"base_layer", "original_module"} & module._modules.keys():
            kind, named = type(module).__name__, getattr(module, "active_adapters", None)
            return f"{kind} {', '.join(map(str, named))!r}" if named else kind
    return None


def _above(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules on the way to ``path``, without it, as far as it leads."""
    module: Any = model
    for part in path.split(".") if path else ():
        if not isinstance(module, nn.Module):
            return
        yield module
        module = getattr(module, part, None) if part else module


def in_norm(module: nn.Module, name: str) -> bool:
    """Whether a tensor belongs to a norm inside the experts module, shared by all experts.

    Its length is the hidden size, which may equal the number of experts by chance.
    """
    path, _, _ = name.rpartition(".")
    return bool(path) and "norm" in type(module.get_submodule(path)).__name__.lower()
