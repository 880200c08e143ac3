"""`torch_eplb.Config` as keyword arguments that editors complete and type checkers check."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

from torch import nn

from torch_eplb.values.choices import (
    CostName,
    DispatchName,
    ExpertsName,
    PhaseName,
    PolicyName,
    ReplicaChoice,
    TransportName,
)

__all__ = ["Options"]


class Options(TypedDict, total=False):
    """The keyword arguments of `torch_eplb.wrap`: the fields of `torch_eplb.Config`, with their
    types. Which value is what is said there."""

    num_redundant_experts: int
    layers: Sequence[str] | Callable[[str, nn.Module], bool] | None
    dispatch: DispatchName
    max_tokens_per_rank: int | None
    replica_choice: ReplicaChoice | None
    cost: CostName | tuple[float, float] | None
    experts: ExpertsName
    policy: PolicyName | Callable[..., Any]
    min_gain: float | None
    target_par: float | None
    max_moves: int | None
    plan_seconds: float | None
    collect_interval: int
    window: int
    plan_interval: int
    replan_above: float | None
    layers_per_step: int
    staging_bytes: int | str | None
    direct: bool
    overlap: bool
    bytes_per_step: int | str | None
    verify: bool
    phase: PhaseName
    expert_map: str | os.PathLike[str] | None
    record_path: str | os.PathLike[str] | None
    record_map_path: str | os.PathLike[str] | None
    num_nodes: int | None
    num_expert_groups: int
    allow_training_with_moves: bool
    timeout: float
    transport: TransportName
    hccl_buffer_size: int
    nccl_max_ctas: int
