"""Dispatch and combine: uneven batches, types, gradients, exceptions, external layers."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from support.models import QUICK, Experts, MoELayer, ToyModel, skewed_batch
from support.ranks import run_ranks

import torch_eplb
from torch_eplb.layers import all_to_all
from torch_eplb.testing import fake_process_group


def run_some_rebalances(
    rank: int, world_size: int, options: dict[str, Any], dtype_name: str, uneven: bool
) -> None:
    dtype = getattr(torch, dtype_name)
    # Rounded otherwise in the first layer, a token may choose other experts in the second.
    model = ToyModel(2 if dtype == torch.float32 else 1).to(dtype)
    reference = copy.deepcopy(model)
    shared = options.get("dispatch") == "all_reduce"
    balancer = torch_eplb.wrap(model, **{**QUICK, **options})
    step = 0
    with torch.no_grad():
        while balancer.stats().rebalances < 2:
            step += 1
            tokens = 20
            if uneven:
                # A rank with no tokens at all, a different one every step; at times nobody has any.
                who = step if shared else step + rank
                tokens = 0 if who % world_size == 0 or step % 7 == 0 else 5 * (who % 4 + 1)
            x = skewed_batch(tokens, 16, 100 * step + (0 if shared else rank), dtype=dtype)
            tolerance = 1e-5 if dtype == torch.float32 else 0.08
            torch.testing.assert_close(balancer(x), reference(x), atol=tolerance, rtol=tolerance)
    balancer.close()


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather", "all_reduce"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_uneven_batches_and_ranks_without_tokens_are_served(dispatch: str, dtype: str) -> None:
    options: dict[str, Any] = {"dispatch": dispatch, "num_redundant_experts": 1}
    if dispatch == "all_gather" and dtype == "bfloat16":
        options["max_tokens_per_rank"] = 21  # sizes are not agreed on
    run_ranks(run_some_rebalances, 3, options, dtype, True)


@pytest.mark.parametrize(
    ("dispatch", "choice"),
    [
        ("all_to_all", "local"),
        ("all_to_all", "table"),
        ("all_to_all", "even"),
        ("all_gather", "table"),
        ("all_reduce", "table"),
        ("all_reduce", "even"),
    ],
)
def test_every_replica_choice_gives_the_same_outputs(dispatch: str, choice: str) -> None:
    options = {"dispatch": dispatch, "replica_choice": choice}
    run_ranks(run_some_rebalances, 2, options, "float32", False)


def backward(rank: int, world_size: int, dispatch: str) -> None:
    """Gradients of inputs, router and experts equal those of the whole model on all tokens."""
    reference = ToyModel()
    model = copy.deepcopy(reference)
    balancer = torch_eplb.wrap(
        model,
        dispatch=dispatch,
        num_redundant_experts=4 if world_size != 3 else 1,
        allow_training_with_moves=True,  # replicas' gradients are summed below
    )
    shared = dispatch == "all_reduce"
    batches = [
        skewed_batch(0 if r == 1 and not shared else 10, 16, 0 if shared else r)
        for r in range(world_size)
    ]
    ours = batches[rank].requires_grad_()
    (balancer(ours) ** 2).sum().backward()
    whole = batches[0] if shared else torch.cat([batch.detach() for batch in batches])
    theirs = whole.detach().requires_grad_()
    (reference(theirs) ** 2).sum().backward()
    own = theirs.grad if shared else theirs.grad.split([len(b) for b in batches])[rank]
    torch.testing.assert_close(ours.grad, own, atol=1e-3, rtol=1e-3)
    for index, (layer, whole_layer) in enumerate(zip(model.layers, reference.layers, strict=True)):
        router = layer.router.weight.grad.clone()
        if not shared:
            dist.all_reduce(router)
        torch.testing.assert_close(router, whole_layer.router.weight.grad, atol=1e-3, rtol=1e-3)
        # An expert's gradient is the sum over its replicas.
        experts = balancer.placement.experts[index]
        for name, parameter in whole_layer.experts.named_parameters():
            total = torch.zeros_like(parameter)
            mine = getattr(layer.experts, name).grad
            if mine is not None:
                for slot, expert in enumerate(experts[rank].tolist()):
                    total[expert] += mine[slot]
            dist.all_reduce(total)
            torch.testing.assert_close(total, parameter.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather", "all_reduce"])
def test_gradients_flow_through_dispatch_and_combine(dispatch: str) -> None:
    run_ranks(backward, 2 if dispatch == "all_reduce" else 3, dispatch)


def sizes(rank: int, world_size: int, dtype_name: str) -> None:
    """With as many rows as there may be, and with as many as there are."""
    model = ToyModel(2, top_k=3).to(getattr(torch, dtype_name))
    balancer = torch_eplb.wrap(
        model, policy="static", num_redundant_experts=1, allow_training_with_moves=True
    )
    dtype = getattr(torch, dtype_name)
    x = skewed_batch(0 if rank == 1 else 9 * (rank + 1), 16, rank, dtype=dtype)
    found, rows = [], []
    for in_vain in (1 << 30, -1):
        before = balancer.stats()
        inputs = x.clone().requires_grad_()
        with patch.object(all_to_all, "_IN_VAIN", {"cpu": in_vain}):
            out = balancer(inputs)
            (out.float() ** 2).sum().backward()
        after = balancer.stats()
        rows.append(after.token_rows_sent - before.token_rows_sent)
        found.append([out.detach(), inputs.grad, *(p.grad for p in model.parameters())])
        model.zero_grad()
    for padded, exact in zip(*found, strict=True):
        assert (padded is None) == (exact is None)
        assert padded is None or torch.equal(padded, exact)
    total = torch.tensor(rows)
    dist.all_reduce(total)
    assert total[0] > total[1] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bounds_of_sizes_and_exact_ones_give_the_same_bits(dtype: str) -> None:
    run_ranks(sizes, 3, dtype)


class ExternalExperts(Experts):
    """Dispatches by itself: it is given physical ids and has all slots' weights at hand."""

    seen: torch.Tensor

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        self.seen = top_k_index
        return hidden_states


def external(rank: int, world_size: int, sharded: bool) -> None:
    torch.manual_seed(0)
    layer = MoELayer(8, 16, 8, 2)
    full = ExternalExperts(8, 16, 8)
    layer.experts = full
    original = {name: tensor.clone() for name, tensor in full.state_dict().items()}
    if sharded:
        torch_eplb.register_layer(ExternalExperts, tensors=list(original))
        placement = torch_eplb.Placement.initial(1, 8, world_size, 6)
        for name in original:
            tensor = getattr(full, name)
            part = tensor[torch.tensor(placement.experts[0, rank])]
            setattr(full, name, torch.nn.Parameter(part) if tensor.requires_grad else part)
    balancer = torch_eplb.wrap(layer, dispatch="external", **QUICK)
    logical = None

    def remember(module: Any, args: tuple[Any, ...]) -> None:
        nonlocal logical
        logical = args[1]

    full.register_forward_pre_hook(remember, prepend=True)
    step = 0
    with torch.no_grad():
        while balancer.stats().rebalances < 3:
            step += 1
            balancer(skewed_batch(40, 16, 10 * step + rank))
            held = torch.from_numpy(balancer.placement.experts[0].reshape(-1).copy()).long()
            assert torch.equal(held[full.seen], logical)
            # All ranks take part in the model's own communication; here a barrier stands for it.
            dist.barrier()
            for expert in balancer.placement.experts[0, rank].tolist():
                for name, tensor in balancer.expert(0, expert).items():
                    assert torch.equal(tensor, original[name][expert])
    assert full.num_experts == 8


@pytest.mark.parametrize("sharded", [False, True])
def test_an_external_layer_gets_physical_ids_that_match_the_weights(sharded: bool) -> None:
    run_ranks(external, 2, sharded)


def exception_in_forward(rank: int, world_size: int, everywhere: bool) -> None:
    model = ToyModel()
    reference = copy.deepcopy(model)
    balancer = torch_eplb.wrap(model, **QUICK)
    fail = False

    def maybe_fail(*_: Any) -> None:
        if fail:
            raise KeyError("the user's own error")

    # After the last layer, so that ranks that do not fail can finish their forward.
    model.register_forward_hook(maybe_fail)
    with torch.no_grad():
        for step in range(60):
            x = skewed_batch(12, 16, 10 * step + rank)
            fail = step % 5 == 2 and (everywhere or rank == 0)
            if fail:
                with pytest.raises(KeyError, match="the user's own error"):
                    balancer(x)
            else:
                torch.testing.assert_close(balancer(x), reference(x), atol=1e-5, rtol=1e-4)
            assert balancer.stats().step == step + 1
    balancer.close()


@pytest.mark.parametrize("everywhere", [False, True])
def test_an_exception_in_the_forward_reaches_the_user_and_the_clock_goes_on(
    everywhere: bool,
) -> None:
    run_ranks(exception_in_forward, 2, everywhere)


def test_all_gather_refuses_more_tokens_than_it_was_told() -> None:
    x = torch.ones(9, 16)
    options: dict[str, Any] = {"dispatch": "all_gather", "policy": "static"}
    with fake_process_group(world_size=2), torch.no_grad():
        with torch_eplb.wrap(ToyModel(), max_tokens_per_rank=8, **options) as balancer:
            with pytest.raises(ValueError, match=r"9 tokens, and max_tokens_per_rank=8: pass more"):
                balancer(x)
            assert balancer(x[:8]).shape == (8, 16)
