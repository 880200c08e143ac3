"""Batches of operations on an accelerator, whose works end later than they are posted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import ToyModel
from support.ranks import run_ranks

import torch_eplb
from torch_eplb.comm import transport
from torch_eplb.comm.communicator import make_communicator
from torch_eplb.testing import fake_process_group


class Late:
    """What an accelerator's backend gives for an operation: done when the device says so."""

    def __init__(self) -> None:
        self.done = False
        self.failure: Exception | None = None
        self.waited = 0

    def is_completed(self) -> bool:
        return self.done

    def exception(self) -> Exception | None:
        return self.failure if self.done else None

    def wait(self) -> bool:
        self.waited += 1
        return True


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> list[Late]:
    """Works of the batch that is posted next."""
    works = [Late(), Late()]
    monkeypatch.setattr(transport.dist, "batch_isend_irecv", lambda operations: works)
    return works


def test_a_device_transfer_has_finished_when_all_its_works_have(works: list[Late]) -> None:
    operations: Any = [object(), object()]
    transfer = transport.DeviceTransfer(operations, 10.0, "round 3")
    assert not transfer.finished()
    works[0].done = True
    assert not transfer.finished()
    works[1].done = True
    assert transfer.finished()


def test_what_has_failed_is_complete_and_not_finished(works: list[Late]) -> None:
    operations: Any = [object(), object()]
    transfer = transport.DeviceTransfer(operations, 10.0, "round 3")
    works[1].failure = RuntimeError("remote error")
    assert not transfer.finished()
    works[1].done = True  # the other one is still under way
    with pytest.raises(RuntimeError, match=r"round 3 failed: .*remote error"):
        transfer.finished()


def test_the_host_waits_for_no_token_on_a_device() -> None:
    # A time limit would make it wait until the kernel is done (NCCL); `Late` takes none.
    with fake_process_group(2) as group:
        comm = make_communicator(group, torch.device("cuda", 0), 10.0)
        work: Any = Late()
        comm.wait_in_line(work)
        comm.close()
    assert work.waited == 1


@dataclass
class Message:
    op: str
    peer: int
    number: int


def test_a_batch_for_hccl_has_one_message_to_and_one_from_a_peer() -> None:
    operations: Any = [
        Message("send", 1, 0),
        Message("send", 1, 1),
        Message("receive", 1, 2),
        Message("send", 2, 3),
        Message("receive", 1, 4),
        Message("send", 1, 5),
    ]
    batches: Any = transport.split_by_peer(operations)
    # In each, a peer's n-th message in either direction: the peer puts it into its n-th as well.
    assert [[m.number for m in batch] for batch in batches] == [[0, 2, 3], [1, 4], [5]]
    assert transport.split_by_peer([]) == []


def test_the_current_stream_waits_for_every_work_of_a_device_transfer(works: list[Late]) -> None:
    operations: Any = [object(), object()]
    transport.DeviceTransfer(operations, 10.0, "round 3").synchronize()
    assert [work.waited for work in works] == [1, 1]


def test_a_device_transfer_is_overdue_after_its_time_limit(works: list[Late]) -> None:
    operations: Any = [object()]
    transfer = transport.DeviceTransfer(operations, 0.0, "round 3")
    with pytest.raises(TimeoutError, match="round 3 took longer than 0 s"):
        transfer.wait()


def posted_while_wrapping(rank: int, world_size: int) -> list[tuple[str, int, int]]:
    posted = []
    post = dist.batch_isend_irecv

    def record(operations: list[dist.P2POp]) -> list[dist.Work]:
        for operation in operations:
            kind = "send" if operation.op is dist.isend else "receive"
            posted.append((kind, operation.peer, operation.tensor.nbytes))
        return post(operations)

    dist.batch_isend_irecv = record
    try:
        balancer = torch_eplb.wrap(ToyModel(), num_redundant_experts=1)
    finally:
        dist.batch_isend_irecv = post
    balancer.close()
    return posted


def test_connections_to_all_peers_are_made_when_a_model_is_wrapped() -> None:
    for rank, posted in enumerate(run_ranks(posted_while_wrapping, 3)):
        peers = [peer for peer in range(3) if peer != rank]
        expected = [(kind, peer, 1) for peer in peers for kind in ("send", "receive")]
        assert sorted(posted) == sorted(expected)
