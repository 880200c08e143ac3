"""The registry of policies, and the contract that every policy's answer is held to.

A policy is a pure function ``(load [samples, layers, experts], current placement, topology)`` to a
`Plan`. A user's own may answer less: a `Placement`, or an integer array ``[layers, ranks, slots]``.

    >>> def mirror(load, current, topology):
    ...     return current.experts[:, ::-1]        # ranks in reverse
    >>> current = Placement.initial(1, 4, 2, 2)
    >>> plan = make_policy(mirror)(np.ones((1, 1, 4)), current, Topology(2))
    >>> plan.placement.experts.tolist(), plan.predicted_par.tolist()
    ([[[2, 3], [0, 1]]], [1.0])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from torch_eplb.policies import baselines, deepseek, flashlb, flow, swift
from torch_eplb.policies.split import as_samples, judged_par, solve_split
from torch_eplb.values.choices import REPLICA_CHOICES
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Plan, Topology

__all__ = ["POLICIES", "Policy", "PolicyError", "check_plan", "check_shares", "make_policy"]

Policy: TypeAlias = Callable[[NDArray[Any], Placement, Topology], Plan]

_SHARE_TOLERANCE = 1e-6
"""How far an expert's shares may be from summing to 1."""


class PolicyError(ValueError):
    """A policy's answer breaks the contract; the message names layer, rank and expert."""


def make_policy(
    policy: str | Callable[..., Any],
    *,
    replica_choice: str | None = "batch",
    min_gain: float | None = None,
    target_par: float | None = None,
    max_moves: int | None = None,
    plan_seconds: float | None = None,
    weight_tokens: int | None = None,
    sample_steps: int | None = None,
) -> Policy:
    """A policy whose answers are complete and obey the contract (see `check_plan`).

    Args:
        policy: a name from `POLICIES`, or a callable ``(load, current, topology)``.
        replica_choice: how the runtime will split tokens among replicas: "batch", "local",
            "table" or "even". None means "batch".
        min_gain, target_par, max_moves, plan_seconds, weight_tokens, sample_steps: `flow.Knobs`;
            None for their defaults. Other policies do not move by gain and ignore them.

    Raises:
        TypeError, ValueError: an unknown policy or replica choice, or a knob out of range.
    """
    choice = _replica_choice(replica_choice)
    knobs = flow.Knobs.of(
        min_gain=min_gain,
        target_par=target_par,
        max_moves=max_moves,
        plan_seconds=plan_seconds,
        weight_tokens=weight_tokens,
        sample_steps=sample_steps,
    )
    answer = _resolve(policy, choice, knobs)

    def checked(load: NDArray[Any], current: Placement, topology: Topology) -> Plan:
        samples = as_samples(load, current)
        _check_topology(current, topology)
        answered = answer(samples, current, topology)
        return check_plan(answered, samples, current, topology, choice)

    return checked


def _resolve(policy: Any, choice: str, knobs: flow.Knobs) -> Callable[..., Any]:
    if callable(policy):
        return policy
    if not isinstance(policy, str) or policy not in POLICIES:
        raise ValueError(
            f"policy must be a callable or one of {', '.join(map(repr, POLICIES))}, got {policy!r}"
        )
    if policy == "flow":
        return lambda load, current, topology: flow.plan(load, current, topology, choice, knobs)
    return _PLAIN[policy]


def _deepseek(load: NDArray[np.float64], current: Placement, topology: Topology) -> Placement:
    return deepseek.place(load.mean(axis=0), current, topology)


_PLAIN: dict[str, Callable[..., Any]] = {
    "deepseek": _deepseek,
    "swift": swift.plan,
    "flashlb": flashlb.plan,
    "random": baselines.shuffle,
    "static": baselines.keep,
}

POLICIES: tuple[str, ...] = ("flow", *_PLAIN)
"""Names that ``policy=`` takes."""


def check_plan(
    answer: Any,
    load: NDArray[Any],
    current: Placement,
    topology: Topology,
    replica_choice: str | None = "batch",
) -> Plan:
    """Hold a policy's answer to the contract, and complete it.

    The contract: every expert has a slot, no rank has two replicas of an expert (unless ranks
    have more slots than there are experts), shares are finite, not negative and sum to 1 for
    every expert, predicted PAR is finite. Slots are permuted within ranks so that experts that
    stay keep theirs; shares move along.

    Args:
        answer: a `Plan`, a `Placement` or an integer array ``[layers, ranks, slots]``.
        load: ``[samples, layers, experts]`` or ``[layers, experts]``; judges what is missing.
        current: the placement that is live now.
        topology: of the ranks.
        replica_choice: as in `make_policy`.

    Raises:
        PolicyError: the answer breaks the contract.
        TypeError, ValueError: ``load``, ``topology`` or ``replica_choice`` is wrong.
    """
    choice = _replica_choice(replica_choice)
    samples = as_samples(load, current)
    _check_topology(current, topology)
    split = predicted = None
    raw = answer
    if isinstance(answer, Plan):
        raw, split, predicted = answer.placement, answer.split, answer.predicted_par
    theirs = _placement(raw, current)
    placement = theirs if theirs == current else current.align(theirs)
    if split is None:
        # The shares are what "table" routes by; elsewhere they only start the tables.
        split = solve_split(samples if choice == "table" else samples.mean(axis=0), placement)
    else:
        split = _follow(_split(split, theirs), theirs, placement)
    if predicted is None:
        predicted = judged_par(samples, placement, split, choice).mean(axis=0)
    return Plan(placement, split, _predicted(predicted, placement))


def check_shares(plan: Plan) -> None:
    """Hold a complete plan to what `Placement` does not see to by itself.

    Raises:
        PolicyError: split or predicted PAR breaks the contract (see `check_plan`).
    """
    _split(plan.split, plan.placement)
    _predicted(plan.predicted_par, plan.placement)


def _replica_choice(choice: Any) -> str:
    if choice is None:
        return "batch"
    if choice not in REPLICA_CHOICES:
        raise ValueError(
            f"replica_choice must be one of {', '.join(map(repr, REPLICA_CHOICES))}, got {choice!r}"
        )
    return str(choice)


def _check_topology(current: Placement, topology: Topology) -> None:
    if topology.num_ranks != current.num_ranks:
        raise ValueError(
            f"topology has {topology.num_ranks} ranks, the placement {current.num_ranks}"
        )


def _placement(raw: Any, current: Placement) -> Placement:
    if isinstance(raw, Placement):
        if raw.num_experts != current.num_experts:
            raise PolicyError(
                f"the policy answered for {raw.num_experts} experts, there are "
                f"{current.num_experts}"
            )
        raw = raw.experts
    elif not hasattr(raw, "__array__") and not isinstance(raw, (list, tuple)):
        raise PolicyError(
            "a policy must answer a Plan, a Placement or an integer array [layers, ranks, slots], "
            f"got {type(raw).__name__}"
        )
    if np.shape(raw) != current.experts.shape:
        raise PolicyError(
            f"the policy answered a placement of shape {list(np.shape(raw))}, "
            f"needed is [layers, ranks, slots] = {list(current.experts.shape)}"
        )
    try:
        return Placement(np.asarray(raw), current.num_experts)
    except (TypeError, ValueError) as error:
        raise PolicyError(f"the policy's placement is wrong: {error}") from error


def _split(raw: Any, placement: Placement) -> NDArray[np.float64]:
    try:
        split = np.array(raw, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise PolicyError(f"the policy's split is not an array of numbers: {error}") from error
    if split.shape != placement.experts.shape:
        raise PolicyError(
            f"the policy's split has the shape {list(split.shape)}, "
            f"the placement {list(placement.experts.shape)}"
        )
    wrong = ~(np.isfinite(split) & (split >= 0))
    if wrong.any():
        layer, rank, slot = np.argwhere(wrong)[0]
        raise PolicyError(
            f"layer {layer}, rank {rank}: expert {placement.experts[layer, rank, slot]} has the "
            f"share {split[layer, rank, slot]}; shares are finite and not negative"
        )
    total = np.zeros((placement.num_layers, placement.num_experts))
    np.add.at(total, (np.arange(placement.num_layers)[:, None, None], placement.experts), split)
    wrong = np.abs(total - 1.0) > _SHARE_TOLERANCE
    if wrong.any():
        layer, expert = np.argwhere(wrong)[0]
        raise PolicyError(
            f"layer {layer}: the shares of expert {expert} sum to {total[layer, expert]}, not to 1"
        )
    return split


def _follow(split: NDArray[np.float64], before: Placement, after: Placement) -> NDArray[np.float64]:
    """The split with its slots permuted as ``after`` permutes those of ``before``."""
    old = np.argsort(before.experts, axis=2, kind="stable")
    new = np.argsort(after.experts, axis=2, kind="stable")
    result = np.empty_like(split)
    np.put_along_axis(result, new, np.take_along_axis(split, old, axis=2), axis=2)
    return result


def _predicted(raw: Any, placement: Placement) -> NDArray[np.float64]:
    try:
        predicted = np.array(raw, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise PolicyError(f"predicted_par is not an array of numbers: {error}") from error
    if predicted.shape != (placement.num_layers,):
        raise PolicyError(
            f"predicted_par has the shape {list(predicted.shape)}, needed is "
            f"[layers] = [{placement.num_layers}]"
        )
    if not np.isfinite(predicted).all():
        layer = int(np.flatnonzero(~np.isfinite(predicted))[0])
        raise PolicyError(f"layer {layer}: predicted_par is {predicted[layer]}")
    return predicted
