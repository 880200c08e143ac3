"""Finding a model's MoE layers, sharding their experts over ranks, and giving them back.

After `ExpertLayer.shard`, every expert-indexed tensor of the layer has one entry per local slot:

    logical [8, ...]  ->  rank 0 of 2, slots (0, 1, 2, 3, 0): [5, ...]

So has every list with a tensor per expert, and so are modules with one expert each;
`torch_eplb.layers.slots` makes all of these one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from torch_eplb.layers.refusals import in_norm, refuse_parts
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
from torch_eplb.layers.spec import BoundArguments, LayerSpec, skips_sentinel
from torch_eplb.layers.submodules import (
    around,
    check_modules,
    entry_name,
    get_entries,
    has_gap,
    hold_entries,
)

_FULL = "full_experts"
"""Attribute of a module with a form of its own: the experts that its callers know."""

__all__ = ["ExpertLayer"]


class ExpertLayer:
    """One MoE layer of a wrapped model.

    Attributes:
        name: the experts module's name in the model.
        module: the experts module.
        num_experts: logical experts E.
        num_zero_experts: zero-compute experts Z, with ids E..E+Z-1.
        tensor_names: dotted names, relative to the module, of what is indexed by expert: tensors,
            or lists of them, or, with a gap for the slot, tensors in modules of their own.
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
            (entry_name(name, slot) if isinstance(part, Listed) else name, tensor)
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
        spread = [name for name in self.tensor_names if has_gap(name)]
        self._spread({name: self._part(name).select(experts) for name in spread})
        for name in self.tensor_names:
            if not has_gap(name):
                _set_part(self.module, name, self._part(name).select(experts))
        self._is_sharded = True

    def _spread(self, parts: Mapping[str, SlotTensors]) -> None:
        """Have a module for each slot: all that it consists of is exchanged at once."""
        like = {name: self._part(name).tensors[0] for name in parts}
        for names in _alike(parts):
            hold_entries(
                self.module, {name: _parameters(parts[name].tensors, like[name]) for name in names}
            )

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
        given = dict(zip(self.tensor_names, full, strict=True))
        self._spread({name: part for name, part in given.items() if has_gap(name)})
        for name, part in given.items():
            if has_gap(name):
                continue
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


def _expert_tensor_names(layer: ExpertLayer) -> list[str]:
    """Names of the tensors indexed by expert, checked."""
    module, spec, where = layer.module, layer.spec, layer.name or type(layer.module).__name__
    found = dict(_named_tensors(module))
    if spec.tensors is not None:
        names = list(spec.tensors)
        for alike in _alike(name for name in names if has_gap(name)):
            check_modules(module, alike, where)
        for name in names:
            if has_gap(name):
                _check_list(where, name, get_entries(module, name), can_be_meta=True)
                continue
            held = found[name] if name in found else _find(module, name)
            if is_list(held):
                can_be_meta = isinstance(held, nn.ParameterList)
                _check_list(where, name, list(held), can_be_meta)
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


def _alike(names: Iterable[str]) -> list[list[str]]:
    """Names with a gap by what they begin with: those of the same modules."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(around(name)[0], []).append(name)
    return list(groups.values())


def _find(module: nn.Module, name: str) -> Any:
    """The attribute of a dotted name, or None."""
    value: Any = module
    for leaf in name.split("."):
        value = getattr(value, leaf, None)
    return value


def _check_list(where: str, name: str, entries: Sequence[Any], can_be_meta: bool) -> None:
    """Refuse a list whose entries cannot take each other's place.

    Args:
        where, name: of the layer and of the list, for messages.
        entries: what is in it.
        can_be_meta: whether the entries are parameters of modules, which loading gives memory.
    """
    if not entries:
        raise ValueError(
            f"layer {where}: {name} is an empty list; it needs a tensor for each local slot"
        )
    first = entries[0]
    for slot, entry in enumerate(entries):
        what = f"layer {where}: {entry_name(name, slot)}"
        if type(entry) not in (torch.Tensor, nn.Parameter):
            raise ValueError(
                f"{what} is a {type(entry).__name__}; the entries must be plain tensors, "
                "one for each local slot"
            )
        if entry.is_meta and not can_be_meta:
            raise ValueError(
                f"{what} is on the meta device: experts in a list that is no ParameterList must "
                "have their weights before wrapping"
            )
        if (entry.device, entry_layout(entry)) != (first.device, entry_layout(first)):
            raise ValueError(
                f"{what} is {entry_layout(entry)} on {entry.device}, but {entry_name(name, 0)} is "
                f"{entry_layout(first)} on {first.device} (dtype, shape, strides): "
                "experts take each other's place, so all entries must be alike"
            )
        if not entry.is_meta and not in_tiles(entry):
            byte_view(entry)


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _get_part(module: nn.Module, name: str) -> SlotTensors:
    if has_gap(name):
        return Listed(get_entries(module, name))
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
    entries: list[Any] = list(part.tensors)
    if isinstance(present[0], nn.Parameter):
        entries = _parameters(entries, like=present[0])
    if isinstance(present, list):
        present[:] = entries
    else:
        setattr(owner, leaf, type(present)(entries))


def _parameters(entries: Sequence[torch.Tensor], like: torch.Tensor) -> list[nn.Parameter]:
    """Those that are none yet are made parameters, which want gradients if ``like`` does."""
    return [
        entry
        if isinstance(entry, nn.Parameter)
        else nn.Parameter(entry, requires_grad=like.requires_grad)
        for entry in entries
    ]


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
