"""Files that cannot be written: found before the model is touched, or a warning and a number."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import QUICK, ToyModel, skewed_batch
from support.ranks import run_ranks

import torch_eplb


def wrap_with_a_wrong_path(rank: int, world_size: int, name: str, path: str) -> None:
    model = ToyModel()
    options: dict[str, Any] = {**QUICK, name: path}
    # Only rank 0 would write: it says what is wrong, and the other is told.
    error = FileNotFoundError if rank == 0 else ValueError
    with pytest.raises(error, match="does not exist; create it first"):
        torch_eplb.wrap(model, **options)
    assert all(len(p) == 8 for name, p in model.named_parameters() if "experts" in name)
    torch_eplb.wrap(model, **QUICK).close()


@pytest.mark.parametrize("name", ["record_path", "record_map_path"])
def test_a_path_that_only_one_rank_cannot_write_leaves_every_model_as_it_was(
    name: str, tmp_path: Path
) -> None:
    run_ranks(wrap_with_a_wrong_path, 2, name, str(tmp_path / "missing" / "file"))


def lose_the_folder(rank: int, world_size: int, folder: str) -> int:
    options: Any = {**QUICK, "record_map_path": f"{folder}/map.json"}
    balancer = torch_eplb.wrap(ToyModel(), **options)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder)
    dist.barrier()
    step = 0
    with torch.no_grad():
        for step in range(200):
            balancer(skewed_batch(12, 16, 100 * step + rank))
    stats = balancer.stats()
    balancer.close()
    assert stats.step == step + 1
    assert stats.disabled is None
    return stats.writes_failed


def test_a_folder_that_goes_away_costs_no_forward(tmp_path: Path) -> None:
    folder = tmp_path / "maps"
    folder.mkdir()
    failed = run_ranks(lose_the_folder, 2, str(folder))
    assert failed[0] > 0
    assert failed[1] == 0
