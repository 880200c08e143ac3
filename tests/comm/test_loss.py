"""Who is lost, as one rank finds out."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from torch_eplb.comm.loss import LossDetector
from torch_eplb.comm.processes import ProcessIdentity, _started
from torch_eplb.comm.store import BoundedStore


@contextmanager
def processes(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes of this machine that do nothing."""
    started = [subprocess.Popen(["sleep", "60"]) for _ in range(count)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_second_loss_names_those_that_are_lost_then() -> None:
    own = ProcessIdentity.own()
    with processes(2) as others:
        detector = LossDetector(BoundedStore(dist.HashStore(), 5.0), 0, 3, timeout=30)
        detector.watch(
            [own, *(ProcessIdentity(own.machine, p.pid, _started(p.pid)) for p in others)]
        )
        lost = []
        for process in others:
            process.kill()
            process.wait()
            # A peer's connection is closed more than once.
            lost += [detector.lost("a test", RuntimeError("closed")).ranks for _ in range(2)]
    assert lost == [(1,), (1,), (1, 2), (1, 2)]
