"""Under torch.compile outputs stay the plain model's, whatever the backend, and graphs are few.

Every backend with every dispatch and replica choice, with and without gradients:

    TORCH_EPLB_COMPILE_ALL=1 python -m pytest tests/test_compile.py
"""

from __future__ import annotations

import copy
import itertools
import os
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from support.models import skewed_batch
from support.ranks import run_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_eplb
from torch_eplb.testing import fake_process_group

EXPERTS, HIDDEN, LAYERS, TOKENS, TOP_K = 8, 16, 2, 24, 2


class BatchedExperts(nn.Module):
    """Experts without data-dependent shapes, so that the model itself is one graph."""

    def __init__(self, num_experts: int = EXPERTS) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.up = nn.Parameter(torch.randn(num_experts, HIDDEN, HIDDEN) / 4)

    def weights(self) -> torch.Tensor:
        return self.up

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        up = self.weights()
        ids = top_k_index.clamp(max=len(up) - 1)  # a sentinel has weight 0
        out = torch.einsum("th,tkhg->tkg", hidden_states, up[ids])
        return (out * top_k_weights.unsqueeze(-1)).sum(1)


class CompactExperts(BatchedExperts):
    """Not known to skip the sentinel: under all_reduce its graphs break."""


class PhysicalExperts(BatchedExperts):
    """Dispatches by itself: fetches the slots of all ranks, and computes by physical id."""

    def weights(self) -> torch.Tensor:
        if len(self.up) == EXPERTS:
            return self.up
        return functional.all_gather_tensor(self.up.detach(), 0, dist.group.WORLD)


class IdleExperts(BatchedExperts):
    """This rank's slots only, and nothing depends on what they hold: gives back the ids."""

    def __init__(self) -> None:
        super().__init__(3)
        self.num_experts = EXPERTS

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return hidden_states * 0 + top_k_index[:, :1]


class Block(nn.Module):
    def __init__(self, experts: type[BatchedExperts]) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K, dim=-1)
        return x + self.experts(x, ids, weights)


class Model(nn.Module):
    def __init__(self, experts: type[BatchedExperts]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(experts) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


torch_eplb.register_layer(BatchedExperts, skips_sentinel=True)
torch_eplb.register_layer(CompactExperts)
torch_eplb.register_layer(PhysicalExperts, tensors=["up"])
torch_eplb.register_layer(IdleExperts, tensors=["up"])


# ---- outputs and graphs -------------------------------------------------------------------------

CHOICES = {
    "all_to_all": ("batch", "local", "table", "even"),
    "all_reduce": ("batch", "table", "even"),
    "all_gather": ("batch", "table", "even"),
    "asking": ("batch", "table", "even"),  # all_gather that agrees on sizes: graphs break
    "compact": ("batch", "table", "even"),  # all_reduce, for experts that know no sentinel
    "external": ("local", "table", "even"),
}
KINDS = {
    "all_to_all": BatchedExperts,
    "all_reduce": BatchedExperts,
    "all_gather": BatchedExperts,
    "asking": BatchedExperts,
    "compact": CompactExperts,
    "external": PhysicalExperts,
}
Way = tuple[str, str, str, bool]  # backend, dispatch, replica choice, with gradients


EVERYTHING = bool(os.environ.get("TORCH_EPLB_COMPILE_ALL"))


def ways(backend: str, pairs: list[tuple[str, str]]) -> list[Way]:
    """With gradients and without in turn."""
    if EVERYTHING:
        every = [(kind, choice) for kind, choices in CHOICES.items() for choice in choices]
        return [(backend, *pair, grad) for pair in every for grad in (False, True)]
    return [(backend, *pair, bool(i % 2)) for i, pair in enumerate(pairs)]


def compiled(rank: int, world_size: int, ways: list[Way]) -> None:
    for way in ways:
        print(f"rank {rank}: {way}", flush=True)
        one_way(rank, *way)


def one_way(rank: int, backend: str, kind: str, choice: str, grad: bool) -> None:
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    model = Model(KINDS[kind])
    plain = copy.deepcopy(model)
    balancer = torch_eplb.wrap(
        model,
        dispatch={"compact": "all_reduce", "asking": "all_gather"}.get(kind, kind),
        replica_choice=choice,
        max_tokens_per_rank=TOKENS + 3 if kind == "all_gather" else None,
        num_redundant_experts=4,
        policy="random",
        collect_interval=4,
        plan_interval=1,
        allow_training_with_moves=True,
    )
    whole = kind in ("all_reduce", "all_gather", "external")
    run = torch.compile(balancer, fullgraph=whole, backend=backend, dynamic=not whole)
    seed = itertools.count(0 if kind in ("all_reduce", "compact") else 1000 * rank)

    def check() -> None:
        x = skewed_batch(TOKENS, HIDDEN, next(seed)).requires_grad_(grad)
        y = x.detach().clone().requires_grad_(grad)
        with torch.set_grad_enabled(grad):
            ours, expected = run(x), plain(y)
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        if grad:
            ours.square().sum().backward()
            expected.square().sum().backward()
            mine, theirs = [x], [y]
            for block, other in zip(model.layers, plain.layers, strict=True):
                mine.append(block.router.weight)
                theirs.append(other.router.weight)
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a.grad, b.grad, atol=1e-3, rtol=1e-3)
                a.grad = b.grad = None

    steps = 0
    while balancer.stats().rebalances < 1 or steps % 4:
        check()
        steps += 1
        # The graph's one opaque operation is the step clock: it runs at every call.
        assert balancer.stats().step == steps
    with balancer.paused():
        check()
    hits, _ = balancer.load()
    counted = steps * TOKENS * TOP_K * (2 if kind in ("all_gather", "asking") else 1)
    assert hits.sum(axis=1).tolist() == [counted] * LAYERS
    assert balancer.stats().stalled is None
    # The boundary; and for every layer what comes before the experts, the experts, and the rest.
    most = 1 if whole else 1 + 3 * LAYERS
    assert 0 < graphs["unique_graphs"] <= most, graphs
    balancer.unwrap()


def test_compiled_outputs_are_the_plain_models() -> None:
    some = ways("eager", [("all_to_all", "even"), ("external", "even")])
    some += ways(
        "aot_eager",  # makes graphs functional
        [
            ("all_to_all", "batch"),
            ("all_to_all", "local"),
            ("all_to_all", "table"),
            ("all_reduce", "batch"),
            ("all_gather", "batch"),
            ("all_gather", "table"),
            ("asking", "batch"),
            ("external", "table"),
            ("external", "local"),
            ("compact", "table"),
        ],
    )
    run_ranks(compiled, 2, some, timeout=500)


@pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "c++", "clang++", "cl"))),
    reason="inductor needs a C++ compiler",
)
def test_outputs_by_inductor_are_the_plain_models() -> None:
    run_ranks(
        compiled, 2, ways("inductor", [("external", "table"), ("all_gather", "batch")]), timeout=500
    )


# ---- compiled before it was wrapped -------------------------------------------------------------


def compile_outside(model: nn.Module) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    return model, torch.compile(model, backend="eager")


def compile_in_place(model: nn.Module) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    model.compile(backend="eager")
    return model, model


def compile_the_wrapped(model: nn.Module) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    compiled = torch.compile(model, backend="eager")
    return compiled, compiled


def compile_layers(model: nn.Module) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    for layer in model.layers:
        layer.compile(backend="eager")
    return model, model


@pytest.mark.parametrize(
    "compile_it", [compile_outside, compile_in_place, compile_the_wrapped, compile_layers]
)
def test_a_model_that_ran_compiled_before_it_was_wrapped_runs_the_hooks(
    compile_it: Callable[[nn.Module], tuple[nn.Module, Callable[..., torch.Tensor]]],
) -> None:
    x = torch.ones(TOKENS, HIDDEN)
    with fake_process_group(world_size=4, rank=1), torch.no_grad():
        model, run = compile_it(Model(IdleExperts))
        logical = run(x)
        balancer = torch_eplb.wrap(model, dispatch="external", num_redundant_experts=4)
        physical = run(x)
        assert not torch.equal(physical, logical)
        assert balancer.stats().step == 1
        assert balancer.load()[0].sum(axis=1).tolist() == [TOKENS * TOP_K] * LAYERS
        balancer.close()
        assert torch.equal(run(x), physical)  # a closed model goes on where it is
        assert balancer.stats().step == 1


def test_a_compiled_model_forgets_the_hooks_when_it_is_unwrapped() -> None:
    x = torch.ones(TOKENS, HIDDEN)
    model = Model(BatchedExperts)
    expected = model(x)
    with fake_process_group(world_size=1, rank=0), torch.no_grad():
        balancer = torch_eplb.wrap(model, dispatch="external", policy="static")
        run = torch.compile(model, backend="eager")
        run(x)
        balancer.unwrap()
        torch.testing.assert_close(run(x), expected)
        assert balancer.stats().step == 1
        assert balancer.load()[0].sum() == TOKENS * TOP_K * LAYERS


def test_autocast_keeps_no_casts_of_experts_that_moved() -> None:
    x = torch.ones(1, 1, HIDDEN)
    model = Model(BatchedExperts)
    with fake_process_group(world_size=4, rank=1), torch.autocast("cpu", torch.bfloat16):
        with torch_eplb.wrap(model, num_redundant_experts=4) as balancer:
            up = model.layers[0].experts.up
            before = torch.bmm(x.expand(len(up), -1, -1), up)  # kept until autocast ends
            wanted = torch_eplb.Placement(np.roll(balancer.placement.experts, 1, axis=1), EXPERTS)
            assert balancer.engine.move_to(wanted) > 0
            after = torch.bmm(x.expand(len(up), -1, -1), up)
            assert not torch.equal(after, before)  # other bytes, if not an expert's, in this group


# ---- steps and layers that do not go together ---------------------------------------------------


def test_layers_in_checkpoints_in_a_graph_are_counted_once() -> None:
    class Checkpointing(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return x

    with fake_process_group(world_size=4, rank=1):
        balancer = torch_eplb.wrap(
            Checkpointing(IdleExperts), dispatch="external", num_redundant_experts=4
        )
        run = torch.compile(balancer, backend="aot_eager", fullgraph=True)
        run(torch.ones(TOKENS, HIDDEN, requires_grad=True)).sum().backward()
        assert balancer.load()[0].sum(axis=1).tolist() == [TOKENS * TOP_K] * LAYERS
        balancer.close()


class Shortcut(Model):
    """Calls its experts past their hooks when told so."""

    past_hooks = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            weights, ids = layer.router(x).topk(TOP_K, dim=-1)
            experts = layer.experts.forward if self.past_hooks else layer.experts
            x = experts(x, ids, weights)
        return x


def test_forwards_that_run_no_hook_of_a_layer_are_noticed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x = torch.ones(TOKENS, HIDDEN)
    with fake_process_group(world_size=4, rank=1), torch.no_grad():
        model = Shortcut(IdleExperts)
        with torch_eplb.wrap(model, dispatch="external", num_redundant_experts=4) as balancer:
            for _ in range(10):
                assert balancer.stats().stalled is None
                model(x)
            for _ in range(15):
                model(x)
                assert (
                    balancer.stats().stalled == "10 forwards in a row have run no MoE layer's hooks"
                )
            model.past_hooks = False
            for _ in range(2):
                model(x)
            assert balancer.stats().stalled is None
            for _ in range(15):
                balancer.step()  # a captured graph: nothing is seen of it, and nothing missed
            assert balancer.stats().stalled is None
    warnings = [record.getMessage() for record in caplog.records]
    assert len([text for text in warnings if "Compile and capture the model after" in text]) == 1


def test_layers_that_are_entered_without_a_step_are_noticed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    x = torch.ones(TOKENS, HIDDEN)
    with fake_process_group(world_size=4, rank=1), torch.no_grad():
        model = Model(IdleExperts)
        with torch_eplb.wrap(model, dispatch="external", num_redundant_experts=4) as balancer:
            model(x)
            for _ in range(150):
                for layer in model.layers:  # a generation that calls parts of the model
                    layer(x)
            expected = "MoE layers were entered 200 times without a step"
            assert balancer.stats().stalled == expected
            for _ in range(150):
                balancer.step()
                for layer in model.layers:
                    layer(x)
            assert balancer.stats().stalled is None
        for _ in range(300):
            model(x)  # closed: there are no steps any more
    warnings = [record.getMessage() for record in caplog.records]
    assert [text.startswith(expected) for text in warnings if "without a step" in text] == [True]
