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
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from torch_eplb.layers.gather import empty_full, gather_tensor
from torch_eplb.runtime.engine import Engine, Life
from torch_eplb.state.wrapped import Wrapped, engines_of, gather_from_all

__all__ = ["ExpertTensor", "expert_tensors", "full_state_dict", "load_full_state_dict"]


class ExpertTensor(NamedTuple):
    """One of the model's tensors that are indexed by expert.

    Attributes:
        engine: what balances it.
        layer: index of its MoE layer there.
        live: the tensor itself, ``[local slots, ...]``.
        num_experts: logical experts E.
        full_size: experts on dim 0 in the unwrapped model: E, or more, which are unused.
        is_flat: whether expert and row are one dimension there, ``[E * rows, ...]``.
    """

    engine: Engine
    layer: int
    live: torch.Tensor
    num_experts: int
    full_size: int
    is_flat: bool

    @property
    def held(self) -> list[int]:
        """The logical experts of this rank's slots."""
        return self.engine.placement.experts[self.layer, self.engine.comm.rank].tolist()

    @property
    def full_shape(self) -> torch.Size:
        return self._shape(self.full_size)

    @property
    def logical_shape(self) -> torch.Size:
        """The same without what is unused."""
        return self._shape(self.num_experts)

    def _shape(self, num_experts: int) -> torch.Size:
        shape = self.live.shape
        if self.is_flat:
            return torch.Size((num_experts * shape[1], *shape[2:]))
        return torch.Size((num_experts, *shape[1:]))


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
    experts = expert_tensors(balancer, local)
    keep = not rank0_only or balancer.engine.comm.rank == 0
    result: OrderedDict[str, Any] = OrderedDict()
    if hasattr(local, "_metadata"):
        result._metadata = local._metadata  # type: ignore[attr-defined]
    scratch = None if keep and not cpu_offload else _scratch(experts.values())
    gathered: dict[int, torch.Tensor | None] = {}
    for key, value in local.items():
        if key in experts:
            # The same tensor may have several keys.
            if id(value) not in gathered:
                gathered[id(value)] = _gather(experts[key], keep, cpu_offload, scratch)
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
    experts = expert_tensors(balancer, local)
    _agree(balancer, _problems(balancer.module, full, local, experts, strict, assign))
    for engine in engines:
        engine.settle()
    rest = OrderedDict(full)
    if hasattr(full, "_metadata"):
        rest._metadata = full._metadata  # type: ignore[attr-defined]
    for key, tensor in experts.items():
        if key in full:
            value = full[key].unflatten(0, (tensor.full_size, -1)) if tensor.is_flat else full[key]
            _write(tensor.live, value, tensor.held)
            # The model's own loading comes next, and copies this tensor onto itself.
            rest[key] = tensor.live
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
        id(tensor): ExpertTensor(engine, index, tensor, layer.num_experts, size, layer.is_flat)
        for engine in engines_of(balancer)
        if engine.life is not Life.UNWRAPPED
        for index, layer in enumerate(engine.layers)
        for tensor, size in zip(layer.tensors(), layer.full_sizes, strict=True)
    }
    return {key: known[id(value)] for key, value in local.items() if id(value) in known}


def _scratch(tensors: Iterable[ExpertTensor]) -> torch.Tensor | None:
    """Memory for an expert of the largest tensor. One for all: the group's threads may hold on to
    what they were given for a while."""
    lives = [tensor.live for tensor in tensors]
    if not lives:
        return None
    with torch.inference_mode(False):
        nbytes = max(live[0].nbytes for live in lives)
        return torch.empty(nbytes, dtype=torch.uint8, device=lives[0].device)


def _gather(
    tensor: ExpertTensor,
    keep: bool,
    cpu_offload: bool,
    scratch: torch.Tensor | None,
) -> torch.Tensor | None:
    live, engine = tensor.live.detach(), tensor.engine
    device = torch.device("cpu") if cpu_offload else live.device
    result = empty_full(live, tensor.full_size, device) if keep else None
    experts = engine.placement.experts[tensor.layer]
    gather_tensor(live, experts, engine.live[tensor.layer], engine.comm, result, scratch)
    return result.flatten(0, 1) if result is not None and tensor.is_flat else result


def _write(live: torch.Tensor, full: torch.Tensor, experts: list[int]) -> None:
    """``live[slot] = full[experts[slot]]`` for every slot.

    Slot by slot: byte-sized floats and packed integers have no index_select on every device.
    """
    with torch.no_grad():
        for slot, expert in enumerate(experts):
            live[slot].copy_(full[expert])


def _problems(
    model: nn.Module,
    full: Mapping[str, Any],
    local: Mapping[str, Any],
    experts: Mapping[str, ExpertTensor],
    strict: bool,
    assign: bool,
) -> list[str]:
    """Why ``full`` cannot be loaded, found without writing anything."""
    problems = []
    plain = _loads_plainly(model)
    if strict and plain:
        missing = [key for key in local if key not in full]
        unexpected = [key for key in full if key not in local]
        problems += [f"missing key {key!r}" for key in missing]
        problems += [f"unexpected key {key!r}" for key in unexpected]
    for key, present in local.items():
        if key not in full or not (key in experts or (plain and isinstance(present, torch.Tensor))):
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
        elif value.is_meta and not (assign and key not in experts):
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
