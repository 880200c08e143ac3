"""The step boundary as an operation, for models that run inside a compiled graph.

A hook's host code would break a graph, and baked into it would run only once. So the graph gets one
opaque operation instead, which finds the wrapped model by a number and runs its boundary at every
call. It is declared to write the routing tables and the counters, which orders it before every
layer that reads them: a commit of this boundary cannot slip behind the layer it concerns.

Experts are not declared: a backend that works on copies would write old weights over a slot that is
being received into. Graphs read them where they are, after the operation, as the model does.
"""

from __future__ import annotations

from typing import Protocol

import torch

from torch_eplb.comm.numbered import Numbered

__all__ = ["HasBoundary", "begin_step", "register"]


class HasBoundary(Protocol):
    """What makes steps."""

    @property
    def is_open(self) -> bool:
        """Whether it still makes any."""

    @property
    def written(self) -> list[torch.Tensor]:
        """All that a boundary may write and a graph may read, but experts; always the same."""

    def boundary(self) -> None:
        """Count one forward, and do what is due before it."""


_engines: Numbered[HasBoundary] = Numbered()


def register(engine: HasBoundary) -> int:
    """A number for `begin_step`."""
    return _engines.add(engine)


@torch.library.custom_op(
    "torch_eplb::begin_step",
    mutates_args=("written",),
    schema="(Tensor(a!)[] written, int number) -> ()",
)
def begin_step(written: list[torch.Tensor], number: int) -> None:
    """Run the boundary of wrapped model ``number``; nothing if it is gone.

    Args:
        written: its `HasBoundary.written`. A backend that makes graphs functional passes copies,
            lets the graph go on with these, and writes them over the originals at its end. So
            copies must be told what the boundary has written, or it would be undone.
        number: from `register`.
    """
    engine = _engines.get(number)
    if engine is None or not engine.is_open:
        return
    engine.boundary()
    for passed, own in zip(written, engine.written, strict=True):
        if passed.data_ptr() != own.data_ptr():
            passed.copy_(own)


@begin_step.register_fake
def _(written: list[torch.Tensor], number: int) -> None:
    return None
