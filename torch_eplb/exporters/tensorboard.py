"""TensorBoard: scalars, distributions over layers, and heat maps as pictures.

Needs tensorboard (extra ``tensorboard``); torch writes its files.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.exporters.heat import heat, relative
from torch_eplb.exporters.metrics import METRICS
from torch_eplb.exporters.snapshots import Snapshot

__all__ = ["TensorBoardExporter"]

_MAX_HEAT = 4.0
"""Load / mean that gets the darkest red, so that pictures of different times compare."""


class TensorBoardExporter:
    """Writes snapshots under ``eplb/``, at their step.

    Args:
        writer: a ``SummaryWriter``, or the folder for one of our own.

    Raises:
        ImportError: tensorboard is missing; the message names the extra.
    """

    def __init__(self, writer: Any) -> None:
        self._own = isinstance(writer, (str, os.PathLike))
        self._writer = _new_writer(os.fspath(writer)) if self._own else writer
        self._drawn: dict[str, NDArray[Any]] = {}

    def export(self, snapshot: Snapshot) -> None:
        """Writes one point of everything."""
        where = "".join(f"{value}/" for value in snapshot.labels.values())
        step, at = int(snapshot.stats["step"]), snapshot.time
        for metric in METRICS:
            value = metric.value(snapshot)
            if value is None or isinstance(value, dict):
                continue
            array = np.asarray(value, dtype=np.float64)
            array = array[np.isfinite(array)] if array.ndim else array
            name = f"eplb/{where}{metric.name}"
            if array.ndim == 0 and np.isfinite(array):
                self._writer.add_scalar(name, float(array), step, walltime=at)
            elif array.ndim and array.size and len(metric.labels) == 1:
                self._writer.add_histogram(name, array, step, walltime=at)
        for name in ("load", "rank_load"):
            self._draw(f"eplb/{where}{name}", getattr(snapshot, name), step, at)
        self._writer.flush()

    def _draw(self, name: str, load: NDArray[Any] | None, step: int, at: float) -> None:
        if load is None or np.array_equal(self._drawn.get(name, ()), load):
            return
        self._drawn[name] = np.array(load)
        colours = heat(relative(load), _MAX_HEAT)
        # A pixel per expert is too small to see.
        scale = max(1, 480 // max(colours.shape[:2]))
        large = colours.repeat(scale, axis=0).repeat(scale, axis=1)
        self._writer.add_image(name, large, step, walltime=at, dataformats="HWC")

    def close(self) -> None:
        """Closes the writer if it is our own."""
        if self._own:
            self._writer.close()


def _new_writer(folder: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"TensorBoardExporter needs tensorboard ({error}); install it with: "
            "pip install torch-eplb[tensorboard]"
        ) from None
    return SummaryWriter(folder)
