"""Who is lost: waits that end, and errors that name the dead.

When a rank dies, the backend tells those that were exchanging something with it, at once; in a ring
the others would wait until their time limit. So everybody waits in slices, and looks up after each
whether a process of this machine has ended, or whether another rank has noticed a loss, which it
says in the store that all ranks share. What is noticed is told once: an *incident* has a number,
and a rank that has raised for it does not raise for it again.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import time
import weakref
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from torch_eplb.comm.processes import ProcessIdentity
from torch_eplb.comm.store import BoundedStore, StoreGone
from torch_eplb.values.errors import PeerLostError

__all__ = ["LossDetector"]

SLICE_SECONDS = 0.1
"""How long a wait goes on before it looks up."""

PATIENCE_SECONDS = 2.0
"""How long ranks are given to say that they are alive, where no death is known."""

_GRACE_SECONDS = 0.3
"""How long an operation may still take to finish without a peer that has ended."""

_WORK_ERRORS = (RuntimeError, ValueError, dist.DistBackendError)


# A process that ends in good order has left; one that was killed is lost.
_open: weakref.WeakSet[LossDetector] = weakref.WeakSet()


@atexit.register
def _leave_all() -> None:
    for detector in list(_open):
        detector.leave()


class LossDetector:
    """Waits for operations of one group, and finds out who is lost when one fails.

    Args:
        store: shared by the group's ranks and by nobody else.
        rank: this rank in the group.
        num_ranks: ranks of the group.
        timeout: seconds that any operation may take.

    Attributes:
        failure: the last error that was made here, or None.
    """

    def __init__(self, store: BoundedStore, rank: int, num_ranks: int, timeout: float) -> None:
        self._store = store
        self._rank = rank
        self._num_ranks = num_ranks
        self._timeout = timeout
        self._beside: dict[int, ProcessIdentity] = {}
        self._told = 0  # the latest incident for which this rank has raised
        self.failure: PeerLostError | None = None
        _open.add(self)

    def watch(self, identities: Sequence[ProcessIdentity]) -> None:
        """Look after the processes of this machine from now on.

        Args:
            identities: of all ranks, in their order.
        """
        own = identities[self._rank]
        self._beside = {
            rank: identity
            for rank, identity in enumerate(identities)
            if rank != self._rank and identity.is_beside(own)
        }

    def leave(self) -> None:
        """Say that this rank goes on purpose."""
        with contextlib.suppress(StoreGone):  # whoever holds the store has left before
            self._store.set(f"left/{self._rank}", "")

    def wait(self, work: dist.Work | None, what: str, round_index: int | None = None) -> None:
        """Wait for one operation of the CPU's backend, at most for the time limit.

        Raises:
            PeerLostError: a peer died, or the time is over; ``what`` names the operation.
        """
        if work is None:  # the fake backend, and collectives that completed at once
            return
        deadline = time.monotonic() + self._timeout
        while True:
            left = deadline - time.monotonic()
            try:
                work.wait(timedelta(seconds=max(min(SLICE_SECONDS, left), 0.001)))
                return
            except _WORK_ERRORS as error:
                if not work.is_completed():
                    if left > SLICE_SECONDS and not self._is_hopeless(work):
                        continue
                    raise self.lost(what, error, round_index) from error
            try:
                work.wait()  # it finished just now, or it has failed
                return
            except _WORK_ERRORS as error:
                raise self.lost(what, error, round_index) from error

    def _is_hopeless(self, work: dist.Work) -> bool:
        """Whether an operation that is late will never finish."""
        with contextlib.suppress(StoreGone):
            if self._store.add("incidents", 0) > self._told:
                return True
        if not self._gone():
            return False
        # The operation may need nothing more of a process that has ended.
        deadline = time.monotonic() + _GRACE_SECONDS
        while not work.is_completed():
            if time.monotonic() > deadline:
                return True
            time.sleep(0.01)
        return False

    def lost(
        self, what: str, error: BaseException, round_index: int | None = None
    ) -> PeerLostError:
        """The error for a failed operation, with the ranks that are lost, as far as is known."""
        ranks = self._find()
        who = "a rank"
        if ranks:
            who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
        where = f" in round {round_index}" if round_index is not None else ""
        self.failure = PeerLostError(
            f"{who} died, or did not answer within {self._timeout:g} s during {what}{where}: "
            f"{error}",
            ranks=tuple(ranks),
            round_index=round_index,
        )
        return self.failure

    def _find(self) -> list[int]:
        """The ranks that are lost: the dead, or where none is known to be, those that are silent.

        A rank that lives and computes hears of the incident when it waits next; where somebody is
        known to be dead it is not waited for.
        """
        known = list(self.failure.ranks) if self.failure is not None else []
        deadline = time.monotonic() + min(PATIENCE_SECONDS, self._timeout)
        before = self._told
        try:
            if known and not self._is_news(known):
                return known  # patience is had once
            if self._store.add("incidents", 0) <= before:
                self._store.add("incidents", 1)
            self._told = self._store.add("incidents", 0)
            while True:
                gone, silent = self._dead_and_silent(before, known)
                if gone or not silent:
                    return gone
                if time.monotonic() > deadline:
                    return silent
                time.sleep(0.02)
        except StoreGone:
            # The store lives in rank 0's process, or in the launcher.
            return self._gone() or known or ([0] if self._rank != 0 else [])

    def _is_news(self, known: list[int]) -> bool:
        """Whether, after the loss of ``known``, there is another one."""
        if self._store.add("incidents", 0) > self._told:
            return True
        return not set(self._gone()) <= set(known)

    def _dead_and_silent(self, before: int, known: list[int]) -> tuple[list[int], list[int]]:
        """Ranks that some rank knows to be dead, and those of which nothing is known.

        Args:
            before: incidents that are over.
            known: ranks that were lost in them, and are unless they speak up now.
        """
        gone = {*self._gone(), *known}
        self._store.set(f"alive/{self._rank}", json.dumps([self._told, sorted(gone)]))
        alive = {self._rank}
        for rank in range(self._num_ranks):
            said = self._store.get(f"alive/{rank}")
            incident, told = json.loads(said) if said else (0, [])
            gone.update(told)
            if incident > before:
                alive.add(rank)  # it has noticed, too, even if it has ended since
        gone -= alive
        return sorted(gone), sorted(set(range(self._num_ranks)) - gone - alive)

    def _gone(self) -> list[int]:
        """Ranks of this machine whose process has ended without having said so."""
        return [
            rank
            for rank, identity in self._beside.items()
            if identity.is_gone() and not self._has_left(rank)
        ]

    def _has_left(self, rank: int) -> bool:
        try:
            return self._store.has(f"left/{rank}")
        except StoreGone:
            return False
