"""The site of the documentation, which ``python -m tox -e docs`` builds into ``out/site``.

Its sources are the pages of the repository where they are, so that links between them are the same
in both. The order of the pages is that of ``docs/index.md``; the reference is made from docstrings.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

project = "torch_eplb"
author = "the torch_eplb authors"
copyright = author

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "examples/**.md", "docs/site/reference/*.rst"]
exclude_patterns = [".*", "out", "build", "dist", "tests", "torch_eplb"]
html_theme = "furo"
html_title = "torch_eplb"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "monokai"

myst_heading_anchors = 4

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_use_legacy_class_based = False
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False


def navigation() -> list[tuple[str, list[str]]]:
    """Sections of ``docs/index.md`` with their pages, as Sphinx names them."""
    found: list[tuple[str, list[str]]] = []
    for line in (ROOT / "docs" / "index.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            found.append((line[3:], []))
        elif match := re.match(r"\d+\. \[.*?\]\(([\w/.]+\.md)\)", line):
            path = (ROOT / "docs" / match[1]).resolve().relative_to(ROOT)
            found[-1][1].append(f"/{path.with_suffix('')}")
    found[-1][1].append("/docs/index")
    reference = sorted((ROOT / "docs" / "site" / "reference").glob("*.rst"))
    return [
        *found,
        ("Reference", [f"/docs/site/reference/{path.stem}" for path in reference]),
    ]


def add_navigation(app: Any, name: str, source: list[str]) -> None:
    if name != root_doc:
        return
    for title, pages in navigation():
        body = "\n".join(pages)
        source[0] += f"\n```{{toctree}}\n:caption: {title}\n:hidden:\n\n{body}\n```\n"


def add_front_door(app: Any, error: Exception | None) -> None:
    if error is None:
        page = f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html">\n'
        (Path(app.outdir) / "index.html").write_text(page, encoding="utf-8")


def mark_code(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """In docstrings a line that ends with a colon is followed by a blank one and indented code."""
    for number in range(len(lines) - 2):
        if re.search(r"[^:]:$", lines[number]) and not lines[number + 1]:
            if re.match(r"    +\S", lines[number + 2]):
                lines[number] += ":"
    _written[what, name] = list(lines)


_written: dict[tuple[str, str], list[str]] = {}


def keep_colons(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Napoleon takes what stands before an attribute's first colon for its type; ours have none."""
    written = _written.pop((what, name))
    if what in ("attribute", "data", "property"):
        lines[:] = written


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", mark_code, priority=100)
    app.connect("autodoc-process-docstring", keep_colons, priority=900)
    app.connect("source-read", add_navigation)
    app.connect("build-finished", add_front_door)
