"""Recorded load and maps as they are read from other tools, and the checks that all readers share.

Imports numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "EXPECTED",
    "Context",
    "PhysicalMap",
    "RecordedLoad",
    "check_slots",
    "integers",
    "load_of",
    "numbers",
    "to_logical",
]

EXPECTED = (
    "expected one of: a trace or an npz file with load; SGLang's expert distribution (logical_count"
    ", or records with last_physical_to_logical_map) or physical_to_logical_map; vLLM's "
    "expert_load_window with physical_to_logical_map, or its eplb_load_stats lines; vLLM-Ascend's "
    "expert map; MindSpeed-RL's eplb_token_collects; a plain array or csv table [layers, experts]"
)


@dataclass(frozen=True, eq=False)
class RecordedLoad:
    """Load by logical expert.

    Attributes:
        counts: ``[steps, source_ranks, layers, experts]``, numbers as they were found.
        layer_ids: ``[layers]``, the file's number of each layer.
        origin: who wrote it, in words.
    """

    counts: NDArray[Any]
    layer_ids: list[int]
    origin: str


@dataclass(frozen=True, eq=False)
class PhysicalMap:
    """Which logical expert sits in which slot.

    Attributes:
        experts: int64 ``[layers, slots of all ranks]``, by rank.
        num_ranks: ranks, or None where the file does not say.
        layer_ids: ``[layers]``, the file's number of each layer.
        origin: who wrote it, in words.
    """

    experts: NDArray[np.int64]
    num_ranks: int | None
    layer_ids: list[int]
    origin: str


@dataclass(frozen=True)
class Context:
    plain: str
    num_experts: int | None
    physical_map: PhysicalMap | None


def to_logical(
    load: NDArray[Any], physical_map: NDArray[np.int64], num_experts: int | None = None
) -> NDArray[Any]:
    """Load by slot as load by logical expert.

    >>> to_logical(np.array([[[5, 1, 2]]]), np.array([[0, 1, 0]])).tolist()
    [[[7, 1]]]

    Args:
        load: ``[steps, layers, slots of all ranks]``.
        physical_map: ``[layers, slots of all ranks]``; -1 is an empty slot.
        num_experts: logical experts; one more than the largest id by default.

    Returns:
        ``[steps, layers, experts]``.

    Raises:
        ValueError: the map names an expert beyond ``num_experts``.
    """
    largest = int(physical_map.max())
    experts = largest + 1 if num_experts is None else num_experts
    if largest >= experts:
        raise ValueError(f"the map names expert {largest}, there are {experts} (0..{experts - 1})")
    layers = np.broadcast_to(np.arange(len(physical_map))[:, None], physical_map.shape)
    used = physical_map >= 0
    result = np.zeros((*load.shape[:2], experts), dtype=load.dtype)
    index = (slice(None), layers[used], physical_map[used])
    np.add.at(result, index, load[:, used])  # type: ignore[arg-type]
    return result


def load_of(counts: NDArray[Any], origin: str) -> RecordedLoad:
    counts = counts.reshape(-1, 1, *counts.shape[-2:])
    return RecordedLoad(counts, list(range(counts.shape[2])), origin)


def numbers(path: str, name: str, value: Any, ndims: tuple[int, ...]) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.asarray(None)
    if array.dtype.kind not in "iuf" or array.ndim not in ndims or 0 in array.shape:
        shape = f"{array.dtype} of the shape {list(array.shape)}"
        wanted = " or ".join(map(str, ndims))
        raise ValueError(
            f"{path}: {name} is {shape}; it must be numbers in {wanted} dimensions, rows equally "
            f"long; {EXPECTED}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{path}: {name} holds values that are not finite")
    return array


def integers(
    path: str, name: str, value: Any, ndims: tuple[int, ...], *, least: int = 0
) -> NDArray[np.int64]:
    array = numbers(path, name, value, ndims)
    if (array != np.floor(array)).any() or array.min() < least or array.max() >= 2**31:
        raise ValueError(f"{path}: {name} must hold ids of experts, got {array.min()} to "
                         f"{array.max()}")  # fmt: skip
    return array.astype(np.int64)


def check_slots(path: str, load: NDArray[Any], table: NDArray[np.int64]) -> None:
    if load.shape[1:] != table.shape:
        raise ValueError(
            f"{path}: the load has [layers, slots] = {list(load.shape[1:])}, and its "
            f"physical_to_logical_map {list(table.shape)}"
        )
