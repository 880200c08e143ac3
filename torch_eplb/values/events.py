"""What a user's rebalance hook hears: which slots hold another expert now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["CommittedRound", "Move"]


class Move(NamedTuple):
    """One slot that holds another expert now, and where that came from.

    Attributes:
        layer: index of the MoE layer.
        rank, slot: the slot that changed; ``slot`` is counted within its rank.
        old_expert, new_expert: logical experts before and after.
        source_rank, source_slot: the slot that the new expert was copied from.
    """

    layer: int
    rank: int
    slot: int
    old_expert: int
    new_expert: int
    source_rank: int
    source_slot: int


@dataclass(frozen=True)
class CommittedRound:
    """A round of transfers that was committed. The same on all ranks.

    All its moves happened at once: where one's source is another's target, what was in the source
    before has been copied. Whoever moves state of his own reads all sources before he writes.

    Attributes:
        placement_version: of the placement that holds from now on (`torch_eplb.Stats`).
        moves: by layer, then by rank and slot.
    """

    placement_version: int
    moves: tuple[Move, ...]

    def to(self, rank: int) -> tuple[Move, ...]:
        """The moves into slots of ``rank``.

        >>> CommittedRound(1, (Move(0, 2, 0, 5, 7, 1, 3),)).to(2)[0].new_expert
        7
        """
        return tuple(move for move in self.moves if move.rank == rank)
