"""What other engines record and read: their loads and maps, told by content.

Read (from the sources of the releases named):

====================  ==========================================================================
SGLang 0.5.23         ``srt/eplb/expert_distribution.py``. Modes stat and stat_approx: a dict with
                      ``logical_count [steps, layers, experts]``. Modes per_pass and per_token: one
                      file per rank with ``records``, each ``global_physical_count [layers,
                      physical]`` of a ``forward_pass_id``, and ``last_physical_to_logical_map
                      [layers, physical]``. ``--init-expert-location`` (``expert_location.py``): a
                      dict with ``logical_count`` or ``physical_to_logical_map``
vLLM 0.33.0           ``distributed/eplb/eplb_state.py``. It writes no files; a dict with its
                      state's ``expert_load_window [window, layers, physical]`` and
                      ``physical_to_logical_map`` is read, and so are the JSON lines of its open
                      pull request 41141 (records ``eplb_load_stats`` and
                      ``eplb_initial_mapping``, version 1)
vLLM-Ascend 0.23.0    the expert map JSON (``eplb/adaptor/vllm_adaptor.py``); its table of slots
                      ``[layers, ranks, experts]`` with -1 for "not here"; the plain tensor
                      ``[layers, experts]`` of ``examples/eplb/eplb_strategy.py``
MindSpeed-RL          ``eplb_token_collects_<rank>.json``: ``{layer: {expert: tokens}}``
DeepSeek EPLB         tables: load ``[layers, experts]``, map ``[layers, replicas]``, as csv or npy
====================  ==========================================================================

Imports numpy only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.files.documents import Document, Table
from torch_eplb.files.recorded import (
    EXPECTED,
    Context,
    PhysicalMap,
    RecordedLoad,
    check_slots,
    integers,
    load_of,
    numbers,
    to_logical,
)
from torch_eplb.files.tables import is_collect, parse_array, parse_collects, parse_table

__all__ = ["PLAIN_KINDS", "parse"]

PLAIN_KINDS = ("load", "physical-load", "map")
"""What an array without a name may hold: load by logical expert, load by slot, or a map."""


def parse(
    documents: Sequence[Document],
    *,
    plain: str = "load",
    num_experts: int | None = None,
    physical_map: PhysicalMap | None = None,
) -> RecordedLoad | PhysicalMap:
    """What one or several files of one recording hold.

    Several files are the ranks of a recording (SGLang's records, MindSpeed-RL), or steps that
    follow one another (everything else).

    Args:
        documents: the files, in order.
        plain: what an array without a name holds; see `PLAIN_KINDS`.
        num_experts: logical experts; needed where a file names only experts that got tokens.
        physical_map: the map under which loads by slot were counted.

    Raises:
        ValueError: not a format that is known, or damaged; the message names the file and what was
            expected.
    """
    if len(documents) > 1 and all(is_collect(d.value) for d in documents):
        return parse_collects(documents, num_experts)
    if all(isinstance(d.value, Mapping) and "records" in d.value for d in documents):
        return _sglang_records(documents, num_experts)
    context = Context(plain, num_experts, physical_map)
    parts = [_parse_one(document, context) for document in documents]
    if len(parts) == 1:
        return parts[0]
    loads = [part for part in parts if isinstance(part, RecordedLoad)]
    if len(loads) < len(parts):
        raise ValueError(f"{documents[0].path}: maps are converted one at a time")
    for document, load in zip(documents, loads, strict=True):
        if load.counts.shape[1:] != loads[0].counts.shape[1:]:
            raise ValueError(
                f"{document.path}: has [source_ranks, layers, experts] = "
                f"{list(load.counts.shape[1:])}, and {documents[0].path} "
                f"{list(loads[0].counts.shape[1:])}; files of one recording have the same"
            )
    return replace(loads[0], counts=np.concatenate([load.counts for load in loads]))


def _parse_one(document: Document, context: Context) -> RecordedLoad | PhysicalMap:
    path, value = document.path, document.value
    if isinstance(value, Table):
        return parse_table(path, value, context)
    if isinstance(value, np.ndarray):
        return parse_array(path, value, context)
    if isinstance(value, Mapping):
        for keys, reader in _BY_KEYS:
            if all(key in value for key in keys):
                return reader(path, value, context)
        if is_collect(value):
            return parse_collects([document], context.num_experts)
        if isinstance(value.get("record_type"), str):
            return _vllm_lines(path, [value], context)
        arrays = [v for v in value.values() if isinstance(v, np.ndarray) and v.ndim >= 2]
        if document.kind == "npz" and len(arrays) == 1:
            return parse_array(path, arrays[0], context)
        found = ", ".join(map(str, list(value)[:8])) or "nothing"
        raise ValueError(f"{path}: has {found}; {EXPECTED}")
    if isinstance(value, list):
        if value and all(isinstance(v, Mapping) and "record_type" in v for v in value):
            return _vllm_lines(path, value, context)
        return parse_array(path, value, context)
    raise ValueError(f"{path}: holds a {type(value).__name__}; {EXPECTED}")


# ---- SGLang -----------------------------------------------------------------------------------


def _sglang_count(path: str, value: Mapping[str, Any], _: Context) -> RecordedLoad:
    counts = numbers(path, "logical_count", value["logical_count"], (2, 3))
    return load_of(counts, "SGLang expert distribution (logical_count)")


def _sglang_records(documents: Sequence[Document], num_experts: int | None) -> RecordedLoad:
    """Sums over ranks by forward pass, and from slots to experts by each file's map."""
    passes: dict[int, NDArray[Any]] = {}
    seen: set[tuple[int, int]] = set()
    for document in documents:
        path, key = document.path, "last_physical_to_logical_map"
        if key not in document.value:
            raise ValueError(f"{path}: has records, but no {key}; name a dump of SGLang's recorder")
        table = integers(path, key, document.value[key], (2,))
        for number, record in enumerate(document.value["records"]):
            where = f"records[{number}]"
            try:
                at = (int(record["forward_pass_id"]), int(record["rank"]))
                raw = record["global_physical_count"]
            except (KeyError, TypeError, ValueError):
                raise ValueError(
                    f"{path}: {where} lacks forward_pass_id, rank or global_physical_count; "
                    "name a dump of SGLang's recorder (per_pass or per_token)"
                ) from None
            if at in seen:
                raise ValueError(f"{path}: forward pass {at[0]} of rank {at[1]} is recorded twice")
            seen.add(at)
            counts = numbers(path, f"{where}.global_physical_count", raw, (2,))
            check_slots(path, counts[None], table)
            load = to_logical(counts[None], table, num_experts)[0]
            passes[at[0]] = passes[at[0]] + load if at[0] in passes else load
    if not passes:
        raise ValueError(f"{documents[0].path}: has no records; record some forward passes first")
    counts = np.stack([passes[number] for number in sorted(passes)])
    return load_of(counts, "SGLang expert distribution (records of forward passes)")


def _sglang_map(path: str, value: Mapping[str, Any], _: Context) -> PhysicalMap:
    table = integers(path, "physical_to_logical_map", value["physical_to_logical_map"], (2,))
    return PhysicalMap(table, None, list(range(len(table))), "SGLang physical_to_logical_map")


# ---- vLLM -------------------------------------------------------------------------------------


def _vllm_window(path: str, value: Mapping[str, Any], context: Context) -> RecordedLoad:
    key = "expert_load_window" if "expert_load_window" in value else "expert_load_pass"
    counts = numbers(path, key, value[key], (2, 3))
    counts = counts.reshape(-1, *counts.shape[-2:])
    # -1 is a slot that an elastic group has not filled.
    raw = value["physical_to_logical_map"]
    table = integers(path, "physical_to_logical_map", raw, (2,), least=-1)
    check_slots(path, counts, table)
    return load_of(to_logical(counts, table, context.num_experts), f"vLLM {key}")


def _vllm_lines(
    path: str, records: Sequence[Mapping[str, Any]], context: Context
) -> RecordedLoad | PhysicalMap:
    kinds = {record["record_type"] for record in records}
    if "eplb_initial_mapping" in kinds:
        record = next(r for r in records if r["record_type"] == "eplb_initial_mapping")
        by_layer = record.get("initial_global_assignments")
        if not isinstance(by_layer, Mapping) or not by_layer:
            raise ValueError(f"{path}: eplb_initial_mapping has no initial_global_assignments")
        ids = _layer_numbers(path, by_layer)
        rows = [by_layer[str(i)] for i in ids]
        table = integers(path, "initial_global_assignments", rows, (2,))
        return PhysicalMap(table, None, ids, "vLLM eplb_initial_mapping")
    stats = [record for record in records if record["record_type"] == "eplb_load_stats"]
    if not stats:
        raise ValueError(f"{path}: has records of the types {sorted(map(str, kinds))}; {EXPECTED}")
    steps = []
    for record in stats:
        missing = [key for key in ("expert_load", "p2l_map") if key not in record]
        if missing:
            raise ValueError(f"{path}: an eplb_load_stats record lacks {missing[0]}")
        counts = numbers(path, "expert_load", record["expert_load"], (2,))
        table = integers(path, "p2l_map", record["p2l_map"], (2,))
        check_slots(path, counts[None], table)
        steps.append(to_logical(counts[None], table, context.num_experts))
    if len({step.shape for step in steps}) > 1:
        raise ValueError(f"{path}: eplb_load_stats records differ in layers or experts")
    return load_of(np.concatenate(steps), "vLLM eplb_load_stats")


# ---- vLLM-Ascend and our own -------------------------------------------------------------------


def _expert_map(path: str, value: Mapping[str, Any], _: Context) -> PhysicalMap:
    """Any expert map whose ranks have equally many slots; `read_expert_map` is stricter."""
    layers: dict[int, list[list[int]]] = {}
    try:
        for entry in value["layer_list"]:
            ranks = {int(d["device_id"]): d["device_expert"] for d in entry["device_list"]}
            if sorted(ranks) != list(range(len(entry["device_list"]))):
                raise ValueError(f"layer {entry['layer_id']}: device_id must be 0, 1, 2, ...")
            layers[int(entry["layer_id"])] = [ranks[rank] for rank in sorted(ranks)]
    except (KeyError, TypeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{path}: is not an expert map ({reason}); expected layer_list of layer_id and "
            "device_list of device_id and device_expert"
        ) from None
    ids = sorted(layers)
    table = integers(path, "layer_list", [layers[i] for i in ids], (3,))
    return PhysicalMap(table.reshape(len(ids), -1), table.shape[1], ids, "expert map")


def _trace(path: str, value: Mapping[str, Any], _: Context) -> RecordedLoad:
    counts = numbers(path, "counts", value["counts"], (4,))
    return RecordedLoad(counts, _stored_ids(value.get("meta"), counts.shape[2]), "trace")


def _stored_ids(meta: Any, layers: int) -> list[int]:
    """What an earlier conversion noted in a trace."""
    try:
        ids = [int(i) for i in json.loads(str(meta))["layer_ids"]]
    except (KeyError, TypeError, ValueError, RecursionError):
        ids = []
    return ids if len(ids) == layers else list(range(layers))


def _named_load(path: str, value: Mapping[str, Any], _: Context) -> RecordedLoad:
    return load_of(numbers(path, "load", value["load"], (2, 3)), "load")


_Reader = Callable[[str, Mapping[str, Any], Context], "RecordedLoad | PhysicalMap"]
_BY_KEYS: tuple[tuple[tuple[str, ...], _Reader], ...] = (
    (("logical_count",), _sglang_count),
    (("expert_load_window", "physical_to_logical_map"), _vllm_window),
    (("expert_load_pass", "physical_to_logical_map"), _vllm_window),
    (("physical_to_logical_map",), _sglang_map),
    (("layer_list",), _expert_map),
    (("counts",), _trace),
    (("load",), _named_load),
)


def _layer_numbers(path: str, by_layer: Mapping[str, Any]) -> list[int]:
    try:
        return sorted(int(layer) for layer in by_layer)
    except ValueError:
        raise ValueError(f"{path}: layers must be numbered, got {list(by_layer)[:4]}") from None
