"""One environment variable brings a policy into a server."""

from __future__ import annotations

import configparser
import importlib
from pathlib import Path
from typing import Any

import pytest

from torch_eplb.adapters import plugin
from torch_eplb.adapters import sglang as sglang_adapter
from torch_eplb.adapters import vllm as vllm_adapter


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    for module in (vllm_adapter, sglang_adapter):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(
            module, "install", lambda policy, name=name, **more: calls.append((name, policy, more))
        )
    return calls


def test_without_the_variable_nothing_happens(
    installed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_EPLB_POLICY", raising=False)
    plugin.vllm()
    plugin.sglang()
    assert installed == []


def test_the_variable_names_policy_and_options(
    installed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EPLB_POLICY", "flow, target_par=1.02,max_moves=8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plugin.vllm()
    plugin.sglang()
    options = {"target_par": 1.02, "max_moves": 8}
    assert installed == [("vllm", "flow", options), ("sglang", "flow", options)]


@pytest.mark.parametrize("text", ["flow,target=1", "flow,max_moves=many", "flow,"])
def test_what_is_no_option_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no option; write policy, then any of replica_choice"):
        plugin.options_from(text)


def test_the_entry_points_in_our_metadata_exist() -> None:
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[2] / "setup.cfg")
    groups = config["options.entry_points"]
    assert set(groups) == {"vllm.general_plugins", "sglang.srt.plugins"}
    for line in groups.values():
        _, target = (part.strip() for part in line.strip().split("="))
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
