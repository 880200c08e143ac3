"""The exceptions that are this library's own."""

from __future__ import annotations

__all__ = ["EPLBError", "PeerLostError"]


class EPLBError(RuntimeError):
    """Base of this library's run-time errors. Wrong arguments raise ValueError or TypeError."""


class PeerLostError(EPLBError):
    """A rank died, or was silent for longer than ``timeout``.

    The weights of the raising rank equal the last committed placement, so they can be saved.

    Attributes:
        ranks: the ranks (in the expert-parallel group) that are lost, as far as is known.
        round_index: the round that was in flight, or None.
    """

    def __init__(
        self, message: str, *, ranks: tuple[int, ...] = (), round_index: int | None = None
    ) -> None:
        super().__init__(message)
        self.ranks = ranks
        self.round_index = round_index
