"""Expert maps: a placement as JSON, in the layout that vLLM-Ascend reads and writes:

    {"moe_layer_count": L,
     "layer_list": [{"layer_id": 0, "device_count": R,
                     "device_list": [{"device_id": 0, "device_expert": [3, 0, 7]}, ...]},
                    ...]}

A ``device`` is a rank, and ``device_expert`` names the logical expert in each of its slots. The
layer ids are those of the model's layers, so those of a model with dense layers have gaps; the n-th
smallest id belongs to the n-th MoE layer.

Imports numpy only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from torch_eplb.files.paths import PathLike, atomic_write, open_checked
from torch_eplb.values.placement import Placement

__all__ = ["format_expert_map", "parse_expert_map", "read_expert_map", "write_expert_map"]

MAX_MAP_BYTES = 32 * 2**20
"""Largest file that is parsed: an indented map of 100 layers x 1,024 slots takes about 2 MiB."""

_CONVERT = "maps of other engines become one by: python -m torch_eplb convert"


def write_expert_map(
    path: PathLike, placement: Placement, layer_ids: Sequence[int] | None = None
) -> None:
    """Writes ``placement`` as an expert map, atomically.

    Args:
        path: the file to write.
        placement: the placement.
        layer_ids: the model's id of each MoE layer, ascending; 0, 1, 2, ... by default.

    Raises:
        OSError: the path cannot be written.
        ValueError: ``layer_ids`` are not one ascending id per layer, or the path is no file.
    """
    document = format_expert_map(placement, layer_ids)
    with atomic_write(path, "expert map") as file:
        file.write(document.encode())


def format_expert_map(placement: Placement, layer_ids: Sequence[int] | None = None) -> str:
    """``placement`` as an expert map; see `write_expert_map`."""
    ids = list(range(placement.num_layers)) if layer_ids is None else [int(i) for i in layer_ids]
    if len(ids) != placement.num_layers or ids != sorted(set(ids)) or ids[0] < 0:
        raise ValueError(
            f"layer_ids must be {placement.num_layers} ascending ids, one per MoE layer, got {ids}"
        )
    layers = [
        {
            "layer_id": layer_id,
            "device_count": placement.num_ranks,
            "device_list": [
                {"device_id": rank, "device_expert": experts.tolist()}
                for rank, experts in enumerate(layer)
            ],
        }
        for layer_id, layer in zip(ids, placement.experts, strict=True)
    ]
    document = {"moe_layer_count": placement.num_layers, "layer_list": layers}
    return json.dumps(document)


def read_expert_map(
    path: PathLike,
    *,
    num_layers: int,
    num_experts: int,
    num_ranks: int,
    num_slots: int | None = None,
    layer_ids: Sequence[int] | None = None,
) -> Placement:
    """Reads an expert map and checks it against the model it is for.

    Layers and devices may be listed in any order.

    Args:
        path: the file.
        num_layers: MoE layers of the model.
        num_experts: logical experts per layer.
        num_ranks: ranks of the expert-parallel group.
        num_slots: slots per rank; by default as many as the map's first device has.
        layer_ids: the model's id of each MoE layer; by default any ``num_layers`` ids will do.

    Raises:
        OSError: the file is missing, unreadable or a directory.
        ValueError: not an expert map, or not one for this model; the message names the path and,
            where they are known, the layer (by its id in the file) and the rank.
    """
    name = os.fspath(path)
    with open_checked(path, "expert map", MAX_MAP_BYTES) as file:
        data = file.read(MAX_MAP_BYTES)
    try:
        return parse_expert_map(
            data,
            num_layers=num_layers,
            num_experts=num_experts,
            num_ranks=num_ranks,
            num_slots=num_slots,
            layer_ids=layer_ids,
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def parse_expert_map(
    data: str | bytes,
    *,
    num_layers: int,
    num_experts: int,
    num_ranks: int,
    num_slots: int | None = None,
    layer_ids: Sequence[int] | None = None,
) -> Placement:
    """The placement that the text of an expert map describes; see `read_expert_map`.

    Raises:
        ValueError: not an expert map, or not one for this model.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"is not JSON ({error}); name an expert map written by record_map_path= or "
            f"by vLLM-Ascend; {_CONVERT}"
        ) from None
    layers = _layers(document, num_layers, layer_ids)
    rows = [list(_slots(layers[i], i, num_experts, num_ranks, num_slots)) for i in layers]
    widths = [len(slots) for ranks in rows for slots in ranks]
    if len(set(widths)) > 1:
        odd = next(n for n, width in enumerate(widths) if width != widths[0])
        layer_id = list(layers)[odd // num_ranks]
        raise ValueError(
            f"layer {layer_id}, rank {odd % num_ranks}: {widths[odd]} experts, where the first "
            f"rank has {widths[0]}; every rank must have the same number"
        )
    _check_coverage(rows, list(layers), num_experts)
    return Placement(np.array(rows, dtype=np.int32), num_experts)


def _layers(
    document: Any, num_layers: int, layer_ids: Sequence[int] | None
) -> dict[int, list[Any]]:
    """The device list of each layer, by layer id, ascending."""
    try:
        entries = _field(document, "layer_list", list, "the file")
    except ValueError as error:
        raise ValueError(f"{error}; {_CONVERT}") from None
    devices: dict[int, list[Any]] = {}
    for number, entry in enumerate(entries):
        layer_id = _field(entry, "layer_id", int, f"entry {number} of layer_list")
        if layer_id in devices:
            raise ValueError(f"layer {layer_id}: is listed twice")
        devices[layer_id] = _field(entry, "device_list", list, f"layer {layer_id}")
        count = _field(entry, "device_count", int, f"layer {layer_id}")
        if count != len(devices[layer_id]):
            raise ValueError(
                f"layer {layer_id}: device_count is {count}, but device_list has "
                f"{len(devices[layer_id])} ranks"
            )
    wanted = list(range(num_layers)) if layer_ids is None else list(layer_ids)
    if layer_ids is not None or len(devices) != num_layers:
        missing = [i for i in wanted if i not in devices]
        extra = [i for i in devices if i not in wanted]
        if missing or extra:
            what = f"layer {missing[0]} is missing" if missing else f"layer {extra[0]} is unknown"
            raise ValueError(
                f"{what}: the map has {len(devices)} layers and the model {num_layers} MoE layers; "
                "make the map for this model"
            )
    count = _field(document, "moe_layer_count", int, "the file")
    if count != len(devices):
        raise ValueError(f"moe_layer_count is {count}, but layer_list has {len(devices)} layers")
    return dict(sorted(devices.items()))


def _slots(
    devices: list[Any], layer_id: int, num_experts: int, num_ranks: int, num_slots: int | None
) -> Iterator[list[int]]:
    """The experts in the slots of each rank of a layer, by rank."""
    by_rank: dict[int, list[Any]] = {}
    for number, device in enumerate(devices):
        rank = _field(device, "device_id", int, f"layer {layer_id}, entry {number} of device_list")
        if rank in by_rank:
            raise ValueError(f"layer {layer_id}, rank {rank}: is listed twice")
        if not 0 <= rank < num_ranks:
            raise ValueError(
                f"layer {layer_id}, rank {rank}: the group has {num_ranks} ranks "
                f"(0..{num_ranks - 1}); make the map for this number of ranks"
            )
        by_rank[rank] = _field(device, "device_expert", list, f"layer {layer_id}, rank {rank}")
    for rank in range(num_ranks):
        where = f"layer {layer_id}, rank {rank}"
        if rank not in by_rank:
            raise ValueError(
                f"{where}: is missing; the map has {len(by_rank)} ranks and the group {num_ranks}; "
                "make the map for this number of ranks"
            )
        yield _experts(by_rank[rank], where, num_experts, num_slots)


def _experts(experts: list[Any], where: str, num_experts: int, num_slots: int | None) -> list[int]:
    """The experts of one rank, checked."""
    for expert in experts:
        if type(expert) is not int or not 0 <= expert < num_experts:
            raise ValueError(
                f"{where}: {_short(expert)} is not one of the {num_experts} experts "
                f"(0..{num_experts - 1})"
            )
    if not experts or (num_slots is not None and len(experts) != num_slots):
        raise ValueError(
            f"{where}: {len(experts)} experts, expected {num_slots or 'at least 1'}; the map must "
            "be made for this number of ranks and num_redundant_experts"
        )
    # Placement accepts duplicates only where a rank has more slots than there are experts.
    if len(experts) <= num_experts and len(set(experts)) != len(experts):
        twice = next(expert for expert in experts if experts.count(expert) > 1)
        raise ValueError(
            f"{where}: expert {twice} is listed twice; replicas belong on different ranks"
        )
    return experts


def _check_coverage(rows: list[list[list[int]]], ids: list[int], num_experts: int) -> None:
    for layer_id, ranks in zip(ids, rows, strict=True):
        missing = set(range(num_experts)).difference(*ranks)
        if missing:
            raise ValueError(
                f"layer {layer_id}: expert {min(missing)} is on none of the ranks "
                f"0..{len(ranks) - 1}; every expert needs a slot"
            )


def _field(entry: Any, key: str, kind: type, where: str) -> Any:
    """``entry[key]``, which must be of the type ``kind``."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if type(value) is not kind:
        noun = {int: "a whole number", list: "a list"}[kind]
        raise ValueError(f"{where}: {key} must be {noun}, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    """``value`` for a message; whatever is nested or long is only hinted at."""
    if isinstance(value, (list, dict)):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
