"""Layers that dispatch by themselves and tell how many tokens each of their slots got."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import Elsewhere, Experts
from torch import nn

import torch_eplb
from torch_eplb.layers.finding import find_layers
from torch_eplb.testing import fake_process_group


class Told(Elsewhere):
    """Tells whatever it is given to tell."""

    arrived: Any = None


class Sets(Told):
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        self.arrived = torch.arange(6, dtype=torch.int32) + len(hidden_states)
        return hidden_states


class Writes(Elsewhere):
    """Has a tensor of its own for them, with an entry per local slot."""

    def __init__(self, slots: int = 6) -> None:
        super().__init__()
        self.register_buffer("arrived", torch.zeros(slots, dtype=torch.int64), persistent=False)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        self.arrived.copy_(torch.arange(len(self.arrived)) + len(hidden_states))
        return hidden_states


class Returns(Told):
    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden_states, torch.arange(6) + len(hidden_states)


def returned(module: nn.Module, output: Any) -> torch.Tensor:
    assert isinstance(module, Returns)
    return output[1]


torch_eplb.register_layer(Told, token_counts="arrived")
torch_eplb.register_layer(Writes, token_counts="arrived")
torch_eplb.register_layer(Returns, token_counts=returned)

OPTIONS: Any = {"dispatch": "external", "num_redundant_experts": 4}


def call(module: nn.Module, tokens: int = 1) -> None:
    ids = torch.zeros(tokens, 2, dtype=torch.int64)  # which tell nothing here
    module(torch.zeros(tokens, 2), ids, torch.ones(tokens, 2))


@pytest.mark.parametrize("choice", ["local", "table", "even"])
@pytest.mark.parametrize("layer", [Sets, Writes, Returns])
def test_what_arrived_in_a_slot_is_counted_for_its_expert(layer: Any, choice: Any) -> None:
    with (
        fake_process_group(world_size=2, rank=1),
        torch_eplb.wrap(layer(), **OPTIONS, replica_choice=choice) as balancer,
    ):
        assert balancer.placement.experts[0, 1].tolist() == [6, 7, 0, 1, 2, 3]
        call(balancer, 1)
        call(balancer, 3)
        with balancer.paused():
            call(balancer, 9)
        hits, sent = balancer.load()
        # Slot s got s + 1 tokens, then s + 3; they arrived at this rank.
        assert hits.tolist() == [[8, 10, 12, 14, 0, 0, 4, 6]]
        assert sent.tolist() == [[0, 54]]


@pytest.mark.parametrize("layer", [Sets, Writes, Returns])
def test_compiled_layers_tell_it_too(layer: Any) -> None:
    with (
        fake_process_group(world_size=2, rank=1),
        torch_eplb.wrap(layer(), **OPTIONS, replica_choice="table") as balancer,
    ):
        run = torch.compile(balancer, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            call(run, 1)
            call(run, 3)
        assert balancer.load()[0].tolist() == [[8, 10, 12, 14, 0, 0, 4, 6]]


@pytest.mark.parametrize(
    ("told", "error"),
    [
        (None, r"TypeError: layer : token_counts='arrived' gave NoneType and no tensor"),
        ([1] * 6, r"TypeError: .* gave list"),
        (torch.ones(6), r"TypeError: .* gave torch\.float32; .* as integers \[6\] on cpu"),
        (torch.ones(6, dtype=torch.bool), r"TypeError: .* gave torch\.bool"),
        (torch.ones(12).long(), r"ValueError: .* gave the shape \(12,\); .* each local slot got"),
        (torch.ones(6, 1).long(), r"ValueError: .* gave the shape \(6, 1\)"),
        (torch.ones(6, device="meta").long(), r"ValueError: .* gave a tensor on meta"),
        (-torch.ones(6).long(), r"ValueError: .* with numbers below 0"),
    ],
    ids=str,
)
def test_counts_that_cannot_be_are_refused_by_name(told: Any, error: str) -> None:
    kind, _, message = error.partition(": ")
    with fake_process_group(world_size=2), torch_eplb.wrap(Told(), **OPTIONS) as balancer:
        balancer.module.arrived = told
        with pytest.raises({"TypeError": TypeError, "ValueError": ValueError}[kind], match=message):
            call(balancer)
        assert not balancer.load()[0].any()


def test_counts_of_the_forward_before_are_not_counted_again() -> None:
    with fake_process_group(world_size=2), torch_eplb.wrap(Told(), **OPTIONS) as balancer:
        balancer.module.arrived = torch.ones(6).long()
        call(balancer)
        with pytest.raises(ValueError, match=r"must set the attribute anew.*register_buffer\('arr"):
            call(balancer)
        assert balancer.load()[0].sum() == 6


def test_a_mask_cannot_be_applied_to_what_arrived() -> None:
    with fake_process_group(world_size=2), torch_eplb.wrap(Sets(), **OPTIONS) as balancer:
        with pytest.raises(ValueError, match=r"cannot tell which .* expert id -1"):
            with balancer.tokens(torch.ones(1)):
                call(balancer)
    with pytest.raises(ValueError, match=r"token_mask='top_k_index' and token_counts='arrived'"):
        torch_eplb.register_layer(Sets, token_counts="arrived", token_mask="top_k_index")


def test_token_counts_are_no_experts_tensor() -> None:
    # On one rank there are as many slots as experts.
    assert find_layers(Writes(8))[0].tensor_names == ["up"]
    told = Told()
    told.arrived = torch.zeros(8)
    assert find_layers(told)[0].tensor_names == ["up"]
    with pytest.raises(ValueError, match=r"token_counts='up' is also one of tensors"):
        torch_eplb.register_layer(Sets, token_counts="up", tensors=["up"])
    with pytest.raises(TypeError, match="got int"):
        torch_eplb.register_layer(Sets, token_counts=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"extra_repr is bound to an object, .*\(module, output\)"):
        torch_eplb.register_layer(Sets, token_counts=told.extra_repr)  # type: ignore[arg-type]


class Brought(Experts):
    pass


def test_only_layers_that_dispatch_by_themselves_count_by_themselves() -> None:
    torch_eplb.register_layer(Brought, token_counts="arrived")
    with fake_process_group(world_size=2):
        with pytest.raises(
            ValueError, match=r"token_counts='arrived', which is for dispatch=\"ext"
        ):
            torch_eplb.wrap(Brought(8, 16, 4))
