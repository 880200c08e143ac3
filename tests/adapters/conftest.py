"""Other engines' modules, as installed, without the rest of these engines.

``pip install --no-deps sglang vllm vllm-ascend`` brings their Python files (``tox -e engines``).
Their packages' ``__init__`` files import whole servers and device libraries, so `engine` leaves
those out: parent packages are paths only, and what a module takes from elsewhere is given as a
stand-in. The module itself is the engine's, byte for byte.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

Load = Callable[..., Any]
_ENGINES = ("vllm", "vllm_ascend", "sglang", "torch_npu")


def _ours(name: str) -> bool:
    return name.partition(".")[0] in _ENGINES


@pytest.fixture
def engine() -> Iterator[Load]:
    """A function ``(module name, stand-ins)`` to the installed module; skips without it."""
    before = {name: module for name, module in sys.modules.items() if _ours(name)}
    for name in before:
        del sys.modules[name]
    yield _load
    for name in [name for name in sys.modules if _ours(name)]:
        del sys.modules[name]
    sys.modules.update(before)


def _load(name: str, stand_ins: Mapping[str, Mapping[str, Any]] | None = None) -> Any:
    for module, attributes in (stand_ins or {}).items():
        _parents(module)
        vars(_module(module)).update(attributes)
    if not _parents(name):
        pytest.skip(f"{name.partition('.')[0]} is not installed (tox -e engines)")
    return importlib.import_module(name)


def _module(name: str) -> types.ModuleType:
    return sys.modules.setdefault(name, types.ModuleType(name))


def _parents(name: str) -> bool:
    """Puts the packages above ``name`` in place; whether they are installed."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        package = ".".join(parts[:end])
        if package in sys.modules:
            continue
        if end == 1:
            spec = importlib.util.find_spec(package)
            paths = list(spec.submodule_search_locations or []) if spec else []
        else:
            above = sys.modules[package.rpartition(".")[0]].__path__
            paths = [f"{path}/{parts[end - 1]}" for path in above]
        _module(package).__path__ = paths
    return len(parts) == 1 or bool(sys.modules[parts[0]].__path__)
