"""Experts that are modules of their own, seen as lists with a tensor per expert.

What is indexed by expert has a name with a gap:

    "expert_{}.wi.weight"     slot s is expert_s.wi.weight
    "experts.{}.up.weight"    slot s is experts.s.up.weight, in a ModuleList

While a layer is sharded it has a module for each slot, whichever expert is in it. Modules are
alike but for their tensors, so that it does not matter which module an expert's tensors are in.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn

__all__ = ["around", "check_modules", "entry_name", "get_entries", "has_gap", "hold_entries"]

_GAP = "{}"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_gap(name: str) -> bool:
    """Whether a name is that of tensors in modules of their own."""
    return _GAP in name


def around(name: str) -> tuple[str, str]:
    """What stands before and after the slot in the names of a list's entries.

    >>> around("expert_{}.wi.weight"), around("up")
    (('expert_', '.wi.weight'), ('up.', ''))
    """
    before, gap, after = name.partition(_GAP)
    return (before, after) if gap else (f"{name}.", "")


def entry_name(name: str, slot: int) -> str:
    """The name of one entry of a list."""
    before, after = around(name)
    return f"{before}{slot}{after}"


def get_entries(module: nn.Module, name: str) -> list[torch.Tensor]:
    """The tensors that a name with a gap stands for, of all the modules that there are."""
    leaf = around(name)[1].removeprefix(".")
    return [_get(one, leaf) for one in _modules(module, name).values()]


def hold_entries(module: nn.Module, lists: Mapping[str, Sequence[nn.Parameter]]) -> None:
    """Have as many modules as there are entries, and these entries in them.

    Args:
        module: the experts module.
        lists: all that these modules consist of, by names with a gap that begin alike; an entry for
            each slot.
    """
    name = next(iter(lists))
    (size,) = {len(entries) for entries in lists.values()}
    present = _modules(module, name)
    modules = list(present.values())[:size]
    first = modules[0]
    # Copies share its tensors, which are replaced below.
    shared = {id(tensor): tensor for tensor in (*first.parameters(), *first.buffers())}
    modules += [copy.deepcopy(first, dict(shared)) for _ in range(size - len(modules))]
    owner, prefix = _owner(module, name)
    others = list(owner._modules.items())
    start = [key for key, _ in others].index(f"{prefix}0")
    owner._modules.clear()
    owner._modules.update(others[:start])
    owner._modules.update((f"{prefix}{slot}", one) for slot, one in enumerate(modules))
    owner._modules.update((key, one) for key, one in others[start:] if key not in present)
    for name, entries in lists.items():
        path, _, leaf = around(name)[1].removeprefix(".").rpartition(".")
        for one, entry in zip(modules, entries, strict=True):
            setattr(one.get_submodule(path), leaf, entry)


def check_modules(module: nn.Module, names: Sequence[str], where: str) -> None:
    """Refuse modules that differ in more than the values of the tensors that are named.

    Args:
        module: the experts module.
        names: all that these modules consist of, with a gap, beginning alike.
        where: the layer's name, for messages.

    Raises:
        ValueError: names what it found.
    """
    before = around(names[0])[0]
    leaves = {around(name)[1].removeprefix(".") for name in names}
    modules = _modules(module, names[0])
    if not modules:
        raise ValueError(
            f"layer {where} has no module {before}0, which {names[0]!r} means: {_GAP} stands for "
            "the number of an expert, from 0"
        )
    first = next(iter(modules.values()))
    for expert, one in enumerate(modules.values()):
        own = {name for name, _ in (*one.named_parameters(), *one.named_buffers())}
        if own != leaves:
            raise ValueError(
                f"layer {where}: {before}{expert} holds {', '.join(sorted(own)) or 'no tensors'}, "
                f"where {', '.join(sorted(leaves))} were expected. What else an expert holds would "
                "not move with it: name all of its tensors, or, if it is in another form "
                "(quantised, parametrized, an adapter), unpack or merge it before wrapping"
            )
        if str(one) != str(first):
            raise ValueError(
                f"layer {where}: {before}{expert} is {one}, and {before}0 is {first}; experts take "
                "each other's place, so all must be alike but for their weights"
            )
        for path, part in one.named_modules():
            if any(getattr(part, hooks, None) for hooks in _HOOKS) or "forward" in vars(part):
                raise ValueError(
                    f"layer {where}: {before}{expert}{'.' if path else ''}{path} has hooks or a "
                    "forward of its own, which would not move with its expert; remove them before "
                    "wrapping"
                )


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """What the modules are in, and how their names there begin."""
    path, _, prefix = around(name)[0].rpartition(".")
    return module.get_submodule(path), prefix


def _modules(module: nn.Module, name: str) -> dict[str, nn.Module]:
    """The modules that a name with a gap is about, by their names in what they are in."""
    try:
        owner, prefix = _owner(module, name)
    except AttributeError:
        return {}
    found: dict[str, nn.Module] = {}
    while (one := owner._modules.get(f"{prefix}{len(found)}")) is not None:
        found[f"{prefix}{len(found)}"] = one
    return found


def _get(module: nn.Module, leaf: str) -> torch.Tensor:
    path, _, last = leaf.rpartition(".")
    value = getattr(module.get_submodule(path), last)
    assert isinstance(value, torch.Tensor)
    return value
