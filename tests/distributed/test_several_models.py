"""Several wrapped models on one group: in the same order they work, in another they are told."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.models import QUICK, ToyModel, skewed_batch
from support.ranks import preload, run_ranks

import torch_eplb

preload("transformers.models.qwen3_moe.modeling_qwen3_moe")


def draft_and_target(experts: int = 8, **options: Any) -> tuple[list[Any], list[Any]]:
    models = [ToyModel(2, experts, seed=1), ToyModel(3, 8, seed=2)]
    references = copy.deepcopy(models)
    return [torch_eplb.wrap(model, **{**QUICK, **options}) for model in models], references


def serve_in_turns(rank: int, world_size: int) -> int:
    balancers, references = draft_and_target(12)
    step = 0
    with torch.no_grad():
        while min(b.stats().rebalances for b in balancers) < 2:
            for turn, which in enumerate((0, 0, 1)):
                x = skewed_batch(6, 16, 100 * step + 10 * turn + rank)
                expected = references[which](x)
                torch.testing.assert_close(balancers[which](x), expected, atol=1e-5, rtol=1e-4)
            step += 1
    for balancer in balancers:
        balancer.unwrap()
    # Alone again, a model has no more to say than before.
    assert balancers[0].engine._roster._models == {}
    return step


def test_a_draft_and_a_target_in_the_same_order_are_both_balanced() -> None:
    run_ranks(serve_in_turns, 2)


def serve_in_another_order(rank: int, world_size: int, experts: int, overlap: bool) -> str:
    balancers, references = draft_and_target(experts, overlap=overlap)
    said, step = "", 0
    with torch.no_grad():
        for balancer in balancers:
            balancer(skewed_batch(6, 16, rank))
        while not said or min(b.stats().rebalances for b in balancers) < 1:
            # Also when a rank is about to wait for the others' transfers.
            x = skewed_batch(6, 16, 100 * step + rank)
            with pytest.raises(torch_eplb.EPLBError, match="different models") as caught:
                balancers[1 if rank == 1 else 0](x)
            assert not isinstance(caught.value, torch_eplb.PeerLostError)
            said = said or str(caught.value)
            # Nothing was exchanged, so no step was made: the next forwards take the failed ones'.
            for balancer, reference in zip(balancers, references, strict=True):
                torch.testing.assert_close(balancer(x), reference(x), atol=1e-5, rtol=1e-4)
            step += 1
    for balancer in balancers:
        assert balancer.stats().step == step + 1
        balancer.close()
    return said


@pytest.mark.parametrize(("experts", "overlap"), [(8, True), (12, False)])
def test_ranks_in_different_models_are_told_on_every_rank_before_a_token_travels(
    experts: int, overlap: bool
) -> None:
    for said in run_ranks(serve_in_another_order, 2, experts, overlap):
        assert "rank 0 in layer 0 of ToyModel (number 0), step 1" in said
        assert "rank 1 in layer 0 of ToyModel (number 1), step 1" in said


def assisted(rank: int, world_size: int) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    models = [
        Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                vocab_size=64,
                hidden_size=32,
                moe_intermediate_size=16,
                num_hidden_layers=layers,
                num_attention_heads=2,
                num_key_value_heads=1,
                num_experts=8,
                num_experts_per_tok=2,
                head_dim=16,
            )
        ).eval()
        for layers in (1, 2)
    ]
    ids = torch.randint(3, 64, (1, 8), generator=torch.Generator().manual_seed(5))
    options: Any = {"max_new_tokens": 16, "do_sample": False, "assistant_model": None}
    expected = models[1].generate(ids, **{**options, "assistant_model": models[0]})
    draft, target = (torch_eplb.wrap(model, **QUICK) for model in models)
    actual = target.module.generate(ids, **{**options, "assistant_model": draft.module})
    assert torch.equal(actual, expected)
    assert draft.stats().step > 0
    assert target.stats().step > 0
    target.close()
    draft.close()


def test_assisted_generation_of_transformers_gives_the_same_tokens() -> None:
    run_ranks(assisted, 2)
