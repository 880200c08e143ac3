"""Four ranks live life after life with everything at once, and every output is compared.

    TORCH_EPLB_SOAK_SECONDS=3600 TORCH_EPLB_SOAK_SEED=1 python -m pytest tests/soak

A life is one or two wrapped models on one group, of all ranks or two groups at a time, from `wrap`
to their end: under random arguments, with or without padding, narrow ids, DDP around, gradients and
recomputation. In every step each rank compares its output, its gradients and what was counted with
the unwrapped model's; after every commit it compares its slots, byte for byte, with the experts
that they should hold. Faults come at random. What happens when is the same on all ranks and
follows from the seed; what the planner is doing just then does not.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.life import Life, make_groups
from support.ranks import run_ranks
from support.resources import levels
from torch import nn
from torch.utils.checkpoint import checkpoint

RANKS = 4
SECONDS = float(os.environ.get("TORCH_EPLB_SOAK_SECONDS", "8"))
SEED = int(os.environ.get("TORCH_EPLB_SOAK_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)


def settled_resources(like: dict[str, int], patience: float) -> dict[str, int]:
    """Once the threads of the last life have noticed its end, or after ``patience`` seconds."""
    deadline = time.monotonic() + patience
    while (now := levels()) and time.monotonic() < deadline:
        if all(now[name] <= like[name] for name in list(like)[:3]):
            break
        time.sleep(0.05)
    return now


def load_what_torch_loads_late() -> None:
    """So that memory levels of different lives can be compared."""
    layer = nn.parallel.DistributedDataParallel(nn.Linear(1, 1))
    for reentrant in (True, False):
        x = torch.ones(1, 1, requires_grad=True)
        checkpoint(layer.module, x, use_reentrant=reentrant).sum().backward()


def soak(rank: int, world_size: int, seed: int, seconds: float) -> dict[str, Any]:
    # Restart planners quickly, so that lives see their planner come back.
    from torch_eplb.planner import process

    process.BACKOFF_FIRST_SECONDS = 0.05
    counts: Counter[str] = Counter()
    before: dict[str, int] = {}
    groups = make_groups(rank)
    load_what_torch_loads_late()
    end = time.monotonic() + seconds
    going_on = torch.ones(1)
    number = 0
    while bool(going_on):
        life = Life(groups, f"{seed} {number}", counts)
        try:
            life.live()
        except BaseException as error:
            error.add_note(f"in life {number} of seed {seed}, {life!r}")
            raise
        del life
        number += 1
        if number == 2:
            before = settled_resources(dict.fromkeys(levels(), 0), 2.0)
        # However short, it has seen experts move.
        going_on.fill_(time.monotonic() < end or number < 3 or not counts["experts moved"])
        dist.broadcast(going_on, 0)
    after = settled_resources(before, 20.0)
    for name in ("threads", "file descriptors", "child processes"):
        assert after[name] <= before[name], (before, after)
    assert after["MiB"] <= before["MiB"] + 50, (before, after)
    return {"counts": counts, "before": before, "after": after}


def test_a_model_lives_through_everything_at_once_without_a_wrong_output(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with capsys.disabled():
        print(f"\nsoak: TORCH_EPLB_SOAK_SEED={SEED}, {RANKS} ranks, {SECONDS:g} s", flush=True)
    results = run_ranks(soak, RANKS, SEED, SECONDS, timeout=SECONDS + 150)
    counts: Counter[str] = sum((result["counts"] for result in results), Counter())
    faults = {name: n for name, n in counts.items() if name.startswith("fault: ")}
    outcome = {name: n for name, n in counts.items() if name not in faults}
    with capsys.disabled():
        for title, group in (("did", outcome), ("faults injected", faults)):
            print(
                f"  {title}: "
                + ", ".join(
                    f"{name.removeprefix('fault: ')} {n}" for name, n in sorted(group.items())
                )
            )
        print(f"  faults injected in all: {sum(faults.values())}")
        print(f"  wrong outputs: {counts['wrong outputs']}")
        print(f"  rank 0 held {results[0]['before']}, at the end {results[0]['after']}", flush=True)
    assert counts["wrong outputs"] == 0
    assert counts["rebalances"] > 0
    assert counts["experts moved"] > 0
    assert faults
