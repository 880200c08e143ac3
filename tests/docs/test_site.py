"""The site has all pages, and its reference all public names; ``tox -e docs`` builds it."""

from __future__ import annotations

import re
import runpy
from types import SimpleNamespace

from support.pages import pages
from support.programs import ROOT

import torch_eplb
from torch_eplb import exporters

SITE = ROOT / "docs" / "site"


CONF = SimpleNamespace(**runpy.run_path(str(SITE / "conf.py")))


def test_every_page_and_no_other_is_in_the_navigation() -> None:
    listed = [page for _, section in CONF.navigation() for page in section]
    assert len(set(listed)) == len(listed)
    files = {f"/{page}".removesuffix(".md") for page in pages() if page != "README.md"}
    files |= {f"/docs/site/reference/{path.stem}" for path in SITE.glob("reference/*.rst")}
    assert set(listed) == files


def test_indented_code_of_docstrings_is_shown_as_code() -> None:
    lines = [
        "Do it so:",
        "",
        "    x = 1",
        "",
        "Args:",
        "    x: a number:",
        "",
        "Note::",
        "",
        "    y",
    ]
    CONF.mark_code(None, "", "", None, None, lines)
    assert lines[0] == "Do it so::"
    assert lines[4:] == ["Args:", "    x: a number:", "", "Note::", "", "    y"]


def test_every_public_name_is_in_the_reference() -> None:
    texts = [path.read_text(encoding="utf-8") for path in SITE.glob("reference/*.rst")]
    named = {name for text in texts for name in re.findall(r":: torch_eplb\.([\w.]+)", text)}
    named |= {name.partition(".")[0] for name in named} | {"__version__"}
    assert {*torch_eplb.__all__, *torch_eplb._MODULES} <= named
    assert {f"exporters.{name}" for name in exporters.__all__} <= named
