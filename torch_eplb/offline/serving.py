"""When a server plans and moves, along a trace: its rebalance cycle, counted in steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from torch_eplb.planner.messages import PlanReply
from torch_eplb.policies.drift import Drift, cut_short, look_steps, read_after
from torch_eplb.policies.split import par
from torch_eplb.values.placement import Placement
from torch_eplb.values.rounds import LAYER

__all__ = ["Cycle", "serve"]

_STEPS_PER_ROUND = 2
"""A round is posted at one boundary, agreed on at the next and committed at the one after it."""


@dataclass(frozen=True, kw_only=True)
class Cycle:
    """The arguments of `torch_eplb.wrap` that say when plans are made, with the same defaults.

    Raises:
        ValueError: a value is out of range.
    """

    collect_interval: int = 600
    """Steps over which load is collected, at most."""

    plan_interval: int = 50
    """Steps after collection before which a plan is not applied, unless it is early."""

    replan_above: float | None = 1.05
    """Plan early where PAR is so many times what the last plan reached; None: never."""

    plan_steps: int = 10
    """Steps that pass while a plan is made. A trace does not know how long a step takes."""

    def __post_init__(self) -> None:
        for name, least in (("collect_interval", 1), ("plan_interval", 0), ("plan_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.replan_above is not None and not self.replan_above >= 1.0:
            raise ValueError(f"replan_above must be at least 1, got {self.replan_above}")


class _Run(Protocol):
    """What `serve` lets happen; see `replay`."""

    num_steps: int
    placement: Placement
    split: NDArray[np.float64]

    def ask(self, step: int, first: int) -> PlanReply | None: ...
    def adopt(self, step: int, reply: PlanReply) -> None: ...
    def take(self, experts: NDArray[np.int32], split: NDArray[np.float64]) -> None: ...
    def judge(self, start: int, stop: int) -> NDArray[np.float64]: ...


def serve(run: _Run, cycle: Cycle, window: int, max_samples: int) -> None:
    """Collect, plan, wait and move, from the first step to the last.

    Args:
        run: the trace and its planner.
        cycle: when.
        window: steps at a collection's end that a plan is made from.
        max_samples: sums of neighbouring steps that a collection is cut into, and a window.
    """
    drift = Drift(run.placement.num_layers, cycle.replan_above)
    begin = 0
    while begin < run.num_steps:
        first, end = _collect(run, cycle, window, max_samples, drift, begin)
        early = end < begin + cycle.collect_interval
        if end >= run.num_steps:
            return
        reply = run.ask(end, first)
        due = end + cycle.plan_steps
        if not early and reply is not None:
            due = max(due, end + cycle.plan_interval)
        run.judge(end, due)
        begin = due
        if reply is not None and due < run.num_steps:
            drift.planned(reply.plan.predicted_par)
            begin = _move(run, reply, due)


def _collect(
    run: _Run, cycle: Cycle, window: int, max_samples: int, drift: Drift, begin: int
) -> tuple[int, int]:
    """The steps that a plan is made from: the first, and the one after the last."""
    end = begin + cycle.collect_interval
    first = end - window
    look = look_steps(-(-cycle.collect_interval // max_samples))
    read = read_after(look)[1]
    at = begin
    carried = np.zeros((run.placement.num_layers, run.placement.num_ranks))
    for look_end in range(begin + look, min(end, run.num_steps) - read, look):
        load = carried + run.judge(at, look_end)
        at = look_end + read
        carried = run.judge(look_end, at)
        tokens = float(load.sum()) / load.shape[1]
        if not drift.too_much(par(load), tokens):
            continue
        steps = cut_short(window, -(-window // max_samples))
        if at < first and at + steps < end:
            first, end = at, at + steps
            break
    run.judge(at, end)
    return first, end


def _move(run: _Run, reply: PlanReply, due: int) -> int:
    """Move round after round; returns the step at which the next collection begins.

    A layer is served as it was until its last round.
    """
    run.adopt(due, reply)
    plan, rounds = reply.plan, reply.schedule.rounds
    last = np.full(run.placement.num_layers, -1)
    for index, one in enumerate(rounds):
        last[one.transfers[:, LAYER]] = index
    at = due
    for index in range(-1, len(rounds)):
        changed = (last == index)[:, None, None]
        run.take(
            np.where(changed, plan.placement.experts, run.placement.experts),
            np.where(changed, plan.split, run.split),
        )
        if index + 1 < len(rounds):
            run.judge(at, at + _STEPS_PER_ROUND)
            at += _STEPS_PER_ROUND
    return at
