"""``python -m torch_eplb convert``: other engines' loads and maps to ours, and back.

What is read is told by content (`torch_eplb.files.engines`), what is written by ``--to``, or by the
name of the file to write:

=============  ===============  ==================================================================
``--to``       name             load as / map as
=============  ===============  ==================================================================
trace          ``.npz``         a trace / -
expert-map     ``.json``        - / the JSON of ``expert_map=`` and of vLLM-Ascend
sglang         ``.pt``          ``logical_count`` / ``physical_to_logical_map``, for SGLang's
                                ``--init-expert-location``; also as ``.json``
vllm           ``.jsonl``       - / ``eplb_initial_mapping`` (vLLM's open pull request 41141)
npy            ``.npy``         ``[layers, experts]`` / ``[layers, slots]``, as DeepSeek's EPLB
csv            ``.csv``         the same, as text
=============  ===============  ==================================================================

Imports numpy only; torch where a ``.pt`` file is read or written.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.files.documents import read_document
from torch_eplb.files.engines import parse
from torch_eplb.files.expert_map import write_expert_map
from torch_eplb.files.paths import atomic_write, check_target
from torch_eplb.files.pt import write_pt
from torch_eplb.files.recorded import PhysicalMap, RecordedLoad
from torch_eplb.files.trace import MAX_COUNT, Trace, write_trace
from torch_eplb.values.placement import Placement

__all__ = ["TARGETS", "Options", "convert"]

TARGETS = ("trace", "expert-map", "sglang", "vllm", "npy", "csv")
"""What ``--to`` takes."""

_BY_SUFFIX = {".npz": "trace", ".pt": "sglang", ".jsonl": "vllm", ".npy": "npy", ".csv": "csv"}


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        target: one of `TARGETS`; None tells it by the name of the file to write.
        plain: what an array without a name holds; see `torch_eplb.files.engines.PLAIN_KINDS`.
        map_path: the map under which load by slot was counted.
        num_ranks: ranks of a map that does not say.
        num_experts: logical experts, where the file names only those that got tokens.
        num_layers: layers of the model, dense ones included, that a map for SGLang covers.
        first_layer: layers whose id is below this are dropped.
        scale: load is multiplied by this and rounded to whole tokens; None refuses fractions.
        drop_empty_layers: layers without load are dropped.
    """

    target: str | None = None
    plain: str = "load"
    map_path: str | None = None
    num_ranks: int | None = None
    num_experts: int | None = None
    num_layers: int | None = None
    first_layer: int = 0
    scale: float | None = None
    drop_empty_layers: bool = False

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_experts", "num_layers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.first_layer < 0:
            raise ValueError(f"first_layer must not be negative, got {self.first_layer}")
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise ValueError(f"scale must be a finite number above 0, got {self.scale}")


def convert(sources: Sequence[str], out: str, options: Options) -> str:
    """Converts a recording or a map.

    Args:
        sources: the files of one recording, in order, or one map.
        out: the file to write, atomically.
        options: how.

    Returns:
        What was written, in words.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: a file is not what was expected, or cannot become what is asked for.
    """
    check_target(out, "conversion")
    physical_map = None
    if options.map_path is not None:
        found = parse([read_document(options.map_path)], plain="map")
        if not isinstance(found, PhysicalMap):
            raise ValueError(f"{options.map_path}: holds a load; --map takes an expert map")
        physical_map = found
    parsed = parse(
        [read_document(path) for path in sources],
        plain=options.plain,
        num_experts=options.num_experts,
        physical_map=physical_map,
    )
    if isinstance(parsed, RecordedLoad):
        return _convert_load(parsed, out, options, sources[0])
    return _convert_map(parsed, out, options, sources[0])


# ---- load -------------------------------------------------------------------------------------


def _convert_load(load: RecordedLoad, out: str, options: Options, path: str) -> str:
    target = _target(out, options, json_is=None)
    counts = _whole_tokens(load.counts, options.scale, path)
    keep = np.array(load.layer_ids) >= options.first_layer
    notes = [_listed("layers before the first one dropped", load.layer_ids, ~keep)]
    empty = (counts.sum(axis=(0, 1, 3)) == 0) & keep
    if options.drop_empty_layers:
        keep &= ~empty
        notes.append(_listed("layers without load dropped", load.layer_ids, empty))
    else:
        hint = "layers without load (--drop-empty-layers drops them)"
        notes.append(_listed(hint, load.layer_ids, empty))
    if not keep.any():
        raise ValueError(f"{path}: no layer is left; no layer of it has any load")
    counts = counts[:, :, keep]
    ids = [i for i, kept in zip(load.layer_ids, keep, strict=True) if kept]
    if counts.sum(axis=(0, 1), dtype=np.float64).max() > MAX_COUNT:
        raise ValueError(
            f"{path}: an expert's load sums to more than 2**53; pass a --scale below 1"
        )
    writer = _LOAD_WRITERS.get(target)
    if writer is None:
        raise ValueError(f"{path}: holds load, which --to {target} does not take; it takes a map")
    writer(out, counts, {"origin": load.origin, "layer_ids": ids})
    steps, sources, layers, experts = counts.shape
    what = f"{steps} steps x {sources} source ranks x {layers} layers x {experts} experts"
    return _summary(out, what, load.origin, notes)


def _whole_tokens(counts: NDArray[Any], scale: float | None, path: str) -> NDArray[np.int64]:
    values = counts if scale is None else np.rint(counts * float(scale))
    if values.min() < 0 or values.max() > MAX_COUNT:
        bad = values.min() if values.min() < 0 else values.max()
        raise ValueError(f"{path}: load must be token counts from 0 to 2**53, got {bad}")
    if values.dtype.kind == "f" and (values != np.floor(values)).any():
        value = values[values != np.floor(values)][0]
        raise ValueError(
            f"{path}: load must be whole tokens, got {value}; --scale multiplies and rounds "
            "(1 only rounds)"
        )
    return values.astype(np.int64)


def _write_trace(out: str, counts: NDArray[np.int64], meta: dict[str, Any]) -> None:
    width = next(w for w in (np.uint8, np.uint16, np.uint32, np.int64)
                 if counts.max() <= np.iinfo(w).max)  # fmt: skip
    write_trace(out, Trace(counts.astype(width), None, meta))


def _write_sglang_load(out: str, counts: NDArray[np.int64], meta: dict[str, Any]) -> None:
    _write_sglang(out, {"logical_count": counts.sum(axis=1)})


def _write_npy_load(out: str, counts: NDArray[np.int64], meta: dict[str, Any]) -> None:
    _write_npy(out, counts.sum(axis=(0, 1)))


def _write_csv_load(out: str, counts: NDArray[np.int64], meta: dict[str, Any]) -> None:
    _write_csv(out, "expert", meta["layer_ids"], counts.sum(axis=(0, 1)))


_LOAD_WRITERS: dict[str, Callable[[str, NDArray[np.int64], dict[str, Any]], None]] = {
    "trace": _write_trace,
    "sglang": _write_sglang_load,
    "npy": _write_npy_load,
    "csv": _write_csv_load,
}


# ---- maps -------------------------------------------------------------------------------------


def _convert_map(table: PhysicalMap, out: str, options: Options, path: str) -> str:
    target = _target(out, options, json_is="expert-map")
    if target == "trace":
        raise ValueError(f"{path}: holds a map, which --to trace does not take; it takes a load")
    if options.drop_empty_layers or options.scale is not None:
        raise ValueError(f"{path}: holds a map; --drop-empty-layers and --scale are for load")
    keep = np.array(table.layer_ids) >= options.first_layer
    notes = [_listed("layers before the first one dropped", table.layer_ids, ~keep)]
    if not keep.any():
        raise ValueError(f"{path}: no layer is left; its layers are {table.layer_ids}")
    ids = [i for i, kept in zip(table.layer_ids, keep, strict=True) if kept]
    table = replace(table, experts=table.experts[keep], layer_ids=ids)
    placement = _placement(table, options, path, strict=target == "expert-map")
    if target == "expert-map":
        write_expert_map(out, placement, table.layer_ids)
    else:
        rows = placement.experts.reshape(placement.num_layers, -1).astype(np.int64)
        if target == "sglang":
            rows = _all_layers(rows, placement.num_experts, table.layer_ids, options, path)
        _MAP_WRITERS[target](out, rows, ids, placement.num_experts)
    layers, ranks, slots = placement.experts.shape
    what = f"{layers} layers x {ranks} ranks x {slots} slots of {placement.num_experts} experts"
    return _summary(out, what, table.origin, notes)


def _placement(table: PhysicalMap, options: Options, path: str, *, strict: bool) -> Placement:
    ranks = table.num_ranks if options.num_ranks is None else options.num_ranks
    layers, slots = table.experts.shape
    if ranks is None and strict:
        raise ValueError(f"{path}: does not say how many ranks its {slots} slots are on; pass "
                         "--ranks")  # fmt: skip
    ranks = 1 if ranks is None else ranks
    if slots % ranks:
        raise ValueError(f"{path}: {slots} slots do not divide evenly over {ranks} ranks")
    experts = int(table.experts.max()) + 1 if options.num_experts is None else options.num_experts
    shaped = table.experts.reshape(layers, ranks, -1)
    try:
        return Placement(shaped, experts, allow_duplicates=not strict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _all_layers(
    rows: NDArray[np.int64], experts: int, ids: list[int], options: Options, path: str
) -> NDArray[np.int64]:
    """SGLang's maps have a row for every layer, dense ones too: there experts are in order."""
    if options.num_layers is None:
        if ids != list(range(len(ids))):
            raise ValueError(
                f"{path}: its layers are {ids[0]} to {ids[-1]}; SGLang wants a row for every "
                "layer of the model, so pass their number, dense ones included (--layers)"
            )
        return rows
    if ids[-1] >= options.num_layers:
        raise ValueError(f"{path}: has layer {ids[-1]}, and the model {options.num_layers} layers")
    full = np.tile(np.arange(rows.shape[1], dtype=np.int64) % experts, (options.num_layers, 1))
    full[ids] = rows
    return full


def _write_sglang_map(out: str, rows: NDArray[np.int64], ids: list[int], experts: int) -> None:
    _write_sglang(out, {"physical_to_logical_map": rows})


def _write_vllm_map(out: str, rows: NDArray[np.int64], ids: list[int], experts: int) -> None:
    # vLLM numbers MoE layers from 0, whatever the model numbers them.
    record = {
        "record_type": "eplb_initial_mapping",
        "version": 1,
        "num_redundant_experts": rows.shape[1] - experts,
        "num_slots": rows.shape[1],
        "initial_global_assignments": {str(i): row.tolist() for i, row in enumerate(rows)},
    }
    _write_text(out, json.dumps(record) + "\n")


def _write_npy_map(out: str, rows: NDArray[np.int64], ids: list[int], experts: int) -> None:
    _write_npy(out, rows)


def _write_csv_map(out: str, rows: NDArray[np.int64], ids: list[int], experts: int) -> None:
    _write_csv(out, "slot", ids, rows)


_MAP_WRITERS: dict[str, Callable[[str, NDArray[np.int64], list[int], int], None]] = {
    "sglang": _write_sglang_map,
    "vllm": _write_vllm_map,
    "npy": _write_npy_map,
    "csv": _write_csv_map,
}


# ---- files ------------------------------------------------------------------------------------


def _target(out: str, options: Options, json_is: str | None) -> str:
    """The format to write; that of ``.json`` is the caller's, who may have none."""
    if options.target is not None:
        return options.target
    suffixes = {**_BY_SUFFIX, **({".json": json_is} if json_is is not None else {})}
    suffix = os.path.splitext(out)[1].lower()
    if suffix not in suffixes:
        known = ", ".join(suffixes)
        raise ValueError(
            f"{out}: its name does not say which format to write; end it in {known}, or pass --to"
        )
    return suffixes[suffix]


def _write_sglang(out: str, document: dict[str, NDArray[np.int64]]) -> None:
    if out.lower().endswith(".pt"):
        write_pt(out, document)
    elif out.lower().endswith(".json"):
        _write_text(out, json.dumps({key: value.tolist() for key, value in document.items()}))
    else:
        # SGLang tells the format by the name.
        raise ValueError(f"{out}: SGLang reads files named .pt or .json; name it so")


def _write_npy(out: str, array: NDArray[np.int64]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    with atomic_write(out, "npy file") as file:
        file.write(buffer.getvalue())


def _write_csv(out: str, what: str, ids: list[int], array: NDArray[np.int64]) -> None:
    lines = [",".join(["layer", *(f"{what}_{i}" for i in range(array.shape[1]))])]
    lines += [",".join(map(str, [i, *row])) for i, row in zip(ids, array.tolist(), strict=True)]
    _write_text(out, "\n".join(lines) + "\n")


def _write_text(out: str, text: str) -> None:
    with atomic_write(out, "conversion") as file:
        file.write(text.encode())


def _listed(what: str, ids: list[int], which: NDArray[np.bool_]) -> str:
    listed = [str(i) for i, chosen in zip(ids, which, strict=True) if chosen]
    more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
    return f"{what}: {', '.join(listed[:8])}{more}" if listed else ""


def _summary(out: str, what: str, origin: str, notes: list[str]) -> str:
    return "\n".join([f"{out}: {what}, from {origin}", *(note for note in notes if note)])
