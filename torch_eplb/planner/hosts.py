"""Where planning runs: what a host must offer, and the one that is a thread of this process.

A host takes one request at a time and never blocks its caller. It knows nothing of retries and time
limits; those are `process.Planner`'s. The host that is a child interpreter is `child.ProcessHost`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from torch_eplb.planner.messages import (
    PlannerSettings,
    ReceivedPlan,
    Refusal,
    Request,
    check_reply,
    one_line,
)
from torch_eplb.planner.worker import answer

__all__ = ["TERMINATE_SECONDS", "Host", "HostFailed", "Task", "ThreadHost"]

TERMINATE_SECONDS = 0.5
"""How long `close` waits for an orderly end."""


class HostFailed(Exception):
    """The host cannot go on and must be replaced; the text is the cause, on one line."""


class Host(Protocol):
    """What `process.Planner` needs of a place that plans."""

    last_sign: float
    """`time.monotonic` of the last sign of life."""

    @property
    def pid(self) -> int | None:
        """The process that plans, if it is one of its own."""

    @property
    def busy(self) -> bool:
        """Whether a sign of life is due: it starts up or has a request."""

    def start(self, request: Request) -> None:
        """Take a request; only while there is none."""

    def poll(self) -> ReceivedPlan | Refusal | None:
        """Go on as far as is possible without waiting; raises `HostFailed`."""

    def overdue(self, limit: float) -> str:
        """Why nothing came within ``limit`` seconds, in words."""

    def abandon(self) -> None:
        """Stop at once, without waiting."""

    def gone(self, patience: float) -> bool:
        """After `abandon`: whether nothing is left, having waited up to ``patience`` seconds."""

    def close(self) -> None:
        """Stop in good order, within a short bounded time."""

    def disown(self) -> None:
        """In a forked process: let go of what belongs to the parent."""


class Task:
    """One call in a daemon thread of this process.

    Raises:
        HostFailed: there is no thread to be had.
    """

    def __init__(self, call: Callable[[], ReceivedPlan | Refusal]) -> None:
        self._outcome: list[ReceivedPlan | Refusal | Exception] = []
        outcome = self._outcome  # the thread holds this list only, and nothing that owns the task

        def work() -> None:
            try:
                outcome.append(call())
            except Exception as error:  # a border: whatever it is, the caller of `result` gets it
                outcome.append(error)

        self._thread = threading.Thread(target=work, name="torch_eplb-planner", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise HostFailed(one_line(f"planner thread could not be started: {error}")) from error

    def result(self) -> ReceivedPlan | Refusal | None:
        """What the call returned, or None while it runs; raises what it raised."""
        if not self._outcome:
            return None
        if isinstance(self._outcome[0], Exception):
            raise self._outcome[0]
        return self._outcome[0]

    def join(self, patience: float) -> None:
        """Wait for the end of the call, for up to ``patience`` seconds."""
        self._thread.join(patience)


class ThreadHost:
    """A daemon thread of this process per request, for policies that no other process can import.

    It shares the GIL with the server, and a policy that never returns cannot be stopped, only
    abandoned.
    """

    def __init__(self, settings: PlannerSettings) -> None:
        self._settings = settings
        self._task: Task | None = None
        self.last_sign = time.monotonic()

    @property
    def pid(self) -> int | None:
        return None

    @property
    def busy(self) -> bool:
        return self._task is not None

    def start(self, request: Request) -> None:
        settings = self._settings
        self.last_sign = time.monotonic()
        # By the way that a child's answer takes: all ranks read the same words.
        self._task = Task(
            lambda: check_reply(answer(settings, request).to_frame(), request, settings)
        )

    def poll(self) -> ReceivedPlan | Refusal | None:
        answered = None if self._task is None else self._task.result()
        if answered is not None:
            self._task = None
        return answered

    def overdue(self, limit: float) -> str:
        return f"policy gave no answer within {limit:g} s"

    def abandon(self) -> None:
        pass  # a thread cannot be stopped; its answer will find nobody

    def gone(self, patience: float) -> bool:
        return True  # what an abandoned thread still holds is not ours to wait for

    def close(self) -> None:
        if self._task is not None:
            self._task.join(TERMINATE_SECONDS)

    def disown(self) -> None:
        pass
