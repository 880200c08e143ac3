"""What the state functions take: a wrapped model, which other balancers may have parts of."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from torch_eplb.runtime.engine import Engine
from torch_eplb.runtime.owners import owners_in

__all__ = ["Wrapped", "engines_of", "gather_from_all"]


class Wrapped(Protocol):
    """`torch_eplb.ExpertLoadBalancer`, as far as it is used here."""

    @property
    def module(self) -> nn.Module:
        """The model that was wrapped."""

    @property
    def engine(self) -> Engine:
        """What balances it."""


def engines_of(balancer: Wrapped) -> list[Engine]:
    """The balancer's engine, then those that balance other layers of the same model.

    What has all of a model's experts in it has all engines do their part, on all ranks in this
    order, whichever balancer is asked.
    """
    others = [engine for engine in owners_in(balancer.module) if engine is not balancer.engine]
    return [balancer.engine, *others]


def gather_from_all(balancer: Wrapped, value: Any) -> dict[int, Any]:
    """What every rank passes (JSON values), by rank, of all groups that balance the model.

    Where the groups differ, a rank that has something to say goes before its namesakes. Collective.
    """
    everyone: dict[int, Any] = {}
    for engine in engines_of(balancer):
        for rank, said in engine.gather(value).items():
            everyone[rank] = everyone.get(rank) or said
    return everyone
