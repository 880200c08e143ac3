"""Which experts modules are wrapped now, and by whom.

Parts of one model may be balanced by several balancers: whoever saves or loads the model has to
find all of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable
from typing import Any

from torch import nn

__all__ = ["owners_in", "release", "reserve", "take", "wrapped"]

# The owner is None between the checks and the wrapping. Weak on both sides: a registry must keep
# neither models nor balancers alive.
_owners: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any] | None] = weakref.WeakKeyDictionary()

wrapped: Container[nn.Module] = _owners
"""Experts modules that are wrapped, or are about to be."""


def reserve(modules: Iterable[nn.Module]) -> None:
    """These modules are about to be wrapped."""
    _owners.update((module, None) for module in modules)


def take(modules: Iterable[nn.Module], owner: object) -> None:
    """``owner``, which the modules' hooks keep alive, has wrapped them."""
    _owners.update((module, weakref.ref(owner)) for module in modules)


def release(modules: Iterable[nn.Module]) -> None:
    """They are as before, and may be wrapped again."""
    for module in modules:
        _owners.pop(module, None)


def owners_in(model: nn.Module) -> list[Any]:
    """Whoever has wrapped one of the model's experts modules, in the order of these."""
    found: list[Any] = []
    for module in model.modules():
        reference = _owners.get(module)
        owner = None if reference is None else reference()
        if owner is not None and not any(owner is other for other in found):
            found.append(owner)
    return found
