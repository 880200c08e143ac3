"""Our policies inside SGLang 0.5.23."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from torch_eplb.adapters import sglang as adapter
from torch_eplb.policies.split import even_split, par, rank_loads
from torch_eplb.values.placement import Placement

LAYERS, EXPERTS, RANKS, SLOTS = 4, 32, 4, 10
RNG = np.random.default_rng(2)
HEAT = RNG.gamma(0.5, 1.0, (1, LAYERS, EXPERTS))
HEAT[:, 0] = 0  # a dense layer, as in DeepSeek-V3
TOKENS = torch.from_numpy(RNG.poisson(300 * HEAT, (50, LAYERS, EXPERTS)).astype(np.int32))
LIVE = Placement.initial(LAYERS, EXPERTS, RANKS, SLOTS)


def interface(
    tokens_per_expert: torch.Tensor,
    num_physical_experts: int,
    num_local_physical_experts: int,
    num_groups: int | None,
    num_nodes: int,
    algorithm: Any,
) -> Any:
    """As in sglang/srt/eplb/eplb_algorithms/__init__.py of SGLang 0.5.23."""


def call(function: Any, algorithm: Any = "deepseek", **changes: Any) -> Any:
    arguments = {
        "tokens_per_expert": TOKENS,
        "num_physical_experts": RANKS * SLOTS,
        "num_local_physical_experts": SLOTS,
        "num_groups": None,
        "num_nodes": 1,
        "algorithm": algorithm,
    }
    return function(**{**arguments, **changes})


def even_par(physical: torch.Tensor) -> float:
    placement = Placement(
        physical.numpy().reshape(LAYERS, RANKS, -1), EXPERTS, allow_duplicates=True
    )  # fmt: skip
    return float(par(rank_loads(TOKENS.numpy(), placement, even_split(placement))).mean())


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Sets the map that SGLang keeps."""
    module = types.ModuleType("sglang.srt.eplb.expert_location")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def keep(table: Any) -> None:
        tensor = torch.from_numpy(table).long()
        metadata = types.SimpleNamespace(physical_to_logical_map_cpu=tensor)
        module.get_global_expert_location_metadata = lambda: metadata  # type: ignore[attr-defined]

    return keep


def test_the_signature_is_sglangs() -> None:
    names = list(inspect.signature(adapter.rebalancer("flow")).parameters)
    assert names == list(inspect.signature(interface).parameters)


def test_the_answer_is_a_balanced_map_in_sglangs_terms() -> None:
    physical, logical, counts = call(adapter.rebalancer("flow"))
    assert {t.dtype for t in (physical, logical, counts)} == {torch.int64}
    assert physical.shape == (LAYERS, RANKS * SLOTS)
    assert logical.shape == (LAYERS, EXPERTS, int(counts.max()))
    assert torch.equal(counts, torch.stack([row.bincount(minlength=EXPERTS) for row in physical]))
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            slots = [s for s in logical[layer, expert].tolist() if s >= 0]
            assert slots == (physical[layer] == expert).nonzero().flatten().tolist()
    first = torch.from_numpy(LIVE.experts.reshape(LAYERS, -1).copy())
    assert even_par(physical) < even_par(first)
    assert torch.equal(physical[0], first[0].long())


def test_it_starts_from_the_map_that_sglang_keeps(live: Callable[[Any], None]) -> None:
    rotated = np.roll(LIVE.experts.reshape(LAYERS, -1), SLOTS, axis=1)
    live(rotated)
    physical, _, _ = call(adapter.rebalancer("static"))
    assert np.array_equal(physical.numpy(), rotated)


def test_every_rank_answers_the_same() -> None:
    answers = [call(adapter.rebalancer("flow"))[0] for _ in range(2)]
    assert torch.equal(*answers)


def test_elastic_algorithms_stay_sglangs() -> None:
    asked = []

    def theirs(**arguments: Any) -> str:
        asked.append(arguments["algorithm"])
        return "theirs"

    ours = adapter.rebalancer("flow", fallback=theirs)  # type: ignore[arg-type]
    elastic = types.SimpleNamespace(name="elasticity_aware_hierarchical")
    assert call(ours, elastic) == "theirs"
    assert asked == [elastic]


def test_without_sglang_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sglang", None)
    with pytest.raises(ImportError, match=r"written for SGLang 0\.5\.23"):
        adapter.install()


# ---- the engine itself, where it is installed -------------------------------------------------


def test_installed_in_sglang_it_answers_what_sglang_uses(engine: Callable[..., Any]) -> None:
    theirs = engine("sglang.srt.eplb.eplb_algorithms")
    assert list(inspect.signature(theirs.rebalance_experts).parameters) == list(
        inspect.signature(interface).parameters
    )
    original = theirs.rebalance_experts
    default = call(original, theirs.EplbAlgorithm.deepseek)
    adapter.install("flow")
    adapter.install("flow")
    assert theirs.rebalance_experts._theirs is original
    ours = call(theirs.rebalance_experts, theirs.EplbAlgorithm.deepseek)
    for mine, its in zip(ours, default, strict=True):
        assert (mine.dtype, mine.ndim, mine.shape[:2]) == (its.dtype, its.ndim, its.shape[:2])
    assert even_par(ours[0]) < even_par(default[0]) + 0.02
