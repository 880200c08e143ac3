"""What the state functions take: a wrapped model."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from torch_eplb.runtime.engine import Engine

__all__ = ["Wrapped"]


class Wrapped(Protocol):
    """`torch_eplb.ExpertLoadBalancer`, as far as it is used here."""

    @property
    def module(self) -> nn.Module:
        """The model that was wrapped."""

    @property
    def engine(self) -> Engine:
        """What balances it."""
