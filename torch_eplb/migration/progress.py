"""Carries out a plan on this rank: which slot holds what, which is drained, which round is next.

Weights and routing tables change in the same call, so that whoever looks between two calls finds
them in agreement. When to call what, so that all ranks do the same, is the cycle's business.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from torch_eplb.comm.communicator import Communicator
from torch_eplb.migration.exchange import Exchange
from torch_eplb.routing.tables import RoutingTables
from torch_eplb.values.events import CommittedRound, Move
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Plan
from torch_eplb.values.rounds import (
    EXPERT,
    LAYER,
    SOURCE_RANK,
    SOURCE_SLOT,
    TARGET_RANK,
    TARGET_SLOT,
    Round,
)

__all__ = ["Migration"]


class Migration:
    """The present placement and the rounds that are changing it.

    Args:
        placement: what the slots hold now.
        tables: the routing tables, which always match it.
        exchange: moves the bytes.
        comm: for the error that names a lost rank.
        on_commit: told what every committed round has changed.

    Attributes:
        experts: int32 ``[layers, ranks, slots]``, the committed placement. Same on all ranks.
        live: bool ``[layers, ranks, slots]``; False where a slot is drained and may be overwritten
            at any time. Same on all ranks.
        round: index of the round in flight or to come. Same on all ranks.
        repairing: the round in flight or to come fetches again what a failed round destroyed.
        version: rounds committed since wrapping.
        experts_moved: transfers committed since wrapping.
    """

    def __init__(
        self,
        placement: Placement,
        tables: RoutingTables,
        exchange: Exchange,
        comm: Communicator,
        on_commit: Callable[[CommittedRound], None] = lambda committed: None,
    ) -> None:
        self._num_experts = placement.num_experts
        self._tables = tables
        self._exchange = exchange
        self._comm = comm
        self._on_commit = on_commit
        self._placement: Placement | None = placement
        self._plan: Plan | None = None
        self.experts = placement.experts.copy()
        self.live = np.ones(self.experts.shape, dtype=bool)
        self.rounds: tuple[Round, ...] = ()
        self.round = 0
        self.repairing = False
        self.version = 0
        self.experts_moved = 0
        # Weakly: the groups are closed after the model is gone, and must not keep it.
        comm.round_in_flight = _round_in_flight(weakref.ref(self))

    @property
    def placement(self) -> Placement:
        """The committed placement."""
        if self._placement is None:
            self._placement = Placement(self.experts, self._num_experts, allow_duplicates=True)
        return self._placement

    @property
    def in_flight(self) -> bool:
        """Whether a round was posted and is not yet committed or abandoned."""
        return self._exchange.active

    @property
    def done(self) -> bool:
        """Whether all rounds are committed."""
        return self.round == len(self.rounds)

    @property
    def must_repair(self) -> bool:
        """Whether a round that fetches destroyed experts again is still to be committed."""
        return self.repairing and not self.done

    @property
    def replaced(self) -> bool:
        """Whether experts of the round in flight have been given other memory since."""
        return self._exchange.replaced

    def begin(self, plan: Plan, rounds: Sequence[Round]) -> None:
        """Take a plan on. Routes before weights: its split holds from now on where it can."""
        self._plan = plan
        self.rounds, self.round, self.repairing = tuple(rounds), 0, False
        if self._tables.choice_LEP is not None:  # else the tables hold no shares
            self._update_tables(None)

    def post_round(self) -> None:
        """Drain the round's direct targets and post its transfers.

        Raises:
            PeerLostError: a connection is gone.
            StagingTooSmall: experts have grown; nothing was changed.
        """
        transfers = self.rounds[self.round]
        self._exchange.require_room_for(transfers)
        self._update_tables(self._drain(transfers))
        try:
            self._exchange.post(self.round, transfers)
        except (RuntimeError, TimeoutError) as error:
            raise self._lost(error) from error

    def start_round(self) -> None:
        """Let the posted round run beside the forward, if there is one and it does not yet."""
        self._exchange.start()

    def finished(self) -> bool:
        """Whether this rank's part of the round is complete; see `verified`.

        Raises:
            PeerLostError: a transfer failed or the time limit is over.
        """
        try:
            return self._exchange.finished()
        except (RuntimeError, TimeoutError) as error:
            raise self._lost(error) from error

    def wait(self) -> None:
        """Block until `finished`; raises like it."""
        try:
            self._exchange.wait()
        except (RuntimeError, TimeoutError) as error:
            raise self._lost(error) from error

    def verified(self) -> bool:
        """Whether what this rank received in the round is what its peers sent."""
        return self._exchange.verified()

    def commit(self, post_next: bool = False) -> None:
        """Weights and routes of the round change now. Call when every rank has finished it.

        Args:
            post_next: `post_round` follows, if a round is left: routes change for both at once.
        """
        self._exchange.commit()
        transfers = self.rounds[self.round].transfers
        targets = _targets(transfers)
        before = self.experts[targets]
        self.experts[targets] = transfers[:, EXPERT]
        self.live[targets] = True
        self._placement = None
        self.version += 1
        if not self.repairing:
            self._on_commit(CommittedRound(self.version, _moves(transfers, before)))
        self.experts_moved += 0 if self.repairing else len(transfers)
        self.round += 1
        changed = transfers[:, LAYER]
        if post_next and not self.done:
            changed = np.concatenate([changed, self._drain(self.rounds[self.round])])
        self._update_tables(changed)

    def abandon(self) -> None:
        """Commit nothing of the round in flight, and no later one.

        Drained slots have been written to. If there are any, one more round is left to do, which
        fetches their experts again from live replicas.
        """
        self._exchange.drop()
        rows = []
        for layer, rank, slot in np.argwhere(~self.live).tolist():
            expert = self.experts[layer, rank, slot]
            sources = np.argwhere(self.live[layer] & (self.experts[layer] == expert))
            rows.append([layer, expert, *sources[0].tolist(), rank, slot])
        self.rounds = self.rounds[: self.round]
        self.repairing = bool(rows)
        if rows:
            repair = Round(np.array(rows, dtype=np.int32), np.ones(len(rows), dtype=bool))
            self.rounds = (*self.rounds, repair)

    def give_up(self) -> None:
        """Drop the round in flight and start no other: drained slots stay out of use.

        Their experts have other live replicas.
        """
        self._exchange.drop()
        self.rounds = self.rounds[: self.round]
        self.repairing = False

    def _drain(self, transfers: Round) -> NDArray[np.int32]:
        """Take the direct targets of a round out of use; layers whose tables have to change now."""
        drained = transfers.transfers[transfers.direct]
        targets = _targets(drained)
        layers = drained[self.live[targets], LAYER]
        self.live[targets] = False
        return layers

    def _update_tables(self, layers: NDArray[np.int32] | None) -> None:
        """Tell the routing tables; None is all layers."""
        chosen = None if layers is None else np.unique(layers).tolist()
        if chosen == []:
            return
        split = None
        if self._plan is not None and self._tables.choice_LEP is not None:
            # Shares of slots that hold what the plan wants there; other experts share evenly until
            # their round is committed.
            wanted = self._plan.placement.experts == self.experts
            split = np.where(wanted, self._plan.split, 0.0)
        self._tables.update(self.placement, split, self.live, chosen)

    def _lost(self, error: BaseException) -> Exception:
        return self._comm.peer_lost("a transfer of experts", error, self.round)


def _moves(transfers: NDArray[np.int32], before: NDArray[np.int32]) -> tuple[Move, ...]:
    """A round's transfers, into slots that held ``before``."""
    return tuple(
        Move(
            row[LAYER],
            row[TARGET_RANK],
            row[TARGET_SLOT],
            old,
            row[EXPERT],
            row[SOURCE_RANK],
            row[SOURCE_SLOT],
        )
        for row, old in zip(transfers.tolist(), before.tolist(), strict=True)
    )


def _round_in_flight(migration: weakref.ref[Migration]) -> Callable[[], int | None]:
    def ask() -> int | None:
        present = migration()
        return present.round if present is not None and present.in_flight else None

    return ask


def _targets(transfers: NDArray[np.int32]) -> tuple[NDArray[np.int32], ...]:
    """Index of the slots that transfers go to, into ``[layers, ranks, slots]``."""
    return transfers[:, LAYER], transfers[:, TARGET_RANK], transfers[:, TARGET_SLOT]
