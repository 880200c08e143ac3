"""Experts that are held as lists move, and keep their outputs, their state and their identity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from support.few_kernels import EXPERTS, HIDDEN, FewKernelModel
from support.listed import TENSORS, Listed, ListedOutside, first_slots, make_listed
from support.models import QUICK, skewed_batch
from support.ranks import run_ranks

import torch_eplb
from torch_eplb.testing import fake_process_group


def serve(
    balancer: torch_eplb.ExpertLoadBalancer, plain: FewKernelModel, rank: int, rebalances: int
) -> None:
    """Forwards, each compared, until so many rebalances were made."""
    step = 0
    with torch.no_grad():
        while balancer.stats().rebalances < rebalances:
            step += 1
            x = skewed_batch(8, HIDDEN, 10 * step + rank)
            torch.testing.assert_close(balancer(x), plain(x), atol=1e-4, rtol=1e-4)
    assert balancer.stats().experts_moved > 0


def assert_every_slot(balancer: torch_eplb.ExpertLoadBalancer, plain: FewKernelModel) -> None:
    rank = balancer.engine.comm.rank
    for index, layer in enumerate(balancer.engine.layers):
        reference = plain.layers[index].experts
        for name in TENSORS:
            entries = getattr(layer.module, name)
            held = balancer.placement.experts[index, rank].tolist()
            assert len(entries) == len(held)
            for entry, expert in zip(entries, held, strict=True):
                assert torch.equal(entry, getattr(reference, name)[expert])


def life(rank: int, world_size: int, options: dict[str, Any], full: bool) -> None:
    options = {**QUICK, "dispatch": "external", **options}
    redundant = options["num_redundant_experts"]
    held = [list(range(EXPERTS))] * 2 if full else first_slots(rank, world_size, redundant)
    model, plain = make_listed(ListedOutside, held)
    scales = [layer.experts.up_scale for layer in model.layers]
    with torch_eplb.wrap(model, **options) as balancer:
        before = balancer.engine.layers[0].tensors()
        addresses = [tensor.data_ptr() for tensor in before]
        serve(balancer, plain, rank, 3)
        assert balancer.stats().bytes_received > 0
        assert_every_slot(balancer, plain)
        # A captured graph or a table of addresses sees what has moved.
        after = balancer.engine.layers[0].tensors()
        assert all(a is b for a, b in zip(after, before, strict=True))
        assert [tensor.data_ptr() for tensor in after] == addresses
        assert all(s is x.experts.up_scale for s, x in zip(scales, model.layers, strict=True))
        here = int(balancer.placement.experts[1, rank, 0])
        found = balancer.expert(1, here)
        assert list(found) == TENSORS
        assert torch.equal(found["up"], plain.layers[1].experts.up[here])
        unwrapped = balancer.unwrap()
    for layer, reference in zip(unwrapped.layers, plain.layers, strict=True):
        for name in TENSORS:
            entries = getattr(layer.experts, name)
            assert len(entries) == EXPERTS
            assert type(entries) is type(getattr(model.layers[0].experts, name))
            assert torch.equal(torch.stack(list(entries)), getattr(reference.experts, name))


@pytest.mark.parametrize(
    ("options", "full"),
    [
        ({}, False),
        ({"verify": True, "direct": False, "overlap": False, "cost": "measured"}, False),
        ({"num_redundant_experts": 0, "layers_per_step": 2}, True),
    ],
    ids=str,
)
def test_lists_move_as_stacked_tensors_do(options: dict[str, Any], full: bool) -> None:
    run_ranks(life, 2, options, full)


def shared_out(rank: int, world_size: int, dispatch: str) -> None:
    model, plain = make_listed(Listed, [list(range(EXPERTS))] * 2)
    first = [layer.experts.up[0] for layer in model.layers]
    with torch_eplb.wrap(model, **QUICK, dispatch=dispatch) as balancer:
        # The objects that an optimizer may hold stay those of the experts that stay.
        assert (model.layers[1].experts.up[0] is first[1]) == (rank == 0)
        serve(balancer, plain, 0 if dispatch == "all_reduce" else rank, 2)
        assert_every_slot(balancer, plain)


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather", "all_reduce"])
def test_a_full_list_is_sharded_and_served(dispatch: str) -> None:
    run_ranks(shared_out, 2, dispatch)


def states(rank: int, world_size: int, folder: str) -> None:
    model, plain = make_listed(ListedOutside, first_slots(rank, world_size, 4))
    _, other = make_listed(ListedOutside, [list(range(EXPERTS))] * 2, seed=1)
    whole, _ = make_listed(Listed, [list(range(EXPERTS))] * 2)
    with torch_eplb.wrap(model, **QUICK, dispatch="external") as balancer:
        serve(balancer, plain, rank, 2)
        expected = whole.state_dict()
        for state in (balancer.state_dict(), torch_eplb.full_state_dict(balancer)):
            assert list(state) == list(expected)
            for key, value in expected.items():
                assert torch.equal(state[key], value), key
        on_rank_0 = torch_eplb.full_state_dict(balancer, rank0_only=True, cpu_offload=True)
        assert list(on_rank_0) == ([] if rank else list(expected))
        # Every replica is written, wherever it is by now; plain lists are in no state dict.
        state = dict(expected)
        for index, layer in enumerate(other.layers):
            for expert in range(EXPERTS):
                state[f"layers.{index}.experts.up.{expert}"] = layer.experts.up[expert]
                plain.layers[index].experts.up.data[expert] = layer.experts.up[expert]
        assert not any(balancer.load_state_dict(state))
        assert_every_slot(balancer, plain)
        key = "layers.1.experts.up.7"
        del state[key]
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=f"missing key '{key}'"):
                balancer.load_state_dict(state, strict=strict)
        state[key] = torch.zeros(3)
        with pytest.raises(RuntimeError, match=f"size mismatch for '{key}'"):
            balancer.load_state_dict(state)
        assert_every_slot(balancer, plain)
        with pytest.raises(RuntimeError, match=r"up\.0 is one slot's, of experts that are held"):
            torch_eplb.ShardedState(balancer).state_dict()
        # A folder of safetensors has the unwrapped model's keys.
        if rank == 0:
            save_file(expected, f"{folder}/model.safetensors")
        dist.barrier()
        torch_eplb.load_pretrained(balancer, folder)
        for key, value in balancer.state_dict().items():
            assert torch.equal(value, expected[key]), key
        for layer, experts in zip(balancer.engine.layers, whole.layers, strict=True):
            held = balancer.placement.experts[int(layer.name[7]), rank].tolist()
            for entry, expert in zip(layer.module.up, held, strict=True):
                assert torch.equal(entry, experts.experts.up[expert])
        dist.barrier()
        if rank == 0:
            del expected[key := "layers.1.experts.up.7"]
            save_file(expected, f"{folder}/model.safetensors")
        dist.barrier()
        with pytest.raises(RuntimeError, match=f"missing: {key}"):
            torch_eplb.load_pretrained(balancer, folder)


def on_meta(rank: int, world_size: int, folder: str) -> None:
    """A ParameterList is filled from the meta device."""
    torch_eplb.register_layer(OnlyParameters, tensors=["up"])
    whole, other = FewKernelModel(OnlyParameters, 2, 0), FewKernelModel(OnlyParameters, 2, 1)
    if rank == 0:
        save_file(whole.state_dict(), f"{folder}/model.safetensors")
    dist.barrier()
    with torch_eplb.wrap(other.to("meta"), **QUICK) as balancer:
        torch_eplb.load_pretrained(balancer, folder)
        serve(balancer, whole, rank, 2)
        expected = whole.state_dict()
        assert list(balancer.state_dict()) == list(expected)
        assert all(torch.equal(v, expected[k]) for k, v in balancer.state_dict().items())


class OnlyParameters(torch.nn.Module):
    """An expert is a matrix, in a ParameterList."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.up = torch.nn.ParameterList(torch.randn(HIDDEN, HIDDEN) for _ in range(EXPERTS))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        up = torch.stack(list(self.up))[top_k_index]
        out = (up @ hidden_states[:, None, :, None]).squeeze(-1)
        return (out * top_k_weights.unsqueeze(-1)).sum(1)


def test_a_list_of_parameters_is_loaded_from_the_meta_device(tmp_path: Any) -> None:
    run_ranks(on_meta, 2, str(tmp_path))


def test_state_of_lists_is_logical_or_refused(tmp_path: Any) -> None:
    run_ranks(states, 2, str(tmp_path))


def shortened(rank: int, world_size: int) -> None:
    model, _ = make_listed(ListedOutside, first_slots(rank, world_size, 0))
    with torch_eplb.wrap(model, dispatch="external", timeout=30) as balancer:
        model.layers[0].experts.bias.pop()
        with pytest.raises(ValueError, match=r"layers\.0\.experts: its lists have 31 .* had 32"):
            balancer(skewed_batch(8, HIDDEN, 0))


def test_a_list_that_was_shortened_is_named() -> None:
    run_ranks(shortened, 1)


@pytest.mark.parametrize("stacked", [False, True])
def test_shards_that_were_born_in_inference_mode_are_wrapped(stacked: bool) -> None:
    model, _ = make_listed(ListedOutside, first_slots(0, 2, 4))
    for layer in model.layers:
        experts: Any = layer.experts
        with torch.inference_mode():
            experts.bias = [torch.randn(HIDDEN, 1) for _ in experts.bias]
            if stacked:
                experts.bias = torch.stack(experts.bias)
        if stacked:
            experts.register_buffer("bias", vars(experts).pop("bias"))
    with fake_process_group(world_size=2):
        torch_eplb.wrap(model, **QUICK, dispatch="external").close()


def wrong_length(rank: int, world_size: int) -> None:
    model, _ = make_listed(ListedOutside, first_slots(rank, world_size, 2))
    with pytest.raises(ValueError, match=r"up has 5 entries; expected 8 .* or 6 \(this rank's"):
        torch_eplb.wrap(model, **QUICK, dispatch="external")


def test_a_list_of_another_length_is_refused() -> None:
    run_ranks(wrong_length, 2)


def differing(rank: int, world_size: int) -> None:
    model, _ = make_listed(ListedOutside, first_slots(rank, world_size, 4))
    if rank:
        model.layers[0].experts.bias = [b.double() for b in model.layers[0].experts.bias]
    with pytest.raises(ValueError, match=r"layer layers\.0\.experts.*bias:list of torch\.float64"):
        torch_eplb.wrap(model, **QUICK, dispatch="external")


def test_ranks_with_other_entries_are_refused() -> None:
    run_ranks(differing, 2)
