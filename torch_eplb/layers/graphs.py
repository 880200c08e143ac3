"""What hooks owe to compiled graphs, without importing the compiler, which takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["outside_graphs"]

_Hook = TypeVar("_Hook", bound=Callable[..., Any])


def outside_graphs(hook: _Hook) -> _Hook:
    """Run eagerly: sizes that depend on the data must reach the host, so graphs break here.

    The mark that ``torch.compiler.disable`` sets, without its import of the compiler.
    """
    hook._torchdynamo_disable = True  # type: ignore[attr-defined]
    return hook
