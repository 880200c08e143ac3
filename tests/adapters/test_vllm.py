"""Our policies inside vLLM 0.33.0."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from torch_eplb.adapters import vllm as adapter
from torch_eplb.policies.split import even_split, par, rank_loads
from torch_eplb.values.placement import Placement

LAYERS, EXPERTS, RANKS, SLOTS = 4, 32, 4, 10
RNG = np.random.default_rng(1)
# As vLLM has it: float32 sums, on the CPU.
WEIGHT = torch.from_numpy(RNG.gamma(0.5, 900.0, (LAYERS, EXPERTS)).round().astype(np.float32))
OLD = torch.arange(RANKS * SLOTS).remainder(EXPERTS).repeat(LAYERS, 1)


class AbstractEplbPolicy:
    """The interface as in vllm/distributed/eplb/policy/abstract.py of vLLM 0.33.0."""

    @classmethod
    def rebalance_experts(
        cls,
        weight: torch.Tensor,
        num_replicas: int,
        num_groups: int,
        num_nodes: int,
        num_ranks: int,
        old_global_expert_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        raise NotImplementedError


def parameters(function: Any) -> list[tuple[str, Any]]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def even_par(answer: torch.Tensor) -> float:
    placement = Placement(answer.numpy().reshape(LAYERS, RANKS, -1), EXPERTS, allow_duplicates=True)
    return float(par(rank_loads(WEIGHT.numpy(), placement, even_split(placement))).mean())


def moved(answer: torch.Tensor) -> int:
    """Transfers: experts on a rank that were not there."""
    before = Placement(OLD.numpy().reshape(LAYERS, RANKS, -1), EXPERTS)
    after = Placement(
        answer.numpy().reshape(LAYERS, RANKS, -1), EXPERTS, allow_duplicates=True
    )  # fmt: skip
    return int(before.newly_held(after).sum())


def test_the_signature_is_vllms() -> None:
    ours = adapter.policy_class("flow").rebalance_experts
    assert parameters(ours) == parameters(AbstractEplbPolicy.rebalance_experts)


def test_the_answer_is_a_balanced_map_in_vllms_terms() -> None:
    policy = adapter.policy_class("flow")
    answer = policy.rebalance_experts(WEIGHT, RANKS * SLOTS, 1, 1, RANKS, OLD)
    assert (answer.dtype, answer.device.type) == (torch.int64, "cpu")
    assert answer.shape == (LAYERS, RANKS * SLOTS)
    assert all(len(row.unique()) == EXPERTS for row in answer)
    assert even_par(answer) < even_par(OLD)
    # What stays on a rank keeps its slot.
    for new, old in zip(answer.view(-1, SLOTS).tolist(), OLD.view(-1, SLOTS).tolist(), strict=True):
        assert all(new[old.index(e)] == e for e in new if e in old)


def test_without_a_live_map_or_with_another_width_it_plans_from_experts_in_order() -> None:
    policy = adapter.policy_class("deepseek")
    plain = policy.rebalance_experts(WEIGHT, RANKS * SLOTS, 8, 2, RANKS)
    assert plain.shape == (LAYERS, RANKS * SLOTS)
    assert torch.equal(policy.rebalance_experts(WEIGHT, 40, 8, 2, RANKS, OLD[:, :20]), plain)
    unfilled = OLD.clone()
    unfilled[:, -3:] = -1
    grown = policy.rebalance_experts(WEIGHT, RANKS * SLOTS, 8, 2, RANKS, unfilled)
    assert grown.min() >= 0


def test_the_profile_runs_equal_demand_is_planned_for(caplog: Any) -> None:
    answer = adapter.policy_class().rebalance_experts(
        torch.zeros(LAYERS, EXPERTS), 40, 1, 1, 4, OLD
    )
    assert torch.equal(answer, OLD.long())


def test_options_reach_the_policy() -> None:
    lazy = adapter.policy_class("flow", target_par=50.0)
    assert torch.equal(lazy.rebalance_experts(WEIGHT, 40, 1, 1, RANKS, OLD), OLD.long())
    with pytest.raises(ValueError, match="target_par"):
        adapter.policy_class("flow", target_par=0.5)


def test_installing_stands_in_for_vllms_default(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = {"default": object}
    for name in ("vllm", "vllm.distributed", "vllm.distributed.eplb"):
        package = types.ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    module = types.ModuleType("vllm.distributed.eplb.policy")
    vars(module).update(EPLB_POLICIES=registry, __path__=[])
    monkeypatch.setitem(sys.modules, module.__name__, module)
    installed = adapter.install("flow", target_par=1.1)
    assert registry == {"default": installed}


def test_without_vllm_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"written for vLLM 0\.33"):
        adapter.install()


# ---- the engine itself, where it is installed -------------------------------------------------


def test_vllms_own_interface_is_the_one_written_down(engine: Callable[..., Any]) -> None:
    abstract = engine("vllm.distributed.eplb.policy.abstract").AbstractEplbPolicy
    theirs = abstract.rebalance_experts
    assert parameters(theirs) == parameters(AbstractEplbPolicy.rebalance_experts)
    assert issubclass(adapter.policy_class("flow"), abstract)


def test_flow_moves_less_than_vllms_policy_and_balances_as_well(engine: Callable[..., Any]) -> None:
    theirs = engine("vllm.distributed.eplb.policy.default").DefaultEplbPolicy
    arguments = (WEIGHT, RANKS * SLOTS, 1, 1, RANKS, OLD)
    default = theirs.rebalance_experts(*arguments)
    flow = adapter.policy_class("flow").rebalance_experts(*arguments)
    assert (flow.dtype, flow.shape) == (default.dtype, default.shape)
    assert even_par(flow) < even_par(default) + 0.02
    assert moved(flow) < moved(default) / 2
