"""A plan as one array of integers, the form in which rank 0 gives it to all ranks.

Floats travel as their bits, so that ranks cannot disagree because of rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from torch_eplb.planner.messages import PlanReply
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Plan
from torch_eplb.values.rounds import Schedule

__all__ = ["decode_plan", "encode_plan"]

_MAGIC = 0x65706C6270  # "eplbp"
_HEAD = 3


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


def decode_plan(words: NDArray[np.int64], current: Placement) -> tuple[PlanReply, Iterator[object]]:
    """What `encode_plan` wrote, checked against the present placement.

    Returns:
        The reply, and what is left to check of it, which takes a tenth of a second for a large
        schedule: the iterator checks one round with each item and raises ValueError.

    Raises:
        ValueError: the array is no plan for this placement.
    """
    shape = current.experts.shape
    size = current.experts.size
    if len(words) < _HEAD + 2 * size + shape[0] or words[0] != _MAGIC:
        raise ValueError(f"an array of {len(words)} integers is no plan for {current!r}")
    parts = np.split(words, [_HEAD, _HEAD + size, _HEAD + 2 * size, _HEAD + 2 * size + shape[0]])
    head, experts, split, par, rounds = (np.ascontiguousarray(part) for part in parts)
    target = Placement(experts.reshape(shape), current.num_experts)
    plan = Plan(target, split.view(np.float64).reshape(shape), par.view(np.float64))
    schedule = Schedule.from_array(rounds, current, target, check=False)
    reply = PlanReply(
        request_id=int(head[1]),
        plan=plan,
        schedule=schedule,
        plan_seconds=float(head[2:].view(np.float64)[0]),
    )
    return reply, schedule.replay()
