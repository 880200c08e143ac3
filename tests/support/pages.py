"""The documentation's pages: their blocks of code, and what the hidden comments before them say.

A comment is a list of words, ``<!-- test: ranks=2, setup=moved -->``. For Python there are:

=====================  =============================================================================
``ranks=N``            the block runs on N real ranks, in a gloo group that is there already
``alone``              in one process without a group
``torchrun=N``         as a program, which `torchrun` starts on N ranks
``launched=N``         as a program that a launcher has started on N ranks; faster, without one
``file=NAME``          how that program is called on the page
``into=NAME``          the block stands for lines of that program: from the one that begins like the
                       block's first line to the one that begins like its last
``setup=NAME``         what the block finds and what must hold after it (`support.page_setups`)
``device=TYPE``        it needs a device of this type for every rank; where they are not there,
``else=OLD:NEW``       this text is replaced, so that the rest runs on the CPU
=====================  =============================================================================

For shell commands ``run`` runs them; without it they are checked as far as that goes without
running them. For JSON ``expert_map=LxExR`` reads it as a map of so many layers, experts and ranks.
Scripts in bash are jobs of ``slurm``; YAML is for ``kubernetes``, or ``alerts`` of Prometheus.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

from support.programs import ROOT

__all__ = ["Block", "PageError", "find_blocks", "pages", "program", "text_of"]

WORDS = {
    "python": {"ranks", "alone", "torchrun", "launched", "file", "into", "setup", "device", "else"},
    "sh": {"run"},
    "bash": {"slurm"},
    "yaml": {"kubernetes", "alerts"},
    "json": {"expert_map"},
    "text": set(),
}
"""Languages, and the words of each."""

_COMMENT = re.compile(r"<!-- test: (.*) -->")
_COMMAND = re.compile(r"\s*(\$|>>>|import |from \w+ import|(python|pip|torchrun|git) )")


class PageError(ValueError):
    """A page has a block that no test knows how to run."""


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        page: its file, relative to the repository.
        line: of the first line of code, counted from 1.
        language: what the fence says.
        code: the text between the fences.
        words: of the comment before it; a word that is there several times has several values.
    """

    page: str
    line: int
    language: str
    code: str
    words: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def word(self, name: str) -> str | None:
        """The value of a word that is there once at most; "" for a word without a value."""
        values = self.words.get(name)
        if values is None:
            return None
        if len(values) > 1:
            raise PageError(f"{self}: {name} is given more than once")
        return values[0]

    def number(self, name: str) -> int:
        """The value of a word, as a number; 0 if it is not there."""
        return int(self.word(name) or 0)


def pages() -> list[str]:
    """Every page, relative to the repository, README first."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
    return sorted(
        (str(path.relative_to(ROOT)) for path in found), key=lambda p: (p != "README.md", p)
    )


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def find_blocks(text: str, page: str) -> Iterator[Block]:
    """All blocks of code of a page.

    Raises:
        PageError: a block cannot be tested: it has no known language, it is indented instead of
            fenced, or what the comment says is unknown or stands alone.
    """
    lines = text.splitlines()
    comment: tuple[int, dict[str, list[str]]] | None = None
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if line.startswith("```"):
            end = _end_of_fence(lines, number, page)
            words = comment[1] if comment else {}
            code = "\n".join(lines[number:end]) + "\n"
            yield _checked(Block(page, number + 1, line[3:].strip(), code, words))
            comment, number = None, end + 1
            continue
        if comment and line.strip():
            raise PageError(f"{page}:{comment[0]}: this comment is followed by no block of code")
        if match := _COMMENT.fullmatch(line.strip()):
            comment = (number, _words(match[1]))
        elif "```" in line or line.lstrip().startswith("<!-- test"):
            raise PageError(f"{page}:{number}: a fence or a test's comment has a line of its own")
        elif re.match(r"( {4}|\t)\s*\S", line) and (number < 2 or not lines[number - 2].strip()):
            raise PageError(f"{page}:{number}: code is fenced, with its language, not indented")
    if comment:
        raise PageError(f"{page}:{comment[0]}: this comment is followed by no block of code")


def _end_of_fence(lines: list[str], start: int, page: str) -> int:
    for number in range(start, len(lines)):
        if lines[number].rstrip() == "```":
            return number
    raise PageError(f"{page}:{start}: this fence is never closed")


def _words(text: str) -> dict[str, list[str]]:
    words: dict[str, list[str]] = {}
    for word in text.split(", "):
        name, _, value = word.partition("=")
        words.setdefault(name, []).append(value)
    return words


def _checked(block: Block) -> Block:
    if block.language not in WORDS:
        raise PageError(
            f"{block}: no test knows the language {block.language!r}; use one of {', '.join(WORDS)}"
        )
    unknown = set(block.words) - WORDS[block.language]
    if unknown:
        raise PageError(f"{block}: unknown in a test's comment: {', '.join(sorted(unknown))}")
    ways = [word for word in ("ranks", "alone", "torchrun", "launched") if word in block.words]
    if block.language == "python" and len(ways) != 1:
        raise PageError(
            f"{block}: say how it is tested, in a comment before it: <!-- test: ranks=2 -->, "
            "alone, torchrun=2 or launched=2"
        )
    if block.language in ("bash", "yaml") and not block.words:
        raise PageError(f"{block}: say what it is: one of {', '.join(WORDS[block.language])}")
    if block.language == "json" and "expert_map" not in block.words:
        raise PageError(f"{block}: say what it is: <!-- test: expert_map=1x4x2 -->")
    if block.language == "text" and any(map(_COMMAND.match, block.code.splitlines())):
        raise PageError(f"{block}: looks like code; give its language, so that it is tested")
    return block


def program(block: Block, others: list[Block], *, without_device: bool) -> str:
    """The program that a ``torchrun`` or ``launched`` block is, or stands in.

    Args:
        block: with or without ``into``.
        others: the blocks of the page.
        without_device: replace what needs a device.

    Raises:
        PageError: the other program, or a text to be replaced, is not there.
    """
    code = block.code
    for pair in block.words.get("else", []) if without_device else []:
        old, _, new = pair.partition(":")
        if old not in code:
            raise PageError(f"{block}: there is no {old} to be replaced")
        code = code.replace(old, new)
    name = block.word("into")
    if name is None:
        return code
    whole = [other.code for other in others if other.word("file") == name]
    if len(whole) != 1:
        raise PageError(f"{block}: {len(whole)} blocks of the page are called {name}")
    lines, part = whole[0].splitlines(), block.code.splitlines()
    first, last = _line_like(part[0], lines, block), _line_like(part[-1], lines, block)
    return "\n".join([*lines[:first], *code.splitlines(), *lines[last + 1 :]]) + "\n"


def _line_like(line: str, lines: list[str], block: Block) -> int:
    """The line that begins as ``line`` does, up to its first bracket."""
    beginning = line[: line.index("(") + 1]
    found = [number for number, other in enumerate(lines) if other.startswith(beginning)]
    if len(found) != 1:
        raise PageError(f"{block}: {len(found)} lines of the program begin with {beginning}")
    return found[0]
