"""What the documentation points to is there: links, headings, files and folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest
from support.pages import find_blocks, pages, text_of
from support.programs import ROOT

FOREIGN = "<!-- paths of other projects -->"
"""In a page that mentions files which are not here; paths that begin like ours are checked all the
same."""

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", re.MULTILINE)
PATH = re.compile(r"(?<![\w./:*-])(?:[\w.-]+/)*[\w-]+\.(?:py|cfg|ini|toml|md)\b(?![\w/])")
OURS = re.compile(r"(?<![\w./:-])(?:torch_eplb|tests|examples|docs|\.ci)/[\w./-]*")


def headings(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"(?ms)^```.*?^```$", "", text_of(page))
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def links(text: str) -> Iterator[str]:
    for match in LINK.finditer(text):
        target = match[1] or match[2]
        if not re.match(r"(https?|mailto):", target):
            yield target


def wrong_links(text: str, page: str) -> list[str]:
    """Links of a page that lead nowhere."""
    wrong = []
    for target in links(text):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if not path.resolve().is_relative_to(ROOT) or not path.exists():
            wrong.append(target)
        elif anchor and anchor not in headings(str(path.resolve().relative_to(ROOT))):
            wrong.append(target)
    return wrong


def paths(text: str) -> set[str]:
    """Files and folders of this repository that a text mentions, other than in links."""
    text = re.sub(r"https?://\S+", "", LINK.sub("", text))
    named = set() if FOREIGN in text else set(PATH.findall(text))
    return named | {path.rstrip(".") for path in OURS.findall(text)}


def missing_paths(text: str, page: str) -> list[str]:
    """Paths that are neither in the repository, nor beside the page, nor programs of the page."""
    programs = {block.word("file") for block in find_blocks(text, page)}
    places = (ROOT, (ROOT / page).parent)
    return sorted(
        path
        for path in paths(text)
        if path not in programs and not any((place / path).exists() for place in places)
    )


@pytest.mark.parametrize("page", pages())
def test_every_link_leads_somewhere(page: str) -> None:
    assert wrong_links(text_of(page), page) == []


@pytest.mark.parametrize("page", pages())
def test_every_path_that_is_mentioned_exists(page: str) -> None:
    assert missing_paths(text_of(page), page) == []


def test_the_index_orders_all_pages() -> None:
    index = text_of("docs/index.md")
    listed = re.findall(r"^(\d+)\. \[.*?\]\(([\w/.]+\.md)\)", index, re.MULTILINE)
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
    names = [os.path.normpath(f"docs/{name}") for _, name in listed]
    assert sorted(names) == sorted({*pages()} - {"README.md", "docs/index.md"})
    assert "docs/index.md" in set(links(text_of("README.md")))


# ---- the tests of these tests -------------------------------------------------------------------


def test_a_link_that_leads_nowhere_is_found() -> None:
    text = (
        "[a](docs/index.md) [b](docs/no_such.md) [c](https://example.org/no_such) "
        "[d](docs/index.md#using-it) [e](docs/index.md#no-such) [f](#quick-start) [g](#no-such)\n"
        "[h]: no_such/file\n[i]: SECURITY.md\n"
    )
    expected = ["docs/no_such.md", "docs/index.md#no-such", "#no-such", "no_such/file"]
    assert wrong_links(text, "README.md") == expected


def test_a_path_that_is_not_there_is_found() -> None:
    text = (
        "`torch_eplb/balancer.py` and `torch_eplb/comm.py`, `tests/planner`, `tests/planning`, "
        "`cycle.py`, `tox.ini`; see tests/support/pages.py. Not https://example.org/x/y.py\n"
    )
    assert missing_paths(text, "README.md") == ["cycle.py", "tests/planning", "torch_eplb/comm.py"]
    foreign = f"{FOREIGN}\n\n`core/worker.py`, `torch_eplb/comm.py`\n"
    assert missing_paths(foreign, "README.md") == ["torch_eplb/comm.py"]
