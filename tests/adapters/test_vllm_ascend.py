"""Our policies inside vLLM-Ascend 0.23.0."""

from __future__ import annotations

import inspect
import logging
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from torch_eplb.adapters import vllm_ascend as adapter
from torch_eplb.policies.split import even_split, par, rank_loads
from torch_eplb.values.placement import Placement

LAYERS, EXPERTS, RANKS, SLOTS, STAGES = 4, 32, 4, 10, 12
RNG = np.random.default_rng(3)
LIVE = Placement.initial(LAYERS, EXPERTS, RANKS, SLOTS)
TABLE = torch.from_numpy(LIVE.experts.astype(np.int64))
HEAT = RNG.gamma(0.5, 1.0, (1, LAYERS, EXPERTS))
LOAD = RNG.poisson(300 * HEAT, (STAGES, LAYERS, EXPERTS))
# Each replica has its share, as the server routes.
SHARE = LOAD[:, np.arange(LAYERS)[:, None, None], LIVE.experts] * even_split(LIVE)
WORKLOAD = torch.from_numpy(SHARE.astype(np.int64))


def interface(self: Any, current_expert_table: Any, expert_workload: Any) -> Any:
    """As in vllm_ascend/eplb/core/policy/policy_abstract.py of vLLM-Ascend 0.23.0."""


def even_par(table: Any) -> float:
    placement = Placement(np.asarray(table), EXPERTS)
    return float(par(rank_loads(LOAD, placement, even_split(placement))).mean())


def assert_the_worker_takes_it(new: torch.Tensor, old: torch.Tensor) -> None:
    """The rules of EplbWorker.check_expert_placement of vLLM-Ascend 0.23.0."""
    for layer in range(len(old)):
        assert new[layer].unique().numel() >= old[layer].unique().numel()
        for after, before in zip(new[layer], old[layer], strict=True):
            assert after.unique().numel() == after.numel()
            stays = torch.isin(after, before)
            assert torch.equal(after[stays], before[stays])


def test_the_signature_is_vllm_ascends() -> None:
    ours = inspect.signature(adapter.EplbPolicy.rebalance_experts)
    assert list(ours.parameters) == list(inspect.signature(interface).parameters)


@pytest.mark.parametrize("workload", [WORKLOAD, WORKLOAD.sum(0)], ids=["stages", "sums"])
def test_the_answer_is_a_balanced_table_that_the_worker_takes(workload: torch.Tensor) -> None:
    changed, priority, new = adapter.EplbPolicy("flow").rebalance_experts(TABLE, workload)
    assert changed == 1
    assert sorted(priority.tolist()) == list(range(LAYERS))
    assert new.shape == TABLE.shape
    assert_the_worker_takes_it(new, TABLE)
    assert even_par(new) < even_par(TABLE)


def test_layers_that_gain_most_come_first() -> None:
    load = LOAD.copy()
    load[:, 2] = 100  # balanced already
    share = load[:, np.arange(LAYERS)[:, None, None], LIVE.experts] * even_split(LIVE)
    _, priority, _ = adapter.EplbPolicy().rebalance_experts(TABLE, share)
    assert priority.tolist()[-1] == 2


def test_no_load_changes_nothing() -> None:
    changed, _, new = adapter.EplbPolicy().rebalance_experts(TABLE, WORKLOAD * 0)
    assert changed == 0
    assert torch.equal(new, TABLE)


@pytest.mark.parametrize("workload", [WORKLOAD[..., :3], None, "x"])
def test_nothing_that_it_is_given_makes_it_raise(
    workload: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "torch_eplb"):
        changed, priority, new = adapter.EplbPolicy().rebalance_experts(TABLE, workload)
    assert "no new plan" in caplog.text
    assert changed == 0
    assert torch.equal(new, TABLE)
    assert len(priority) == LAYERS


def test_it_travels_to_the_planning_process() -> None:
    copy = pickle.loads(pickle.dumps(adapter.EplbPolicy("flow", max_moves=1)))
    _, _, new = copy.rebalance_experts(TABLE, WORKLOAD)
    assert 0 < int((new != TABLE).sum(dim=(1, 2)).max()) <= 1


def test_wrong_arguments_are_errors_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="ranks_per_node must be at least 1, got 0"):
        adapter.EplbPolicy(ranks_per_node=0)
    with pytest.raises(ValueError, match="policy_type must be one of"):
        adapter.install(policy_type=7)
    monkeypatch.setitem(sys.modules, "vllm_ascend", None)
    with pytest.raises(ImportError, match=r"written for vLLM-Ascend 0\.23"):
        adapter.install()


# ---- the engine itself, where it is installed -------------------------------------------------

_STAND_INS = {
    "torch_npu": {},
    "vllm.logger": {"logger": logging.getLogger("vllm")},
    "vllm.distributed": {"get_ep_group": lambda: types.SimpleNamespace(rank_in_group=0)},
    "vllm.model_executor.layers.fused_moe.expert_map_manager": {"determine_expert_map": None},
    "vllm_ascend.distributed.parallel_state": {"get_dynamic_eplb_group": None},
}


@pytest.mark.parametrize("policy_type", [2, 3])
def test_vllm_ascends_worker_plans_with_it(
    engine: Callable[..., Any], caplog: pytest.LogCaptureFixture, policy_type: int
) -> None:
    pytest.importorskip("numba")
    module = engine("vllm_ascend.eplb.core.eplb_worker", _STAND_INS)
    factory = sys.modules["vllm_ascend.eplb.core.policy.policy_factory"]
    theirs = sys.modules["vllm_ascend.eplb.core.policy.policy_abstract"].EplbPolicy
    assert list(inspect.signature(theirs.rebalance_experts).parameters) == list(
        inspect.signature(interface).parameters
    )
    adapter.install("flow", policy_type=policy_type)
    # Without this the factory would compile kernels for the policy that was replaced.
    factory.warm_up = lambda: None
    # [layers, ranks, experts]: the slot of an expert on a rank, or -1.
    maps = torch.full((LAYERS, RANKS, EXPERTS), -1)
    maps.scatter_(2, TABLE, torch.arange(SLOTS).expand_as(TABLE))
    load = WORKLOAD if policy_type == 3 else WORKLOAD.sum(0)
    worker = module.EplbWorker({"expert_maps": maps, "moe_load": load}, policy_type)
    assert isinstance(worker.policy, adapter.EplbPolicy)
    with caplog.at_level(logging.ERROR):
        updates = worker.do_update()
    assert not caplog.records  # check_expert_placement found nothing to put back
    assert len(updates) == LAYERS
    new = worker.global2local(worker.shared_dict["expert_maps"], SLOTS)
    assert even_par(new) < even_par(TABLE)
    assert_the_worker_takes_it(new, TABLE)
