"""Every example in the package's docstrings gives what it says."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import torch_eplb

PACKAGE = Path(torch_eplb.__file__).parent
MODULES = sorted(
    ".".join(("torch_eplb", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_are_true(name: str) -> None:
    if name == "torch_eplb.routing.quotas_triton":
        pytest.importorskip("triton")
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0
    assert results.failed == 0


def test_modules_with_examples_are_found() -> None:
    assert {
        "torch_eplb.values.placement",
        "torch_eplb.comm.agreement",
        "torch_eplb.policies.flow",
    } <= set(MODULES)
