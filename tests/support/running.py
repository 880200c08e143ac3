"""A balancer's numbers over time, without a balancer: what exporters are shown in tests."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from torch_eplb.exporters.snapshots import Snapshot
from torch_eplb.values.metrics import Stats
from torch_eplb.values.placement import Placement

LAYERS, EXPERTS, RANKS, SLOTS = 3, 8, 2, 5

STATS = Stats(
    step=1234,
    stage="collecting load",
    rebalances=3,
    early_plans=1,
    seconds_since_rebalance=75.0,
    placement_version=7,
    experts_moved=21,
    par_now=[1.0, 1.5, 2.0],
    par_measured=[1.5, 1.25, 1.0],
    par_predicted=[1.01, 1.02, 1.0],
    bytes_sent=3 * 2**20,
    bytes_received=2 * 2**20,
    token_rows_sent=4096,
    token_bytes_sent=2**23,
    active_experts=3.5,
    staging_bytes=2**20,
    staging_bytes_peak=2**19,
    plan_seconds=0.25,
    hook_seconds=1.5,
    migration_seconds=0.5,
    plans_failed=1,
    planner_restarts=2,
    rebalances_abandoned=0,
    writes_failed=0,
    stalled=None,
    disabled=None,
)

LOAD = np.arange(1, 1 + LAYERS * EXPERTS).reshape(LAYERS, EXPERTS)
RANK_LOAD = np.stack([LOAD[:, :4].sum(axis=1), LOAD[:, 4:].sum(axis=1)], axis=1)


class Running:
    """Looks like a balancer, and can be changed."""

    def __init__(self, window: bool = True, **changes: Any) -> None:
        self.now = dataclasses.replace(STATS, **changes)
        self.placement = Placement.initial(LAYERS, EXPERTS, RANKS, SLOTS)
        self.window = (LOAD, RANK_LOAD) if window else None

    def stats(self) -> Stats:
        return self.now

    def window_load(self) -> Any:
        return self.window

    def change(self, **changes: Any) -> None:
        self.now = dataclasses.replace(self.now, **changes)


class Fresh(Running):
    """Before the first collection window has ended."""

    def __init__(self) -> None:
        nothing = [math.nan] * LAYERS
        super().__init__(
            window=False, step=3, rebalances=0, placement_version=0, experts_moved=0,
            seconds_since_rebalance=None, migration_seconds=0.0, par_now=nothing,
            par_measured=nothing, par_predicted=nothing, plans_failed=0, planner_restarts=0,
        )  # fmt: skip


class Collected:
    """An exporter that keeps what it gets."""

    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []

    def export(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)

    def close(self) -> None:
        pass
