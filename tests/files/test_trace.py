"""Traces: what is written is read back, and what is wrong is refused before it costs anything."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_eplb.files.trace import (
    Trace,
    TraceWriter,
    read_load,
    read_trace,
    window_samples,
    write_trace,
)

COUNTS = np.arange(3 * 2 * 2 * 4, dtype=np.uint16).reshape(3, 2, 2, 4)


def npy_header(descr: str, shape: str) -> bytes:
    """An npy header that claims whatever it is told to."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (63 - (10 + len(text)) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def npz(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def test_a_written_trace_reads_back_equal_and_numpy_can_load_it(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    mix = np.linspace(0, 1, 6, dtype=np.float32).reshape(3, 2)
    write_trace(path, Trace(COUNTS, mix, {"model": "tiny"}))
    trace = read_trace(path)
    assert np.array_equal(trace.counts, COUNTS)
    assert trace.counts.dtype == np.uint16
    assert trace.mix is not None
    assert np.array_equal(trace.mix, mix)
    assert trace.meta == {"model": "tiny"}
    with np.load(path, allow_pickle=False) as loaded:
        assert np.array_equal(loaded["counts"], COUNTS)
        assert json.loads(str(loaded["meta"])) == {"model": "tiny"}


def test_what_numpy_saved_is_read(tmp_path: Path) -> None:
    for number, counts in enumerate((COUNTS, np.asfortranarray(COUNTS), COUNTS.astype(">i8"))):
        path = tmp_path / f"{number}.npz"
        np.savez(path, counts=counts)
        assert np.array_equal(read_trace(path).counts, COUNTS)
        assert read_trace(path).counts.dtype.isnative


def test_the_writer_records_step_by_step(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    with TraceWriter(path, 2, num_layers=2, num_experts=4, meta={"who": "me"}) as writer:
        for step in COUNTS:
            writer.append(step)
        assert not path.exists()
        assert writer.num_steps == 3
    trace = read_trace(path)
    assert np.array_equal(trace.counts, COUNTS)
    assert trace.counts.dtype == np.uint8
    assert trace.meta["who"] == "me"
    assert os.listdir(tmp_path) == ["t.npz"]


@given(
    st.lists(
        st.lists(st.integers(0, 2**40) | st.integers(0, 300), min_size=4, max_size=4), max_size=6
    )
)
def test_counts_of_any_size_survive(tmp_path_factory: Any, steps: list[list[int]]) -> None:
    path = tmp_path_factory.mktemp("trace") / "t.npz"
    with TraceWriter(path, num_layers=2, num_experts=2) as writer:
        for step in steps:
            writer.append(np.array(step, dtype=np.int64).reshape(1, 2, 2))
    assert read_trace(path).counts.reshape(-1, 4).tolist() == steps


def test_a_writer_that_is_closed_early_keeps_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"

    def serve() -> None:
        with TraceWriter(path, 2, num_layers=2, num_experts=4) as writer:
            writer.append(COUNTS[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve()
    assert np.array_equal(read_trace(path).counts, COUNTS[:1])


def test_a_writer_without_steps_leaves_a_valid_trace_without_steps(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    TraceWriter(path, num_layers=2, num_experts=4).close()
    assert read_trace(path).counts.shape == (0, 1, 2, 4)


def test_closing_twice_is_harmless_and_appending_to_a_closed_trace_is_refused(
    tmp_path: Path,
) -> None:
    writer = TraceWriter(tmp_path / "t.npz", 2, num_layers=2, num_experts=4)
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="closed"):
        writer.append(COUNTS[0])


def test_a_wrong_step_is_refused_and_the_trace_stays_intact(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    with TraceWriter(path, 2, num_layers=2, num_experts=4) as writer:
        writer.append(COUNTS[0])
        with pytest.raises(ValueError, match=r"\[2, 2, 4\], got \[2, 4\]"):
            writer.append(COUNTS[0][0])
        with pytest.raises(TypeError, match="float64"):
            writer.append(COUNTS[0].astype(float))
        with pytest.raises(ValueError, match="-1"):
            writer.append(COUNTS[0].astype(int) - 1)
        writer.append(COUNTS[1])
    assert np.array_equal(read_trace(path).counts, COUNTS[:2])


def test_a_killed_recorder_leaves_no_file(tmp_path: Path) -> None:
    code = (
        "import numpy as np, os, signal, sys\n"
        "from torch_eplb.files.trace import TraceWriter\n"
        "writer = TraceWriter(sys.argv[1], num_layers=2, num_experts=4)\n"
        "for _ in range(100):\n"
        "    writer.append(np.ones((1, 2, 4), int))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "t.npz")]
    assert subprocess.run(command, timeout=120, check=False).returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == []


def test_the_writer_keeps_no_steps_in_memory(tmp_path: Path) -> None:
    step = np.random.default_rng(0).integers(0, 200, (1, 16, 256))
    with TraceWriter(tmp_path / "t.npz", num_layers=16, num_experts=256) as writer:
        tracemalloc.start()
        try:
            for _ in range(500):
                writer.append(step)
            writer.close()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 500 * 16 * 256 / 2


def test_a_path_that_cannot_be_written_is_refused_before_recording(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="create it first"):
        TraceWriter(tmp_path / "no" / "t.npz", num_layers=1, num_experts=1)
    with pytest.raises(IsADirectoryError):
        TraceWriter(tmp_path, num_layers=1, num_experts=1)
    with pytest.raises(ValueError, match="num_experts"):
        TraceWriter(tmp_path / "t.npz", num_layers=1, num_experts=0)
    with pytest.raises(TypeError, match="JSON"):
        TraceWriter(tmp_path / "t.npz", num_layers=1, num_experts=1, meta={"a": object()})


def test_an_old_trace_survives_a_failed_write(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    write_trace(path, Trace(COUNTS))
    with pytest.raises(TypeError, match="JSON"):
        write_trace(path, Trace(COUNTS[:1], meta={"a": object()}))
    assert np.array_equal(read_trace(path).counts, COUNTS)
    assert os.listdir(tmp_path) == ["t.npz"]


@pytest.mark.parametrize(
    ("descr", "shape", "message"),
    [
        ("'<u2'", f"({2**60}, 1, 1, 1)", "claims 2305843009213693952 bytes"),
        ("'<u2'", f"({2**60}, {2**60}, {2**60}, 8)", "claims"),
        ("'<u2'", "(1, 1, 1, 1024)", "claims 2048 bytes .* and holds 8"),
        ("'<u2'", "(1, 1, 4)", r"uint16 of the shape \[1, 1, 4\]"),
        ("'<f4'", "(1, 1, 1, 2)", "float32"),
        ("'|O'", "(1, 1, 1, 1)", "object"),
        ("[('a', '<u2')]", "(1, 1, 1, 4)", "of the shape"),
        ("'<u2'", "(-1, 1, 1, -4)", "negative shape"),
        ("'<u2'", "__import__('os').getcwd()", "no valid npy header"),
        ("'<U9999999999999'", "(1, 1, 1, 1)", "a trace is written by"),
        ("'<u2'", "(" * 900 + ")" * 900, "no valid npy header"),
    ],
)
def test_a_header_that_lies_is_refused(
    tmp_path: Path, descr: str, shape: str, message: str
) -> None:
    path = npz(tmp_path / "t.npz", counts=npy_header(descr, shape) + bytes(8))
    with pytest.raises(ValueError, match=message) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    size = 80 * 2**20
    path = npz(
        tmp_path / "t.npz", counts=npy_header("'<u2'", f"({size // 2}, 1, 1, 1)") + bytes(size)
    )
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="which no recorded load does"):
            read_trace(path)
        with pytest.raises(ValueError, match="more than the 1000 allowed"):
            read_trace(
                npz(tmp_path / "u.npz", counts=npy(np.zeros((1000, 1, 1, 1), int))), max_bytes=1000
            )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20


def test_an_archive_that_understates_its_sizes_is_refused(tmp_path: Path) -> None:
    path = npz(tmp_path / "t.npz", counts=npy(COUNTS))
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\x01\x02")
    struct.pack_into("<I", data, directory + 24, len(npy(COUNTS)) // 2)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged|not a readable"):
        read_trace(path)


@pytest.mark.parametrize("keep", [0, 1, 10, 100, -1, -40])
def test_a_truncated_trace_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "t.npz"
    write_trace(path, Trace(COUNTS))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"t\.npz: is not a readable npz file"):
        read_trace(path)


@given(st.data())
def test_flipped_bytes_never_raise_anything_but_a_clear_error(
    tmp_path_factory: Any, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("trace") / "t.npz"
    write_trace(path, Trace(COUNTS, None, {"a": 1}))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    message = None
    try:
        read_trace(path)
    except ValueError as error:
        message = str(error)
    assert message is None or str(path) in message


def test_what_is_no_trace_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        read_trace(tmp_path / "missing.npz")
    with pytest.raises(IsADirectoryError, match="is a directory"):
        read_trace(tmp_path)
    text = tmp_path / "text"
    text.write_text("hello")
    with pytest.raises(ValueError, match="text: is not a readable npz file"):
        read_trace(text)
    with pytest.raises(ValueError, match=r"has no array 'counts' \(found: other\.npy"):
        read_trace(npz(tmp_path / "o.npz", other=npy(COUNTS)))
    with pytest.raises(ValueError, match="no valid npy header"):
        read_trace(npz(tmp_path / "p.npz", counts=b"garbage"))
    with pytest.raises(ValueError, match=r"counts must be token counts .* got -5"):
        read_trace(npz(tmp_path / "n.npz", counts=npy(COUNTS.astype(int) - 5)))
    with pytest.raises(ValueError, match="mix must be floats"):
        read_trace(npz(tmp_path / "m.npz", counts=npy(COUNTS), mix=npy(np.zeros((9, 1)))))
    with pytest.raises(ValueError, match="object"):
        read_trace(npz(tmp_path / "q.npz", counts=npy(np.array([[[[None]]]]))))


@pytest.mark.parametrize("meta", ["[1]", "{", "[" * 100_000, "9" * 10_000])
def test_meta_that_is_no_json_object_is_refused(tmp_path: Path, meta: str) -> None:
    path = npz(tmp_path / "t.npz", counts=npy(COUNTS), meta=npy(np.array(meta)))
    with pytest.raises(ValueError, match="meta is not a JSON object"):
        read_trace(path)


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    raised: list[BaseException] = []

    def read() -> None:
        try:
            read_trace(path)
        except ValueError as error:
            raised.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert "not a regular file" in str(raised[0])


@given(st.integers(1, 70), st.integers(1, 40))
def test_window_samples_keep_the_load_and_the_limit(steps: int, max_samples: int) -> None:
    load = np.random.default_rng(steps).integers(0, 2**40, (steps, 2, 3))
    samples = window_samples(load, max_samples)
    assert len(samples) <= max_samples
    assert len(samples) <= steps
    assert np.array_equal(samples.sum(axis=0), load.sum(axis=0))
    assert samples.dtype == np.int64


def test_window_samples_refuse_what_they_cannot_sum() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        window_samples(np.zeros((0, 2, 3), int))
    with pytest.raises(ValueError, match="max_samples"):
        window_samples(np.zeros((1, 2, 3), int), 0)


def test_narrow_counts_do_not_overflow_when_they_are_summed() -> None:
    counts = np.full((4, 2, 1, 1), 65535, dtype=np.uint16)
    load = Trace(counts).load()
    assert load.ravel().tolist() == [131070] * 4
    assert window_samples(load.astype(np.uint32), 1).ravel().tolist() == [4 * 131070]


def test_load_is_read_from_a_trace_and_from_a_plain_array(tmp_path: Path) -> None:
    trace = tmp_path / "t.npz"
    write_trace(trace, Trace(COUNTS))
    assert np.array_equal(read_load(trace), COUNTS.sum(axis=1))
    plain = npz(tmp_path / "p.npz", load=npy(np.array([[1, 2, 3]])))
    assert read_load(plain).tolist() == [[[1, 2, 3]]]
    with pytest.raises(ValueError, match="holds no load"):
        read_load(npz(tmp_path / "e.npz", load=npy(np.zeros((0, 2, 3), int))))
