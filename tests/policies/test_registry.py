"""Every policy's answer obeys the contract, whatever the load; and broken answers are refused."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from torch_eplb.policies.deepseek import groups_on_nodes, node_bound
from torch_eplb.policies.registry import POLICIES, PolicyError, check_plan, make_policy
from torch_eplb.policies.split import even_split, judged_par
from torch_eplb.values.choices import REPLICA_CHOICES
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Plan, Topology

every_policy = pytest.mark.parametrize("policy", POLICIES)


class Case(NamedTuple):
    load: NDArray[np.float64]
    current: Placement
    topology: Topology
    choice: str


@st.composite
def cases(draw: st.DrawFn) -> Case:
    topology = draw(
        st.sampled_from(
            [Topology(1), Topology(2), Topology(3), Topology(5), Topology(4, 2), Topology(4, 2, 4),
             Topology(6, 3, 3), Topology(9)]
        )
    )  # fmt: skip
    ranks, groups = topology.num_ranks, topology.num_expert_groups
    least = 1 if groups == 1 else 2
    experts = groups * draw(st.integers(least, 12 // groups))
    fewest = -(-experts // ranks)
    slots = draw(st.integers(fewest, min(fewest + 2, experts + 1)))
    layers, samples = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["skewed", "zero", "constant", "one-hot", "huge", "sparse"]))
    load = _load(kind, (samples, layers, experts), rng)
    current = Placement.initial(layers, experts, ranks, slots)
    if draw(st.booleans()):  # a placement in the middle of its life
        heat = rng.exponential(size=(1, layers, experts))
        current = make_policy("random")(heat, current, topology).placement
    return Case(load, current, topology, draw(st.sampled_from(REPLICA_CHOICES)))


def _load(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    if kind == "zero":
        return np.zeros(shape)
    if kind == "constant":
        return np.full(shape, 7.0)
    if kind == "one-hot":
        load = np.zeros(shape)
        load[..., int(rng.integers(shape[-1]))] = 1000.0
        return load
    load = np.floor(rng.lognormal(3.0, 1.5, shape))
    if kind == "huge":
        return load * 2.0**40
    if kind == "sparse":
        return load * (rng.random(shape) < 0.2)
    return load


def _assert_obeys(plan: Plan, case: Case) -> None:
    """The contract, in other words than `check_plan`'s."""
    _, current, _, _ = case
    placed = plan.placement.experts
    assert placed.shape == plan.split.shape == current.experts.shape
    assert plan.predicted_par.shape == (current.num_layers,)
    assert np.isfinite(plan.predicted_par).all()
    assert (plan.predicted_par >= 1 - 1e-9).all()
    assert np.isfinite(plan.split).all()
    assert (plan.split >= 0).all()
    distinct = min(current.num_slots, current.num_experts)
    for layer, (now, before) in enumerate(zip(placed, current.experts, strict=True)):
        assert set(now.flat) == set(range(current.num_experts)), "an expert has no slot"
        shares = np.bincount(now.reshape(-1), weights=plan.split[layer].reshape(-1))
        assert np.allclose(shares, 1.0, atol=1e-6)
        for mine, was in zip(now, before, strict=True):
            assert len(set(mine)) == distinct, "two replicas on a rank"
            for expert in set(mine) & set(was):
                stayed = set(np.flatnonzero(mine == expert)) & set(np.flatnonzero(was == expert))
                assert stayed, "an expert that stays on its rank left its slot"


@every_policy
@given(case=cases())
@settings(max_examples=40)
def test_every_answer_obeys_the_contract(policy: str, case: Case) -> None:
    plan = make_policy(policy, replica_choice=case.choice)(*case[:3])
    _assert_obeys(plan, case)
    if policy not in ("static", "random") and node_bound(case.current, case.topology):
        assert groups_on_nodes(plan.placement, case.topology).all()


@every_policy
@given(case=cases())
@settings(max_examples=6)
def test_the_same_question_has_the_same_answer(policy: str, case: Case) -> None:
    load, current, topology, choice = case
    one = make_policy(policy, replica_choice=choice)(load, current, topology)
    load, current = load.copy(), Placement(current.experts.copy(), current.num_experts)
    other = make_policy(policy, replica_choice=choice)(load, current, topology)
    assert one.placement == other.placement
    assert np.array_equal(one.split, other.split)
    assert np.array_equal(one.predicted_par, other.predicted_par)


@every_policy
def test_a_policy_leaves_its_arguments_alone(policy: str) -> None:
    load = np.random.default_rng(0).exponential(size=(3, 2, 8))
    current = Placement.initial(2, 8, 4, 3)
    copy, before = load.copy(), current.experts.copy()
    make_policy(policy)(load, current, Topology(4))
    assert np.array_equal(load, copy)
    assert np.array_equal(current.experts, before)


@every_policy
def test_load_without_samples_is_one_sample(policy: str) -> None:
    load = np.random.default_rng(1).integers(0, 100, size=(2, 8))
    current = Placement.initial(2, 8, 4, 3)
    one = make_policy(policy)(load, current, Topology(4))
    other = make_policy(policy)(load[None], current, Topology(4))
    assert one.placement == other.placement


@every_policy
def test_predicted_par_is_what_the_replica_choice_reaches(policy: str) -> None:
    load = np.random.default_rng(2).lognormal(0, 1, size=(4, 2, 12))
    current = Placement.initial(2, 12, 4, 4)
    for choice in REPLICA_CHOICES:
        plan = make_policy(policy, replica_choice=choice)(load, current, Topology(4))
        judged = judged_par(load, plan.placement, plan.split, choice).mean(axis=0)
        assert np.allclose(plan.predicted_par, judged)


@every_policy
@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (np.full((1, 2, 8), -1.0), "not negative, got -1.0 at sample 0, layer 0, expert 0"),
        (np.full((1, 2, 8), np.nan), "finite.*nan"),
        (np.full((1, 2, 8), np.inf), "finite.*inf"),
        (np.ones((1, 2, 9)), r"shape.*got \[1, 2, 9\]"),
        (np.ones((3, 8)), r"shape.*got \[3, 8\]"),
        (np.ones((0, 2, 8)), r"shape.*got \[0, 2, 8\]"),
        (np.ones(8), r"shape.*got \[8\]"),
    ],
)
def test_bad_load_is_refused(policy: str, bad: NDArray[Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"load must .*{named}"):
        make_policy(policy)(bad, Placement.initial(2, 8, 4, 3), Topology(4))


def test_load_that_is_no_number_is_refused() -> None:
    with pytest.raises(TypeError, match="load must be an array of numbers"):
        make_policy("static")(np.array([["a"] * 4]), Placement.initial(1, 4, 2, 2), Topology(2))


def test_a_topology_of_other_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="topology has 4 ranks, the placement 2"):
        make_policy("static")(np.ones((1, 4)), Placement.initial(1, 4, 2, 2), Topology(4))


@pytest.mark.parametrize("policy", ["Flow", "", None, 3])
def test_an_unknown_policy_is_refused_with_the_known_ones(policy: Any) -> None:
    with pytest.raises(ValueError, match="'flow', 'deepseek', 'swift'"):
        make_policy(policy)


def test_an_unknown_replica_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"replica_choice must be one of 'batch'.*'nearest'"):
        make_policy("flow", replica_choice="nearest")


@pytest.mark.parametrize(
    ("knob", "value", "error"),
    [
        ("min_gain", -0.1, ValueError),
        ("min_gain", float("nan"), ValueError),
        ("target_par", 0.9, ValueError),
        ("max_moves", -1, ValueError),
        ("max_moves", 2.5, TypeError),
        ("min_gain", "much", TypeError),
    ],
)
def test_a_knob_out_of_range_is_refused(knob: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{knob} must be"):
        make_policy("flow", **{knob: value})


# A user's own policy: 2 layers, 3 ranks of 2 slots, 4 experts.
CURRENT = Placement(np.array([[[0, 1], [2, 3], [0, 1]]] * 2), 4)
LOAD = np.ones((2, 2, 4))


def _checked(answer: Any) -> Plan:
    return make_policy(lambda load, current, topology: answer)(LOAD, CURRENT, Topology(3))


def _with(rank: int, slot: int, expert: int) -> NDArray[np.int32]:
    experts = np.array(CURRENT.experts)
    experts[1, rank, slot] = expert
    return experts


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (_with(1, 1, 2), "layer 1: expert 3 has no slot"),
        (_with(1, 0, 4), "layer 1, rank 1, slot 0: expert 4 is not one of the 4"),
        (_with(0, 0, -1), "layer 1, rank 0, slot 0: expert -1"),
        (_with(0, 0, 1), "layer 1, rank 0: expert 1 sits in 2 slots"),
        (CURRENT.experts[:1], r"shape \[1, 3, 2\], needed .*\[2, 3, 2\]"),
        (CURRENT.experts.astype(float), "integer array"),
        (Placement.initial(2, 5, 3, 2), "answered for 5 experts, there are 4"),
        (None, "must answer a Plan.*got NoneType"),
        ("flow", "must answer a Plan.*got str"),
    ],
)
def test_a_broken_placement_is_refused_by_name(answer: Any, named: str) -> None:
    with pytest.raises(PolicyError, match=named):
        _checked(answer)


def _plan(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "placement": CURRENT, "split": even_split(CURRENT), "predicted_par": np.ones(2),
    }  # fmt: skip
    return Plan(**{**fields, **changes})


def _shares(value: float) -> NDArray[np.float64]:
    split = even_split(CURRENT)
    split[1, 2, 0] = value
    return split


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (_plan(split=_shares(0.6)), "layer 1: the shares of expert 0 sum to 1.1, not to 1"),
        (_plan(split=_shares(np.nan)), "layer 1, rank 2: expert 0 has the share nan"),
        (_plan(split=_shares(-0.5)), "layer 1, rank 2: expert 0 has the share -0.5"),
        (_plan(split=np.ones((2, 3))), r"split has the shape \[2, 3\]"),
        (_plan(split="even"), "split is not an array of numbers"),
        (_plan(predicted_par=np.array([1.0, np.inf])), "layer 1: predicted_par is inf"),
        (_plan(predicted_par=np.ones(3)), r"predicted_par has the shape \[3\]"),
        (_plan(predicted_par=None, split=_shares(9.0)), "shares of expert 0 sum to 9.5"),
        (_plan(placement=_with(0, 0, 1)), "layer 1, rank 0: expert 1 sits in 2 slots"),
    ],
)
def test_a_broken_plan_is_refused_by_name(answer: Plan, named: str) -> None:
    with pytest.raises(PolicyError, match=named):
        _checked(answer)


def test_what_a_users_policy_leaves_out_is_filled_in() -> None:
    for answer in (CURRENT, CURRENT.experts, CURRENT.experts.tolist(), _plan()):
        _assert_obeys(_checked(answer), Case(LOAD, CURRENT, Topology(3), "batch"))


def test_experts_that_stay_get_their_slots_back_with_their_shares() -> None:
    turned = np.array(CURRENT.experts[:, :, ::-1])  # the same experts, in other slots
    split = np.array([[[0.3, 0.4], [1.0, 1.0], [0.7, 0.6]]] * 2)
    answer = _plan(placement=Placement(turned, 4), split=split)
    plan = check_plan(answer, LOAD, CURRENT, Topology(3))
    assert plan.placement == CURRENT
    assert np.array_equal(plan.split, split[:, :, ::-1])


def test_an_error_within_a_users_policy_comes_out_as_it_is() -> None:
    def broken(load: Any, current: Placement, topology: Topology) -> Placement:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        make_policy(broken)(LOAD, CURRENT, Topology(3))
