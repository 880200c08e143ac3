"""`load_pretrained`: a safetensors checkpoint into a wrapped model, this rank's slots only.

names   which of the checkpoint's tensors fill which part of which of the model's tensors, for
        all experts, so that what is missing or unknown is found before anything is written:
        as ``names=`` says, else the model's conversion mapping, else as usual
plan    of these, what this rank's slots need; shapes and dtypes compared
read    file after file, straight into live tensors
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch

from torch_eplb.files.paths import PathLike
from torch_eplb.state.conversions import Change, Converted, WholeChange, converted_names
from torch_eplb.state.full import ExpertTensor, expert_lists, expert_tensors
from torch_eplb.state.materialize import materialize
from torch_eplb.state.safetensor_files import Checkpoint, Reading
from torch_eplb.state.weight_names import NameRule, usual_names
from torch_eplb.state.wrapped import Wrapped, engines_of, gather_from_all
from torch_eplb.values.errors import EPLBError

__all__ = ["load_pretrained"]

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CONVERTIBLE = {"F64", "F32", "F16", "BF16"}


def load_pretrained(
    model: Wrapped,
    folder: PathLike,
    *,
    names: NameRule | None = None,
    strict: bool = True,
) -> None:
    """Load a folder of safetensors into a wrapped model; of the experts, this rank's slots only.

    A model on the meta device gets its memory here, on the device that the group's backend
    serves, so that no rank ever holds more than its share:

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model = torch_eplb.wrap(model, num_redundant_experts=16)
        torch_eplb.load_pretrained(model, folder)

    Peak host memory is that share (on the host) plus 16 MiB of mapped files, or the largest single
    tensor read (twice, if its mapping converts it), where that is more. A model that has its
    weights is overwritten in place, every replica, after a round of transfers in flight has been
    brought to its end.

    Collective. Missing and unknown keys, shapes and dtypes are compared on all ranks before
    anything is written. Values are converted between floating dtypes of 16 bits and more.

    Args:
        model: the wrapped model.
        folder: has ``model.safetensors``, or ``model.safetensors.index.json`` and the files that it
            names.
        names: how the checkpoint calls its tensors, ``names(key, expert)``, where it calls them
            neither as the model does, nor as transformers' conversion mapping of the model says,
            nor as usual (`torch_eplb.state.weight_names`).
        strict: refuse tensors of the checkpoint that the model does not have. Missing ones are
            always refused.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the folder or a file is missing or unreadable.
        ValueError: no checkpoint in the folder, or a malformed one.
        RuntimeError: keys, shapes or dtypes do not fit, or a buffer cannot be computed. Or, found
            only when the model is written already: tied tensors have different values.
        PeerLostError: a rank did not come within ``timeout``.
    """
    balancer = model
    # First, because which slots are to be read is settled only when nothing moves any more.
    for engine in engines_of(balancer):
        engine.settle()
    items: list[Reading] = []
    checkpoint, error = None, None
    try:
        checkpoint = Checkpoint(folder)
        items = _plan(balancer, checkpoint, names, strict)
    except (ImportError, OSError, ValueError, RuntimeError) as found:
        if isinstance(found, EPLBError):
            raise
        error = found
    _agree(balancer, error)
    assert checkpoint is not None
    materialize(balancer.module, balancer.engine.comm.device)
    tensors = _tensors(balancer)
    written: dict[int, str] = {}
    again = []
    with torch.no_grad():
        for item, value in checkpoint.read(items):
            target = tensors[item.key].detach()
            if item.slot is not None:
                target = target[item.slot]
            elif written.setdefault(id(tensors[item.key]), item.key) != item.key:
                again.append(item)
                continue
            if item.rows is not None:
                target = target[item.rows]
            target.copy_(_changed(item, value, target))
        for item, value in checkpoint.read(again):
            target = tensors[item.key].detach()
            part = target if item.rows is None else target[item.rows]
            if not torch.equal(part, _changed(item, value, part).to(part)):
                raise RuntimeError(
                    f"{written[id(tensors[item.key])]} and {item.key} are one tensor in the model, "
                    "and the checkpoint has different values for them; build the model with the "
                    "two untied (transformers: tie_word_embeddings=False)"
                )


def _changed(item: Reading, value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What was read, as the target has it; of all experts' tensor one entry was read."""
    if item.change is not None:
        value = item.change(value, target.shape if item.slot is None else (1, *target.shape))
    return value.reshape(target.shape)


def _tensors(balancer: Wrapped) -> dict[str, torch.Tensor]:
    """The model's own tensors in this rank's memory, by key."""
    state = balancer.module.state_dict(keep_vars=True)
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def _unwrapped(balancer: Wrapped) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """The same as the unwrapped model has it, where experts are held one by one.

    Returns:
        By the unwrapped model's key a tensor, of an expert's own one without values; and of each of
        the latter the keys of the slots here that hold the expert, which may be none.
    """
    local = _tensors(balancer)
    lists = expert_lists(balancer, local)
    tensors = {key: value for key, value in local.items() if key not in lists}
    slots: dict[str, list[str]] = {}
    made: dict[tuple[int, int], torch.Tensor] = {}  # one of several keys, as the entries are
    for keys, tensor in dict(lists.values()).items():
        for expert in range(tensor.full_size):
            entry = torch.empty_like(tensor.part.tensors[0], device="meta")
            tensors[keys.of(expert)] = made.setdefault((id(tensor.part), expert), entry)
            held = enumerate(tensor.held)
            slots[keys.of(expert)] = [keys.of(slot) for slot, here in held if here == expert]
    return tensors, slots


def _plan(
    balancer: Wrapped, checkpoint: Checkpoint, names: NameRule | None, strict: bool
) -> list[Reading]:
    """What this rank has to read.

    Raises:
        RuntimeError: keys, shapes or dtypes do not fit.
    """
    tensors, slots = _unwrapped(balancer)
    converted = converted_names(
        balancer.module,
        checkpoint.files,
        tensors,
        {
            key: (tensor.num_experts, tensor.full_size)
            for key, tensor in expert_tensors(balancer, tensors).items()
        },
    )
    sources, missing = _find_sources(balancer, tensors, checkpoint, names, converted)
    tie: Any = getattr(balancer.module, "tie_weights", None)
    if missing and callable(tie):
        # On the meta device a model may not have tied them yet.
        tie()
        tensors, slots = _unwrapped(balancer)
        sources, missing = _find_sources(balancer, tensors, checkpoint, names, converted)
    problems = list(missing)
    problems += _unsaved_experts(balancer, _tensors(balancer))
    if strict:
        used = {
            name for by_expert in sources.values() for row in by_expert.values() for name in row
        }
        # With those of unused entries, and of what is refused for another reason.
        for entry in converted.values():
            if entry.refused or not entry.names.isdisjoint(used):
                used |= entry.names
        ignored = getattr(balancer.module, "_keys_to_ignore_on_load_unexpected", None) or ()
        problems += [
            f"unknown: {name}"
            for name in checkpoint.files
            if name not in used and not any(re.search(pattern, name) for pattern in ignored)
        ]
    _refuse(balancer, problems)
    experts = expert_tensors(balancer, tensors)
    items: list[Reading] = []
    wanted: list[tuple[str, Reading, int | None]] = []
    for key in sources:
        if key in experts:
            held = enumerate(experts[key].held)
            wanted += [(key, Reading("", key, slot), expert) for slot, expert in held]
        else:
            wanted += [(key, Reading("", own, None), None) for own in slots.get(key, [key])]
    shapes = checkpoint.describe(
        {name for key, _, expert in wanted for name in sources[key][expert]}
    )
    for key, blank, expert in wanted:
        problems += _add_items(
            items,
            blank,
            expert,
            sources[key][expert],
            tensors[key],
            experts.get(key),
            shapes,
            _used_conversion(converted.get(key), sources[key][expert]),
        )
    _refuse(balancer, list(dict.fromkeys(problems)))
    return items


def _find_sources(
    balancer: Wrapped,
    tensors: Mapping[str, torch.Tensor],
    checkpoint: Checkpoint,
    names: NameRule | None,
    converted: Mapping[str, Converted],
) -> tuple[dict[str, dict[int | None, list[str]]], list[str]]:
    """By the model's key and the expert (None without), the checkpoint's names; what is missing."""
    experts = expert_tensors(balancer, tensors)
    sources: dict[str, dict[int | None, list[str]]] = {}
    missing: dict[str, str] = {}
    for key in tensors:
        split = key in experts and not _transposed(experts[key])
        ids = range(experts[key].num_experts) if key in experts else [None]
        found: dict[int | None, list[str]] = {}
        for expert in ids:
            row = _first_held(key, expert, split, checkpoint, names, converted.get(key))
            if row is None and key in converted and converted[key].refused:
                missing[key] = f"not converted: {key}: {converted[key].refused}"
                break
            if row is None:
                tried = [list(r) for r in usual_names(key, expert if split else None)]
                missing[key] = f"missing: {key}"
                missing[key] += f", expert {expert}" if expert is not None else ""
                if tried:
                    missing[key] += f" (nor {' + '.join(tried[0])})"
                break
            found[expert] = row
        else:
            sources[key] = found
    # A tensor of several keys needs one of them.
    held = {id(tensors[key]) for key in sources}
    return sources, [text for key, text in missing.items() if id(tensors[key]) not in held]


def _used_conversion(converted: Converted | None, row: list[str]) -> Converted | None:
    """The conversion of a key, unless ``names=`` has told other names for it."""
    return converted if converted is not None and converted.names.issuperset(row) else None


def _first_held(
    key: str,
    expert: int | None,
    split: bool,
    checkpoint: Checkpoint,
    names: NameRule | None,
    converted: Converted | None,
) -> list[str] | None:
    if names is not None:
        chosen = names(key, expert)
        if chosen is not None:
            return list(chosen) if all(name in checkpoint.files for name in chosen) else None
    if converted is not None:
        # Before the model's own name, under which a checkpoint may have other values.
        return None if converted.refused else converted.row(expert)
    if key in checkpoint.files:
        return [key]
    for row in usual_names(key, expert if split else None):
        if all(name in checkpoint.files for name in row):
            return list(row)
    return None


def _transposed(tensor: ExpertTensor) -> bool:
    """Whether the module keeps its experts transposed, so that pieces do not stack on dim 0."""
    return bool(getattr(tensor.engine.layers[tensor.layer].module, "is_transposed", False))


def _unsaved_experts(balancer: Wrapped, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    saved = {id(tensor) for tensor in tensors.values()}
    return [
        f"{layer.name}.{name} is indexed by expert and on the meta device, but not part of the "
        "state dict (persistent=False): it cannot be loaded"
        for engine in engines_of(balancer)
        for layer in engine.layers
        for name, tensor in layer.named_tensors()
        if tensor.is_meta and id(tensor) not in saved
    ]


def _add_items(
    items: list[Reading],
    blank: Reading,
    expert: int | None,
    row: list[str],
    tensor: torch.Tensor,
    indexed: ExpertTensor | None,
    shapes: Mapping[str, tuple[tuple[int, ...], str]],
    converted: Converted | None,
) -> list[str]:
    """Add what fills ``blank``'s key, or its slot of it, and say what does not fit."""
    problems = []
    key = blank.key
    for name in row:
        dtype, wanted = shapes[name][1], _DTYPES.get(tensor.dtype, str(tensor.dtype))
        if dtype != wanted and not {dtype, wanted} <= _CONVERTIBLE:
            problems.append(f"dtype: {name} has {dtype}, {key} needs {wanted}")
    first = shapes[row[0]][0]
    target = tuple(tensor.shape if indexed is None else tensor.shape[1:])
    if len(row) == 1:
        whole = tuple(indexed.full_shape) if indexed is not None else target
        change = converted.change if converted is not None else None
        made: tuple[int, ...] | None = first
        entries = None
        if change is not None:
            made = _made(change, first, whole)
        if indexed is not None and made == whole:
            each = first[0] // indexed.full_size
            entries = slice((expert or 0) * each, ((expert or 0) + 1) * each)
        elif converted is not None and converted.part is not None and first and target:
            index, parts = converted.part
            made = (first[0] // parts, *first[1:]) if first[0] % parts == 0 else None
            entries = slice(index * target[0], (index + 1) * target[0])
        if made != whole and (made != target or change is not None):
            problems.append(f"shape: {row[0]} has {first}, {key} needs {whole}")
        items.append(dataclasses.replace(blank, name=row[0], entries=entries, change=change))
        return problems
    start = 0
    for name in row:
        shape, entries = shapes[name][0], None
        if indexed is not None and shape[:1] == (indexed.full_size,) and len(shape) > len(target):
            shape, entries = shape[1:], slice(expert or 0, (expert or 0) + 1)
        if not target or shape[1:] != target[1:] or not shape:
            problems.append(f"shape: {name} has {shape}, an expert of {key} needs {target}")
            return problems
        rows = slice(start, start + shape[0])
        items.append(dataclasses.replace(blank, name=name, rows=rows, entries=entries))
        start += shape[0]
    if start != target[0]:
        problems.append(f"shape: {' + '.join(row)} have {start} rows, {key} needs {target[0]}")
    return problems


def _made(
    change: Change | WholeChange, shape: tuple[int, ...], whole: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The shape that a change makes of a tensor of this one; None where it cannot be made."""
    if isinstance(change, Change) and len(shape) != len(whole):
        return None
    try:
        return tuple(change(torch.empty(shape, device="meta"), whole).shape)
    except Exception:  # transformers' code, or torch's, on what does not fit
        return None


def _refuse(balancer: Wrapped, problems: list[str]) -> None:
    if not problems:
        return
    shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
    raise RuntimeError(
        f"the checkpoint does not fit {type(balancer.module).__name__}; nothing was loaded (tell "
        "other names with names=, and let strict=False ignore unknown ones):\n\t"
        + "\n\t".join(shown)
    )


def _agree(balancer: Wrapped, error: Exception | None) -> None:
    """Raise this rank's error, or that another rank has one, before anything is written."""
    everyone = gather_from_all(balancer, error and str(error))
    if error is not None:
        raise error
    failed = [f"rank {rank}: {text}" for rank, text in everyone.items() if text]
    if failed:
        raise RuntimeError("the checkpoint cannot be loaded, because of " + "; ".join(failed))
