"""The names of what can be chosen, each with what the rest of the package must know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

__all__ = [
    "COSTS",
    "DISPATCHES",
    "EXPERTS",
    "PHASES",
    "REPLICA_CHOICES",
    "TRANSPORTS",
    "CostName",
    "DispatchKind",
    "DispatchName",
    "ExpertsName",
    "PhaseName",
    "PolicyName",
    "ReplicaChoice",
    "TransportName",
]

DispatchName: TypeAlias = Literal["all_to_all", "all_gather", "all_reduce", "external"]
"""How tokens reach experts; see `torch_eplb.Config`."""

ReplicaChoice: TypeAlias = Literal["batch", "local", "table", "even"]
"""Which replica a token goes to; see `torch_eplb.Config`."""

CostName: TypeAlias = Literal["auto", "measured"]
"""Where the times that "batch" and "local" level come from; see `torch_eplb.Config`."""

ExpertsName: TypeAlias = Literal["auto", "module", "grouped"]
"""Who computes the experts of a slot; see `torch_eplb.Config`."""

PhaseName: TypeAlias = Literal["all", "prefill", "decode"]
"""Which steps are recorded."""

TransportName: TypeAlias = Literal["device", "gloo"]
"""What carries experts' weights; see `torch_eplb.Config`."""

PolicyName: TypeAlias = Literal["flow", "deepseek", "swift", "flashlb", "random", "static"]
"""How placements are planned."""

REPLICA_CHOICES: tuple[ReplicaChoice, ...] = get_args(ReplicaChoice)
COSTS: tuple[CostName, ...] = get_args(CostName)
EXPERTS: tuple[ExpertsName, ...] = get_args(ExpertsName)
PHASES: tuple[PhaseName, ...] = get_args(PhaseName)
TRANSPORTS: tuple[TransportName, ...] = get_args(TransportName)


@dataclass(frozen=True)
class DispatchKind:
    """What a way of bringing tokens to experts means for the rest.

    Attributes:
        name: as in ``dispatch=``.
        own_batches: every rank brings its own tokens, and may have none.
        shares_tokens: all ranks hold the same tokens when replicas are chosen. They must then
            choose the same replica of a token, and one rank's counts are the counts of all.
        communicates: it brings the tokens to the experts itself. Otherwise the layer does, expert
            tensors may be sharded already, and forward needs no weights.
        default_choice: the replica choice where none is asked for.
        default_on_device: the same for types of devices where it is another.
        refused: replica choices that cannot be right with it, and why.
    """

    name: DispatchName
    own_batches: bool
    shares_tokens: bool
    communicates: bool
    default_choice: ReplicaChoice
    refused: Mapping[str, str]
    default_on_device: Mapping[str, ReplicaChoice] = field(default_factory=dict)


# Solving on Ascend takes tens of milliseconds: its cores lack what 64-bit integers need.
_NO_SOLVER: Mapping[str, ReplicaChoice] = {"npu": "table"}

DISPATCHES: dict[str, DispatchKind] = {
    kind.name: kind
    for kind in (
        DispatchKind(
            "all_to_all",
            own_batches=True,
            shares_tokens=False,
            communicates=True,
            default_choice="batch",
            refused={},
        ),
        DispatchKind(
            "all_gather",
            own_batches=True,
            shares_tokens=True,
            communicates=True,
            default_choice="batch",
            default_on_device=_NO_SOLVER,
            refused={
                "local": (
                    "balances each rank's tokens alone, and here every rank sees all of them: use "
                    '"batch", "table" or "even"'
                )
            },
        ),
        DispatchKind(
            "all_reduce",
            own_batches=False,
            shares_tokens=True,
            communicates=True,
            default_choice="batch",
            default_on_device=_NO_SOLVER,
            refused={
                "local": (
                    "would let ranks choose different replicas of one token, which counts it "
                    'twice; use "batch", "table" or "even"'
                )
            },
        ),
        DispatchKind(
            "external",
            own_batches=True,
            shares_tokens=False,
            communicates=False,
            default_choice="local",
            default_on_device=_NO_SOLVER,
            refused={
                "batch": (
                    "needs the counts of all ranks, which a layer that dispatches by itself does "
                    'not exchange with us; use "local", "table" or "even"'
                )
            },
        ),
    )
}
