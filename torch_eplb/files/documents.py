"""Files of other tools as plain data, whatever their format: JSON, JSON lines, csv, npy, npz, pt.

The format is told by the file's first bytes, never by its name. Nothing here knows what the data
mean (`torch_eplb.files.engines` does), and nothing is unpickled.

Imports numpy only; torch when a ``.pt`` file is read.
"""

from __future__ import annotations

import csv
import json
import os
import struct
import zipfile
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from torch_eplb.files.npz import HEADER_ERRORS, open_npz
from torch_eplb.files.paths import PathLike, open_checked
from torch_eplb.files.pt import read_pt

__all__ = ["Document", "Table", "read_document"]

MAX_TEXT_BYTES = 256 * 2**20
MAX_ARRAY_BYTES = 4 * 2**30
_READABLE = "JSON, JSON lines, csv, npy, npz and pt (torch.save) files are read"


@dataclass(frozen=True)
class Table:
    """A csv file: the words of its first line if that holds no numbers, and rows of numbers."""

    header: list[str] | None
    rows: list[list[float]]


@dataclass(frozen=True)
class Document:
    """A file's content.

    Attributes:
        path: where it came from.
        kind: "json", "jsonl", "csv", "npy", "npz" or "pt".
        value: dicts, lists, numbers, text and numpy arrays; a list of objects for "jsonl", a
            `Table` for "csv", a dict of arrays for "npz".
    """

    path: str
    kind: str
    value: Any


def read_document(path: PathLike) -> Document:
    """The content of a file.

    Raises:
        OSError: the file is missing, unreadable or a directory.
        ValueError: none of the formats, damaged or too large; the message says what was expected.
    """
    name = os.fspath(path)
    with open_checked(path, "load or map", MAX_ARRAY_BYTES) as file:
        start = file.read(64)
        file.seek(0)
        if start.startswith(b"\x93NUMPY"):
            return Document(name, "npy", _read_npy(name))
        is_npz = start.startswith(b"PK") and _holds_arrays(file)
    if is_npz:
        return Document(name, "npz", _read_npz(name))
    if start.startswith((b"PK", b"\x80", b"\x8a")):
        return Document(name, "pt", read_pt(name))
    return _read_text(name)


def _read_npy(name: str) -> Any:
    try:
        # Mapped first, so that a header which claims more than the file holds is refused.
        return np.array(np.load(name, mmap_mode="r", allow_pickle=False))
    except (*HEADER_ERRORS, OSError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{name}: is not a readable npy file ({reason}); save a plain array of numbers with "
            "numpy.save"
        ) from None


def _holds_arrays(file: BinaryIO) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return any(member.endswith(".npy") for member in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError, struct.error):
        return False


def _read_npz(name: str) -> dict[str, Any]:
    remedy = "save plain arrays with numpy.savez"
    with open_npz(name, what="npz file", remedy=remedy, max_bytes=MAX_ARRAY_BYTES) as archive:
        names = [n.removesuffix(".npy") for n in archive.zip.namelist() if n.endswith(".npy")]
        return {
            array: archive.read(array, lambda dtype, _: dtype.kind in "iufbUS", MAX_ARRAY_BYTES)
            for array in names
        }


def _read_text(name: str) -> Document:
    with open_checked(name, "text file", MAX_TEXT_BYTES) as file:
        data = file.read(MAX_TEXT_BYTES)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text or not text.strip():
        what = "is empty" if not text.strip() else "is neither text nor a known binary format"
        raise ValueError(f"{name}: {what}; {_READABLE}")
    if text.lstrip()[0] not in "{[":
        return Document(name, "csv", _read_table(text, name))
    try:
        return Document(name, "json", json.loads(text))
    except (ValueError, RecursionError) as error:
        lines = text.splitlines()
        if len(lines) == 1 or not lines[0].rstrip().endswith("}"):
            raise ValueError(f"{name}: is not JSON ({error}); {_READABLE}") from None
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    return Document(name, "jsonl", [_read_line(name, *line) for line in filled])


def _read_line(name: str, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: line {number} is not JSON ({error})") from None


def _read_table(text: str, name: str) -> Table:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    separator = next((s for s in ",;\t" if s in lines[0]), " ") if lines else ","
    skip = separator == " "
    cells = [
        [cell.strip() for cell in row]
        for row in csv.reader(lines, delimiter=separator, skipinitialspace=skip)
    ]
    if skip:
        cells = [[cell for cell in row if cell] for row in cells]
    header = None
    if cells and not any(_is_number(cell) for cell in cells[0]):
        header = [word.lower() for word in cells.pop(0)]
    rows = []
    for number, row in enumerate(cells, 1):
        wrong = [cell for cell in row if not _is_number(cell)]
        if wrong:
            raise ValueError(
                f"{name}: row {number} of the table has {wrong[0][:40]!r}, which is no number; "
                f"{_READABLE}"
            )
        rows.append([float(cell) for cell in row])
    if not rows:
        raise ValueError(f"{name}: is a table without rows; {_READABLE}")
    return Table(header, rows)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
