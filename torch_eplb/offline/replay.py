"""Replays a trace: what policies would have done, and how well the steps would have been balanced.

Planning, checking and scheduling are the planner process's own code, so a replay decides what a
server would have decided. Every step is judged with a plan that was made before it:

    steps     0 ........ window ........ + interval ........ + interval ....
    plan                 made from the `window` steps before, judged on the `interval` steps after

The first window is not judged. With a `Cycle` plans are made and carried out when a server would
(`serving`), and all steps are judged. Imports numpy only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.files.trace import window_samples
from torch_eplb.offline.cost import HARDWARE, CostModel, traffic
from torch_eplb.offline.progress import Progress
from torch_eplb.offline.serving import Cycle, serve
from torch_eplb.planner.messages import PlannerSettings, PlanReply, Refusal, Request
from torch_eplb.planner.worker import answer
from torch_eplb.policies.registry import POLICIES
from torch_eplb.policies.split import (
    batch_rank_loads,
    even_split,
    par,
    rank_loads,
)
from torch_eplb.values.choices import REPLICA_CHOICES
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Plan, Topology

__all__ = [
    "NO_BALANCING",
    "Replay",
    "Settings",
    "judge",
    "policy_name",
    "replay",
]

NO_BALANCING = "none"
"""Label of the replay in which nothing is ever planned."""

Policy = str | Callable[[NDArray[Any], Placement, Topology], Plan]
"""A policy by its name, or a user's own."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is replayed.

    Raises:
        ValueError: a value that does not fit the others; the message says what to change.
    """

    num_ranks: int
    """Ranks of the expert-parallel group."""

    num_redundant_experts: int = 0
    """Slots beyond one per expert, per layer."""

    num_nodes: int = 1
    """Nodes that the ranks sit on, equally many each."""

    num_expert_groups: int = 1
    """Expert groups of group-limited routing."""

    window: int = 50
    """Steps before a plan that its load is taken from."""

    interval: int = 50
    """Steps between two plans."""

    max_samples: int = 32
    """Most sums of neighbouring steps that a policy gets to see of a window."""

    min_gain: float | None = None
    """Least gain per moved expert; None is the policy's default."""

    target_par: float | None = None
    """PAR below which nothing moves; None is the policy's default."""

    max_moves: int | None = None
    """Most experts moved per layer and plan; None is the policy's default."""

    plan_seconds: float | None = None
    """Seconds after which a search ends; None is the policy's default."""

    cycle: Cycle | None = None
    """When a server would plan; None for a plan every ``interval`` steps."""

    staging_experts: int = 1
    """Staging memory of a rank, in experts."""

    cost: CostModel = field(
        default_factory=lambda: CostModel(HARDWARE["ascend-910c"], 36 * 2**20, 36 * 2**20)
    )
    """Converts tokens and transfers to seconds. The default expert has the size of one of
    Qwen3-235B-A22B's: 3 matrices of 4096 x 1536 in BF16."""

    def __post_init__(self) -> None:
        for name in ("num_ranks", "window", "interval", "max_samples", "staging_experts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_redundant_experts < 0:
            raise ValueError(
                f"num_redundant_experts must not be negative, got {self.num_redundant_experts}"
            )
        if self.cycle is not None and self.cycle.collect_interval < self.window:
            raise ValueError(
                f"collect_interval ({self.cycle.collect_interval}) must be at least window "
                f"({self.window})"
            )
        self.topology()

    @property
    def first_step(self) -> int:
        """The first step that is judged."""
        return self.window if self.cycle is None else 0

    def topology(self) -> Topology:
        return Topology(self.num_ranks, self.num_nodes, self.num_expert_groups)

    def slots(self, num_experts: int) -> int:
        """Slots per rank.

        Raises:
            ValueError: experts and redundant experts do not divide evenly over the ranks.
        """
        slots, left = divmod(num_experts + self.num_redundant_experts, self.num_ranks)
        if left or slots > num_experts:
            raise ValueError(
                f"{num_experts} experts and {self.num_redundant_experts} redundant ones cannot be "
                f"spread over {self.num_ranks} ranks: the sum must be a multiple of the ranks, and "
                f"a rank can hold at most {num_experts}; change the number of redundant experts"
            )
        return slots


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What one policy did with a trace.

    Attributes:
        policy: name of the policy, or `NO_BALANCING`.
        replica_choice: how tokens were split over replicas.
        par: ``[steps, layers]`` float64, PAR of every judged step.
        peak_tokens: ``[steps, layers]`` float64, tokens of the most loaded rank.
        rank_load: ``[layers, ranks]`` float64, load of each rank relative to the mean over the
            ranks, over all judged steps.
        slots: slots of a layer, over all ranks.
        plan_steps: ``[plans]`` int64, the step before which each plan was adopted.
        moved: ``[plans, layers]`` int64, slots whose expert each plan changed.
        travelled: ``[plans]`` int64, experts sent from one rank to another.
        rounds: ``[plans]`` int64.
        plan_seconds: ``[plans]`` float64, wall time of policy, checks and schedule.
        migration_seconds: ``[plans]`` float64, by the cost model.
        refusals: why plans were dropped, as (step, cause); the placement before went on serving.
    """

    policy: str
    replica_choice: str
    par: NDArray[np.float64]
    peak_tokens: NDArray[np.float64]
    rank_load: NDArray[np.float64]
    slots: int
    plan_steps: NDArray[np.int64]
    moved: NDArray[np.int64]
    travelled: NDArray[np.int64]
    rounds: NDArray[np.int64]
    plan_seconds: NDArray[np.float64]
    migration_seconds: NDArray[np.float64]
    refusals: tuple[tuple[int, str], ...]


def policy_name(policy: Policy) -> str:
    """How a policy is called in tables and documents."""
    if isinstance(policy, str):
        return policy
    return getattr(policy, "__name__", type(policy).__name__)


def judge(
    counts: NDArray[Any],
    placement: Placement,
    split: NDArray[np.float64],
    replica_choice: str,
) -> NDArray[np.float64]:
    """Load of every rank in every step.

    Args:
        counts: integers ``[steps, source_ranks, layers, experts]``.
        placement: where the experts are.
        split: ``[layers, ranks, slots]``, the planned shares; used by "table" only.
        replica_choice: "batch" solves the split of each step's counts summed over source ranks;
            "local" that of every source rank's counts alone; "table" takes ``split``; "even"
            shares alike.

    Returns:
        ``[steps, layers, ranks]`` float64, tokens per rank.
    """
    if replica_choice == "local":
        flat = counts.reshape(-1, *counts.shape[2:])
        by_source = batch_rank_loads(flat, placement)
        return by_source.reshape(*counts.shape[:2], *by_source.shape[1:]).sum(axis=1)
    load = counts.sum(axis=1, dtype=np.int64)
    if replica_choice == "batch":
        return batch_rank_loads(load, placement)
    shares = split if replica_choice == "table" else even_split(placement)
    return rank_loads(load, placement, shares)


def replay(
    counts: NDArray[Any],
    settings: Settings,
    policy: Policy,
    replica_choice: str,
    progress: Progress | None = None,
    label: str | None = None,
) -> Replay:
    """Replays load against one policy.

    Args:
        counts: integers ``[steps, source_ranks, layers, experts]``.
        settings: ranks, windows, costs.
        policy: name of a policy, a callable ``(load, placement, topology) -> Plan``, or
            `NO_BALANCING`: the initial placement stays.
        replica_choice: see `judge`.
        progress: called after every interval.
        label: what ``progress`` is told; by default the policy's name.

    Returns:
        What came out; a plan that the policy or the checks refuse is dropped, and listed.

    Raises:
        ValueError: too few steps, an unknown policy or replica choice, ranks that do not divide.
    """
    if isinstance(policy, str):
        _check_choice("policy", policy, (*POLICIES, NO_BALANCING))
    _check_choice("replica_choice", replica_choice, REPLICA_CHOICES)
    num_steps, _, num_layers, _ = counts.shape
    if num_steps <= settings.first_step:
        raise ValueError(
            f"a window of {settings.window} steps leaves none of {num_steps} steps to judge; "
            "shorten the window or record more steps"
        )
    planner = None
    if policy != NO_BALANCING:
        planner = _planner(settings, policy, replica_choice, num_layers)
    run = _Run(counts, settings, planner, replica_choice)
    if progress is not None:
        run.progress = functools.partial(progress, label or policy_name(policy))
    if settings.cycle is None or planner is None:
        _by_the_window(run)
    else:
        serve(run, settings.cycle, settings.window, settings.max_samples)
    total = run.total
    mean = np.maximum(total.mean(axis=1, keepdims=True), np.finfo(float).tiny)
    plans = run.plans
    return Replay(
        policy=policy_name(policy),
        replica_choice=replica_choice,
        par=np.concatenate(run.pars),
        peak_tokens=np.concatenate(run.peaks),
        rank_load=total / mean,
        slots=run.placement.num_ranks * run.placement.num_slots,
        plan_steps=np.array([p.step for p in plans], np.int64),
        moved=np.array([p.moved for p in plans], np.int64).reshape(-1, num_layers),
        travelled=np.array([p.travelled for p in plans], np.int64),
        rounds=np.array([p.rounds for p in plans], np.int64),
        plan_seconds=np.array([p.plan_seconds for p in plans], np.float64),
        migration_seconds=np.array([p.migration_seconds for p in plans], np.float64),
        refusals=tuple(run.refusals),
    )


def _by_the_window(run: _Run) -> None:
    window, interval = run.settings.window, run.settings.interval
    for start in range(run.settings.first_step, run.num_steps, interval):
        reply = run.ask(start, start - window)
        if reply is not None:
            run.adopt(start, reply)
            run.take(reply.plan.placement.experts, reply.plan.split)
        run.judge(start, start + interval)


class _Run:
    """Placement and split on their way along a trace, and what came of them.

    Attributes:
        placement, split: the present ones.
        pars, peaks, total, plans, refusals: see `Replay`; the first two in pieces.
    """

    def __init__(
        self,
        counts: NDArray[Any],
        settings: Settings,
        planner: PlannerSettings | None,
        replica_choice: str,
    ) -> None:
        self.settings = settings
        self._counts, self._planner, self._choice = counts, planner, replica_choice
        num_steps, _, num_layers, num_experts = counts.shape
        self.num_steps = num_steps
        self.placement = Placement.initial(
            num_layers, num_experts, settings.num_ranks, settings.slots(num_experts)
        )
        self.split = even_split(self.placement)
        self.progress: Callable[[int, int], None] | None = None
        self.plans: list[_Planned] = []
        self.refusals: list[tuple[int, str]] = []
        self.pars: list[NDArray[np.float64]] = []
        self.peaks: list[NDArray[np.float64]] = []
        self.total = np.zeros((num_layers, settings.num_ranks))

    def ask(self, step: int, first: int) -> PlanReply | None:
        """Plan before ``step`` from the steps since ``first``; None if nobody does, or can."""
        if self._planner is None:
            return None
        load = self._counts[first:step].sum(axis=1, dtype=np.int64)
        request = Request(step, window_samples(load, self.settings.max_samples), self.placement)
        reply = answer(self._planner, request)
        if isinstance(reply, Refusal):
            self.refusals.append((step, reply.cause))
            return None
        return reply

    def adopt(self, step: int, reply: PlanReply) -> None:
        """Write down that a plan is carried out from ``step`` on."""
        self.plans.append(_Planned.of(step, self.placement, reply, self.settings.cost))

    def take(self, experts: NDArray[np.int32], split: NDArray[np.float64]) -> None:
        """Serve with this placement from now on."""
        self.placement = Placement(experts, self.placement.num_experts)
        self.split = split

    def judge(self, start: int, stop: int) -> NDArray[np.float64]:
        """``[layers, ranks]``: the load of steps ``start`` to ``stop``, as far as there are any."""
        if start >= min(stop, self.num_steps):
            return np.zeros_like(self.total)
        loads = judge(self._counts[start:stop], self.placement, self.split, self._choice)
        self.pars.append(par(loads))
        self.peaks.append(loads.max(axis=2))
        load: NDArray[np.float64] = loads.sum(axis=0)
        self.total += load
        if self.progress is not None:
            first = self.settings.first_step
            self.progress(min(stop, self.num_steps) - first, self.num_steps - first)
        return load


@dataclass(frozen=True)
class _Planned:
    """What is kept of a plan that was adopted; the fields are those of `Replay`."""

    step: int
    moved: NDArray[np.int64]
    travelled: int
    rounds: int
    plan_seconds: float
    migration_seconds: float

    @classmethod
    def of(cls, step: int, before: Placement, reply: PlanReply, cost: CostModel) -> _Planned:
        return cls(
            step,
            before.changed_slots(reply.plan.placement),
            traffic(reply.schedule),
            len(reply.schedule.rounds),
            reply.plan_seconds,
            cost.migration_seconds(reply.schedule),
        )


def _planner(
    settings: Settings, policy: Policy, replica_choice: str, num_layers: int
) -> PlannerSettings:
    options = {
        "replica_choice": replica_choice,
        "min_gain": settings.min_gain,
        "target_par": settings.target_par,
        "max_moves": settings.max_moves,
        "plan_seconds": settings.plan_seconds,
    }
    size = settings.cost.expert_bytes
    return PlannerSettings(
        policy=policy,
        policy_options={name: value for name, value in options.items() if value is not None},
        topology=settings.topology(),
        expert_bytes=(size,) * num_layers,
        staging_bytes=settings.staging_experts * size,
    )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
