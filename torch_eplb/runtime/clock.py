"""The step boundary as an operation, for models that run inside a compiled graph.

A hook's host code would break a graph, and baked into it would run only once. So the graph gets one
opaque operation instead, which finds the wrapped model by a number and runs its boundary at every
call. It is declared to write the routing tables and the counters, which orders it before every
layer that reads them: a commit of this boundary cannot slip behind the layer it concerns.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import torch

__all__ = ["HasBoundary", "begin_step", "register"]


class HasBoundary(Protocol):
    """What makes steps."""

    def boundary(self) -> None:
        """Count one forward, and do what is due before it."""


_numbers = itertools.count()
# Weak: the clock must not keep a dropped model alive.
_engines: weakref.WeakValueDictionary[int, HasBoundary] = weakref.WeakValueDictionary()


def register(engine: HasBoundary) -> int:
    """A number for `begin_step`."""
    number = next(_numbers)
    _engines[number] = engine
    return number


@torch.library.custom_op(
    "torch_eplb::begin_step",
    mutates_args=("slots", "counters"),
    schema="(Tensor(a!) slots, Tensor(b!) counters, int number) -> ()",
)
def begin_step(slots: torch.Tensor, counters: torch.Tensor, number: int) -> None:
    """Run the boundary of wrapped model ``number``; nothing if it is gone."""
    engine = _engines.get(number)
    if engine is not None:
        engine.boundary()


@begin_step.register_fake
def _(slots: torch.Tensor, counters: torch.Tensor, number: int) -> None:
    return None
