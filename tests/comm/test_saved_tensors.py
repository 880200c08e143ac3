from __future__ import annotations

import pytest
import torch
from support.versions import needs_known_hooks
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks

from torch_eplb.comm.saved_tensors import without_saved_tensors_hooks

pytestmark = needs_known_hooks

seen: list[str] = []


def packed() -> list[str]:
    """Which hooks a saved tensor passes: only the innermost pair runs."""
    x = torch.ones(2, requires_grad=True)
    seen.clear()
    x.exp()
    return list(seen)


def hooks(name: str) -> saved_tensors_hooks:
    def pack(x: torch.Tensor) -> torch.Tensor:
        seen.append(name)
        return x

    return saved_tensors_hooks(pack, lambda x: x)


def fail_without_hooks() -> None:
    with without_saved_tensors_hooks():
        assert packed() == []
        raise KeyError


def test_hooks_are_gone_inside_and_back_in_their_order_afterwards() -> None:
    with hooks("outer"):
        with hooks("inner"):
            with pytest.raises(KeyError):
                fail_without_hooks()
            assert packed() == ["inner"]
        assert packed() == ["outer"]
    with without_saved_tensors_hooks():
        assert packed() == []


def test_where_hooks_are_forbidden_there_are_none() -> None:
    with disable_saved_tensors_hooks("not here"), without_saved_tensors_hooks():
        assert packed() == []
