"""What a step costs: a model of compute and migration time, for comparing policies.

It knows neither attention nor the dispatch of tokens, so it says how policies differ, not how long
a step takes. Imports numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.schedule.schedule import SOURCE_RANK, TARGET_RANK, Round, Schedule

__all__ = ["HARDWARE", "CostModel", "Hardware", "traffic"]


@dataclass(frozen=True)
class Hardware:
    """What one rank can do.

    Attributes:
        flops_per_second: dense BF16 peak.
        link_bytes_per_second: what a rank can send, and at the same time receive.
        efficiency: share of the peak that grouped matrix products reach.
        source: where the numbers are from, and which are assumptions.
    """

    flops_per_second: float
    link_bytes_per_second: float
    efficiency: float
    source: str

    def __post_init__(self) -> None:
        for name in ("flops_per_second", "link_bytes_per_second", "efficiency"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a finite number above 0, got {value}")


HARDWARE = {
    "ascend-910c": Hardware(
        flops_per_second=376e12,
        link_bytes_per_second=196e9,
        efficiency=0.5,
        source=(
            "one die of an Ascend 910C, which is one rank: half of the package's 752 TFLOPS BF16 "
            "and of its 392 GB/s of unified bus in each direction (Zuo et al., Serving Large "
            "Language Models on Huawei CloudMatrix384, arXiv:2506.12708); the efficiency of 50% "
            "is an assumption"
        ),
    ),
    "h100": Hardware(
        flops_per_second=989e12,
        link_bytes_per_second=450e9,
        efficiency=0.5,
        source=(
            "one H100 SXM: 989 TFLOPS BF16 without sparsity, half of NVLink's 900 GB/s for each "
            "direction (NVIDIA H100 Tensor Core GPU datasheet); between nodes a link has a "
            "fraction of that; the efficiency of 50% is an assumption"
        ),
    ),
}
"""Presets. Peak rates are published; that ranks reach half of them is assumed, for both alike."""


@dataclass(frozen=True)
class CostModel:
    """Time of a step, of migration, and the numbers that they follow from.

    Attributes:
        hardware: what one rank can do.
        expert_bytes: bytes of one expert's weights.
        flops_per_token: floating-point operations of one expert for one token; two per weight,
            so that an expert of BF16 weights has as many as bytes.
    """

    hardware: Hardware
    expert_bytes: int
    flops_per_token: float

    def __post_init__(self) -> None:
        for name in ("expert_bytes", "flops_per_token"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a finite number above 0, got {value}")

    def compute_seconds(self, peak_tokens: NDArray[Any]) -> NDArray[np.float64]:
        """``[steps]``: layers wait for their most loaded rank, one layer after the other.

        Args:
            peak_tokens: ``[steps, layers]``, tokens of the most loaded rank.
        """
        rate = self.hardware.flops_per_second * self.hardware.efficiency
        return peak_tokens.sum(axis=1) * (self.flops_per_token / rate)

    def migration_seconds(self, schedule: Schedule) -> float:
        """Transfer time of all rounds; each lasts as long as its busiest rank sends or receives.

        As if nothing overlapped with the forward, so it is an upper bound.
        """
        busiest = sum(_busiest(rnd, schedule.start.num_ranks) for rnd in schedule.rounds)
        return busiest * self.expert_bytes / self.hardware.link_bytes_per_second


def traffic(schedule: Schedule) -> int:
    """How many experts travel between ranks; a copy within a rank is no message."""
    return sum(int(_travels(rnd).sum()) for rnd in schedule.rounds)


def _travels(rnd: Round) -> NDArray[np.bool_]:
    moving: NDArray[np.bool_] = rnd.transfers[:, SOURCE_RANK] != rnd.transfers[:, TARGET_RANK]
    return moving


def _busiest(rnd: Round, num_ranks: int) -> int:
    """Experts that the busiest rank of a round sends, or receives, whichever is more."""
    rows = rnd.transfers[_travels(rnd)]
    ends = (np.bincount(rows[:, end], minlength=num_ranks) for end in (SOURCE_RANK, TARGET_RANK))
    return int(max(counts.max() for counts in ends))
