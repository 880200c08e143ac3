"""Load that layers hand over themselves is the load that counting ids would have found."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.few_kernels import EXPERTS, HIDDEN, ExternalExperts, FewKernelModel
from support.models import QUICK, skewed_batch
from support.ranks import run_ranks

import torch_eplb
from torch_eplb.files.trace import read_trace


class CountedExperts(ExternalExperts):
    """Counts what arrives at its own slots, as a dispatch kernel does on the way."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        slots = len(self.down_proj)
        hits = torch.bincount(top_k_index.reshape(-1), minlength=slots * dist.get_world_size())
        dist.all_reduce(hits)
        self.arrived = hits[dist.get_rank() * slots :][:slots].int()
        return super().forward(hidden_states, top_k_index, top_k_weights)


def expected_hits(model: FewKernelModel, x: torch.Tensor) -> torch.Tensor:
    """``[layers, experts]`` of this rank's tokens."""
    hits = []

    def note(module: Any, args: Any) -> None:
        hits.append(torch.bincount(args[1].reshape(-1), minlength=EXPERTS))

    handles = [layer.experts.register_forward_pre_hook(note) for layer in model.layers]
    model(x)
    for handle in handles:
        handle.remove()
    return torch.stack(hits)


def same_plan(rank: int, world_size: int, choice: str) -> None:
    torch_eplb.register_layer(CountedExperts, token_counts="arrived")
    options: dict[str, Any] = {
        **QUICK,
        "policy": "flow",
        "min_gain": 0.0,
        "dispatch": "external",
        "replica_choice": choice,
        "collect_interval": 8,
        "plan_interval": 60,  # both answers are there
    }
    balancers = [
        torch_eplb.wrap(FewKernelModel(kind), **options)
        for kind in (ExternalExperts, CountedExperts)
    ]
    step = 0
    with torch.no_grad():  # the same experts are hot throughout
        while min(balancer.stats().rebalances for balancer in balancers) < 1:
            step += 1
            x = skewed_batch(8 + step % 3, HIDDEN, seed=1)
            first, second = (balancer(x) for balancer in balancers)
            torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)
    by_ids, handed_over = balancers
    windows = [balancer.window_load() for balancer in balancers]
    assert windows[0] is not None
    assert windows[1] is not None
    for counted, told in zip(*windows, strict=True):
        assert counted.tolist() == told.tolist()
    assert by_ids.stats().par_measured == handed_over.stats().par_measured
    assert by_ids.stats().par_predicted == handed_over.stats().par_predicted
    assert by_ids.stats().experts_moved == handed_over.stats().experts_moved > 0
    assert by_ids.placement == handed_over.placement
    # The whole is the same; each rank's part is what it got.
    got = handed_over.load()[1]
    assert got[:, rank].all()
    assert not got[:, 1 - rank].any()


@pytest.mark.parametrize("choice", ["local", "table"])
def test_plans_and_par_are_those_of_counted_ids(choice: str) -> None:
    run_ranks(same_plan, 2, choice)


def moving(rank: int, world_size: int, folder: str) -> None:
    torch_eplb.register_layer(CountedExperts, token_counts="arrived")
    model = FewKernelModel(CountedExperts)
    plain = FewKernelModel()
    path = Path(folder) / "trace.npz"
    options: dict[str, Any] = {**QUICK, "dispatch": "external", "record_path": path}
    balancer = torch_eplb.wrap(model, **options)
    steps = []
    with torch.no_grad():
        while balancer.stats().rebalances < 4:
            x = skewed_batch(8, HIDDEN, 10 * len(steps) + rank)
            steps.append(expected_hits(copy.deepcopy(plain), x))
            torch.testing.assert_close(balancer(x), plain(x), atol=1e-5, rtol=1e-4)
    assert balancer.stats().experts_moved > 0
    expected = torch.stack(steps)
    dist.all_reduce(expected)
    # Whatever moved on the way, and whichever slots were out of use.
    hits = torch.from_numpy(balancer.load()[0])
    dist.all_reduce(hits)
    assert torch.equal(hits, expected.sum(0))
    balancer.close()
    dist.barrier()
    # Who sent a token is not known: a trace of one source.
    assert read_trace(path).counts.tolist() == expected.unsqueeze(1).tolist()


def test_tokens_are_those_of_the_expert_that_a_slot_held(tmp_path: Path) -> None:
    run_ranks(moving, 2, str(tmp_path))


def differing(rank: int, world_size: int) -> None:
    torch_eplb.register_layer(CountedExperts, token_counts="arrived" if rank else None)
    with pytest.raises(ValueError, match=r"token counts of layers\.0\.experts.*'arrived'"):
        torch_eplb.wrap(FewKernelModel(CountedExperts), dispatch="external")


def test_ranks_that_count_differently_are_refused() -> None:
    run_ranks(differing, 2)
