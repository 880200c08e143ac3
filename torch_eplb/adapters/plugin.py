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
_OPTIONS = {"replica_choice": str, "min_gain": float, "target_par": float, "max_moves": int}

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
    text = os.environ.get(VARIABLE)
    if not text:
        return
    from torch_eplb.adapters import vllm as engine

    policy, options = options_from(text)
    engine.install(policy, **options)
    logger.info("vLLM plans expert placements with torch_eplb: %s", text)
    if importlib.util.find_spec("vllm_ascend") is not None:
        from torch_eplb.adapters import vllm_ascend

        vllm_ascend.install(policy, **options)
        logger.info("vLLM-Ascend plans expert placements with torch_eplb: %s", text)


def sglang() -> None:
    """Entry point ``sglang.srt.plugins``."""
    text = os.environ.get(VARIABLE)
    if not text:
        return
    from torch_eplb.adapters import sglang as engine

    policy, options = options_from(text)
    engine.install(policy, **options)
    logger.info("SGLang plans expert placements with torch_eplb: %s", text)
