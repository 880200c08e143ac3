"""What vLLM and SGLang call in each of their processes, by the entry points in our metadata.

Nothing happens unless the environment variable ``TORCH_EPLB_POLICY`` names a policy, perhaps with
options: ``flow``, or ``flow,target_par=1.02,max_moves=8``.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Any

__all__ = ["options_from", "sglang", "vllm"]

VARIABLE = "TORCH_EPLB_POLICY"
_OPTIONS = {
    "replica_choice": str,
    "min_gain": float,
    "target_par": float,
    "max_moves": int,
    "plan_seconds": float,
}

logger = logging.getLogger("torch_eplb")


def options_from(text: str) -> tuple[str, dict[str, Any]]:
    """The policy and its options.

    >>> options_from("flow, target_par=1.02,max_moves=8")
    ('flow', {'target_par': 1.02, 'max_moves': 8})

    Raises:
        ValueError: an option that is none, or whose value is no number.
    """
    policy, *words = (word.strip() for word in text.split(","))
    options: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            options[name] = _OPTIONS[name](value)
        except (KeyError, ValueError):
            raise ValueError(
                f"{VARIABLE}={text!r}: {word!r} is no option; write policy, then any of "
                f"{', '.join(_OPTIONS)} as name=value, with commas between"
            ) from None
    return policy, options


def vllm() -> None:
    """Entry point ``vllm.general_plugins``: vLLM, and vLLM-Ascend if it is installed."""
    if _install("vLLM", "vllm") and importlib.util.find_spec("vllm_ascend") is not None:
        _install("vLLM-Ascend", "vllm_ascend")


def sglang() -> None:
    """Entry point ``sglang.srt.plugins``."""
    _install("SGLang", "sglang")


def _install(engine: str, adapter: str) -> bool:
    """Install the adapter with what the variable says; whether there is one."""
    text = os.environ.get(VARIABLE)
    if not text:
        return False
    policy, options = options_from(text)
    importlib.import_module(f"torch_eplb.adapters.{adapter}").install(policy, **options)
    logger.info("%s plans expert placements with torch_eplb: %s", engine, text)
    return True
