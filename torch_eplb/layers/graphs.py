"""What hooks owe to compiled graphs, without importing the compiler, which takes seconds."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any, Protocol, TypeVar

import torch

from torch_eplb.comm.numbered import Numbered

__all__ = ["forget_compiled", "note_traced", "outside_graphs", "register"]

_Hook = TypeVar("_Hook", bound=Callable[..., Any])


def outside_graphs(hook: _Hook) -> _Hook:
    """Run a hook eagerly, and all that it calls: graphs break where they meet it.

    For hooks that need numbers on the host. `torch.compiler.disable`, but resolved when the hook
    runs: by then whoever compiles has imported the compiler. The mark alone keeps the hook from
    being a part of a graph, but not from being compiled by itself.
    """
    disabled: Callable[..., Any] | None = None

    @functools.wraps(hook)
    def outside(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return hook(*args, **kwargs)
            disabled = torch.compiler.disable(hook)
        return disabled(*args, **kwargs)

    outside._torchdynamo_disable = True  # type: ignore[attr-defined]
    _leave_alone(outside.__code__)  # type: ignore[attr-defined]
    return outside  # type: ignore[return-value]


def _leave_alone(code: CodeType) -> None:
    """Tell the compiler to skip frames of ``code`` itself; it would make an empty graph of each."""
    frames = torch._C._dynamo.eval_frame
    with contextlib.suppress(AttributeError):  # a compiler that has no such thing makes the graph
        if hasattr(frames, "skip_code"):  # torch 2.6
            frames.skip_code(code)
        else:
            skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
            frames.set_code_exec_strategy(code, skip)


class HasLayers(Protocol):
    """What wants to know that hooks of layers are a part of some graph."""

    traced: bool


_owners: Numbered[HasLayers] = Numbered()


def register(owner: HasLayers) -> int:
    """A number for `note_traced`."""
    return _owners.add(owner)


def note_traced(number: int) -> None:
    """Called where a hook is made a part of a graph: sets ``traced`` of what has this number.

    The compiler runs it and keeps nothing of it. An attribute that is set in a graph is a side
    effect, which graphs inside of graphs (activation checkpointing) may not have.
    """
    owner = _owners.get(number)
    assert owner is not None  # its hooks run
    owner.traced = True


# What `torch.compiler.assume_constant_result` sets, without its import of the compiler.
note_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forget_compiled() -> None:
    """Hooks come or go: code that was compiled before does not know, and is compiled again.

    Compiled code does not ask whether a module's hooks are still those that it was made with. Of
    which modules it was made cannot be told, so all of it is dropped.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
