"""Programs as a user starts them: in a process of their own, with a time limit; or their parts."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(
    *arguments: str,
    timeout: float = 240.0,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> str:
    """The output of ``python arguments...``; the test fails if it fails or takes too long."""
    defaults = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **defaults, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        pytest.fail(f"{arguments} took longer than {timeout:g} s:\n{output}")
    assert process.returncode == 0, f"{arguments} ended with {process.returncode}:\n{output}"
    return output


def example(path: str) -> Any:
    """The module of a file below ``examples``, to use its parts in this process."""
    source = ROOT / "examples" / path
    spec = importlib.util.spec_from_file_location(source.stem, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
