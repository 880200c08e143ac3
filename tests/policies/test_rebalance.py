"""DeepSeek's entry point with our policies behind it, and functions of its kind as policies."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import torch_eplb
from torch_eplb.policies.deepseek import groups_on_nodes, node_bound
from torch_eplb.policies.rebalance import from_rebalance_experts, rebalance_experts
from torch_eplb.policies.registry import POLICIES, PolicyError, check_plan, make_policy
from torch_eplb.policies.split import even_split, rank_loads
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology

# The example of DeepSeek's README, and what it prints.
WEIGHT = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
SIZES = (16, 4, 2, 8)
EXPECTED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


class Case(NamedTuple):
    weight: NDArray[np.float64]
    sizes: tuple[int, int, int, int]
    """num_replicas, num_groups, num_nodes, num_gpus"""


@st.composite
def cases(draw: st.DrawFn, samples: bool = False) -> Case:
    nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    gpus = nodes * per_node
    groups = draw(st.sampled_from([1, nodes, 2 * nodes, 5]))
    experts = groups * draw(st.integers(1, 6))
    slots = -(-experts // gpus) + draw(st.integers(0, 3))
    shape = (draw(st.integers(1, 3)), experts)
    if samples and draw(st.booleans()):
        shape = (draw(st.integers(1, 3)), *shape)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = rng.lognormal(3.0, draw(st.sampled_from([0.0, 1.0, 4.0])), shape)
    if draw(st.booleans()):
        weight = weight * (rng.random(shape) < 0.3)
    return Case(np.floor(weight), (slots * gpus, groups, nodes, gpus))


def topology_of(sizes: tuple[int, int, int, int]) -> Topology:
    _, groups, nodes, gpus = sizes
    return Topology(gpus, nodes, groups)


def highest(weight: NDArray[Any], phy2log: Any, gpus: int) -> NDArray[np.float64]:
    """``[layers]``: the load of the busiest GPU, where replicas share evenly."""
    experts = weight.shape[-1]
    placement = Placement.from_phy2log(phy2log, gpus, experts, allow_duplicates=True)
    load = weight.reshape(-1, *weight.shape[-2:]).mean(axis=0)
    return rank_loads(load, placement, even_split(placement)).max(axis=2)[0]


# -- ours under their name ------------------------------------------------------------------------


def test_the_published_example_comes_out_for_tensors_as_for_arrays() -> None:
    ours = torch_eplb.rebalance_experts(torch.tensor(WEIGHT), *SIZES)
    assert ours[0].tolist() == EXPECTED
    assert [tuple(part.shape) for part in ours] == [(2, 16), (2, 12, 2), (2, 12)]
    for part, array in zip(ours, rebalance_experts(WEIGHT, *SIZES), strict=True):
        assert isinstance(part, torch.Tensor)
        assert isinstance(array, np.ndarray)
        assert part.dtype == torch.int64
        assert array.dtype == np.int64
        assert part.device.type == "cpu"
        assert np.array_equal(part.numpy(), array)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_of_any_number_that_requires_grad_or_not_are_taken(dtype: torch.dtype) -> None:
    weight = torch.tensor(WEIGHT).to(dtype)
    weight.requires_grad_(dtype.is_floating_point)
    phy2log, _, _ = rebalance_experts(weight, *SIZES)
    assert phy2log.tolist() == EXPECTED


@given(case=cases(samples=True))
@settings(max_examples=60)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_answers_three_arrays_that_agree(policy: str, case: Case) -> None:
    weight, sizes = case
    experts, (replicas, _, _, gpus) = weight.shape[-1], sizes
    phy2log, log2phy, logcnt = rebalance_experts(weight, *sizes, policy=policy)
    layers = weight.shape[-2]
    assert phy2log.shape == (layers, replicas)
    assert log2phy.shape == (layers, experts, logcnt.max())
    assert logcnt.shape == (layers, experts)
    for layer in range(layers):
        assert np.bincount(phy2log[layer], minlength=experts).tolist() == logcnt[layer].tolist()
        assert (logcnt[layer] >= 1).all()
        for expert, slots in enumerate(log2phy[layer]):
            used = slots[: logcnt[layer, expert]]
            assert (phy2log[layer, used] == expert).all()
            assert len(set(used)) == len(used)
            assert (slots[len(used) :] == -1).all()
    # Only the published algorithm puts two replicas of an expert on one GPU.
    Placement.from_phy2log(phy2log, gpus, experts, allow_duplicates=policy == "deepseek")


@pytest.mark.parametrize("policy", ["flow", "flashlb", "swift"])
def test_other_policies_balance_the_published_example_as_well(policy: str) -> None:
    phy2log, _, _ = rebalance_experts(WEIGHT, *SIZES, policy=policy)
    assert highest(WEIGHT, phy2log, 8).tolist() == highest(WEIGHT, EXPECTED, 8).tolist()


def test_moves_cost_nothing_where_nothing_is_live() -> None:
    weight = np.random.default_rng(0).lognormal(3.0, 1.0, (4, 64))
    sizes, mean = (80, 1, 1, 8), weight.sum(axis=1) / 8
    anew, _, _ = rebalance_experts(weight, *sizes, policy="flow")
    assert (highest(weight, anew, 8) / mean < 1.01).all()
    live = Placement.initial(4, 64, 8, 10).phy2log
    few, _, _ = rebalance_experts(weight, *sizes, policy="flow", current=live)
    assert (few != live).sum() < (anew != live).sum()


def test_torch_is_not_imported_for_arrays() -> None:
    program = (
        "import sys, torch_eplb as eplb; "
        f"print(eplb.rebalance_experts({WEIGHT.tolist()}, *{SIZES})[0].tolist()); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == f"{EXPECTED}\nFalse\n"


def test_groups_that_do_not_divide_over_nodes_do_not_count_nor_do_the_nodes() -> None:
    def seen(load: Any, current: Placement, topology: Topology) -> Placement:
        seen_by.append(topology)
        return current

    seen_by: list[Topology] = []
    rebalance_experts(WEIGHT, 15, 3, 2, 5, policy=seen)
    rebalance_experts(WEIGHT, 16, 4, 2, 8, policy=seen)
    assert seen_by == [Topology(5), Topology(8, 2, 4)]


def test_a_policy_sees_every_sample_and_the_published_algorithm_their_mean() -> None:
    samples = np.stack([WEIGHT * 0, WEIGHT * 2])
    seen: list[NDArray[Any]] = []
    rebalance_experts(
        samples, *SIZES, policy=lambda load, current, _: (seen.append(load), current)[1]
    )
    assert np.array_equal(seen[0], samples)
    assert rebalance_experts(samples, *SIZES)[0].tolist() == EXPECTED


def test_experts_that_stay_on_their_gpu_keep_their_slot() -> None:
    turned = np.array(EXPECTED).reshape(2, 8, 2)[:, :, ::-1].reshape(2, 16)
    assert np.array_equal(rebalance_experts(WEIGHT, *SIZES, current=turned)[0], turned)


def test_flow_moves_only_what_pays_away_from_the_live_placement() -> None:
    tensor = torch.tensor(EXPECTED)
    stay, _, _ = rebalance_experts(WEIGHT, *SIZES, policy="flow", current=tensor)
    assert stay.tolist() == EXPECTED
    drifted = WEIGHT.copy()
    drifted[1, 3] += 200
    anew, _, _ = rebalance_experts(drifted, *SIZES, current=tensor)
    for options in ({"min_gain": 0.03}, {"max_moves": 2}):
        few, _, _ = rebalance_experts(drifted, *SIZES, policy="flow", current=tensor, **options)
        moved = (few != EXPECTED).sum(axis=1)
        assert moved[0] == 0
        assert 0 < moved[1] < (anew[1] != EXPECTED[1]).sum()
        assert moved[1] <= options.get("max_moves", 16)
        assert (highest(drifted, few, 8) <= highest(drifted, EXPECTED, 8)).all()


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"weight": WEIGHT[0]}, ValueError, r"weight must have the shape .* got \[12\]"),
        ({"weight": WEIGHT[:0]}, ValueError, r"each at least 1, got \[0, 12\]"),
        ({"weight": [[1, 2], [3]]}, ValueError, "weight must be an array .* inhomogeneous"),
        ({"weight": WEIGHT.astype(str)}, TypeError, "weight must be an array of numbers"),
        ({"weight": WEIGHT - 4.5}, ValueError, "got -0.5 at layer 0, expert 7"),
        (
            {"weight": [WEIGHT, WEIGHT + np.inf]},
            ValueError,
            "got inf at sample 1, layer 0, expert 0",
        ),
        ({"num_replicas": 15}, ValueError, r"num_replicas \(15\) must be a multiple of num_gpus"),
        ({"num_replicas": 8}, ValueError, r"num_replicas \(8\) cannot hold 12 experts"),
        ({"num_groups": 8}, ValueError, r"experts \(12\) must be a multiple of num_groups \(8\)"),
        ({"num_gpus": 4, "num_nodes": 0}, ValueError, "num_nodes must be at least 1, got 0"),
        ({"num_nodes": 1, "num_gpus": -8}, ValueError, "num_gpus must be at least 1, got -8"),
        ({"policy": "no such"}, ValueError, "policy must be a callable or one of .* 'no such'"),
        ({"current": EXPECTED[:1]}, ValueError, r"current must .* = \[2, 16\], got \[1, 16\]"),
        ({"current": np.zeros((2, 16))}, TypeError, "current is no placement: phy2log must be"),
        ({"current": np.zeros((2, 16), int)}, ValueError, "current is no placement: layer 0: exp"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(
    changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    names = ("num_replicas", "num_groups", "num_nodes", "num_gpus")
    given = {"weight": WEIGHT, **dict(zip(names, SIZES, strict=True)), **changes}
    with pytest.raises(error, match=says):
        rebalance_experts(**given)


# -- theirs as a policy ---------------------------------------------------------------------------


@given(case=cases())
@settings(max_examples=150)
def test_their_answer_as_a_policy_obeys_the_contract_and_keeps_what_it_can(case: Case) -> None:
    weight, sizes = case
    _, groups, nodes, gpus = sizes
    if groups % nodes:
        nodes = groups = 1
    topology = Topology(gpus, nodes, groups)
    current = Placement.initial(len(weight), weight.shape[1], gpus, sizes[0] // gpus)
    answered = from_rebalance_experts(rebalance_experts)(weight[None], current, topology)
    plan = check_plan(answered, weight, current, topology)
    phy2log, _, logcnt = rebalance_experts(weight, sizes[0], groups, nodes, gpus)
    theirs = Placement.from_phy2log(phy2log, gpus, weight.shape[1], allow_duplicates=True)
    doubled = (theirs.held().sum(axis=1) != theirs.num_slots).any(axis=1)
    assert np.array_equal(answered.experts[~doubled], theirs.experts[~doubled])
    bound = node_bound(current, topology)
    within = gpus // nodes if bound else gpus
    fits = (logcnt <= within).all(axis=1)
    assert np.array_equal(plan.placement.replica_counts()[fits], logcnt[fits])
    if bound:
        assert groups_on_nodes(answered, topology).all()


def test_more_replicas_than_ranks_go_to_the_next_heaviest_experts() -> None:
    def hot(weight: Any, *_: int) -> list[list[int]]:
        return [[0, 0, 0, 0, 1, 2], [0, 1, 2, 0, 1, 2]]

    current = Placement.initial(2, 3, 2, 3)
    load = np.array([[[90.0, 2.0, 8.0]] * 2])
    placed = from_rebalance_experts(hot)(load, current, Topology(2))
    assert placed.replica_counts().tolist() == [[2, 2, 2], [2, 2, 2]]
    assert placed.held().all()
    three = Placement.initial(1, 3, 2, 2)
    placed = from_rebalance_experts(lambda *_: [[0, 0, 1, 2]])(load[:, :1], three, Topology(2))
    assert placed.replica_counts().tolist() == [[2, 1, 1]]
    assert sorted(map(sorted, placed.experts[0].tolist())) == [[0, 1], [0, 2]]


def recorded(answer: Any) -> tuple[list[tuple[Any, ...]], Any]:
    calls: list[tuple[Any, ...]] = []

    def function(weight: Any, *sizes: int, **keywords: Any) -> Any:
        calls.append((weight, sizes, keywords))
        return answer

    return calls, function


CURRENT = Placement.initial(2, 12, 8, 2)
SAMPLES = np.stack([WEIGHT * 0, WEIGHT * 2])


def test_it_is_asked_with_deepseeks_arguments_and_the_mean_of_the_samples() -> None:
    calls, function = recorded((np.array(EXPECTED), None, None))
    policy = from_rebalance_experts(function, current="old", enable_hierarchical=True)
    placed = policy(SAMPLES, CURRENT, Topology(8, 2, 4))
    assert placed.phy2log.tolist() == EXPECTED
    ((weight, sizes, keywords),) = calls
    assert weight.dtype == np.float64
    assert np.array_equal(weight, WEIGHT)
    assert sizes == SIZES
    assert np.array_equal(keywords.pop("old"), CURRENT.phy2log)
    assert keywords == {"enable_hierarchical": True}


def test_it_is_asked_with_tensors_where_its_annotation_or_the_caller_says_so() -> None:
    def annotated(weight: torch.Tensor, *sizes: int) -> Any:
        return function(weight, *sizes)

    def quoted(weight: torch.Tensor | None, *sizes: int) -> Any:
        return function(weight, *sizes)

    for chosen, tensors in ((annotated, None), (quoted, None), ("plain", True)):
        calls, function = recorded(torch.tensor(EXPECTED))
        theirs = function if chosen == "plain" else chosen
        placed = from_rebalance_experts(theirs, tensors=tensors)(SAMPLES, CURRENT, Topology(8))
        assert placed.phy2log.tolist() == EXPECTED
        weight = calls[0][0]
        assert isinstance(weight, torch.Tensor)
        assert weight.dtype == torch.float32
        assert weight.tolist() == WEIGHT.tolist()
    calls, function = recorded(torch.tensor(EXPECTED))
    from_rebalance_experts(annotated, tensors=False)(SAMPLES, CURRENT, Topology(8))
    assert isinstance(calls[0][0], np.ndarray)
    calls, function = recorded(torch.tensor(EXPECTED))
    policy = from_rebalance_experts(function, tensors=True, current="live")
    policy(SAMPLES, CURRENT, Topology(8))
    assert torch.equal(calls[0][2]["live"], torch.from_numpy(CURRENT.phy2log))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (None, r"answer of .*function is wrong: phy2log must have the shape"),
        ((np.zeros((2, 16)), None, None), "is wrong: phy2log must be an integer array"),
        (np.zeros((2, 16), int), "is wrong: layer 0: expert 1 has no slot"),
        (np.array(EXPECTED)[:1], r"\[layers, num_replicas\] = \[2, 16\], got \[1, 16\]"),
        (np.array(EXPECTED)[:, :15], r"15 physical experts .* multiple of num_ranks \(8\)"),
    ],
)
def test_an_answer_that_is_no_placement_is_the_policys_fault(answer: Any, says: str) -> None:
    _, function = recorded(answer)
    policy = make_policy(from_rebalance_experts(function))
    with pytest.raises(PolicyError, match=says):
        policy(SAMPLES, CURRENT, Topology(8))


@pytest.mark.parametrize(
    ("function", "keywords", "says"),
    [
        ("eplb.rebalance_experts", {}, "takes a function, got 'eplb.rebalance_experts'"),
        (lambda weight, num_replicas: None, {}, "cannot be called with .* too many positional"),
        (lambda a, b, c, d, e, f: None, {}, "missing a required argument: 'f'"),
        (lambda a, b, c, num_nodes, e: None, {"num_nodes": 2}, "multiple values .* wrap's num_nod"),
        (lambda a, b, c, d, e: None, {"algorithm": 1}, "keywords .'algorithm'.: got an unexpected"),
        (lambda a, b, c, d, e: None, {"current": "old"}, "unexpected keyword argument 'old'"),
    ],
)
def test_a_function_that_cannot_be_called_like_theirs_is_refused_at_once(
    function: Any, keywords: dict[str, Any], says: str
) -> None:
    with pytest.raises(TypeError, match=says):
        from_rebalance_experts(function, **keywords)


def test_ranks_can_tell_two_of_them_apart() -> None:
    def fingerprint(**fixed: Any) -> str:
        policy = from_rebalance_experts(rebalance_experts, **fixed)
        return torch_eplb.Config(policy=policy).fingerprint()["policy"]

    assert "rebalance.rebalance_experts, tensors=False, current=None" in fingerprint()
    assert fingerprint() != fingerprint(policy="flow")
    assert fingerprint() == fingerprint()
