"""Replays: judged honestly, by the planner's own code, with the numbers that are promised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import torch_eplb
from torch_eplb.files.trace import Trace, read_trace
from torch_eplb.offline.replay import NO_BALANCING, Replay, Settings, judge, replay
from torch_eplb.offline.serving import Cycle
from torch_eplb.offline.simulate import simulate
from torch_eplb.policies.split import even_split
from torch_eplb.values.choices import REPLICA_CHOICES
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Plan, Topology

SMALL = Settings(num_ranks=4, num_redundant_experts=4, window=6, interval=5)

KEYS = {
    "par_mean",
    "par_p95",
    "par_max",
    "moves_per_layer_per_rebalance",
    "plan_ms_median",
    "slots_per_layer",
}


def counts_of(steps: int = 24, sources: int = 3, seed: int = 0) -> NDArray[np.int64]:
    """Skewed load of 2 layers x 12 experts, whose hot experts change over time."""
    rng = np.random.default_rng(seed)
    heat = rng.gamma(0.6, 1.0, (1 + steps // 10, 1, 2, 12)).repeat(10, axis=0)[:steps]
    return rng.poisson(200 * np.broadcast_to(heat, (steps, sources, 2, 12)))


def initial_plan(load: NDArray[Any], placement: Placement, topology: Topology) -> Plan:
    return Plan(placement, even_split(placement), np.ones(placement.num_layers))


def test_without_balancing_the_initial_placement_is_judged_with_an_even_split() -> None:
    counts = np.zeros((3, 2, 1, 4), dtype=np.uint16)
    counts[1:, :, 0] = [30, 10, 5, 5]  # 60 + 20 + 10 + 10 tokens a step
    # Ranks hold (0, 1, 2) and (3, 0, 1): 30 + 10 + 10 against 10 + 30 + 10.
    result = replay(
        counts,
        Settings(num_ranks=2, num_redundant_experts=2, window=1),
        NO_BALANCING,
        "even",
    )
    assert result.par.tolist() == [[1.0], [1.0]]
    assert result.peak_tokens.tolist() == [[50.0], [50.0]]
    # Without redundant experts: (0, 1) against (2, 3).
    result = replay(counts, Settings(num_ranks=2, window=1), NO_BALANCING, "even")
    assert result.par.tolist() == [[1.6], [1.6]]
    assert result.rank_load.tolist() == [[1.6, 0.4]]
    assert result.moved.size == 0


@pytest.mark.parametrize("choice", REPLICA_CHOICES)
def test_no_token_is_lost_whatever_the_replica_choice(choice: str) -> None:
    counts = counts_of()
    placement = Placement.initial(2, 12, 4, 4)
    loads = judge(counts, placement, even_split(placement), choice)
    assert loads.shape == (24, 2, 4)
    assert np.allclose(loads.sum(axis=2), counts.sum(axis=(1, 3)))


def test_the_batch_split_is_at_least_as_good_as_any_other() -> None:
    # Every rank shares an expert with the next one.
    ranks = [[3 * r, 3 * r + 1, 3 * r + 2, (3 * r + 3) % 12] for r in range(4)]
    placement = Placement(np.array([ranks, ranks]), 12)
    counts, split = counts_of(), even_split(placement)
    peak = {c: judge(counts, placement, split, c).max(axis=2) for c in REPLICA_CHOICES}
    for choice in ("local", "table", "even"):
        assert (peak["batch"] <= peak[choice] * 1.002 + 1e-9).all()
    assert peak["batch"].mean() < peak["local"].mean() < peak["even"].mean()


def test_local_splits_each_source_ranks_tokens_alone() -> None:
    # Expert 0 on both ranks. Source 0 has only expert 0, source 1 only expert 1 (on rank 0).
    placement = Placement(np.array([[[0, 1], [2, 0]]]), 3)
    counts = np.array([[[[80, 0, 0]], [[0, 80, 0]]]])
    split = even_split(placement)
    assert np.allclose(judge(counts, placement, split, "local"), [[[120, 40]]], atol=0.5)
    assert np.allclose(judge(counts, placement, split, "batch"), [[[80, 80]]], atol=0.5)


@settings(max_examples=20)
@given(st.integers(7, 23), st.sampled_from(["deepseek", "flow"]))
def test_the_future_never_changes_how_the_past_is_judged(change: int, policy: str) -> None:
    counts = counts_of()
    other = counts.copy()
    other[change:] = counts_of(seed=1)[change:]
    before = slice(0, change - SMALL.window)
    ours = replay(counts, SMALL, policy, "even")
    theirs = replay(other, SMALL, policy, "even")
    assert np.array_equal(ours.par[before], theirs.par[before])


def test_plans_are_made_at_every_interval_and_only_from_the_window_before() -> None:
    counts = counts_of()
    seen: list[NDArray[Any]] = []

    def spy(load: NDArray[Any], placement: Placement, topology: Topology) -> Plan:
        seen.append(load)
        return initial_plan(load, placement, topology)

    result = replay(counts, SMALL, spy, "even")
    assert result.plan_steps.tolist() == [6, 11, 16, 21]
    assert result.policy == "spy"
    for step, load in zip(result.plan_steps, seen, strict=True):
        assert np.array_equal(load, counts[step - 6 : step].sum(axis=1))


def test_a_policy_sees_no_more_samples_than_the_runtime_keeps() -> None:
    seen: list[int] = []

    def spy(load: NDArray[Any], placement: Placement, topology: Topology) -> Plan:
        seen.append(len(load))
        return initial_plan(load, placement, topology)

    replay(counts_of(60), Settings(num_ranks=4, window=50, max_samples=32), spy, "even")
    assert seen == [25]


def test_a_policy_that_moves_nothing_equals_no_balancing() -> None:
    counts = counts_of()
    static = replay(counts, SMALL, "static", "even")
    nothing = replay(counts, SMALL, NO_BALANCING, "even")
    assert np.array_equal(static.par, nothing.par)
    assert static.moved.sum() == 0
    assert static.travelled.sum() == 0


def test_balancing_lowers_par_on_a_load_that_stays() -> None:
    counts = np.broadcast_to(counts_of(1), (24, 3, 2, 12))
    pars = {
        policy: replay(counts, SMALL, policy, "batch").par.mean()
        for policy in (NO_BALANCING, "deepseek", "flow")
    }
    assert pars["deepseek"] < pars[NO_BALANCING]
    assert pars["flow"] < pars[NO_BALANCING]


def test_a_plan_that_is_refused_leaves_the_placement_and_is_reported() -> None:
    def broken(load: NDArray[Any], placement: Placement, topology: Topology) -> Plan:
        raise RuntimeError("out of ideas")

    result = replay(counts_of(), SMALL, broken, "even")
    assert np.array_equal(result.par, replay(counts_of(), SMALL, NO_BALANCING, "even").par)
    assert [step for step, _ in result.refusals] == [6, 11, 16, 21]
    assert "out of ideas" in result.refusals[0][1]
    document = simulate(Trace(counts_of()), SMALL, [broken], ["even"])
    assert document["policies"]["broken"]["refusals"][0][0] == 6


def test_steps_without_tokens_are_balanced() -> None:
    counts = np.zeros((12, 1, 1, 8), dtype=np.uint16)
    document = simulate(Trace(counts), Settings(num_ranks=4, window=4, interval=4), ["deepseek"])
    assert document["policies"]["deepseek"]["par_max"] == 1
    assert document["policies"]["deepseek"]["step_ms"] >= 0
    json.dumps(document, allow_nan=False)


def test_the_document_has_the_promised_numbers_and_is_json() -> None:
    document = simulate(Trace(counts_of()), SMALL, ["deepseek", "static"])
    assert list(document["policies"]) == ["none", "deepseek", "static"]
    for entry in document["policies"].values():
        assert set(entry) >= KEYS
        assert entry["slots_per_layer"] == 16
        assert len(entry["par_series"]) == 18
        assert entry["par_mean"] <= entry["par_p95"] <= entry["par_max"]
        assert entry["par_mean"] == pytest.approx(np.mean(entry["par_series"]), abs=1e-4)
    moved = document["policies"]["deepseek"]
    assert moved["moves_per_layer_per_rebalance"] > 0
    assert moved["bytes_per_rebalance"] > 0
    assert moved["rebalances"] == 4
    assert moved["step_ms"] == pytest.approx(moved["compute_ms"] + moved["migration_ms"])
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_several_replica_choices_are_labelled_apart() -> None:
    document = simulate(Trace(counts_of()), SMALL, ["static"], ["batch", "even", "batch"])
    assert list(document["policies"]) == ["none", "static+batch", "static+even"]
    assert document["policies"]["static+batch"]["replica_choice"] == "batch"


def test_layers_are_repeated_and_steps_are_cut() -> None:
    document = simulate(Trace(counts_of()), SMALL, ["static"], num_steps=10, num_layers=5)
    assert document["trace"]["steps"] == 10
    assert document["trace"]["layers"] == 5
    assert document["trace"]["recorded_layers"] == 2
    load = document["expert_load"]
    assert load[0] == load[2] == load[4]
    assert load[1] == load[3] != load[0]


def test_progress_is_told_of_every_interval() -> None:
    told: list[tuple[str, int, int]] = []
    simulate(Trace(counts_of()), SMALL, ["static"], progress=lambda *args: told.append(args))
    assert told[:4] == [("none", 5, 18), ("none", 10, 18), ("none", 15, 18), ("none", 18, 18)]
    assert told[4:] == [("static", done, 18) for _, done, _ in told[:4]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_ranks": 0}, "num_ranks must be at least 1"),
        ({"num_ranks": 5}, "12 experts and 4 redundant ones cannot be spread over 5 ranks"),
        ({"num_redundant_experts": -1}, "num_redundant_experts must not be negative"),
        ({"num_redundant_experts": 400}, "a rank can hold at most 12"),
        ({"window": 24}, "a window of 24 steps leaves none of 24 steps"),
        ({"window": 0}, "window must be at least 1"),
        ({"interval": 0}, "interval must be at least 1"),
        ({"num_nodes": 3}, "must be a multiple of num_nodes"),
    ],
)
def test_settings_that_cannot_be_replayed_are_refused(
    changes: dict[str, int], message: str
) -> None:
    values = {"num_ranks": 4, "num_redundant_experts": 4, "window": 6, "interval": 5, **changes}
    with pytest.raises(ValueError, match=message):
        replay(counts_of(), Settings(**values), "static", "even")  # type: ignore[arg-type]


def test_the_shipped_trace_gives_the_published_numbers_without_balancing() -> None:
    path = Path(__file__).parents[2] / "examples" / "data" / "trace.npz"
    assert path.stat().st_size < 2_000_000
    trace = read_trace(path)
    for redundant, expected in ((8, 1.2923), (16, 1.4077)):
        nothing = replay(
            trace.counts,
            Settings(num_ranks=8, num_redundant_experts=redundant),
            NO_BALANCING,
            "even",
        )
        assert nothing.par.mean() == pytest.approx(expected, abs=1e-4)


def test_unknown_names_and_sizes_are_refused() -> None:
    trace = Trace(counts_of())
    with pytest.raises(ValueError, match=r"policy must be one of .* got 'magic'"):
        simulate(trace, SMALL, ["magic"])
    with pytest.raises(ValueError, match=r"replica_choice must be one of .* got 'magic'"):
        simulate(trace, SMALL, ["static"], ["magic"])
    with pytest.raises(ValueError, match="steps must be from 1 to the trace's 24, got 25"):
        simulate(trace, SMALL, ["static"], num_steps=25)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        simulate(trace, SMALL, ["static"], num_layers=0)


def switched(steps: int = 400, at: int = 200, experts: int = 16) -> np.ndarray:
    """``[steps, 1, 2, experts]``: hot are the first experts, then the last ones."""
    load = np.full((steps, 1, 2, experts), 20)
    load[:at, ..., :4] = 100
    load[at:, ..., -4:] = 100
    return load


def served(**cycle: Any) -> Replay:
    settings = Settings(num_ranks=4, cycle=Cycle(**cycle))
    return replay(switched(), settings, "flow", "batch")


def test_a_server_plans_early_after_its_start_and_after_a_switch() -> None:
    result = served()
    assert len(result.par) == 400
    assert len(result.plan_steps) == 2
    # A look of 19 steps, read 11 steps later; a third of a window; planning.
    assert result.plan_steps[0] == 19 + 11 + 16 + 10
    assert 200 + 16 + 10 < result.plan_steps[1] < 200 + 2 * 19 + 11 + 16 + 10 + 1
    first, second = result.plan_steps.tolist()
    moving = 2 * int(result.rounds.max())
    assert (result.par[:first] > 1.9).all()
    assert (result.par[first + moving : 200] < 1.1).all()
    assert (result.par[second + moving :] < 1.1).all()


def test_a_server_without_early_plans_waits_for_its_clock() -> None:
    result = served(replan_above=None, collect_interval=100, plan_interval=20)
    # The second collection begins when the last round of the first plan is done.
    second = 120 + 2 * int(result.rounds[0]) + 120
    assert result.plan_steps[:2].tolist() == [120, second]
    slow = served(replan_above=None, collect_interval=100, plan_interval=0, plan_steps=30)
    assert slow.plan_steps[0] == 130
    assert len(served(replan_above=None).plan_steps) == 0


def test_layers_move_one_after_another() -> None:
    result = served(replan_above=None, collect_interval=100, plan_interval=20)
    done = [int(np.argmax(result.par[:, layer] < 1.1)) for layer in (0, 1)]
    assert 120 <= done[0] != done[1] <= 120 + 2 * int(result.rounds[0])


def test_none_and_a_policy_judge_the_same_steps() -> None:
    settings = Settings(num_ranks=4, cycle=Cycle())
    document = simulate(Trace(switched().astype(np.uint16)), settings, ["flow"])
    lengths = {len(entry["par_series"]) for entry in document["policies"].values()}
    assert lengths == {400}
    assert document["settings"]["cycle"]["collect_interval"] == 600


def test_wrong_cycles_are_refused() -> None:
    with pytest.raises(ValueError, match=r"collect_interval \(20\) must be at least window \(50\)"):
        Settings(num_ranks=2, cycle=Cycle(collect_interval=20))
    with pytest.raises(ValueError, match=r"replan_above must be at least 1, got 0\.5"):
        Cycle(replan_above=0.5)


def test_a_replayed_server_has_the_defaults_of_wrap() -> None:
    wrapped = torch_eplb.Config()
    assert Cycle() == Cycle(
        collect_interval=wrapped.collect_interval,
        plan_interval=wrapped.plan_interval,
        replan_above=wrapped.replan_above,
    )
    assert Settings(num_ranks=2).window == wrapped.window
