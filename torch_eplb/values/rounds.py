"""What a migration is made of: `Round`, `Schedule`, and the check that nothing skips.

A schedule is computed in the planner process, travels as integers (`Schedule.to_array`) and is
checked by every rank before it is used. Pure numpy.

How a round runs, which is what the invariants below protect:

1. before it is posted, routing stops using the target slots of its direct transfers (they are
   *drained*);
2. every send reads live weights; a staged receive goes to the staging memory, a direct receive
   straight into its drained slot;
3. when all ranks have everything, in the same step on all ranks, staged receives are copied into
   their slots and routing changes. This is the commit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb.values.placement import Placement

__all__ = [
    "EXPERT",
    "LAYER",
    "SOURCE_RANK",
    "SOURCE_SLOT",
    "TARGET_RANK",
    "TARGET_SLOT",
    "Bounds",
    "Round",
    "Schedule",
    "bytes_per_layer",
    "check_rounds",
    "check_schedule",
]

LAYER, EXPERT, SOURCE_RANK, SOURCE_SLOT, TARGET_RANK, TARGET_SLOT = range(6)
"""Columns of `Round.transfers`. Slots are counted within their rank."""

_MAGIC = 0x65706C62  # "eplb": tells a schedule from whatever else may arrive
_COLUMNS = 6


@dataclass(frozen=True, eq=False)
class Round:
    """One batch of transfers that is committed atomically on all ranks.

    Attributes:
        transfers: ``[n, 6]`` int32, the columns `LAYER` .. `TARGET_SLOT`, in the order in which
            sender and receiver post them. Where source and target rank are equal it is a local
            copy and no message.
        direct: ``[n]`` bool, received straight into its drained slot, without staging.
    """

    transfers: NDArray[np.int32]
    direct: NDArray[np.bool_]

    def __post_init__(self) -> None:
        if self.transfers.ndim != 2 or self.transfers.shape[1] != _COLUMNS:
            raise ValueError(
                f"transfers must have the shape [n, {_COLUMNS}], got {list(self.transfers.shape)}"
            )
        if self.direct.shape != (len(self.transfers),):
            raise ValueError(
                f"direct must have the shape [{len(self.transfers)}], one per transfer, "
                f"got {list(self.direct.shape)}"
            )

    def __len__(self) -> int:
        """How many transfers."""
        return len(self.transfers)


@dataclass(frozen=True, eq=False)
class Schedule:
    """The rounds that turn the placement ``start`` into ``target``.

    A tiny example: three ranks of one slot; the experts 0, 1, 2 go around in a circle, which
    takes one round, because every rank receives only one expert.

        >>> start = Placement(np.array([[[0], [1], [2]]]), 3)
        >>> target = Placement(np.array([[[1], [2], [0]]]), 3)
        >>> moves = np.array([[0, 1, 1, 0, 0, 0], [0, 2, 2, 0, 1, 0], [0, 0, 0, 0, 2, 0]], np.int32)
        >>> schedule = Schedule(start, target, (Round(moves, np.zeros(3, bool)),))
        >>> schedule.placements() == [target]
        True
        >>> again = Schedule.from_array(schedule.to_array(), start, target)
        >>> check_schedule(again, expert_bytes=100, staging_bytes=100)
        >>> check_schedule(again, expert_bytes=100, staging_bytes=99)
        Traceback (most recent call last):
        ValueError: round 0, rank 0: staged receives take 100 bytes, the staging has 99
    """

    start: Placement
    target: Placement
    rounds: tuple[Round, ...]

    def placements(self) -> list[Placement]:
        """The placement after each round; one per round, the last one is ``target``.

        Raises:
            ValueError: a round breaks an invariant (see `check_schedule`).
        """
        return [
            Placement(experts, self.start.num_experts, allow_duplicates=True)
            for experts in self.replay()
        ]

    def replay(self) -> Iterator[NDArray[np.int32]]:
        """Run the rounds on the placement; yield the experts ``[layers, ranks, slots]`` after each.

        The array is one and the same object, changed in place.

        Raises:
            ValueError: a round breaks an invariant (see `check_schedule`), or the last one does not
                end at ``target``.
        """
        start, target = self.start, self.target
        start.newly_held(target)  # raises where the shapes differ
        experts = start.experts.copy()
        counts = start.replica_counts()
        shape = np.array(
            [start.num_layers, start.num_experts, *([start.num_ranks, start.num_slots] * 2)]
        )
        for number, rnd in enumerate(self.rounds):
            if not len(rnd):
                raise ValueError(f"round {number}: has no transfers")
            outside = (rnd.transfers < 0) | (rnd.transfers >= shape)
            if outside.any():
                row = int(np.argwhere(outside)[0, 0])
                raise ValueError(
                    f"round {number}: transfer {rnd.transfers[row].tolist()} is outside "
                    f"(layer, expert, rank, slot, rank, slot) = {shape.tolist()}"
                )
            _apply(number, rnd, experts, counts)
            yield experts
        if not np.array_equal(experts, target.experts):
            layer, rank, slot = np.argwhere(experts != target.experts)[0]
            raise ValueError(
                f"after the last round layer {layer}, rank {rank}, slot {slot} holds expert "
                f"{experts[layer, rank, slot]}, the target placement says "
                f"{target.experts[layer, rank, slot]}"
            )

    def to_array(self) -> NDArray[np.int64]:
        """The rounds as a 1-D int64 array for the wire; `from_array` reads it back.

        ``[magic, rounds, transfers of round 0, 1, .., then per transfer its 6 columns and direct]``
        """
        head = np.array([_MAGIC, len(self.rounds), *map(len, self.rounds)], dtype=np.int64)
        body = [np.column_stack((r.transfers, r.direct)).astype(np.int64) for r in self.rounds]
        return np.concatenate([head, *(rows.reshape(-1) for rows in body)])

    @classmethod
    def from_array(
        cls, array: NDArray[Any], start: Placement, target: Placement, *, check: bool = True
    ) -> Schedule:
        """Read what `to_array` wrote, and check it against the placements it claims to connect.

        Args:
            array: 1-D integer array.
            start: the placement before the first round.
            target: the placement after the last one.
            check: False leaves the check of what the rounds do to `replay`.

        Raises:
            ValueError: the array is no schedule, or its rounds do not lead from ``start`` to
                ``target`` with every expert live throughout. Memory and send bounds are not known
                here: `check_schedule` checks those.
        """
        counts, rows = _unpack(array)
        ends = np.cumsum(counts, dtype=np.int64)
        rounds = tuple(
            Round(
                transfers=_frozen(rows[end - count : end, :_COLUMNS].astype(np.int32)),
                direct=_frozen(rows[end - count : end, _COLUMNS].astype(np.bool_)),
            )
            for count, end in zip(counts.tolist(), ends.tolist(), strict=True)
        )
        schedule = cls(start, target, rounds)
        if check:
            for _ in schedule.replay():
                pass
        return schedule


@dataclass(frozen=True)
class Bounds:
    """What a round may take.

    Attributes:
        expert_bytes: bytes of one expert, one number for all layers or one per layer.
        staging_bytes: staging memory of a rank.
        layers_per_round: the most layers that a round may touch, or None.
        send_bytes_per_round: the most bytes that a rank may send in a round, or None.
    """

    expert_bytes: Sequence[int] | int
    staging_bytes: int
    layers_per_round: int | None = None
    send_bytes_per_round: int | None = None


def check_schedule(
    schedule: Schedule,
    *,
    expert_bytes: Sequence[int] | int,
    staging_bytes: int,
    layers_per_round: int | None = None,
    send_bytes_per_round: int | None = None,
) -> None:
    """Check every invariant of a schedule; cheap enough to run on each one that arrives.

    In every round: no slot is a target twice; a source slot holds its expert before the round and
    is not drained in it; with the direct targets drained, and again after the commit, every expert
    has a live slot; a rank's staged receives fit its staging; the bounds on layers and sends hold
    (one expert may always be sent). The last round ends at ``schedule.target``.

    Args:
        schedule: the schedule to check.
        expert_bytes, staging_bytes, layers_per_round, send_bytes_per_round: see `Bounds`.

    Raises:
        ValueError: an invariant is broken; the message names round, rank and invariant.
    """
    bounds = Bounds(expert_bytes, staging_bytes, layers_per_round, send_bytes_per_round)
    for _ in check_rounds(schedule, bounds):
        pass


def check_rounds(schedule: Schedule, bounds: Bounds) -> Iterator[int]:
    """`check_schedule` in pieces: checks one round with each item, and yields its number.

    The target is checked after the last one.
    """
    sizes = bytes_per_layer(bounds.expert_bytes, schedule.start.num_layers)
    # A round is replayed first, which also makes sure that every index in it is in range.
    for number, _ in enumerate(schedule.replay()):
        _check_bounds(number, schedule.rounds[number], sizes, schedule.start.num_ranks, bounds)
        yield number


def _check_bounds(
    number: int, rnd: Round, sizes: NDArray[np.int64], num_ranks: int, bounds: Bounds
) -> None:
    layer, source, target = (rnd.transfers[:, c] for c in (LAYER, SOURCE_RANK, TARGET_RANK))
    size = sizes[layer]
    received = _sum_by_rank(target, np.where(rnd.direct, 0, size), num_ranks)
    _bound(number, received, bounds.staging_bytes, "staged receives take", "the staging has")
    distinct, most = len(np.unique(layer)), bounds.layers_per_round
    if most is not None and distinct > most:
        raise ValueError(f"round {number}: touches {distinct} layers, layers_per_round is {most}")
    if bounds.send_bytes_per_round is not None:
        remote = source != target
        sent = _sum_by_rank(source, np.where(remote, size, 0), num_ranks)
        alone = np.bincount(source[remote], minlength=num_ranks) <= 1
        sent[alone] = 0
        limit = bounds.send_bytes_per_round
        _bound(number, sent, limit, "sends take", "send_bytes_per_round is")


def bytes_per_layer(expert_bytes: Sequence[int] | int, num_layers: int) -> NDArray[np.int64]:
    """``[layers]`` int64: bytes of one expert, from one number for all layers or one per layer.

    Raises:
        TypeError: not integers.
        ValueError: not one per layer, or below 1.
    """
    sizes = np.asarray(expert_bytes)
    if sizes.dtype.kind not in "iu":
        raise TypeError(f"expert_bytes must be integers, got {expert_bytes!r}")
    if sizes.ndim and sizes.shape != (num_layers,):
        raise ValueError(
            f"expert_bytes must be one number or one per layer ({num_layers}), "
            f"got the shape {list(sizes.shape)}"
        )
    if sizes.min() < 1:
        raise ValueError(f"expert_bytes must be at least 1, got {sizes.min()}")
    return np.broadcast_to(sizes.astype(np.int64), (num_layers,))


def _unpack(array: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split a wire array into transfers per round ``[rounds]`` and rows ``[transfers, 7]``."""
    array = np.asarray(array)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(
            "a schedule must be a 1-D integer array, "
            f"got the shape {list(array.shape)} and dtype {array.dtype}"
        )
    if len(array) < 2 or array[0] != _MAGIC:
        raise ValueError("the array is not a schedule: its first number is not the mark of one")
    num_rounds = int(array[1])
    if not 0 <= num_rounds <= len(array) - 2:
        raise ValueError(f"a schedule of {num_rounds} rounds cannot have {len(array)} numbers")
    counts = array[2 : 2 + num_rounds]
    if num_rounds and (counts.min() < 1 or counts.max() > len(array)):
        raise ValueError("a schedule must have at least one transfer in each round")
    body = array[2 + num_rounds :]
    expected = sum(counts.tolist()) * (_COLUMNS + 1)
    if len(body) != expected:
        raise ValueError(
            f"the schedule is cut or too long: {expected} numbers of transfers expected, "
            f"got {len(body)}"
        )
    limits = np.iinfo(np.int32)
    if len(body) and (body.min() < 0 or body.max() > limits.max):
        raise ValueError("a schedule must consist of non-negative numbers below 2**31")
    rows = body.reshape(-1, _COLUMNS + 1)
    if (rows[:, _COLUMNS] > 1).any():
        raise ValueError("a transfer's last number (direct) must be 0 or 1")
    return counts.astype(np.int64), rows.astype(np.int64)


def _apply(number: int, rnd: Round, experts: NDArray[np.int32], counts: NDArray[np.int32]) -> None:
    """Check a round against the placement before it, then commit it to ``experts``, ``counts``."""
    layer, expert = rnd.transfers[:, LAYER], rnd.transfers[:, EXPERT]
    sources = (layer, rnd.transfers[:, SOURCE_RANK], rnd.transfers[:, SOURCE_SLOT])
    targets = (layer, rnd.transfers[:, TARGET_RANK], rnd.transfers[:, TARGET_SLOT])
    source_ids = np.ravel_multi_index(sources, experts.shape)
    target_ids = np.ravel_multi_index(targets, experts.shape)

    def refuse(bad: NDArray[np.bool_], side: int, what: str) -> None:
        if bad.any():
            row = rnd.transfers[np.argmax(bad)]
            raise ValueError(
                f"round {number}, rank {row[side]}: {what} "
                f"(layer {row[LAYER]}, expert {row[EXPERT]}, slot {row[side + 1]})"
            )

    order = np.argsort(target_ids, kind="stable")
    twice = np.zeros(len(rnd), dtype=np.bool_)
    twice[order[1:]] = target_ids[order[1:]] == target_ids[order[:-1]]
    refuse(twice, TARGET_RANK, "a slot is the target of two transfers")
    refuse(experts[sources] != expert, SOURCE_RANK, "the source slot does not hold the expert")
    drained = np.isin(source_ids, target_ids[rnd.direct])
    refuse(drained, SOURCE_RANK, "the source slot is drained in the same round")

    old = experts[targets]
    np.subtract.at(counts, (layer[rnd.direct], old[rnd.direct]), 1)
    _require_live(number, counts, layer, old, "once the direct targets are drained")
    staged = ~rnd.direct
    np.subtract.at(counts, (layer[staged], old[staged]), 1)
    np.add.at(counts, (layer, expert), 1)
    _require_live(number, counts, layer, old, "after the commit")
    experts[targets] = expert


def _require_live(
    number: int,
    counts: NDArray[np.int32],
    layer: NDArray[np.int32],
    expert: NDArray[np.int32],
    when: str,
) -> None:
    dead = counts[layer, expert] < 1
    if dead.any():
        first = int(np.argmax(dead))
        raise ValueError(
            f"round {number}: layer {layer[first]}, expert {expert[first]} has no live slot {when}"
        )


def _sum_by_rank(
    ranks: NDArray[np.int32], values: NDArray[np.int64], num_ranks: int
) -> NDArray[np.int64]:
    total = np.zeros(num_ranks, dtype=np.int64)
    np.add.at(total, ranks, values)
    return total


def _bound(number: int, values: NDArray[np.int64], limit: int, what: str, bound: str) -> None:
    rank = int(np.argmax(values))
    if values[rank] > limit:
        raise ValueError(
            f"round {number}, rank {rank}: {what} {values[rank]} bytes, {bound} {limit}"
        )


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    array.setflags(write=False)
    return array
