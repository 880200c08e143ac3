"""What the hooks of all MoE layers of a model share, and what one of them keeps for a while."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from torch_eplb.comm.communicator import Communicator
from torch_eplb.layers.position import Position
from torch_eplb.layers.roster import Roster
from torch_eplb.routing import LoadCounters, RoutingTables
from torch_eplb.values.choices import ExpertsName

__all__ = ["LayerContext", "TokenMask", "Traffic", "Trips", "recomputing"]

_Trip = TypeVar("_Trip")


def recomputing() -> bool:
    """Whether this forward is part of a backward pass: activation checkpointing runs it again.

    Such a forward has been counted. (A compiled graph recomputes without running hooks.)
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1  # what torch's own checkpointing asks


class TokenMask:
    """Which rows of a forward are tokens; the others are padding, and not counted."""

    def __init__(self) -> None:
        self._mask: torch.Tensor | None = None

    @property
    def is_given(self) -> bool:
        """Whether there is a mask of the forward under way."""
        return self._mask is not None

    @contextlib.contextmanager
    def of(self, mask: torch.Tensor) -> Iterator[None]:
        """In the forwards inside, only rows that are true are counted."""
        before, self._mask = self._mask, mask
        try:
            yield
        finally:
            self._mask = before

    def rows(self, num_tokens: int, named: torch.Tensor | None, layer: str) -> torch.Tensor | None:
        """bool ``[T]``, or None where all rows are tokens.

        Args:
            num_tokens: T of the layer's call.
            named: a mask that the layer itself was given.
            layer: its name, for messages.

        Raises:
            TypeError, ValueError: a mask is no bool (or integer) tensor with an entry per row.
        """
        masks = [mask for mask in (self._mask, named) if mask is not None]
        if not masks:
            return None
        for mask in masks:
            if not isinstance(mask, torch.Tensor) or mask.dtype.is_floating_point:
                kind = mask.dtype if isinstance(mask, torch.Tensor) else type(mask).__name__
                raise TypeError(f"layer {layer}: a token mask must be a bool tensor, got {kind}")
            if mask.numel() != num_tokens:
                raise ValueError(
                    f"layer {layer}: the token mask of shape {tuple(mask.shape)} has "
                    f"{mask.numel()} entries, but the layer was called with {num_tokens} tokens; "
                    "it needs one entry per token of this forward"
                )
        first, *rest = (mask.reshape(-1).bool() for mask in masks)
        return first & rest[0] if rest else first


@dataclass
class Traffic:
    """Rows of tokens that this rank has sent to other ranks in its forwards, and their bytes.

    A token on its way to a rank's experts is a row, and so is its result on the way back. Where a
    rank knows the batch of all ranks, also how many experts were active on the busiest rank.
    """

    rows: int = 0
    nbytes: int = 0
    calls: int = 0
    most_active: int = 0

    def add(self, rows: int, nbytes: int) -> None:
        """One layer's call."""
        self.rows += rows
        self.nbytes += nbytes

    def add_active(self, most: int) -> None:
        """One layer's call, and the most experts with tokens on a rank; none without tokens."""
        self.calls += most > 0
        self.most_active += most

    @property
    def mean_active(self) -> float | None:
        """The most experts with tokens on a rank, mean over the layers' calls."""
        return self.most_active / self.calls if self.calls else None


@dataclass(frozen=True)
class LayerContext:
    """What the hooks of all layers share.

    Attributes:
        comm: the process groups.
        tables: routing tables of all layers, updated in place.
        counters: load counters of all layers, updated in place.
        position: where this rank is.
        roster: the models of the group.
        tokens: which rows are counted.
        traffic: what was sent to other ranks.
        experts: who shall compute experts.
        max_tokens_per_rank: for all-gather, or None.
        owner: who can give the experts back; lives as long as the hooks.
    """

    comm: Communicator
    tables: RoutingTables
    counters: LoadCounters
    position: Position
    roster: Roster
    tokens: TokenMask = field(default_factory=TokenMask)
    traffic: Traffic = field(default_factory=Traffic)
    experts: ExpertsName = "auto"
    max_tokens_per_rank: int | None = None
    owner: object = None


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

    def holds(self, rows: torch.Tensor) -> bool:
        """Whether there is a trip of a call with ``rows``."""
        return any(ref() is rows for ref, _ in self._open)

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
