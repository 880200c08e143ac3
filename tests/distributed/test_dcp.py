"""State for torch.distributed.checkpoint: saved and loaded in pieces, whatever the ranks."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.models import ToyModel, skewed_batch
from support.moving import (
    CLOSE,
    assert_every_slot,
    in_flight,
    serve_until,
    wrap,
)
from support.moving import Ordinary as Plain
from support.ranks import run_ranks
from support.versions import ALONE, COPIES_FIRST
from torch import nn

import torch_eplb
from torch_eplb import PlacementState, ShardedState
from torch_eplb.files.expert_map import format_expert_map, parse_expert_map, write_expert_map
from torch_eplb.state.dcp import choose_owners, find_runs


class Ordinary(Plain):
    """With packed weights, byte-sized floats, and experts whose strides are permuted."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        generator = torch.Generator().manual_seed(seed)
        for layer in self.inner.layers:
            packed = torch.randint(0, 256, (8, 3, 4), generator=generator).to(torch.uint8)
            layer.experts.register_buffer("packed", packed)
            scales = torch.randn(8, 4, generator=generator).to(torch.float8_e4m3fn)
            layer.experts.register_buffer("scales", scales)
            down = layer.experts.down_proj.detach()
            layer.experts.down_proj = nn.Parameter(
                down.transpose(1, 2).contiguous().transpose(1, 2)
            )


def assert_same(state: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert torch.equal(as_bytes(state[key]), as_bytes(value)), key


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor


def expert_keys(model: nn.Module) -> list[str]:
    return [key for key in model.state_dict() if ".experts." in key]


# ---- saving -------------------------------------------------------------------------------------


class WatchingPlanner(dcp.DefaultSavePlanner):
    """The memory of the experts that are written."""

    def resolve_data(self, write_item: Any) -> Any:
        tensor = super().resolve_data(write_item)
        if ".experts." in write_item.index.fqn:
            assert tensor.shape[0] == 1
            written.append(tensor.untyped_storage().data_ptr())
        return tensor


written: list[int] = []


def save(rank: int, world_size: int, path: str) -> None:
    balancer = wrap(Ordinary(seed=7), num_redundant_experts=4)
    with torch.no_grad():
        serve_until(lambda: in_flight(balancer), balancer, rank)
        state = {"model": ShardedState(balancer), "placement": PlacementState(balancer)}
        dcp.save(state, checkpoint_id=path, planner=WatchingPlanner())
        # Nothing is gathered or copied before DCP asks for it, expert by expert.
        live = {t.untyped_storage().data_ptr() for x in balancer.engine.layers for t in x.tensors()}
        assert set(written) == live
        assert not balancer.engine._migration.in_flight
        # Asynchronously: the weights may change as soon as the call has returned.
        serve_until(lambda: in_flight(balancer), balancer, rank)
        future = dcp.async_save({"model": ShardedState(balancer)}, checkpoint_id=path + ".async")
        for tensor in balancer.engine.layers[0].tensors() if COPIES_FIRST else ():
            tensor.detach().zero_()
        future.result()
        # A state is good for as long as nothing has moved.
        stale = ShardedState(balancer).state_dict()
        serve_until(lambda: in_flight(balancer), balancer, rank)
        if rank == 0 and ALONE:
            with pytest.raises(dcp.api.CheckpointException, match="make it anew"):
                dcp.save({"model": stale}, checkpoint_id=path + ".stale", **ALONE)
        with pytest.raises(RuntimeError, match=r"balancer\.state_dict\(\)"):
            stale[expert_keys(balancer.module)[0]] + 1
        with pytest.raises(RuntimeError, match=r"balancer\.state_dict\(\)"):
            torch.save(stale, path + ".pt")
    balancer.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What 2 ranks have saved while experts moved."""
    path = tmp_path_factory.mktemp("sharded") / "checkpoint"
    run_ranks(save, 2, str(path))
    return path


def test_each_expert_is_saved_once_from_its_slot_while_experts_move(path: Path) -> None:
    reference = Ordinary(seed=7)
    for folder in (path, Path(f"{path}.async")):
        metadata = dcp.FileSystemReader(folder).read_metadata()
        for key in expert_keys(reference):
            entry = metadata.state_dict_metadata[f"model.{key}"]
            assert entry.size == reference.state_dict()[key].shape
            assert sorted(chunk.offsets[0] for chunk in entry.chunks) == list(range(8))
        # By both ranks, evenly.
        writers = [
            info.relative_path.split("_")[2]
            for index, info in metadata.storage_data.items()
            if ".experts." in index.fqn
        ]
        assert writers.count("0") == writers.count("1")
        # An unwrapped model loads it, in one process.
        plain = Ordinary(seed=0)
        state = {"model": plain.state_dict()}
        dcp.load(state, checkpoint_id=folder, **ALONE)
        assert_same(state["model"], reference.state_dict())


def test_owners_have_a_live_replica_and_share_the_work() -> None:
    experts = np.array([[0, 1, 2, 3], [4, 5, 0, 1], [6, 7, 0, 1]])
    live = np.ones_like(experts, dtype=bool)
    assert np.bincount(choose_owners(experts, live)).tolist() == [3, 3, 2]
    live[0, :2] = False
    owners = choose_owners(experts, live)
    assert np.bincount(owners).tolist() == [2, 3, 3]
    assert set(owners[[0, 1]].tolist()) == {1, 2}
    # Runs are read in one piece; of two slots of one expert the live one is read.
    runs = find_runs(np.array([3, 4, 4, 5, 0]), np.array([True, False, True, True, True]))
    assert [tuple(run) for run in runs] == [(0, 4, 1), (3, 0, 1), (4, 2, 2)]


# ---- loading ------------------------------------------------------------------------------------


class CountingReader(dcp.FileSystemReader):
    """How much of the experts is asked for, in elements, and in how many pieces."""

    def read_data(self, plan: Any, planner: Any) -> Any:
        items = [item for item in plan.items if ".gate_up_proj" in item.dest_index.fqn]
        self.elements = sum(math.prod(item.lengths) for item in items)
        self.pieces = len(items)
        return super().read_data(plan, planner)


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.texts: list[str] = []
        logging.getLogger("torch_eplb").addHandler(self)
        logging.getLogger("torch_eplb").setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def load(rank: int, world_size: int, path: str, plain: str, redundant: int) -> Any:
    said = Warnings()
    reference, other = Ordinary(seed=7), Ordinary(seed=8)
    balancer = wrap(Ordinary(seed=0), num_redundant_experts=redundant)
    slots = balancer.placement.num_slots
    x = skewed_batch(8, 16, rank)
    with torch.no_grad():
        # In the first placement, from the checkpoint of an unwrapped model: in one piece or two.
        reader = CountingReader(plain)
        dcp.load({"model": ShardedState(balancer)}, storage_reader=reader)
        assert reader.elements == 2 * slots * 16 * 16
        assert reader.pieces <= 2 * 2
        assert_same(balancer.state_dict(), other.state_dict())
        torch.testing.assert_close(balancer(x), other(x), **CLOSE)
        serve_until(lambda: in_flight(balancer), balancer, rank)
        live = balancer.module.inner.layers[0].experts.down_proj
        # Over other weights, while experts move; with the placement.
        reader = CountingReader(path)
        state = {"model": ShardedState(balancer), "placement": PlacementState(balancer)}
        dcp.load(state, storage_reader=reader)
        assert reader.elements == 2 * slots * 16 * 16
        assert balancer.module.inner.layers[0].experts.down_proj is live
        assert_every_slot(balancer, reference.inner, rank)
        assert_same(balancer.state_dict(), reference.state_dict())
        torch.testing.assert_close(balancer(x), reference(x), **CLOSE)
        placement = balancer.placement
        # Balancing goes on. Without an entry for it, the saved placement is ignored.
        target = balancer.stats().rebalances + 1
        serve_until(lambda: balancer.stats().rebalances >= target, balancer, rank)
        moved = balancer.placement
        dcp.load({"model": ShardedState(balancer)}, checkpoint_id=path)
        assert balancer.placement == moved
        torch.testing.assert_close(balancer(x), reference(x), **CLOSE)
        balancer.close()
        dcp.load({"model": ShardedState(balancer)}, checkpoint_id=plain)
        torch.testing.assert_close(balancer(x), other(x), **CLOSE)
        balancer.unwrap()
        dcp.load({"model": ShardedState(balancer)}, checkpoint_id=path)
        assert torch.equal(balancer.module(x), reference(x))
    return said.texts, placement.held().tolist()


def saved_placement(path: Path) -> torch_eplb.Placement:
    state = {"placement": {"expert_map": ""}}
    dcp.load(state, checkpoint_id=path, **ALONE)
    return parse_expert_map(state["placement"]["expert_map"], **SHAPE)


def test_it_loads_over_any_ranks_redundancy_and_placement_and_restores_the_placement_that_fits(
    path: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    dcp.save({"model": Ordinary(seed=8).state_dict()}, checkpoint_id=plain, **ALONE)
    saved = saved_placement(path)
    assert saved != torch_eplb.Placement.initial(2, 8, 2, 6)
    for said, held in run_ranks(load, 2, str(path), str(plain), 4):
        assert held == saved.held().tolist()
        assert not any("ignored" in text for text in said)
    (said, _), *others = run_ranks(load, 3, str(path), str(plain), 7)
    assert sum("does not fit here and is ignored" in text for text in said) == 1
    assert not any("ignored" in text for texts, _ in others for text in texts)


def restored(rank: int, world_size: int, text: str, overlap: bool) -> int:
    model, reference = ToyModel(), ToyModel()
    options = {"num_redundant_experts": 2, "policy": "static", "collect_interval": 2}
    with torch_eplb.wrap(model, overlap=overlap, verify=True, timeout=30, **options) as balancer:
        before = balancer.placement
        PlacementState(balancer).load_state_dict({"expert_map": text})
        assert balancer.stats().staging_bytes_peak <= balancer.stats().staging_bytes
        assert_every_slot(balancer, reference, rank)
        x = skewed_batch(8, 16, rank)
        with torch.no_grad():
            for _ in range(6):
                torch.testing.assert_close(balancer(x), reference(x), **CLOSE)
        # There already: nothing moves.
        moved = balancer.stats().experts_moved
        PlacementState(balancer).load_state_dict({"expert_map": text})
        assert balancer.stats().experts_moved == moved
        after = balancer.placement
    # After the end it stays where it is.
    PlacementState(balancer).load_state_dict({"expert_map": format_expert_map(before)})
    assert balancer.placement == after
    return int((after.held() != parse_expert_map(text, **SHAPE).held()).sum())


SHAPE = {"num_layers": 2, "num_experts": 8, "num_ranks": 2}


@pytest.mark.parametrize("overlap", [True, False])
def test_a_saved_placement_is_restored_round_by_round(overlap: bool) -> None:
    experts = np.array([[[7, 0, 6, 1, 5], [2, 7, 3, 4, 6]]] * 2)
    text = format_expert_map(torch_eplb.Placement(experts, 8))
    assert run_ranks(restored, 2, text, overlap) == [0, 0]


def start_where_it_ended(rank: int, world_size: int, path: str) -> None:
    balancer = wrap(ToyModel(), num_redundant_experts=2)
    with torch.no_grad():
        serve_until(lambda: balancer.stats().rebalances >= 1, balancer, rank)
    ended = balancer.placement
    balancer.unwrap()
    if rank == 0:
        write_expert_map(path, ended)
    torch.distributed.barrier()
    again = wrap(balancer.module, num_redundant_experts=2, expert_map=path)
    assert again.placement == ended
    assert ended != torch_eplb.Placement.initial(2, 8, 2, 5)
    assert_every_slot(again, ToyModel(), rank)
    again.close()


def test_a_written_placement_is_the_next_starts_first(tmp_path: Path) -> None:
    run_ranks(start_where_it_ended, 2, str(tmp_path / "map.json"))
