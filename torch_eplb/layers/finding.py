"""The MoE layers of a model, and which of them are balanced."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Container, Sequence

from torch import nn

from torch_eplb.layers.experts import ExpertLayer
from torch_eplb.layers.known import why_not
from torch_eplb.layers.refusals import (
    adapter_around,
    refuse_offloaded,
    refuse_shared_entries,
    refuse_tied,
)
from torch_eplb.layers.slots import Listed
from torch_eplb.layers.spec import find_spec
from torch_eplb.layers.submodules import entry_name

__all__ = ["LayerChoice", "common_owner", "find_layers"]

LayerChoice = Sequence[str] | Callable[[str, nn.Module], bool] | None
"""Which MoE layers: names or patterns of their experts modules, a function that is asked about each
(name, module), or None for all."""


def find_layers(
    model: nn.Module, choice: LayerChoice = None, wrapped: Container[nn.Module] = ()
) -> list[ExpertLayer]:
    """The MoE layers of a model, in the order of its modules.

    Args:
        model: any module.
        choice: which of them; what is not chosen is not looked at.
        wrapped: experts modules that are wrapped already.

    Raises:
        ValueError: there is none, or none is chosen, or a name is of none; their numbers of experts
            differ, one is wrapped, or experts cannot be moved as a whole; see
            `torch_eplb.layers.refusals`.
    """
    found = {}
    for name, module in model.named_modules():
        spec = find_spec(module)
        if spec is not None:
            found[name] = module, spec
    if not found:
        known = "; ".join(why_not(model))
        raise ValueError(
            f"{type(model).__name__} has no MoE layer that is recognised: wanted is a module with "
            "an int attribute num_experts, tensors whose dim 0 is the expert, and "
            "forward(hidden_states, top_k_index, top_k_weights). Describe another kind of layer "
            "with torch_eplb.register_layer(cls, ...)" + (f". {known}" if known else "")
        )
    layers = []
    for name in _chosen({name: module for name, (module, _) in found.items()}, choice):
        module, spec = found[name]
        if module in wrapped:
            raise ValueError(
                f"layer {name} is wrapped already; call unwrap() on the first wrapper before "
                "wrapping again, or choose other layers with layers="
            )
        adapter = adapter_around(model, name)
        if adapter is not None:
            raise ValueError(
                f"layer {name}: its experts are adapted by {adapter}, whose weights would not "
                "move with them. Merge it first (peft: model.merge_and_unload()), or leave the "
                "experts out of its targets; adapters on other modules may stay"
            )
        refuse_offloaded(model, name)
        layers.append(ExpertLayer(name, module, spec))
    counts = {layer.num_experts for layer in layers}
    if len(counts) > 1:
        listing = ", ".join(f"{layer.name}: {layer.num_experts}" for layer in layers)
        raise ValueError(
            f"all MoE layers of one wrapper must have the same number of experts, got {listing}. "
            "Choose those that agree with layers=, and wrap the model once for each number"
        )
    refuse_tied(
        model,
        {
            f"{layer.name}.{name}": tensor
            for layer in layers
            for name, tensor in layer.named_tensors()
        },
    )
    refuse_shared_entries(
        model,
        {
            f"{layer.name}.{entry_name(name, slot)}".lstrip("."): entry
            for layer in layers
            for name, part in zip(layer.tensor_names, layer.parts(), strict=True)
            if isinstance(part, Listed)
            for slot, entry in enumerate(part.tensors)
        },
    )
    return layers


def _chosen(found: dict[str, nn.Module], choice: LayerChoice) -> list[str]:
    """Names of the layers that are chosen, in the order of ``found``.

    >>> layers = dict.fromkeys(["text.0.moe", "text.1.moe", "vision.0.moe"], nn.Identity())
    >>> _chosen(layers, ["text.*"])
    ['text.0.moe', 'text.1.moe']
    """
    if choice is None:
        return list(found)
    if callable(choice):
        names = [name for name, module in found.items() if choice(name, module)]
        if not names:
            raise ValueError(
                f"layers={getattr(choice, '__qualname__', choice)}: it has chosen none of the "
                f"model's MoE layers, which are {_listing(found)}"
            )
        return names
    for pattern in choice:
        if not any(_is_named(name, pattern) for name in found):
            raise ValueError(
                f"layers: {pattern!r} is the name of no MoE layer, nor a pattern of one; the "
                f"model's are {_listing(found)}"
            )
    return [name for name in found if any(_is_named(name, pattern) for pattern in choice)]


def _is_named(name: str, pattern: str) -> bool:
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def _listing(found: dict[str, nn.Module]) -> str:
    names = [repr(name) for name in found]
    more = [f"and {len(names) - 20} more"] if len(names) > 20 else []
    return ", ".join([*names[:20], *more])


def common_owner(model: nn.Module, names: list[str]) -> nn.Module:
    """The smallest module with a forward of its own that holds all MoE layers.

    A model may be driven by other methods than its forward (one that generates calls a part of
    itself); the smallest part that holds all layers has to be called all the same. It holds two MoE
    layers at least, or is the model: what is smaller may be called again for the backward pass. So
    where one layer was chosen of several, it is what holds the nearest other one as well.
    """
    if len(names) > 1:
        path = _shared_path(names)
    else:
        others = [
            name
            for name, module in model.named_modules()
            if name not in names and find_spec(module) is not None
        ]
        path = max((_shared_path([*names, other]) for other in others), key=len, default=[])
    for length in range(len(path), 0, -1):
        module = model.get_submodule(".".join(path[:length]))
        if type(module).forward is not nn.Module.forward:
            return module
    return model


def _shared_path(names: list[str]) -> list[str]:
    """The names of the modules that all of these are in, from the outside in."""
    shared = itertools.takewhile(
        lambda parts: len(set(parts)) == 1,
        zip(*(name.split(".")[:-1] for name in names), strict=False),
    )
    return [parts[0] for parts in shared]
