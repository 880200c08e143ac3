"""transformers' own models: greedy generation equals the unwrapped model's while experts move."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.models import SMALL
from support.ranks import preload, run_ranks

import torch_eplb

preload("transformers.models.qwen3_moe.modeling_qwen3_moe")

MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16},
    "gpt_oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 16,
        "head_dim": 8,
    },
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 16,
        "n_group": 2,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}


def make_model(name: str, implementation: str) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **{**SMALL, **MODELS[name]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.set_experts_implementation(implementation)
    # Wide weights make the router choose clearly, and its choice depend on the token.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(5.0)
    return model.eval()


def generate(rank: int, world_size: int, dispatch: str, implementation: str) -> dict[str, int]:
    moved = {}
    for name in MODELS:
        model = make_model(name, implementation)
        reference = copy.deepcopy(model)
        with torch_eplb.wrap(
            model,
            num_redundant_experts=2,
            dispatch=dispatch,
            policy="random",
            collect_interval=5,
            plan_interval=2,
            timeout=30,
        ) as balancer:
            torch.manual_seed(1 if dispatch == "all_reduce" else 100 + rank)
            for _ in range(400):
                prompt = torch.randint(0, 96, (2, 6))
                options = {"max_new_tokens": 8, "do_sample": False, "use_cache": True}
                ours = balancer.module.generate(prompt, **options)
                theirs = reference.generate(prompt, **options)
                assert torch.equal(ours, theirs), name
                if balancer.stats().rebalances >= 2:
                    break
            stats = balancer.stats()
            assert stats.rebalances >= 2, (name, stats)
            assert stats.step % 8 == 0
            moved[name] = stats.experts_moved
            full = balancer.unwrap()
        for key, value in reference.state_dict().items():
            assert torch.equal(full.state_dict()[key], value), (name, key)
    return moved


@pytest.mark.parametrize(
    ("dispatch", "implementation"),
    [
        ("all_to_all", "grouped_mm"),
        ("all_to_all", "eager"),
        ("all_reduce", "grouped_mm"),
        ("all_reduce", "eager"),
    ],
)
def test_greedy_tokens_equal_the_unwrapped_models_while_experts_move(
    dispatch: str, implementation: str
) -> None:
    results = run_ranks(generate, 2, dispatch, implementation, timeout=150)
    assert results[0] == results[1]
    assert all(moved > 0 for moved in results[0].values())
