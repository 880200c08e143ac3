"""A plan in the terms that other engines speak: flat tables of slots, one row per layer.

An engine that asks for a plan serves meanwhile, or waits for the answer. So a policy must not raise
because of a load: `Planner` then keeps the map that is live, and the log says why.

Imports numpy only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.files.trace import window_samples
from torch_eplb.policies.registry import make_policy
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology

__all__ = ["Planner", "replica_tables", "usable_placement"]

logger = logging.getLogger("torch_eplb")

Ints = NDArray[np.int64]

_MAX_SAMPLES = 32


class Planner:
    """Plans from a load and a flat map; can be pickled if its policy can.

    Args:
        policy: a name from `torch_eplb.policies.registry.POLICIES`, or a callable.
        replica_choice: how the engine splits an expert's tokens among its replicas; all three
            do so evenly, about.
        knobs: ``min_gain``, ``target_par``, ``max_moves``, ``plan_seconds``; see `make_policy`.

    Raises:
        TypeError, ValueError: as `make_policy`.
    """

    def __init__(
        self,
        policy: str | Callable[..., Any] = "flow",
        *,
        replica_choice: str = "even",
        **knobs: Any,
    ) -> None:
        self._arguments = (policy, replica_choice, knobs)
        make_policy(policy, replica_choice=replica_choice, **knobs)

    def plan(
        self,
        load: NDArray[Any],
        table: NDArray[Any] | None,
        *,
        num_slots: int,
        num_ranks: int,
        num_nodes: int = 1,
        num_groups: int = 1,
    ) -> Placement:
        """The placement after a plan; the live one where there is no load or no plan.

        Args:
            load: ``[steps, layers, experts]`` or ``[layers, experts]``, by logical expert.
            table: the live map ``[layers, slots of all ranks]``, or None. What is not a placement
                is mended (see `usable_placement`); one of another width is not looked at.
            num_slots: slots of all ranks.
            num_ranks: ranks.
            num_nodes: nodes that the ranks sit on; taken as 1 where ranks do not fill them.
            num_groups: expert groups of the router; taken as 1 where experts do not fill them.

        Raises:
            ValueError: shapes or numbers that do not fit each other.
        """
        load = np.asarray(load)
        if load.ndim == 2:
            load = load[None]
        if load.ndim != 3 or 0 in load.shape[1:]:
            raise ValueError(
                f"load must be [layers, experts] or [steps, layers, experts], got shape "
                f"{list(load.shape)}"
            )
        layers, experts = load.shape[1:]
        if num_ranks < 1 or num_slots % num_ranks or num_slots < experts:
            raise ValueError(
                f"{num_slots} slots must divide evenly over {num_ranks} ranks and hold {experts} "
                "experts"
            )
        current = usable_placement(table, layers, experts, num_ranks, num_slots)
        recorded = load[load.sum(axis=(1, 2)) > 0]
        if not len(recorded):
            return current
        topology = Topology(
            num_ranks,
            num_nodes if num_nodes > 0 and num_ranks % num_nodes == 0 else 1,
            num_groups if num_groups > 0 and experts % num_groups == 0 else 1,
        )
        policy, replica_choice, knobs = self._arguments
        try:
            plan = make_policy(policy, replica_choice=replica_choice, **knobs)
            # Sums over neighbouring steps; engines hand over averages as well as counts.
            if recorded.dtype.kind == "f":
                return plan(_mean_samples(recorded), current, topology).placement
            return plan(window_samples(recorded, _MAX_SAMPLES), current, topology).placement
        except Exception:
            # The engine serves on with what it has; see the module's docstring.
            logger.exception("no new plan; the live expert map stays")
            return current


def _mean_samples(load: NDArray[Any]) -> NDArray[np.float64]:
    parts = np.array_split(load.astype(np.float64), min(len(load), _MAX_SAMPLES))
    return np.stack([part.sum(axis=0) for part in parts])


def usable_placement(
    table: NDArray[Any] | None, layers: int, experts: int, num_ranks: int, num_slots: int
) -> Placement:
    """The placement of a flat map, mended where it is none.

    Engines may have two replicas of an expert on one rank, or slots that hold nothing (-1). There
    the first replica stays; the other slots take experts that have no slot, then those with the
    fewest replicas that the rank does not hold yet. A layer that cannot be mended so gets experts
    in order.

    >>> usable_placement(np.array([[0, 1, 1, -1, 2, 3]]), 1, 4, 2, 6).experts.tolist()
    [[[0, 1, 2], [0, 2, 3]]]

    Args:
        table: ``[layers, slots of all ranks]``, or None for experts in order.
        layers, experts, num_ranks, num_slots: what it must fit; else experts are in order.
    """
    initial = Placement.initial(layers, experts, num_ranks, num_slots // num_ranks)
    if table is None:
        return initial
    table = np.asarray(table)
    if table.shape != (layers, num_slots) or table.dtype.kind not in "iu":
        return initial
    if table.max() >= experts:
        return initial
    slots = table.reshape(initial.experts.shape)
    try:
        return Placement(slots, experts)
    except ValueError:
        rows = [
            _mended(row, experts, spare)
            for row, spare in zip(slots, initial.experts, strict=True)
        ]  # fmt: skip
        return Placement(np.stack(rows), experts)


def _mended(row: NDArray[Any], experts: int, initial: NDArray[Any]) -> NDArray[Any]:
    """One layer ``[ranks, slots]`` of `usable_placement`."""
    if row.shape[1] > experts:
        # A rank has room for all experts and more; nothing to choose from.
        return (
            row
            if (np.bincount(row[row >= 0], minlength=experts) > 0).all() and (row >= 0).all()
            else initial
        )
    row = row.copy()
    for rank in row:
        _, first = np.unique(rank, return_index=True)
        again = np.ones(len(rank), dtype=bool)
        again[first] = False
        rank[again | (rank < 0)] = -1
    counts = np.bincount(row[row >= 0], minlength=experts)
    for rank, slot in np.argwhere(row < 0):
        held = np.bincount(row[rank][row[rank] >= 0], minlength=experts) > 0
        expert = int(np.where(held, np.iinfo(np.int64).max, counts).argmin())
        row[rank, slot] = expert
        counts[expert] += 1
    return row if (counts > 0).all() else initial


def replica_tables(placement: Placement) -> tuple[Ints, Ints, Ints]:
    """The three tables of DeepSeek's EPLB, which vLLM and SGLang speak, too.

    >>> tables = replica_tables(Placement(np.array([[[0, 1], [2, 0]]]), 3))
    >>> [table.tolist() for table in tables]
    [[[0, 1, 2, 0]], [[[0, 3], [1, -1], [2, -1]]], [[2, 1, 1]]]

    Returns:
        ``physical_to_logical [layers, slots]``; ``logical_to_physical [layers, experts, most]``
        padded with -1; the replicas of each expert ``[layers, experts]``.
    """
    layers = placement.num_layers
    physical = placement.experts.reshape(layers, -1).astype(np.int64)
    counts = placement.replica_counts().astype(np.int64)
    order = np.argsort(physical, axis=1, kind="stable")
    logical = np.take_along_axis(physical, order, axis=1)
    first = counts.cumsum(axis=1) - counts
    replica = np.arange(physical.shape[1]) - np.take_along_axis(first, logical, axis=1)
    back = np.full((*counts.shape, int(counts.max())), -1, dtype=np.int64)
    back[np.arange(layers)[:, None], logical, replica] = order
    return physical, back, counts
