"""Which of a checkpoint's tensors fill which of a transformers model's, as its own mapping says.

transformers renames and converts what it reads, model by model (`get_model_conversion_mapping`).
Its names are taken over, and of its conversions those that a slot can be read by alone:

    merging a module list on dim 0            one name per expert
    the same, then concatenation on dim 1     several names per expert, one after the other
    ERNIE's, of a list for text and vision    the same, of its first or second half
    concatenation on dim 0                    several names for a tensor that has no experts
    chunks on dim 0                           a part of a tensor, where there are no experts
    transposition, interleaving               inside of each expert
    concatenation on dim 1 of all experts'    one slice of each, one after the other
    all others of one tensor                  of what has no experts, by transformers' own code

Every other one would need more than a slot has, and is refused by name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Change", "Converted", "WholeChange", "converted_names"]


@dataclass(frozen=True)
class Change:
    """What becomes of the values of a tensor: of all, or of some of its entries on dim 0.

    >>> Change(interleaved=1)(torch.tensor([[0, 1, 2, 3]]), (1, 4))
    tensor([[0, 2, 1, 3]])

    Attributes:
        transposed: these two dimensions are.
        only_if_other: unless the shape is the wanted one already.
        interleaved: this dimension is ``[n, 2]`` and becomes ``[2, n]``.
        inverse: the other way round.
    """

    transposed: tuple[int, int] | None = None
    only_if_other: bool = False
    interleaved: int | None = None
    inverse: bool = False

    def __call__(self, value: torch.Tensor, wanted: Sequence[int]) -> torch.Tensor:
        """Values in their new order.

        Args:
            value: as it was saved.
            wanted: shape that is needed, except on dim 0; of as many dimensions.
        """
        if self.transposed is not None:
            if self.only_if_other and tuple(value.shape[1:]) == tuple(wanted[1:]):
                return value
            return value.transpose(*self.transposed)
        dim = self.interleaved
        if dim is None:
            return value
        sizes = (2, -1) if self.inverse else (-1, 2)
        return value.unflatten(dim, sizes).transpose(dim, dim + 1).flatten(dim, dim + 1)


@dataclass(frozen=True)
class WholeChange:
    """What a converter makes of a whole tensor that has no experts.

    Attributes:
        converter: transformers'.
        target: which of its targets is wanted.
        key: the model's name of the first one.
        model: the model.
    """

    converter: Any
    target: int
    key: str
    model: nn.Module

    def __call__(self, value: torch.Tensor, wanted: Sequence[int]) -> torch.Tensor:
        """Its values, in whatever shape that gives."""
        converter = self.converter
        tensors: Any = {converter.source_patterns[0]: [value]}
        for operation in converter.operations:
            tensors = operation.convert(
                tensors,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=self.key,
                model=self.model,
                config=self.model.config,
                missing_keys=None,
            )
        result = tensors[converter.target_patterns[self.target]]
        return result[0] if isinstance(result, list) else result


@dataclass(frozen=True)
class Converted:
    """What fills one of the model's tensors.

    Attributes:
        rows: names of the tensors that fill it one after the other on dim 0; one such list per
            expert if ``by_expert``, else a single list, for the tensor as it is saved.
        by_expert: whether the checkpoint has a tensor of its own for every expert.
        refused: why these names cannot be read so, or None where they can.
        part: ``(i, n)``, of the tensor as it is saved only part i of n on dim 0.
        change: what becomes of its values.
    """

    rows: list[list[str]]
    by_expert: bool = False
    refused: str | None = None
    part: tuple[int, int] | None = None
    change: Change | WholeChange | None = None

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
    which: dict[str, tuple[int, str]] = {}  # of a converter's targets, and the first one
    # In natural order, because a module list is merged in the order in which it is read.
    for name in sorted(names, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, keys)
        if key not in tensors and name in tensors:
            key, pattern = name, None
        for index, target in enumerate(_targets(key, by_pattern.get(pattern or ""))):
            if target in tensors:
                found.setdefault(target, {}).setdefault(pattern, []).append(name)
                which[target] = index, key
    return {
        key: _convert(model, by_pattern, pieces, sizes.get(key), *which[key])
        for key, pieces in found.items()
    }


def _targets(key: str, converter: Any) -> list[str]:
    """All that a converter makes, where its first is ``key``."""
    if converter is None:
        return [key]
    first, *others = converter.target_patterns
    return [key, *(key.replace(first, other) for other in others if first in key)]


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
    model: nn.Module,
    by_pattern: Mapping[str, Any],
    pieces: Mapping[str | None, list[str]],
    sizes: tuple[int, ...] | None,
    target: int,
    first: str,
) -> Converted:
    """What one tensor is filled by.

    Args:
        model: the model.
        by_pattern: transformers' converters.
        pieces: by the pattern that chose them, or None without a converter, the names.
        sizes: entries on dim 0 that a checkpoint may have, if the tensor is indexed by expert.
        target: which of the converter's targets it is.
        first: the first of these.
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
    absent = [pattern for pattern in converter.source_patterns if pattern not in pieces]
    num_targets = len(converter.target_patterns)
    if sizes is None and operations == [("Chunk", 0)] and len(everything) == 1:
        return Converted([everything], part=(target, num_targets))
    change = _change(converter, sizes is not None)
    if change is not None and len(everything) == 1:
        return Converted([everything], change=change)
    if sizes is None and len(everything) == len(converter.source_patterns) == 1:
        return Converted([everything], change=WholeChange(converter, target, first, model))
    if sizes is not None and operations == [("Concatenate", 1)] and not absent:
        if len(everything) == len(converter.source_patterns) and num_targets == 1:
            return Converted([[pieces[pattern][0] for pattern in converter.source_patterns]])
    parts = [pieces[pattern] for pattern in converter.source_patterns if pattern in pieces]
    merged = operations[:1] == [("MergeModulelist", 0)]
    if sizes is not None and _splits_lists(converter):
        each = [-(-len(part) // num_targets) for part in parts]
        parts = [part[n * target : n * (target + 1)] for part, n in zip(parts, each, strict=True)]
        operations, num_targets, merged = [], 1, True
    allowed = (
        operations == [("Concatenate", 0)]
        if sizes is None
        else merged and operations[1:] in ([], [("Concatenate", 1)])
    )
    if not allowed or num_targets > 1:
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


def _change(converter: Any, by_expert: bool) -> Change | None:
    """What a converter of one operation and one target does to values, inside of each expert."""
    if len(converter.operations) != 1 or len(converter.target_patterns) != 1:
        return None
    (operation,) = converter.operations
    kind = type(operation).__name__
    if kind == "Transpose":
        change = Change((operation.dim0, operation.dim1), bool(operation.check_dims))
        dims: tuple[int, ...] = (operation.dim0, operation.dim1)
    elif kind == "Interleave":
        change = Change(interleaved=operation.dim, inverse=bool(operation.inverse))
        dims = (operation.dim,)
    else:
        return None
    least = 1 if by_expert else 0
    return change if all(dim >= least for dim in dims) else None


def _splits_lists(converter: Any) -> bool:
    """ERNIE's: a list of text's experts, then vision's; stacked, then concatenated on dim 1."""
    operations = [
        (type(o).__name__, getattr(o, "stack_dim", None), getattr(o, "concat_dim", None))
        for o in converter.operations
    ]
    return operations == [("ErnieFuseAndSplitTextVisionExperts", 0, 1)]
