"""Models of transformers whose experts have a form of their own, and those that are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.models import QUICK, SMALL
from support.moving import assert_same, compare_logits
from support.ranks import preload, run_ranks
from torch import nn

import torch_eplb
from torch_eplb import ShardedState
from torch_eplb.layers.finding import find_layers
from torch_eplb.testing import fake_process_group

MODELS: dict[str, dict[str, Any]] = {
    "llama4_text": {
        "num_local_experts": 8,
        "intermediate_size": 16,
        "intermediate_size_mlp": 16,
        "head_dim": 8,
        "moe_layers": [0, 1],
    },
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 3},
    },
    "jetmoe": {"num_local_experts": 8, "intermediate_size": 16, "kv_channels": 8},
}
LAYERS = {"llama4_text": 2, "dbrx": 2, "jetmoe": 8}
preload(
    "transformers.models.llama4.modeling_llama4",
    "transformers.models.dbrx.modeling_dbrx",
    "transformers.models.jetmoe.modeling_jetmoe",
)


def make_model(name: str, seed: int = 0) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(SMALL)
    if name == "dbrx":
        for other in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            del sizes[other]
        del sizes["max_position_embeddings"], sizes["num_experts_per_tok"]
    config = AutoConfig.for_model(name, **{**sizes, **MODELS[name]})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def draw() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return torch.randint(0, 96, (2, 5)), {}


def serve(rank: int, world_size: int, name: str, folder: str) -> None:
    for dispatch in ("all_to_all", "all_gather", "all_reduce"):
        model, reference = make_model(name), make_model(name)
        options: Any = {**QUICK, "dispatch": dispatch, "allow_training_with_moves": True}
        options |= {"layers_per_step": 8, "staging_bytes": "1MiB"}
        balancer = torch_eplb.wrap(model, **options)
        assert balancer.placement.num_layers == LAYERS[name]
        compare_logits(balancer, reference, rank, dispatch, 2, draw)
        assert_same(balancer.state_dict(), reference.state_dict())
        hits, sent = (counts.sum(axis=1) for counts in balancer.load())
        assert (hits == sent).all()
        assert (hits > 0).all()
        other = make_model(name, seed=1)
        balancer.load_state_dict(other.state_dict())
        compare_logits(balancer, other, rank, dispatch, 3, draw)
        if dispatch == "all_to_all":
            prompt = torch.arange(6)[None] + rank
            options = {"max_new_tokens": 6, "do_sample": False}
            theirs = other.generate(prompt, **options)
            assert torch.equal(balancer.module.generate(prompt, **options), theirs)
            balancer.idle_step()
            balancer.save_pretrained(f"{folder}/pretrained")
            dist.barrier()
            with torch.device("meta"):
                empty = type(model)(model.config)
            loaded = torch_eplb.wrap(empty.eval(), **options_of(balancer))
            torch_eplb.load_pretrained(loaded, f"{folder}/pretrained")
            assert_same(loaded.state_dict(), other.state_dict())
            compare_logits(loaded, other, rank, dispatch, 1, draw)
            # A checkpoint has the unwrapped model's shapes, and loads into one.
            dcp.save({"model": ShardedState(loaded)}, checkpoint_id=f"{folder}/dcp")
            plain = {key: torch.zeros_like(value) for key, value in other.state_dict().items()}
            dcp.load({"model": plain}, checkpoint_id=f"{folder}/dcp")
            assert_same(plain, other.state_dict())
            third = copy.deepcopy(reference)
            dcp.save({"model": third.state_dict()}, checkpoint_id=f"{folder}/plain")
            dcp.load({"model": ShardedState(loaded)}, checkpoint_id=f"{folder}/plain")
            assert_same(loaded.state_dict(), third.state_dict())
            loaded.close()
        full = balancer.unwrap()
        assert_same(full.state_dict(), other.state_dict())
        assert not any("forward" in vars(module) for module in full.modules())
        assert torch.equal(full(ids_of(rank)).logits, other(ids_of(rank)).logits)


def options_of(balancer: torch_eplb.ExpertLoadBalancer) -> dict[str, Any]:
    return {"config": balancer.eplb_config}


def ids_of(rank: int) -> torch.Tensor:
    return torch.arange(4)[None] + rank


@pytest.mark.parametrize("name", MODELS)
def test_it_is_served_saved_and_loaded_while_its_experts_move(name: str, tmp_path: Path) -> None:
    run_ranks(serve, 2, name, str(tmp_path), timeout=150)


def test_experts_of_these_classes_do_not_dispatch_by_themselves() -> None:
    with (
        fake_process_group(world_size=2),
        pytest.raises(ValueError, match=r"'external': .*\.experts is a Llama4TextExperts of"),
    ):
        torch_eplb.wrap(make_model("llama4_text"), dispatch="external")


@pytest.mark.parametrize("name", ["llama4_text", "jetmoe"])
def test_a_mask_of_tokens_is_refused_where_rows_are_others(name: str) -> None:
    ids = ids_of(0)
    with (
        fake_process_group(world_size=1),
        torch_eplb.wrap(make_model(name), policy="static") as balancer,
        torch.no_grad(),
    ):
        balancer(ids)
        with (
            pytest.raises(ValueError, match=r"layer model\.layers\.0\..*which of them are padding"),
            balancer.tokens(torch.ones_like(ids, dtype=torch.bool)),
        ):
            balancer(ids)


def test_a_class_of_that_name_that_is_called_otherwise_is_not_taken_for_it() -> None:
    class Llama4TextExperts(nn.Module):
        num_experts = 4

        def forward(self, hidden_states: torch.Tensor, scores: torch.Tensor) -> None:
            """Of a version to come."""

    with pytest.raises(ValueError, match="has no MoE layer that is recognised"):
        find_layers(Llama4TextExperts())


@pytest.mark.parametrize(
    ("module", "name", "sizes", "says"),
    [
        (
            "vitpose_backbone",
            "VitPoseBackbone",
            {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
            r"\.experts is a VitPoseNaiveMoe: the data set of the whole batch chooses one expert",
        ),
        (
            "doge",
            "DogeModel",
            {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "is_moe": True},
            r"\.mlp is a DogeCDMoE: an expert is one row of an embedding",
        ),
    ],
)
def test_what_cannot_be_moved_is_refused_with_the_reason(
    module: str, name: str, sizes: dict[str, Any], says: str
) -> None:
    import transformers

    code = getattr(transformers.models, module)
    common = {"vocab_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "part_features": 4}
    kind = getattr(code, name)
    with torch.device("meta"):
        model = kind(kind.config_class(**{**common, **sizes}))
    with pytest.raises(ValueError, match=says):
        find_layers(model)
