"""A model that is wrapped without memory, and loaded with this rank's share of a checkpoint."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from support.models import SMALL, ToyModel, skewed_batch
from support.moving import CLOSE, Ordinary, assert_every_slot, in_flight, serve_until, wrap
from support.ranks import preload, run_ranks
from support.versions import ALONE, needs_grouped
from torch import nn

import torch_eplb
from torch_eplb.state.materialize import materialize
from torch_eplb.state.pretrained import load_pretrained
from torch_eplb.testing import fake_process_group

preload("transformers.models.qwen3_moe.modeling_qwen3_moe")

# ---- transformers' models -----------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    # Every expert by itself, under the module's own path; tied embeddings.
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16, "tie_word_embeddings": True},
    # Under another path and other names.
    "mixtral": {"num_local_experts": 8, "intermediate_size": 24},
    # Fused, transposed, with biases.
    "gpt_oss": {"num_local_experts": 8, "intermediate_size": 16, "head_dim": 8},
}


def on_meta(name: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **{**SMALL, **MODELS[name]})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def generate(rank: int, world_size: int, folder: str) -> None:
    from transformers import AutoModelForCausalLM

    for name in MODELS:
        reference = AutoModelForCausalLM.from_pretrained(
            f"{folder}/{name}", attn_implementation="eager"
        ).eval()
        balancer = wrap(on_meta(name), num_redundant_experts=2)
        load_pretrained(balancer, f"{folder}/{name}")
        for (key, ours), theirs in zip(
            balancer.state_dict().items(), reference.state_dict().values(), strict=True
        ):
            assert torch.equal(ours, theirs), (name, key)
        for (key, ours), theirs in zip(
            balancer.module.named_buffers(), dict(reference.named_buffers()).values(), strict=True
        ):
            assert torch.equal(ours, theirs), (name, key)
        tied = balancer.module.lm_head.weight is balancer.module.model.embed_tokens.weight
        assert tied == (name == "qwen3_moe")
        torch.manual_seed(100 + rank)
        for _ in range(400):
            prompt = torch.randint(0, 96, (2, 6))
            options = {"max_new_tokens": 8, "do_sample": False}
            ours = balancer.module.generate(prompt, **options)
            assert torch.equal(ours, reference.generate(prompt, **options)), name
            if balancer.stats().rebalances >= 1:
                break
        assert balancer.stats().rebalances >= 1
        balancer.close()


@needs_grouped  # transformers' own forward
def test_greedy_tokens_equal_those_of_the_model_loaded_the_ordinary_way(tmp_path: Path) -> None:
    for name in MODELS:
        model = on_meta(name)
        torch.manual_seed(0)
        materialize(model, torch.device("cpu"))
        for parameter in model.parameters():
            # Wide weights make the router choose clearly.
            parameter.data.normal_(std=0.5)
        model.save_pretrained(tmp_path / name, max_shard_size="40KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 3
    run_ranks(generate, 2, str(tmp_path))


# ---- memory -------------------------------------------------------------------------------------

LARGE: dict[str, Any] = {"num_layers": 2, "num_experts": 16, "hidden": 256, "width": 1024}
MiB = 2**20


def high_water() -> int:
    """The most resident memory of this process since the last reset, in bytes."""
    status = Path("/proc/self/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match is not None
    return 1024 * int(match[1])


def measured(rank: int, world_size: int, folder: str) -> tuple[int, int]:
    with torch.device("meta"):
        small, model = ToyModel(), ToyModel(**LARGE)
    # A small model first: imports, threads and connections are not what is measured.
    with torch_eplb.wrap(small, timeout=30) as balancer:
        load_pretrained(balancer, f"{folder}/small")
    Path("/proc/self/clear_refs").write_text("5")  # forget the high water mark so far
    before = high_water()
    balancer = torch_eplb.wrap(model, num_redundant_experts=0, timeout=30)
    load_pretrained(balancer, folder)
    peak = high_water() - before
    share = sum(t.nbytes for t in model.state_dict().values())
    staging = balancer.stats().staging_bytes
    with torch.no_grad():
        balancer(torch.ones(2, 256))
    balancer.close()
    return peak, share + staging


@pytest.mark.parametrize("files", ["one", "several"])
def test_no_rank_ever_holds_more_than_its_share(files: str, tmp_path: Path) -> None:
    state = ToyModel(**LARGE).state_dict()
    full = sum(tensor.nbytes for tensor in state.values())
    if files == "one":
        save_file(state, tmp_path / "model.safetensors")
    else:
        write_shards(tmp_path, state, 4)
    del state
    (tmp_path / "small").mkdir()
    save_file(ToyModel().state_dict(), tmp_path / "small" / "model.safetensors")
    assert full > 95 * MiB
    for peak, share in run_ranks(measured, 4, str(tmp_path)):
        assert share < full / 3
        print(f"peak {peak / MiB:.1f} MiB, share {share / MiB:.1f} MiB")
        # What was read last is still mapped, up to 16 MiB; the rest is threads' and such.
        limit = share + 28 * MiB
        assert 0.9 * share < peak < limit < 0.6 * full, (peak / MiB, share / MiB)


def write_shards(folder: Path, state: dict[str, torch.Tensor], count: int) -> None:
    names: dict[str, str] = {}
    keys = sorted(state)
    for shard in range(count):
        file = f"model-{shard}.safetensors"
        part = {key: state[key].contiguous() for key in keys[shard::count]}
        save_file(part, folder / file)
        names.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


# ---- other models -------------------------------------------------------------------------------


class Masked(Ordinary):
    """With a buffer that is not saved and is computed by ``reset_parameters``."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.register_buffer("mask", torch.arange(4.0), persistent=False)

    def reset_parameters(self) -> None:
        self.mask.copy_(torch.arange(4.0))
        self.scratch = torch.zeros(3)


def renamed(key: str, expert: int | None) -> list[str] | None:
    """``head.weight`` is called otherwise; ``gate_up_proj`` is kept in three parts per expert."""
    if key == "head.weight":
        return ["output"]
    if key.endswith("gate_up_proj"):
        return [f"{key}/{expert}/{part}" for part in range(3)]
    return None


def into_meta_and_over(rank: int, world_size: int, folder: str, path: str) -> None:
    with torch.device("meta"):
        model = Masked()
    balancer = wrap(model, num_redundant_experts=4)
    x = skewed_batch(8, 16, rank)
    with torch.no_grad():
        load_pretrained(balancer, folder, names=renamed)
        new = Masked(seed=5)
        assert torch.equal(model.mask, new.mask)
        assert torch.equal(model.scratch, new.scratch)
        assert model.tied.weight is model.head.weight
        assert_every_slot(balancer, new.inner, rank)
        torch.testing.assert_close(balancer(x), new(x), **CLOSE)
        # Over a model that has other weights and is moving them.
        balancer.load_state_dict(Masked(seed=6).state_dict())
        serve_until(lambda: in_flight(balancer), balancer, rank)
        live = balancer.engine.layers[0].tensors()[0]
        load_pretrained(balancer, folder, names=renamed)
        assert balancer.engine.layers[0].tensors()[0] is live
        assert_every_slot(balancer, new.inner, rank)
        torch.testing.assert_close(balancer(x), new(x), **CLOSE)
        # One rank's trouble is every rank's error, before anything is written.
        where = folder if rank == 0 else folder + "-missing"
        with pytest.raises((RuntimeError, FileNotFoundError), match="missing: is not a folder"):
            load_pretrained(balancer, where, names=renamed)
    balancer.close()
    # A checkpoint of DCP, into memory that was just made.
    with torch.device("meta"):
        model = Masked()
    balancer = wrap(model, num_redundant_experts=1)
    state = {"model": torch_eplb.ShardedState(balancer)}
    with pytest.raises(RuntimeError, match=r"materialize\.materialize"):
        state["model"].state_dict()
    materialize(model, torch.device("cpu"))
    dcp.load(state, checkpoint_id=path)
    with torch.no_grad():
        torch.testing.assert_close(balancer(x), new(x), **CLOSE)
    balancer.close()


def test_checkpoints_of_other_names_fill_models_with_and_without_weights(tmp_path: Path) -> None:
    model = Masked(seed=5)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    dcp.save({"model": state}, checkpoint_id=tmp_path / "dcp", **ALONE)
    state["output"] = state.pop("head.weight")
    del state["tied.weight"]
    for key in [key for key in state if key.endswith("gate_up_proj")]:
        for expert, rows in enumerate(state.pop(key)):
            for part, piece in enumerate(rows.split([4, 8, 4])):
                state[f"{key}/{expert}/{part}"] = piece.contiguous()
    folder = tmp_path / "safetensors"
    folder.mkdir()
    write_shards(folder, state, 3)
    run_ranks(into_meta_and_over, 3, str(folder), str(tmp_path / "dcp"))


# ---- what is refused ----------------------------------------------------------------------------


def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    reference = ToyModel(seed=1)
    good = {key: value.clone() for key, value in reference.state_dict().items()}
    down, scale = "layers.0.experts.down_proj", "layers.1.experts.scale"
    split = {key: value for key, value in good.items() if key != down} | {
        f"layers.0.experts.{i}.down_proj.weight": good[down][i].clone() for i in range(7)
    }
    cases: list[tuple[dict[str, torch.Tensor], tuple[str, ...]]] = [
        ({**good, "more": torch.ones(1)}, ("unknown: more",)),
        (split, (f"missing: {down}, expert 7", "layers.0.experts.7.down_proj.weight")),
        ({**good, down: good[down][:, :8].clone()}, (f"shape: {down}", "(8, 8, 8)", "(8, 16, 8)")),
        ({**good, scale: torch.ones(8, dtype=torch.uint8)}, (f"dtype: {scale} has U8", "F32")),
    ]
    model = ToyModel()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with fake_process_group(1), torch_eplb.wrap(model) as balancer:
        for number, (state, says) in enumerate(cases):
            folder = tmp_path / str(number)
            folder.mkdir()
            save_file(state, folder / "model.safetensors")
            with pytest.raises(RuntimeError, match="nothing was loaded") as caught:
                load_pretrained(balancer, folder)
            for text in says:
                assert text in str(caught.value)
            for key, value in model.state_dict().items():
                assert torch.equal(value, before[key])
        # Unknown tensors can be ignored; floats are converted.
        load_pretrained(balancer, tmp_path / "0", strict=False)
        save_file(
            {key: value.double() for key, value in good.items()}, folder / "model.safetensors"
        )
        load_pretrained(balancer, folder)
        for key, value in model.state_dict().items():
            assert torch.equal(value, good[key]), key


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    state = {key: value.clone() for key, value in ToyModel().state_dict().items()}
    with fake_process_group(1), torch_eplb.wrap(ToyModel()) as balancer:

        def fails(kind: type[Exception], says: str) -> None:
            with pytest.raises(kind, match=says):
                load_pretrained(balancer, tmp_path)

        fails(ValueError, r"neither model\.safetensors\.index\.json nor model\.safetensors")
        (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
        fails(ValueError, r"model\.safetensors: is no whole safetensors file")
        for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../b"}}'):
            index.write_text(text)
            fails(ValueError, r"is no index of a checkpoint|'\.\./b', which is not in its folder")
        index.write_text(json.dumps({"weight_map": dict.fromkeys(state, "absent.safetensors")}))
        fails(FileNotFoundError, r"absent\.safetensors: is missing")
        save_file({"other": torch.ones(1)}, tmp_path / "model.safetensors")
        index.write_text(json.dumps({"weight_map": dict.fromkeys(state, "model.safetensors")}))
        fails(ValueError, "has no tensor .*incomplete or mixed up")
        index.unlink()
        os.mkfifo(index)
        fails(ValueError, "is not a regular file")


def test_a_buffer_that_nothing_can_compute_is_named_with_the_remedy(tmp_path: Path) -> None:
    reference = Ordinary(seed=1)
    state = {k: v.clone() for k, v in reference.state_dict().items() if k != "tied.weight"}
    save_file(state, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Ordinary()
    with fake_process_group(1), torch_eplb.wrap(model) as balancer:
        with pytest.raises(RuntimeError, match=r"scratch is not part .* set it before loading"):
            load_pretrained(balancer, tmp_path)
        assert model.head.weight.is_meta
        model.scratch = torch.zeros(3)
        load_pretrained(balancer, tmp_path)
        for key, value in load_file(tmp_path / "model.safetensors").items():
            assert torch.equal(model.state_dict()[key], value)
        # One tensor in the model is one in the checkpoint.
        save_file(state | {"tied.weight": torch.ones(16, 16)}, tmp_path / "model.safetensors")
        with pytest.raises(RuntimeError, match=r"head\.weight and tied\.weight are one tensor"):
            load_pretrained(balancer, tmp_path)


def test_without_safetensors_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with fake_process_group(1), torch_eplb.wrap(ToyModel()) as balancer:
        with pytest.raises(ImportError, match=r"torch-eplb\[pretrained\]"):
            torch_eplb.load_pretrained(balancer, tmp_path)
