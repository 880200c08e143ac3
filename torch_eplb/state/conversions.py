"""Which of a checkpoint's tensors fill which of a transformers model's, as its own mapping says.

transformers renames and converts what it reads, model by model (`get_model_conversion_mapping`).
Its names are taken over, and of its conversions those that a slot can be read by alone:

    merging a module list on dim 0            one name per expert
    the same, then concatenation on dim 1     several names per expert, one after the other
    concatenation on dim 0                    several names for a tensor that has no experts

Every other one permutes, splits or transposes values, and is refused by name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Converted", "converted_names"]


@dataclass(frozen=True)
class Converted:
    """What fills one of the model's tensors.

    Attributes:
        rows: names of the tensors that fill it one after the other on dim 0; one such list per
            expert if ``by_expert``, else a single list, for the tensor as it is saved.
        by_expert: whether the checkpoint has a tensor of its own for every expert.
        refused: why these names cannot be read so, or None where they can.
    """

    rows: list[list[str]]
    by_expert: bool = False
    refused: str | None = None

    def row(self, expert: int | None) -> list[str]:
        return self.rows[expert] if self.by_expert and expert is not None else self.rows[0]

    @property
    def names(self) -> set[str]:
        return {name for row in self.rows for name in row}


def converted_names(
    model: nn.Module,
    names: Iterable[str],
    tensors: Mapping[str, torch.Tensor],
    sizes: Mapping[str, tuple[int, ...]],
) -> dict[str, Converted]:
    """What fills each of the model's tensors that its conversion mapping finds among ``names``.

    Args:
        model: any module; one that is no model of transformers has no mapping.
        names: the checkpoint's tensors.
        tensors: the model's, by key.
        sizes: of those that are indexed by expert, the numbers of entries that a checkpoint
            may have: the experts, or with unused ones after them.
    """
    mapping = _mapping(model)
    if not mapping:
        return {}
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix, keys = getattr(model, "base_model_prefix", ""), dict(tensors)
    found: dict[str, dict[str | None, list[str]]] = {}
    # In natural order, because a module list is merged in the order in which it is read.
    for name in sorted(names, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, keys)
        if key not in tensors and name in tensors:
            key, pattern = name, None
        if key in tensors:
            found.setdefault(key, {}).setdefault(pattern, []).append(name)
    return {key: _convert(by_pattern, pieces, sizes.get(key)) for key, pieces in found.items()}


def _mapping(model: nn.Module) -> list[Any]:
    """The model's conversion mapping, made anew: entries remember the names that they have seen."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return []
    return list(get_model_conversion_mapping(model))


def _convert(
    by_pattern: Mapping[str, Any],
    pieces: Mapping[str | None, list[str]],
    sizes: tuple[int, ...] | None,
) -> Converted:
    """What one tensor is filled by.

    Args:
        by_pattern: transformers' converters.
        pieces: by the pattern that chose them, or None without a converter, the names.
        sizes: entries on dim 0 that a checkpoint may have, if the tensor is indexed by expert.
    """
    everything = [name for row in pieces.values() for name in row]
    if (len(pieces) > 1 and None in pieces) or len(pieces.get(None, ())) > 1:
        return Converted(
            [everything], refused=f"{len(everything)} tensors fill it, {everything[0]} among them"
        )
    if None in pieces:
        return Converted([everything])
    converter = by_pattern[next(pattern for pattern in pieces if pattern is not None)]
    operations = [
        (type(operation).__name__, getattr(operation, "dim", None))
        for operation in converter.operations
    ]
    parts = [pieces[pattern] for pattern in converter.source_patterns if pattern in pieces]
    absent = [pattern for pattern in converter.source_patterns if pattern not in pieces]
    merged = operations[:1] == [("MergeModulelist", 0)]
    allowed = (
        operations == [("Concatenate", 0)]
        if sizes is None
        else merged and operations[1:] in ([], [("Concatenate", 1)])
    )
    if not allowed or len(converter.target_patterns) > 1:
        told = " and ".join(
            name if dim is None else f"{name} on dim {dim}" for name, dim in operations
        )
        return Converted(
            [everything],
            refused=f"transformers makes it of {everything[0]} by {told}, which is not read in "
            "parts: load the model with from_pretrained before it is wrapped",
        )
    if absent:
        return Converted(
            [everything], refused=f"the checkpoint has {everything[0]} and no {absent[0]}"
        )
    if sizes is None:
        return Converted([[name for part in parts for name in part]])
    counts = {len(part) for part in parts}
    if len(counts) > 1 or not counts <= set(sizes):
        return Converted(
            [everything],
            refused=f"it has {sizes[0]} experts, and the checkpoint "
            f"{', '.join(str(count) for count in sorted(counts))} tensors like {everything[0]}",
        )
    return Converted([list(row) for row in zip(*parts, strict=True)], by_expert=True)
