"""Traces: recorded load, as a plain npz file without pickles.

A trace is a zip archive of up to three arrays in numpy's npy format:

==========  ============================================================================
``counts``  unsigned or signed integers ``[steps, source_ranks, layers, experts]``: tokens
            that each source rank sent to each logical expert in each step
``mix``     optional floats ``[steps, kinds]``: whatever describes the traffic of a step
``meta``    optional JSON object, stored as text: where the trace comes from
==========  ============================================================================

`numpy.load` reads such files, too. `read_trace` is for files of unknown origin: it parses the
headers as data, and refuses what is malformed or too large before it allocates anything.

Imports numpy only.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
import types
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from torch_eplb.files.npz import NpzReader, open_npz
from torch_eplb.files.paths import PathLike, atomic_write, check_target

__all__ = ["Trace", "TraceWriter", "read_load", "read_trace", "window_samples", "write_trace"]

MAX_TRACE_BYTES = 4 * 2**30
"""Largest uncompressed array that `read_trace` accepts unless told otherwise."""

MAX_META_BYTES = 4 * 2**20
MAX_COUNT = 2**53
"""Counts are held as int64 and averaged as float64; beyond this they would lose digits."""

_LAYOUT = "[step, source_rank, layer, logical_expert]"
_REMEDY = (
    "a trace is written by record_path= or torch_eplb.trace.TraceWriter, and made of other "
    "engines' dumps and of tables by: python -m torch_eplb convert"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """Recorded load.

    Attributes:
        counts: integers ``[steps, source_ranks, layers, experts]``, tokens routed to each logical
            expert, by the rank on which the tokens were.
        mix: None or floats ``[steps, kinds]``.
        meta: what is known about the recording.
    """

    counts: NDArray[Any]
    mix: NDArray[Any] | None = None
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.counts, np.ndarray) or self.counts.dtype.kind not in "iu":
            kind = getattr(self.counts, "dtype", type(self.counts).__name__)
            raise TypeError(f"counts must be an integer array {_LAYOUT}, got {kind}")
        if self.counts.ndim != 4 or 0 in self.counts.shape[1:]:
            raise ValueError(
                "counts must have the shape [steps, source_ranks, layers, experts], the last three "
                f"at least 1, got {list(self.counts.shape)}"
            )
        if self.mix is not None and (
            self.mix.ndim != 2 or len(self.mix) != len(self.counts) or self.mix.dtype.kind != "f"
        ):
            raise ValueError(
                f"mix must be floats [steps={len(self.counts)}, kinds], "
                f"got {self.mix.dtype} {list(self.mix.shape)}"
            )

    @property
    def num_steps(self) -> int:
        return int(self.counts.shape[0])

    @property
    def num_source_ranks(self) -> int:
        return int(self.counts.shape[1])

    @property
    def num_layers(self) -> int:
        return int(self.counts.shape[2])

    @property
    def num_experts(self) -> int:
        return int(self.counts.shape[3])

    def load(self, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """``[steps, layers, experts]`` int64: the load of the steps ``start .. stop - 1``."""
        return self.counts[start:stop].sum(axis=1, dtype=np.int64)


def window_samples(load: NDArray[Any], max_samples: int = 32) -> NDArray[np.int64]:
    """Sums of neighbouring steps, at most ``max_samples`` of them, which is what policies see.

    All sums run over the same number of steps, except the last, which may have fewer.

    >>> window_samples(np.arange(5).reshape(5, 1, 1), max_samples=2).ravel().tolist()
    [3, 7]

    Args:
        load: integers ``[steps, layers, experts]``, tokens per logical expert.
        max_samples: most sums to return.

    Returns:
        ``[samples, layers, experts]`` int64.

    Raises:
        ValueError: no steps, another shape, or ``max_samples`` below 1.
    """
    if load.ndim != 3 or len(load) == 0:
        raise ValueError(
            "load must have the shape [steps, layers, experts] with at least one step, "
            f"got {list(load.shape)}"
        )
    if max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, got {max_samples}")
    steps_per_sample = math.ceil(len(load) / max_samples)
    starts = np.arange(0, len(load), steps_per_sample)
    return np.add.reduceat(load, starts, axis=0, dtype=np.int64)


def read_trace(path: PathLike, *, max_bytes: int = MAX_TRACE_BYTES) -> Trace:
    """Reads a trace.

    Args:
        path: a file in the layout that the module's docstring describes.
        max_bytes: largest uncompressed size of one array that is accepted.

    Raises:
        OSError: the file is missing, unreadable or a directory.
        ValueError: the file is no trace, damaged, or larger than ``max_bytes``; the message names
            the path, what is wrong and what to do.
    """
    with open_npz(path, what="trace", remedy=_REMEDY, max_bytes=max_bytes) as archive:
        counts = _read_counts(archive, "counts", 4, max_bytes)
        mix = None
        if archive.has("mix"):
            mix = archive.read(
                "mix", lambda dtype, shape: dtype.kind == "f" and len(shape) == 2, max_bytes
            )
        meta = _read_meta(archive)
    try:
        return Trace(counts, mix, meta)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)}: {error}; {_REMEDY}") from None


def read_load(path: PathLike, *, max_bytes: int = MAX_TRACE_BYTES) -> NDArray[np.int64]:
    """Reads load to plan from: a trace, or an npz file with an array ``load``.

    Args:
        path: a trace; or an npz file that holds integers ``load`` of the shape
            ``[layers, experts]`` or ``[samples, layers, experts]``.
        max_bytes: largest uncompressed size of one array that is accepted.

    Returns:
        ``[samples, layers, experts]`` int64; the samples of a trace are its steps.

    Raises:
        OSError, ValueError: as `read_trace`; no samples.
    """
    with open_npz(path, what="trace", remedy=_REMEDY, max_bytes=max_bytes) as archive:
        has_load = archive.has("load") and not archive.has("counts")
        if has_load:
            array = _read_counts(archive, "load", (2, 3), max_bytes)
            load = array.astype(np.int64).reshape((-1, *array.shape[-2:]))
    if not has_load:
        load = read_trace(path, max_bytes=max_bytes).load()
    if 0 in load.shape:
        raise ValueError(f"{os.fspath(path)}: holds no load, its shape is {list(load.shape)}")
    return load


def write_trace(path: PathLike, trace: Trace) -> None:
    """Writes ``trace`` to ``path``, atomically.

    Raises:
        OSError, ValueError: the path cannot be written.
        TypeError: ``trace.meta`` is not JSON.
    """
    counts = trace.counts
    steps = (np.ascontiguousarray(step).data for step in counts)
    _write_archive(path, counts.dtype, counts.shape, steps, trace.mix, trace.meta)


class TraceWriter:
    """Records a trace step by step, in constant memory.

    Steps go to an unnamed temporary file next to the target, which the operating system removes
    when the process dies. `close` writes the trace under its name, in one piece; a writer that is
    closed early leaves a trace of the steps so far. Also a context manager.

    Args:
        path: the file to write; replaced at `close`.
        num_source_ranks: ranks whose counts are recorded apart.
        num_layers: MoE layers.
        num_experts: logical experts per layer.
        meta: a JSON object that is stored with the trace.

    Raises:
        OSError, ValueError: the path cannot be written, or a number is below 1.
        TypeError: ``meta`` is not JSON.
    """

    def __init__(
        self,
        path: PathLike,
        num_source_ranks: int = 1,
        *,
        num_layers: int,
        num_experts: int,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        self._shape = (num_source_ranks, num_layers, num_experts)
        for name, value in zip(
            ("num_source_ranks", "num_layers", "num_experts"), self._shape, strict=True
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._meta = {"layout": _LAYOUT, **(meta or {})}
        _meta_array(self._meta)
        self._path = check_target(path, "trace")
        self._spool: BinaryIO | None = tempfile.TemporaryFile(dir=os.path.dirname(self._path))
        self._end = 0
        self._steps = 0
        self._itemsize = 1

    @property
    def num_steps(self) -> int:
        """Steps recorded so far."""
        return self._steps

    def append(self, counts: NDArray[Any]) -> None:
        """Records one step.

        Args:
            counts: integers ``[source_ranks, layers, experts]``, tokens per logical expert.

        Raises:
            TypeError, ValueError: wrong dtype or shape, a negative or absurdly large count, or
                the writer is closed. The trace so far stays intact.
            OSError: the disk is full. The trace so far stays intact.
        """
        if self._spool is None:
            raise ValueError(f"{self._path}: the trace is closed; open another TraceWriter")
        counts = np.asarray(counts)
        if counts.dtype.kind not in "iu":
            raise TypeError(f"counts must be integers, got {counts.dtype}")
        if counts.shape != self._shape:
            raise ValueError(
                f"counts must have the shape [source_ranks, layers, experts] = "
                f"{list(self._shape)}, got {list(counts.shape)}"
            )
        _check_counts("counts", counts)
        # Each step is stored in the narrowest type that holds it, after one byte for its width.
        itemsize = _narrowest(int(counts.max()))
        self._spool.seek(self._end)
        self._spool.write(bytes([itemsize]))
        self._spool.write(np.ascontiguousarray(counts, dtype=f"<u{itemsize}").data)
        # Only now does the step exist: what a full disk cut off is overwritten by the next one.
        self._end = self._spool.tell()
        self._itemsize = max(self._itemsize, itemsize)
        self._steps += 1

    def close(self) -> None:
        """Writes the trace under its name. Later calls do nothing.

        Raises:
            OSError: the disk is full; nothing is lost, and `close` may be called again.
        """
        if self._spool is None:
            return
        _write_archive(
            self._path,
            np.dtype(f"<u{self._itemsize}"),
            (self._steps, *self._shape),
            self._recorded(self._spool),
            None,
            self._meta,
        )
        self._spool.close()
        self._spool = None

    def _recorded(self, spool: BinaryIO) -> Iterator[memoryview]:
        spool.seek(0)
        count = math.prod(self._shape)
        for _ in range(self._steps):
            itemsize = spool.read(1)[0]
            step = np.frombuffer(spool.read(count * itemsize), dtype=f"<u{itemsize}")
            yield np.ascontiguousarray(step, dtype=f"<u{self._itemsize}").data

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self.close()


def _narrowest(value: int) -> int:
    """Bytes of the narrowest unsigned integer that holds ``value``."""
    return next(size for size in (1, 2, 4, 8) if value < 1 << (8 * size))


def _check_counts(name: str, counts: NDArray[Any]) -> None:
    if counts.size == 0:
        return
    for bad, value in ((counts.min() < 0, counts.min()), (counts.max() > MAX_COUNT, counts.max())):
        if bad:
            raise ValueError(f"{name} must be token counts from 0 to 2**53, got {value}")


def _meta_array(meta: Mapping[str, Any]) -> NDArray[Any]:
    try:
        text = json.dumps(dict(meta))
    except (TypeError, ValueError) as error:
        raise TypeError(f"meta must be a JSON object: {error}") from None
    if 4 * len(text) > MAX_META_BYTES:
        raise ValueError(f"meta must be shorter than {MAX_META_BYTES // 4} characters")
    return np.array(text)


def _write_archive(
    path: PathLike,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    steps: Iterator[memoryview],
    mix: NDArray[Any] | None,
    meta: Mapping[str, Any],
) -> None:
    """Writes the members of a trace; ``counts`` arrives step by step, in C order."""
    small = {"meta": _meta_array(meta)}
    if mix is not None:
        small["mix"] = np.ascontiguousarray(mix)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with atomic_write(path, "trace") as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open(_member("counts"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for step in steps:
                member.write(step)
        for name, array in small.items():
            with archive.open(_member(name), "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _member(name: str) -> zipfile.ZipInfo:
    # A ZipInfo without a date makes equal traces equal files.
    info = zipfile.ZipInfo(f"{name}.npy")
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


def _read_counts(
    archive: NpzReader, name: str, ndim: int | tuple[int, ...], max_bytes: int
) -> NDArray[Any]:
    ndims = (ndim,) if isinstance(ndim, int) else ndim
    counts = archive.read(
        name, lambda dtype, shape: dtype.kind in "iu" and len(shape) in ndims, max_bytes
    )
    try:
        _check_counts(name, counts)
    except ValueError as error:
        raise ValueError(f"{archive.path}: {error}; {_REMEDY}") from None
    return counts


def _read_meta(archive: NpzReader) -> dict[str, Any]:
    if not archive.has("meta"):
        return {}
    text = archive.read(
        "meta", lambda dtype, shape: dtype.kind in "US" and shape == (), MAX_META_BYTES
    ).item()
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict):
        raise ValueError(f"{archive.path}: meta is not a JSON object; {_REMEDY}")
    return meta
