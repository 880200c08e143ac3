"""Simulate: one or several policies on a recorded trace, as numbers that can be compared.

Imports numpy only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.files.trace import Trace
from torch_eplb.offline.progress import Progress
from torch_eplb.offline.replay import (
    NO_BALANCING,
    Policy,
    Replay,
    Settings,
    policy_name,
    replay,
)

__all__ = ["simulate", "summarise"]


def simulate(
    trace: Trace,
    settings: Settings,
    policies: Sequence[Policy],
    replica_choices: Sequence[str] = ("batch",),
    *,
    num_steps: int | None = None,
    num_layers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Replays a trace against several policies and sums up, as a JSON-able document.

    Args:
        trace: the load.
        settings: ranks, windows, costs.
        policies: names of policies, or callables; "none" is always replayed, and first.
        replica_choices: see `judge`; every policy is replayed with each.
        num_steps: replay the first steps only.
        num_layers: replay that many layers, repeating the trace's if it has fewer.
        progress: called after every interval of every replay.

    Returns:
        A dict of "trace", "settings", "expert_load" ``[layers][experts]`` relative to the mean, and
        "policies" by label. A label is a policy's name, and with several replica choices
        ``policy+choice``; what it maps to is explained at `summarise`.

    Raises:
        ValueError: as `replay`; more steps asked for than there are; nothing to replay.
    """
    counts = _cut(trace.counts, num_steps, num_layers)
    choices = list(dict.fromkeys(replica_choices))
    runs: list[tuple[str, Policy, str]] = [(NO_BALANCING, NO_BALANCING, "even")]
    for policy in dict.fromkeys(policies):
        for choice in choices:
            name = policy_name(policy)
            label = name if len(choices) == 1 else f"{name}+{choice}"
            if policy != NO_BALANCING:
                runs.append((label, policy, choice))
    done = {
        label: summarise(replay(counts, settings, policy, choice, progress, label), settings)
        for label, policy, choice in runs
    }
    load = counts[settings.first_step :].sum(axis=(0, 1), dtype=np.float64)
    return {
        "trace": {
            "steps": counts.shape[0],
            "source_ranks": counts.shape[1],
            "layers": counts.shape[2],
            "experts": counts.shape[3],
            "recorded_layers": trace.num_layers,
        },
        "settings": {
            "num_ranks": settings.num_ranks,
            "num_redundant_experts": settings.num_redundant_experts,
            "num_nodes": settings.num_nodes,
            "num_expert_groups": settings.num_expert_groups,
            "window": settings.window,
            "interval": settings.interval,
            "cycle": None if settings.cycle is None else dataclasses.asdict(settings.cycle),
            "expert_bytes": settings.cost.expert_bytes,
            "flops_per_token": settings.cost.flops_per_token,
            "flops_per_second": settings.cost.hardware.flops_per_second,
            "link_bytes_per_second": settings.cost.hardware.link_bytes_per_second,
            "efficiency": settings.cost.hardware.efficiency,
            "hardware_source": settings.cost.hardware.source,
        },
        "expert_load": _rounded(load / np.maximum(load.mean(axis=1, keepdims=True), 1)),
        "policies": done,
    }


def summarise(result: Replay, settings: Settings) -> dict[str, Any]:
    """The numbers of one replay.

    ==================================  =====================================================
    ``par_mean``, ``par_p95``,           PAR over all judged steps and layers
    ``par_max``
    ``moves_per_layer_per_rebalance``    slots whose expert changed; mean over plans and layers
    ``slots_per_layer``                  slots of a layer, over all ranks
    ``plan_ms_median``, ``plan_ms_max``  wall time of policy, checks and schedule
    ``bytes_per_rebalance``              sent between ranks, all layers; mean over plans
    ``rounds_per_rebalance``             mean over plans
    ``step_ms``                          estimated time of the MoE layers of a step: compute, and
                                         the step's share of migration as if nothing overlapped
    ``compute_ms``, ``migration_ms``     the two parts of ``step_ms``
    ``par_series``                       per judged step, mean over layers
    ``first_step``                       the step that ``par_series`` starts with
    ``rebalance_steps``                  the steps before which a plan was adopted that moves
    ``rank_load``                        [layers][ranks], relative to the mean
    ``refusals``                         [step, cause] of every plan that was dropped
    ==================================  =====================================================
    """
    compute = float(settings.cost.compute_seconds(result.peak_tokens).mean())
    migration = float(result.migration_seconds.sum()) / len(result.par)
    return {
        "policy": result.policy,
        "replica_choice": result.replica_choice,
        "par_mean": float(result.par.mean()),
        "par_p95": float(np.percentile(result.par, 95)),
        "par_max": float(result.par.max()),
        "moves_per_layer_per_rebalance": _mean(result.moved),
        "slots_per_layer": result.slots,
        "plan_ms_median": 1e3 * float(np.median(result.plan_seconds))
        if result.rounds.size
        else 0.0,
        "plan_ms_max": 1e3 * float(result.plan_seconds.max(initial=0.0)),
        "rebalances": len(result.rounds),
        "bytes_per_rebalance": _mean(result.travelled) * settings.cost.expert_bytes,
        "rounds_per_rebalance": _mean(result.rounds),
        "step_ms": 1e3 * (compute + migration),
        "compute_ms": 1e3 * compute,
        "migration_ms": 1e3 * migration,
        "par_series": _rounded(result.par.mean(axis=1)),
        "first_step": settings.first_step,
        "rebalance_steps": result.plan_steps[result.moved.any(axis=1)].tolist(),
        "rank_load": _rounded(result.rank_load),
        "refusals": [list(refusal) for refusal in result.refusals],
    }


def _cut(counts: NDArray[Any], num_steps: int | None, num_layers: int | None) -> NDArray[Any]:
    if num_steps is not None:
        if not 1 <= num_steps <= len(counts):
            raise ValueError(f"steps must be from 1 to the trace's {len(counts)}, got {num_steps}")
        counts = counts[:num_steps]
    if num_layers is not None:
        if num_layers < 1:
            raise ValueError(f"layers must be at least 1, got {num_layers}")
        counts = counts[:, :, np.arange(num_layers) % counts.shape[2]]
    return counts


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if values.size else 0.0


def _rounded(values: NDArray[Any]) -> Any:
    return np.round(values, 5).tolist()
