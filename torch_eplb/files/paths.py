"""Files that other programs read, and files that strangers wrote: checked opening, atomic writing.

May import nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from typing import BinaryIO

__all__ = ["PathLike", "atomic_write", "check_target", "open_checked"]

PathLike = str | os.PathLike[str]


def open_checked(path: PathLike, what: str, max_bytes: int) -> BinaryIO:
    """Opens a regular file of at most ``max_bytes`` bytes for reading.

    Anything else is refused before a byte is read: a directory, a pipe that would block for ever,
    a device that never ends, a file too large to be what it should be.

    Args:
        path: the file.
        what: what the file should be, for the messages ("trace", "expert map").
        max_bytes: largest size accepted.

    Raises:
        OSError: the file is missing or unreadable, or is a directory.
        ValueError: not a regular file, or too large.
    """
    path = os.fspath(path)
    # Non-blocking, so that a pipe without a writer is opened and refused instead of waited for.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(f"{path}: is a directory; name the {what} file in it")
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: is not a regular file; copy the {what} to a file first")
        if status.st_size > max_bytes:
            raise ValueError(
                f"{path}: {status.st_size} bytes are more than the {max_bytes} that a {what} "
                "may have; check that this is the right file"
            )
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_target(path: PathLike, what: str) -> str:
    """The real path to write ``what`` to, checked so that a long run does not fail at its end.

    Symbolic links are followed, so that the file that they name is replaced and not the link.

    Raises:
        OSError: the folder does not exist, or the path is a directory.
        ValueError: the path exists and is not a regular file.
    """
    path = os.path.realpath(os.fspath(path))
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{path}: the folder {folder} does not exist; create it first")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path}: is a directory; name a file to write the {what} to")
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: is not a regular file; name a file to write the {what} to")
    return path


@contextlib.contextmanager
def atomic_write(path: PathLike, what: str) -> Iterator[BinaryIO]:
    """Writes a file that appears complete or not at all.

    The bytes go to a temporary file in the same folder, which replaces ``path`` when the block
    ends. When the block raises, ``path`` keeps what it held and the temporary file is removed.

    Raises:
        OSError, ValueError: see `check_target`; the disk is full.
    """
    target = check_target(path, what)
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            # The rename must not reach the disk before the bytes do, or a crash of the machine
            # leaves an empty file under the final name.
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
