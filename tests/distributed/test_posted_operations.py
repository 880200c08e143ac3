"""What every rank of large groups posts, with a fake process group in one process."""

from __future__ import annotations

import copy
from collections import defaultdict, deque
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.models import ToyModel, skewed_batch
from torch import nn

import torch_eplb
import torch_eplb.testing
from torch_eplb.comm.communicator import make_communicator
from torch_eplb.layers.experts import ExpertLayer
from torch_eplb.layers.finding import find_layers
from torch_eplb.migration.exchange import Exchange
from torch_eplb.schedule.schedule import Schedule, make_schedule
from torch_eplb.values.placement import Placement

LAYERS = 3
STAGED_EXPERTS = 2


class CodedExperts(nn.Module):
    """Two tensors per expert that tell which it is, of a size that no other layer's have."""

    def __init__(self, layer: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        code = torch.arange(num_experts, dtype=torch.int32)[:, None]
        self.register_buffer("up", (code * LAYERS + layer).repeat(1, 2 * layer + 1))
        self.register_buffer("down", (-1 - code * LAYERS - layer).repeat(1, 2 * layer + 2))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return hidden_states


class FakeRank:
    """One rank of a fake group, which plays its part of a schedule's rounds."""

    def __init__(self, full: nn.ModuleList, schedule: Schedule, verify: bool) -> None:
        start = schedule.start
        self.full = full
        self.layers: list[ExpertLayer] = find_layers(copy.deepcopy(full))
        assert dist.group.WORLD is not None
        self.comm = make_communicator(dist.group.WORLD, torch.device("cpu"), 10.0)
        self.comm.open_data_plane(hccl_buffer_size=16, nccl_max_ctas=4)
        for layer, experts in zip(self.layers, start.experts[:, self.comm.rank], strict=True):
            layer.shard(experts.tolist())
        staging = STAGED_EXPERTS * max(layer.expert_bytes for layer in self.layers)
        self.exchange = Exchange(self.layers, self.comm, staging, verify)

    def hold(self, placement: Placement) -> None:
        """Write the experts of a placement into this rank's slots."""
        for slots, expected in self._slots(placement):
            slots.copy_(expected)

    def holds(self, placement: Placement) -> bool:
        return all(torch.equal(slots, expected) for slots, expected in self._slots(placement))

    def _slots(self, placement: Placement) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for layer, full in zip(range(LAYERS), self.full, strict=True):
            experts = torch.from_numpy(placement.experts[layer, self.comm.rank].copy()).long()
            for name, tensor in zip(
                self.layers[layer].tensor_names, self.layers[layer].tensors(), strict=True
            ):
                yield tensor, getattr(full, name)[experts]


def random_placement(
    generator: np.random.Generator, num_experts: int, num_ranks: int, num_slots: int
) -> Placement:
    """Experts in random slots, each at least once and never twice on a rank."""
    layers = []
    for _ in range(LAYERS):
        first = generator.permutation(num_experts)
        more = generator.permutation(num_experts)[: num_ranks * num_slots - num_experts]
        # The redundant ones go to the last slots, rank by rank, wherever they are not yet.
        ranks = [list(first[rank::num_ranks]) for rank in range(num_ranks)]
        for expert in more.tolist():
            open_ranks = [r for r in ranks if len(r) < num_slots and expert not in r]
            min(open_ranks, key=len).append(expert)
        layers.append(ranks)
    return Placement(np.array(layers), num_experts)


@pytest.mark.parametrize(
    ("num_ranks", "num_experts", "num_slots", "verify"),
    [(64, 96, 3, False), (64, 96, 3, True), (320, 512, 2, False)],
)
def test_sends_and_receives_of_all_ranks_match_in_order_size_and_content(
    num_ranks: int, num_experts: int, num_slots: int, verify: bool
) -> None:
    full = nn.ModuleList(CodedExperts(layer, num_experts) for layer in range(LAYERS))
    generator = np.random.default_rng(num_ranks)
    start, wanted = (
        random_placement(generator, num_experts, num_ranks, num_slots) for _ in range(2)
    )
    sizes = [layer.expert_bytes for layer in find_layers(full)]
    schedule = make_schedule(
        start, wanted, expert_bytes=sizes, staging_bytes=STAGED_EXPERTS * max(sizes)
    )
    before = [start, *schedule.placements()]
    assert len(schedule.rounds) >= 2

    # First every rank tells what it sends, holding what it should before each round ...
    sent: defaultdict[tuple[int, int, int], deque[torch.Tensor]] = defaultdict(deque)
    for rank in range(num_ranks):
        with torch_eplb.testing.fake_process_group(num_ranks, rank):
            player = FakeRank(full, schedule, verify)
            for number, transfers in enumerate(schedule.rounds):
                player.hold(before[number])
                for operation in player.exchange.operations(transfers):
                    if operation.op is dist.isend:
                        sent[number, rank, operation.peer].append(operation.tensor.clone())

    # ... then every rank receives just that, in the order of its receives.
    for rank in range(num_ranks):
        with torch_eplb.testing.fake_process_group(num_ranks, rank):
            player = FakeRank(full, schedule, verify)
            for number, transfers in enumerate(schedule.rounds):
                for operation in player.exchange.operations(transfers):
                    if operation.op is dist.irecv:
                        message = sent[number, operation.peer, rank].popleft()
                        assert operation.tensor.shape == message.shape
                        assert operation.tensor.dtype == message.dtype
                        operation.tensor.copy_(message)
                assert player.exchange.verified()
                player.exchange.commit()
                assert player.holds(before[number + 1])
    assert not any(sent.values())


@pytest.mark.parametrize(("world_size", "rank"), [(8, 0), (8, 5), (64, 3)])
def test_a_wrapped_model_runs_a_whole_rebalance_in_one_process(world_size: int, rank: int) -> None:
    with torch_eplb.testing.fake_process_group(world_size, rank):
        original = ToyModel(num_experts=64)
        layer_bytes = [layer.expert_bytes for layer in find_layers(original)]
        balancer = torch_eplb.wrap(
            original,
            num_redundant_experts=world_size,
            collect_interval=5,
            plan_interval=3,
            policy="random",
        )
        before = balancer.placement
        posted = torch_eplb.testing.record_operations(balancer)
        batch = skewed_batch(32, 16, seed=rank)
        with torch.no_grad():
            forwards = torch_eplb.testing.run_until(
                lambda: balancer.stats().rebalances >= 1, lambda: balancer(batch)
            )
            assert balancer(batch).shape == batch.shape
        stats = balancer.stats()
        assert stats.step == forwards + 1 > 5 + 3
        assert stats.stage == "collecting load"
        assert stats.placement_version > 0
        assert stats.hook_seconds > 0

        moved = before.held() != balancer.placement.held()  # [layers, experts, ranks]
        arrived = (moved & balancer.placement.held())[:, :, rank].sum(axis=1)
        assert stats.bytes_received == int(arrived @ np.array(layer_bytes)) > 0
        for kind, total in (("send", stats.bytes_sent), ("receive", stats.bytes_received)):
            operations = [operation for operation in posted if operation.kind == kind]
            assert sum(operation.nbytes for operation in operations) == total
            assert all(operation.peer != rank for operation in operations)
        assert all(0 <= op.round_index < stats.placement_version for op in posted)
        staged = [0] * stats.placement_version
        for operation in posted:
            if operation.staged:
                assert operation.kind == "receive"
                staged[operation.round_index] += operation.nbytes
        assert max(staged) <= stats.staging_bytes_peak
        assert 0 < stats.staging_bytes_peak <= stats.staging_bytes == max(layer_bytes)

        # Every token is counted, once per expert that it chose.
        by_expert, by_rank = balancer.load()
        assert (by_expert.sum(axis=1) == by_rank.sum(axis=1)).all()
        assert (by_expert.sum(axis=1) == stats.step * len(batch) * 2).all()

        balancer.close()
        with torch.no_grad():
            balancer(batch)
        assert balancer.stats().step == stats.step
