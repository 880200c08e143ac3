"""`load_pretrained`: a safetensors checkpoint into a wrapped model, this rank's slots only.

names   which of the checkpoint's tensors fill which part of which of the model's tensors, for
        all experts, so that what is missing or unknown is found before anything is written
plan    of these, what this rank's slots need; shapes and dtypes compared
read    file after file, straight into live tensors
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from torch_eplb.checkpoint import ExpertTensor, expert_tensors
from torch_eplb.errors import EPLBError
from torch_eplb.files import PathLike, open_checked
from torch_eplb.materialize import materialize
from torch_eplb.weight_names import NameRule, usual_names

if TYPE_CHECKING:
    from torch_eplb.balancer import ExpertLoadBalancer

__all__ = ["load_pretrained"]

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_INDEX_BYTES = 128 * 2**20
"""Largest index that is parsed: 61 layers x 256 experts x 3 tensors take about 6 MiB."""
REOPEN_BYTES = 16 * 2**20
"""A file is opened anew after this much, because what was read of it stays mapped meanwhile."""
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
    model: ExpertLoadBalancer,
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
    tensor read, where that is more. A model that has its weights is overwritten in place, every
    replica, after a round of transfers in flight has been brought to its end.

    Collective. Missing and unknown keys, shapes and dtypes are compared on all ranks before
    anything is written. Values are converted between floating dtypes of 16 bits and more.

    Args:
        model: the wrapped model.
        folder: has ``model.safetensors``, or ``model.safetensors.index.json`` and the files that it
            names.
        names: how the checkpoint calls its tensors, ``names(key, expert)``, where it calls them
            neither as the model does nor as usual (`torch_eplb.weight_names`).
        strict: refuse tensors of the checkpoint that the model does not have. Missing ones are
            always refused.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the folder or a file is missing or unreadable.
        ValueError: no checkpoint in the folder, or a malformed one.
        RuntimeError: keys, shapes or dtypes do not fit, or a buffer cannot be computed. Or,
            found only when the model is written already: tied tensors have different values.
        PeerLostError: a rank did not come within ``timeout``.
    """
    balancer = model
    # First, because which slots are to be read is settled only when nothing moves any more.
    balancer._drain()
    items: list[_Item] = []
    checkpoint, error = None, None
    try:
        checkpoint = _Checkpoint(folder)
        items = _plan(balancer, checkpoint, names, strict)
    except (ImportError, OSError, ValueError, RuntimeError) as found:
        if isinstance(found, EPLBError):
            raise
        error = found
    _agree(balancer, error)
    assert checkpoint is not None
    materialize(balancer.module, balancer._planes.device)
    tensors = _tensors(balancer)
    written: dict[int, str] = {}
    again = []
    with torch.no_grad():
        for item, value in checkpoint.read(items):
            target = tensors[item.key].detach()
            if item.slot is not None:
                target = target[item.slot]
                value = value[0] if item.fused else value
            elif written.setdefault(id(tensors[item.key]), item.key) != item.key:
                again.append(item)
                continue
            if item.rows is not None:
                target = target[item.rows]
            target.copy_(value)
        for item, value in checkpoint.read(again):
            target = tensors[item.key].detach()
            part = target if item.rows is None else target[item.rows]
            if not torch.equal(part, value.to(part)):
                raise RuntimeError(
                    f"{written[id(tensors[item.key])]} and {item.key} are one tensor in the model, "
                    "and the checkpoint has different values for them; build the model with the "
                    "two untied (transformers: tie_word_embeddings=False)"
                )


@dataclass(frozen=True)
class _Item:
    """One reading.

    Attributes:
        name: the checkpoint's tensor.
        key: the model's.
        slot: the local slot that it fills, or None where the tensor has no slots.
        rows: the part of the slot that it fills, on dim 0; None is all.
        expert: the logical expert in the slot.
        fused: the checkpoint's tensor has all experts.
    """

    name: str
    key: str
    slot: int | None = None
    rows: slice | None = None
    expert: int = 0
    fused: bool = False


class _Checkpoint:
    """The safetensors files of a folder.

    Attributes:
        files: path of the file of every tensor.
    """

    def __init__(self, folder: PathLike) -> None:
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise ImportError(
                "torch_eplb.load_pretrained needs safetensors: pip install 'torch-eplb[pretrained]'"
            ) from error
        self._open: Any = safe_open
        folder = os.fspath(folder)
        if not os.path.isdir(folder):
            raise FileNotFoundError(
                f"{folder}: is not a folder; name the folder of a checkpoint (one from a hub must "
                "be downloaded first)"
            )
        index, single = os.path.join(folder, _INDEX), os.path.join(folder, _SINGLE)
        if os.path.exists(index):
            self.files = _read_index(index)
        elif os.path.exists(single):
            with self._file(single) as file:
                self.files = dict.fromkeys(file.keys(), single)
        else:
            raise ValueError(
                f"{folder}: has neither {_INDEX} nor {_SINGLE}; convert the checkpoint to "
                "safetensors, as model.save_pretrained does"
            )

    def describe(self, names: set[str]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of tensors, without reading them."""
        result = {}
        for path, group in self._by_file(sorted(names)):
            with self._file(path) as file:
                held = set(file.keys())
                for name in group:
                    if name not in held:
                        raise ValueError(
                            f"{path}: has no tensor {name}, which {_INDEX} says it has; the "
                            "checkpoint is incomplete or mixed up, fetch it again"
                        )
                    part = file.get_slice(name)
                    result[name] = (tuple(part.get_shape()), str(part.get_dtype()))
        return result

    def read(self, items: list[_Item]) -> Iterator[tuple[_Item, torch.Tensor]]:
        """The values, file after file; good until the next one is asked for."""
        by_name: dict[str, list[_Item]] = {}
        for item in items:
            by_name.setdefault(item.name, []).append(item)
        for path, group in self._by_file(sorted(by_name)):
            waiting = deque(item for name in group for item in by_name[name])
            while waiting:
                with self._file(path) as file:
                    nbytes = 0
                    while waiting and nbytes < REOPEN_BYTES:
                        item = waiting.popleft()
                        if item.fused:
                            part = file.get_slice(item.name)
                            value = part[item.expert : item.expert + 1]
                        else:
                            value = file.get_tensor(item.name)
                        nbytes += value.nbytes
                        yield item, value
                        del value

    def _by_file(self, names: list[str]) -> Iterator[tuple[str, list[str]]]:
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self.files[name], []).append(name)
        yield from sorted(groups.items())

    def _file(self, path: str) -> Any:
        from safetensors import SafetensorError

        try:
            return self._open(path, framework="pt", device="cpu")
        except SafetensorError as error:
            raise ValueError(
                f"{path}: is no whole safetensors file ({error}); fetch it again"
            ) from None


def _read_index(path: str) -> dict[str, str]:
    with open_checked(path, "checkpoint's index", MAX_INDEX_BYTES) as file:
        data = file.read(MAX_INDEX_BYTES)
    try:
        names = json.loads(data)["weight_map"]
        files = {str(name): str(file) for name, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: is no index of a checkpoint ({error!r}); fetch it again"
        ) from None
    folder = os.path.dirname(path)
    for name in set(files.values()):
        if os.path.basename(name) != name or name in ("", ".", ".."):
            raise ValueError(f"{path}: names the file {name!r}, which is not in its folder")
        if not os.path.exists(os.path.join(folder, name)):
            raise FileNotFoundError(
                f"{os.path.join(folder, name)}: is missing, and {_INDEX} names it; the checkpoint "
                "is incomplete, fetch it again"
            )
    return {name: os.path.join(folder, file) for name, file in files.items()}


def _tensors(balancer: ExpertLoadBalancer) -> dict[str, torch.Tensor]:
    """The model's own tensors in this rank's memory, by key."""
    state = balancer.module.state_dict(keep_vars=True)
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def _plan(
    balancer: ExpertLoadBalancer, checkpoint: _Checkpoint, names: NameRule | None, strict: bool
) -> list[_Item]:
    """What this rank has to read.

    Raises:
        RuntimeError: keys, shapes or dtypes do not fit.
    """
    tensors = _tensors(balancer)
    sources, missing = _find_sources(balancer, tensors, checkpoint, names)
    tie: Any = getattr(balancer.module, "tie_weights", None)
    if missing and callable(tie):
        # On the meta device a model may not have tied them yet.
        tie()
        tensors = _tensors(balancer)
        sources, missing = _find_sources(balancer, tensors, checkpoint, names)
    problems = [f"missing: {text}" for text in missing]
    problems += _unsaved_experts(balancer, tensors)
    if strict:
        used = {
            name for by_expert in sources.values() for row in by_expert.values() for name in row
        }
        ignored = getattr(balancer.module, "_keys_to_ignore_on_load_unexpected", None) or ()
        problems += [
            f"unknown: {name}"
            for name in checkpoint.files
            if name not in used and not any(re.search(pattern, name) for pattern in ignored)
        ]
    _refuse(balancer, checkpoint, problems)
    experts = expert_tensors(balancer, tensors)
    items: list[_Item] = []
    wanted: list[tuple[str, int | None, int | None]] = []
    rank = balancer._planes.rank
    for key in sources:
        if key in experts:
            held = balancer._migration.experts[experts[key].layer, rank].tolist()
            wanted += [(key, slot, expert) for slot, expert in enumerate(held)]
        else:
            wanted.append((key, None, None))
    shapes = checkpoint.describe(
        {name for key, _, expert in wanted for name in sources[key][expert]}
    )
    for key, slot, expert in wanted:
        problems += _add_items(
            items, key, slot, expert, sources[key][expert], tensors[key], experts.get(key), shapes
        )
    _refuse(balancer, checkpoint, list(dict.fromkeys(problems)))
    return items


def _find_sources(
    balancer: ExpertLoadBalancer,
    tensors: Mapping[str, torch.Tensor],
    checkpoint: _Checkpoint,
    names: NameRule | None,
) -> tuple[dict[str, dict[int | None, list[str]]], list[str]]:
    """By the model's key and the expert (None without), the checkpoint's names; what is missing."""
    experts = expert_tensors(balancer, tensors)
    sources: dict[str, dict[int | None, list[str]]] = {}
    missing: dict[str, str] = {}
    for key in tensors:
        split = key in experts and not _transposed(balancer, experts[key])
        ids = range(experts[key].num_experts) if key in experts else [None]
        found: dict[int | None, list[str]] = {}
        for expert in ids:
            row = _first_held(key, expert, split, checkpoint, names)
            if row is None:
                tried = [list(r) for r in usual_names(key, expert if split else None)]
                missing[key] = f"{key}" + (f", expert {expert}" if expert is not None else "")
                if tried:
                    missing[key] += f" (nor {' + '.join(tried[0])})"
                break
            found[expert] = row
        else:
            sources[key] = found
    # A tensor of several keys needs one of them.
    held = {id(tensors[key]) for key in sources}
    return sources, [text for key, text in missing.items() if id(tensors[key]) not in held]


def _first_held(
    key: str, expert: int | None, split: bool, checkpoint: _Checkpoint, names: NameRule | None
) -> list[str] | None:
    if names is not None:
        chosen = names(key, expert)
        if chosen is not None:
            return list(chosen) if all(name in checkpoint.files for name in chosen) else None
    if key in checkpoint.files:
        return [key]
    for row in usual_names(key, expert if split else None):
        if all(name in checkpoint.files for name in row):
            return list(row)
    return None


def _transposed(balancer: ExpertLoadBalancer, tensor: ExpertTensor) -> bool:
    """Whether the module keeps its experts transposed, so that pieces do not stack on dim 0."""
    return bool(getattr(balancer._layers[tensor.layer].module, "is_transposed", False))


def _unsaved_experts(
    balancer: ExpertLoadBalancer, tensors: Mapping[str, torch.Tensor]
) -> list[str]:
    saved = {id(tensor) for tensor in tensors.values()}
    return [
        f"{layer.name}.{name} is indexed by expert and on the meta device, but not part of the "
        "state dict (persistent=False): it cannot be loaded"
        for layer in balancer._layers
        for name, tensor in zip(layer.tensor_names, layer.tensors(), strict=True)
        if tensor.is_meta and id(tensor) not in saved
    ]


def _add_items(
    items: list[_Item],
    key: str,
    slot: int | None,
    expert: int | None,
    row: list[str],
    tensor: torch.Tensor,
    indexed: ExpertTensor | None,
    shapes: Mapping[str, tuple[tuple[int, ...], str]],
) -> list[str]:
    """Add what fills ``key``, or a slot of it, and say what does not fit."""
    problems = []
    for name in row:
        dtype, wanted = shapes[name][1], _DTYPES.get(tensor.dtype, str(tensor.dtype))
        if dtype != wanted and not {dtype, wanted} <= _CONVERTIBLE:
            problems.append(f"dtype: {name} has {dtype}, {key} needs {wanted}")
    first = shapes[row[0]][0]
    fused = len(row) == 1 and indexed is not None and first == tuple(indexed.full_shape)
    target = tuple(tensor.shape if indexed is None else tensor.shape[1:])
    if fused:
        items.append(_Item(row[0], key, slot, expert=expert or 0, fused=True))
        return problems
    if len(row) == 1:
        if first != target:
            whole = tuple(indexed.full_shape) if indexed is not None else target
            problems.append(f"shape: {row[0]} has {first}, {key} needs {whole}")
        items.append(_Item(row[0], key, slot))
        return problems
    start = 0
    for name in row:
        shape = shapes[name][0]
        if not target or shape[1:] != target[1:] or not shape:
            problems.append(f"shape: {name} has {shape}, an expert of {key} needs {target}")
            return problems
        items.append(_Item(name, key, slot, slice(start, start + shape[0])))
        start += shape[0]
    if start != target[0]:
        problems.append(f"shape: {' + '.join(row)} have {start} rows, {key} needs {target[0]}")
    return problems


def _refuse(balancer: ExpertLoadBalancer, checkpoint: _Checkpoint, problems: list[str]) -> None:
    if not problems:
        return
    shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
    raise RuntimeError(
        f"the checkpoint does not fit {type(balancer.module).__name__}; nothing was loaded (tell "
        "other names with names=, and let strict=False ignore unknown ones):\n\t"
        + "\n\t".join(shown)
    )


def _agree(balancer: ExpertLoadBalancer, error: Exception | None) -> None:
    """Raise this rank's error, or that another rank has one, before anything is written."""
    planes = balancer._planes
    everyone: list[Any] = []
    if not (balancer._closed or balancer._failed):
        everyone = planes.gather_json(error and str(error))
    if error is not None:
        raise error
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text]
    if failed:
        raise RuntimeError("the checkpoint cannot be loaded, because of " + "; ".join(failed))
