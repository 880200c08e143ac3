"""Tests that need torch_npu on a simulated CANN; elsewhere they are skipped unread."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest


class _LeftOut(pytest.Module):
    """A file of tests whose imports would fail here."""

    def collect(self) -> Iterable[pytest.Item]:
        pytest.skip("needs torch_npu on a simulated CANN: tox -e npu", allow_module_level=True)


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    if "TORCH_EPLB_NPU_SIM" in os.environ:
        return None
    return _LeftOut.from_parent(parent, path=module_path)
