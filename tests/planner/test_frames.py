"""The wire: what is sent arrives, and nothing else does."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import socket
import struct
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from torch_eplb.planner.frames import (
    MAX_BODY_BYTES,
    MAX_HEADER_BYTES,
    Frame,
    FrameError,
    FrameReader,
    FrameWriter,
    Kind,
    encode,
)

PREFIX = struct.Struct("<4sBBHIQ")

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
arrays = st.sampled_from(["<i4", "<i8", "<f4", "<f8", ">f8", ">i4"]).flatmap(
    lambda dtype: hnp.arrays(
        dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)
    )
)
frames = st.builds(
    Frame,
    st.sampled_from(Kind),
    st.dictionaries(st.text(max_size=4), json_values, max_size=3),
    st.dictionaries(st.text(max_size=4), arrays, max_size=3),
)


@contextlib.contextmanager
def channel() -> Iterator[tuple[socket.socket, FrameReader]]:
    """One raw end, and a non-blocking reader at the other."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(10)
        theirs.setblocking(False)
        yield ours, FrameReader(theirs, Kind)


def raw(header: object, body: bytes = b"", *, kind: int = 3, version: int = 1) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return PREFIX.pack(b"EPLB", version, kind, 0, len(text), len(body)) + text + body


def declared(*entries: object, fields: object = None) -> dict[str, object]:
    return {"fields": {} if fields is None else fields, "arrays": list(entries)}


def assert_same(received: Frame | None, sent: Frame) -> None:
    assert received is not None
    assert received.kind is sent.kind
    assert received.fields == sent.fields
    assert list(received.arrays) == list(sent.arrays)
    for name, array in sent.arrays.items():
        assert received.arrays[name].shape == array.shape
        assert received.arrays[name].dtype == array.dtype.newbyteorder("<")
        np.testing.assert_array_equal(received.arrays[name], array)


@settings(max_examples=80)
@given(st.lists(frames, min_size=1, max_size=3), st.data())
def test_frames_arrive_as_sent_however_the_bytes_are_cut(sent: list[Frame], data) -> None:
    stream = b"".join(bytes(piece) for frame in sent for piece in encode(frame))
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=6))
    edges = [0, *sorted(cuts), len(stream)]
    received = []
    with channel() as (ours, reader):
        for begin, end in itertools.pairwise(edges):
            ours.sendall(stream[begin:end])
            while (frame := reader.read()) is not None:
                received.append(frame)
        assert reader.bytes_received == len(stream)
    assert len(received) == len(sent)
    for ours_, theirs_ in zip(received, sent, strict=True):
        assert_same(ours_, theirs_)


def test_a_frame_larger_than_the_socket_is_sent_piece_by_piece_without_waiting() -> None:
    sent = Frame(Kind.REQUEST, {"n": 1}, {"load": np.arange(1 << 20, dtype=np.float64)})
    with channel() as (ours, reader):
        ours.setblocking(False)
        writer = FrameWriter(ours)
        writer.queue(sent)
        writer.write()
        assert writer.pending
        received = None
        while received is None:
            received = reader.read()
            writer.write()
        assert not writer.pending
        assert writer.bytes_sent == reader.bytes_received
    assert_same(received, sent)


def test_a_closed_channel_is_the_end_of_the_file_for_both_sides() -> None:
    with channel() as (ours, reader):
        ours.sendall(raw(declared())[:10])
        assert reader.read() is None
        ours.close()
        with pytest.raises(EOFError):
            reader.read()
    with channel() as (ours, reader):
        reader._socket.close()
        writer = FrameWriter(ours)
        writer.queue(Frame(Kind.READY, {}))
        with pytest.raises(EOFError):
            writer.write()


@settings(max_examples=300)
@given(st.binary(min_size=1, max_size=200))
def test_random_bytes_are_refused_and_nothing_else_happens(garbage: bytes) -> None:
    with channel() as (ours, reader):
        ours.sendall(garbage)
        ours.close()
        with pytest.raises((FrameError, EOFError)):
            reader.read()


@settings(max_examples=150)
@given(frames, st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), min_size=1))
def test_a_damaged_frame_is_a_frame_an_error_or_incomplete(frame: Frame, damage) -> None:
    stream = bytearray(b"".join(bytes(piece) for piece in encode(frame)))
    for place, value in damage:
        stream[place % len(stream)] = value
    with channel() as (ours, reader):
        ours.sendall(stream)
        with contextlib.suppress(FrameError):
            received = reader.read()
            assert received is None or isinstance(received, Frame)


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n   ", "no frame starts with"),
        (PREFIX.pack(b"EPLB", 1, 3, 7, 2, 0), "no frame starts with"),
        (raw(declared(), version=2), "layout 2"),
        (raw(declared(), kind=77), "kind 77"),
        (PREFIX.pack(b"EPLB", 1, 3, 0, 0, 0), "without a header"),
        (PREFIX.pack(b"EPLB", 1, 3, 0, MAX_HEADER_BYTES + 1, 0), "header of 65537 bytes"),
        (PREFIX.pack(b"EPLB", 1, 3, 0, 2, 1 << 60), "a body of 1152921504606846976 bytes"),
        (raw(b"\xff\xfe{}"), "not the JSON"),
        (raw(b'{"fields": {"x": NaN}, "arrays": []}'), "NaN"),
        (raw(b'{"fields": {"x": Infinity}, "arrays": []}'), "Infinity"),
        (raw(b"[" * MAX_HEADER_BYTES), "not the JSON"),
        (raw([]), "object of 'fields' and 'arrays'"),
        (raw({"fields": {}}), "object of 'fields' and 'arrays'"),
        (raw({"fields": [], "arrays": []}), "'fields' must be an object"),
        (raw({"fields": {}, "arrays": {}}), "its 'arrays' a list"),
        (raw(declared("abc")), "declared as"),
        (raw(declared(["a", "<f8"])), "declared as"),
        (raw(declared(["a", "|O", [1]]), bytes(8)), "type '|O'"),
        (raw(declared(["a", ["<f8"], [1]]), bytes(8)), "is not one that is spoken"),
        (raw(declared([1, "<f8", [1]]), bytes(8)), "is not one that is spoken"),
        (raw(declared(["a", "<f8", [True]]), bytes(8)), "impossible dimensions"),
        (raw(declared(["a", "<f8", [-1]]), bytes(8)), "impossible dimensions"),
        (raw(declared(["a", "<f8", [1.0]]), bytes(8)), "impossible dimensions"),
        (raw(declared(["a", "<f8", [1] * 5]), bytes(8)), "impossible dimensions"),
        (raw(declared(["a", "<f8", [1 << 60]]), bytes(8)), "impossible dimensions"),
        (raw(declared(["a", "<f8", [2]]), bytes(8)), "16 bytes are declared for a body of 8"),
        (raw(declared(["a", "<f8", [1]], ["a", "<f8", [1]]), bytes(16)), "two arrays of one name"),
        (raw(declared(*[[f"a{i}", "<f8", [0]] for i in range(9)])), "9 arrays"),
        (raw(declared(["a", "<i4", [0, 1 << 30, 1 << 30, 1 << 30]])), "no memory"),
    ],
)
def test_a_frame_beyond_the_rules_is_refused_with_the_reason(stream: bytes, says: str) -> None:
    with channel() as (ours, reader):
        ours.sendall(stream)
        with pytest.raises(FrameError, match=says.replace("|", "\\|")):
            reader.read()


@pytest.mark.parametrize("elements", [1 << 27, 1 << 57, 1 << 60])
def test_a_declared_size_reserves_no_memory_before_it_is_checked(elements: int) -> None:
    header = json.dumps(declared(["a", "<f8", [elements]])).encode()
    lie = PREFIX.pack(b"EPLB", 1, 3, 0, len(header), elements * 8) + header
    with channel() as (ours, reader):
        reader.max_body = 1 << 20
        ours.sendall(lie)
        tracemalloc.start()
        try:
            with pytest.raises(FrameError, match="limit"):
                reader.read()
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    ("fields", "array"),
    [
        ({"x": math.nan}, np.zeros(1)),
        ({"x": math.inf}, np.zeros(1)),
        ({}, np.array([object()])),
        ({}, np.array(["text"])),
        ({}, np.zeros((1,) * 5)),
        ({"x": "y" * MAX_HEADER_BYTES}, np.zeros(1)),
        ({}, np.broadcast_to(np.zeros(1, np.float64), (MAX_BODY_BYTES // 8 + 1,))),
    ],
)
def test_what_no_reader_would_accept_is_not_sent(fields, array) -> None:
    with pytest.raises(ValueError, match=r"limits|cannot be sent|JSON"):
        encode(Frame(Kind.REQUEST, fields, {"a": array}))
