"""Files appear complete or not at all, and only ordinary files are read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from torch_eplb.files.paths import atomic_write, check_target, open_checked


def test_a_written_file_has_the_permissions_of_an_ordinary_one(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"x")
    with atomic_write(tmp_path / "ours", "file") as file:
        file.write(b"x")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")]
    assert modes[0] == modes[1]


def test_nobody_sees_a_file_before_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with atomic_write(path, "file") as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_a_block_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def write() -> None:
        with atomic_write(path, "file") as file:
            file.write(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_relative_path_without_a_folder_is_fine(tmp_path: Path) -> None:
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        with atomic_write("f", "file") as file:
            file.write(b"x")
        with open_checked("f", "file", 1) as file:
            assert file.read() == b"x"
    finally:
        os.chdir(before)


def test_devices_are_neither_read_nor_replaced() -> None:
    with pytest.raises(ValueError, match="/dev/zero: is not a regular file"):
        open_checked("/dev/zero", "map", 10)
    with pytest.raises(ValueError, match="/dev/null: is not a regular file"):
        check_target("/dev/null", "map")


def test_a_file_may_have_the_limit_and_no_byte_more(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"12345")
    open_checked(path, "map", 5).close()
    with pytest.raises(ValueError, match="5 bytes are more than the 4 that a map may have"):
        open_checked(path, "map", 4)
