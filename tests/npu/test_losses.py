"""Peers that do not come, communicators that break, and models that must not be wrapped."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from npu_sim import control
from npu_sim.ranks import run_on_npus
from support.few_kernels import HIDDEN
from support.models import skewed_batch
from support.on_device import CLOSE, make

import torch_eplb
from torch_eplb.values.placement import Placement

LIMIT = 2.0
BUFFER = 7  # MiB, by which the communicator of weights is known


def wrap(model: torch.nn.Module, timeout: float = LIMIT) -> torch_eplb.ExpertLoadBalancer:
    return torch_eplb.wrap(model, replica_choice="table", timeout=timeout, hccl_buffer_size=BUFFER)


def swap_ranks(balancer: torch_eplb.ExpertLoadBalancer) -> None:
    """Every expert moves."""
    balancer.engine.move_to(Placement(balancer.placement.experts[:, ::-1].copy(), 8))


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def moves_weights(comm: control.Communicator) -> bool:
    return comm.buffer == BUFFER


def store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def left_alone(rank: int, world_size: int, end: str) -> None:
    model, plain = make()
    balancer = wrap(model)
    before = balancer.placement
    if rank == 1:
        if end == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        store().wait(["over"])
        return
    with pytest.raises(torch_eplb.PeerLostError) as raised:
        swap_ranks(balancer)
    assert raised.value.ranks == (1,)
    assert balancer.placement == before
    # The kernels that waited for the peer have ended, or the watchdog would end the process.
    assert not any(map(moves_weights, control.communicators()))
    assert balancer.engine.exchange._stream is not None
    wait_until(balancer.engine.exchange._stream.query)
    start = time.monotonic()
    balancer.close()
    torch.npu.synchronize()
    assert time.monotonic() - start < LIMIT
    for tensor, expected in zip(
        balancer.engine.layers[0].tensors(),
        plain.layers[0].experts.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(tensor.cpu(), expected[: len(tensor)])
    store().set("over", "")


@pytest.mark.parametrize("end", ["stalls", "dies"])
def test_whoever_is_left_alone_lives_on_with_the_last_placement(end: str) -> None:
    run_on_npus(left_alone, 2, end, may_die=(1,))


def broken(rank: int, world_size: int) -> None:
    model, plain = make()
    balancer = wrap(model, timeout=20.0)
    before = balancer.placement
    numbers = [n for n, comm in enumerate(control.communicators()) if moves_weights(comm)]
    control.break_communicator(numbers[0])
    store().set(f"broken/{rank}", "")
    store().wait(["broken/0", "broken/1"])
    start = time.monotonic()
    with pytest.raises(torch_eplb.PeerLostError, match="failed"):
        swap_ranks(balancer)
    assert time.monotonic() - start < 10.0
    assert balancer.placement == before
    assert "failed" in str(balancer.stats().disabled)
    # Tokens travel on the group that was passed, which is whole.
    x = skewed_batch(8, HIDDEN, rank)
    with torch.no_grad():
        torch.testing.assert_close(balancer(x.npu()).cpu(), plain(x), **CLOSE)
    balancer.close()


def test_a_failed_transfer_is_not_committed() -> None:
    # Otherwise torch-npu itself ends a process whose communicator reports an error.
    run_on_npus(broken, 2, environment={"TORCH_HCCL_ASYNC_ERROR_HANDLING": "0"})


def in_tiles(rank: int, world_size: int) -> None:
    import torch_npu

    model, _ = make()
    experts = model.layers[1].experts
    torch.npu.config.allow_internal_format = True
    tiles = torch_npu.empty_with_format(
        experts.down_proj.shape, dtype=torch.float32, device="npu", acl_format=29
    )
    assert torch_npu.get_npu_format(tiles) == torch_npu.Format.FRACTAL_NZ
    experts.down_proj.data = tiles
    with pytest.raises(ValueError, match=r"layers\.1\.experts: down_proj .*FRACTAL_NZ \(29\)"):
        torch_eplb.wrap(model, timeout=20)


def test_weights_in_tiles_are_refused_with_the_remedy() -> None:
    run_on_npus(in_tiles, 1)


def elsewhere(rank: int, world_size: int) -> None:
    model, _ = make(device=f"npu:{rank + 1}")
    with pytest.raises(ValueError, match=rf"torch\.npu\.set_device\({rank + 1}\)"):
        torch_eplb.wrap(model, timeout=20)


def test_a_model_on_another_than_the_current_device_is_refused() -> None:
    run_on_npus(elsewhere, 2)
