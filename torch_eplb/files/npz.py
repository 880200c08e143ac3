"""npz files of unknown origin: arrays read as data, with limits, never as pickles.

`numpy.load` allocates whatever a header claims. Here a header is checked first: against what the
caller expects, against a limit, and against the size that the zip directory states.

Imports numpy only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from torch_eplb.files.paths import PathLike, open_checked

__all__ = ["HEADER_ERRORS", "NpzReader", "open_npz"]

# Token counts are noisy: recorded traces shrink by less than 50 to 1, whereas an archive that was
# made to exhaust memory shrinks by about 1000 to 1, the most that deflate can do.
_SMALL_BYTES = 64 * 2**20
_MAX_RATIO = 200

# What numpy raises for headers that are no dictionary of the right kind; it reads them as Python.
HEADER_ERRORS = (
    ValueError,
    TypeError,
    SyntaxError,
    tokenize.TokenError,  # from Python 3.12 on
    OverflowError,
    RecursionError,
    MemoryError,
)

# What zipfile raises for damaged, encrypted and exotic archives; EINVAL is a seek to where a
# damaged directory points.
_ARCHIVE_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)


@dataclasses.dataclass
class NpzReader:
    """The members of an npz file of unknown origin."""

    path: str
    remedy: str
    """What to do about a file that is not what it should be; ends every message."""
    zip: zipfile.ZipFile

    def has(self, name: str) -> bool:
        """Whether there is an array of this name."""
        return f"{name}.npy" in self.zip.NameToInfo

    def read(
        self,
        name: str,
        accepts: Callable[[np.dtype[Any], tuple[int, ...]], bool],
        max_bytes: int,
    ) -> NDArray[Any]:
        """One array, once its header has been found plausible.

        The size that the header claims is computed with Python's integers, so no claim overflows,
        and must equal the size that the zip directory states, beyond which zipfile does not
        decompress.

        Args:
            name: the array's name, without ".npy".
            accepts: whether ``(dtype, shape)`` of the header are what the caller can use.
            max_bytes: largest array that is allocated.

        Raises:
            ValueError: no such array, not accepted, too large, or damaged.
        """
        if not self.has(name):
            found = ", ".join(sorted(self.zip.NameToInfo)[:8]) or "nothing"
            raise ValueError(f"{self.path}: has no array {name!r} (found: {found}); {self.remedy}")
        info = self.zip.getinfo(f"{name}.npy")
        with self.zip.open(info) as member:
            dtype, shape, fortran = self._header(name, member)
            if not accepts(dtype, shape):
                raise ValueError(
                    f"{self.path}: array {name!r} is {dtype} of the shape {list(shape)}; "
                    f"{self.remedy}"
                )
            size = math.prod(shape) * dtype.itemsize
            if size > max_bytes:
                raise ValueError(
                    f"{self.path}: array {name!r} claims {size} bytes (shape {list(shape)}), more "
                    f"than the {max_bytes} allowed; record fewer steps, or raise max_bytes"
                )
            if info.file_size - member.tell() != size:
                raise ValueError(
                    f"{self.path}: array {name!r} claims {size} bytes (shape {list(shape)}) and "
                    f"holds {info.file_size - member.tell()}; the file is damaged, record it again"
                )
            if size > _SMALL_BYTES and size > _MAX_RATIO * info.compress_size:
                raise ValueError(
                    f"{self.path}: array {name!r} would grow from {info.compress_size} to {size} "
                    f"bytes, which no recorded load does; {self.remedy}"
                )
            flat = np.empty(math.prod(shape), dtype=dtype)
            buffer = flat.view(np.uint8).data
            while buffer:
                got = cast(io.BufferedIOBase, member).readinto(buffer)
                if not got:
                    raise EOFError(f"array {name!r} ends early")
                buffer = buffer[got:]
        native = flat.astype(dtype.newbyteorder("="), copy=False)
        return native.reshape(shape[::-1]).T if fortran else native.reshape(shape)

    def _header(self, name: str, member: Any) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        try:
            version = np.lib.format.read_magic(member)
            if version not in readers:
                raise ValueError(f"npy format version {version}")
            shape, fortran, dtype = readers[version](member, max_header_size=4096)
            if min(shape, default=0) < 0:
                raise ValueError(f"negative shape {shape}")
        except HEADER_ERRORS as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{self.path}: array {name!r} has no valid npy header ({reason}); {self.remedy}"
            ) from None
        return dtype, shape, fortran


@contextlib.contextmanager
def open_npz(path: PathLike, *, what: str, remedy: str, max_bytes: int) -> Iterator[NpzReader]:
    """Opens an npz file.

    Args:
        path: the file.
        what: what the file should be, for the messages.
        remedy: what the user can do about a wrong file, for the messages.
        max_bytes: largest file accepted.

    Raises:
        OSError: the file is missing, unreadable or a directory.
        ValueError: too large, no zip archive, or found damaged while the block reads from it.
    """
    name = os.fspath(path)
    with open_checked(path, what, max_bytes) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield NpzReader(name, remedy, archive)
        except _ARCHIVE_ERRORS as error:
            own = str(error).startswith(f"{name}: ")
            if own or (isinstance(error, OSError) and error.errno != errno.EINVAL):
                raise
            reason = str(error) or type(error).__name__
            raise ValueError(f"{name}: is not a readable npz file ({reason}); {remedy}") from None
