"""The planner as the serving process sees it: ask, look now and then, never wait.

    planner = Planner(settings)                 # starts a child interpreter, does not wait for it
    planner.submit(7, load, placement)
    while (answer := planner.poll()) is None:   # a few microseconds; once per step
        ...serve...
    match answer:
        ReceivedPlan(words=words): ...          # for all ranks; they look through its rounds
        PlannerFault(cause=cause): ...          # keep the present placement; the planner restarts

What can go wrong with planning ends as a `PlannerFault` out of `poll`, never as an exception and
never as a wait: a planner that was killed, stopped, ran out of memory, raised or answered garbage.
Where the rounds of a plan turn out to be garbage, `refuse` says so.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.planner.child import ProcessHost
from torch_eplb.planner.frames import DTYPES
from torch_eplb.planner.hosts import Host, HostFailed, ThreadHost
from torch_eplb.planner.messages import (
    PlannerSettings,
    PlanReply,
    ReceivedPlan,
    Refusal,
    Request,
    one_line,
)
from torch_eplb.planner.references import to_reference
from torch_eplb.values.placement import Placement

__all__ = ["PlanReply", "Planner", "PlannerFault", "PlannerSettings", "ReceivedPlan"]

BACKOFF_FIRST_SECONDS = 0.5
"""Pause before the first restart; each further one in a row waits twice as long."""

BACKOFF_MOST_SECONDS = 60.0
"""The longest pause between restarts."""


@dataclass(frozen=True)
class PlannerFault:
    """Why there is no plan.

    Attributes:
        request_id: the request that will get no other answer; None if none was affected.
        cause: one line that names the cause.
    """

    request_id: int | None
    cause: str


class Planner:
    """Plans in the background; one request at a time.

    Policies that have a name, and callables that can be imported from a module other than
    ``__main__`` (see `references`), run in a child interpreter. Other callables (lambdas, closures,
    what is defined in a script or notebook) run in a daemon thread of this process and share its
    GIL; the interface is the same.

    Every request gets exactly one answer from `poll`, unless a newer one supersedes it: only the
    latest request counts, an older one's answer is dropped. After a fault that ended the planner it
    is restarted with exponential back-off (`BACKOFF_FIRST_SECONDS`, doubled up to
    `BACKOFF_MOST_SECONDS`; a plan that nobody refuses resets it). A request submitted meanwhile is
    kept and sent after the restart; should that fail, the fault answers it.

    Not safe for use by several threads at once. In a forked process it answers every request with a
    fault and leaves the parent's planner alone. Ends with `close`, with the garbage collection of
    this object, and with this process, however that ends.

    Args:
        settings: what the planner must know; fixed for its life.
        timeout: seconds without a sign of life (a byte sent or received) after which a planner
            that has something to do is killed and restarted.

    Raises:
        ValueError: ``timeout`` is not positive.
    """

    def __init__(
        self,
        settings: PlannerSettings,
        *,
        timeout: float = 60.0,
        _command: Callable[[int], list[str]] | None = None,
    ) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout must be more than 0 seconds, got {timeout}")
        self._settings = settings
        self._timeout = float(timeout)
        self._command = _command
        self._owner = os.getpid()
        self._closed = False
        self._host: Host | None = None
        self._running: Request | None = None
        self._waiting: Request | None = None
        self._failures = 0
        self._restarts = 0
        self._delivered: tuple[int, int, int] | None = None
        """The last plan's request, and restarts and failures in a row before it."""
        self._restart_at = 0.0
        self._fault: PlannerFault | None = None
        self._left: list[Host] = []
        """Every host that may still exist: the present one, and killed ones not yet reaped."""
        self._finalizer = weakref.finalize(self, _close_all, self._left, self._owner)
        _planners.add(self)
        self._start()

    @property
    def restarts(self) -> int:
        """How often planning was started again after a fault."""
        return self._restarts

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is none, or if planning runs in a thread."""
        if self._host is None or self._closed or os.getpid() != self._owner:
            return None
        return self._host.pid

    def submit(self, request_id: int, load: NDArray[Any], placement: Placement) -> None:
        """Ask for a plan; replaces a request that has no answer yet. Never blocks.

        Args:
            request_id: comes back with the answer.
            load: ``[samples, layers, experts]``, tokens routed to each logical expert; copied.
            placement: the placement that is live now.

        Raises:
            TypeError, ValueError: the load is not finite, not of the placement's shape or not
                numeric, or the placement does not fit the settings.
            RuntimeError: the planner is closed.
        """
        if self._closed:
            raise RuntimeError("the planner is closed; make a new one to go on planning")
        array = np.array(load)  # a copy: the caller counts on while this one travels
        if array.dtype.kind in "iuf" and array.dtype.newbyteorder("<").str not in DTYPES:
            array = array.astype(np.float64)
        request = Request(int(request_id), array, placement)
        fits = (self._settings.topology.num_ranks, len(self._settings.expert_bytes))
        if (placement.num_ranks, placement.num_layers) != fits:
            raise ValueError(
                f"placement has {placement.num_ranks} ranks and {placement.num_layers} layers, "
                f"the planner's settings have {fits[0]} and {fits[1]}"
            )
        self._waiting = request
        self._hand_over()

    def poll(self) -> ReceivedPlan | PlannerFault | None:
        """The next answer, if there is one. Never blocks, never raises; call it once per step.

        Also keeps things going: it sends what is left of a request, notices time limits, and
        restarts the planner when its pause is over (which takes a few milliseconds).
        """
        if self._closed:
            return None
        if os.getpid() != self._owner:
            return self._poll_in_fork()
        if self._fault is not None:
            fault, self._fault = self._fault, None
            return fault
        host = self._host
        if host is None:
            self._reap()
            if time.monotonic() >= self._restart_at:
                self._restarts += 1
                self._start()
            return None
        try:
            answered = host.poll()
            if answered is None:
                if host.busy and time.monotonic() - host.last_sign > self._timeout:
                    raise HostFailed(host.overdue(self._timeout))
                return None
        except HostFailed as failure:
            return self._fail(str(failure))
        except Exception as error:  # a border: planning must not raise in the server
            return self._fail(one_line(f"planning failed: {type(error).__name__}: {error}"))
        return self._deliver(answered)

    def refuse(self, request_id: int, cause: str) -> None:
        """Say that the last plan is garbage, as a rank found out that looked through its rounds.

        It is a fault like those that `poll` tells: the planner that made the plan is ended and
        restarted after a pause, which grows as if the plan had not come. Nothing happens if that
        planner is gone already, or if the plan did not answer ``request_id``. Never blocks.
        """
        delivered, self._delivered = self._delivered, None
        if delivered is None or self._closed or os.getpid() != self._owner:
            return
        answered, restarts, failures = delivered
        if answered != request_id or restarts != self._restarts or self._host is None:
            return
        self._failures += failures
        fault = self._fail(one_line(f"answer refused: {cause}"))
        if fault.request_id is not None:  # a newer request was on its way already
            self._fault = fault

    def close(self) -> None:
        """Stop the planner. Takes a moment, 2 s at most; may be called again."""
        self._closed = True
        self._running = self._waiting = None
        self._finalizer()

    def _start(self) -> None:
        try:
            self._host = self._new_host()
        except HostFailed as failure:
            self._fault = self._fail(str(failure))
            return
        self._left.append(self._host)
        self._hand_over()

    def _new_host(self) -> Host:
        if to_reference(self._settings.policy) is not None:
            return ProcessHost(self._settings, self._command)
        return ThreadHost(self._settings)

    def _hand_over(self) -> None:
        """Give the waiting request to the host, if that has nothing else to answer."""
        if self._host is None or self._running is not None or self._waiting is None:
            return
        if os.getpid() != self._owner:
            return
        self._running, self._waiting = self._waiting, None
        try:
            self._host.start(self._running)
        except HostFailed as failure:
            self._fault = self._fail(str(failure))

    def _deliver(self, answered: ReceivedPlan | Refusal) -> ReceivedPlan | PlannerFault | None:
        superseded = self._waiting is not None
        self._running = None
        if isinstance(answered, ReceivedPlan):
            self._delivered = (answered.request_id, self._restarts, self._failures)
            self._failures = 0
            self._reap()
        self._hand_over()
        if superseded:
            return None
        if isinstance(answered, Refusal):
            return PlannerFault(answered.request_id, answered.cause)
        return answered

    def _fail(self, cause: str) -> PlannerFault:
        """Drop the host, plan its restart, and answer the request that it takes with it."""
        if self._host is not None:
            self._host.abandon()
            self._host = None
        lost, self._running = self._running, None
        if lost is not None and self._waiting is not None:
            lost = None  # superseded; the newer one is kept for the next start
        elif lost is None and self._waiting is not None:
            lost, self._waiting = self._waiting, None
        self._restart_at = time.monotonic() + pause_before_restart(self._failures)
        self._failures += 1
        return PlannerFault(None if lost is None else lost.request_id, cause)

    def _reap(self) -> None:
        present = self._host
        self._left[:] = [host for host in self._left if host is present or not host.gone(0.0)]

    def _poll_in_fork(self) -> PlannerFault | None:
        lost, self._waiting = self._waiting, None
        if lost is None:
            return None
        return PlannerFault(
            lost.request_id,
            f"the planner belongs to process {self._owner}; this one was forked from it",
        )


def pause_before_restart(failures: int) -> float:
    """Seconds to wait after ``failures`` faults in a row before the present one.

    >>> [pause_before_restart(n) for n in (0, 1, 2, 6, 7, 1000)]
    [0.5, 1.0, 2.0, 32.0, 60.0, 60.0]
    """
    return min(BACKOFF_FIRST_SECONDS * 2.0 ** min(failures, 32), BACKOFF_MOST_SECONDS)


def _close_all(hosts: list[Host], owner: int) -> None:
    # Also called by the garbage collection or the exit of a forked process, which owns nothing.
    if os.getpid() == owner:
        while hosts:
            hosts.pop().close()


def _disown_all() -> None:
    # A forked process must not hold the channel open: its end tells the child that we are gone.
    for planner in list(_planners):
        for host in planner._left:
            host.disown()


_planners: weakref.WeakSet[Planner] = weakref.WeakSet()
os.register_at_fork(after_in_child=_disown_all)
