"""What ranks tell each other in words, at construction and before whatever they do together."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch_eplb.comm.communicator import Communicator

__all__ = ["agree", "gather_json"]


def gather_json(comm: Communicator, value: Any) -> list[Any]:
    """Every rank's JSON value, in rank order. Collective; blocks.

    Raises:
        PeerLostError: a rank did not come within the time limit.
    """
    everyone = comm.gather_bytes(json.dumps(value).encode(), "comparing what ranks have")
    return [json.loads(data) for data in everyone]


def agree(comm: Communicator, settings: Mapping[str, str] | None, error: Exception | None) -> None:
    """Compare ``settings`` over all ranks; a rank that found an error tells it instead. Collective.

    Raises:
        ValueError: ranks differ (naming each field and its values), or another rank found an
            error; on every rank.
        Exception: ``error`` itself, on the rank that found it.
        PeerLostError: a rank did not come within the time limit.
    """
    everyone = gather_json(comm, {"settings": settings, "error": error and str(error)})
    if error is not None:
        raise error
    failed = [(rank, answer["error"]) for rank, answer in enumerate(everyone) if answer["error"]]
    if failed:
        raise ValueError(
            "the model cannot be wrapped, because of "
            + "; ".join(f"rank {rank}: {message}" for rank, message in failed)
        )
    differing = _differences([answer["settings"] for answer in everyone])
    if differing:
        raise ValueError(
            "ranks must be wrapped with the same settings, but differ in " + " | ".join(differing)
        )


def _differences(everyone: list[dict[str, str]]) -> list[str]:
    """
    >>> _differences([{"a": "1", "b": "x"}, {"a": "2", "b": "x"}, {"a": "1", "b": "x"}])
    ['a: 1 on ranks 0, 2; 2 on rank 1']
    """
    differing = []
    for name in dict.fromkeys(name for settings in everyone for name in settings):
        by_value: dict[str, list[int]] = {}
        for rank, settings in enumerate(everyone):
            by_value.setdefault(settings.get(name, "(missing)"), []).append(rank)
        if len(by_value) > 1:
            listing = "; ".join(
                f"{value} on rank{'s' if len(ranks) > 1 else ''} {_ranges(ranks)}"
                for value, ranks in by_value.items()
            )
            differing.append(f"{name}: {listing}")
    return differing


def _ranges(ranks: Sequence[int]) -> str:
    """
    >>> _ranges([0, 1, 2, 5])
    '0-2, 5'
    """
    parts = []
    for _, run in itertools.groupby(enumerate(ranks), lambda pair: pair[1] - pair[0]):
        members = [rank for _, rank in run]
        parts.append(f"{members[0]}" if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ", ".join(parts)
