"""Real text of several kinds, found on every machine that has Python.

The examples need input of different kinds, because different kinds of text use different experts.
All of it comes out of the standard library, so nothing is downloaded. Text is bytes, and a token
is a byte.
"""

from __future__ import annotations

import ast
import html
import sysconfig
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from html.entities import html5
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

Document = tuple[str, Callable[[], str]]  # its name, and how to read it

STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
NOT_SOURCES = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}


def builtin_streams(*, held_out: bool, limit: int = 3_000_000) -> dict[str, bytes]:
    """One stream of text per kind.

    Args:
        held_out: False gives seven eighths of the documents, which `train_tiny_moe.py` trains on;
            True the eighth that it never sees. Checksums of the documents' names decide, so the
            division is the same on every machine.
        limit: bytes per stream at most.
    """
    kinds: dict[str, Iterable[Document]] = {
        "code": _sources(),
        "docs": ((name, partial(str, text)) for name, text in topics.items()),
        "codecs": ((p.name, partial(_read, p)) for p in STANDARD_LIBRARY.glob("encodings/*.py")),
        "unicode": _unicode_tables(),
        "html": _html_tables(),
        "trees": ((name, partial(_syntax_tree, read)) for name, read in _sources()),
    }
    return {kind: _join(documents, held_out, limit) for kind, documents in kinds.items()}


def streams_of(paths: Iterable[Path]) -> dict[str, bytes]:
    """One stream per path: a file's bytes, or those of all files below a folder.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a path holds less text than a batch needs.
    """
    streams = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        text = b"\n".join(file.read_bytes() for file in files)
        if len(text) < 4096:
            raise ValueError(f"{path}: {len(text)} bytes of text, at least 4096 are needed")
        streams[str(path)] = text
    return streams


def windows(stream: bytes, count: int, length: int, generator: torch.Generator) -> Tensor:
    """``count`` random pieces of a stream as tokens, int64 ``[count, length]``."""
    starts = torch.randint(len(stream) - length + 1, (count,), generator=generator).tolist()
    return torch.tensor([list(stream[start : start + length]) for start in starts])


def _join(documents: Iterable[Document], held_out: bool, limit: int) -> bytes:
    """The documents of one side of the division as UTF-8, in the order of their checksums."""
    numbered = sorted(
        ((zlib.crc32(name.encode()), name, read) for name, read in documents),
        key=lambda document: document[:2],
    )
    text = bytearray()
    for number, _, read in numbered:
        if (number % 8 == 0) == held_out and len(text) < limit:
            text += read().encode() + b"\n"
    return bytes(text[:limit])


def _sources() -> Iterator[Document]:
    for path in STANDARD_LIBRARY.rglob("*.py"):
        name = path.relative_to(STANDARD_LIBRARY)
        if NOT_SOURCES.isdisjoint(name.parts):
            yield name.as_posix(), partial(_read, path)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")


def _syntax_tree(read: Callable[[], str]) -> str:
    try:
        return ast.dump(ast.parse(read()[:20_000].rpartition("\n\n\n")[0]), indent=1)
    except SyntaxError:  # cut in the middle of a string, or a file that is broken on purpose
        return ""


def _unicode_tables() -> Iterator[Document]:
    """The Unicode database, 64 code points a document, without the ideographs' numbered names."""

    def table(start: int) -> str:
        rows = []
        for code in range(start, start + 64):
            char = chr(code)
            name = unicodedata.name(char, "")
            if name and not name.endswith(f"-{code:X}"):
                kind, width = unicodedata.category(char), unicodedata.east_asian_width(char)
                rows.append(f"U+{code:04X}\t{char}\t{kind}\t{width}\t{name}")
        return "\n".join(rows)

    for start in range(0x40, 0x20000, 64):
        yield f"unicode-{start}", partial(table, start)


def _html_tables() -> Iterator[Document]:
    """HTML's named characters as tables in HTML, 50 rows a document."""
    names = sorted(name for name in html5 if name.endswith(";"))

    def table(first: int) -> str:
        rows = (
            f'<tr id="{name[:-1]}"><td><code>&amp;{name}</code></td>'
            f"<td>{html.escape(html5[name])}</td>"
            f"<td>{' '.join(f'U+{ord(c):05X}' for c in html5[name])}</td></tr>"
            for name in names[first : first + 50]
        )
        return "<table>\n" + "\n".join(rows) + "\n</table>"

    for first in range(0, len(names), 50):
        yield f"html-{first}", partial(table, first)
