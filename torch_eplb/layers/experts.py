"""Finding a model's MoE layers, sharding their experts over ranks, and giving them back.

After `ExpertLayer.shard`, every expert-indexed tensor of the layer has one entry per local slot:

    logical [8, ...]  ->  rank 0 of 2, slots (0, 1, 2, 3, 0): [5, ...]

So has every list with a tensor per expert; `torch_eplb.layers.slots` makes the two one.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from torch_eplb.layers.known import why_not
from torch_eplb.layers.refusals import (
    adapter_around,
    in_norm,
    refuse_offloaded,
    refuse_parts,
    refuse_shared_entries,
    refuse_tied,
)
from torch_eplb.layers.slots import (
    Listed,
    SlotTensors,
    Stacked,
    byte_view,
    entry_layout,
    in_tiles,
    is_list,
    read_bytes,
    tile_format,
)
from torch_eplb.layers.spec import BoundArguments, LayerSpec, find_spec, skips_sentinel

_FULL = "full_experts"
"""Attribute of a module with a form of its own: the experts that its callers know."""

__all__ = ["ExpertLayer", "LayerChoice", "common_owner", "find_layers"]

LayerChoice = Sequence[str] | Callable[[str, nn.Module], bool] | None
"""Which MoE layers: names or patterns of their experts modules, a function that is asked about each
(name, module), or None for all."""


class ExpertLayer:
    """One MoE layer of a wrapped model.

    Attributes:
        name: the experts module's name in the model.
        module: the experts module.
        num_experts: logical experts E.
        num_zero_experts: zero-compute experts Z, with ids E..E+Z-1.
        tensor_names: dotted names, relative to the module, of what is indexed by expert: tensors,
            or lists of them.
        full_sizes: of each, the entries on dim 0 in the unwrapped module: E, or E + Z where it has
            unused ones for the zero-compute experts (transformers' LongCat-Flash). Nobody reads
            those: they are dropped, and zeros where the full tensor is made again.
    """

    def __init__(self, name: str, module: nn.Module, spec: LayerSpec) -> None:
        self.name = name
        self.module = module
        self.spec = spec
        self.num_experts: int = getattr(module, spec.num_experts)
        self._is_sharded = False
        self.num_zero_experts: int = (
            getattr(module, spec.num_zero_experts) if spec.num_zero_experts is not None else 0
        )
        self.form = spec.form
        called = type(module).forward
        if self.form is not None and self.form.read is not None:
            called = ExpertLayer._compute
        self.arguments = BoundArguments(spec, called)
        self._adapting: RemovableHandle | None = None
        self.tensor_names = _expert_tensor_names(self)
        with_zero = self.num_experts + self.num_zero_experts
        self.full_sizes = [
            with_zero if len(part) == with_zero else self.num_experts for part in self.parts()
        ]
        self._expert_parallel = getattr(module, "_is_expert_parallel", None)

    def parts(self) -> list[SlotTensors]:
        """What is indexed by expert, by slot, in the order of ``tensor_names``."""
        return [self._part(name) for name in self.tensor_names]

    def tensors(self) -> list[torch.Tensor]:
        """The live tensors: ``[local slots, ...]`` each, and of lists all entries.

        In the order of ``tensor_names``.
        """
        return [tensor for part in self.parts() for tensor in part.tensors]

    def named_tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The same with their names; entry s of a list ``up`` is ``up.s``."""
        return [
            (f"{name}.{slot}" if isinstance(part, Listed) else name, tensor)
            for name, part in zip(self.tensor_names, self.parts(), strict=True)
            for slot, tensor in enumerate(part.tensors)
        ]

    def _part(self, name: str) -> SlotTensors:
        part = _get_part(self.module, name)
        if self.is_flat and not self._is_sharded:
            return Stacked(part.tensors[0].unflatten(0, (self.num_experts, -1)))
        return part

    @property
    def is_flat(self) -> bool:
        """Whether the unwrapped module's tensors have expert and row in one on dim 0."""
        return self.form is not None and self.form.flat

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert over all its tensors."""
        return sum(part.slot_nbytes for part in self.parts())

    @property
    def has_tiles(self) -> bool:
        """Whether experts lie in the NPU's own order, so that nothing is received into them."""
        return any(in_tiles(part.tensors[0]) for part in self.parts())

    def slot(self, slot: int) -> list[torch.Tensor]:
        """One slot's tensors, in place."""
        return [part.slot(slot) for part in self.parts()]

    def slot_bytes(self, slot: int) -> list[torch.Tensor]:
        """What is in one slot, flat uint8 per tensor: a view, or a copy of tensors in tiles."""
        return [read_bytes(tensor) for tensor in self.slot(slot)]

    def layout(self) -> list[str]:
        """Dtype, shape and strides of one expert's tensors, for comparing ranks."""
        return [
            f"{name}:{part.layout}"
            for name, part in zip(self.tensor_names, self.parts(), strict=True)
        ]

    @property
    def skips_sentinel(self) -> bool:
        """Whether forward, as it is now, ignores choices of the id past the last local slot."""
        return skips_sentinel(self.spec, self.module)

    def shard(self, experts: Sequence[int]) -> None:
        """Keep only the given logical experts, one per local slot, and free the others."""
        for name in self.tensor_names:
            _set_part(self.module, name, self._part(name).select(experts))
        self._is_sharded = True

    def compute_locally(self, num_slots: int) -> None:
        """Make the module's forward one over local slots; without this, ids stay global.

        Layers that dispatch by themselves are left as they are.
        """
        setattr(self.module, self.spec.num_experts, num_slots)
        if self._expert_parallel is not None:
            # transformers' implementations skip sentinel ids only when told so.
            setattr(self.module, "_is_expert_parallel", True)  # noqa: B010
        if self.form is not None:
            self.module.forward = self._compute
        if self.form is not None and self.form.read is not None:
            # Before the hooks that are to see what this one makes of a call.
            self._adapting = self.module.register_forward_pre_hook(self._read, with_kwargs=True)
            setattr(self.module, _FULL, self.num_experts)

    def _read(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call in the class's own form as one of hidden states, ids and weights."""
        spec = self.spec
        if spec.expert_ids in kwargs:  # for other ranks, without rows of our own
            return args, kwargs
        assert self.form is not None
        assert self.form.read is not None
        assert spec.expert_weights is not None
        hidden, ids, weights = self.form.read(module, *args, **kwargs)
        return (), {spec.hidden_states: hidden, spec.expert_ids: ids, spec.expert_weights: weights}

    def _compute(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """What stands in for the module's forward: rows of one choice each, ordered by slot."""
        assert self.form is not None
        return self.form.compute(self.module, hidden_states, top_k_index[:, 0])

    def restore(self, full: Sequence[SlotTensors]) -> None:
        """Put what has all experts back and forget that the layer was sharded."""
        for name, part in zip(self.tensor_names, full, strict=True):
            whole = Stacked(part.tensors[0].flatten(0, 1)) if self.is_flat else part
            _set_part(self.module, name, whole)
        self._is_sharded = False
        if self._adapting is not None:
            self._adapting.remove()
            self._adapting = None
            delattr(self.module, _FULL)
        if self.form is not None:
            vars(self.module).pop("forward", None)
        setattr(self.module, self.spec.num_experts, self.num_experts)
        if self._expert_parallel is not None:
            setattr(self.module, "_is_expert_parallel", self._expert_parallel)  # noqa: B010


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
            f"{layer.name}.{name}.{slot}".lstrip("."): entry
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


def _expert_tensor_names(layer: ExpertLayer) -> list[str]:
    """Names of the tensors indexed by expert, checked."""
    module, spec, where = layer.module, layer.spec, layer.name or type(layer.module).__name__
    found = dict(_named_tensors(module))
    if spec.tensors is not None:
        names = list(spec.tensors)
        for name in names:
            held = found[name] if name in found else _find(module, name)
            if is_list(held):
                _check_list(f"layer {where}: {name}", list(held))
            elif not isinstance(held, torch.Tensor) or name not in found:
                what = "" if held is None else f" (it is a {type(held).__name__})"
                raise ValueError(
                    f"layer {where} has no tensor {name!r}{what}; it has {', '.join(found)}. "
                    "Experts that are held one by one must be in a ParameterList, or in a list or "
                    "tuple of tensors"
                )
    else:
        sizes = (layer.num_experts, layer.num_experts + layer.num_zero_experts)
        names = [
            name
            for name, tensor in found.items()
            if tensor.dim()
            and tensor.shape[0] in sizes
            and not in_norm(module, name)
            # As many slots as experts, on one rank: what is counted is no expert's.
            and name != spec.token_counts
        ]
        refuse_parts(module, where, layer.num_experts, names, spec.token_counts)
        if not names:
            shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in found.items())
            raise ValueError(
                f"layer {where} says it has {layer.num_experts} experts, but no tensor has so "
                f"many entries on dim 0 ({shapes or 'it has no tensors'}). If it is sharded "
                'already, use dispatch="external" and name its tensors with '
                "torch_eplb.register_layer"
            )
    for name in names:
        if name not in found:
            continue  # a list, which has been looked at
        tensor = found[name]
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            raise ValueError(
                f"layer {where}: {name} is a {type(tensor).__name__}; experts must be plain "
                "tensors (convert a DTensor with .to_local(), unpack a quantised subclass)"
            )
        if not tensor.is_meta:
            _refuse_tiles(f"layer {where}: {name}", tensor)
            byte_view(tensor[0])
    return names


def _refuse_tiles(what: str, tensor: torch.Tensor) -> None:
    """NPUs may hold matrices in tiles, all of them together: then no slot is a piece of memory."""
    number = tile_format(tensor)
    if number is not None:
        import torch_npu

        raise ValueError(
            f"{what} is in the NPU's storage format {torch_npu.Format(number).name} ({number}), "
            "whose experts cannot be moved byte by byte. Cast it before wrapping with "
            "torch_npu.npu_format_cast(tensor, torch_npu.Format.ND), and let nothing cast it back "
            "(vLLM-Ascend does unless VLLM_ASCEND_ENABLE_NZ=0); or hold experts as a list with a "
            "tensor for each, which may be in that format"
        )


def _find(module: nn.Module, name: str) -> Any:
    """The attribute of a dotted name, or None."""
    value: Any = module
    for leaf in name.split("."):
        value = getattr(value, leaf, None)
    return value


def _check_list(what: str, entries: Sequence[Any]) -> None:
    """Refuse a list whose entries cannot take each other's place."""
    if not entries:
        raise ValueError(f"{what} is an empty list; it needs a tensor for each local slot")
    for slot, entry in enumerate(entries):
        if type(entry) not in (torch.Tensor, nn.Parameter):
            raise ValueError(
                f"{what}.{slot} is a {type(entry).__name__}; the entries must be plain tensors, "
                "one for each local slot"
            )
        if entry.is_meta:
            raise ValueError(
                f"{what}.{slot} is on the meta device: experts that are held one by one must have "
                "their weights before wrapping"
            )
        if (entry.device, entry_layout(entry)) != (entries[0].device, entry_layout(entries[0])):
            raise ValueError(
                f"{what}.{slot} is {entry_layout(entry)} on {entry.device}, but {what}.0 is "
                f"{entry_layout(entries[0])} on {entries[0].device} (dtype, shape, strides): "
                "experts take each other's place, so all entries must be alike"
            )
        if not in_tiles(entry):
            byte_view(entry)


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _get_part(module: nn.Module, name: str) -> SlotTensors:
    path, _, leaf = name.rpartition(".")
    held: Any = getattr(module.get_submodule(path), leaf)
    return Stacked(held) if isinstance(held, torch.Tensor) else Listed(held)


def _set_part(module: nn.Module, name: str, part: SlotTensors) -> None:
    if isinstance(part, Stacked):
        _set_tensor(module, name, part.tensors[0])
        return
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    present: Any = getattr(owner, leaf)
    like = present[0]
    entries: list[torch.Tensor] = [
        nn.Parameter(entry, requires_grad=like.requires_grad)
        if isinstance(like, nn.Parameter) and not isinstance(entry, nn.Parameter)
        else entry
        for entry in part.tensors
    ]
    if isinstance(present, list):
        present[:] = entries
    else:
        setattr(owner, leaf, type(present)(entries))


def _set_tensor(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace a parameter's or buffer's value.

    A parameter stays the same object, where it can, so that an optimizer that holds it trains it.
    """
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    present = getattr(owner, leaf)
    with torch.inference_mode(False), torch.no_grad():
        if not isinstance(present, nn.Parameter):
            setattr(owner, leaf, value)
        elif present.is_inference() or present.device.type != value.device.type:
            setattr(owner, leaf, nn.Parameter(value, requires_grad=present.requires_grad))
        else:
            # By way of another dtype: only then torch makes another node for its gradient. The one
            # of a graph that is still around expects the shape that the parameter had.
            other = torch.float64 if value.dtype != torch.float64 else torch.float32
            present.data = value.new_empty(0, dtype=other)
            present.data = value
            present.grad = None  # it was one for other entries
            # A graph that saved it before must not use what it holds now.
            torch.autograd.graph.increment_version(present)
