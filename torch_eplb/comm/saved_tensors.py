"""Collectives that outlive the forward in which they are posted, and what they would keep alive.

A gloo collective that is under way holds the state of the thread that posted it, and with it
autograd's hooks on saved tensors. Those of `torch.utils.checkpoint` hold the function that they
recompute, a wrapped model say; the model's engine holds the collective. That cycle runs through
C++, where no garbage collector follows: a model that is dropped would stay, with its planner.
torch 2.6 does not tell which hooks there are, and there such a model stays until the process ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["without_saved_tensors_hooks"]

_autograd: Any = torch._C._autograd  # no public name asks which hooks there are


@contextlib.contextmanager
def without_saved_tensors_hooks() -> Iterator[None]:
    """Inside, this thread has no default hooks on tensors that autograd saves."""
    hooks = []
    topmost = getattr(_autograd, "_top_saved_tensors_default_hooks", None)
    if topmost is not None and _autograd._saved_tensors_hooks_is_enabled():
        while (top := topmost(False)) is not None:
            _autograd._pop_saved_tensors_default_hooks()
            hooks.append(top)
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            _autograd._push_saved_tensors_default_hooks(pack, unpack)
