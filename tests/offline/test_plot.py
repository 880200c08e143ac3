"""Pictures: drawn from any valid simulation, refused for anything else."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torch_eplb.files.trace import Trace
from torch_eplb.offline.plot import plot_simulation, read_simulation
from torch_eplb.offline.replay import Settings
from torch_eplb.offline.simulate import simulate


def document(layers: int = 2, experts: int = 12, ranks: int = 4, **more: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    counts = rng.poisson(
        50 * rng.gamma(0.6, 1.0, (1, 1, layers, experts)), (12, 1, layers, experts)
    )
    settings = Settings(num_ranks=ranks, window=4, interval=4)
    return simulate(Trace(counts), settings, **{"policies": ["deepseek"], **more})


def size_of(path: Path) -> tuple[int, int]:
    """(width, height) of a PNG, from its header."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.mark.parametrize(
    "drawn",
    [
        document(),
        document(policies=[]),
        document(
            policies=["deepseek", "static"], replica_choices=["batch", "local", "table", "even"]
        ),
        document(layers=60, experts=128, ranks=64, policies=["static"]),
        document(layers=1, experts=4, ranks=1),
    ],
    ids=["one policy", "no policy", "nine lines", "large", "tiny"],
)
def test_any_simulation_becomes_a_picture(drawn: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    plot_simulation(drawn, path, dpi=50)
    width, height = size_of(path)
    assert width == 550
    assert 300 < height < 1200
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.png"]


def test_a_simulation_that_was_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(document()))
    assert read_simulation(path)["policies"].keys() == {"none", "deepseek"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("d.clear()", "no 'expert_load'"),
        ("d['policies'] = {}", "no policies"),
        ("d['policies'] = [1]", "attribute"),
        ("d['expert_load'] = [[1, 2], [3]]", "inhomogeneous"),
        ("d['expert_load'] = [1]", "expert_load is not a table"),
        ("d['expert_load'].pop()", "rank_load of none has 2 layers, not 1"),
        ("del p['rank_load']", "no 'rank_load'"),
        ("p['par_series'] = []", "par_series of none is not a list of numbers"),
        ("p['par_series'] = 'x'", "could not convert"),
        ("p['rebalance_steps'] = [[]]", "inhomogeneous"),
        ("p['par_mean'] = None", "par_mean of none"),
        ("p['par_mean'] = float('nan')", "par_mean of none"),
        ("p['first_step'] = 0.5", "first_step of none"),
    ],
)
def test_other_json_is_refused(tmp_path: Path, change: str, message: str) -> None:
    d = copy.deepcopy(document())
    exec(change, {"d": d, "p": d["policies"]["none"]})
    path = tmp_path / "s.json"
    path.write_text(json.dumps(d))
    with pytest.raises(ValueError, match=message) as caught:
        read_simulation(path)
    assert str(caught.value).startswith(f"{path}: is not the JSON of a simulation")
    assert "simulate TRACE" in str(caught.value)


def test_a_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install torch-eplb\[demo\]"):
        plot_simulation(document(), tmp_path / "p.png")
    assert list(tmp_path.iterdir()) == []
