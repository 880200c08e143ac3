"""Signals to a program under `torchrun`, and to one of its ranks: all of it ends, silently."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

SUPPORT = Path(__file__).parents[1]
PROGRAM = """
import os, sys
import torch
import torch.distributed as dist
import torch_eplb
from support.models import ToyModel, skewed_batch

dist.init_process_group("gloo")
rank = dist.get_rank()
balancer = torch_eplb.wrap(
    ToyModel(), num_redundant_experts=4, policy="random", collect_interval=4, plan_interval=1
)
said = False
try:
    with torch.no_grad():
        step = 0
        while True:
            balancer(skewed_batch(12, 16, 100 * step + rank))
            step += 1
            if rank == 0 and not said and balancer.stats().rebalances >= 1:
                said = True
                print(os.getpid(), balancer.engine._planner.pid, flush=True)
except KeyboardInterrupt:
    os._exit(0)  # a server's own good manners
"""


def wait_for(condition: Callable[[], bool], limit: float) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def session(leader: int) -> list[int]:
    """Processes of a session that are still there."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getsid(process.pid) == leader and not is_gone(process.pid):
                found.append(process.pid)
    return found


@pytest.mark.parametrize(
    ("number", "whom"),
    [
        (signal.SIGINT, "everybody"),  # Ctrl-C reaches the whole foreground group
        (signal.SIGTERM, "launcher"),
        (signal.SIGKILL, "rank 0"),
    ],
)
def test_a_launched_program_ends_as_a_whole_and_the_planner_says_nothing(
    tmp_path: Path, number: signal.Signals, whom: str
) -> None:
    program, temporary = tmp_path / "program.py", tmp_path / "temporary"
    program.write_text(PROGRAM)
    temporary.mkdir()
    launched = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(program)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(SUPPORT), *filter(None, sys.path)]),
            "TMPDIR": str(temporary),
            "OMP_NUM_THREADS": "1",
        },
    )
    with launched:
        try:
            assert launched.stdout is not None
            server, planner = map(int, launched.stdout.readline().split())
            for pid in (server, planner):
                maps = psutil.Process(pid).memory_maps()
                assert not [m.path for m in maps if m.path.startswith("/dev/shm")]
            if whom == "everybody":
                os.killpg(launched.pid, number)
            else:
                os.kill(launched.pid if whom == "launcher" else server, number)
            wait_for(lambda: is_gone(server), 30)
            wait_for(lambda: is_gone(planner), 2.0)
            _, errors = launched.communicate(timeout=40)
            wait_for(lambda: not session(launched.pid), 10)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launched.pid, signal.SIGKILL)
    # The launcher says what it does; neither the planner nor the wrapped model adds a word, except
    # that rank 1 may have missed rank 0 already.
    if whom != "rank 0":
        assert "torch_eplb" not in errors, errors
    assert "torch_eplb/planner" not in errors, errors
    assert "BrokenPipe" not in errors, errors
    # What lies there is the launcher's own.
    assert not [path for path in temporary.rglob("*") if "eplb" in path.name]
