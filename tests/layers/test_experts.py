"""Finding MoE layers, sharding their tensors and giving them back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import Experts, ToyModel, TwoTowers
from torch import nn

from torch_eplb.layers.experts import ExpertLayer
from torch_eplb.layers.finding import LayerChoice, common_owner, find_layers
from torch_eplb.layers.slots import Stacked, byte_view
from torch_eplb.layers.spec import BoundArguments, LayerSpec, find_spec, register_layer


def test_layers_are_found_by_their_forward_and_in_order() -> None:
    layers = find_layers(ToyModel(num_layers=3, num_experts=6))
    assert [layer.name for layer in layers] == [f"layers.{i}.experts" for i in range(3)]
    assert layers[0].num_experts == 6
    assert layers[0].tensor_names == ["gate_up_proj", "down_proj", "down_bias", "scale"]
    assert layers[0].expert_bytes == 4 * (16 * 16 + 16 * 8 + 16 + 1)


def test_a_model_without_moe_layers_says_how_to_describe_one() -> None:
    with pytest.raises(ValueError, match=r"Linear has no MoE layer .*register_layer"):
        find_layers(nn.Linear(2, 2))


def test_unequal_numbers_of_experts_are_named() -> None:
    model = nn.ModuleList([ToyModel(1, 4), ToyModel(1, 8)])
    with pytest.raises(ValueError, match=r"0\.layers\.0\.experts: 4, 1\.layers\.0\.experts: 8"):
        find_layers(model)


@pytest.mark.parametrize(
    "choice",
    [
        ["text.layers.0.experts", "text.layers.1.experts"],
        ["text.*"],
        ("*.1.experts", "text.layers.0.*"),
        lambda name, module: module.num_experts == 8,
    ],
)
def test_some_of_the_layers_are_chosen_by_name_pattern_or_function(choice: LayerChoice) -> None:
    model = TwoTowers(vision_experts=8 if isinstance(choice, tuple) else 4)
    first = model.vision.layers[0].experts
    first.scales = [0.5] * first.num_experts  # would be refused
    wanted = {f"text.layers.{i}.experts" for i in (0, 1)}
    if isinstance(choice, tuple):
        wanted.add("vision.layers.1.experts")
    assert {layer.name for layer in find_layers(model, choice)} == wanted


def test_a_choice_of_no_layer_says_which_there_are() -> None:
    there_are = r"'text\.layers\.0\.experts', .*, 'vision\.layers\.1\.experts'$"
    with pytest.raises(ValueError, match=rf"layers: 'text' is the name of no .* {there_are}"):
        find_layers(TwoTowers(), ["vision.*", "text"])
    with pytest.raises(ValueError, match=rf"layers=.*<lambda>: it has chosen none .* {there_are}"):
        find_layers(TwoTowers(), lambda name, module: False)
    with pytest.raises(ValueError, match=r"and 5 more$"):
        find_layers(ToyModel(num_layers=25), ["x"])


def test_steps_are_forwards_of_the_smallest_part_with_two_moe_layers_or_of_the_model() -> None:
    model = TwoTowers()
    text = [f"text.layers.{i}.experts" for i in (0, 1)]
    assert common_owner(model, text) is model.text
    assert common_owner(model, text[:1]) is model.text  # as when the other one is not chosen
    assert common_owner(model, [text[0], "vision.layers.1.experts"]) is model
    model.text = ToyModel(num_layers=1)
    assert common_owner(model, text[:1]) is model  # though its forward may leave it out
    assert common_owner(model.text, ["layers.0.experts"]) is model.text


def test_a_module_whose_tensors_do_not_match_its_experts_is_refused() -> None:
    experts = Experts(8, 16, 8)
    experts.num_experts = 5
    with pytest.raises(ValueError, match=r"says it has 5 experts.*gate_up_proj \(8,"):
        find_layers(experts)


def test_tensor_subclasses_are_refused() -> None:
    class Packed(torch.Tensor):
        pass

    experts = Experts(4, 8, 4)
    experts.register_buffer("scale", torch.rand(4).as_subclass(Packed))
    with pytest.raises(ValueError, match="scale is a Packed; experts must be plain tensors"):
        find_layers(experts)


def test_a_norm_inside_the_experts_is_not_taken_for_expert_weights() -> None:
    experts = Experts(16, 16, 8)  # as many experts as hidden features
    experts.post_norm = nn.LayerNorm(16)
    (layer,) = find_layers(experts)
    assert not any("post_norm" in name for name in layer.tensor_names)


class Odd(nn.Module):
    """Other names, weights without experts, and a tensor that only looks like experts'."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 4
        self.w = nn.Parameter(torch.randn(4, 3, 3))
        self.lookalike = nn.Parameter(torch.randn(4))

    def forward(self, routing: torch.Tensor, x: torch.Tensor, *, gates: torch.Tensor) -> None:
        """Arguments in another order."""


def test_a_registered_class_is_read_as_described() -> None:
    assert find_spec(Odd()) is None
    register_layer(
        Odd,
        hidden_states="x",
        expert_ids="routing",
        expert_weights="gates",
        num_experts="count",
        tensors=["w"],
    )
    (layer,) = find_layers(Odd())
    assert layer.tensor_names == ["w"]
    arguments = layer.arguments
    a, b, c, d = (torch.tensor(i) for i in range(4))
    assert arguments.get("x", (a, b), {"gates": c}) is b
    assert arguments.get("gates", (a, b), {"gates": c}) is c
    args, kwargs = arguments.replace((a, b), {"gates": c}, {"x": d, "gates": d})
    assert args == (a, d)
    assert kwargs == {"gates": d}
    with pytest.raises(TypeError, match="without its argument 'gates'"):
        arguments.get("gates", (a, b), {})


def test_registering_nonsense_is_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        register_layer(dict)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expert_ids='ids': Odd\.forward has no such argument"):
        register_layer(Odd, expert_ids="ids", hidden_states="x", expert_weights=None)


def test_sharding_keeps_the_named_experts_and_restoring_gives_them_back() -> None:
    model = Experts(6, 8, 4)
    full = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (layer,) = find_layers(model)
    layer.shard([5, 0, 2])
    layer.compute_locally(3)
    assert model.num_experts == 3
    for name, tensor in zip(layer.tensor_names, layer.tensors(), strict=True):
        assert torch.equal(tensor, full[name][[5, 0, 2]])
    assert isinstance(model.gate_up_proj, nn.Parameter)
    assert not isinstance(model.scale, nn.Parameter)
    layer.restore([Stacked(full[name]) for name in layer.tensor_names])
    assert model.num_experts == 6
    assert all(torch.equal(full[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn, torch.int8]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_slots_are_bytes_whatever_their_dtype_and_layout(
    dtype: torch.dtype, transposed: bool
) -> None:
    module = Experts(5, 8, 4)
    raw = torch.randint(0, 100, (5, 6, 4)).to(dtype)
    if transposed:
        raw = raw.transpose(1, 2).contiguous().transpose(1, 2)
    module.register_buffer("packed", raw)
    (layer,) = find_layers(module)
    layer.shard([4, 1])
    packed = module.packed
    assert packed.stride()[1:] == raw.stride()[1:]
    for slot, expert in enumerate([4, 1]):
        assert torch.equal(byte_view(packed[slot]), byte_view(raw[expert]))
    layer.slot_bytes(0)[-1].copy_(layer.slot_bytes(1)[-1])
    assert torch.equal(byte_view(packed[0]), byte_view(raw[1]))


@given(st.permutations(range(3)), st.lists(st.integers(1, 4), min_size=3, max_size=3))
def test_a_byte_view_covers_every_byte_of_a_permuted_tensor(
    order: list[int], sizes: list[int]
) -> None:
    tensor = torch.arange(sizes[0] * sizes[1] * sizes[2], dtype=torch.int16).view(sizes)
    view = byte_view(tensor.permute(order))
    assert view.numel() == tensor.numel() * 2
    view.zero_()
    assert not tensor.any()


def test_a_tensor_with_gaps_has_no_byte_view() -> None:
    with pytest.raises(ValueError, match="not dense in memory"):
        byte_view(torch.zeros(4, 6)[:, ::2])


def test_arguments_are_found_by_position_or_name() -> None:
    spec = LayerSpec("hidden_states", "top_k_index", "top_k_weights")
    arguments = BoundArguments(spec, Experts.forward)
    x, i, w = torch.zeros(1), torch.ones(1), torch.ones(2)
    for args, kwargs in [((x, i, w), {}), ((x,), {"top_k_index": i, "top_k_weights": w})]:
        assert arguments.get("top_k_index", args, kwargs) is i
        assert arguments.get("top_k_weights", args, kwargs) is w
    layer = ExpertLayer("", Experts(2, 2, 2), spec)
    assert layer.layout()[0].startswith("gate_up_proj:torch.float32")


def test_an_optimizer_made_before_sharding_goes_on_changing_the_experts() -> None:
    model = Experts(6, 8, 4)
    held = dict(model.named_parameters())
    optimizer = torch.optim.SGD(held.values(), lr=1.0)
    graph = (model.down_proj * model.down_proj).sum()
    (layer,) = find_layers(model)
    full = [tensor.detach().clone() for tensor in layer.tensors()]
    layer.shard([5, 0, 2])
    assert all(getattr(model, name) is parameter for name, parameter in held.items())
    model.down_proj.sum().backward()
    optimizer.step()
    assert torch.equal(model.down_proj, full[1][[5, 0, 2]] - 1.0)
    # What was computed with the full tensor cannot be taken for what it holds now.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph.backward()
    layer.restore([Stacked(tensor) for tensor in full])
    assert all(getattr(model, name) is parameter for name, parameter in held.items())
    assert model.down_proj.grad is None


def test_experts_made_in_inference_mode_are_written_later_all_the_same() -> None:
    with torch.inference_mode():
        model = Experts(6, 8, 4)
    (layer,) = find_layers(model)
    layer.shard([5, 0, 2])
    assert not any(tensor.is_inference() for tensor in layer.tensors())
    layer.slot_bytes(0)[0].copy_(layer.slot_bytes(1)[0])
