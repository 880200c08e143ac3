"""Programs in the place of a planner process, which answer what they are told to."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch_eplb

STAND_IN = f"""
import dataclasses, os, socket, sys, time
sys.path.insert(0, {str(Path(torch_eplb.__file__).parent.parent)!r})
import numpy as np
from torch_eplb.planner.frames import *
from torch_eplb.planner.messages import *
from torch_eplb.planner.worker import answer
from torch_eplb.values.rounds import *
sock = socket.socket(fileno=int(sys.argv[1]))
reader = FrameReader(sock, Kind)
def send(frame): sock.sendall(b"".join(encode(frame)))
def receive():
    settings = PlannerSettings.from_frame(reader.read())
    return settings, Request.from_frame(reader.read())
def words_of(part):
    part = np.asarray(part).reshape(-1)
    return part.view(np.int64) if part.dtype == float else part.astype(np.int64)
def reply(change=lambda words: words, request_id=1, **parts):
    frame = answer(*receive()).to_frame()
    names = ("magic", "plan_for", "plan_seconds", "placement", "split", "predicted_par", "schedule")
    honest = np.split(frame.arrays["plan"], [1, 2, 3, 19, 35, 37])  # 2 layers of 4 x 2 slots
    words = [words_of(parts.get(*pair)) for pair in zip(names, honest)]
    plan = change(np.concatenate(words))
    arrays = {{}} if plan is None else {{"plan": plan}}
    send(Frame(frame.kind, {{"request_id": request_id}}, arrays))
def reply_with_rounds(change):
    honest = answer(*receive())
    start, target, rounds = honest.schedule.start, honest.schedule.target, honest.schedule.rounds
    send(dataclasses.replace(honest, schedule=Schedule(start, target, change(rounds))).to_frame())
def reply_for_other(**settings):
    ours, request = receive()
    send(answer(dataclasses.replace(ours, **settings), request).to_frame())
def in_one(rounds):
    transfers = np.concatenate([r.transfers for r in rounds])
    return (Round(transfers, np.zeros(len(transfers), bool)),)
ready = lambda: send(Frame(Kind.READY, {{}}))
"""
STAY = "\ntime.sleep(1000)"


def stand_in(source: str) -> Callable[[int], list[str]]:
    """The command of a program that runs ``source`` after the above, and then stays."""
    return lambda fd: [sys.executable, "-c", STAND_IN + textwrap.dedent(source) + STAY, str(fd)]
