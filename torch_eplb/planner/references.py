"""Policies as data: how a policy is named to another interpreter, and found there again."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch_eplb.policies.rebalance import RebalancePolicy

__all__ = ["from_reference", "importable_name", "to_reference"]


def to_reference(policy: str | Callable[..., Any]) -> dict[str, Any] | None:
    """The policy as JSON-able data, or None if only this process has it.

    A policy's name; "module:qualname" of a function; or the latter of a function with DeepSeek's
    signature, with the arguments that `torch_eplb.from_rebalance_experts` was given.
    """
    if isinstance(policy, str):
        return {"name": policy}
    if not isinstance(policy, RebalancePolicy):
        name = importable_name(policy)
        return None if name is None else {"import": name}
    name, fixed = importable_name(policy.function), dict(policy.fixed)
    if name is None or not _survives_json(fixed):
        return None
    return {
        "rebalance_experts": name,
        "tensors": policy.tensors,
        "current": policy.current,
        "fixed": fixed,
    }


def from_reference(reference: Mapping[str, Any]) -> str | Callable[..., Any]:
    """The policy again; imports the user's function where one is named.

    Raises:
        Whatever the import raises; KeyError and others for what `to_reference` cannot make.
    """
    if "name" in reference:
        return str(reference["name"])
    if "import" in reference:
        return _import(reference["import"])
    return RebalancePolicy(
        _import(reference["rebalance_experts"]),
        reference["tensors"],
        reference["current"],
        reference["fixed"],
    )


def importable_name(function: Any) -> str | None:
    """ "module:qualname" when another interpreter can import the very same object, else None.

    What lives in ``__main__``, lambdas, closures, partials and methods of objects cannot; methods
    of classes can.
    """
    module = getattr(function, "__module__", None)
    qualname = getattr(function, "__qualname__", None)
    if not (isinstance(module, str) and isinstance(qualname, str)) or module == "__main__":
        return None
    found: Any = sys.modules.get(module)
    if getattr(found, "__spec__", None) is None:
        return None  # made by hand: an import elsewhere would not find it
    for part in qualname.split("."):
        found = getattr(found, part, None)
    # A class method is a new object at each look, equal to the last one.
    same = found is function or (inspect.ismethod(found) and found == function)
    return f"{module}:{qualname}" if same else None


def _import(name: str) -> Callable[..., Any]:
    module, _, qualname = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    function: Callable[..., Any] = found
    return function


def _survives_json(fields: dict[str, Any]) -> bool:
    try:
        return bool(json.loads(json.dumps(fields, allow_nan=False)) == fields)
    except (TypeError, ValueError, RecursionError):
        return False
