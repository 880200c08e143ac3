"""Replays a trace: what policies would have done, and how well the steps would have been balanced.

Planning, checking and scheduling are the planner process's own code, so a replay decides what a
server would have decided. Every step is judged with a plan that was made before it:

    steps     0 ........ window ........ + interval ........ + interval ....
    plan                 made from the `window` steps before, judged on the `interval` steps after

The first window is not judged. Imports numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.files.trace import window_samples
from torch_eplb.offline.cost import HARDWARE, CostModel, traffic
from torch_eplb.offline.progress import Progress
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
        self.topology()

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
    num_steps, _, num_layers, num_experts = counts.shape
    if num_steps <= settings.window:
        raise ValueError(
            f"a window of {settings.window} steps leaves none of {num_steps} steps to judge; "
            "shorten the window or record more steps"
        )
    slots = settings.slots(num_experts)
    placement = Placement.initial(num_layers, num_experts, settings.num_ranks, slots)
    split = even_split(placement)
    planner = None
    if policy != NO_BALANCING:
        planner = _planner(settings, policy, replica_choice, num_layers)
    plans: list[_Planned] = []
    refusals: list[tuple[int, str]] = []
    pars, peaks = [], []
    total = np.zeros((num_layers, settings.num_ranks))
    for start in range(settings.window, num_steps, settings.interval):
        if planner is not None:
            request = Request(start, _window(counts, start, settings), placement)
            reply = answer(planner, request)
            if isinstance(reply, Refusal):
                refusals.append((start, reply.cause))
            else:
                plans.append(_Planned.of(placement, reply, settings.cost))
                placement, split = reply.plan.placement, reply.plan.split
        loads = judge(counts[start : start + settings.interval], placement, split, replica_choice)
        pars.append(par(loads))
        peaks.append(loads.max(axis=2))
        total += loads.sum(axis=0)
        if progress is not None:
            done = min(start + settings.interval, num_steps) - settings.window
            progress(label or policy_name(policy), done, num_steps - settings.window)
    mean = np.maximum(total.mean(axis=1, keepdims=True), np.finfo(float).tiny)
    return Replay(
        policy=policy_name(policy),
        replica_choice=replica_choice,
        par=np.concatenate(pars),
        peak_tokens=np.concatenate(peaks),
        rank_load=total / mean,
        slots=settings.num_ranks * slots,
        plan_steps=np.array([p.step for p in plans], np.int64),
        moved=np.array([p.moved for p in plans], np.int64).reshape(-1, num_layers),
        travelled=np.array([p.travelled for p in plans], np.int64),
        rounds=np.array([p.rounds for p in plans], np.int64),
        plan_seconds=np.array([p.plan_seconds for p in plans], np.float64),
        migration_seconds=np.array([p.migration_seconds for p in plans], np.float64),
        refusals=tuple(refusals),
    )


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
    def of(cls, before: Placement, reply: PlanReply, cost: CostModel) -> _Planned:
        return cls(
            reply.request_id,
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
    }
    size = settings.cost.expert_bytes
    return PlannerSettings(
        policy=policy,
        policy_options={name: value for name, value in options.items() if value is not None},
        topology=settings.topology(),
        expert_bytes=(size,) * num_layers,
        staging_bytes=settings.staging_experts * size,
    )


def _window(counts: NDArray[Any], start: int, settings: Settings) -> NDArray[np.int64]:
    """``[samples, layers, experts]``: what the planner is told before step ``start``."""
    load = counts[start - settings.window : start].sum(axis=1, dtype=np.int64)
    return window_samples(load, settings.max_samples)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
