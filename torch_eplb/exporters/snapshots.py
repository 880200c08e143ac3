"""What a balancer knows at one moment, as plain host data: `Snapshot`.

Imports numpy only.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from torch_eplb.values.metrics import Stats
from torch_eplb.values.placement import Placement

__all__ = ["Exporter", "Snapshot", "Source", "snapshot"]


class Source(Protocol):
    """What is exported: an `ExpertLoadBalancer`.

    A source may also have ``window_load()``: the load of the last collection window summed over
    ranks, ``([layers, experts], [layers, ranks])`` int64 on the host, or None before there is one.
    """

    def stats(self) -> Stats: ...

    @property
    def placement(self) -> Placement: ...


class Exporter(Protocol):
    """Where snapshots go. Called by one thread at a time."""

    def export(self, snapshot: Snapshot) -> None: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """A balancer at one moment, on one rank.

    Attributes:
        time: seconds since 1970.
        rank: of the process.
        stats: the fields of `torch_eplb.Stats` by name.
        placement: int32 ``[layers, ranks, slots]``, or None.
        load: int64 ``[layers, experts]``, tokens of the last collection window over all ranks; None
            before the first one, or where the source does not tell.
        rank_load: int64 ``[layers, ranks]``, the same by the rank whose slot was chosen; or None.
        labels: what tells this source from others.
    """

    time: float
    rank: int
    stats: dict[str, Any]
    placement: NDArray[np.int32] | None = None
    load: NDArray[np.int64] | None = None
    rank_load: NDArray[np.int64] | None = None
    labels: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for snapshots of one source on one rank."""
        return (self.rank, *sorted(self.labels.items()))


def snapshot(
    source: Source, *, rank: int | None = None, labels: Mapping[str, str] | None = None
) -> Snapshot:
    """What ``source`` knows now. Waits for nothing; any thread may call it.

    Args:
        source: the balancer.
        rank: of the process; None asks torch.distributed, and is 0 without it.
        labels: for programs with several balancers, for example ``{"model": "draft"}``.
    """
    stats = dataclasses.asdict(source.stats())
    window = getattr(source, "window_load", None)
    load, rank_load = (None, None) if window is None else window() or (None, None)
    return Snapshot(
        time.time(),
        _process_rank() if rank is None else rank,
        stats,
        source.placement.experts,
        load,
        rank_load,
        dict(labels or {}),
    )


def _process_rank() -> int:
    # Looked up, not imported: without torch there is no rank.
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 0
    return int(distributed.get_rank())
