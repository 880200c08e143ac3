"""Config: every wrong value is refused by name, with what to do."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_eplb.runtime.config import Config
from torch_eplb.values.sizes import parse_bytes


def policy(load: Any, placement: Any, topology: Any) -> Any:
    return placement


def is_text(name: str, module: Any) -> bool:
    return name.startswith("text.")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("num_redundant_experts", -1, "at least 0"),
        ("num_redundant_experts", 1.5, "must be an int"),
        ("num_redundant_experts", True, "must be an int"),
        ("layers", "text.*", "write layers=['text.*']"),
        ("layers", [], "None is all"),
        ("layers", [3], "got 3 among them"),
        ("layers", 3, "must be a list of names"),
        ("dispatch", "all-to-all", "'all_to_all', 'all_gather', 'all_reduce', 'external'"),
        ("max_tokens_per_rank", 0, "at least 1"),
        ("max_tokens_per_rank", 8, "is for dispatch='all_gather'"),
        ("replica_choice", "random", "'batch', 'local', 'table', 'even'"),
        ("policy", "eplb", "'deepseek'"),
        ("policy", 3, "a callable or one of"),
        ("collect_interval", 0, "at least 1"),
        ("window", 0, "at least 1"),
        ("plan_seconds", -1.0, "at least 0"),
        ("cost", "guessed", "'auto', 'measured', a pair"),
        ("cost", (1.0,), "a pair"),
        ("cost", (1.0, 0.0), "t_token must be finite and above 0"),
        ("cost", ("1", 2.0), "t_weight must be a number"),
        ("plan_interval", -1, "at least 0"),
        ("layers_per_step", 0, "at least 1"),
        ("staging_bytes", "64 parsecs", "KiB, MiB, GiB"),
        ("staging_bytes", -5, "must not be negative"),
        ("staging_bytes", 1.5, "must be an int"),
        ("bytes_per_step", "", "is not a size"),
        ("phase", "training", "'all', 'prefill', 'decode'"),
        ("timeout", 0, "more than 0 seconds"),
        ("timeout", float("nan"), "finite number"),
        ("timeout", None, "must be a number"),
        ("target_par", 0.9, "at least 1.0"),
        ("min_gain", "much", "must be a number"),
        ("max_moves", -1, "at least 0"),
        ("overlap", "yes", "True or False"),
        ("expert_map", 7, "must be a path"),
        ("num_nodes", 0, "at least 1"),
    ],
)
def test_a_wrong_value_is_refused_by_name(field: str, value: Any, says: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        Config(**{field: value})
    assert field in str(caught.value)
    assert says in str(caught.value)


def test_a_rank_dependent_choice_is_refused_where_ranks_share_tokens() -> None:
    with pytest.raises(ValueError, match="counts it twice"):
        Config(dispatch="all_reduce", replica_choice="local")
    with pytest.raises(ValueError, match="counts of all ranks"):
        Config(dispatch="external", replica_choice="batch")


def test_npus_choose_from_the_table_unless_they_are_told_otherwise() -> None:
    for dispatch, elsewhere in (("external", "local"), ("all_reduce", "batch")):
        config = Config(dispatch=dispatch)
        assert config.on_device("npu").replica_choice == "table"
        assert config.on_device("cuda").replica_choice == elsewhere
        chosen = Config(dispatch=dispatch, replica_choice=elsewhere)
        assert chosen.on_device("npu").replica_choice == elsewhere
    assert Config().on_device("npu").replica_choice == "batch"  # solved on the host


def test_the_default_replica_choice_follows_the_dispatch() -> None:
    assert Config().replica_choice == "batch"
    assert Config(dispatch="all_reduce").replica_choice == "batch"
    assert Config(dispatch="external").replica_choice == "local"


def test_fields_are_frozen_and_sizes_are_bytes() -> None:
    config = Config(staging_bytes="64MiB", bytes_per_step="1.5GB")
    assert config.staging_bytes == 64 * 2**20
    assert config.bytes_per_step == 1_500_000_000
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.timeout = 5  # type: ignore[misc]


def test_the_fingerprint_tells_apart_what_differs() -> None:
    one, other = Config(timeout=5).fingerprint(), Config(timeout=6).fingerprint()
    assert {name for name in one if one[name] != other[name]} == {"timeout"}
    assert Config(policy=policy).fingerprint() == Config(policy=policy).fingerprint()
    assert Config(layers=["a"]).fingerprint() == Config(layers=("a",)).fingerprint()
    assert Config(layers=is_text).fingerprint()["layers"] == "'is_text'"


@given(st.integers(0, 2**40), st.sampled_from(["B", "KiB", "MiB", "kb", "GB", ""]))
def test_sizes_with_units_are_multiples_of_their_unit(number: int, unit: str) -> None:
    scale = {"b": 1, "": 1, "kb": 10**3, "gb": 10**9, "kib": 2**10, "mib": 2**20}[unit.lower()]
    assert parse_bytes(f"{number}{unit}") == pytest.approx(number * scale, rel=1e-12)
