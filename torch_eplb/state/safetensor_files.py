"""A folder of safetensors files: what it has, and reading it in pieces.

Knows files, nothing of models. The index is read as data; the files are safetensors' to check.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torch_eplb.files.paths import PathLike, open_checked

__all__ = ["Checkpoint", "Reading"]

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_INDEX_BYTES = 128 * 2**20
"""Largest index that is parsed: 61 layers x 256 experts x 3 tensors take about 6 MiB."""
REOPEN_BYTES = 16 * 2**20
"""A file is opened anew after this much, because what was read of it stays mapped meanwhile."""


@dataclass(frozen=True)
class Reading:
    """One reading of a checkpoint's tensor, and what it fills.

    Attributes:
        name: the checkpoint's tensor.
        key: the model's.
        slot: the local slot that it fills, or None where the tensor has no slots.
        rows: the part of the slot that it fills, on dim 0; None is all.
        entries: those of the checkpoint's tensor on dim 0 that are read; None is all.
        change: what is done to them, or None.
    """

    name: str
    key: str
    slot: int | None = None
    rows: slice | None = None
    entries: slice | None = None
    change: Callable[[torch.Tensor, Sequence[int]], torch.Tensor] | None = None


class Checkpoint:
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

    def read(self, items: list[Reading]) -> Iterator[tuple[Reading, torch.Tensor]]:
        """The values, file after file; good until the next one is asked for."""
        by_name: dict[str, list[Reading]] = {}
        for item in items:
            by_name.setdefault(item.name, []).append(item)
        for path, group in self._by_file(sorted(by_name)):
            waiting = deque(item for name in group for item in by_name[name])
            while waiting:
                with self._file(path) as file:
                    nbytes = 0
                    while waiting and nbytes < REOPEN_BYTES:
                        item = waiting.popleft()
                        if item.entries is not None:
                            value = file.get_slice(item.name)[item.entries]
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
