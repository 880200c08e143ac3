"""The planner's wire: frames of a JSON header and raw arrays over a connected stream socket.

Neither side trusts the other: sizes, types and shapes are declared first and checked against limits
before anything is allocated, and nothing that arrives is ever executed or unpickled. What a frame
*means* is `messages`' business.

One frame, all integers little-endian:

    bytes  what
    4      magic b"EPLB"
    1      version of this layout
    1      kind (`Kind`)
    2      zero
    4      bytes of the header, at most `MAX_HEADER_BYTES`
    8      bytes of the body, at most what the reader allows
    ...    header: UTF-8 JSON {"fields": {...}, "arrays": [[name, dtype, [dims]], ...]}
    ...    body: the arrays in the header's order, C order, nothing between them
"""

from __future__ import annotations

import json
import math
import socket
import struct
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MAX_BODY_BYTES",
    "MAX_HEADER_BYTES",
    "Frame",
    "FrameError",
    "FrameReader",
    "FrameWriter",
    "Kind",
    "encode",
]

MAGIC = b"EPLB"
VERSION = 1
MAX_HEADER_BYTES = 64 * 1024
MAX_BODY_BYTES = 1 << 30
MAX_ARRAYS = 8
MAX_DIMS = 4
DTYPES = ("<i4", "<i8", "<f4", "<f8")

_PREFIX = struct.Struct("<4sBBHIQ")


class Kind(IntEnum):
    """What a frame says; the number on the wire."""

    SETTINGS = 1
    READY = 2
    REQUEST = 3
    REPLY = 4
    ERROR = 5


class FrameError(ValueError):
    """What arrived is not a frame, or one beyond the limits."""


@dataclass(frozen=True)
class Frame:
    """One message: JSON-able ``fields`` and numeric ``arrays``, both by name."""

    kind: Kind
    fields: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)


def encode(frame: Frame) -> list[memoryview]:
    """The frame's bytes, in pieces, which may be views of the arrays.

    Raises:
        ValueError: a field that JSON cannot express (NaN and infinity included), an array of
            another type than `DTYPES`, or a frame beyond the limits that readers enforce.
    """
    declared = [[name, _wire_type(name, a).str, list(a.shape)] for name, a in frame.arrays.items()]
    header = json.dumps({"fields": dict(frame.fields), "arrays": declared}, allow_nan=False)
    text = header.encode()
    body_bytes = sum(array.nbytes for array in frame.arrays.values())
    if len(text) > MAX_HEADER_BYTES or body_bytes > MAX_BODY_BYTES or len(declared) > MAX_ARRAYS:
        raise ValueError(
            f"a frame of {len(declared)} arrays, {len(text)} header bytes and {body_bytes} body "
            f"bytes is over the limits ({MAX_ARRAYS}, {MAX_HEADER_BYTES}, {MAX_BODY_BYTES})"
        )
    prefix = _PREFIX.pack(MAGIC, VERSION, frame.kind, 0, len(text), body_bytes)
    body = (_bytes_of(a.astype(_wire_type(n, a), copy=False)) for n, a in frame.arrays.items())
    return [memoryview(prefix + text), *filter(None, body)]


class FrameWriter:
    """Sends queued frames over a socket as far as it takes them without waiting.

    On a blocking socket `write` sends everything.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._pieces: deque[memoryview] = deque()
        self.bytes_sent = 0

    @property
    def pending(self) -> bool:
        """Whether queued bytes are still unsent."""
        return bool(self._pieces)

    def queue(self, frame: Frame) -> None:
        """Add a frame behind those that wait; raises what `encode` raises.

        The arrays must not change until they are sent.
        """
        self._pieces.extend(encode(frame))

    def write(self) -> None:
        """Send what the socket takes now.

        Raises:
            EOFError: the other side is gone.
        """
        while self._pieces:
            piece = self._pieces[0]
            try:
                sent = self._socket.send(piece)
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionError) as error:
                raise EOFError("the other side closed the channel") from error
            self.bytes_sent += sent
            if sent == len(piece):
                self._pieces.popleft()
            else:
                self._pieces[0] = piece[sent:]


class FrameReader:
    """Collects frames from a socket, without ever reading beyond the frame at hand.

    Args:
        sock: a connected stream socket, blocking or not.
        kinds: the kinds that may arrive; any other is an error.
        max_body: limit for a frame's body, in bytes. Both can be changed between frames, as
            attributes of the same names.
    """

    def __init__(
        self, sock: socket.socket, kinds: Iterable[Kind], *, max_body: int = MAX_BODY_BYTES
    ) -> None:
        self._socket = sock
        self.kinds = frozenset(kinds)
        self.max_body = max_body
        self.bytes_received = 0
        self._expect_prefix()

    def read(self) -> Frame | None:
        """The next frame, or None when a non-blocking socket has no more for now.

        Raises:
            EOFError: the other side is gone.
            FrameError: what arrived is not an acceptable frame. The stream cannot be read on.
        """
        while self._fill():
            if self._part == "prefix":
                self._accept_prefix()
            elif self._part == "header":
                self._accept_header()
            else:
                frame = Frame(self._kind, self._fields, self._arrays)
                self._expect_prefix()
                return frame
        return None

    def _expect_prefix(self) -> None:
        self._part = "prefix"
        self._text = bytearray(_PREFIX.size)
        # What is to be filled next, in order; the part is complete when none is left.
        self._targets: deque[memoryview] = deque([memoryview(self._text)])

    def _fill(self) -> bool:
        """Receive until the part at hand is complete; False if that must wait."""
        while self._targets:
            target = self._targets[0]
            try:
                received = self._socket.recv_into(target)
            except BlockingIOError:
                return False
            except ConnectionError as error:
                raise EOFError("the other side closed the channel") from error
            if received == 0:
                raise EOFError("the other side closed the channel")
            self.bytes_received += received
            if received == len(target):
                self._targets.popleft()
            else:
                self._targets[0] = target[received:]
        return True

    def _accept_prefix(self) -> None:
        magic, version, kind, zero, header_bytes, body_bytes = _PREFIX.unpack(self._text)
        if magic != MAGIC or zero != 0:
            raise FrameError(f"no frame starts with the bytes {bytes(self._text[:8]).hex(' ')}")
        if version != VERSION:
            raise FrameError(f"frame layout {version} where {VERSION} is spoken")
        if kind not in self.kinds:
            raise FrameError(f"a frame of kind {kind} does not belong here")
        if header_bytes > MAX_HEADER_BYTES:
            raise FrameError(f"a header of {header_bytes} bytes (limit {MAX_HEADER_BYTES})")
        if body_bytes > self.max_body:
            raise FrameError(f"a body of {body_bytes} bytes (limit {self.max_body})")
        if header_bytes == 0:
            raise FrameError("a frame without a header")
        self._kind = Kind(kind)
        self._body_bytes = body_bytes
        self._text = bytearray(header_bytes)
        self._targets.append(memoryview(self._text))
        self._part = "header"

    def _accept_header(self) -> None:
        fields, declared = _parse_header(bytes(self._text))
        sizes = [math.prod(shape) * np.dtype(dtype).itemsize for _, dtype, shape in declared]
        if sum(sizes) != self._body_bytes:
            raise FrameError(
                f"arrays of {sum(sizes)} bytes are declared for a body of {self._body_bytes}"
            )
        try:
            # Memory is only reserved here; the system provides pages as bytes really arrive.
            arrays = {name: np.empty(shape, dtype) for name, dtype, shape in declared}
        except (ValueError, MemoryError) as error:
            raise FrameError(
                f"no memory for a body of {self._body_bytes} bytes: {error}"
            ) from error
        self._fields, self._arrays = fields, arrays
        self._part = "body"
        self._targets.extend(filter(None, map(_bytes_of, self._arrays.values())))


def _parse_header(raw: bytes) -> tuple[dict[str, Any], list[tuple[str, str, tuple[int, ...]]]]:
    try:
        header = json.loads(raw.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"the header is not the JSON that is spoken here: {error}") from error
    if not isinstance(header, dict) or set(header) != {"fields", "arrays"}:
        raise FrameError("a header must be an object of 'fields' and 'arrays'")
    fields, arrays = header["fields"], header["arrays"]
    if not isinstance(fields, dict) or not isinstance(arrays, list):
        raise FrameError("a header's 'fields' must be an object and its 'arrays' a list")
    if len(arrays) > MAX_ARRAYS:
        raise FrameError(f"{len(arrays)} arrays in a frame (limit {MAX_ARRAYS})")
    declared = [_parse_declaration(entry) for entry in arrays]
    if len({name for name, _, _ in declared}) != len(declared):
        raise FrameError("two arrays of one name in a frame")
    return fields, declared


def _parse_declaration(entry: Any) -> tuple[str, str, tuple[int, ...]]:
    if not (isinstance(entry, list) and len(entry) == 3):
        raise FrameError("an array is declared as [name, dtype, dims]")
    name, dtype, dims = entry
    if not isinstance(name, str) or dtype not in DTYPES or not isinstance(dims, list):
        raise FrameError(f"array {name!r:.40} of type {dtype!r:.40} is not one that is spoken here")
    if len(dims) > MAX_DIMS or not all(type(n) is int and 0 <= n <= MAX_BODY_BYTES for n in dims):
        raise FrameError(f"array {name!r:.40} has impossible dimensions {dims!r:.80}")
    return name, dtype, tuple(dims)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _wire_type(name: str, array: NDArray[Any]) -> np.dtype[Any]:
    dtype: np.dtype[Any] = array.dtype.newbyteorder("<")
    if dtype.str not in DTYPES or array.ndim > MAX_DIMS:
        raise ValueError(
            f"array {name!r} of type {dtype} and {array.ndim} dimensions cannot be sent; "
            f"types are {DTYPES}, dimensions at most {MAX_DIMS}"
        )
    return dtype


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
