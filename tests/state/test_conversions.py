"""Checkpoints as transformers writes them, whose names and values are not the model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import SMALL
from torch import nn

import torch_eplb
from torch_eplb.state.conversions import Converted, converted_names
from torch_eplb.testing import fake_process_group

EXPERTS = {"num_local_experts": 12, "intermediate_size": 16}


def model_of(name: str, seed: int, **sizes: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SMALL, **sizes}))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_()  # all different, norms and biases too
    return model.eval()


# The checkpoint's experts have names, a path or a layout that only the model's mapping knows.
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mixtral", EXPERTS),
        ("granitemoe", EXPERTS),
        (
            "jamba",
            {
                "num_experts": 12,
                "intermediate_size": 16,
                "num_hidden_layers": 4,
                "attn_layer_offset": 1,
            },
        ),
    ],
)
def test_every_tensor_of_a_saved_model_arrives(
    name: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    saved, model = model_of(name, 0, **sizes), model_of(name, 1, **sizes)
    saved.save_pretrained(tmp_path)
    with fake_process_group(1), torch_eplb.wrap(model) as balancer:
        torch_eplb.load_pretrained(balancer, tmp_path)
        loaded = balancer.state_dict()
    assert loaded.keys() == saved.state_dict().keys()
    for key, value in saved.state_dict().items():
        assert torch.equal(loaded[key], value), key


def converted_by(operations: list[Any]) -> tuple[Converted, list[str]]:
    """What a mapping of these operations makes of Mixtral's experts, and the names it is given."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightConverter

    model = model_of("mixtral", 0, **EXPERTS)
    sources = ["mlp.experts.*.w1.weight", "mlp.experts.*.w3.weight"]
    converter = WeightConverter(sources, "mlp.experts.gate_up_proj", operations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [converter])
        head = "model.layers.0.mlp.experts"
        names = [f"{head}.{i}.{w}.weight" for i in reversed(range(12)) for w in ("w3", "w1")]
        key = f"{head}.gate_up_proj"
        found = converted_names(model, names, model.state_dict(), {key: (12, 12)})
    assert list(found) == [key]
    return found[key], names


def test_only_merging_and_concatenating_are_read_in_parts() -> None:
    from transformers.core_model_loading import Concatenate, Interleave, MergeModulelist, Transpose

    entry, names = converted_by([MergeModulelist(dim=0), Concatenate(dim=1)])
    assert entry.refused is None
    # In the order of numbers, not of letters, and of the mapping.
    head = "model.layers.0.mlp.experts"
    assert entry.row(10) == [f"{head}.10.w1.weight", f"{head}.10.w3.weight"]
    assert entry.names == set(names)
    for operations, told in (
        ([MergeModulelist(dim=0), Concatenate(dim=2)], "Concatenate on dim 2"),
        ([MergeModulelist(dim=1), Concatenate(dim=1)], "MergeModulelist on dim 1"),
        ([MergeModulelist(dim=0), Concatenate(dim=1), Interleave(dim=1)], "Interleave on dim 1"),
        ([MergeModulelist(dim=0), Concatenate(dim=1), Transpose(1, 2)], "Transpose"),
        ([Concatenate(dim=0)], "Concatenate on dim 0"),
    ):
        entry, _ = converted_by(operations)
        assert entry.refused is not None
        assert told in entry.refused


def load_converted(
    name: str, sizes: dict[str, Any], converters: list[Any], saved: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """The state of a small model after loading what is saved by a mapping of these converters."""
    from safetensors.torch import save_file
    from transformers import conversion_mapping

    save_file({key: value.contiguous() for key, value in saved.items()}, folder / SINGLE)
    with (
        fake_process_group(1),
        torch_eplb.wrap(model_of(name, 1, **sizes)) as balancer,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: converters)
        torch_eplb.load_pretrained(balancer, folder)
        return balancer.state_dict()


SINGLE = "model.safetensors"


@pytest.mark.parametrize("operation", ["Transpose", "Transposed already", "Interleave", "inverse"])
def test_values_are_changed_inside_of_each_expert_and_of_what_has_none(
    operation: str, tmp_path: Path
) -> None:
    from transformers.core_model_loading import Interleave, Transpose, WeightConverter

    made = {
        "Transpose": lambda by: Transpose(by, by + 1, check_dims=True),
        "Transposed already": lambda by: Transpose(by, by + 1, check_dims=True),
        "Interleave": lambda by: Interleave(dim=by),
        "inverse": lambda by: Interleave(dim=by, inverse=True),
    }[operation]
    sizes = {**EXPERTS, "intermediate_size": 24}  # none is square
    wanted = model_of("gpt_oss", 0, **sizes).state_dict()
    saved = dict(wanted)
    converters = []
    for leaf, by in (("experts.gate_up_proj", 1), ("q_proj.weight", 0)):
        converters.append(WeightConverter(leaf, leaf, [made(by)]))
        for key in [key for key in wanted if key.endswith(leaf)]:
            if operation != "Transposed already":
                undo = converters[-1].operations[0].reverse_op
                undo.check_dims = False
                (saved[key],) = undo.convert({key: wanted[key]}, [key], [key]).values()
                assert not torch.equal(saved[key], wanted[key])
    loaded = load_converted("gpt_oss", sizes, converters, saved, tmp_path)
    for key, value in wanted.items():
        assert torch.equal(loaded[key], value), key


def test_a_tensor_that_the_mapping_chunks_fills_all_of_its_parts(tmp_path: Path) -> None:
    from transformers.core_model_loading import Chunk, WeightConverter

    sizes = {**EXPERTS, "num_key_value_heads": SMALL["num_attention_heads"]}
    wanted = model_of("mixtral", 0, **sizes).state_dict()
    parts = [f"self_attn.{part}_proj.weight" for part in "qkv"]
    saved = {key: value for key, value in wanted.items() if not key.endswith(tuple(parts))}
    for layer in range(2):
        head = f"model.layers.{layer}."
        saved[f"{head}self_attn.qkv.weight"] = torch.cat([wanted[head + part] for part in parts])
    chunked = [WeightConverter("self_attn.qkv.weight", parts, [Chunk(dim=0)])]
    loaded = load_converted("mixtral", sizes, chunked, saved, tmp_path)
    for key, value in wanted.items():
        assert torch.equal(loaded[key], value), key
    # Parts of another size are told before anything is written.
    for rows in (95, 32, 33):
        saved["model.layers.1.self_attn.qkv.weight"] = torch.zeros(rows, 32)
        with pytest.raises(
            RuntimeError, match=rf"shape: .*\.1\.self_attn\.qkv\.weight has \({rows}"
        ):
            load_converted("mixtral", sizes, chunked, saved, tmp_path)


@pytest.mark.parametrize("shape", [(12, 48, 24), (32, 48), (12, 32, 47)])
def test_shapes_that_a_change_cannot_make_right_are_told(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    from transformers.core_model_loading import Interleave, Transpose, WeightConverter

    sizes = {**EXPERTS, "intermediate_size": 24}
    saved = model_of("gpt_oss", 0, **sizes).state_dict()
    key, leaf = "model.layers.1.mlp.experts.gate_up_proj", "experts.gate_up_proj"
    assert saved[key].shape == (12, 32, 48)
    saved[key] = torch.zeros(shape)
    for operation in (Transpose(1, 2, check_dims=True), Interleave(dim=2)):
        converter = WeightConverter(leaf, leaf, [operation])
        with pytest.raises(
            RuntimeError, match=r"shape: model\.layers\.1\.mlp\.experts\.gate_up_proj"
        ):
            load_converted("gpt_oss", sizes, [converter], saved, tmp_path)


def test_what_has_no_experts_is_converted_by_transformers_own_operations(tmp_path: Path) -> None:
    from transformers.core_model_loading import Chunk, Interleave, PermuteForRope, WeightConverter

    sizes = {**EXPERTS, "num_key_value_heads": SMALL["num_attention_heads"]}
    wanted = model_of("mixtral", 0, **sizes).state_dict()
    parts = ["self_attn.k_proj.weight", "self_attn.v_proj.weight"]
    converters = [
        WeightConverter("self_attn.kv.weight", parts, [Interleave(dim=0), Chunk(dim=0)]),
        WeightConverter("self_attn.wq.", "self_attn.q_proj.", [PermuteForRope()]),
    ]
    rope = PermuteForRope(inverse=True)
    config = model_of("mixtral", 0, **sizes).config
    saved = {key: value for key, value in wanted.items() if not key.endswith(tuple(parts))}
    for layer in range(2):
        head = f"model.layers.{layer}."
        both = torch.cat([wanted[head + part] for part in parts])
        (saved[f"{head}self_attn.kv.weight"],) = (
            Interleave(dim=0, inverse=True).convert({"kv": both}, ["kv"], ["kv"]).values()
        )
        value = saved.pop(f"{head}self_attn.q_proj.weight")
        (saved[f"{head}self_attn.wq.weight"],) = rope.convert(
            {"q": value}, ["q"], ["q"], config=config
        ).values()
    loaded = load_converted("mixtral", sizes, converters, saved, tmp_path)
    for key, value in wanted.items():
        assert torch.equal(loaded[key], value), key
    # What does not fit is told; whatever transformers' code would raise is not.
    for name, shape in (("kv", (63, 32)), ("wq", (33, 32)), ("wq", (64, 32)), ("kv", ())):
        wrong = {**saved, f"model.layers.1.self_attn.{name}.weight": torch.zeros(shape)}
        with pytest.raises(RuntimeError, match=rf"shape: .*\.1\.self_attn\.{name}\.weight has \("):
            load_converted("mixtral", sizes, converters, wrong, tmp_path)


def test_projections_of_all_experts_that_are_concatenated_are_read_slice_by_slice(
    tmp_path: Path,
) -> None:
    from transformers.core_model_loading import Concatenate, WeightConverter

    wanted = model_of("mixtral", 0, **EXPERTS).state_dict()
    leaf, parts = "experts.gate_up_proj", ["experts.gate.weight", "experts.up.weight"]
    saved = dict(wanted)
    for key in [key for key in wanted if key.endswith(leaf)]:
        gate, up = saved.pop(key).chunk(2, dim=1)
        for part, value in zip(parts, (gate, up), strict=True):
            saved[key.removesuffix(leaf) + part] = value
    converters = [WeightConverter(parts, leaf, [Concatenate(dim=1)])]
    loaded = load_converted("mixtral", EXPERTS, converters, saved, tmp_path)
    for key, value in wanted.items():
        assert torch.equal(loaded[key], value), key
    for name, shape in (("gate", (11, 16, 32)), ("up", (12, 15, 32)), ("up", (12, 16, 31))):
        wrong = {**saved, f"model.layers.1.mlp.experts.{name}.weight": torch.zeros(shape)}
        with pytest.raises(RuntimeError, match=rf"shape: .*\.1\.mlp\.experts\.{name}\.weight"):
            load_converted("mixtral", EXPERTS, converters, wrong, tmp_path)


def test_the_experts_of_text_and_vision_are_two_halves_of_one_list(tmp_path: Path) -> None:
    import transformers
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

    text = {**SMALL, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [16, 16]}
    text |= {"intermediate_size": 32, "mlp_layer_types": ["dense", "sparse"]}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    text["rope_parameters"]["mrope_section"] = [1, 1, 2]
    vision = {"hidden_size": 16, "num_heads": 2, "depth": 1, "intermediate_size": 16}
    config = Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision)
    for special in ("image_token_id", "video_token_id"):
        setattr(config, special, 90)
    models = []
    for seed in (0, 1):
        model = Ernie4_5_VLMoeForConditionalGeneration(config)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data.normal_()
        models.append(model.eval())
    transformers.logging.disable_progress_bar()
    models[0].save_pretrained(tmp_path)
    with fake_process_group(1), torch_eplb.wrap(models[1]) as balancer:
        torch_eplb.load_pretrained(balancer, tmp_path)
        for key, value in balancer.state_dict().items():
            assert torch.equal(value, models[0].state_dict()[key]), key


def test_experts_that_are_interleaved_are_refused_by_name_and_nothing_is_loaded(
    tmp_path: Path,
) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import Interleave, WeightConverter

    # The checkpoint's name is the model's own, and its values are not.
    leaf = "mlp.experts.gate_up_proj"
    converter = WeightConverter(leaf, leaf, [Interleave(dim=0)])
    saved, model = model_of("gpt_oss", 0, **EXPERTS), model_of("gpt_oss", 1, **EXPERTS)
    saved.save_pretrained(tmp_path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with fake_process_group(1), torch_eplb.wrap(model) as balancer:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                conversion_mapping, "get_model_conversion_mapping", lambda model: [converter]
            )
            with pytest.raises(RuntimeError, match=rf"{leaf}: .* by Interleave on dim 0") as caught:
                torch_eplb.load_pretrained(balancer, tmp_path)
        assert "nothing was loaded" in str(caught.value)
        for key, value in balancer.state_dict().items():
            assert torch.equal(value, before[key]), key
