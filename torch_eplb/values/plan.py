"""What a policy sees and what it answers: `Topology` and `Plan`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torch_eplb.values.placement import Placement

__all__ = ["Plan", "Topology"]


@dataclass(frozen=True)
class Topology:
    """How ranks sit on nodes, and how experts are grouped by the router.

    Ranks ``n * ranks_per_node .. (n + 1) * ranks_per_node - 1`` are on node ``n``; experts
    ``g * E / num_expert_groups ..`` form group ``g`` (DeepSeek-V3's group-limited routing).
    A hierarchical policy packs whole groups onto nodes and keeps replicas within the node.
    """

    num_ranks: int
    num_nodes: int = 1
    num_expert_groups: int = 1

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_nodes", "num_expert_groups"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.num_ranks % self.num_nodes:
            raise ValueError(
                f"num_ranks ({self.num_ranks}) must be a multiple of num_nodes ({self.num_nodes})"
            )

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.num_nodes

    @property
    def hierarchical(self) -> bool:
        """Whether whole expert groups can be kept on nodes."""
        return self.num_expert_groups % self.num_nodes == 0 and self.num_nodes > 1


@dataclass(frozen=True)
class Plan:
    """A policy's answer.

    Attributes:
        placement: where every expert should be, ``[layers, ranks, slots]``.
        split: ``[layers, ranks, slots]`` float64, the share of its expert's tokens that each slot
            gets; sums to 1 over the slots of each expert.
        predicted_par: ``[layers]`` float64, PAR expected under this placement and split.
    """

    placement: Placement
    split: NDArray[np.float64]
    predicted_par: NDArray[np.float64]
