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


def test_interleaved_experts_are_refused_by_name_and_nothing_is_loaded(tmp_path: Path) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import Interleave, WeightConverter

    # The checkpoint's name is the model's own, and its values are not.
    leaf = "mlp.experts.gate_up_proj"
    converter = WeightConverter(leaf, leaf, [Interleave(dim=1)])
    saved, model = model_of("gpt_oss", 0, **EXPERTS), model_of("gpt_oss", 1, **EXPERTS)
    saved.save_pretrained(tmp_path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with fake_process_group(1), torch_eplb.wrap(model) as balancer:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                conversion_mapping, "get_model_conversion_mapping", lambda model: [converter]
            )
            with pytest.raises(RuntimeError, match=rf"{leaf}: .* by Interleave on dim 1") as caught:
                torch_eplb.load_pretrained(balancer, tmp_path)
        assert "nothing was loaded" in str(caught.value)
        for key, value in balancer.state_dict().items():
            assert torch.equal(value, before[key]), key
