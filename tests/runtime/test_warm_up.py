"""What a device compiles for splits is compiled by `wrap`, not in the middle of serving."""

from __future__ import annotations

from typing import Any

import pytest
from support.models import ToyModel

import torch_eplb
from torch_eplb.routing import split_batch
from torch_eplb.runtime import engine
from torch_eplb.testing import fake_process_group


@pytest.mark.parametrize(
    ("dispatch", "choice", "solves"),
    [
        ("all_reduce", "batch", True),
        ("all_gather", "batch", True),
        ("all_to_all", "local", True),
        ("all_reduce", "table", False),
        ("all_to_all", "batch", False),  # on the host
    ],
)
def test_wrap_solves_an_empty_batch_where_the_device_will_solve(
    dispatch: Any, choice: Any, solves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = []

    def seen(*args: Any) -> Any:
        solved.append(split_batch(*args))
        return solved[-1]

    monkeypatch.setattr(engine, "split_batch", seen)
    with fake_process_group(world_size=2):
        torch_eplb.wrap(
            ToyModel(), dispatch=dispatch, replica_choice=choice, num_redundant_experts=2
        ).close()
    assert [quotas.sum().item() for quotas in solved] == [0] * solves
