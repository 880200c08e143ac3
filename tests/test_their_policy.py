"""A balancer that places experts by a function with DeepSeek's signature."""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import QUICK, ToyModel, skewed_batch

import torch_eplb
from torch_eplb.testing import fake_process_group, run_until

# The hottest experts get the redundant slots, and both their replicas sit on one rank.
THEIRS = """
import os
import torch

def rebalance_experts(weight: torch.Tensor, num_replicas, num_groups, num_nodes, num_gpus):
    weight = weight.float().cpu()
    layers, experts = weight.shape
    order = weight.argsort(-1, descending=True)
    extra = num_replicas - experts
    phy2log = torch.cat((order, order[:, :extra]), dim=1)
    phy2log = phy2log.view(layers, -1, num_gpus).transpose(1, 2).flatten(1)
    with open(__file__ + ".seen", "a") as file:
        print(os.getpid(), weight[0].argmax().item(), num_replicas, num_gpus, file=file)
    logcnt = torch.stack([row.bincount(minlength=experts) for row in phy2log])
    return phy2log, torch.full((layers, experts, int(logcnt.max())), -1), logcnt
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    name = f"theirs_{uuid.uuid4().hex}"
    (tmp_path / f"{name}.py").write_text(THEIRS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module(name)


def serve(policy: Callable[..., Any]) -> tuple[int | None, torch_eplb.Placement]:
    """Two rebalances on rank 0 of 4; the planner's process and the placement."""
    batch = skewed_batch(64, 16, 0, strength=8.0)
    with fake_process_group(4), torch.no_grad():
        model = torch_eplb.wrap(ToyModel(), **{**QUICK, "policy": policy})
        planner = model.engine._planner
        assert planner is not None
        pid = planner.pid
        run_until(lambda: model.stats().rebalances >= 2, lambda: model(batch))
        assert model.stats().plans_failed == 0
        placement = model.placement
        model.close()
    return pid, placement


@pytest.mark.parametrize("where", ["process", "thread"])
def test_their_function_places_the_experts_of_a_running_model(theirs: Any, where: str) -> None:
    function = theirs.rebalance_experts
    if where == "thread":
        # The annotation travels with a wrapper that no other process could import.
        def function(weight: torch.Tensor, *sizes: int) -> Any:
            return theirs.rebalance_experts(weight, *sizes)

    pid, placement = serve(torch_eplb.from_rebalance_experts(function))
    seen = Path(theirs.__file__ + ".seen").read_text().split("\n")[:-1]
    assert len(seen) >= 2
    for line in seen:
        by, hottest, replicas, gpus = map(int, line.split())
        assert by == (os.getpid() if where == "thread" else pid)
        assert (replicas, gpus) == (12, 4)
    assert placement.logcnt[0, hottest] == 2
    assert placement.held()[0, hottest].sum() == 2
    assert np.array_equal(np.sort(placement.logcnt, axis=1), [[1] * 4 + [2] * 4] * 2)
    assert placement != torch_eplb.Placement.initial(2, 8, 4, 3)
