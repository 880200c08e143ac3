"""Experts that could not be moved as a whole are refused by name, with the remedy."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import pytest
import torch
from support.models import Experts, ToyModel
from torch import nn

from torch_eplb.layers.finding import find_layers
from torch_eplb.layers.spec import register_layer


class Wrapped:
    """A quantised tensor as kernels take it: a shape, and whatever is inside."""

    shape = (4, 8, 8)


@dataclasses.dataclass
class Precision:
    scales: torch.Tensor


PER_EXPERT: dict[str, Any] = {
    "a tensor": torch.rand(4),
    "a list of tensors": [torch.rand(()) for _ in range(4)],
    "a list of numbers": [0.5, 1.0, 2.0, 4.0],
    "a dictionary": {expert: torch.rand(2) for expert in range(4)},
    "a list of lists": [[torch.rand(2) for _ in range(4)], "other"],
    "a list of modules": [nn.Linear(2, 2) for _ in range(4)],
    "an object": Precision(torch.rand(4, 1)),
    "a wrapped tensor": Wrapped(),
}


@pytest.mark.parametrize("kind", PER_EXPERT)
def test_an_attribute_per_expert_that_would_not_move_is_named(kind: str) -> None:
    model = nn.ModuleDict({"moe": Experts(4, 8, 4)})
    model["moe"].alphas = PER_EXPERT[kind]
    with pytest.raises(ValueError, match=r"layer moe: its attribute alphas .*register_buffer"):
        find_layers(model)
    # One module further down.
    del model["moe"].alphas
    model["moe"].inner = nn.Identity()
    model["moe"].inner.alphas = PER_EXPERT[kind]
    with pytest.raises(ValueError, match=r"its attribute inner\.alphas"):
        find_layers(model)


def test_what_only_looks_like_it_is_left_alone() -> None:
    experts = Experts(4, 8, 4)
    experts.shape = [4, 8, 8, 1]
    experts.names = ["a", "b", "c", "d"]
    experts.config = types.SimpleNamespace(factors=[0.5] * 4, experts=4, ids=list(range(4)))
    experts.scalar = torch.tensor(0.5)
    experts.drop = nn.ModuleList([nn.Dropout()])
    (layer,) = find_layers(experts)
    assert layer.tensor_names == ["gate_up_proj", "down_proj", "down_bias", "scale"]


@pytest.mark.parametrize(
    "held",
    [
        nn.ModuleList(nn.Linear(8, 8) for _ in range(4)),
        nn.ModuleDict({str(i): nn.Linear(8, 8) for i in range(4)}),
        nn.ParameterList(nn.Parameter(torch.rand(())) for _ in range(4)),
        nn.ParameterDict({str(i): nn.Parameter(torch.rand(())) for i in range(4)}),
    ],
)
def test_a_container_with_an_entry_per_expert_is_named(held: nn.Module) -> None:
    experts = Experts(4, 8, 4)
    experts.post = held
    with pytest.raises(ValueError, match=rf"post is a {type(held).__name__} .*register_layer"):
        find_layers(experts)


class OnlyAList(nn.ModuleList):
    """Experts as models had them before they were stacked."""

    num_experts = 4

    def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> None:
        """Not called."""


def test_experts_that_are_a_list_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match="is a OnlyAList with one entry per expert"):
        find_layers(nn.ModuleDict({"moe": OnlyAList(nn.Linear(8, 8) for _ in range(4))}))


def test_experts_of_which_only_a_part_is_tensors_are_refused() -> None:
    # As a quantiser leaves them: the weight packed into another shape, or into an object.
    packed = Experts(4, 8, 4)
    packed.gate_up_proj = nn.Parameter(torch.rand(32, 8))
    with pytest.raises(ValueError, match=r"its parameter gate_up_proj \(32, 8\) does not have 4"):
        find_layers(packed)
    opaque = Experts(4, 8, 4)
    opaque.register_buffer("proj_scale", torch.rand(4))
    opaque.proj = object()
    with pytest.raises(ValueError, match="proj_scale is indexed by expert, but proj is a object"):
        find_layers(opaque)


def test_transformers_quantised_gpt_oss_is_refused() -> None:
    quantised = pytest.importorskip("transformers.integrations.mxfp4")
    sizes = types.SimpleNamespace(num_local_experts=4, intermediate_size=8, hidden_size=8)
    experts = quantised.Mxfp4GptOssExperts(sizes)
    find_layers(experts)
    # Loading puts an object in the place of the packed weights.
    del experts.gate_up_proj
    experts.gate_up_proj = object()
    with pytest.raises(ValueError, match=r"gate_up_proj_bias .* but gate_up_proj is a object"):
        find_layers(experts)


def test_parametrized_experts_are_refused() -> None:
    experts = Experts(4, 8, 4)
    nn.utils.parametrize.register_parametrization(experts, "down_proj", nn.Identity())
    with pytest.raises(ValueError, match=r"down_proj is parametrized.*remove_parametrizations"):
        find_layers(experts)


class Described(Experts):
    """Its tensors are told."""


def test_whoever_names_the_tensors_has_said_what_moves() -> None:
    register_layer(Described, tensors=["gate_up_proj", "down_proj", "down_bias", "scale"])
    experts = Described(4, 8, 4)
    experts.cache, experts.shared = torch.zeros(4), nn.Parameter(torch.rand(3))
    find_layers(experts)


def test_adapters_around_experts_are_named() -> None:
    peft = pytest.importorskip("peft")
    model = ToyModel()
    config = peft.LoraConfig(
        r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    adapted = peft.get_peft_model(model, config, adapter_name="mine")
    with pytest.raises(ValueError, match=r"adapted by ParamWrapper 'mine'.*merge_and_unload\(\)"):
        find_layers(adapted)
    assert len(find_layers(adapted.merge_and_unload())) == 2
    elsewhere = peft.get_peft_model(ToyModel(), peft.LoraConfig(r=2, target_modules=["router"]))
    assert len(find_layers(elsewhere)) == 2


def test_weights_that_accelerate_offloads_are_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = ToyModel()
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"layer layers\.0\.experts: accelerate keeps"):
        find_layers(model)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    plain = accelerate.dispatch_model(ToyModel(), {"": "cpu"})
    assert len(find_layers(plain)) == 2


def test_tied_experts_are_named_and_a_shared_module_is_one_layer() -> None:
    model = ToyModel()
    first, second = (layer.experts for layer in model.layers)
    second.down_proj = first.down_proj
    with pytest.raises(
        ValueError, match=r"layers\.0\.experts\.down_proj and layers\.1\.experts\.down_proj are"
    ):
        find_layers(model)
    model.layers[1].experts = first
    (layer,) = find_layers(model)
    assert layer.name == "layers.0.experts"
    first.also = first.down_proj
    with pytest.raises(ValueError, match=r"experts\.down_proj and layers\.0\.experts\.also are"):
        find_layers(model)
