"""The planner process: the main function of the child interpreter, and the planning itself.

The child knows nothing but its end of the socket pair. It answers one request after the other,
lives on when a policy raises, and ends when the channel or its parent does, even in the middle of
a computation: it holds no state that a new one could not be given.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import threading
import time

import numpy as np

from torch_eplb.planner.frames import Frame, FrameReader, FrameWriter, Kind
from torch_eplb.planner.messages import (
    PlannerSettings,
    PlanReply,
    Refusal,
    Request,
    one_line,
)
from torch_eplb.policies.registry import PolicyError, make_policy
from torch_eplb.schedule.schedule import make_schedule
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Plan

__all__ = ["answer", "main"]

NICENESS = 10
"""Added to the child's niceness: the server's threads go first."""

OOM_SCORE_ADJ = 500
"""When memory runs out, the kernel should take the planner before the server."""

PARENT_CHECK_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(argv: list[str]) -> None:
    """Serve until the channel closes. ``argv``: [descriptor, parent's pid, "1" if its main thread].

    Started by `child.ProcessHost`; nothing else should call it.
    """
    descriptor, parent = int(argv[0]), int(argv[1])
    _settle(parent, die_with_thread=argv[2] == "1")
    os.set_inheritable(descriptor, False)  # what a policy starts shall not hold the channel
    sock = socket.socket(fileno=descriptor)
    threading.Thread(target=_watch, args=(sock, parent), daemon=True).start()
    try:
        _serve(sock)
    except EOFError:
        pass  # the parent closed the channel: the ordinary end
    finally:
        sys.stderr.flush()
    os._exit(0)  # no exit handlers of policies' libraries: nothing may delay the end


def answer(settings: PlannerSettings, request: Request) -> PlanReply | Refusal:
    """Plan and schedule; whatever goes wrong becomes a `Refusal` that names it."""
    begin = time.perf_counter()
    stage = "policy raised"
    try:
        policy = make_policy(settings.policy, **settings.policy_options)
        plan = policy(request.load, request.placement, settings.topology)  # checks its answer
        stage = "no schedule:"
        schedule = make_schedule(
            request.placement,
            plan.placement,
            expert_bytes=settings.expert_bytes,
            staging_bytes=settings.staging_bytes,
            direct=settings.direct,
            layers_per_round=settings.layers_per_round,
            send_bytes_per_round=settings.send_bytes_per_round,
            ranks_per_node=settings.topology.ranks_per_node,
        )
        plan = _in_slots_of(schedule.target, plan)
    except PolicyError as error:
        return Refusal(request.request_id, one_line(f"answer refused: {error}"))
    except BaseException as error:  # SystemExit, too: a policy's whim must not end the planner
        return Refusal(request.request_id, one_line(f"{stage} {_named(error)}"))
    return PlanReply(request.request_id, plan, schedule, time.perf_counter() - begin)


def _in_slots_of(target: Placement, plan: Plan) -> Plan:
    """The plan with ``target``'s order of slots within each rank; both hold the same experts.

    Which slot an arriving expert takes is the schedule's choice, so the split follows it.
    """
    ours = np.argsort(plan.placement.experts, axis=2, kind="stable")
    theirs = np.argsort(target.experts, axis=2, kind="stable")
    split = np.empty_like(plan.split)
    np.put_along_axis(split, theirs, np.take_along_axis(plan.split, ours, axis=2), axis=2)
    return Plan(target, split, plan.predicted_par)


def _serve(sock: socket.socket) -> None:
    reader = FrameReader(sock, [Kind.SETTINGS, Kind.REQUEST])
    writer = FrameWriter(sock)
    writer.queue(Frame(Kind.READY, {}))
    writer.write()
    settings: PlannerSettings | None = None
    trouble = "policy could not be imported: no settings arrived"
    while True:
        frame = reader.read()
        if frame is None:
            raise RuntimeError("the planner's socket must be blocking")
        if frame.kind is Kind.SETTINGS:
            try:
                settings = PlannerSettings.from_frame(frame)
            except BaseException as error:  # importing runs a user's module: anything may come
                trouble = one_line(f"policy could not be imported: {_named(error)}")
            continue
        request = Request.from_frame(frame)
        refused = Refusal(request.request_id, trouble)
        writer.queue((answer(settings, request) if settings else refused).to_frame())
        writer.write()


def _settle(parent: int, *, die_with_thread: bool) -> None:
    """Take the place of a background process: behind the server, and gone with it."""
    # Its own process group: a Ctrl-C or a group's SIGTERM is the server's to handle. Not its own
    # session: with autogroup scheduling Linux would weigh that against the server as an equal.
    with contextlib.suppress(OSError):  # it leads a session: better still
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # a mask is inherited from the parent's thread
    with contextlib.suppress(OSError):  # a sandbox may forbid it; it is not essential
        os.nice(NICENESS)
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(OOM_SCORE_ADJ))
    if die_with_thread:
        # Fires when the *thread* that started us ends, so only for one that lives as long as its
        # process. It reaches us even while a policy holds the GIL or we are stopped.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(0)


def _watch(sock: socket.socket, parent: int) -> None:
    """End the process when the other end closes or the parent is another."""
    poller = select.poll()
    poller.register(sock, 0)  # hang-up and errors are always reported
    while not poller.poll(PARENT_CHECK_SECONDS * 1000) and os.getppid() == parent:
        pass
    os._exit(0)


def _named(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
