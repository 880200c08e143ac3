"""The two policies that do not look at the load: `keep` ("static") and `shuffle` ("random")."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from torch_eplb.policies.deepseek import place
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology

__all__ = ["keep", "shuffle"]


def keep(load: NDArray[np.float64], current: Placement, topology: Topology) -> Placement:
    """Policy "static": experts stay where they are; only the split follows the load."""
    return current


def shuffle(load: NDArray[np.float64], current: Placement, topology: Topology) -> Placement:
    """Policy "random": a random placement of random replica counts, for tests of migration.

    Random, yet a function of its arguments only: the same load and placement give the same
    answer in every process.
    """
    digest = hashlib.sha256(current.experts.tobytes() + np.ascontiguousarray(load).tobytes())
    rng = np.random.default_rng(np.frombuffer(digest.digest(), dtype=np.uint32))
    weight = rng.exponential(size=(current.num_layers, current.num_experts))
    return place(weight, current, topology)
