"""What a wrapped model does when planning or a transfer fails: serve on, say why, and recover.

`test_planner_faults` has all the ways in which a planner goes wrong; here are a few of them, seen
through `stats()`, the log and the outputs.
"""

from __future__ import annotations

import copy
import itertools
import logging
import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from support.models import QUICK, ToyModel, skewed_batch
from support.ranks import run_ranks

import torch_eplb
from torch_eplb.comm.transport import GlooTransfer
from torch_eplb.planner import process
from torch_eplb.runtime import cycle
from torch_eplb.testing import fake_process_group


class Said(logging.Handler):
    """Warnings of the library."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        logging.getLogger("torch_eplb").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def wrong_once(answer: str) -> Any:
    """A policy whose second answer is wrong; it runs in a thread of rank 0."""
    calls = itertools.count()
    generator = np.random.default_rng(0)

    def policy(load: Any, placement: Any, topology: Any) -> Any:
        if next(calls) == 1:
            if answer == "raise":
                raise ArithmeticError("no way")
            return placement.experts * 0
        order = generator.permutation(placement.num_experts)
        return order[placement.experts].astype(np.int32)

    return policy


def strike(rank: int, world_size: int, how: str) -> dict[str, Any]:
    """Outputs are compared in every step, before, during and after the fault."""
    process.BACKOFF_FIRST_SECONDS = 0.05
    said = Said()
    model = ToyModel()
    reference = copy.deepcopy(model)
    options = {**QUICK, "policy": wrong_once(how)} if how in ("raise", "garbage") else QUICK
    balancer = torch_eplb.wrap(model, **options)
    steps = itertools.count()

    def serve() -> None:
        x = skewed_batch(12, 16, 100 * next(steps) + rank)
        torch.testing.assert_close(balancer(x), reference(x), atol=1e-5, rtol=1e-4)

    with torch.no_grad():
        while balancer.stats().rebalances < 1:
            serve()
        assert said.lines == []
        if rank == 0 and how.startswith("SIG"):
            assert balancer.engine._planner is not None
            balancer.engine._planner._timeout = 1.0
            os.kill(balancer.engine._planner.pid, getattr(signal, how))  # type: ignore[arg-type]
        while balancer.stats().plans_failed < 1:
            serve()
        before = balancer.stats()
        if rank == 0 and balancer.engine._planner is not None:
            balancer.engine._planner._timeout = 30.0
        while balancer.stats().rebalances < before.rebalances + 2:
            serve()
    stats = balancer.stats()
    balancer.close()
    return {
        "failed": stats.plans_failed,
        "rebalances": stats.rebalances,
        "restarts": stats.planner_restarts,
        "disabled": stats.disabled,
        "said": said.lines,
    }


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("SIGKILL", "was killed by SIGKILL"),
        ("SIGSTOP", "gave no answer within 1 s"),
        ("raise", "policy raised ArithmeticError: no way"),
        ("garbage", "expert 1 has no slot"),
    ],
)
def test_a_planner_fault_costs_one_plan_and_one_warning_and_balancing_resumes(
    how: str, cause: str
) -> None:
    planning, other = run_ranks(strike, 2, how)
    assert planning["failed"] == other["failed"] == 1
    assert planning["rebalances"] == other["rebalances"]
    assert planning["restarts"] == (1 if how.startswith("SIG") else 0)
    assert planning["disabled"] is other["disabled"] is None
    assert len(planning["said"]) == 1
    assert cause in planning["said"][0]
    assert "serving goes on" in planning["said"][0]
    assert other["said"] == []


def damaged_on_the_way(rank: int, world_size: int) -> tuple[list[str], int, int]:
    """The second plan that rank 1 gets is wrong in its last round."""
    cycle._CHECKED_AT_ONCE = 1
    said = Said()
    calls = itertools.count()
    decode = cycle.decode_plan

    def decode_damaged(words: Any, *others: Any) -> Any:
        if rank == 1 and next(calls) == 1:
            words = words.copy()
            words[-6] ^= 1  # the last transfer's expert
        return decode(words, *others)

    cycle.decode_plan = decode_damaged
    model = ToyModel()
    reference = copy.deepcopy(model)
    stages = []
    with torch.no_grad(), torch_eplb.wrap(model, **QUICK) as balancer:
        while balancer.stats().rebalances < 2:
            x = skewed_batch(12, 16, 100 * len(stages) + rank)
            torch.testing.assert_close(balancer(x), reference(x), atol=1e-5, rtol=1e-4)
            stages.append(balancer.stats().stage)
        stats = balancer.stats()
    # Every rank has the plan, but looks at one round per step.
    assert stages.count("waiting for every rank to have the plan") > 6
    return said.lines, stats.plans_failed, stats.rebalances


def test_a_plan_that_one_rank_finds_wrong_in_its_last_round_is_not_begun() -> None:
    (said, *counts), (said_by_1, *counts_of_1) = run_ranks(damaged_on_the_way, 2)
    assert counts == counts_of_1 == [1, 2]
    assert said == []
    assert len(said_by_1) == 1
    assert "rank 1 cannot use the plan it got: round " in said_by_1[0]


def test_a_plan_that_is_never_ready_is_reported_and_applied_when_it_comes() -> None:
    said = Said()
    come = threading.Event()

    def policy(load: Any, placement: Any, topology: Any) -> Any:
        come.wait(60)
        return placement

    x = skewed_batch(12, 16, 0)
    with fake_process_group(2), torch.no_grad():
        balancer = torch_eplb.wrap(ToyModel(), **{**QUICK, "policy": policy})
        assert balancer.engine._cycle._stall_limit == 1000
        balancer.engine._cycle._stall_limit = 20
        deadline = time.monotonic() + 30
        while balancer.stats().stage != "waiting for the plan":
            balancer(x)
        for _ in range(19):
            balancer(x)
            assert balancer.stats().stalled is None
        for _ in range(30):
            balancer(x)
            assert balancer.stats().stalled == "waiting for the plan for 20 steps"
        warnings = [line for line in said.lines if "makes no progress" in line]
        assert warnings == [
            "rank 0: balancing makes no progress: waiting for the plan for 20 steps"
        ]
        come.set()
        while balancer.stats().rebalances < 1:
            balancer(x)
            assert time.monotonic() < deadline
        assert balancer.stats().stalled is None
        balancer.close()


def damage_what_arrives(balancer: torch_eplb.ExpertLoadBalancer, times: int | None = None) -> None:
    """A bit flips in everything that this rank receives, in so many rounds."""
    exchange = balancer.engine.exchange
    verified = exchange.verified
    damaged = itertools.count()

    def damage() -> bool:
        if times is None or next(damaged) < times:
            with torch.inference_mode():
                for _, tensors in exchange._received_sums:
                    tensors[0][0] ^= 1
        return verified()

    exchange.verified = damage  # type: ignore[method-assign]


def damaged_twice(
    rank: int, world_size: int, direct: bool, overlap: bool
) -> tuple[str | None, int]:
    model = ToyModel()
    reference = copy.deepcopy(model)
    balancer = torch_eplb.wrap(model, **QUICK, verify=True, direct=direct, overlap=overlap)
    if rank == 1:
        damage_what_arrives(balancer)
    with torch.no_grad():
        x = skewed_batch(12, 16, rank)
        while balancer.stats().disabled is None and balancer.stats().rebalances_abandoned < 3:
            torch.testing.assert_close(balancer(x), reference(x), atol=1e-5, rtol=1e-4)
        balancer.load_state_dict(reference.state_dict())
        torch.testing.assert_close(balancer(x), reference(x), atol=1e-5, rtol=1e-4)
        balancer.close()
        assert torch.equal(balancer.unwrap()(x), reference(x))
    return balancer.stats().disabled, balancer.stats().rebalances_abandoned


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("direct", [True, False])
def test_transfers_that_are_always_damaged_end_balancing_and_nothing_else(
    direct: bool, overlap: bool
) -> None:
    for disabled, abandoned in run_ranks(damaged_twice, 2, direct, overlap):
        assert abandoned >= 1
        if direct:
            # The first damage has destroyed a drained slot, the second its repair.
            assert disabled == "received experts failed their checksums twice in a row"
        else:
            assert disabled is None


def closed_while_damaged(rank: int, world_size: int, overlap: bool, later: int) -> int:
    """close() so many steps after a round was posted that fails its checksums; faults seen."""
    model = ToyModel()
    reference = copy.deepcopy(model)
    balancer = torch_eplb.wrap(model, **QUICK, verify=True, overlap=overlap)
    if rank == 1:
        damage_what_arrives(balancer, times=1)
    with torch.no_grad():
        x = skewed_batch(12, 16, rank)
        while balancer.stats().stage != "moving experts":
            balancer(x)
        assert not balancer.engine._migration.live.all()
        for _ in range(later):
            torch.testing.assert_close(balancer(x), reference(x), atol=1e-5, rtol=1e-4)
        balancer.close()
        assert balancer.engine._migration.live.all()
        assert balancer.stats().disabled is None
        torch.testing.assert_close(balancer(x), reference(x), atol=1e-5, rtol=1e-4)
        assert torch.equal(balancer.unwrap()(x), reference(x))
    return balancer.stats().rebalances_abandoned


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("later", [0, 1])
def test_close_repairs_what_a_damaged_round_has_destroyed(overlap: bool, later: int) -> None:
    assert run_ranks(closed_while_damaged, 2, overlap, later) == [1, 1]


def endless_round(rank: int, world_size: int) -> list[str]:
    """On rank 1 the transfers of a round look unfinished for as long as the flag says so."""
    said = Said()
    stuck = rank == 1
    finished = GlooTransfer.finished
    GlooTransfer.finished = lambda self: not stuck and finished(self)  # type: ignore[method-assign]
    model = ToyModel()
    reference = copy.deepcopy(model)
    balancer = torch_eplb.wrap(model, **QUICK)
    steps = itertools.count()

    def serve() -> None:
        x = skewed_batch(12, 16, 100 * next(steps) + rank)
        torch.testing.assert_close(balancer(x), reference(x), atol=1e-5, rtol=1e-4)

    with torch.no_grad():
        while balancer.stats().stage != "moving experts":
            serve()
        balancer.engine._cycle._stall_limit = 20
        for _ in range(19):
            serve()
            assert balancer.stats().stalled is None
        for _ in range(10):
            serve()
            assert str(balancer.stats().stalled).startswith("moving experts for 20 steps (round 0 ")
        stuck = False
        while balancer.stats().rebalances < 1:
            serve()
        assert balancer.stats().stalled is None
    balancer.close()
    return said.lines


def test_a_round_that_never_completes_is_reported_on_every_rank_and_costs_no_output() -> None:
    for rank, lines in enumerate(run_ranks(endless_round, 2)):
        assert len(lines) == 1
        assert lines[0].startswith(f"rank {rank}: balancing makes no progress: moving experts for")
