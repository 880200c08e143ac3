"""Everything that `wrap` checks and prepares before it changes the model.

The model is touched only after every rank has found its arguments, its model and the others' the
same; a rank that finds an error tells the others, so that all of them raise.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from torch_eplb.comm.agreement import agree
from torch_eplb.comm.communicator import Communicator, device_of, make_communicator
from torch_eplb.files.expert_map import read_expert_map
from torch_eplb.layers.experts import ExpertLayer
from torch_eplb.layers.finding import find_layers
from torch_eplb.layers.grouped import why_not
from torch_eplb.layers.slots import Listed
from torch_eplb.planner.messages import PlannerSettings
from torch_eplb.routing.load import sample_steps
from torch_eplb.runtime import owners
from torch_eplb.runtime.config import Config
from torch_eplb.runtime.costs import agree_on_weight_tokens
from torch_eplb.values.choices import DispatchKind
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology
from torch_eplb.version import __version__

__all__ = ["Setup", "planner_settings", "prepare", "receives_directly"]

logger = logging.getLogger("torch_eplb")


@dataclass
class Setup:
    """A model that is ready to be wrapped."""

    model: nn.Module
    config: Config
    comm: Communicator
    layers: list[ExpertLayer]
    placement: Placement
    topology: Topology
    staging_bytes: int
    already_sharded: bool
    weight_tokens: int


@dataclass
class _Inspected:
    """What a rank finds out by itself."""

    config: Config
    layers: list[ExpertLayer]
    device: torch.device
    placement: Placement
    topology: Topology
    staging_bytes: int
    already_sharded: bool


def prepare(
    model: nn.Module,
    process_group: dist.ProcessGroup | DeviceMesh | None,
    config: Config | None,
    kwargs: Mapping[str, Any],
) -> Setup:
    """Check arguments and model on all ranks and make the process groups.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError, TypeError: see `torch_eplb.wrap`.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "torch.distributed is not initialised: call torch.distributed.init_process_group "
            "before torch_eplb.wrap"
        )
    group = _group(process_group)
    inspected: _Inspected | None = None
    error: Exception | None = None
    try:
        inspected = _inspect(model, group, config, kwargs)
    except Exception as found:  # whatever it is, the other ranks must hear of it
        error = found
    timeout = inspected.config.timeout if inspected else _timeout(config, kwargs)
    comm = make_communicator(group, inspected.device if inspected else torch.device("cpu"), timeout)
    try:
        agree(comm, _describe(model, inspected) if inspected else None, error)
        assert inspected is not None
        comm.open_data_plane(
            over_gloo=inspected.config.transport == "gloo",
            hccl_buffer_size=inspected.config.hccl_buffer_size,
            nccl_max_ctas=inspected.config.nccl_max_ctas,
        )
        weight_tokens = agree_on_weight_tokens(inspected.config, inspected.layers, comm)
    except BaseException:
        comm.close()
        raise
    values = {f.name: getattr(inspected, f.name) for f in dataclasses.fields(_Inspected)}
    del values["device"]
    owners.reserve(layer.module for layer in inspected.layers)
    if comm.rank == 0:
        _say_remarks(inspected.layers)
    return Setup(model=model, comm=comm, weight_tokens=weight_tokens, **values)


def _say_remarks(layers: Sequence[ExpertLayer]) -> None:
    """What users of these classes of transformers should know, once for each."""
    remarks = {type(layer.module).__name__: layer.form.remark for layer in layers if layer.form}
    for name, remark in remarks.items():
        if remark is not None:
            logger.warning("%s: %s", name, remark)


def _group(process_group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup:
    if isinstance(process_group, DeviceMesh):
        if process_group.ndim != 1:
            raise ValueError(
                f"process_group: a DeviceMesh must have one dimension, got {process_group.ndim} "
                f"({process_group.mesh_dim_names}); pass the expert-parallel one, mesh['ep'] say"
            )
        process_group = process_group.get_group()
    group = process_group if process_group is not None else dist.group.WORLD
    if group is None or group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group: this rank is not a member of the group it passed")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a ProcessGroup, a one-dimensional DeviceMesh or None, "
            f"got {type(group).__name__}"
        )
    return group


def _timeout(given: Config | None, kwargs: Mapping[str, Any]) -> float:
    """How long to wait for the others to say that something is wrong here."""
    try:
        return Config(timeout=kwargs["timeout"]).timeout
    except (KeyError, TypeError, ValueError):
        return given.timeout if isinstance(given, Config) else Config().timeout


def _config(given: Config | None, kwargs: Mapping[str, Any]) -> Config:
    if given is not None and not isinstance(given, Config):
        raise TypeError(f"config must be a torch_eplb.Config, got {type(given).__name__}")
    known = {f.name for f in dataclasses.fields(Config)}
    unknown = sorted(set(kwargs) - known)
    if unknown:
        raise TypeError(
            f"torch_eplb.wrap has no argument {', '.join(unknown)}; "
            f"it has {', '.join(sorted(known))}"
        )
    if given is None:
        return Config(**kwargs)
    changes = dict(kwargs)
    if given.takes_default_choice:
        changes.setdefault("replica_choice", None)
    if given.replica_choice == given.dispatch_kind.default_choice and "dispatch" in changes:
        changes.setdefault("replica_choice", None)  # it follows the dispatch, unless it is chosen
    return dataclasses.replace(given, **changes)


def _inspect(
    model: nn.Module, group: dist.ProcessGroup, given: Config | None, kwargs: Mapping[str, Any]
) -> _Inspected:
    num_ranks = dist.get_world_size(group)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    config = _config(given, kwargs)
    layers = find_layers(model, config.layers, owners.wrapped)
    experts = layers[0].num_experts
    num_slots = _num_slots(experts, config.num_redundant_experts, num_ranks)
    already_sharded = _check_shards(layers, num_slots, config.dispatch_kind)
    device = layers[0].tensors()[0].device
    _check_current(device)
    # A model on the meta device will be loaded onto the device that the group serves.
    home = device_of(group) if device.type == "meta" else device
    config = config.on_device(home.type)
    if config.cost == "measured" and device.type == "meta":
        raise ValueError(
            "cost='measured' needs weights, and the model is on the meta device: pass the pair "
            "(t_weight, t_token), or wrap a model that has weights"
        )
    for layer in layers:
        if layer.spec.expert_weights is None and config.dispatch_kind.communicates:
            raise ValueError(
                f"layer {layer.name}: its forward takes no expert weights, so only "
                'dispatch="external" can balance it'
            )
        if layer.spec.token_counts is not None and config.dispatch_kind.communicates:
            raise ValueError(
                f"layer {layer.name}: its class is registered with token_counts="
                f'{layer.spec.token_counts!r}, which is for dispatch="external"; with '
                f"dispatch={config.dispatch!r} tokens are brought to it and counted: leave it out"
            )
        if layer.form is not None and not config.dispatch_kind.communicates:
            raise ValueError(
                f"dispatch={config.dispatch!r}: layer {layer.name} is a "
                f"{type(layer.module).__name__} of transformers, which does not dispatch by itself"
            )
        if config.experts == "grouped":
            where = device_of(group) if device.type == "meta" else device
            reason = why_not(layer.module, layer.spec.fused, config.experts, where)
            if reason is not None:
                raise ValueError(
                    f"experts='grouped': layer {layer.name} cannot be computed so: {reason}. Use "
                    '"auto" or "module", or register its class with '
                    "torch_eplb.register_layer(..., fused=True) if it is"
                )
        for name, tensor in layer.named_tensors():
            if tensor.device != device:
                raise ValueError(
                    f"experts must be on one device, but {layer.name}.{name} is on "
                    f"{tensor.device} and the first on {device}"
                )
    return _Inspected(
        config=config,
        layers=layers,
        device=home,
        placement=_initial_placement(config, len(layers), experts, num_ranks, num_slots),
        topology=_topology(config, experts, num_ranks),
        staging_bytes=_staging_bytes(config, layers),
        already_sharded=already_sharded,
    )


def _check_current(device: torch.device) -> None:
    """Streams, events and communicators are those of the current device."""
    if device.type in ("cpu", "meta"):
        return
    current = torch.get_device_module(device).current_device()
    if device.index != current:
        raise ValueError(
            f"the experts are on {device}, but this process's current device is "
            f"{device.type}:{current}: call torch.{device.type}.set_device({device.index}) before "
            "torch_eplb.wrap, best before torch.distributed.init_process_group"
        )


def planner_settings(setup: Setup) -> PlannerSettings:
    """What the planner must know."""
    config = setup.config
    options: dict[str, str | float | None] = {
        "replica_choice": config.replica_choice,
        "min_gain": config.min_gain,
        "target_par": config.target_par,
        "max_moves": config.max_moves,
        "plan_seconds": config.plan_seconds,
    }
    if setup.weight_tokens:
        options["weight_tokens"] = setup.weight_tokens
        options["sample_steps"] = sample_steps(config.collect_interval, config.window)
    return PlannerSettings(
        policy=config.policy,
        policy_options={name: value for name, value in options.items() if value is not None},
        topology=setup.topology,
        expert_bytes=tuple(layer.expert_bytes for layer in setup.layers),
        staging_bytes=setup.staging_bytes,
        direct=receives_directly(config, setup.layers),
        layers_per_round=config.layers_per_step,
        send_bytes_per_round=config.bytes_per_step,  # type: ignore[arg-type]
    )


def receives_directly(config: Config, layers: Sequence[ExpertLayer]) -> bool:
    """Whether drained slots are received into; nothing can be received into tiles."""
    return config.direct and not any(layer.has_tiles for layer in layers)


def _num_slots(experts: int, redundant: int, num_ranks: int) -> int:
    """Slots per rank."""
    if (experts + redundant) % num_ranks:
        least = -experts % num_ranks
        good = [least + i * num_ranks for i in range(3)]
        raise ValueError(
            f"num_redundant_experts={redundant}: {experts} experts + {redundant} do not divide "
            f"evenly over {num_ranks} ranks; use {', '.join(map(str, good))}, ..."
        )
    if redundant > experts * (num_ranks - 1):
        raise ValueError(
            f"num_redundant_experts={redundant}: with {experts * (num_ranks - 1)} every one of "
            f"{num_ranks} ranks holds all {experts} experts; more cannot be used"
        )
    return (experts + redundant) // num_ranks


def _check_shards(layers: list[ExpertLayer], num_slots: int, dispatch: DispatchKind) -> bool:
    """Whether the layers' tensors are sharded already."""
    sharded = set()
    for layer in layers:
        for name, part, full in zip(
            layer.tensor_names, layer.parts(), layer.full_sizes, strict=True
        ):
            size = len(part)
            if size not in (full, num_slots):
                where = "" if isinstance(part, Listed) else " on dim 0"
                raise ValueError(
                    f"layer {layer.name}: {name} has {size} entries{where}; expected "
                    f"{layer.num_experts} (all experts) or {num_slots} (this rank's slots)"
                )
            sharded.add(size != full)
    if len(sharded) > 1:
        raise ValueError("some of the model's expert tensors are sharded and others are not")
    if sharded == {True} and dispatch.communicates:
        raise ValueError(
            f"the experts of layer {layers[0].name} are sharded already, and "
            f"dispatch={dispatch.name!r} shards them itself: "
            'pass the full model, or use dispatch="external" if the layer '
            "dispatches by itself"
        )
    return sharded == {True}


def _initial_placement(
    config: Config, num_layers: int, experts: int, num_ranks: int, num_slots: int
) -> Placement:
    if config.expert_map is None:
        return Placement.initial(num_layers, experts, num_ranks, num_slots)
    placement = read_expert_map(
        config.expert_map, num_layers=num_layers, num_experts=experts, num_ranks=num_ranks
    )
    if placement.num_slots != num_slots:
        raise ValueError(
            f"num_redundant_experts={config.num_redundant_experts}, but the expert map "
            f"{config.expert_map} has {placement.num_slots} experts on each of {num_ranks} ranks, "
            f"which are {placement.num_redundant_experts} more than the model has: pass "
            f"num_redundant_experts={placement.num_redundant_experts}"
        )
    return placement


def _topology(config: Config, experts: int, num_ranks: int) -> Topology:
    num_nodes = config.num_nodes
    if num_nodes is None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
        whole_world = num_ranks == dist.get_world_size()
        num_nodes = num_ranks // local if whole_world and num_ranks % local == 0 else 1
    if num_ranks % num_nodes:
        raise ValueError(f"num_nodes={num_nodes} does not divide the {num_ranks} ranks")
    if experts % config.num_expert_groups:
        raise ValueError(
            f"num_expert_groups={config.num_expert_groups} does not divide the {experts} experts"
        )
    return Topology(num_ranks, num_nodes, config.num_expert_groups)


def _staging_bytes(config: Config, layers: list[ExpertLayer]) -> int:
    least = max(layer.expert_bytes for layer in layers)
    if config.staging_bytes is None:
        return least
    assert isinstance(config.staging_bytes, int)
    if config.staging_bytes < least:
        raise ValueError(
            f"staging_bytes={config.staging_bytes} is less than one expert of the largest layer; "
            f"it must be at least {least}"
        )
    return config.staging_bytes


def _describe(model: nn.Module, inspected: _Inspected) -> dict[str, str]:
    """What must be the same on all ranks, as text."""
    description = {
        **inspected.config.fingerprint(),
        "torch version": torch.__version__,
        "torch_eplb version": __version__,
        "model": type(model).__qualname__,
        "device type": inspected.device.type,
        "has weights": str(not inspected.layers[0].tensors()[0].is_meta),
        "number of MoE layers": str(len(inspected.layers)),
        "placement": f"crc32 {zlib.crc32(inspected.placement.experts.tobytes()):08x}",
        "topology": repr(inspected.topology),
    }
    for layer in inspected.layers:
        description[f"layer {layer.name}"] = f"{layer.num_experts} experts, {layer.layout()}"
        counts = layer.spec.token_counts
        description[f"token counts of {layer.name}"] = getattr(counts, "__qualname__", repr(counts))
    return description
