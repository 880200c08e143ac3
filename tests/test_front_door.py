"""What a user meets first: the arguments of `wrap`, what a balancer says of itself, its hook."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import QUICK, ToyModel, skewed_batch
from support.ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh

import torch_eplb
from torch_eplb.runtime.options import Options
from torch_eplb.testing import fake_process_group
from torch_eplb.values.events import CommittedRound

ROOT = Path(torch_eplb.__file__).parents[1]


def test_keyword_arguments_are_the_fields_of_config_with_their_types() -> None:
    fields = typing.get_type_hints(torch_eplb.Config)
    assert {f.name: fields[f.name] for f in dataclasses.fields(torch_eplb.Config)} == (
        typing.get_type_hints(Options)
    )


USES = """
import torch_eplb
from torch import nn

model = nn.Linear(1, 1)
balancer = torch_eplb.wrap(model, num_redundant_experts=2, dispatch="all_reduce", phase="decode")
reveal_type(balancer.stats().rebalances)
torch_eplb.wrap(model, collect_intervall=3)
torch_eplb.wrap(model, dispatch="all-to-all")
torch_eplb.wrap(model, replica_choice="random")
torch_eplb.wrap(model, num_redundant_experts="2")
torch_eplb.wrap(model, policy="eplb")
torch_eplb.Config(dispatch="none")
"""


def test_a_type_checker_finds_wrong_keywords_and_wrong_values(tmp_path: Path) -> None:
    (tmp_path / "uses.py").write_text(USES)
    command = [sys.executable, "-m", "mypy", "--no-site-packages", "--ignore-missing-imports"]
    command += ["--follow-imports=silent", f"--cache-dir={tmp_path}", "--config-file=", "uses.py"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = {
        int(line.split(":")[1]): line for line in done.stdout.splitlines() if ": error:" in line
    }
    assert sorted(found) == [8, 9, 10, 11, 12, 13], done.stdout + done.stderr
    assert 'Unexpected keyword argument "collect_intervall"' in found[8]
    for line in (9, 10, 12, 13):
        assert "Literal['" in found[line], found[line]
    assert 'expected "int"' in found[11]
    assert 'Revealed type is "int"' in done.stdout.replace("builtins.", "")


def test_options_go_before_a_configs_fields() -> None:
    start = torch_eplb.Config(num_redundant_experts=4, dispatch="external", timeout=30)
    with fake_process_group(4):
        balancer = torch_eplb.wrap(ToyModel(), config=start, timeout=20, dispatch="all_reduce")
        with balancer:
            config = balancer.eplb_config
            assert config == dataclasses.replace(
                start, timeout=20, dispatch="all_reduce", replica_choice="batch"
            )
        with pytest.raises(TypeError, match=r"config must be a torch_eplb\.Config, got dict"):
            torch_eplb.wrap(ToyModel(), config={"timeout": 20})  # type: ignore[arg-type]


def wrap_on_a_mesh(rank: int, world_size: int) -> tuple[int, int]:
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("dp", "ep"))
    with pytest.raises(ValueError, match="must have one dimension, got 2"):
        torch_eplb.wrap(ToyModel(), mesh)
    with pytest.raises(TypeError, match="got str"):
        torch_eplb.wrap(ToyModel(), "ep")  # type: ignore[arg-type]
    with torch_eplb.wrap(ToyModel(), mesh["ep"], timeout=30) as balancer:
        placement = balancer.placement
        x = skewed_batch(12, 16, rank)
        with torch.no_grad():
            torch.testing.assert_close(balancer(x), ToyModel()(x), atol=1e-5, rtol=1e-4)
    return placement.num_ranks, placement.num_slots


def test_a_one_dimensional_mesh_is_a_group() -> None:
    assert run_ranks(wrap_on_a_mesh, 4) == [(2, 4)] * 4


def test_a_balancer_says_what_it_is() -> None:
    with fake_process_group(4, rank=1):
        balancer = torch_eplb.wrap(ToyModel(), num_redundant_experts=4)
        first = repr(balancer).splitlines()[0]
        for text in ("rank 1 of 4", "2 MoE layers of 8 experts", "3 slots per rank"):
            assert text in first
        assert "placement version 0; collecting load" in first
        assert "(router): Linear" in repr(balancer)
        balancer.engine._turn_off("the test says so")
        assert "disabled: the test says so" in repr(balancer).splitlines()[0]
        balancer.close()
        assert "closed" in repr(balancer).splitlines()[0]


def follow_experts(rank: int, world_size: int) -> int:
    """Keeps a copy of the placement by what the hook tells, and a tensor per slot of its own."""
    balancer = torch_eplb.wrap(ToyModel(), **QUICK)
    followed = balancer.placement.experts.copy()
    heard: list[int] = []

    def hook(committed: CommittedRound) -> None:
        heard.append(committed.placement_version)
        before = followed.copy()
        for move in committed.moves:
            where = move.layer, move.rank, move.slot
            assert before[where] == move.old_expert
            assert before[move.layer, move.source_rank, move.source_slot] == move.new_expert
            followed[where] = move.new_expert
        assert committed.to(rank) == tuple(m for m in committed.moves if m.rank == rank)

    handle = balancer.register_rebalance_hook(hook)
    with torch.no_grad():
        step = 0
        while balancer.stats().rebalances < 3:
            step += 1
            balancer(skewed_batch(12, 16, 100 * step + rank))
            assert (followed == balancer.placement.experts).all()
            assert len(heard) == balancer.stats().placement_version
        assert heard == list(range(1, len(heard) + 1))
        handle.remove()
        while balancer.stats().rebalances < 4:
            step += 1
            balancer(skewed_batch(12, 16, 100 * step + rank))
    assert len(heard) < balancer.stats().placement_version
    balancer.close()
    return len(heard)


def test_a_rebalance_hook_hears_of_every_committed_round() -> None:
    heard = run_ranks(follow_experts, 2)
    assert heard[0] == heard[1] > 0


def test_a_hook_that_raises_undoes_nothing() -> None:
    with fake_process_group(2):
        balancer = torch_eplb.wrap(ToyModel(), **QUICK)

        def hook(committed: CommittedRound) -> None:
            raise KeyError("mine")

        handle = balancer.register_rebalance_hook(hook)
        x: Any = skewed_batch(12, 16, 0)
        with torch.no_grad(), pytest.raises(KeyError, match="mine"):
            torch_eplb.testing.run_until(lambda: False, lambda: balancer(x))
        step = balancer.stats().step
        assert balancer.stats().placement_version > 0
        handle.remove()
        with torch.no_grad():
            balancer(x)
        assert balancer.stats().step == step + 1
        assert balancer.stats().disabled is None
        balancer.close()
