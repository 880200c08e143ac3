"""A wrapped model's state in its own keys and logical expert order, whatever the placement.

Two dictionaries must not be mixed up. With 4 experts on 2 ranks of 3 slots, placement
``[[2, 1, 0], [3, 0, 1]]``, expert tensors of shape ``[4, ...]`` in the unwrapped model::

    balancer.state_dict()          on every rank      experts 0 1 2 3      [4, ...]
    balancer.module.state_dict()   on rank 0          slots   2 1 0        [3, ...]
                                   on rank 1          slots   3 0 1        [3, ...]

The first is what an unwrapped model would give, and what loads into one, or into a model that is
wrapped over other ranks, with other redundancy and another placement. The second is this rank's
own memory: worth something only together with ``balancer.placement``, and the only one that needs
no peers (after a `PeerLostError`, say).

A `ParameterList` with a parameter per expert has a key for each, ``up.0`` to ``up.3``, and so have
experts that are modules of their own, ``expert_0.up.weight`` to ``expert_3.up.weight``, with the
same two meanings. Plain lists of tensors are in no state dict, wrapped or not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from torch_eplb.layers.gather import gather_tensor
from torch_eplb.layers.slots import Listed, SlotTensors, Stacked
from torch_eplb.layers.submodules import around
from torch_eplb.runtime.engine import Engine, Life
from torch_eplb.state.wrapped import Wrapped, engines_of, gather_from_all

__all__ = [
    "EntryKeys",
    "ExpertTensor",
    "expert_lists",
    "expert_tensors",
    "full_state_dict",
    "load_full_state_dict",
    "refuse_lists",
]


class EntryKeys(NamedTuple):
    """Keys of a list's entries, by slot in this rank's memory and by expert in the unwrapped model.

    >>> EntryKeys("experts.expert_", ".up.weight").of(3)
    'experts.expert_3.up.weight'
    """

    before: str
    after: str

    def of(self, number: int) -> str:
        """The key of a slot or expert."""
        return f"{self.before}{number}{self.after}"


class ExpertTensor(NamedTuple):
    """One of the model's tensors, or lists of tensors, that are indexed by expert.

    Attributes:
        engine: what balances it.
        layer: index of its MoE layer there.
        name: in the experts module.
        part: its slots here.
        num_experts: logical experts E.
        full_size: entries (on dim 0) in the unwrapped model: E, or more, which are unused.
        is_flat: whether expert and row are one dimension there, ``[E * rows, ...]``.
    """

    engine: Engine
    layer: int
    name: str
    part: SlotTensors
    num_experts: int
    full_size: int
    is_flat: bool

    @property
    def held(self) -> list[int]:
        """The logical experts of this rank's slots."""
        return self.engine.placement.experts[self.layer, self.engine.comm.rank].tolist()

    @property
    def live(self) -> torch.Tensor:
        """The stacked tensor itself, ``[local slots, ...]``; not for lists."""
        (tensor,) = self.part.tensors
        return tensor

    @property
    def full_shape(self) -> torch.Size:
        return self._shape(self.full_size)

    @property
    def logical_shape(self) -> torch.Size:
        """The same without what is unused."""
        return self._shape(self.num_experts)

    def _shape(self, num_experts: int) -> torch.Size:
        inner = self.part.inner_shape
        if self.is_flat:
            return torch.Size((num_experts * inner[0], *inner[1:]))
        return torch.Size((num_experts, *inner))


def full_state_dict(
    balancer: Wrapped,
    *,
    rank0_only: bool = False,
    cpu_offload: bool = False,
    prefix: str = "",
    keep_vars: bool = False,
) -> dict[str, Any]:
    """The state dict of the unwrapped model. Collective, also on ranks that get nothing.

    Experts are gathered one by one. Memory besides the result: nothing, or with ``cpu_offload`` or
    ``rank0_only`` at most one expert's tensor on the device. A migration in flight goes on. After
    ``balancer.unwrap()`` nothing is left to gather, and no other rank is needed.

    Args:
        balancer: the wrapped model.
        rank0_only: only rank 0 of the group gets the tensors; the others get an empty dict.
        cpu_offload: put everything into host memory.
        prefix: goes before every key.
        keep_vars: as in nn.Module, do not detach parameters; gathered experts are detached anyway.

    Returns:
        As nn.Module's: expert tensors are copies, the others share the model's memory (unless
        ``cpu_offload`` copied them from a device).

    Raises:
        PeerLostError: a rank did not come within ``timeout``.
    """
    for engine in engines_of(balancer):
        engine.require_weights("gather the experts")
        engine.catch_up()
    local = balancer.module.state_dict(prefix=prefix, keep_vars=True)
    experts, lists = expert_tensors(balancer, local), expert_lists(balancer, local)
    keep = not rank0_only or balancer.engine.comm.rank == 0
    result: OrderedDict[str, Any] = OrderedDict()
    if hasattr(local, "_metadata"):
        result._metadata = local._metadata  # type: ignore[attr-defined]
    indexed = [*experts.values(), *(tensor for _, tensor in lists.values())]
    scratch = None if keep and not cpu_offload else _scratch(indexed)
    gathered: dict[int, torch.Tensor | None] = {}
    whole: set[str] = set()
    for key, value in local.items():
        if key in lists:
            # What begins alike belongs together: experts are in order, with all that each has.
            before = lists[key][0].before
            if before not in whole:
                whole.add(before)
                alike = {keys: tensor for keys, tensor in lists.values() if keys.before == before}
                full = {
                    keys: _gather(tensor, keep, cpu_offload, scratch)
                    for keys, tensor in alike.items()
                }
                for e in range(max(tensor.full_size for tensor in alike.values())):
                    result.update(
                        (keys.of(e), part.slot(e))
                        for keys, part in full.items()
                        if part is not None
                    )
            continue
        if key in experts:
            # The same tensor may have several keys.
            if id(value) not in gathered:
                stacked = _gather(experts[key], keep, cpu_offload, scratch)
                gathered[id(value)] = None if stacked is None else stacked.tensors[0]
            value = gathered[id(value)]
        elif isinstance(value, torch.Tensor):
            value = value if keep_vars else value.detach()
            value = value.cpu() if cpu_offload and keep else value
        if keep:
            result[key] = value
    return result


def load_full_state_dict(
    balancer: Wrapped,
    full: Mapping[str, Any],
    *,
    strict: bool = True,
    assign: bool = False,
) -> Any:
    """Load the state dict of an unwrapped model: every replica of every expert is written.

    Collective: every rank passes the same tensors (from the CPU or from a device; a file that is
    mapped into memory will do, as only this rank's experts are read). A migration in flight is
    brought to its end first, so that no expert can arrive over the new weights, and then the
    present placement is written, in place: captured graphs and whoever else holds the tensors see
    the new values.

    Keys and shapes are compared on all ranks before anything is written, except that a model with
    load hooks, or modules that load in a way of their own, has its other tensors left to them.

    Args:
        balancer: the wrapped model.
        full: by the model's own keys; expert tensors ``[experts, ...]`` in logical order.
        strict: refuse missing and unexpected keys.
        assign: see `torch.nn.Module.load_state_dict`; expert tensors are copied all the same.

    Returns:
        ``missing_keys`` and ``unexpected_keys``, as nn.Module's.

    Raises:
        RuntimeError: keys or shapes do not fit (on any rank: every rank raises), as nn.Module's.
        PeerLostError: a rank did not come within ``timeout``; nothing was written.
    """
    engines = engines_of(balancer)
    for engine in engines:
        engine.require_weights("load a state dict")
        engine.catch_up()
    local = balancer.module.state_dict(keep_vars=True)
    experts, lists = expert_tensors(balancer, local), expert_lists(balancer, local)
    problems = _problems(balancer.module, full, local, experts, lists, strict, assign)
    _agree(balancer, problems)
    for engine in engines:
        engine.settle()
    rest = OrderedDict(full)
    if hasattr(full, "_metadata"):
        rest._metadata = full._metadata  # type: ignore[attr-defined]
    for key, tensor in experts.items():
        if key in full:
            value = full[key].unflatten(0, (tensor.full_size, -1)) if tensor.is_flat else full[key]
            _write(tensor.part, value, tensor.held)
            # The model's own loading comes next, and copies this tensor onto itself.
            rest[key] = tensor.live
    loaded: list[tuple[EntryKeys, ExpertTensor]] = []
    for names, tensor in dict(lists.values()).items():
        keys = _keys(names, tensor)
        if keys[0] in full:
            entries = [full[key] for key in keys]
            _write(tensor.part, entries, tensor.held)
            for key in keys:
                del rest[key]
            loaded.append((names, tensor))
    for names, tensor in loaded:
        rest.update((names.of(slot), live) for slot, live in enumerate(tensor.part.tensors))
    if assign:
        return balancer.module.load_state_dict(rest, strict=strict, assign=True)
    return balancer.module.load_state_dict(rest, strict=strict)


def load_nested(
    balancer: Wrapped, state: dict[str, Any], prefix: str, assign: bool
) -> tuple[list[str], list[str]]:
    """Load the keys under ``prefix`` on behalf of a module that contains the wrapper.

    They are replaced in ``state`` by what the containing module's recursion will look for: the
    live tensors under the names that nn.Module gives them.

    Returns:
        Missing and unexpected keys.
    """
    own = {
        key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)
    }
    keys = load_full_state_dict(balancer, own, strict=False, assign=assign)
    state.update(balancer.module.state_dict(prefix=f"{prefix}module.", keep_vars=True))
    return [prefix + key for key in keys.missing_keys], [
        prefix + key for key in keys.unexpected_keys
    ]


def expert_tensors(balancer: Wrapped, local: Mapping[str, Any]) -> dict[str, ExpertTensor]:
    """Which entries of the model's own state dict (``keep_vars=True``) are indexed by expert.

    They are known by identity, so that shared tensors are found under each of their keys.
    """
    known = {
        id(tensor.live): tensor for tensor in _indexed(balancer) if isinstance(tensor.part, Stacked)
    }
    return {key: known[id(value)] for key, value in local.items() if id(value) in known}


def _indexed(balancer: Wrapped) -> Iterator[ExpertTensor]:
    """All that is indexed by expert, of every engine that has parts of the model."""
    for engine in engines_of(balancer):
        if engine.life is Life.UNWRAPPED:
            continue
        for index, layer in enumerate(engine.layers):
            for name, part, size in zip(
                layer.tensor_names, layer.parts(), layer.full_sizes, strict=True
            ):
                yield ExpertTensor(
                    engine, index, name, part, layer.num_experts, size, layer.is_flat
                )


def expert_lists(
    balancer: Wrapped, local: Mapping[str, Any]
) -> dict[str, tuple[EntryKeys, ExpertTensor]]:
    """Which entries of the same are one slot's: by key, the keys of the list, and the list.

    Slot s of a list ``up`` is ``up.s`` there, and expert e ``up.e`` in the unwrapped model.
    """
    known = {
        id(entry): (slot, tensor)
        for tensor in _indexed(balancer)
        if isinstance(tensor.part, Listed)
        for slot, entry in enumerate(tensor.part.tensors)
    }
    found = {key: known[id(value)] for key, value in local.items() if id(value) in known}
    lists = {}
    for key, (slot, tensor) in found.items():
        after = around(tensor.name)[1]
        before = key.removesuffix(after).removesuffix(str(slot))
        lists[key] = EntryKeys(before, after), tensor
    return lists


def refuse_lists(balancer: Wrapped, local: Mapping[str, Any], action: str) -> None:
    """Refuse what knows experts by tensors ``[experts, ...]`` only.

    Raises:
        RuntimeError: ``action`` would take one slot's parameter for that of everybody's.
    """
    for key in expert_lists(balancer, local):
        raise RuntimeError(
            f"cannot {action}: {key} is one slot's, of experts that are held one by one, and only "
            "stacked experts have a sharded form. balancer.state_dict(), "
            "balancer.load_state_dict(...), balancer.save_pretrained(...) and "
            "torch_eplb.load_pretrained(...) know such experts"
        )


def _keys(names: EntryKeys, tensor: ExpertTensor) -> list[str]:
    """The unwrapped model's keys of a list."""
    return [names.of(expert) for expert in range(tensor.full_size)]


def _scratch(tensors: Iterable[ExpertTensor]) -> torch.Tensor | None:
    """Memory for an expert of the largest tensor. One for all: the group's threads may hold on to
    what they were given for a while."""
    parts = [tensor.part for tensor in tensors]
    if not parts:
        return None
    with torch.inference_mode(False):
        nbytes = max(part.slot_nbytes for part in parts)
        return torch.empty(nbytes, dtype=torch.uint8, device=parts[0].tensors[0].device)


def _gather(
    tensor: ExpertTensor,
    keep: bool,
    cpu_offload: bool,
    scratch: torch.Tensor | None,
) -> SlotTensors | None:
    part, engine = tensor.part, tensor.engine
    device = torch.device("cpu") if cpu_offload else part.tensors[0].device
    result = part.empty(tensor.full_size, device) if keep else None
    experts = engine.placement.experts[tensor.layer]
    gather_tensor(part, experts, engine.live[tensor.layer], engine.comm, result, scratch)
    if result is not None and tensor.is_flat:
        return Stacked(result.tensors[0].flatten(0, 1))
    return result


def _write(part: SlotTensors, full: torch.Tensor | list[torch.Tensor], experts: list[int]) -> None:
    """Slot s becomes ``full[experts[s]]``, for every slot.

    Slot by slot: byte-sized floats and packed integers have no index_select on every device.
    """
    with torch.no_grad():
        for slot, expert in enumerate(experts):
            part.slot(slot).copy_(full[expert])


def _problems(
    model: nn.Module,
    full: Mapping[str, Any],
    local: Mapping[str, Any],
    experts: Mapping[str, ExpertTensor],
    lists: Mapping[str, tuple[EntryKeys, ExpertTensor]],
    strict: bool,
    assign: bool,
) -> list[str]:
    """Why ``full`` cannot be loaded, found without writing anything."""
    problems = []
    plain = _loads_plainly(model)
    entries = {
        key: tensor.part.tensors[0]
        for names, tensor in dict(lists.values()).items()
        for key in _keys(names, tensor)
    }
    whole = {**{key: value for key, value in local.items() if key not in lists}, **entries}
    if strict and plain:
        missing = [key for key in whole if key not in full]
        unexpected = [key for key in full if key not in whole]
        problems += [f"missing key {key!r}" for key in missing]
        problems += [f"unexpected key {key!r}" for key in unexpected]
    elif entries:
        # Which of them this rank needs depends on where experts are.
        problems += [
            f"missing key {key!r}: a list of experts is loaded whole, or not at all"
            for names, tensor in dict(lists.values()).items()
            for key in _keys(names, tensor)
            if key not in full and not full.keys().isdisjoint(_keys(names, tensor))
        ]
    for key, present in whole.items():
        per_expert = key in experts or key in entries
        if key not in full or not (per_expert or (plain and isinstance(present, torch.Tensor))):
            continue
        value, wanted = full[key], experts[key].full_shape if key in experts else present.shape
        if not isinstance(value, torch.Tensor):
            problems.append(f"{key!r} must be a tensor, got {type(value).__name__}")
        elif value.shape != wanted and not (value.shape == (1,) and present.dim() == 0):
            hint = ""
            if key in experts and value.shape == present.shape:
                hint = " (this rank's slots; wanted are all experts, as balancer.state_dict() has)"
            problems.append(
                f"size mismatch for {key!r}: it has shape {tuple(value.shape)}{hint}, the model "
                f"has {tuple(wanted)}"
            )
        elif value.is_meta and not (assign and not per_expert):
            problems.append(f"{key!r} is on the meta device: it has no values to load")
    return problems


def _loads_plainly(model: nn.Module) -> bool:
    """Whether all modules load by name and shape, as nn.Module does."""
    return not any(
        module._load_state_dict_pre_hooks
        or type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
        for module in model.modules()
    )


def _agree(balancer: Wrapped, problems: list[str]) -> None:
    """Raise on every rank if one has a problem; each by itself where the groups are gone."""
    everyone = gather_from_all(balancer, problems)
    found = {rank: texts for rank, texts in everyone.items() if texts}
    if not found:
        return
    if len({tuple(texts) for texts in found.values()}) == 1 and len(found) == len(everyone):
        lines = problems
    else:
        lines = [f"rank {rank}: {text}" for rank, texts in found.items() for text in texts]
    raise RuntimeError(
        f"the state dict does not fit {type(balancer.module).__name__}; nothing was loaded:\n\t"
        + "\n\t".join(lines)
    )
