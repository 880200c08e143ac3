"""The simulated device itself: late, out of the host's reach, and right in the end."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from npu_sim import control
from npu_sim.ranks import run_on_npus
from npu_sim.runtime import library

SLOW = (150.0, 150.0)  # milliseconds: longer than a host takes to look


def late(rank: int, world_size: int) -> None:
    x = torch.arange(4.0, pin_memory=True).npu()
    torch.npu.synchronize()
    for kind, work in (
        ("kernels", lambda here: here.copy_(x + 1, non_blocking=True)),
        ("host copies", lambda here: here.copy_(x, non_blocking=True)),
        ("device copies", lambda here: here.copy_(torch.empty_like(x).copy_(x), non_blocking=True)),
    ):
        here = torch.full((4,), -1.0, pin_memory=True)
        control.delay(kind, SLOW)
        event = torch.Event("npu")
        work(here)
        event.record()
        assert not event.query(), kind
        assert (here == -1).all(), kind
        event.synchronize()
        assert here[3] >= 3, kind
        control.delay(kind, (0, 0))


def test_what_is_posted_happens_later() -> None:
    run_on_npus(late, 1, delays=False)


def streams(rank: int, world_size: int) -> None:
    x = torch.zeros(4, device="npu")
    side = torch.Stream("npu")
    control.delay("kernels", (20.0, 20.0))
    with torch.npu.stream(side):
        side.wait_stream(torch.npu.current_stream())
        x += 1
        seen_early = torch.empty(4, pin_memory=True)
    # The current stream does not wait for the side stream before it is told to.
    seen_early.copy_(x, non_blocking=True)
    torch.npu.current_stream().wait_stream(side)
    seen_late = x.cpu()
    assert (seen_early == 0).all()
    assert (seen_late == 1).all()


def test_streams_wait_for_each_other_only_where_they_are_told_to() -> None:
    run_on_npus(streams, 1, delays=False)


def touch(rank: int, world_size: int) -> None:
    x = torch.zeros(4, device="npu")
    ctypes.c_char.from_address(x.data_ptr()).value  # noqa: B018


def test_the_host_cannot_touch_the_devices_memory() -> None:
    assert run_on_npus(touch, 1, may_die=(0,)) == [-signal.SIGSEGV]


def wrong_kernel(rank: int, world_size: int) -> None:
    x = torch.zeros(4, device="npu")
    index = torch.tensor([7], device="npu")
    y = x.index_select(0, index)  # nothing is known yet
    with pytest.raises(RuntimeError, match="507015"):
        y.cpu()


def test_a_kernels_error_is_raised_when_the_host_waits() -> None:
    run_on_npus(wrong_kernel, 1)


def held_lock(rank: int, world_size: int) -> float:
    x = torch.ones(4, device="npu")
    control.delay("kernels", (50.0, 50.0))
    x += 1
    # A function of PyDLL keeps the interpreter's lock while it runs; kernels need it here.
    stream = ctypes.c_void_p(torch.npu.current_stream().npu_stream)
    assert ctypes.PyDLL(library()._name).aclrtSynchronizeStream(stream) == 0
    return x.sum().item()


def test_a_host_that_waits_with_the_interpreters_lock_holds_no_kernel_up() -> None:
    assert run_on_npus(held_lock, 1, delays=False) == [8.0]


def waits(rank: int, world_size: int) -> None:
    x = torch.arange(4, device="npu")
    pinned = torch.empty(4, dtype=torch.int64, pin_memory=True)
    with control.host_waits() as found:
        y = x * 2
        y.index_add_(0, x, y.clone())
        pinned.copy_(y, non_blocking=True)
        y.copy_(pinned, non_blocking=True)
    assert found == []
    for read in (
        lambda: y.sum().item(),
        lambda: y.nonzero(),
        lambda: y[y > 1],
        lambda: y.cpu(),
        lambda: y.copy_(torch.ones(4), non_blocking=True),  # pageable
        lambda: torch.npu.synchronize(),
    ):
        with control.host_waits() as found:
            read()
        assert found
        assert all(wait.endswith("elsewhere") for wait in found)


def test_what_makes_the_host_wait_is_noted() -> None:
    run_on_npus(waits, 1)


def types(rank: int, world_size: int) -> None:
    values = torch.tensor([0.0, -1.5, 65504.0, 1e-7, 3.14159, 1e6, float("inf")])
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(values.npu().to(dtype).cpu(), values.to(dtype)), dtype
        assert torch.equal(values.to(dtype).npu().float().cpu(), values.to(dtype).float()), dtype
    whole = torch.tensor([0, 1, -1, 2**31 - 1, 2**53 + 1])
    for dtype in (torch.int32, torch.uint8, torch.bool, torch.int64):
        assert torch.equal(whole.npu().to(dtype).cpu(), whole.to(dtype)), dtype
    strided = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(strided.npu().permute(2, 0, 1).contiguous().cpu(), strided.permute(2, 0, 1))


def test_copies_convert_and_follow_strides() -> None:
    run_on_npus(types, 1)


def derivatives(rank: int, world_size: int) -> None:
    def loss(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.silu(x @ x.T).softmax(-1)
        return (y.gather(1, index) * torch.where(y > 0.3, y, y * 2).sum()).sum()

    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[0, 1], [2, 3], [1, 1], [3, 0]])
    here = x.clone().requires_grad_()
    there = x.npu().requires_grad_()
    loss(here, index).backward()
    loss(there, index.npu()).backward()
    assert there.grad is not None
    torch.testing.assert_close(there.grad.cpu(), here.grad)


def test_gradients_are_the_cpus() -> None:
    run_on_npus(derivatives, 1)


def graphs(rank: int, world_size: int) -> None:
    x = torch.ones(4, device="npu")
    y = x * 2  # makes what is made at the first call
    torch.npu.synchronize()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y = x * 2
    control.delay("kernels", (20.0, 20.0))
    for number in range(3):
        x.fill_(number)
        graph.replay()
        assert y.tolist() == [2.0 * number] * 4

    def elsewhere() -> None:
        thread = threading.Thread(target=lambda: refused(x.cpu))
        thread.start()
        thread.join()

    errors: list[str] = []

    def refused(copy: Callable[[], Any]) -> None:
        try:
            copy()
        except RuntimeError as error:
            errors.append(str(error))

    for copy in (lambda: refused(x.sum().item), lambda: x.copy_(torch.zeros(4)), elsewhere):
        with pytest.raises(RuntimeError):
            capture(copy)
    assert len(errors) == 2
    assert all("1070" in error for error in errors)  # of the codes about captures


def capture(work: Callable[[], Any]) -> None:
    with torch.npu.graph(torch.npu.NPUGraph()):
        work()


def test_graphs_are_replayed_and_no_thread_may_copy_while_one_is_captured() -> None:
    run_on_npus(graphs, 1, delays=False)


# ---- HCCL ---------------------------------------------------------------------------------------


def collectives(rank: int, world_size: int) -> None:
    everyone = range(world_size)
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.int8):
        mine = torch.arange(1, 4, dtype=dtype, device="npu") + rank
        gathered = mine.new_empty(world_size, 3)
        dist.all_gather_into_tensor(gathered, mine)
        expected = torch.stack([torch.arange(1, 4, dtype=dtype) + r for r in everyone])
        assert torch.equal(gathered.cpu(), expected)
        for op, reduce in (
            (dist.ReduceOp.SUM, lambda t: t.sum(0, dtype=dtype)),  # noqa: B023
            (dist.ReduceOp.MAX, lambda t: t.amax(0)),
            (dist.ReduceOp.MIN, lambda t: t.amin(0)),
        ):
            reduced = mine.clone()
            dist.all_reduce(reduced, op=op)
            assert torch.equal(reduced.cpu(), reduce(expected)), (dtype, op)
    wide = torch.arange(2.0 * world_size, device="npu") + rank
    part = wide.new_empty(2)
    dist.reduce_scatter_tensor(part, wide)
    base = torch.arange(2.0 * world_size).view(world_size, 2)[rank]
    assert torch.equal(part.cpu(), base * world_size + sum(everyone))
    news = torch.full((5,), float(rank), device="npu")
    dist.broadcast(news, world_size - 1)
    assert (news.cpu() == world_size - 1).all()


@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives_do_what_they_say(world_size: int) -> None:
    run_on_npus(collectives, world_size)


def all_to_all(rank: int, world_size: int) -> None:
    # Rank r sends (r + p) % 3 rows to rank p; some none at all.
    send = [(rank + peer) % 3 for peer in range(world_size)]
    rows = torch.full((sum(send), 2), float(rank), device="npu")
    received = rows.new_empty(sum(send), 2)
    dist.all_to_all_single(received, rows, send, send)
    assert received[:, 0].tolist() == [p for p in range(world_size) for _ in range(send[p])]
    ones = torch.arange(world_size, device="npu") + 10 * rank
    turned = torch.empty_like(ones)
    dist.all_to_all_single(turned, ones)
    assert turned.tolist() == [rank + 10 * peer for peer in range(world_size)]


def test_all_to_all_takes_uneven_and_empty_parts() -> None:
    run_on_npus(all_to_all, 3)


def objects(rank: int, world_size: int) -> None:
    """What torch.distributed.checkpoint does."""
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, {"rank": rank})
    assert everyone == [{"rank": r} for r in range(world_size)]
    gathered: list[Any] | None = [None] * world_size if rank == 0 else None
    dist.gather_object("x" * (rank + 1), gathered)
    assert gathered is None or gathered == ["x" * (r + 1) for r in range(world_size)]
    scattered: list[Any] = [None]
    dist.scatter_object_list(scattered, [f"for {r}" for r in range(world_size)])
    assert scattered == [f"for {rank}"]
    news = ["it" if rank == 0 else None]
    dist.broadcast_object_list(news)
    assert news == ["it"]
    dist.barrier()


def test_objects_travel() -> None:
    run_on_npus(objects, 3)


def ring(rank: int, world_size: int, each: int) -> int:
    """``each`` messages to the next rank, and as many from the one before."""
    after, before = (rank + 1) % world_size, (rank - 1) % world_size
    sent = [torch.full((n + 1,), float(10 * rank + n), device="npu") for n in range(each)]
    received = [torch.zeros(n + 1, device="npu") for n in range(each)]
    operations = [dist.P2POp(dist.isend, tensor, after) for tensor in sent]
    operations += [dist.P2POp(dist.irecv, tensor, before) for tensor in received]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert [t[0].item() for t in received] == [10 * before + n for n in range(each)]
    return control.repeated_messages()


@pytest.mark.parametrize("coalesced", [True, False])
def test_both_ways_of_point_to_point_batches_keep_messages_in_order(coalesced: bool) -> None:
    results = run_on_npus(ring, 3, 3, coalesced=coalesced)
    # Only one of the two calls HcclBatchSendRecv.
    assert results == [0 if coalesced else 4] * 3


def broken(rank: int, world_size: int) -> None:
    x = torch.ones(2, device="npu")
    dist.all_reduce(x)
    torch.npu.synchronize()
    (comm,) = control.communicators()
    assert (comm.ranks, comm.rank) == (world_size, rank)
    control.break_communicator(0)
    work = dist.all_reduce(x, async_op=True)
    assert work is not None
    event = torch.Event("npu")
    work.wait()
    event.record()
    # What has failed is complete, too, says torch; what made it fail is known once that was asked.
    assert work.is_completed()
    assert work.exception() is not None
    # The wait has ordered streams, and they wait for ever.
    assert not event.query()


def test_a_broken_communicator_reports_it_and_keeps_its_stream() -> None:
    run_on_npus(broken, 2)
