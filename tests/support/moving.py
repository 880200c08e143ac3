"""Models whose experts are moving, and what their state is compared with."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from support.models import ToyModel, skewed_batch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import torch_eplb

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}


class Ordinary(nn.Module):
    """A model with tensors outside of its experts, a tied one and a buffer that is not saved."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inner = ToyModel(seed=seed)
            self.head = nn.Linear(16, 16)
            self.tied = nn.Linear(16, 16, bias=False)
            self.tied.weight = self.head.weight
            self.register_buffer("offset", torch.randn(()))
            self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.head(self.inner(x))) + self.offset


def wrap(model: nn.Module, **options: Any) -> torch_eplb.ExpertLoadBalancer:
    return torch_eplb.wrap(
        model, collect_interval=2, plan_interval=0, policy="random", timeout=30, **options
    )


def serve_until(condition: Any, balancer: torch_eplb.ExpertLoadBalancer, rank: int) -> None:
    """Forwards until a condition that becomes true at the same step on all ranks."""
    for step in range(20000):
        if condition():
            return
        balancer(skewed_batch(6, 16, 100 * step + rank))
    raise AssertionError("the condition never held")


def compare_logits(
    balancer: Any,
    reference: Any,
    rank: int,
    dispatch: str,
    rebalances: int,
    draw: Callable[[], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    grad: bool = True,
) -> None:
    """Forwards of a model of transformers, and at times backward passes to the inputs, until so
    many rebalances were made. ``draw`` gives ids, and further arguments."""
    for step in range(400):
        torch.manual_seed(step if dispatch == "all_reduce" else 10 * step + rank)
        ids, further = draw()
        with_gradient = grad and step % 5 == 0
        with torch.set_grad_enabled(with_gradient):
            # Inputs that a gradient reaches.
            x = reference.get_input_embeddings()(ids).detach().requires_grad_(with_gradient)
            inputs = {"inputs_embeds": x, "use_cache": False, **further}
            actual, expected = balancer(**inputs).logits, reference(**inputs).logits
            torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-3)
            if with_gradient:
                (ours,) = torch.autograd.grad(actual.sin().sum(), x)
                (theirs,) = torch.autograd.grad(expected.sin().sum(), x)
                torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-2)
        if balancer.stats().rebalances >= rebalances and step > 5:
            return
    raise AssertionError("the experts never moved")


def in_flight(balancer: torch_eplb.ExpertLoadBalancer) -> bool:
    """A round is under way, and earlier ones have moved the placement away from the first."""
    migration = balancer.engine._migration
    return migration.in_flight and migration.version > 0 and migration.round > 0


def assert_same(state: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(state) == list(expected)
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


def assert_every_slot(balancer: torch_eplb.ExpertLoadBalancer, model: ToyModel, rank: int) -> None:
    """Also replicas of one expert, each by itself."""
    experts = balancer.placement.experts[:, rank]
    for layer, reference, held in zip(balancer.engine.layers, model.layers, experts, strict=True):
        for name, tensor in zip(layer.tensor_names, layer.tensors(), strict=True):
            there = getattr(reference.experts, name)
            expected = torch.stack([there[expert] for expert in held.tolist()])
            if tensor.element_size() == 1:  # older versions compare no float8
                tensor, expected = tensor.view(torch.uint8), expected.view(torch.uint8)
            assert torch.equal(tensor, expected)


class PeakBytes(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(word in func.overloadpacket.__name__ for word in ("empty", "clone", "cat", "stack")):
            nbytes = result.untyped_storage().nbytes()
            self._count(nbytes)
            weakref.finalize(result, self._count, -nbytes)
        return result

    def _count(self, nbytes: int) -> None:
        self._alive += nbytes
        self.peak = max(self.peak, self._alive)
