"""What has to come before what on a device: everything that could be late is held up.

`tests/mutations --npu` plants the faults that these tests are for, one at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from npu_sim import control
from npu_sim.ranks import run_on_npus
from support.few_kernels import EXPERTS, HIDDEN, FewKernelModel
from support.models import QUICK, skewed_batch
from support.on_device import CLOSE, make, serve

import torch_eplb
from torch_eplb.runtime.cycle import Stage
from torch_eplb.values.placement import Placement
from torch_eplb.values.rounds import Round

LATE = (60.0, 60.0)  # milliseconds: longer than the host takes from one call to the next
BUFFER = 7  # MiB, by which the communicator of weights is known


def wrap(model: torch.nn.Module, **options: Any) -> torch_eplb.ExpertLoadBalancer:
    return torch_eplb.wrap(
        model, replica_choice="table", timeout=30, hccl_buffer_size=BUFFER, **options
    )


def move(balancer: torch_eplb.ExpertLoadBalancer, experts: np.ndarray) -> None:
    balancer.engine.move_to(Placement(experts.copy(), EXPERTS))


def assert_weights(
    balancer: torch_eplb.ExpertLoadBalancer, plain: FewKernelModel, factor: float = 1.0
) -> None:
    """Each slot holds its expert's weights, as the current stream sees them now."""
    held = balancer.placement.experts[:, dist.get_rank()]
    for layer, experts, module in zip(balancer.engine.layers, held, plain.layers, strict=True):
        state = module.experts.state_dict()
        for name, tensor in zip(layer.tensor_names, layer.tensors(), strict=True):
            expected = state[name][experts.tolist()]
            expected = expected * factor if tensor.requires_grad else expected
            assert torch.equal(tensor.detach().cpu(), expected), (layer.name, name)


def written_late(rank: int, world_size: int) -> None:
    model, plain = make()
    balancer = wrap(model)
    control.delay("kernels", LATE)
    with torch.no_grad():
        for parameter in balancer.expert_parameters():
            parameter.mul_(2)
    move(balancer, balancer.placement.experts[:, ::-1])
    control.delay("kernels", (0, 0))
    assert_weights(balancer, plain, 2.0)


def test_what_is_sent_are_the_weights_that_the_current_stream_has_written() -> None:
    run_on_npus(written_late, 2, delays=False)


def received_late(rank: int, world_size: int, options: dict[str, Any]) -> None:
    model, plain = make()
    balancer = wrap(model, **options)
    control.delay("transfers", LATE)
    move(balancer, balancer.placement.experts[:, ::-1])
    assert_weights(balancer, plain)


@pytest.mark.parametrize("options", [{}, {"direct": False}], ids=["direct", "staged"])
def test_a_commit_comes_after_what_is_received(options: dict[str, Any]) -> None:
    run_on_npus(received_late, 2, options, delays=False)


def copied_late(rank: int, world_size: int, direct: bool) -> None:
    model, _ = make()
    balancer = wrap(model)
    exchange = balancer.engine.exchange
    control.delay("device copies", (200.0, 200.0))
    rows = [[0, 4 * r, r, 0, r, 3] for r in range(world_size)]  # within each rank
    exchange.post(0, Round(np.array(rows, dtype=np.int32), np.array([direct] * world_size)))
    exchange.wait()
    control.delay("device copies", (0, 0))  # those of the commit; one is being held up
    exchange.commit()
    for tensor in balancer.engine.layers[0].tensors():
        first, last = tensor.detach()[0].clone(), tensor.detach()[3].clone()
        assert torch.equal(last.cpu(), first.cpu())


@pytest.mark.parametrize("direct", [True, False])
def test_a_commit_comes_after_the_copies_of_the_side_stream(direct: bool) -> None:
    run_on_npus(copied_late, 2, direct, delays=False)


def checked(rank: int, world_size: int, damaged: bool) -> None:
    model, plain = make()
    balancer = wrap(model, verify=True, direct=False)
    exchange = balancer.engine.exchange
    intact = exchange._intact

    def damage() -> torch.Tensor:
        for _, tensors in exchange._received_sums:
            tensors[0][0] ^= 1
        return intact()

    if damaged and rank == 1:
        exchange._intact = damage  # type: ignore[method-assign]
    control.delay("host copies", LATE)
    move(balancer, balancer.placement.experts[:, ::-1])
    stats = balancer.stats()
    assert stats.rebalances_abandoned == int(damaged)
    assert (stats.placement_version == 0) == damaged
    assert_weights(balancer, plain)


# Whatever the result's memory holds before the result is there, it is wrong for one of them.
@pytest.mark.parametrize("damaged", [False, True])
def test_a_checksum_is_read_when_it_has_arrived(damaged: bool) -> None:
    run_on_npus(checked, 2, damaged, delays=False)


def sampled(rank: int, world_size: int) -> None:
    # Nothing of such a forward waits for the device, or copies would be waited for as well.
    model, plain = make("ExternalExperts")
    options = {**QUICK, "policy": "static", "dispatch": "external", "plan_interval": 100_000}
    balancer = torch_eplb.wrap(model, **options)
    expected = torch.zeros(2, EXPERTS, dtype=torch.int64)

    def count(layer: int) -> Any:
        def hook(module: Any, args: Any) -> None:
            expected[layer] += torch.bincount(args[1].reshape(-1), minlength=EXPERTS)

        return hook

    for index, layer in enumerate(plain.layers):
        layer.experts.register_forward_pre_hook(count(index))
    batches = [skewed_batch(8, HIDDEN, 10 * s + rank) for s in range(QUICK["collect_interval"])]
    on_device = [batch.npu() for batch in batches]
    control.delay("host copies", LATE)
    with torch.inference_mode():
        for batch, x in zip(batches, on_device, strict=True):
            balancer(x)
            plain(batch)
    for _ in range(100_000):  # a stage is that of all ranks
        if balancer.stats().stage == Stage.WAIT.value:
            break
        balancer.step()
    total = expected.npu()
    dist.all_reduce(total)
    window = balancer.window_load()
    assert window is not None
    assert window[0].tolist() == total.tolist()


def test_a_window_of_load_is_read_when_its_copies_have_arrived() -> None:
    run_on_npus(sampled, 2, delays=False)


def warm(rank: int, world_size: int) -> None:
    model, _ = make()
    before = control.communicators()
    balancer = wrap(model)
    made = [comm for comm in control.communicators() if comm not in before]
    assert [(comm.ranks, comm.rank, comm.buffer) for comm in made] == [(world_size, rank, BUFFER)]
    balancer.close()


def test_the_communicator_of_weights_exists_when_wrap_returns() -> None:
    run_on_npus(warm, 2, delays=False)


def planned_on_the_host(rank: int, world_size: int) -> None:
    model, plain = make(layers=1)
    balancer = torch_eplb.wrap(model, num_redundant_experts=4, replica_choice="batch", timeout=30)
    move(balancer, balancer.placement.experts[:, ::-1])
    x = skewed_batch(8, HIDDEN, rank)
    with torch.inference_mode():
        torch.testing.assert_close(balancer(x.npu()).cpu(), plain(x), **CLOSE)


def test_the_hosts_table_changes_with_the_devices() -> None:
    run_on_npus(planned_on_the_host, 2, delays=False)


def captured(rank: int, world_size: int, dispatch: str, experts: str, models: int) -> None:
    shared = dispatch == "all_reduce"
    options = {"max_tokens_per_rank": 8} if dispatch == "all_gather" else {}
    others = [wrap(make(experts)[0], dispatch=dispatch, **options) for _ in range(models - 1)]
    model, plain = make(experts)
    balancer = wrap(model, dispatch=dispatch, **options)
    with torch.inference_mode():
        x = skewed_batch(8, HIDDEN, 0 if shared else rank).npu()
        balancer(x)
        torch.npu.synchronize()
        steps, graph = balancer.stats().step, torch.npu.NPUGraph()
        with torch.npu.graph(graph):
            y = balancer(x)
        assert balancer.stats().step == steps
        for seed in range(3):
            batch = skewed_batch(8, HIDDEN, 10 * seed + (0 if shared else rank))
            x.copy_(batch)
            balancer.step()
            if seed == 1:
                move(balancer, balancer.placement.experts[:, ::-1])
            graph.replay()
            torch.testing.assert_close(y.cpu(), plain(batch), **CLOSE)
        assert balancer.stats().step == steps + 3
    tokens = 8 * (world_size if dispatch == "all_gather" else 1)
    # Layers, tokens that are counted here, choices, forwards that ran.
    assert balancer.load()[0].sum() == 2 * tokens * 2 * 4
    assert all(other.stats().step == 0 for other in others)


@pytest.mark.parametrize(
    ("dispatch", "experts", "models"),
    [
        ("external", "ExternalExperts", 1),
        ("all_reduce", "SentinelExperts", 1),
        ("all_reduce", "SentinelExperts", 2),
        ("all_gather", "SentinelExperts", 1),
        ("all_gather", "SentinelExperts", 2),
    ],
)
def test_no_step_is_made_while_a_graph_is_captured_and_replays_see_the_moves(
    dispatch: str, experts: str, models: int
) -> None:
    run_on_npus(captured, 2, dispatch, experts, models, delays=False)


def moved_to_host(rank: int, world_size: int) -> None:
    """The same orders where weights travel through the host's memory."""
    model, plain = make()
    balancer = torch_eplb.wrap(model, **QUICK, replica_choice="table", transport="gloo")
    for kind in ("host copies", "device copies"):
        control.delay(kind, (20.0, 20.0), 3, seed=rank)
    serve(balancer, plain, rank, 1)
    assert_weights(balancer, plain)


def test_weights_through_the_hosts_memory_wait_for_its_copies() -> None:
    run_on_npus(moved_to_host, 2, delays=False)


def in_batches(rank: int, world_size: int) -> int:
    model, plain = make()
    balancer = wrap(model, verify=True)
    move(balancer, balancer.placement.experts[:, ::-1])  # three tensors and a checksum per expert
    assert_weights(balancer, plain)
    return control.repeated_messages()


def test_no_batch_has_two_messages_from_one_rank_to_another() -> None:
    # Below CANN 9 a batch is one HcclBatchSendRecv, which may not.
    assert run_on_npus(in_batches, 2, delays=False, coalesced=False) == [0, 0]


def patient(rank: int, world_size: int) -> float:
    model, _ = make()
    balancer = wrap(model)
    backend = balancer.engine.comm.data._get_backend(torch.device("npu"))
    return backend.options._timeout.total_seconds() / balancer.engine.comm.timeout


def test_the_watchdog_of_weights_waits_much_longer_than_we_do() -> None:
    # It ends the process; we look at the transfers ourselves, and give them up.
    assert run_on_npus(patient, 2, delays=False) == [10.0, 10.0]
