"""What can be named to another interpreter is found there again; the rest is told apart."""

from __future__ import annotations

import json
from typing import Any

import pytest

from torch_eplb.planner.messages import PlannerSettings
from torch_eplb.planner.references import from_reference, importable_name, to_reference
from torch_eplb.policies.deepseek import place
from torch_eplb.policies.rebalance import (
    RebalancePolicy,
    from_rebalance_experts,
    rebalance_experts,
)
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology


@pytest.mark.parametrize("policy", ["flow", place, PlannerSettings.from_frame])
def test_names_functions_and_class_methods_come_back_as_they_were(policy: Any) -> None:
    reference = json.loads(json.dumps(to_reference(policy)))
    assert from_reference(reference) == policy


def test_a_function_with_deepseeks_signature_comes_back_with_its_arguments() -> None:
    policy = from_rebalance_experts(rebalance_experts, current="current", policy="flow")
    again = from_reference(json.loads(json.dumps(to_reference(policy))))
    assert isinstance(again, RebalancePolicy)
    assert repr(again) == repr(policy)
    assert again.function is rebalance_experts


def in_main(weight: Any, *sizes: int) -> Any:
    return None


in_main.__module__ = "__main__"


@pytest.mark.parametrize(
    "policy",
    [
        lambda load, placement, topology: placement,
        in_main,
        Placement.initial(1, 4, 2, 2).align,  # a method of an object
        from_rebalance_experts(lambda weight, *sizes: None),
        from_rebalance_experts(in_main),
        from_rebalance_experts(rebalance_experts, policy=place),
        from_rebalance_experts(rebalance_experts, min_gain=float("inf")),
        from_rebalance_experts(rebalance_experts, current=None, policy=("flow",)),
    ],
)
def test_what_only_this_process_has_cannot_be_named(policy: Any) -> None:
    assert to_reference(policy) is None
    # It is made into a frame all the same, and so would fail where it is read, not here.
    PlannerSettings(policy, {}, Topology(2), (8,), 8).to_frame()


class Base:
    @classmethod
    def rebalance_experts(cls, weight: Any, *sizes: int) -> Any:
        return None


class Derived(Base):
    pass


def test_a_class_method_of_another_class_than_its_name_says_is_not_confused_with_it() -> None:
    Base.__module__ = Derived.__module__ = __name__
    found = importable_name(Base.rebalance_experts)
    assert found is None or found.endswith("Base.rebalance_experts")
    assert importable_name(Derived.rebalance_experts) is None
