"""In other tools' company: they leave this rank's experts alone, or are refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.models import QUICK, ToyModel, skewed_batch
from support.moving import in_flight, serve_until
from support.ranks import preload, run_ranks
from torch import nn

import torch_eplb
from torch_eplb.testing import fake_process_group

preload("transformers.models.qwen3_moe.modeling_qwen3_moe")


def inside_ddp(rank: int, world_size: int, outside: bool) -> None:
    model = ToyModel()
    reference = copy.deepcopy(model)
    balancer = torch_eplb.wrap(model, policy="static", timeout=30)
    ddp = nn.parallel.DistributedDataParallel(balancer if outside else balancer.module)
    x = skewed_batch(12, 16, rank)
    torch.testing.assert_close(ddp(x), reference(x), atol=1e-5, rtol=1e-4)
    # The rest is averaged by DDP, experts have their own gradients.
    ddp(x).square().mean().backward()
    router = model.layers[0].router.weight.grad
    assert router is not None
    everyone = [torch.empty_like(router) for _ in range(world_size)]
    dist.all_gather(everyone, router)
    torch.testing.assert_close(everyone[0], everyone[1])
    assert model.layers[0].experts.down_bias.grad is not None
    assert torch.equal(balancer.unwrap()(x), reference(x))
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")


@pytest.mark.parametrize("outside", [True, False])
def test_ddp_leaves_experts_alone(outside: bool) -> None:
    run_ranks(inside_ddp, 2, outside)


def under_fsdp(rank: int, world_size: int, ignored: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    model = ToyModel()
    reference = copy.deepcopy(model)
    balancer = torch_eplb.wrap(model, policy="static", timeout=30)
    x = skewed_batch(12, 16, rank)
    if ignored:
        fully_shard(model, ignored_params=set(balancer.expert_parameters()))
        with torch.no_grad():
            torch.testing.assert_close(balancer(x), reference(x), atol=1e-5, rtol=1e-4)
    else:
        fully_shard(model)
        with torch.no_grad(), pytest.raises(ValueError, match="was replaced after wrapping"):
            balancer(x)
    balancer.close()


@pytest.mark.parametrize("ignored", [True, False])
def test_fsdp_is_right_where_experts_are_ignored_and_refused_where_not(ignored: bool) -> None:
    run_ranks(under_fsdp, 2, ignored)


def train(rank: int, world_size: int) -> None:
    x = skewed_batch(12, 16, rank)
    for options, says in (
        ({"policy": "flow"}, "do not move with their experts"),
        ({"policy": "static", "num_redundant_experts": 2}, "replicas are not summed"),
    ):
        balancer = torch_eplb.wrap(ToyModel(), timeout=30, **options)  # type: ignore[arg-type]
        with pytest.raises(torch_eplb.EPLBError, match=says) as caught:
            balancer(x).sum().backward()
        assert "layers.1.experts." in str(caught.value)
        for parameter in balancer.expert_parameters():
            parameter.requires_grad_(False)
        balancer(x).sum().backward()  # experts are frozen
        balancer.close()
    for options in ({"policy": "static"}, {"policy": "flow", "allow_training_with_moves": True}):
        balancer = torch_eplb.wrap(ToyModel(), timeout=30, **options)  # type: ignore[arg-type]
        balancer(x).sum().backward()
        assert all(p.grad is not None for p in balancer.expert_parameters())
        balancer.close()
    # An unwrapped model trains as before.
    model = torch_eplb.wrap(ToyModel(), timeout=30).unwrap()
    model(x).sum().backward()


def test_training_experts_that_move_or_have_replicas_is_refused_with_the_reason() -> None:
    run_ranks(train, 2)


def cast(rank: int, world_size: int) -> None:
    for dtype, tolerance in ((torch.float16, 2e-2), (torch.float64, 1e-9)):
        fits = dtype == torch.float16
        model = ToyModel()
        reference = copy.deepcopy(model)
        balancer = torch_eplb.wrap(model, **QUICK)
        with torch.no_grad():
            # What is on its way was sent as float32.
            serve_until(lambda balancer=balancer: in_flight(balancer), balancer, rank)
            balancer.to(dtype)
            reference.to(dtype)
            rebalances, x = balancer.stats().rebalances, skewed_batch(6, 16, rank, dtype=dtype)
            if not fits:
                says = r"staging_bytes=1\d+ has no room .* was cast \(torch\.float64\)"
                with pytest.raises(ValueError, match=says):
                    balancer(x)
                assert "Cast before wrapping" in str(balancer.stats().disabled)
            for step in range(400):
                x = skewed_batch(6, 16, 100 * step + rank, dtype=dtype)
                torch.testing.assert_close(
                    balancer(x), reference(x), atol=tolerance, rtol=tolerance
                )
                if balancer.stats().rebalances >= rebalances + 2 or (step == 30 and not fits):
                    break
        stats = balancer.stats()
        assert (stats.rebalances_abandoned, stats.disabled is None) == (int(fits), fits)
        assert all(
            torch.equal(value, reference.state_dict()[key])
            for key, value in balancer.state_dict().items()
        )
        balancer.close()


def test_casting_a_model_whose_experts_move_is_right_or_ends_balancing_with_the_reason() -> None:
    run_ranks(cast, 2)


def test_experts_that_were_moved_to_another_device_are_noticed_at_the_next_forward() -> None:
    with fake_process_group(world_size=2):
        model = ToyModel()
        with torch_eplb.wrap(model) as balancer, torch.no_grad():
            model.layers[0].experts.to("meta")
            with pytest.raises(
                ValueError, match=r"layers\.0\..* moved to meta after wrapping on cpu"
            ):
                balancer(torch.rand(2, 16))


def test_adapters_that_are_added_after_wrapping_are_noticed_at_the_next_forward() -> None:
    peft = pytest.importorskip("peft")
    with fake_process_group(world_size=2):
        with torch_eplb.wrap(ToyModel()) as balancer, torch.no_grad():
            balancer(torch.rand(2, 16))
            peft.get_peft_model(
                balancer.module, peft.LoraConfig(r=2, target_parameters=["experts.down_proj"])
            )
            with pytest.raises(ValueError, match="ParamWrapper 'default' was added to the experts"):
                balancer(torch.rand(2, 16))
        with torch_eplb.wrap(ToyModel(num_layers=1)) as balancer, torch.no_grad():
            balancer.module.layers[0].experts.down = nn.Linear(4, 2)
            with pytest.raises(
                ValueError, match=r"the parameters down\.bias, down\.weight was added"
            ):
                balancer(torch.rand(2, 16))


def qwen() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=8,
            num_experts_per_tok=2,
            head_dim=16,
        )
    ).eval()


def save(rank: int, world_size: int, folder: str) -> None:
    from transformers import AutoModelForCausalLM

    model = qwen()
    ids = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(rank))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        balancer = torch_eplb.wrap(model, **QUICK)
        while balancer.stats().rebalances < 1:
            balancer(input_ids=ids)
        assert balancer.config is model.config
        with pytest.raises(torch_eplb.EPLBError, match=r"balancer\.save_pretrained\(folder\)"):
            balancer.module.save_pretrained(folder)
        balancer.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)
        # Rank 0 is told what is wrong, the others that it could not write.
        with pytest.raises(ValueError if rank == 0 else RuntimeError, match="Got 'nonsense'"):
            balancer.save_pretrained(folder, max_shard_size="nonsense")
        full = balancer.unwrap()
        dist.barrier()
        if rank == 0:
            full.save_pretrained(folder)
    balancer.close()


def test_save_pretrained_writes_the_whole_model_or_is_refused(tmp_path: Path) -> None:
    run_ranks(save, 2, str(tmp_path / "saved"))


class Thinker(nn.Module):
    """A model that is driven by a method which never calls its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.thinker = ToyModel()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def generate(self, x: torch.Tensor) -> torch.Tensor:
        return self.thinker(x)


def drive_a_part(rank: int, world_size: int) -> None:
    model = Thinker()
    reference = copy.deepcopy(model)
    with torch_eplb.wrap(model, **QUICK) as balancer, torch.no_grad():
        step = 0
        while balancer.stats().rebalances < 2:
            x = skewed_batch(12, 16, 100 * step + rank)
            actual = balancer.module.generate(x)
            torch.testing.assert_close(actual, reference.generate(x), atol=1e-5, rtol=1e-4)
            step += 1
        assert balancer.stats().step == step


def test_a_model_whose_generation_calls_only_a_part_of_it_makes_steps() -> None:
    run_ranks(drive_a_part, 2)


def uneven_work(rank: int, world_size: int, dispatch: Any) -> int:
    """A serving loop: ranks have different numbers of requests; those without join the others."""
    model = ToyModel()
    reference = copy.deepcopy(model)
    balancer = torch_eplb.wrap(model, **QUICK, dispatch=dispatch)
    generator = torch.Generator().manual_seed(0)  # the same on all ranks: they know who has work
    served = 0
    with torch.no_grad():
        with pytest.raises(torch_eplb.EPLBError, match="has not been called on this rank yet"):
            balancer.idle_step()
        balancer(skewed_batch(4, 16, rank))  # a warm-up
        for step in range(400):
            work = torch.rand(world_size, generator=generator) < 0.4
            if work[rank]:
                x = skewed_batch(1 + step % 7, 16, 100 * step + rank)
                torch.testing.assert_close(balancer(x), reference(x), atol=1e-5, rtol=1e-4)
                served += len(x)
            elif work.any():
                balancer.idle_step()
            if balancer.stats().rebalances >= 3:
                break
    assert balancer.stats().rebalances >= 3
    total = torch.tensor(served + 4)
    if dispatch == "all_gather":  # every rank counts what it sees
        torch.distributed.all_reduce(total)
    by_expert, _ = balancer.load()
    assert (by_expert.sum(axis=1) == int(total) * 2).all()
    balancer.close()
    return balancer.stats().step


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
def test_ranks_without_work_join_the_others_with_idle_steps(dispatch: str) -> None:
    steps = run_ranks(uneven_work, 3, dispatch)
    assert len(set(steps)) == 1


def no_idle_steps(rank: int, world_size: int) -> None:
    for dispatch, says in (
        ("all_reduce", "the same batch"),
        ("external", "dispatch by themselves"),
    ):
        options: Any = {"dispatch": dispatch, "timeout": 30}
        with torch_eplb.wrap(ToyModel(), **options) as balancer:
            with pytest.raises(ValueError, match=says):
                balancer.idle_step()


def test_idle_steps_are_refused_where_they_mean_nothing() -> None:
    run_ranks(no_idle_steps, 2)
