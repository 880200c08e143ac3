"""The short suite for other versions than those that everything is tested with, ``-m smoke``; and
that no property is timed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Each subject's own tests: what torch, numpy and Python do for us, and each way of serving.
SMOKE = (
    "adapters/test_planning.py",
    "comm",
    "distributed/test_dcp.py",
    "distributed/test_dispatch.py",
    "distributed/test_full_state.py",
    "distributed/test_groups.py",
    "distributed/test_pretrained.py",
    "exporters/test_exporters.py",
    "files",
    "layers/test_experts.py",
    "layers/test_grouped.py",
    "layers/test_sums.py",
    "planner/test_process.py",
    "policies/test_registry.py",
    "policies/test_split.py",
    "routing/test_choose.py",
    "routing/test_quotas.py",
    "routing/test_tables.py",
    "runtime/test_cycle.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    chosen = [ROOT / name for name in SMOKE]
    for item in items:
        if any(item.path == path or path in item.path.parents for path in chosen):
            item.add_marker(pytest.mark.smoke)
