"""Tables of load and maps without a name of their own: arrays, csv, and dicts of dicts.

Imports numpy only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.files.documents import Document, Table
from torch_eplb.files.recorded import (
    Context,
    PhysicalMap,
    RecordedLoad,
    integers,
    load_of,
    numbers,
    to_logical,
)

__all__ = ["is_collect", "parse_array", "parse_collects", "parse_table"]


def is_collect(value: Any) -> bool:
    """Whether it is ``{layer: {expert: tokens}}``."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(v, Mapping) and str(k).isdigit() for k, v in value.items())
        and all(str(k).isdigit() for v in value.values() for k in v)
    )


def parse_collects(documents: Sequence[Document], num_experts: int | None) -> RecordedLoad:
    tables = [{int(k): v for k, v in document.value.items()} for document in documents]
    ids = sorted({layer for table in tables for layer in table})
    largest = max((int(e) for t in tables for row in t.values() for e in row), default=-1)
    experts = largest + 1 if num_experts is None else num_experts
    if largest >= experts or experts == 0:
        raise ValueError(
            f"{documents[0].path}: names expert {largest}, there are {experts}; pass the number "
            "of logical experts (--experts)"
        )
    counts = np.zeros((1, len(tables), len(ids), experts))
    for rank, table in enumerate(tables):
        for layer, row in table.items():
            for expert, tokens in row.items():
                if isinstance(tokens, bool) or not isinstance(tokens, (int, float)):
                    raise ValueError(
                        f"{documents[rank].path}: layer {layer}, expert {expert} has "
                        f"{tokens!r:.40}, which is no number of tokens"
                    )
                counts[0, rank, ids.index(layer), int(expert)] = tokens
    return RecordedLoad(counts, ids, "MindSpeed-RL eplb_token_collects")


def parse_array(path: str, value: Any, context: Context) -> RecordedLoad | PhysicalMap:
    array = numbers(path, "the array", value, (2, 3, 4))
    if array.ndim == 3 and (array == -1).any():
        return _slot_table(path, array)
    if context.plain == "map":
        table = integers(path, "the map", array, (2, 3))
        ranks = table.shape[1] if table.ndim == 3 else None
        return PhysicalMap(
            table.reshape(len(table), -1), ranks, list(range(len(table))), "table of slots"
        )
    if context.plain == "physical-load":
        return _physical(path, array, context)
    if array.ndim == 4:
        return RecordedLoad(array, list(range(array.shape[2])), "array of counts")
    return load_of(array, "table of load")


def _slot_table(path: str, array: NDArray[Any]) -> PhysicalMap:
    """``[layers, ranks, experts]``: the slot that holds an expert on a rank, -1 for none."""
    table = integers(path, "the table of slots", array, (3,), least=-1)
    layers, ranks, experts = table.shape
    slots = int(table.max()) + 1
    result = np.full((layers, ranks, slots), -1, dtype=np.int64)
    layer, rank, expert = np.nonzero(table >= 0)
    result[layer, rank, table[layer, rank, expert]] = expert
    if (result < 0).any() or (table >= 0).sum() != result.size:
        raise ValueError(
            f"{path}: looks like vLLM-Ascend's table of slots [layers, ranks, experts = {experts}]"
            f" (it has -1), but not every rank has one expert in each of its {slots} slots"
        )
    return PhysicalMap(
        result.reshape(layers, -1), ranks, list(range(layers)), "vLLM-Ascend table of slots"
    )


def _physical(path: str, array: NDArray[Any], context: Context) -> RecordedLoad:
    table = context.physical_map
    if table is None:
        raise ValueError(f"{path}: a load by slot needs the map that it was counted under (--map)")
    layers, slots = table.experts.shape
    if array.shape[-2:] != (layers, slots):
        ranks = table.num_ranks
        if ranks is None or array.shape[-3:] != (layers, ranks, slots // ranks):
            raise ValueError(
                f"{path}: has the shape {list(array.shape)}; under this map it must end in "
                f"[layers, slots] = [{layers}, {slots}], or in [layers, ranks, slots]"
            )
    counts = to_logical(
        array.reshape(-1, layers, slots), table.experts, context.num_experts
    )  # fmt: skip
    return replace(load_of(counts, "load by slot"), layer_ids=table.layer_ids)


def parse_table(path: str, table: Table, context: Context) -> RecordedLoad | PhysicalMap:
    header = table.header or []
    widths = {len(row) for row in table.rows}
    if len(widths) > 1:
        raise ValueError(f"{path}: rows have {min(widths)} to {max(widths)} columns; all need the "
                         "same")  # fmt: skip
    rows = np.array(table.rows)
    columns = [_column(header, names) for names in _LONG]
    if None not in columns and rows.shape[1] >= 3:
        layer, expert, tokens = (rows[:, column] for column in columns)
        by_layer: dict[str, dict[str, float]] = {}
        for i, j, n in zip(layer.astype(int), expert.astype(int), tokens, strict=True):
            if str(j) in by_layer.setdefault(str(i), {}):
                raise ValueError(f"{path}: layer {i}, expert {j} is listed twice")
            by_layer[str(i)][str(j)] = float(n)
        load = parse_collects([Document(path, "csv", by_layer)], context.num_experts)
        return replace(load, origin="csv table of layer, expert and tokens")
    ids = list(range(len(rows)))
    if header and header[0] in _LONG[0]:
        ids, rows = rows[:, 0].astype(int).tolist(), rows[:, 1:]
    parsed = parse_array(path, rows, context)
    return replace(parsed, layer_ids=ids, origin=f"csv {parsed.origin}")


_LONG = (
    ("layer", "layer_id", "layer_idx"),
    ("expert", "expert_id", "expert_idx"),
    ("tokens", "count", "load", "weight", "num_tokens"),
)


def _column(header: list[str], names: Iterable[str]) -> int | None:
    return next((index for index, word in enumerate(header) if word in names), None)
