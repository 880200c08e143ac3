"""State in logical order, whatever the placement: saved, and loaded while experts move."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import ToyModel, skewed_batch
from support.moving import (
    CLOSE,
    Ordinary,
    PeakBytes,
    assert_every_slot,
    assert_same,
    in_flight,
    serve_until,
    wrap,
)
from support.ranks import run_ranks
from torch import nn

import torch_eplb
from torch_eplb.state.full import full_state_dict
from torch_eplb.testing import fake_process_group

EXPERT_BYTES = 16 * 16 * 4  # of gate_up_proj, the largest tensor of ToyModel's experts


# ---- saving -------------------------------------------------------------------------------------


def saved(rank: int, world_size: int, redundant: int) -> int:
    model = Ordinary()
    reference = copy.deepcopy(model).state_dict()
    balancer = wrap(model, num_redundant_experts=redundant)
    with torch.no_grad():
        assert_same(balancer.state_dict(), reference)
        for rebalances in (1, 2):
            serve_until(lambda n=rebalances: balancer.stats().rebalances >= n, balancer, rank)
            assert_same(balancer.state_dict(), reference)
        serve_until(lambda: in_flight(balancer), balancer, rank)
        assert_same(balancer.state_dict(), reference)
        assert in_flight(balancer)  # saving does not stop it
        # This rank's own memory, and what keep_vars and nn.Module's metadata are.
        slots = balancer.placement.num_slots
        local = balancer.module.state_dict()
        assert local["inner.layers.0.experts.down_bias"].shape == (slots, 16)
        kept = balancer.state_dict(keep_vars=True)
        assert kept["head.weight"] is model.head.weight
        assert balancer.state_dict()._metadata.keys() == model.state_dict()._metadata.keys()
        balancer.close()
        assert_same(balancer.state_dict(), reference)
        balancer.unwrap()
        assert_same(balancer.state_dict(), reference)
    return balancer.stats().experts_moved


@pytest.mark.parametrize(("world_size", "redundant"), [(2, 0), (3, 4)])
def test_the_state_dict_is_the_unwrapped_models_whatever_the_placement(
    world_size: int, redundant: int
) -> None:
    assert run_ranks(saved, world_size, redundant)[0] > 0


def rank_0_only(rank: int, world_size: int) -> tuple[int, int]:
    model = ToyModel()
    reference = copy.deepcopy(model).state_dict()
    balancer = wrap(model, num_redundant_experts=1)
    with torch.no_grad():
        serve_until(lambda: balancer.stats().rebalances >= 1, balancer, rank)
        with PeakBytes() as memory:
            state = full_state_dict(balancer, rank0_only=True, cpu_offload=True)
        if rank == 0:
            assert_same(state, reference)
        else:
            assert state == {}
        expert_tensors = {k: v for k, v in state.items() if ".experts." in k}
        balancer.close()
        return memory.peak, sum(t.nbytes for t in expert_tensors.values())


def test_experts_with_two_names_are_gathered_once_and_stay_one_tensor() -> None:
    model = ToyModel()
    model.layers[1].experts = model.layers[0].experts
    with fake_process_group(world_size=2):
        balancer = torch_eplb.wrap(model, policy="static")
        state = balancer.state_dict()
        shared = [state[f"layers.{layer}.experts.down_proj"] for layer in (0, 1)]
        assert shared[0].shape == (8, 16, 8)
        assert shared[0] is shared[1]
        balancer.close()


def test_saving_on_rank_0_needs_the_result_there_and_one_expert_elsewhere() -> None:
    (peak, result), *others = run_ranks(rank_0_only, 3)
    assert result <= peak <= result + EXPERT_BYTES
    assert all(0 < peak <= EXPERT_BYTES for peak, _ in others), others


# ---- loading ------------------------------------------------------------------------------------


def loaded(rank: int, world_size: int, options: dict[str, Any]) -> int:
    model, new = ToyModel(seed=0), ToyModel(seed=1)
    balancer = wrap(model, **options)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    with torch.no_grad():
        for seed in (1, 2):
            serve_until(lambda: in_flight(balancer), balancer, rank)
            moved = balancer.placement.experts.copy()
            assert (moved != torch_eplb.Placement.initial(*moved_shape(balancer)).experts).any()
            new = ToyModel(seed=seed)
            keys = balancer.load_state_dict(new.state_dict())
            assert not keys.missing_keys
            assert not keys.unexpected_keys
            assert not balancer.engine._migration.in_flight
            assert_every_slot(balancer, new, rank)
            assert_same(balancer.state_dict(), new.state_dict())
            # Balancing goes on, with the new weights.
            target = balancer.stats().rebalances + 1
            for step in range(20000):
                x = skewed_batch(8, 16, 100 * step + rank)
                torch.testing.assert_close(balancer(x), new(x), **CLOSE)
                if balancer.stats().rebalances >= target:
                    break
            assert_every_slot(balancer, new, rank)
        now = dict(model.named_parameters()) | dict(model.named_buffers())
        assert all(now[name] is tensor for name, tensor in tensors.items())
        assert all(now[name].data_ptr() == where for name, where in addresses.items())
        # Closed, it still loads.
        balancer.close()
        balancer.load_state_dict(ToyModel(seed=3).state_dict())
        torch.testing.assert_close(balancer(x), ToyModel(seed=3)(x), **CLOSE)
        assert torch.equal(balancer.unwrap()(x), ToyModel(seed=3)(x))
    return balancer.stats().rebalances


def moved_shape(balancer: torch_eplb.ExpertLoadBalancer) -> tuple[int, int, int, int]:
    placement = balancer.placement
    layers, ranks, slots = placement.experts.shape
    return layers, placement.num_experts, ranks, slots


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (2, {"num_redundant_experts": 4, "verify": True}),
        (3, {"num_redundant_experts": 4, "direct": False}),
    ],
)
def test_weights_loaded_while_experts_move_reach_every_replica(
    world_size: int, options: dict[str, Any]
) -> None:
    results = run_ranks(loaded, world_size, options)
    assert results[0] >= 2
    assert len(set(results)) == 1


def save(rank: int, world_size: int, path: str) -> None:
    balancer = wrap(Ordinary(seed=7), num_redundant_experts=2)
    with torch.no_grad():
        serve_until(lambda: balancer.stats().rebalances >= 1, balancer, rank)
        state = full_state_dict(balancer, rank0_only=True)
        if rank == 0:
            torch.save(state, path)
    balancer.close()


def load(rank: int, world_size: int, path: str) -> None:
    balancer = wrap(Ordinary(seed=0), num_redundant_experts=4)
    state = torch.load(path, weights_only=True, mmap=True)
    reference = Ordinary(seed=7)
    with torch.no_grad():
        serve_until(lambda: in_flight(balancer), balancer, rank)
        balancer.load_state_dict(state)
        assert_same(balancer.state_dict(), reference.state_dict())
        x = skewed_batch(8, 16, rank)
        torch.testing.assert_close(balancer(x), reference(x), **CLOSE)
    balancer.close()


def test_a_checkpoint_of_2_ranks_loads_on_3_with_other_redundancy_and_unwrapped(
    tmp_path: Path,
) -> None:
    path = tmp_path / "state.pt"
    run_ranks(save, 2, str(path))
    run_ranks(load, 3, str(path))
    plain = Ordinary(seed=0)
    plain.load_state_dict(torch.load(path, weights_only=True))
    assert_same(plain.state_dict(), Ordinary(seed=7).state_dict())


def refused(rank: int, world_size: int) -> None:
    model = Ordinary()
    reference = copy.deepcopy(model).state_dict()
    balancer = wrap(model, num_redundant_experts=2)
    new = Ordinary(seed=1).state_dict()
    key = "inner.layers.1.experts.down_proj"

    def fails(state: dict[str, Any], *says: str, **options: Any) -> None:
        with pytest.raises(RuntimeError) as caught:
            balancer.load_state_dict(state, **options)
        for text in (*says, "nothing was loaded"):
            assert text in str(caught.value), (text, str(caught.value))
        assert_same(balancer.state_dict(), reference)

    fails({**new, key: new[key][:, :, :4]}, key, "(8, 16, 4)", "(8, 16, 8)")
    fails({**new, "head.bias": torch.zeros(3)}, "head.bias", "(3,)", "(16,)", strict=False)
    fails({**new, key: 5}, key, "must be a tensor, got int")
    fails({**new, key: new[key].to("meta")}, key, "meta")
    fails({k: v for k, v in new.items() if k != key} | {"other": new[key]}, key, "'other'")
    fails(dict(model.state_dict()), key, "(5, 16, 8) (this rank's slots", "(8, 16, 8)")
    # One rank's mistake is every rank's error, and names the rank.
    fails({**new, **({key: new[key][:7]} if rank == 1 else {})}, "rank 1: size mismatch", "(7, 16,")
    # Without strict, what is there is loaded and the rest is told.
    keys = balancer.load_state_dict({key: new[key], "other": new[key]}, strict=False)
    assert set(keys.missing_keys) == set(reference) - {key}
    assert keys.unexpected_keys == ["other"]
    assert_same(balancer.state_dict(), {**reference, key: new[key]})
    balancer.close()


def test_what_does_not_fit_is_refused_on_every_rank_before_anything_is_written() -> None:
    run_ranks(refused, 2)


class Outer(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.part: nn.Module = Ordinary(seed)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.part(x))


def nested(rank: int, world_size: int) -> None:
    outer, new = Outer(0).eval(), Outer(1).eval()
    reference = copy.deepcopy(outer).state_dict()
    outer.part = balancer = wrap(outer.part, num_redundant_experts=2)
    with torch.no_grad():
        serve_until(lambda: in_flight(balancer), balancer, rank)
        assert_same(outer.state_dict(), reference)
        live = balancer.module.inner.layers[0].experts.down_proj
        keys = outer.load_state_dict(new.state_dict())
        assert not keys.missing_keys
        assert not keys.unexpected_keys
        assert balancer.module.inner.layers[0].experts.down_proj is live
        assert_same(outer.state_dict(), new.state_dict())
        x = skewed_batch(8, 16, rank)
        torch.testing.assert_close(outer(x), new(x), **CLOSE)
        # With assign, experts are written in place as always.
        new = Outer(2).eval()
        outer.load_state_dict(new.state_dict(), assign=True)
        assert balancer.module.inner.layers[0].experts.down_proj is live
        torch.testing.assert_close(outer(x), new(x), **CLOSE)
        some = dict(list(new.state_dict().items())[1:])
        missing = outer.load_state_dict({**some, "part.other": x}, strict=False)
        assert missing.missing_keys == [next(iter(new.state_dict()))]
        assert missing.unexpected_keys == ["part.other"]
    balancer.close()


def test_a_wrapped_part_of_a_model_is_saved_and_loaded_with_the_whole() -> None:
    run_ranks(nested, 2)


def saved_by_rank_0_only(rank: int, world_size: int) -> None:
    balancer = torch_eplb.wrap(ToyModel(), num_redundant_experts=4, timeout=1)
    if rank == 0:
        with pytest.raises(torch_eplb.PeerLostError, match="did not answer within 1 s"):
            balancer.state_dict()
    # The other rank is there all the time. Not a barrier: gloo's group is unusable by now.
    store = dist.distributed_c10d._get_default_store()
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in range(world_size)])


def test_a_state_dict_that_only_rank_0_asks_for_ends_with_the_time_limit() -> None:
    run_ranks(saved_by_rank_0_only, 2)


# ---- copying ------------------------------------------------------------------------------------


def test_copying_and_pickling_are_refused_with_the_remedy() -> None:
    model = ToyModel()
    with fake_process_group(2):
        balancer = torch_eplb.wrap(model)
        for thing in (balancer, balancer.module, balancer.module.layers[0].experts):
            for way in (copy.deepcopy, pickle.dumps):
                with pytest.raises(TypeError, match=r"unwrap\(\) .*state_dict\(\)"):
                    way(thing)
        with pytest.raises(TypeError, match=r"unwrap\(\)"):
            copy.copy(balancer)
        copy.deepcopy(balancer.unwrap())
