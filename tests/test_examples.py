"""Every example runs, in its short form, and says what it is meant to say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.programs import run


def test_the_main_job_balances_a_trained_model_and_its_tokens_are_equal(tmp_path: Path) -> None:
    output = run("examples/serve_moe.py", "--short", "--out", str(tmp_path))
    assert re.search(r"greedy tokens.*equal", output, re.IGNORECASE), output
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert len(pictures) == 2, pictures


def test_a_layer_that_dispatches_with_mc2_is_balanced_by_what_it_counts() -> None:
    output = run("examples/ascend_mc2.py")
    assert re.search(r"steps on cpu with the stand-in: \d+ rebalances moved [1-9]", output), output
    assert "outputs equal the unwrapped model's" in output


@pytest.mark.parametrize(
    "arguments",
    [
        ("examples/check_device.py", "--seconds", "0.05"),
        ("examples/benchmarks/throughput.py", "--short"),
        ("examples/benchmarks/hot_path.py", "--short"),
        ("examples/benchmarks/migration.py", "--short"),
        ("examples/benchmarks/schedule.py", "--quick"),
        ("examples/benchmarks/planning.py", "--short"),
        ("examples/benchmarks/optimum.py", "--short"),
    ],
    ids=lambda arguments: Path(arguments[0]).stem,
)
def test_a_benchmark_runs_in_its_short_form(arguments: tuple[str, ...]) -> None:
    output = run(*arguments)
    assert len(output.splitlines()) > 3


def test_the_command_line_simulates_the_shipped_trace() -> None:
    output = run(
        *("-m", "torch_eplb", "simulate", "examples/data/trace.npz", "--ranks", "8"),
        *("--redundant", "8", "--steps", "150", "--policy", "flow"),
    )
    assert "flow" in output
    assert "none" in output
