"""A plan as one array of integers: how it travels from the planner to rank 0, and on to all ranks.

It is written once, where it was made. Every rank, rank 0 included, reads and checks what arrives:
placement and shares at once (`decode_plan`), the rounds some at a time (`ReceivedPlan.unchecked`).
Floats travel as their bits, so that ranks cannot disagree because of rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torch_eplb.planner.frames import Frame, Kind
from torch_eplb.policies.registry import check_shares
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Plan
from torch_eplb.values.rounds import Bounds, Schedule, check_rounds

__all__ = ["PlanReply", "ReceivedPlan", "decode_plan", "encode_plan"]

_MAGIC = 0x65706C6270  # "eplbp"
_HEAD = 3


@dataclass(frozen=True, eq=False)
class PlanReply:
    """A planner's answer.

    Attributes:
        request_id: the request that it answers.
        plan: placement, split and predicted PAR.
        schedule: the rounds that lead from the request's placement to the plan's.
        plan_seconds: wall time that planning took.
    """

    request_id: int
    plan: Plan
    schedule: Schedule
    plan_seconds: float

    def to_frame(self) -> Frame:
        return Frame(Kind.REPLY, {"request_id": self.request_id}, {"plan": encode_plan(self)})


@dataclass(frozen=True, eq=False)
class ReceivedPlan(PlanReply):
    """A plan as it arrived. All of it is checked but what its rounds do.

    Attributes:
        words: int64, what it was read from, to be handed on as it is. Split and predicted PAR are
            views of it.
        unchecked: the check of the rounds, which takes a tenth of a second for a large schedule: it
            checks one round with each item, and raises ValueError. To be run through once, before
            the plan is begun.
    """

    words: NDArray[np.int64]
    unchecked: Iterator[int]


def encode_plan(reply: PlanReply) -> NDArray[np.int64]:
    """``[magic, request id, bits of plan_seconds, target, split, predicted PAR, rounds]``."""
    plan, schedule = reply.plan, reply.schedule
    head = np.array([_MAGIC, reply.request_id, 0], dtype=np.int64)
    head[2:].view(np.float64)[0] = reply.plan_seconds
    return np.concatenate(
        [
            head,
            schedule.target.experts.reshape(-1).astype(np.int64),
            np.ascontiguousarray(plan.split, dtype=np.float64).reshape(-1).view(np.int64),
            np.ascontiguousarray(plan.predicted_par, dtype=np.float64).view(np.int64),
            schedule.to_array(),
        ]
    )


def decode_plan(words: NDArray[np.int64], current: Placement, bounds: Bounds) -> ReceivedPlan:
    """What `encode_plan` wrote, checked against the present placement, but for the rounds.

    Args:
        words: int64, one dimension.
        current: the placement that is live now.
        bounds: what a round may take.

    Raises:
        ValueError: the array is no plan for this placement.
    """
    shape = current.experts.shape
    size = current.experts.size
    if len(words) < _HEAD + 2 * size + shape[0] or words[0] != _MAGIC:
        raise ValueError(f"an array of {len(words)} integers is no plan for {current!r}")
    parts = np.split(words, [_HEAD, _HEAD + size, _HEAD + 2 * size, _HEAD + 2 * size + shape[0]])
    head, experts, split, par, rounds = (np.ascontiguousarray(part) for part in parts)
    seconds = float(head[2:].view(np.float64)[0])
    if not 0 <= seconds < math.inf:
        raise ValueError(f"plan_seconds {seconds} is not a duration")
    target = Placement(experts.reshape(shape), current.num_experts)
    plan = Plan(target, split.view(np.float64).reshape(shape), par.view(np.float64))
    check_shares(plan)
    schedule = Schedule.from_array(rounds, current, target, check=False)
    return ReceivedPlan(
        request_id=int(head[1]),
        plan=plan,
        schedule=schedule,
        plan_seconds=seconds,
        words=words,
        unchecked=check_rounds(schedule, bounds),
    )
