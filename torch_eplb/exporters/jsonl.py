"""Snapshots as JSON lines: one file per rank, for `watch`, `report` and your own scripts.

A line is an object with ``torch_eplb`` (the format's version), ``time``, ``rank``, ``labels`` and
``stats``; arrays that are large (``placement``, ``load``, ``rank_load``) are in a line only if they
differ from those of the line before of the same rank and labels. NaN is null.

Imports numpy only.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from torch_eplb.exporters.snapshots import Snapshot
from torch_eplb.files.paths import PathLike, check_target, open_checked

__all__ = ["JsonLinesExporter", "SnapshotLines", "read_snapshots"]

_VERSION = 1
_ARRAYS = ("placement", "load", "rank_load")
_MAX_FILE_BYTES = 2 * 2**30
_REMEDY = (
    "name a file that torch_eplb.exporters.JsonLinesExporter wrote, for example: "
    'exporters.attach(balancer, exporters.JsonLinesExporter("stats.jsonl"))'
)


class JsonLinesExporter:
    """Appends snapshots to a file.

    Args:
        path: the file; an existing one is continued.
        max_bytes: when the file would exceed it, it becomes ``path.1`` (the one before is
            overwritten) and a new one begins. None: no bound.

    Raises:
        OSError, ValueError: the path cannot be written, or ``max_bytes`` is below 1.
    """

    def __init__(self, path: PathLike, *, max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
        self._path = check_target(path, "snapshots")
        self._max_bytes = max_bytes
        self._file: BinaryIO | None = None
        self._written: dict[tuple[Any, ...], NDArray[Any]] = {}
        self._open()

    def _open(self) -> None:
        # Unbuffered: a line is one write, so that a reader sees whole lines or none.
        self._file = open(self._path, "ab", buffering=0)
        self._written = {}

    def export(self, snapshot: Snapshot) -> None:
        """Appends one line.

        Raises:
            OSError: the disk is full.
            ValueError: the exporter is closed.
        """
        if self._file is None:
            raise ValueError(f"{self._path}: the exporter is closed")
        line = self._line(snapshot)
        size = os.fstat(self._file.fileno()).st_size
        if self._max_bytes is not None and size and size + len(line) > self._max_bytes:
            self._file.close()
            os.replace(self._path, f"{self._path}.1")
            self._open()
            line = self._line(snapshot)
        self._file.write(line)

    def _line(self, snapshot: Snapshot) -> bytes:
        record: dict[str, Any] = {
            "torch_eplb": _VERSION,
            "time": snapshot.time,
            "rank": snapshot.rank,
            "labels": snapshot.labels,
            "stats": {name: _plain(value) for name, value in snapshot.stats.items()},
        }
        for name in _ARRAYS:
            array = getattr(snapshot, name)
            key = (name, *snapshot.key)
            before = self._written.get(key)
            if array is not None and (before is None or not np.array_equal(before, array)):
                record[name] = array.tolist()
                self._written[key] = np.array(array)
        return json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._file is None

    def close(self) -> None:
        """Closes the file. Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class SnapshotLines:
    """Reads a file of snapshots, and goes on where it grows.

    Raises:
        OSError: the file is missing, unreadable or a directory.
        ValueError: not such a file.
    """

    def __init__(self, path: PathLike) -> None:
        self._path = os.fspath(path)
        self._offset = 0
        self._inode = -1
        self._last: dict[tuple[Any, ...], dict[str, NDArray[Any]]] = {}

    def read(self) -> Iterator[Snapshot]:
        """Snapshots since the last call; a line that is still being written is left for later."""
        with open_checked(self._path, "snapshots", _MAX_FILE_BYTES) as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset, self._last = status.st_ino, 0, {}
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                if line.strip():
                    yield self._parse(line)

    def _parse(self, line: bytes) -> Snapshot:
        try:
            record = json.loads(line)
            if record["torch_eplb"] != _VERSION:
                raise ValueError(f"version {record['torch_eplb']!r}")
            rank = int(record["rank"])
            labels = {str(k): str(v) for k, v in record.get("labels", {}).items()}
            arrays = self._last.setdefault((rank, *sorted(labels.items())), {})
            for name in _ARRAYS:
                if name in record:
                    arrays[name] = _matrix(record[name], 3 if name == "placement" else 2)
            stats = dict(record["stats"])
            stats["step"], stats["stage"]
            for name in ("par_measured", "par_predicted", "par_now"):
                if stats.get(name) is not None:
                    stats[name] = [math.nan if v is None else float(v) for v in stats[name]]
            return Snapshot(float(record["time"]), rank, stats, **arrays, labels=labels)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"{self._path}: holds a line that is no snapshot ({reason}); {_REMEDY}"
            ) from None


def _matrix(rows: Any, ndim: int) -> NDArray[np.int64]:
    array = np.asarray(rows)
    if array.ndim != ndim or array.dtype.kind != "i" or 0 in array.shape or array.min() < 0:
        raise ValueError(f"an array is {array.dtype} of the shape {list(array.shape)}")
    return array


def read_snapshots(path: PathLike) -> list[Snapshot]:
    """All snapshots of a file, in order.

    Raises:
        OSError: the file is missing, unreadable or a directory.
        ValueError: not such a file, or without a snapshot.
    """
    snapshots = list(SnapshotLines(path).read())
    if not snapshots:
        raise ValueError(f"{os.fspath(path)}: holds no snapshot; {_REMEDY}")
    return snapshots
