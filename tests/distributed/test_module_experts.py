"""Models whose experts are modules of their own: Switch Transformers, and NLLB-MoE."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from support.few_kernels import EXPERTS, HIDDEN, FewKernelModel
from support.models import QUICK, skewed_batch
from support.moving import assert_same, compare_logits
from support.ranks import preload, run_ranks
from torch import nn

import torch_eplb
from torch_eplb.layers import known
from torch_eplb.layers.experts import ExpertLayer
from torch_eplb.layers.finding import find_layers
from torch_eplb.testing import fake_process_group

COMMON = {"vocab_size": 96, "d_model": 16, "num_experts": EXPERTS, "pad_token_id": 0}
MODELS: dict[str, dict[str, Any]] = {
    "switch_transformers": {
        "d_kv": 4,
        "d_ff": 8,
        "num_heads": 2,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 2,
        # Of five tokens in a row, some find no room.
        "expert_capacity": 1,
        "decoder_start_token_id": 0,
        "eos_token_id": 95,
    },
    "nllb-moe": {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
        "max_position_embeddings": 64,
        "moe_eval_capacity_token_fraction": 0.25,
        "eos_token_id": 95,
    },
}
TENSORS = {
    "switch_transformers": ("expert_{}.wi.weight", "expert_{}.wo.weight"),
    "nllb-moe": (
        "expert_{}.fc1.weight",
        "expert_{}.fc1.bias",
        "expert_{}.fc2.weight",
        "expert_{}.fc2.bias",
    ),
}
preload(
    "transformers.models.switch_transformers.modeling_switch_transformers",
    "transformers.models.nllb_moe.modeling_nllb_moe",
)


def make_model(name: str, seed: int = 0) -> Any:
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(name, **COMMON, **MODELS[name])
    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def draw() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids, target = torch.randint(1, 95, (2, 5)), torch.randint(1, 95, (2, 4))
    return ids, {"decoder_input_ids": target}


def assert_slots(balancer: Any, reference: Any) -> None:
    """Every slot holds its expert, in a module of its own."""
    rank = balancer.engine.comm.rank
    for index, layer in enumerate(balancer.engine.layers):
        experts = reference.get_submodule(layer.name)
        held = balancer.placement.experts[index, rank].tolist()
        assert [n for n in layer.module._modules if "expert_" in n] == [
            f"expert_{slot}" for slot in range(len(held))
        ]
        for slot, expert in enumerate(held):
            assert_same(
                layer.module[f"expert_{slot}"].state_dict(),
                experts[f"expert_{expert}"].state_dict(),
            )


def serve(rank: int, world_size: int, name: str, folder: str) -> None:
    for dispatch in ("all_to_all", "all_gather", "all_reduce"):
        model, reference = make_model(name), make_model(name)
        names = [key for key, _ in model.named_modules()]
        options: Any = {**QUICK, "dispatch": dispatch, "allow_training_with_moves": True}
        options |= {"layers_per_step": 8, "staging_bytes": "1MiB"}
        balancer = torch_eplb.wrap(model, **options)
        assert balancer.placement.num_layers == 4  # two of the encoder, two of the decoder
        compare_logits(balancer, reference, rank, dispatch, 2, draw)
        assert_same(balancer.state_dict(), reference.state_dict())
        hits, sent = (counts.sum(axis=1) for counts in balancer.load())
        assert (hits == sent).all()
        # What the routers have dropped is not counted: two rows, of five tokens and of four.
        batches = balancer.stats().step * (world_size if dispatch == "all_gather" else 1)
        assert (hits < batches * 2 * 5 * (2 if name == "nllb-moe" else 1)).all()
        assert (hits > 0).all()
        other = make_model(name, seed=1)
        balancer.load_state_dict(other.state_dict())
        compare_logits(balancer, other, rank, dispatch, 3, draw)
        balancer.engine.settle()
        assert_slots(balancer, other)
        found = balancer.expert(0, int(balancer.placement.experts[0, rank, 0]))
        assert tuple(found) == TENSORS[name]
        if dispatch == "all_to_all":
            generate(balancer, other, rank)
            save_and_load(balancer, other, rank, options, folder)
        full = balancer.unwrap()
        assert [key for key, _ in full.named_modules()] == names
        assert list(full.state_dict()) == list(other.state_dict())
        assert_same(full.state_dict(), other.state_dict())
        assert not any("forward" in vars(module) for module in full.modules())
        inputs = {"input_ids": torch.arange(1, 5)[None], "decoder_input_ids": torch.tensor([[0]])}
        assert torch.equal(full(**inputs).logits, other(**inputs).logits)


def generate(balancer: Any, reference: Any, rank: int) -> None:
    prompt = torch.arange(1, 7)[None] + rank
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options |= {"decoder_start_token_id": 0}
    theirs = reference.generate(prompt, **options)
    assert torch.equal(balancer.module.generate(prompt, **options), theirs)
    balancer.idle_step()


def save_and_load(balancer: Any, reference: Any, rank: int, options: Any, folder: str) -> None:
    balancer.save_pretrained(folder)
    dist.barrier()
    loaded = type(reference).from_pretrained(folder)
    assert_same(loaded.state_dict(), reference.state_dict())
    with torch.device("meta"):
        empty = type(reference)(reference.config)
    with torch_eplb.wrap(empty.eval(), **options) as again:
        torch_eplb.load_pretrained(again, folder)
        assert_slots(again, reference)
        assert_same(again.state_dict(), reference.state_dict())
        compare_logits(again, reference, rank, "all_to_all", 1, draw, grad=False)
        # Into a model that has weights, every replica is written where it is by now.
        with torch.no_grad():
            for layer in again.engine.layers:
                for tensor in layer.tensors():
                    tensor.zero_()
        torch_eplb.load_pretrained(again, folder)
        assert_slots(again, reference)
        with pytest.raises(RuntimeError, match=r"expert_0\.\w+\.weight is one slot's, of experts"):
            torch_eplb.ShardedState(again).state_dict()


@pytest.mark.parametrize("name", MODELS)
def test_experts_in_modules_are_served_saved_and_loaded_while_they_move(
    name: str, tmp_path: Path
) -> None:
    run_ranks(serve, 2, name, str(tmp_path), timeout=150)


class Mixed(nn.Module):
    """Experts in two ModuleLists, with a scale of each that is stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.inner = nn.ModuleDict({"up": nn.ModuleList(nn.Linear(16, 8) for _ in range(EXPERTS))})
        self.down = nn.ModuleList(nn.Linear(8, 16, bias=False) for _ in range(EXPERTS))
        self.scale = nn.Parameter(torch.rand(EXPERTS))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        up: Any = self.inner["up"]
        out = torch.zeros_like(hidden_states)
        for expert, (first, second) in enumerate(zip(up, self.down, strict=True)):
            row, column = torch.where(top_k_index == expert)
            result = second(first(hidden_states[row]).tanh()) * self.scale[expert]
            out.index_add_(0, row, result * top_k_weights[row, column, None])
        return out


MIXED = ["inner.up.{}.weight", "down.{}.weight", "scale", "inner.up.{}.bias"]


def mixed(rank: int, world_size: int, folder: str) -> None:
    torch_eplb.register_layer(Mixed, tensors=MIXED)
    model, reference = (FewKernelModel(Mixed, 2, 0) for _ in range(2))
    expected = reference.state_dict()
    for dispatch in ("all_to_all", "all_reduce"):
        with torch_eplb.wrap(model, **QUICK, dispatch=dispatch) as balancer, torch.no_grad():
            step = 0
            while balancer.stats().rebalances < 3:
                step += 1
                seed = step if dispatch == "all_reduce" else 10 * step + rank
                x = skewed_batch(8, HIDDEN, seed)
                torch.testing.assert_close(balancer(x), reference(x), atol=1e-4, rtol=1e-4)
            state = copy.deepcopy(balancer.state_dict())
            assert list(state) == list(expected)
            assert_same(state, expected)
            balancer.load_state_dict(FewKernelModel(Mixed, 2, 1).state_dict())
            balancer.load_state_dict(state)
            full = balancer.unwrap()
        assert list(full.state_dict()) == list(expected)
        assert_same(full.state_dict(), expected)
    if rank == 0:
        save_file(expected, f"{folder}/model.safetensors")
    dist.barrier()
    with torch_eplb.wrap(FewKernelModel(Mixed, 2, 1).to("meta"), **QUICK) as balancer:
        torch_eplb.load_pretrained(balancer, folder)
        assert_same(balancer.state_dict(), expected)


def test_modules_of_a_class_that_was_registered_move_beside_stacked_tensors(tmp_path: Path) -> None:
    run_ranks(mixed, 2, str(tmp_path))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (
            ["down.{}.weight", "inner.up.{}.weight"],
            r"inner\.up\.0 holds bias, weight, where weight ",
        ),
        (["down.{}.bias"], r"down\.0 holds weight, where bias were expected"),
        (["downs.{}.weight"], r"has no module downs\.0, which 'downs\.\{\}\.weight' means"),
        (["scale.{}"], r"has no module scale\.0, which "),
        (None, r"inner\.up is a ModuleList .*as in 'inner\.up\.\{\}\.weight' with \{\} for the"),
    ],
)
def test_names_of_modules_that_do_not_fit_are_refused(tensors: Any, says: str) -> None:
    torch_eplb.register_layer(Mixed, tensors=tensors)
    with pytest.raises(ValueError, match=says):
        find_layers(Mixed())


def train(rank: int, world_size: int, name: str) -> None:
    """Experts that stay, with an optimizer that was made before they were sharded."""
    model, reference = make_model(name), make_model(name)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, reference)]
    options = {"policy": "static", "dispatch": "all_reduce", "num_redundant_experts": 0}
    with torch_eplb.wrap(model, **options) as balancer:
        for step in range(3):
            torch.manual_seed(step)
            ids, target = torch.randint(1, 95, (2, 5)), torch.randint(1, 95, (2, 4))
            for each, optimizer in zip((balancer, reference), optimizers, strict=True):
                optimizer.zero_grad()
                loss = each(input_ids=ids, decoder_input_ids=target, use_cache=False).logits.sin()
                loss.mean().backward()
                optimizer.step()
        for key, value in balancer.state_dict().items():
            torch.testing.assert_close(value, reference.state_dict()[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_an_optimizer_of_the_unwrapped_model_trains_the_experts_of_this_rank(name: str) -> None:
    run_ranks(train, 2, name)


def shards(model: Any, placed: list[list[int]]) -> None:
    """Shard each layer's experts, and give them back: as many, fewer and more than there were."""
    for layer in find_layers(model):
        whole = {key: value.clone() for key, value in layer.module.state_dict().items()}
        modules = list(layer.module._modules)
        for held in placed:
            full = [part.select(range(EXPERTS)) for part in layer.parts()]
            layer.shard(held)
            own = layer.module.state_dict()
            for name in layer.tensor_names:
                for slot, expert in enumerate(held):
                    key, wanted = name.format(slot), name.format(expert)
                    assert torch.equal(own[key], whole[wanted])
            tensors = layer.tensors()
            assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
            assert all(isinstance(tensor, nn.Parameter) for tensor in tensors)
            layer.restore(full)
            assert_same(layer.module.state_dict(), whole)
            assert list(layer.module._modules) == modules


@pytest.mark.parametrize("name", MODELS)
def test_there_is_a_module_for_each_slot(name: str) -> None:
    shards(make_model(name), [[5, 2, 0], [7, 1, 1, 0, 3, 2, 4, 5, 6, 7], list(range(EXPERTS))])


def test_only_two_experts_of_nllb_compute_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_model("nllb-moe")
    with fake_process_group(world_size=1), caplog.at_level(logging.WARNING, "torch_eplb"):
        balancer = torch_eplb.wrap(model, policy="static")
        assert sum("experts 0 and 1 compute all" in text for text in caplog.messages) == 1
        with torch.no_grad():
            ids = torch.arange(1, 9)[None]
            balancer(input_ids=ids, decoder_input_ids=ids)
        load, _ = balancer.load()
        assert load[:, :2].sum() == load.sum() > 0
        balancer.close()


class NllbMoeExperts(nn.ModuleDict):
    """A version to come, of the same names, that reads the mask as a mask."""

    def __init__(self) -> None:
        super().__init__({f"expert_{e}": nn.Linear(2, 2) for e in range(4)})
        self.num_experts = 4
        self.moe_token_dropout = 0.0

    def forward(
        self, hidden_states: torch.Tensor, router_mask: torch.Tensor, router_probs: torch.Tensor
    ) -> torch.Tensor:
        result = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            rows = torch.where(router_probs[:, expert] > 0)[0]
            out = self[f"expert_{expert}"](hidden_states[rows])
            result.index_add_(0, rows, out * router_probs[rows, expert, None])
        return result


class SwitchTransformersExperts(nn.Module):
    num_experts = 4

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> None:
        """Of a version to come."""


@pytest.mark.parametrize("kind", [NllbMoeExperts, SwitchTransformersExperts])
def test_a_version_that_computes_otherwise_is_refused_with_the_reason(kind: Any) -> None:
    with pytest.raises(ValueError, match=f"is a {kind.__name__}: this version of it is called, or"):
        find_layers(nn.Sequential(kind()))


def test_switch_with_a_router_of_another_form_is_refused_at_the_call() -> None:
    model = make_model("switch_transformers")
    with fake_process_group(world_size=1), torch_eplb.wrap(model, policy="static") as balancer:
        experts = balancer.engine.layers[0].module
        with pytest.raises(ValueError, match=r"one-hot rows \[tokens, choices, 8\], got \(3, 1\)"):
            experts(torch.randn(3, 16), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))


def an_adapter(experts: Any) -> None:
    experts.expert_3.wi.lora_A = nn.Linear(16, 2)


def quantised(experts: Any) -> None:
    experts.expert_3.wi.weight = nn.Parameter(experts.expert_3.wi.weight.detach().half())


def another_dropout(experts: Any) -> None:
    experts.expert_3.dropout.p = 0.5


def a_hook(experts: Any) -> None:
    experts.expert_3.wi.register_forward_hook(lambda *_: None)


def a_forward(experts: Any) -> None:
    experts.expert_3.forward = lambda x: x


def one_twice(experts: Any) -> None:
    experts["expert_3"] = experts["expert_4"]


def shared(experts: Any) -> None:
    experts.expert_3.wi.weight = nn.Parameter(experts.expert_4.wi.weight.detach())


REFUSED = {
    an_adapter: r"mlp\.experts: expert_3 holds wi\.lora_A\.bias, .*would not move with it",
    quantised: r"mlp\.experts: expert_3\.wi\.weight is torch\.float16.* must be alike",
    another_dropout: r"expert_3 is .*p=0\.5.* must be alike but for their weights",
    a_hook: r"expert_3\.wi has hooks or a forward of its own",
    a_forward: r"expert_3 has hooks or a forward of its own",
    one_twice: r"experts\.expert_3\.w[io]\.weight and .*expert_4\.w[io]\.weight share memory",
    shared: r"expert_3\.wi\.weight and .*expert_4\.wi\.weight share memory",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_modules_that_cannot_take_each_others_place_are_refused(spoil: Any) -> None:
    model = make_model("switch_transformers")
    spoil(model.get_submodule("encoder.block.1.layer.1.mlp.experts"))
    with pytest.raises(ValueError, match=f"(?s){REFUSED[spoil]}"):
        find_layers(model)


def test_too_few_modules_are_refused() -> None:
    model = make_model("switch_transformers")
    del model.get_submodule("encoder.block.1.layer.1.mlp.experts")["expert_7"]
    with (
        fake_process_group(world_size=2),
        pytest.raises(ValueError, match=r"expert_\{\}\.wi\.weight has 7 entries; expected 8 \(all"),
    ):
        torch_eplb.wrap(model)


def test_modules_of_which_two_are_one_are_refused_on_the_meta_device_too() -> None:
    model = make_model("switch_transformers").to("meta")
    find_layers(model)
    one_twice(model.get_submodule("encoder.block.1.layer.1.mlp.experts"))
    with pytest.raises(ValueError, match=REFUSED[one_twice]):
        find_layers(model)


@pytest.mark.parametrize("name", MODELS)
def test_a_form_is_what_the_class_computes(name: str) -> None:
    """Without ranks: what is read of a call, and computed by slot, is what forward gives."""
    model = make_model(name)
    layer: ExpertLayer = find_layers(model)[0]
    plain = copy.deepcopy(layer.module)
    calls = []
    layer.module.register_forward_hook(lambda _, args, out: calls.append((args, out)))
    with torch.no_grad():
        ids = torch.randint(1, 95, (2, 7))
        model(input_ids=ids, decoder_input_ids=ids)
    (args, expected) = calls[0]
    form = known.form_of(plain)
    assert form is not None
    assert form.read is not None
    plain.full_experts = EXPERTS
    hidden, chosen, weights = form.read(plain, *args)
    result = torch.zeros_like(hidden)
    for expert in range(EXPERTS):
        row, column = torch.where(chosen == expert)
        out = form.compute(plain, hidden[row], torch.full((len(row),), expert))
        result.index_add_(0, row, out * weights[row, column, None])
    torch.testing.assert_close(result, expected)
