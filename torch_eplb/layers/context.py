"""What the hooks of all MoE layers of a model share, and what one of them keeps for a while."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from torch_eplb.comm.communicator import Communicator
from torch_eplb.layers.position import Position
from torch_eplb.layers.roster import Roster
from torch_eplb.routing import LoadCounters, RoutingTables

__all__ = ["LayerContext", "Trips"]

_Trip = TypeVar("_Trip")


@dataclass(frozen=True)
class LayerContext:
    """What the hooks of all layers share.

    Attributes:
        comm: the process groups.
        tables: routing tables of all layers, updated in place.
        counters: load counters of all layers, updated in place.
        position: where this rank is.
        roster: the models of the group.
    """

    comm: Communicator
    tables: RoutingTables
    counters: LoadCounters
    position: Position
    roster: Roster


class Trips(Generic[_Trip]):
    """What a layer's calls keep from the way to the experts for the way back.

    A layer may be entered again before it returns (re-entrance), after it has raised, or once more
    for the backward pass (recomputation), so a call finds its own again by the very tensor that
    the experts module was called with.

    Args:
        layer: its name, for messages.
    """

    def __init__(self, layer: str) -> None:
        self._layer = layer
        self._open: list[tuple[weakref.ref[torch.Tensor], _Trip]] = []

    def begin(self, rows: torch.Tensor, trip: _Trip) -> None:
        """Keep ``trip`` for the call of the module with ``rows``."""
        # A call that raised never came back for its own.
        self._open = [(ref, kept) for ref, kept in self._open if ref() is not None]
        self._open.append((weakref.ref(rows), trip))

    def end(self, rows: torch.Tensor) -> _Trip:
        """The trip of the call with ``rows``, which has returned.

        Raises:
            RuntimeError: there was no such call.
        """
        found = [index for index, (ref, _) in enumerate(self._open) if ref() is rows]
        if not found and len(self._open) == 1:
            found = [0]  # a hook that came after ours has changed the rows
        if not found:
            raise RuntimeError(
                f"layer {self._layer} returned without having been entered: a hook of its own has "
                "changed its inputs, or its forward was called past its hooks"
            )
        return self._open.pop(found[-1])[1]
