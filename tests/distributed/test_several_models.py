"""Several wrapped models on one group: in the same order they work, in another they are told."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.models import QUICK, SMALL, ToyModel, TwoTowers, skewed_batch
from support.moving import assert_same
from support.ranks import preload, run_ranks

import torch_eplb
from torch_eplb import ShardedState

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


def towers_in_parts(rank: int, world_size: int, folder: str) -> None:
    model, reference = TwoTowers(), TwoTowers()
    options: Any = {**QUICK, "allow_training_with_moves": True}
    text = torch_eplb.wrap(model, layers=["text.*"], **options)
    options["num_redundant_experts"] = 2
    vision = torch_eplb.wrap(model, layers=["vision.*"], **options)
    with pytest.raises(ValueError, match=r"text\.layers\.0\.experts is wrapped already.*layers="):
        torch_eplb.wrap(model)
    balancers = [text, vision]
    ignored = model._ddp_params_and_buffers_to_ignore
    assert {name.partition(".")[0] for name in ignored} == {"text", "vision"}
    assert text._ddp_params_and_buffers_to_ignore == [f"module.{name}" for name in ignored]

    def serve() -> None:
        """Until both have moved experts again, a round of the one may be under way."""
        wanted = [balancer.stats().rebalances + 1 for balancer in balancers]
        for step in range(20000):
            x = skewed_batch(6, 16, 10 * step + rank)
            image = skewed_batch(6, 16, 10 * step + 5 + rank) if step % 3 else None
            torch.testing.assert_close(model(x, image), reference(x, image), atol=1e-5, rtol=1e-4)
            now = [balancer.stats().rebalances for balancer in balancers]
            if all(n >= least for n, least in zip(now, wanted, strict=True)):
                return
        raise AssertionError("the experts never moved")

    with torch.no_grad():
        serve()
        assert text.stats().step > vision.stats().step  # which counts its own forwards
        for balancer in balancers:
            assert_same(balancer.state_dict(), reference.state_dict())
        for seed, which in ((5, 1), (9, 0)):
            reference = TwoTowers(seed=seed)
            balancers[which].load_state_dict(reference.state_dict())
            serve()
        dcp.save({"model": ShardedState(text)}, checkpoint_id=folder)
        saved, reference = reference, TwoTowers(seed=13)
        text.load_state_dict(reference.state_dict())
        serve()
        dcp.load({"model": ShardedState(vision)}, checkpoint_id=folder)
        reference = saved
        serve()
        # One rank's state does not fit: every rank is told, and nothing is written.
        wrong = TwoTowers(seed=21).state_dict()
        if rank == 1:
            del wrong["vision.layers.1.router.weight"]
        with pytest.raises(RuntimeError, match=r"rank 1: missing key 'vision\.layers\.1\.router"):
            text.load_state_dict(wrong)
        text.unwrap()
        assert model._ddp_params_and_buffers_to_ignore == vision.engine.guards.expert_names
        assert_same(text.state_dict(), reference.state_dict())
        vision.close()
        assert_same(text.state_dict(), reference.state_dict())
        del vision, balancer
        balancers.clear()
        gc.collect()
        assert_same(text.state_dict(), reference.state_dict())


def test_parts_of_a_model_are_balanced_by_themselves_and_saved_and_loaded_as_one(
    tmp_path: Path,
) -> None:
    run_ranks(towers_in_parts, 2, str(tmp_path))


def towers_in_place(rank: int, world_size: int) -> None:
    model, reference = TwoTowers(), TwoTowers()
    model.text = torch_eplb.wrap(model.text, **QUICK)
    model.vision = torch_eplb.wrap(model.vision, **{**QUICK, "num_redundant_experts": 2})
    for seed in (5, 9):
        with torch.no_grad():
            wanted = [part.stats().rebalances + 1 for part in (model.text, model.vision)]
            step = 0
            while any(
                part.stats().rebalances < least
                for part, least in zip((model.text, model.vision), wanted, strict=True)
            ):
                x, image = (skewed_batch(6, 16, 100 * step + 10 * i + rank) for i in (0, 1))
                torch.testing.assert_close(
                    model(x, image), reference(x, image), atol=1e-5, rtol=1e-4
                )
                step += 1
        assert_same(model.state_dict(), reference.state_dict())
        reference = TwoTowers(seed=seed)
        keys = model.load_state_dict(reference.state_dict())
        assert not keys.missing_keys
        assert not keys.unexpected_keys
        assert_same(model.state_dict(), reference.state_dict())
    model.text.close()
    model.vision.close()


def test_parts_that_were_wrapped_by_themselves_have_the_models_state_dict() -> None:
    run_ranks(towers_in_place, 2)


def choose_apart(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=r"layers.*rank 0.*text.*rank 1.*vision"):
        torch_eplb.wrap(TwoTowers(), layers=["vision.*" if rank else "text.*"])
    # One function, and what it chooses differs.
    with pytest.raises(ValueError, match=r"text\.layers\.1\.experts"):
        torch_eplb.wrap(
            TwoTowers(),
            layers=lambda name, module: name.startswith("text") and str(rank) not in name,
        )


def test_ranks_that_choose_other_layers_are_told() -> None:
    run_ranks(choose_apart, 2)


def saving_is_refused_until_the_last(rank: int, world_size: int, folder: str) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SMALL, num_experts=8, moe_intermediate_size=16, head_dim=8)
    ).eval()
    reference = copy.deepcopy(model).state_dict()
    first, second = (
        torch_eplb.wrap(model, layers=[f"*.{layer}.mlp.experts"], **QUICK) for layer in (0, 1)
    )
    first.unwrap()
    with pytest.raises(torch_eplb.EPLBError, match=r"balancer\.save_pretrained"):
        model.save_pretrained(folder)
    second.save_pretrained(folder)
    ids = torch.arange(8)[None] + rank
    with torch.device("meta"):
        empty = type(model)(model.config)
    parts = [torch_eplb.wrap(empty, layers=[f"*.{layer}.mlp.experts"]) for layer in (0, 1)]
    torch_eplb.load_pretrained(parts[1], folder)
    with torch.no_grad():
        torch.testing.assert_close(empty(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)
    assert_same(parts[0].state_dict(), reference)
    second.unwrap()
    model.save_pretrained(f"{folder}/{rank}")


def test_a_model_in_parts_is_saved_and_loaded_whole_by_transformers(tmp_path: Path) -> None:
    run_ranks(saving_is_refused_until_the_last, 2, str(tmp_path))


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
