"""The command line, as a user runs it: results, one-line errors, exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torch_eplb.files.expert_map import read_expert_map
from torch_eplb.files.trace import Trace, write_trace
from torch_eplb.offline.cli import main

MODEL: dict[str, int] = {"num_layers": 2, "num_experts": 12, "num_ranks": 4}


@pytest.fixture
def trace(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    heat = rng.gamma(0.6, 1.0, (1, 1, 2, 12))
    path = tmp_path / "trace.npz"
    write_trace(path, Trace(rng.poisson(200 * heat, (24, 2, 2, 12))))
    return str(path)


def simulate(trace: str, *more: str) -> int:
    short = ["--ranks", "4", "--redundant", "4", "--window", "6", "--interval", "6"]
    return main(["simulate", trace, *short, *more])


def test_simulate_prints_a_table_and_writes_json(trace: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.json"
    options = ["--policy", "deepseek", "static", "--replica-choice", "batch", "even"]
    assert simulate(trace, *options, "--json", str(out)) == 0
    printed = capsys.readouterr()
    rows = [line.split()[:2] for line in printed.out.splitlines()[2:7]]
    assert rows == [
        ["none", "even"],
        ["deepseek", "batch"],
        ["deepseek", "even"],
        ["static", "batch"],
        ["static", "even"],
    ]
    assert "assumption" in printed.out
    assert printed.err == ""
    document = json.loads(out.read_text())
    assert document["policies"]["deepseek+batch"]["par_mean"] >= 1
    assert document["trace"]["name"] == "trace.npz"


def test_flow_with_the_batch_split_is_the_default(trace: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert simulate(trace, "--json", str(out)) == 0
    policies = json.loads(out.read_text())["policies"]
    assert list(policies) == ["none", "flow"]
    assert policies["flow"]["replica_choice"] == "batch"
    assert policies["flow"]["par_mean"] < policies["none"]["par_mean"]


def test_policies_may_be_given_one_by_one(trace: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert simulate(trace, "--policy", "static", "--policy", "deepseek", "--json", str(out)) == 0
    assert list(json.loads(out.read_text())["policies"]) == ["none", "static", "deepseek"]


def test_the_cost_model_can_be_given(trace: str, tmp_path: Path) -> None:
    entries = []
    for options in ([], ["--tflops", "188"], ["--hardware", "h100"], ["--flops-per-token", "1e6"]):
        out = tmp_path / "out.json"
        options = ["--policy", "deepseek", "--expert-bytes", "1000000", *options]
        assert simulate(trace, *options, "--json", str(out)) == 0
        entries.append(json.loads(out.read_text())["policies"]["deepseek"])
    ascend, slow, h100, same = entries
    assert slow["compute_ms"] == pytest.approx(2 * ascend["compute_ms"])
    assert slow["migration_ms"] == pytest.approx(ascend["migration_ms"])
    assert h100["step_ms"] < ascend["step_ms"]
    assert same["compute_ms"] == pytest.approx(ascend["compute_ms"])


def test_plan_writes_an_expert_map_that_balances(trace: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "map.json"
    options = ["--ranks", "4", "--redundant", "4", "--policy", "deepseek", "--out", str(out)]
    assert main(["plan", trace, *options]) == 0
    placement = read_expert_map(out, num_slots=4, **MODEL)
    assert (placement.replica_counts().sum(axis=1) == 16).all()
    words = capsys.readouterr().out.split("mean PAR on this load ")[1].split()
    before, after = float(words[0]), float(words[2])
    assert after < before


def test_plan_reads_plain_load_and_numbers_layers_from_the_first_one(tmp_path: Path) -> None:
    load, out = tmp_path / "load.npz", tmp_path / "map.json"
    np.savez(load, load=np.arange(1, 25).reshape(2, 12))
    options = ["--ranks", "4", "--redundant", "4", "--first-layer", "3", "--out", str(out)]
    assert main(["plan", str(load), *options]) == 0
    assert [e["layer_id"] for e in json.loads(out.read_text())["layer_list"]] == [3, 4]
    read_expert_map(out, layer_ids=[3, 4], **MODEL)


def test_plot_draws_a_trace_and_a_simulation(trace: str, tmp_path: Path) -> None:
    stats = tmp_path / "stats.json"
    assert simulate(trace, "--policy", "deepseek", "--json", str(stats)) == 0
    short = ["--ranks", "4", "--window", "6", "--policy", "static"]
    for number, source in enumerate(([trace, *short], [str(stats)])):
        out = tmp_path / f"{number}.png"
        assert main(["plot", *source, "--out", str(out)]) == 0
        assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["simulate", "{none}"], "No such file or directory: '{none}'"),
        (["simulate", "{folder}"], "{folder}: is a directory"),
        (["simulate", "{text}"], "{text}: is not a readable npz file"),
        (
            ["simulate", "{trace}", "--ranks", "5", "--window", "6"],
            "cannot be spread over 5 ranks",
        ),
        (["simulate", "{trace}", "--window", "6", "--ranks", "4", "--min-gain", "nan"], "min_gain"),
        (
            ["simulate", "{trace}", "--window", "6", "--ranks", "4", "--max-moves", "-1"],
            "max_moves",
        ),
        (["plan", "{trace}", "--ranks", "4", "--target-par", "0", "--out", "{none}"], "target_par"),
        (["simulate", "{trace}", "--ranks", "4"], "a window of 50 steps leaves none of 24"),
        (["simulate", "{trace}", "--ranks", "0"], "num_ranks must be at least 1, got 0"),
        (["simulate", "{trace}", "--steps", "99"], "steps must be from 1 to the trace's 24"),
        (["simulate", "{trace}", "--expert-bytes", "lots"], "--expert-bytes='lots' is not a size"),
        (["simulate", "{trace}", "--expert-bytes", "0"], "expert_bytes must be a finite number"),
        (["simulate", "{trace}", "--tflops", "nan"], "flops_per_second must be a finite number"),
        (["simulate", "{trace}", "--json", "{folder}"], "{folder}: is a directory"),
        (["simulate", "{trace}", "--json", "{none}/x"], "create it first"),
        (["plan", "{trace}", "--ranks", "4", "--out", "{folder}"], "{folder}: is a directory"),
        (["plan", "{text}", "--ranks", "4", "--out", "{none}"], "not a readable npz file"),
        (["plan", "{trace}", "--ranks", "5", "--out", "{none}"], "cannot be spread over 5 ranks"),
        (
            ["plan", "{trace}", "--ranks", "4", "--out", "{none}", "--first-layer", "-1"],
            "--first-layer must not be negative",
        ),
        (["plot", "{none}", "--out", "{none}.png"], "No such file or directory: '{none}'"),
        (["plot", "{folder}", "--out", "{none}"], "{folder}: is a directory"),
        (["plot", "{text}", "--out", "{none}"], "{text}: neither a trace nor JSON"),
        (["plot", "{json}", "--out", "{none}"], "{json}: is not the JSON of a simulation"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    trace: str, tmp_path: Path, capsys: Any, options: list[str], message: str
) -> None:
    names = {
        "trace": trace,
        "none": str(tmp_path / "none"),
        "folder": str(tmp_path),
        "text": str(tmp_path / "text"),
        "json": str(tmp_path / "json"),
    }
    Path(names["text"]).write_text("hello")
    Path(names["json"]).write_text("{}")
    assert main([option.format(**names) for option in options]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert printed.err.startswith(f"torch_eplb {options[0]}: error: ")
    assert message.format(**names) in printed.err


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["dance"],
        ["simulate"],
        ["simulate", "x", "--policy", "magic"],
        ["simulate", "x", "--replica-choice", "magic"],
        ["plan", "x", "--out", "y"],
        ["plot", "x"],
    ],
)
def test_wrong_usage_exits_with_status_2(options: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main(options)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_the_module_runs_and_loads_neither_torch_nor_matplotlib(trace: str) -> None:
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['torch_eplb', 'simulate', {trace!r}, '--ranks', '4', '--window', '6']\n"
        "try:\n"
        "    runpy.run_module('torch_eplb', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "assert not {'torch', 'scipy', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "PAR mean" in done.stdout


def test_a_reader_that_leaves_early_is_no_error(trace: str) -> None:
    command = [
        sys.executable,
        "-m",
        "torch_eplb",
        "simulate",
        trace,
        "--ranks",
        "4",
        "--window",
        "6",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert error == b""


def test_planning_keeps_to_one_core_unless_told() -> None:
    said = (
        "import runpy, sys, os; sys.argv[1:] = ['--help'];\n"
        "try: runpy.run_module('torch_eplb', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(os.environ['OMP_NUM_THREADS'], os.environ['OPENBLAS_NUM_THREADS'])"
    )
    env = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    env["OPENBLAS_NUM_THREADS"] = "2"
    out = subprocess.run(
        [sys.executable, "-c", said],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert out.stdout.splitlines()[-1] == "1 2"
