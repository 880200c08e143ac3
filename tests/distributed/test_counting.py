"""What counts as load: tokens, not padding; forwards, not their recomputation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import Experts, MoELayer, ToyModel, skewed_batch
from support.ranks import run_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_eplb
from torch_eplb.files.trace import read_trace
from torch_eplb.testing import fake_process_group

WAYS = [
    ("all_to_all", "batch"),
    ("all_to_all", "local"),
    ("all_to_all", "table"),
    ("all_gather", "batch"),
    ("all_reduce", "batch"),
    ("all_reduce", "even"),
]


def counted(model: ToyModel, batches: list[torch.Tensor], masks: list[torch.Tensor]) -> Any:
    """What the tokens that the masks let through choose, by layer and expert."""
    hits = []

    def count(layer: nn.Module, args: Any) -> None:
        ids = args[1][now.reshape(-1)]
        hits.append(torch.bincount(ids.reshape(-1), minlength=8))

    handles = [layer.experts.register_forward_pre_hook(count) for layer in model.layers]
    for x, now in zip(batches, masks, strict=True):
        assert len(x) == now.numel()
        model(x)
    for handle in handles:
        handle.remove()
    return torch.stack(hits).view(len(batches), len(model.layers), 8).sum(0)


def masked(rank: int, world_size: int) -> None:
    for dispatch, choice in WAYS:
        model = ToyModel()
        reference = copy.deepcopy(model)
        seeds = [10 * step + (0 if dispatch == "all_reduce" else rank) for step in range(6)]
        batches = [skewed_batch(12, 16, seed) for seed in seeds]
        masks = [
            torch.rand(3, 4, generator=torch.Generator().manual_seed(seed)) < 0.5 for seed in seeds
        ]
        options: dict[str, Any] = {"dispatch": dispatch, "replica_choice": choice}
        options |= {"collect_interval": 3, "plan_interval": 1000}  # it plans, and waits
        with torch_eplb.wrap(model, num_redundant_experts=4, **options) as balancer:
            with torch.no_grad():
                for step, (x, mask) in enumerate(zip(batches, masks, strict=True)):
                    with balancer.tokens(mask if step % 2 else mask.long()):
                        out = balancer(x)
                    torch.testing.assert_close(out, reference(x), atol=1e-5, rtol=1e-4)
                hits, sent = balancer.load()
                expected = counted(reference, batches, masks)
                seen = world_size if dispatch == "all_gather" else 1  # ranks whose tokens it counts
                if seen > 1:
                    torch.distributed.all_reduce(expected)
                assert hits.tolist() == expected.tolist()
                assert sent.sum(axis=1).tolist() == hits.sum(axis=1).tolist()
                # Each rank's own part is counted for the ranks that hold the experts chosen.
                experts = balancer.placement.experts
                for layer in range(2):
                    lone = [e for e in range(8) if (experts[layer] == e).sum() == 1]
                    for r in range(world_size):
                        held = [e for e in lone if e in experts[layer, r]]
                        assert sent[layer, r] >= hits[layer, held].sum()
                before = hits.sum()
                balancer(batches[0])
                assert balancer.load()[0].sum() == before + 2 * 12 * 2 * seen
                # A window's load is that of all ranks, whose tokens are the same or each its own.
                while (window := balancer.window_load()) is None:
                    balancer(batches[0])
                expected = counted(reference, batches[:3], masks[:3])
                if dispatch != "all_reduce":
                    torch.distributed.all_reduce(expected)
                assert window[0].tolist() == expected.tolist()


def test_rows_outside_of_a_mask_are_computed_and_not_counted() -> None:
    run_ranks(masked, 2)


class MaskedExperts(Experts):
    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        is_token: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return hidden_states


@pytest.mark.parametrize("choice", ["local", "table"])
def test_a_layer_may_be_given_the_mask_itself(choice: Any) -> None:
    torch_eplb.register_layer(MaskedExperts, token_mask="is_token")
    with fake_process_group(world_size=2):
        experts = MaskedExperts(8, 16, 4)
        with torch_eplb.wrap(experts, dispatch="external", replica_choice=choice) as balancer:
            x, ids, weights = torch.zeros(4, 16), torch.arange(8).view(4, 2), torch.ones(4, 2)
            mask = torch.tensor([True, False, True, True])
            experts(x, ids, weights, mask)
            experts(x, ids, weights, is_token=mask)
            assert balancer.load()[0][0].tolist() == [2, 2, 0, 0, 2, 2, 2, 2]
            experts(x, ids, weights, None)
            with balancer.tokens(torch.tensor([True, True, False, False])):
                experts(x, ids, weights, is_token=mask)  # tokens to both of them
            assert balancer.load()[0][0].tolist() == [4, 4, 1, 1, 3, 3, 3, 3]
    with pytest.raises(ValueError, match="token_mask='no_such'"):
        torch_eplb.register_layer(MaskedExperts, token_mask="no_such")


@pytest.mark.parametrize("choice", ["local", "table"])
def test_a_compiled_model_counts_by_its_mask(choice: Any) -> None:
    with fake_process_group(world_size=2):
        experts = MaskedExperts(8, 16, 4)
        with torch_eplb.wrap(experts, dispatch="external", replica_choice=choice) as balancer:
            run = torch.compile(balancer, backend="aot_eager", fullgraph=True)
            x, ids, weights = torch.zeros(4, 16), torch.arange(8).view(4, 2), torch.ones(4, 2)
            with torch.no_grad():
                for step in range(4):
                    mask = torch.arange(4) == step
                    with balancer.tokens(mask):
                        run(x, ids, weights)
                run(x, ids, weights)
            assert balancer.load()[0][0].tolist() == [2] * 8


def test_a_mask_that_does_not_fit_is_refused() -> None:
    with fake_process_group(world_size=2), torch_eplb.wrap(MoELayer(8, 16, 8, 2)) as balancer:
        with pytest.raises(ValueError, match=r"layer experts: .* \(3, 2\) has 6 .* 5 tokens"):
            with balancer.tokens(torch.ones(3, 2, dtype=torch.bool)):
                balancer(torch.zeros(5, 16))
        with pytest.raises(TypeError, match=r"bool tensor, got torch\.float32"):
            with balancer.tokens(torch.ones(5)):
                balancer(torch.zeros(5, 16))
        balancer(torch.zeros(5, 16))  # the mask is gone with its block


class Checkpointed(ToyModel):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


def recomputed(rank: int, world_size: int, reentrant: bool, whole: bool, folder: str) -> None:
    for dispatch, choice in WAYS:
        model = ToyModel() if whole else Checkpointed(reentrant)
        trace = Path(folder) / f"{dispatch}-{choice}.npz"
        balancer = torch_eplb.wrap(
            model,
            dispatch=dispatch,
            replica_choice=choice,
            policy="static",
            record_path=trace,
        )
        for step in range(4):
            x = skewed_batch(10, 16, 10 * step + (0 if dispatch == "all_reduce" else rank))
            x.requires_grad_()
            out = checkpoint(balancer, x, use_reentrant=reentrant) if whole else balancer(x)
            out.square().sum().backward()
            assert balancer.stats().step == step + 1
        hits, sent = balancer.load()
        seen = world_size if dispatch == "all_gather" else 1  # ranks whose tokens it counts
        assert hits.sum(axis=1).tolist() == [4 * 20 * seen] * 2
        assert sent.sum(axis=1).tolist() == [4 * 20 * seen] * 2
        assert all(p.grad is not None for p in model.parameters())
        balancer.close()
        if rank == 0:
            recorded = read_trace(trace).counts
            assert recorded.shape[0] == 4
            assert recorded[:, 0].sum(axis=0).tolist() == hits.tolist()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_layer_that_is_recomputed_for_the_backward_pass_is_counted_once(
    reentrant: bool, whole: bool, tmp_path: Path
) -> None:
    run_ranks(recomputed, 2, reentrant, whole, str(tmp_path))
