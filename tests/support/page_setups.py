"""What blocks of the documentation find when they run, and what must hold after they have run.

A setup is a context manager that gives the block's names and looks at them afterwards:

    with SETUPS["moved"](rank, world_size) as names:
        exec(code, names)

It runs in a rank's own process, in a folder that the ranks share and nobody else uses.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from support.models import QUICK, MoELayer, ToyModel, TwoTowers, skewed_batch
from support.moving import CLOSE, assert_same
from support.programs import ROOT
from torch import nn

import torch_eplb
from torch_eplb import Placement
from torch_eplb.files.expert_map import read_expert_map, write_expert_map

Names = dict[str, Any]
Setup = Callable[[int, int], contextlib.AbstractContextManager[Names]]

PRELUDES = {"hccl": "from support import hccl\n\nhccl.install()\n"}
"""What programs begin with, where a device's libraries are not there."""


def run_blocks(
    rank: int,
    world_size: int,
    blocks: list[tuple[str, str, int]],
    setup: str,
    folder: str,
    environment: dict[str, str] | None = None,
) -> None:
    """Run blocks (code, page, line) one after the other, as one rank, in one setup.

    Tracebacks name the page and its lines. With an ``environment``, which names the port of a
    store, they run as programs that a launcher has started.
    """
    os.chdir(folder)
    if environment is not None:
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
        os.environ.update({name: str(number) for name, number in launched.items()} | environment)
    with SETUPS[setup](rank, world_size) as names:
        for code, page, line in blocks:
            padded = "\n" * (line - 1) + code
            exec(compile(padded, str(ROOT / page), "exec", dont_inherit=True), names)
            if "after_each" in names:
                names["after_each"]()


def serve(balancer: nn.Module, reference: nn.Module, rank: int, rebalances: int) -> None:
    """Forwards until so many rebalances are over; every output is the unwrapped model's."""
    step = 0
    with torch.no_grad():
        while balancer.stats().rebalances < rebalances:
            step += 1
            x = skewed_batch(12, 16, 100 * step + rank)
            torch.testing.assert_close(balancer(x), reference(x), **CLOSE)


@contextlib.contextmanager
def nothing(rank: int, world_size: int) -> Iterator[Names]:
    """A block that brings all that it needs."""
    yield {}


@contextlib.contextmanager
def moved(rank: int, world_size: int) -> Iterator[Names]:
    """A wrapped model whose experts have moved; after the block it has the weights it had."""
    model = ToyModel()
    reference = copy.deepcopy(model)
    balancer = torch_eplb.wrap(model, **QUICK)
    serve(balancer, reference, rank, 2)
    assert balancer.stats().experts_moved > 0
    expected = reference.state_dict()
    folder = "checkpoint"
    names: Names = {
        "balancer": balancer,
        "folder": folder,
        "torch": torch,
        "dist": dist,
        "torch_eplb": torch_eplb,
    }
    yield names
    placement = balancer.placement
    assert_same(balancer.state_dict(), expected)
    serve(balancer, reference, rank, 3)
    balancer.close()
    dist.barrier()
    if os.path.exists(folder):
        plain = {"model": ToyModel(seed=1).state_dict()}
        dcp.load(plain, checkpoint_id=folder)
        assert_same(plain["model"], expected)
    if os.path.exists("map.json"):
        model_shape = {"num_layers": 2, "num_experts": 8, "num_ranks": world_size}
        written = read_expert_map("map.json", **model_shape)
        assert (written.experts == placement.experts).all()
    if os.path.exists("model.pt"):
        assert_same(torch.load("model.pt"), expected)


@contextlib.contextmanager
def restart(rank: int, world_size: int) -> Iterator[Names]:
    """A model, and the map of a placement that is not the one of experts in order."""
    model = ToyModel()
    reference = copy.deepcopy(model)
    experts = np.roll(Placement.initial(2, 8, world_size, 6).experts, 1, axis=1)
    if rank == 0:
        write_expert_map("map.json", Placement(experts, 8))
    dist.barrier()
    names: Names = {"model": model, "torch_eplb": torch_eplb}
    yield names
    balancer = names["balancer"]
    assert (balancer.placement.experts == experts).all()
    with torch.no_grad():
        x = skewed_batch(12, 16, rank)
        torch.testing.assert_close(balancer(x), reference(x), **CLOSE)
    balancer.close()


@contextlib.contextmanager
def meta_dcp(rank: int, world_size: int) -> Iterator[Names]:
    """A checkpoint of an unwrapped model, and the model on the meta device, wrapped."""
    saved = ToyModel(seed=3)
    dcp.save({"model": saved.state_dict()}, checkpoint_id="checkpoint")
    with torch.device("meta"):
        model = ToyModel()
    balancer = torch_eplb.wrap(model, **QUICK)
    yield {
        "balancer": balancer,
        "device": torch.device("cpu"),
        "folder": "checkpoint",
        "torch_eplb": torch_eplb,
    }
    assert_same(balancer.state_dict(), saved.state_dict())
    serve(balancer, saved, rank, 1)
    balancer.close()


def small_qwen(folder: str) -> Any:
    """A small transformers model, saved in ``folder`` by rank 0; the model, on every rank."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(7)
    config = Qwen3MoeConfig(
        vocab_size=96,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=32,
        num_experts_per_tok=4,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    return model


def some_tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 96, shape, generator=torch.Generator().manual_seed(seed))


def greedy(model: Any, prompts: torch.Tensor, new_tokens: int) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(prompts, max_new_tokens=new_tokens, do_sample=False)


@contextlib.contextmanager
def pretrained(rank: int, world_size: int) -> Iterator[Names]:
    """A folder as transformers saves a model; after the block the model gives its outputs."""
    reference = small_qwen("saved")
    names: Names = {"folder": "saved", "torch": torch, "torch_eplb": torch_eplb}
    yield names
    balancer = names["model"].eval()
    tokens = some_tokens(rank, 2, 10)
    with torch.no_grad():
        ours, theirs = balancer(input_ids=tokens), reference(input_ids=tokens)
    torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
    balancer.close()


@contextlib.contextmanager
def serving(rank: int, world_size: int) -> Iterator[Names]:
    """The same, and prompts; ranks generate different numbers of tokens."""
    reference = small_qwen("saved")
    prompts, new_tokens = some_tokens(rank, 2, 6 + rank), 30 + 10 * rank
    names: Names = {"folder": "saved", "prompts": prompts, "max_new_tokens": new_tokens}
    yield names
    balancer = names["balancer"]
    assert torch.equal(names["tokens"], greedy(reference, prompts, new_tokens))
    while balancer.stats().rebalances < 1:  # the planner may have been slower than the block
        assert torch.equal(greedy(balancer.module, prompts, 4), greedy(reference, prompts, 4))
    balancer.close()


@contextlib.contextmanager
def loop(rank: int, world_size: int) -> Iterator[Names]:
    """A wrapped model, and more requests on rank 0 than on the others."""
    reference = small_qwen("saved")
    requests = [some_tokens(10 * rank + n, 1, 3 + n) for n in range(4 if rank == 0 else 1)]
    balancer = torch_eplb.wrap(copy.deepcopy(reference), **QUICK)
    with torch.no_grad():
        while balancer.stats().rebalances < 1:
            balancer(input_ids=some_tokens(rank, 1, 8))
    names: Names = {"balancer": balancer, "requests": requests, "max_length": 12}
    names["host_group"] = dist.new_group(backend="gloo")
    yield names
    for request, answer in zip(requests, names["answers"], strict=True):
        assert torch.equal(answer, greedy(reference, request, 12 - request.shape[1]))
    assert balancer.stats().experts_moved > 0
    balancer.close()


class RoutedModel(nn.Module):
    """A router and whatever experts it is given, with the same weights on every rank."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.router = nn.Linear(16, 8, bias=False)
        self.experts = experts
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.25)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        return self.experts(x, ids, weights)


@contextlib.contextmanager
def external(rank: int, world_size: int) -> Iterator[Names]:
    """The blocks define ``EngineExperts`` that dispatch by themselves, and wrap a model of them."""
    options = {name: value for name, value in QUICK.items() if name != "num_redundant_experts"}
    names: Names = {"MyModel": RoutedModel, "options": options}
    yield names
    reference = RoutedModel(names["EngineExperts"](8, 16))
    serve(names["balancer"], reference, rank, 2)
    assert names["balancer"].stats().experts_moved > 0
    names["balancer"].close()


@contextlib.contextmanager
def new_weights(rank: int, world_size: int) -> Iterator[Names]:
    """A model whose experts move, and two others: a state, and a folder. The first block loads the
    one, the second the other, and the third halves all that the experts of layer 0 have."""
    from safetensors.torch import save_file

    model, second, third = (ToyModel(seed=seed) for seed in (0, 1, 2))
    balancer = torch_eplb.wrap(model, **QUICK)
    if rank == 0:
        os.mkdir("saved")
        save_file(third.state_dict(), "saved/model.safetensors")
    dist.barrier()
    serve(balancer, ToyModel(seed=0), rank, 1)
    halved = {
        name: tensor / 2 if name.startswith("layers.0.experts.") else tensor
        for name, tensor in third.state_dict().items()
    }
    expected = [second.state_dict(), third.state_dict(), halved]
    yield {
        "balancer": balancer,
        "new_state": second.state_dict(),
        "folder": "saved",
        "torch": torch,
        "torch_eplb": torch_eplb,
        "after_each": lambda: assert_same(balancer.state_dict(), expected.pop(0)),
    }
    assert not expected
    third.load_state_dict(halved)
    serve(balancer, third, rank, 2)
    balancer.close()


@contextlib.contextmanager
def own_layer(rank: int, world_size: int) -> Iterator[Names]:
    """The block defines ``MyExperts``, with which a model is balanced after it."""
    names: Names = {}
    yield names
    torch.manual_seed(0)
    model = ToyModel()
    for layer in model.layers:
        layer.experts = names["MyExperts"](8, 16)
    reference = copy.deepcopy(model)
    with torch_eplb.wrap(model, **QUICK) as balancer:
        serve(balancer, reference, rank, 2)
        assert balancer.stats().experts_moved > 0


@contextlib.contextmanager
def two_towers(rank: int, world_size: int) -> Iterator[Names]:
    """The blocks wrap ``model`` twice, and gather its ``state``."""
    model = TwoTowers()
    reference = copy.deepcopy(model).state_dict()
    names: Names = {"model": model, "torch_eplb": torch_eplb}
    yield names
    for key, value in reference.items():
        assert torch.equal(names["state"][key], value), key
    names["text"].close()
    names["vision"].close()


@contextlib.contextmanager
def own_policy(rank: int, world_size: int) -> Iterator[Names]:
    """The block wraps ``model`` with a policy of its own."""
    names: Names = {"model": ToyModel(), "torch_eplb": torch_eplb}
    reference = copy.deepcopy(names["model"])
    yield names
    balancer = names["model"]
    serve(balancer, reference, rank, 2)
    assert balancer.stats().experts_moved > 0
    assert balancer.stats().plans_failed == 0
    balancer.close()


@contextlib.contextmanager
def transport(rank: int, world_size: int) -> Iterator[Names]:
    """A wrapped model, and a function that serves until its experts have moved."""
    balancer = torch_eplb.wrap(ToyModel(), **QUICK)
    yield {
        "balancer": balancer,
        "serve_until_experts_have_moved": lambda wrapped: serve(wrapped, ToyModel(), rank, 2),
    }
    assert balancer.stats().experts_moved > 0
    balancer.close()


class OneTensor(nn.Module):
    """Experts with one tensor each, which are therefore one message each."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 8
        self.up = nn.Parameter(torch.randn(8, 16, 16) / 4)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, choice = torch.where(top_k_index == expert)
            part = hidden_states[token] @ self.up[expert] * top_k_weights[token, choice, None]
            out = out.index_add(0, token, part)
        return out


class MyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = MoELayer(num_experts=8, hidden=16, width=8, top_k=2)
        self.layer.experts = OneTensor()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@contextlib.contextmanager
def unit(rank: int, world_size: int) -> Iterator[Names]:
    """A user's model, a batch of it, and the bytes of an expert."""
    names: Names = {
        "MyModel": MyModel,
        "batch": skewed_batch(12, 16, 0),
        "EXPERT_BYTES": 16 * 16 * 4,
        "torch_eplb": torch_eplb,
    }
    with torch.no_grad():
        yield names
    assert names["posted"]
    assert names["model"].stats().rebalances >= 1


@contextlib.contextmanager
def files(rank: int, world_size: int) -> Iterator[Names]:
    """The shipped trace."""
    shutil.copy(ROOT / "examples" / "data" / "trace.npz", "trace.npz")
    names: Names = {}
    yield names
    assert names["trace"].counts.shape == (800, 4, 8, 64)
    assert names["load"].shape == (800, 8, 64)


SETUPS: dict[str, Setup] = {
    setup.__name__: setup
    for setup in (
        *(nothing, moved, restart, meta_dcp, pretrained, serving, loop, external, new_weights),
        *(own_layer, two_towers, own_policy, transport, unit, files),
    )
}
