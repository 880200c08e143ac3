"""From (current placement, wanted placement) to rounds that fit a staging budget.

Runs in the planner process: pure numpy and integers, deterministic, imports no torch.

Vocabulary of this file. Per layer, every slot that changes is a *departure* (of the expert it
holds) and every expert that a rank newly holds is an *arrival*; a rank has as many of one as of
the other, and any of its arrivals may take any of its departing slots. An expert is *secure* once
it sits in a slot that will not change again. Of an expert that is not secure one departing slot is
its *last copy*, which may be overwritten only in a round (or after one) in which the expert arrives
elsewhere. All other departures are *free*.

Why one expert of staging is enough, without a single transfer beyond the minimum: draw an edge
from the rank of every departure to a rank of an arrival, last copies to an arrival of the same
expert, free ones to whatever is left. Ranks have as many edges out as in, so with idle edges from a
rank to itself the graph is regular, and a regular bipartite multigraph falls apart into perfect
matchings (König, "Über Graphen und ihre Anwendung auf Determinantentheorie und Mengenlehre",
Math. Ann. 77, 1916). One matching is one round: every rank receives one expert at most, long cycles
over ranks turn all at once, and the rounds of a layer are as many as the busiest rank's arrivals.
This needs the freedom of which slot within its rank an expert takes, which costs nobody anything;
with the slots prescribed, a cycle that meets a rank twice could only be broken by extra transfers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torch_eplb.schedule.layer_moves import LayerMoves, RoundBuilder
from torch_eplb.values.placement import Placement
from torch_eplb.values.rounds import (
    EXPERT,
    LAYER,
    SOURCE_RANK,
    SOURCE_SLOT,
    TARGET_RANK,
    TARGET_SLOT,
    Round,
    Schedule,
    bytes_per_layer,
    check_schedule,
)

__all__ = [
    "EXPERT",
    "LAYER",
    "SOURCE_RANK",
    "SOURCE_SLOT",
    "TARGET_RANK",
    "TARGET_SLOT",
    "Round",
    "Schedule",
    "check_schedule",
    "make_schedule",
]


def make_schedule(
    current: Placement,
    wanted: Placement,
    *,
    expert_bytes: Sequence[int] | int,
    staging_bytes: int,
    direct: bool = True,
    layers_per_round: int | None = None,
    send_bytes_per_round: int | None = None,
    ranks_per_node: int | None = None,
) -> Schedule:
    """Order the transfers from ``current`` to ``wanted`` into rounds that keep the model whole.

    Every round first receives into all slots that can be drained, then fills the staging with a
    matching of departures and arrivals (see the module's docstring) in which the ranks that have
    most left to receive come first. Earlier layers go before later ones, which only fill the ranks
    that are left, so layers are finished one after the other.

    Args:
        current: the placement that is live now.
        wanted: which experts each rank shall hold. Its order of slots within a rank is not kept:
            an expert that stays on its rank stays in its slot, and an arriving one takes the slot
            that makes the schedule short. **Use the result's** ``target`` **from here on.**
        expert_bytes: bytes of one expert, one number for all layers or one per layer.
        staging_bytes: staging memory of a rank; at least one expert of the largest layer.
        direct: receive into drained slots where possible, which takes no staging: without a bound
            on layers or sends, the first round takes all that can be drained, however much it is.
            If False everything is staged.
        layers_per_round: the most layers that a round may touch; None for no bound.
        send_bytes_per_round: the most bytes that a rank sends in a round (one expert is always
            allowed); None for no bound. It bounds the fan-out of a hot expert too: what arrived
            in an earlier round serves as a source, so its replicas spread as a tree.
        ranks_per_node: ranks ``n * ranks_per_node ..`` are node ``n``, and sources on the target's
            node are preferred; None if all ranks are equally near.

    Returns:
        The schedule; without rounds where nothing has to move. Equal arguments give equal
        schedules on every machine.

    Raises:
        TypeError: ``expert_bytes`` is not made of integers.
        ValueError: the placements differ in shape, or a bound is too small; the message says what
            the least is.

    >>> current = Placement(np.array([[[0, 1], [2, 3]]]), 4)
    >>> wanted = Placement(np.array([[[2, 3], [0, 1]]]), 4)
    >>> schedule = make_schedule(current, wanted, expert_bytes=10, staging_bytes=10)
    >>> for placement in schedule.placements():       # a swap of one pair, then of the other
    ...     print(placement.experts.tolist())
    [[[2, 1], [0, 3]]]
    [[[2, 3], [0, 1]]]
    """
    sizes = bytes_per_layer(expert_bytes, current.num_layers)
    if staging_bytes < sizes.max():
        raise ValueError(
            f"staging_bytes must hold one expert of the largest layer, {sizes.max()} bytes, "
            f"got {staging_bytes}"
        )
    for name, value in (
        ("layers_per_round", layers_per_round),
        ("send_bytes_per_round", send_bytes_per_round),
        ("ranks_per_node", ranks_per_node),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, or None for no bound, got {value}")

    target = current.align(wanted)
    layers = [
        LayerMoves(layer, current.experts[layer], target.experts[layer], int(sizes[layer]))
        for layer in np.flatnonzero(current.changed_slots(target)).tolist()
    ]
    builder = RoundBuilder(
        [sum(left) for left in zip(*(moves.waiting() for moves in layers), strict=True)],
        staging_bytes=staging_bytes,
        send_bytes=send_bytes_per_round,
        node_size=ranks_per_node or current.num_ranks,
    )
    experts = current.experts.copy()
    rounds = []
    while layers:
        touched = 0
        for moves in layers:
            touched += moves.fill(builder, direct=direct)
            if touched == layers_per_round:
                break
        rnd = builder.finish()
        moved = rnd.transfers
        experts[moved[:, LAYER], moved[:, TARGET_RANK], moved[:, TARGET_SLOT]] = moved[:, EXPERT]
        rounds.append(rnd)
        layers = [moves for moves in layers if not moves.done]
    final = Placement(experts, current.num_experts, allow_duplicates=True)
    return Schedule(start=current, target=final, rounds=tuple(rounds))
