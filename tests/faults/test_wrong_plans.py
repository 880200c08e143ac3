"""Plans on their way to all ranks are written once, looked through once, and refused if wrong."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.models import QUICK, ToyModel, skewed_batch
from support.ranks import run_ranks
from support.stand_ins import stand_in

import torch_eplb
from torch_eplb.planner import broadcast, child, process
from torch_eplb.planner.process import PlanReply
from torch_eplb.testing import fake_process_group, run_until
from torch_eplb.values.rounds import Schedule


def serve_with_a_liar(rank: int, world_size: int, source: str) -> dict[str, Any]:
    """The first planner's rounds are wrong; outputs are compared in every step."""
    process.BACKOFF_FIRST_SECONDS = 0.05
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("torch_eplb").addHandler(handler)
    honest = child._command
    child._command = stand_in(source)
    model = ToyModel()
    reference = copy.deepcopy(model)
    steps = itertools.count()

    def serve() -> None:
        x = skewed_batch(12, 16, 100 * next(steps) + rank)
        torch.testing.assert_close(balancer(x), reference(x), atol=1e-5, rtol=1e-4)

    with torch.no_grad(), torch_eplb.wrap(model, **QUICK) as balancer:
        while balancer.stats().plans_failed < 1:
            serve()
        assert balancer.stats().rebalances == 0
        child._command = honest
        while balancer.stats().rebalances < 2:
            serve()
        stats = balancer.stats()
    return {"failed": stats.plans_failed, "restarts": stats.planner_restarts, "said": said}


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("reply_with_rounds(lambda rounds: rounds[:-1])", "after the last round layer"),
        ("reply_for_other(staging_bytes=1 << 20, direct=False)", "bytes, the staging has"),
        ("reply_for_other(layers_per_round=2)", "touches 2 layers, layers_per_round is 1"),
    ],
)
def test_wrong_rounds_are_refused_by_every_rank_and_cost_the_planner_a_restart(
    source: str, cause: str
) -> None:
    leading, other = run_ranks(serve_with_a_liar, 2, f"ready(); {source}")
    assert leading["failed"] == other["failed"] == 1
    assert leading["restarts"] == 1
    for rank, answer in enumerate((leading, other)):
        assert len(answer["said"]) == 1
        assert answer["said"][0].startswith(f"rank {rank} cannot use the plan it got: ")
        assert cause in answer["said"][0]


def test_a_plan_is_written_once_and_its_rounds_are_looked_through_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replayed: list[Schedule] = []
    replay = Schedule.replay

    def counted(schedule: Schedule) -> Iterator[Any]:
        replayed.append(schedule)
        return replay(schedule)

    def write(reply: PlanReply) -> None:
        raise AssertionError("the planner process writes plans, and nobody else")

    monkeypatch.setattr(Schedule, "replay", counted)
    monkeypatch.setattr(broadcast, "encode_plan", write)
    x = skewed_batch(12, 16, 0)
    with fake_process_group(2), torch.no_grad():
        balancer = torch_eplb.wrap(ToyModel(), **QUICK)
        run_until(lambda: balancer.stats().rebalances >= 3, lambda: balancer(x))
        assert balancer.stats().plans_failed == 0
        balancer.close()
    assert len(replayed) == 3
