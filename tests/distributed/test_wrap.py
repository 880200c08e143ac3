"""Wrapping: what is refused, on every rank and by name, and what a wrapper's life looks like."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.models import ToyModel, skewed_batch
from support.ranks import run_ranks

import torch_eplb
from torch_eplb.files.expert_map import read_expert_map, write_expert_map
from torch_eplb.files.trace import read_trace
from torch_eplb.runtime import prepare as setup
from torch_eplb.testing import fake_process_group


class Unreadable(torch.nn.Module):
    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("this model cannot be read")


def differing(rank: int, world_size: int) -> None:
    model = ToyModel()
    cases: list[tuple[Any, dict[str, Any], list[str]]] = [
        (
            model,
            {"collect_interval": 600 + (rank == 1)},
            ["collect_interval", "600", "601 on rank 1"],
        ),
        (ToyModel(hidden=16 + 8 * (rank == 2)), {}, ["layers.0.experts", "(16, 24)", "on rank 2"]),
        (model, {"timeout": "soon"} if rank == 0 else {}, ["timeout", "must be a number"]),
        (torch.nn.Linear(2, 2) if rank == 1 else model, {}, ["no MoE layer"]),
        (model, {"nonsense": 1} if rank == 1 else {}, ["has no argument nonsense"]),
        (model, {"num_redundant_experts": 2}, ["num_redundant_experts=2", "use 1, 4, 7"]),
        (ToyModel(2 + (rank == 1)), {}, ["number of MoE layers", "2 on ranks 0, 2", "3 on rank 1"]),
        (model.double() if rank == 2 else model, {}, ["layers.0.experts", "float64", "on rank 2"]),
        (Unreadable() if rank == 1 else model, {}, ["cannot be read"]),
    ]
    for model_, options, says in cases:
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            torch_eplb.wrap(model_, **{"timeout": 20, "num_redundant_experts": 1, **options})
        for text in says:
            assert text in str(caught.value), (text, str(caught.value))
    model.float()
    versions = torch.__version__, setup.__version__
    if rank == 1:
        torch.__version__, setup.__version__ = "9.8.7", "6.5"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="differ in") as caught:
        torch_eplb.wrap(model, num_redundant_experts=1, timeout=20)
    for text in ("torch version", "9.8.7 on rank 1", "torch_eplb version", "6.5 on rank 1"):
        assert text in str(caught.value), str(caught.value)
    torch.__version__, setup.__version__ = versions  # type: ignore[assignment]
    # Nothing was changed: the model can still be wrapped.
    torch_eplb.wrap(model, num_redundant_experts=1, timeout=20).close()


def test_ranks_that_differ_all_get_an_error_that_names_what_differs() -> None:
    run_ranks(differing, 3)


def life(rank: int, world_size: int, folder: str) -> None:
    model = ToyModel()
    reference = copy.deepcopy(model)
    x = skewed_batch(12, 16, rank)
    with torch.no_grad():
        expected = reference(x)
        balancer = torch_eplb.wrap(model, num_redundant_experts=2)
        assert balancer.module is model
        assert balancer.layers is model.layers  # unknown attributes are the model's
        with pytest.raises(AttributeError, match="nonsense"):
            balancer.nonsense  # noqa: B018
        with pytest.raises(ValueError, match="wrapped already; call unwrap"):
            torch_eplb.wrap(model)
        with pytest.raises(ValueError, match="wrapped already; call unwrap"):
            torch_eplb.wrap(balancer)
        torch.testing.assert_close(balancer(x), expected, atol=1e-5, rtol=1e-4)
        balancer.close()
        balancer.close()
        # Closed, the model serves on with the placement that it has.
        torch.testing.assert_close(balancer(x), expected, atol=1e-5, rtol=1e-4)
        assert balancer.stats().stage == "closed"
        assert balancer.stats().step == 1
        assert balancer.unwrap() is model
        assert balancer.unwrap() is model
        assert torch.equal(model(x), expected)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
        with torch_eplb.wrap(model, num_redundant_experts=2) as again:
            torch.testing.assert_close(again(x), expected, atol=1e-5, rtol=1e-4)
            again.unwrap()
        # Two models in one process, one of them inside a group of its own.
        groups = [dist.new_group([r]) for r in range(world_size)]
        other = ToyModel(seed=1)
        other_reference = copy.deepcopy(other)
        first = torch_eplb.wrap(model, num_redundant_experts=2)
        second = torch_eplb.wrap(other, process_group=groups[rank])
        torch.testing.assert_close(first(x), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(second(x), other_reference(x), atol=1e-5, rtol=1e-4)
        second.close()
        first.close()


def test_a_wrapper_can_be_closed_unwrapped_and_made_again(tmp_path: Path) -> None:
    run_ranks(life, 2, str(tmp_path))


def recorded(rank: int, world_size: int, folder: str) -> None:
    path = Path(folder)
    maps, trace = path / "map.json", path / "trace.npz"
    model = ToyModel()
    with torch_eplb.wrap(
        model,
        num_redundant_experts=2,
        collect_interval=4,
        plan_interval=1,
        policy="random",
        record_path=trace,
        record_map_path=maps,
    ) as balancer:
        start = balancer.placement
        with torch.no_grad():
            for step in range(200):
                balancer(skewed_batch(10, 16, 10 * step + rank))
            with balancer.paused():
                balancer(skewed_batch(10, 16, 1))
        assert balancer.placement == start  # planned, written, not moved
        hits, _ = balancer.load()
        assert (hits.sum(axis=1) == 200 * 10 * 2).all()
    dist.barrier()
    counts = read_trace(trace).counts
    assert counts.shape == (200, world_size, 2, 8)
    assert (counts.sum(axis=(0, 3))[rank] == 200 * 10 * 2).all()
    np.testing.assert_array_equal(counts.sum(axis=0)[rank], hits)
    planned = read_expert_map(maps, num_layers=2, num_experts=8, num_ranks=world_size)
    assert planned != start
    model = balancer.unwrap()
    again = torch_eplb.wrap(model, num_redundant_experts=2, expert_map=str(maps))
    assert again.placement == planned
    again.close()


def test_load_and_maps_are_recorded_and_maps_are_taken_as_the_initial_placement(
    tmp_path: Path,
) -> None:
    run_ranks(recorded, 2, str(tmp_path))


def test_phases_and_pauses_decide_what_is_recorded() -> None:
    with (
        fake_process_group(world_size=2),
        torch_eplb.wrap(ToyModel(), phase="decode") as balancer,
        torch.no_grad(),
    ):
        x = skewed_batch(10, 16, 0)

        def recorded_by_a_forward() -> int:
            before = balancer.load()[0].sum()
            balancer(x)
            return int(balancer.load()[0].sum() - before) // (2 * 10 * 2)

        assert recorded_by_a_forward() == 0  # in no phase at all
        with balancer.phase("prefill"):
            assert recorded_by_a_forward() == 0
        with balancer.phase("decode"):
            assert recorded_by_a_forward() == 1
            with balancer.paused():
                assert recorded_by_a_forward() == 0
            assert recorded_by_a_forward() == 1
        with pytest.raises(ValueError, match="phase must be one of prefill, decode"):
            with balancer.phase("training"):
                pass
        assert balancer.stats().step == 5


def test_without_a_process_group_the_remedy_is_named() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        torch_eplb.wrap(ToyModel())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_redundant_experts": 100}, "more cannot be used"),
        ({"num_redundant_experts": 3}, "use 0, 4, 8"),
        ({"staging_bytes": 100}, "it must be at least 1604"),
        ({"num_nodes": 3}, "num_nodes=3 does not divide the 4 ranks"),
        ({"num_expert_groups": 3}, "does not divide the 8 experts"),
        ({"expert_map": "/nonexistent/map.json"}, "map.json"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_with_numbers(
    options: dict[str, Any], says: str
) -> None:
    with fake_process_group(world_size=4), pytest.raises((ValueError, OSError), match=says):
        torch_eplb.wrap(ToyModel(), **options)


def test_a_model_without_memory_does_nothing_until_it_has_its_weights() -> None:
    with torch.device("meta"):
        model = ToyModel()
    with fake_process_group(world_size=2), torch_eplb.wrap(model) as balancer:
        for use in (
            lambda: balancer(torch.ones(2, 16)),
            balancer.state_dict,
            lambda: balancer.load_state_dict(ToyModel().state_dict()),
            balancer.unwrap,
        ):
            with pytest.raises(RuntimeError, match=r"on the meta device\..*load_pretrained"):
                use()


def test_a_model_with_only_some_experts_in_memory_is_refused() -> None:
    model = ToyModel()
    model.layers[1].experts.to("meta")
    with fake_process_group(world_size=2), pytest.raises(ValueError, match="on one device"):
        torch_eplb.wrap(model)


def test_sharded_experts_need_a_layer_that_dispatches_by_itself() -> None:
    from torch_eplb.layers.spec import register_layer

    model = ToyModel(1)

    class Sharded(type(model.layers[0].experts)):  # type: ignore[misc]
        pass

    experts = model.layers[0].experts
    experts.__class__ = Sharded
    names = [name for name, _ in experts.named_parameters()]
    register_layer(Sharded, tensors=names)
    for name in names:
        setattr(experts, name, torch.nn.Parameter(getattr(experts, name)[:4].detach()))
    with fake_process_group(world_size=2), pytest.raises(ValueError, match="sharded already"):
        torch_eplb.wrap(model)


def test_an_expert_is_seen_where_it_is_and_nowhere_else(tmp_path: Path) -> None:
    model = ToyModel(1)
    original = {name: t.clone() for name, t in model.layers[0].experts.state_dict().items()}
    placement = torch_eplb.Placement(np.array([[[7, 1, 3, 5], [0, 2, 4, 6]]]), 8)
    write_expert_map(tmp_path / "map.json", placement)
    with fake_process_group(2), torch_eplb.wrap(model, expert_map=tmp_path / "map.json") as wrapped:
        assert wrapped.expert(0, 2) == {}
        for name, tensor in wrapped.expert(0, 7).items():
            assert torch.equal(tensor, original[name][7])
        with pytest.raises(ValueError, match=r"expert must be in 0\.\.7, got 8"):
            wrapped.expert(0, 8)
        with pytest.raises(ValueError, match=r"layer must be in 0\.\.0, got 1"):
            wrapped.expert(1, 0)
