"""Files of `torch.save`, read as data: tensors, numbers, text, lists and dicts, nothing else.

The one file of this folder that needs torch, and only once a ``.pt`` file is read or written.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np

from torch_eplb.files.paths import PathLike, atomic_write, open_checked

__all__ = ["MAX_PT_BYTES", "read_pt", "write_pt"]

MAX_PT_BYTES = 4 * 2**30
"""Largest file, and largest array in one, that is read."""


def read_pt(path: PathLike) -> Any:
    """What `torch.save` stored, with every tensor as a numpy array.

    Reads with ``weights_only=True``: a file that holds objects of other classes is refused, so no
    code of the file's author runs.

    Raises:
        OSError: the file is missing, unreadable or a directory.
        ValueError: too large, damaged, or holding more than plain data.
    """
    import torch

    name = os.fspath(path)
    with open_checked(path, ".pt file", MAX_PT_BYTES) as file:
        try:
            document = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            # torch's own words advise to read it all the same, which would run its author's code.
            reason = "it is damaged or holds objects of other classes"
        except Exception as error:
            # Whatever torch raises for damaged bytes; its first sentence says what it found.
            reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        else:
            return _to_numpy(document, name)
    raise ValueError(
        f"{name}: is not a .pt file of plain tensors, numbers, lists and dicts ({reason[:200]}); "
        "nothing else is unpickled"
    )


def _to_numpy(value: Any, name: str) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        # A tensor may claim any shape over a few bytes (stride 0); numpy would write it out.
        if value.numel() * value.element_size() > MAX_PT_BYTES:
            raise ValueError(
                f"{name}: a tensor of the shape {list(value.shape)} takes more than the "
                f"{MAX_PT_BYTES} bytes allowed; check that this is the right file"
            )
        value = value.detach()
        if value.layout != torch.strided:
            raise ValueError(f"{name}: holds a {value.layout} tensor; store it as a dense one")
        try:
            return (value.float() if value.dtype is torch.bfloat16 else value).numpy().copy()
        except TypeError as error:
            raise ValueError(f"{name}: holds a tensor that numpy cannot take ({error})") from None
    if isinstance(value, Mapping):
        return {key: _to_numpy(item, name) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_numpy(item, name) for item in value]
    return value


def write_pt(path: PathLike, document: Mapping[str, Any]) -> None:
    """Stores ``document`` with `torch.save`, arrays as tensors, atomically.

    Raises:
        OSError, ValueError: the path cannot be written.
    """
    import torch

    tensors = {
        key: torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(value, np.ndarray)
        else value
        for key, value in document.items()
    }
    with atomic_write(path, ".pt file") as file:
        torch.save(tensors, file)
