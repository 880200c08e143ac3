"""The keyword arguments of `torch_eplb.wrap`, as one frozen, validated dataclass."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from torch_eplb.policies.flow import Knobs
from torch_eplb.policies.registry import POLICIES
from torch_eplb.values.choices import (
    COSTS,
    DISPATCHES,
    EXPERTS,
    PHASES,
    REPLICA_CHOICES,
    TRANSPORTS,
    CostName,
    DispatchKind,
    DispatchName,
    ExpertsName,
    PhaseName,
    PolicyName,
    ReplicaChoice,
    TransportName,
)
from torch_eplb.values.sizes import parse_bytes

__all__ = ["Config"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a model is balanced. Every field must be the same on all ranks.

    Raises:
        TypeError, ValueError: at construction, naming the field, its value and the remedy.
    """

    num_redundant_experts: int = 0
    """Slots beyond one per logical expert, per layer. (experts + redundant) must divide evenly
    over the ranks."""

    layers: Sequence[str] | Callable[[str, nn.Module], bool] | None = None
    """Which of the MoE layers are balanced: names of their experts modules in the model, or
    patterns of names as `fnmatch` has them ("visual.*"), or a function that is called with each
    name and module. The others stay as they are; another call of `wrap` may balance them. None is
    all."""

    dispatch: DispatchName = "all_to_all"
    """How tokens reach experts. "all_to_all": every rank has its own batch. "all_gather": likewise,
    and all tokens go to all ranks, for small batches and graphs. "all_reduce": all ranks hold the
    same batch and their partial outputs are summed. "external": the layer dispatches by itself and
    wants physical expert ids."""

    max_tokens_per_rank: int | None = None
    """Most tokens of a rank in one call, with dispatch="all_gather": all batches are padded to so
    many. None: ranks agree on the largest in every call, which compiled and captured code
    cannot."""

    replica_choice: ReplicaChoice | None = None
    """Which replica a token goes to. "batch": the split is solved for every batch and layer on
    global counts. "local": each rank solves it for its own tokens. "table": the planner's shares.
    "even": replicas in turn. None: "local" for dispatch="external", else "batch"; on NPUs "table"
    for all dispatches that would solve on the device, all but "all_to_all"."""

    cost: CostName | tuple[float, float] | None = "auto"
    """What "batch" and "local" level over ranks: a replica's time, which is that of its tokens, or
    that of reading its weights if that is longer. ``(t_weight, t_token)``: seconds to read one
    expert's weights and to compute one token, or any two numbers in that proportion. "measured":
    by products with the first layer's experts in `wrap`. "auto": from peak rates of known GPUs and
    NPUs; elsewhere as None, for which only tokens count."""

    experts: ExpertsName = "auto"
    """Who computes experts. "module": the module's own forward. "grouped": two grouped matrix
    products on the rows as they arrive, for fused gated experts. "auto": grouped where the class,
    the dtype and the device allow it and the model selects no implementation of its own."""

    policy: PolicyName | Callable[..., Any] = "flow"
    """How placements are planned: "flow", "deepseek", "swift", "flashlb", "random", "static", or a
    callable ``(load [samples, layers, experts], placement, topology) -> Plan``."""

    min_gain: float | None = None
    """Least gain of mean PAR that a moved expert must bring (policy "flow"). None: its default."""

    target_par: float | None = None
    """No expert moves in a layer whose predicted PAR is below this (policy "flow"). None: its
    default."""

    max_moves: int | None = None
    """Most experts moved per layer and rebalance (policy "flow"). None: no bound."""

    plan_seconds: float | None = None
    """Seconds after which the planner's search ends, with the best that it has found (policy
    "flow"). None: no bound but the search's own."""

    collect_interval: int = 600
    """Steps over which load is collected before a plan is made, at most."""

    window: int = 50
    """Steps at the end of the collection that a plan is made from: load drifts, and what it was
    long ago misleads. If none of them was recorded, all that was collected counts."""

    plan_interval: int = 50
    """Steps after collection before which a plan is not applied, unless the load has drifted."""

    replan_above: float | None = 1.05
    """Plan early, from the next third of a ``window``, and apply the plan when it is there, where
    PAR of some 16 steps, mean over layers, is more than so many times what the last plan promised
    and reached; before the first plan: than 1. None: plans are made by the clock alone."""

    layers_per_step: int = 1
    """Most layers whose experts move in one round."""

    staging_bytes: int | str | None = None
    """Receive memory per rank, in bytes or as "64MiB". None: one expert of the largest layer, which
    is also the least."""

    direct: bool = True
    """Receive straight into slots whose expert has another replica (no staging) where possible."""

    overlap: bool = True
    """Transfers run while the model computes. False: each round runs between two forwards."""

    bytes_per_step: int | str | None = None
    """Most bytes that a rank sends in one round; at least one expert is always sent. None: no
    bound."""

    verify: bool = False
    """Send a checksum with every expert and check it before the commit."""

    phase: PhaseName = "all"
    """Which steps are recorded: "all", or those in ``balancer.phase("prefill" | "decode")``."""

    expert_map: str | os.PathLike[str] | None = None
    """Initial placement: path of a JSON file in vLLM-Ascend's expert map layout."""

    record_path: str | os.PathLike[str] | None = None
    """Write the load of every recorded step to this npz trace (rank 0 writes)."""

    record_map_path: str | os.PathLike[str] | None = None
    """Write each cycle's planned expert map to this JSON file and move nothing."""

    num_nodes: int | None = None
    """Nodes that the ranks sit on, equally many each. None: from LOCAL_WORLD_SIZE when the ranks
    fill whole nodes, else 1."""

    num_expert_groups: int = 1
    """Expert groups of group-limited routing; with several nodes, placement is hierarchical when
    the groups divide evenly over the nodes."""

    allow_training_with_moves: bool = False
    """Let backward passes reach experts that move or have replicas. Their optimizer state and
    gradients do not follow them, and replicas' gradients are not summed: for those who see to that
    themselves."""

    timeout: float = 60.0
    """Seconds after which a silent peer counts as lost and a silent planner is restarted."""

    transport: TransportName = "device"
    """What carries weights: "device" is the backend of the experts' device (HCCL, NCCL, gloo).
    "gloo" takes them through pinned host memory, where operations of a second communicator beside
    the model's are known to hang."""

    hccl_buffer_size: int = 16
    """MiB of each of the two buffers of the HCCL communicator that moves weights (Ascend)."""

    nccl_max_ctas: int = 4
    """Most CTAs that NCCL may use for moving weights (CUDA)."""

    def __post_init__(self) -> None:
        for name, least in (
            ("num_redundant_experts", 0),
            ("collect_interval", 1),
            ("window", 1),
            ("plan_interval", 0),
            ("layers_per_step", 1),
            ("num_expert_groups", 1),
            ("hccl_buffer_size", 1),
            ("nccl_max_ctas", 1),
        ):
            self._check_int(name, least)
        if self.num_nodes is not None:
            self._check_int("num_nodes", 1)
        if self.max_tokens_per_rank is not None:
            self._check_int("max_tokens_per_rank", 1)
        for name in ("staging_bytes", "bytes_per_step"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, parse_bytes(value, name))
        for name in ("direct", "overlap", "verify", "allow_training_with_moves"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._check_layers()
        self._check_choice("dispatch", DISPATCHES)
        if self.max_tokens_per_rank is not None and self.dispatch != "all_gather":
            raise ValueError(
                f"max_tokens_per_rank={self.max_tokens_per_rank} is for dispatch='all_gather', "
                f"not for {self.dispatch!r}; leave it out"
            )
        self._check_choice("experts", EXPERTS)
        if self.experts == "grouped" and not self.dispatch_kind.communicates:
            raise ValueError(
                f"experts='grouped' with dispatch={self.dispatch!r}: there the layer computes its "
                'experts by itself; use "auto"'
            )
        self._check_cost()
        self._check_choice("phase", PHASES)
        self._check_choice("transport", TRANSPORTS)
        self._check_replica_choice()
        self._check_policy()
        Knobs.of(
            min_gain=self.min_gain,
            target_par=self.target_par,
            max_moves=self.max_moves,
            plan_seconds=self.plan_seconds,
        )
        self._check_timeout()
        self._check_replan_above()
        for name in ("expert_map", "record_path", "record_map_path"):
            value = getattr(self, name)
            if value is not None:
                if not isinstance(value, (str, os.PathLike)):
                    raise TypeError(f"{name} must be a path, got {value!r}")
                object.__setattr__(self, name, os.fspath(value))

    def _check_int(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")

    def _check_layers(self) -> None:
        value = self.layers
        if value is None or callable(value):
            return
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise TypeError(
                "layers must be a list of names, a function of name and module, or None, got "
                f"{value!r}" + (f"; write layers=[{value!r}]" if isinstance(value, str) else "")
            )
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"layers must be names, got {name!r} among them")
        if not value:
            raise ValueError(f"layers={value!r} chooses no layer; None is all")
        object.__setattr__(self, "layers", tuple(value))

    def _check_timeout(self) -> None:
        value = self.timeout
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"timeout must be a number of seconds, got {value!r}")
        if not 0 < value < float("inf"):
            raise ValueError(f"timeout must be a finite number of more than 0 seconds, got {value}")

    def _check_replan_above(self) -> None:
        value = self.replan_above
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"replan_above must be a number or None, got {value!r}")
        if not 1.0 <= value < float("inf"):
            raise ValueError(
                f"replan_above must be a finite number of at least 1 (or None), got {value}"
            )

    def _check_cost(self) -> None:
        if self.cost is None or (isinstance(self.cost, str) and self.cost in COSTS):
            return
        names = ", ".join(map(repr, COSTS))
        if not isinstance(self.cost, (tuple, list)) or len(self.cost) != 2:
            raise ValueError(
                f"cost must be {names}, a pair (t_weight, t_token) or None, got {self.cost!r}"
            )
        for name, value in zip(("t_weight", "t_token"), self.cost, strict=True):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"cost: {name} must be a number, got {value!r}")
            if not 0 < value < float("inf"):
                raise ValueError(f"cost: {name} must be finite and above 0, got {value}")
        object.__setattr__(self, "cost", tuple(self.cost))

    def _check_choice(self, name: str, choices: Collection[str]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(
                f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
            )

    @property
    def dispatch_kind(self) -> DispatchKind:
        """What ``dispatch`` means."""
        return DISPATCHES[self.dispatch]

    @property
    def takes_default_choice(self) -> bool:
        """Whether no ``replica_choice`` was asked for."""
        return not self.__dict__["_chosen"]

    def on_device(self, kind: str) -> Config:
        """The same on devices of this type, where another replica choice may be the default."""
        default = self.dispatch_kind.default_on_device.get(kind)
        if default is None or not self.takes_default_choice:
            return self
        return dataclasses.replace(self, replica_choice=default)

    def _check_replica_choice(self) -> None:
        kind = self.dispatch_kind
        object.__setattr__(self, "_chosen", self.replica_choice is not None)
        if self.replica_choice is None:
            object.__setattr__(self, "replica_choice", kind.default_choice)
        self._check_choice("replica_choice", REPLICA_CHOICES)
        reason = kind.refused.get(str(self.replica_choice))
        if reason is not None:
            raise ValueError(
                f"replica_choice={self.replica_choice!r} with dispatch={self.dispatch!r} {reason}"
            )

    def _check_policy(self) -> None:
        if callable(self.policy):
            return
        if self.policy not in POLICIES:
            raise ValueError(
                f"policy must be a callable or one of {', '.join(map(repr, POLICIES))}, "
                f"got {self.policy!r}"
            )

    def fingerprint(self) -> dict[str, str]:
        """Every field as text, for comparing ranks."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("policy", "layers"):
            if callable(values[name]):
                value = values[name]
                values[name] = getattr(value, "__qualname__", type(value).__qualname__)
        return {name: repr(value) for name, value in values.items()}
