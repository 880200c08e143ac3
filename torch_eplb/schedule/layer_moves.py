"""What is left to move in one layer, and the round that is being filled. See `schedule`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from torch_eplb.schedule.matching import match_departures
from torch_eplb.values.rounds import Round

__all__ = ["LayerMoves", "RoundBuilder"]


class RoundBuilder:
    """The round that is being filled: its transfers and what its bounds still allow."""

    def __init__(
        self, waiting: Sequence[int], *, staging_bytes: int, send_bytes: int | None, node_size: int
    ) -> None:
        """
        Args:
            waiting: ``[ranks]``, bytes that each rank has to receive over all layers; kept up to
                date in the attribute of the same name.
            staging_bytes: staging memory of a rank.
            send_bytes: the most that a rank sends in a round (but one expert always), or None.
            node_size: ranks of a node.
        """
        self.waiting = list(waiting)
        self._staging_bytes = staging_bytes
        self._send_bytes = send_bytes
        self._node_size = node_size
        self._sent_before = [0] * len(self.waiting)
        self._begin()

    def _begin(self) -> None:
        self._rows: list[tuple[int, ...]] = []
        self._staging = [self._staging_bytes] * len(self.waiting)
        self._sent = [0] * len(self.waiting)

    def __len__(self) -> int:
        """Transfers in the round so far."""
        return len(self._rows)

    def open_ranks(self, size: int) -> list[int]:
        """Ranks whose staging has room for ``size`` bytes."""
        return [rank for rank, left in enumerate(self._staging) if left >= size]

    def sends_exhausted(self, size: int) -> bool:
        """Whether no rank may send ``size`` bytes any more in this round."""
        return not any(self.can_send(rank, size) for rank in range(len(self._sent)))

    def can_send(self, rank: int, size: int) -> bool:
        """Whether ``rank`` may still send ``size`` bytes in this round."""
        sent = self._sent[rank]
        return self._send_bytes is None or not sent or sent + size <= self._send_bytes

    def sending_cost(self, source: int, target: int) -> tuple[bool, bool, int, int]:
        """Orders source ranks for a target: itself, its node, then who has sent least."""
        return (
            source != target,
            source // self._node_size != target // self._node_size,
            self._sent[source],
            self._sent_before[source],
        )

    def add(
        self,
        layer: int,
        expert: int,
        source: tuple[int, int],
        target: tuple[int, int],
        size: int,
        *,
        direct: bool,
    ) -> None:
        """Add a transfer of ``size`` bytes between two (rank, slot)."""
        self._rows.append((layer, expert, *source, *target, direct))
        self.waiting[target[0]] -= size
        if not direct:
            self._staging[target[0]] -= size
        if source[0] != target[0]:
            self._sent[source[0]] += size

    def finish(self) -> Round:
        """The round, its transfers sorted by layer and target; the next one begins empty."""
        self._sent_before = [a + b for a, b in zip(self._sent_before, self._sent, strict=True)]
        rows = np.array(sorted(self._rows, key=lambda row: (row[0], *row[4:6])), dtype=np.int32)
        self._begin()
        return Round(transfers=rows[:, :6].copy(), direct=rows[:, 6].astype(np.bool_))


class LayerMoves:
    """Arrivals and departures that are left in one layer.

    Slots are counted over all ranks here (rank * slots + slot).
    """

    def __init__(
        self, layer: int, old: NDArray[np.int32], new: NDArray[np.int32], size: int
    ) -> None:
        """
        Args:
            layer: its index.
            old: ``[ranks, slots]`` experts now.
            new: ``[ranks, slots]`` experts wanted, aligned with ``old``.
            size: bytes of one expert.
        """
        num_ranks, self._num_slots = old.shape
        self._layer = layer
        self._size = size
        self._content = old.reshape(-1).tolist()
        self._arrivals: list[list[int]] = [[] for _ in range(num_ranks)]
        self._free: list[list[int]] = [[] for _ in range(num_ranks)]
        self._last_copies: list[dict[int, int]] = [{} for _ in range(num_ranks)]  # expert -> slot
        self._last_copy_rank: dict[int, int] = {}
        self._wanting: dict[int, list[int]] = {}  # expert -> ranks
        self._holders: dict[int, list[int]] = {}  # expert -> its live slots
        self._committed: list[tuple[int, int]] = []  # (slot, expert) of the round being filled
        self._drained: set[int] = set()  # slots that the round being filled receives directly into
        changed = (old != new).reshape(-1)
        departing: dict[int, list[int]] = {}
        for slot in np.flatnonzero(changed).tolist():
            departing.setdefault(self._content[slot], []).append(slot)
            rank, expert = slot // self._num_slots, int(new.reshape(-1)[slot])
            self._arrivals[rank].append(expert)
            self._wanting.setdefault(expert, []).append(rank)
        for slot, expert in enumerate(self._content):
            if expert in self._wanting:
                self._holders.setdefault(expert, []).append(slot)
        staying = set(old.reshape(-1)[~changed].tolist())
        self._choose_last_copies(departing, staying)

    @property
    def done(self) -> bool:
        """Whether nothing is left to arrive."""
        return not any(self._arrivals)

    def waiting(self) -> list[int]:
        """``[ranks]``, bytes that each rank has still to receive."""
        return [len(arrivals) * self._size for arrivals in self._arrivals]

    def fill(self, builder: RoundBuilder, *, direct: bool) -> bool:
        """Add to the round what its bounds allow; whether there was anything.

        To be called once per round: what it adds counts as committed afterwards.
        """
        if builder.sends_exhausted(self._size):
            return False
        self._committed = []
        self._drained = set()
        if direct:
            self._receive_directly(builder)
        while self._receive_staged(builder):
            pass
        for slot, expert in self._committed:
            old = self._content[slot]
            if old in self._holders:
                self._holders[old].remove(slot)
            self._content[slot] = expert
            self._holders[expert].append(slot)
        return bool(self._committed)

    def _choose_last_copies(self, departing: dict[int, list[int]], staying: set[int]) -> None:
        """Sort departures into free ones and last copies.

        Where an expert has several departing slots, its last copy goes where most departures are
        free: a rank without a free one can only turn together with others.
        """
        moving = [expert for expert in sorted(departing) if expert not in staying]
        for slots in departing.values():
            for slot in slots:
                self._free[slot // self._num_slots].append(slot)
        for expert in sorted(moving, key=lambda expert: len(departing[expert])):
            slot = max(departing[expert], key=lambda slot: len(self._free[slot // self._num_slots]))
            rank = slot // self._num_slots
            self._free[rank].remove(slot)
            self._last_copies[rank][expert] = slot
            self._last_copy_rank[expert] = rank

    def _receive_directly(self, builder: RoundBuilder) -> None:
        """Drain free departing slots and receive into them, one per rank in turn.

        A last copy that becomes free on the way must stay live in this round: only slots that are
        free at the beginning are drained.
        """
        drainable = [list(slots) for slots in self._free]
        self._drained = {slot for slots in drainable for slot in slots}
        ranks = [rank for rank, slots in enumerate(drainable) if slots]
        while ranks:
            for rank in ranks:
                slot = drainable[rank].pop(0)
                choice = self._choose_arrival(builder, rank)
                if choice is None:  # nobody may send what this rank waits for
                    self._drained.difference_update([slot, *drainable[rank]])
                    drainable[rank] = []
                else:
                    self._place(builder, slot, *choice, direct=True)
            ranks = [rank for rank in ranks if drainable[rank]]

    def _receive_staged(self, builder: RoundBuilder) -> bool:
        """Receive one expert on as many ranks as possible; whether there was any."""
        ranks = [rank for rank in builder.open_ranks(self._size) if self._arrivals[rank]]
        # The rounds of a layer are as many as the most arrivals of a rank, if it is served in each.
        ranks.sort(key=lambda rank: (-len(self._arrivals[rank]), -builder.waiting[rank]))
        free = frozenset(rank for rank in ranks if self._free[rank])
        stuck = [rank for rank in ranks if rank not in free and builder.can_send(rank, self._size)]
        edges = {
            rank: [to for expert in self._last_copies[rank] for to in self._wanting[expert]]
            for rank in stuck
        }
        receivers = match_departures(stuck, edges, free) if stuck else {}

        # Read from the last copy, whose rank was found able to send: what another copy's rank may
        # still send can be spoken for by its own last copy.
        given = {}
        for rank, to in receivers.items():
            expert = next(e for e in self._last_copies[rank] if to in self._wanting[e])
            given[to] = (expert, self._last_copies[rank][expert])
        for expert, _ in given.values():
            self._secure(expert)
        before = len(builder)
        for to, (expert, source) in given.items():
            self._place(builder, self._free[to][0], expert, source, direct=False)
        for rank in ranks:
            if rank not in given and (rank in free or rank in receivers):
                choice = self._choose_arrival(builder, rank)
                if choice is not None:
                    self._place(builder, self._free[rank][0], *choice, direct=False)
        return len(builder) > before

    def _choose_arrival(self, builder: RoundBuilder, rank: int) -> tuple[int, int] | None:
        """The expert that ``rank`` had best receive now, and the slot to read it from.

        Experts that are not secure come first, because that frees their last copy; then those that
        are cheapest to send. None if no source may send any more in this round.
        """
        best: tuple[tuple[bool, tuple[int, ...], int], int, int] | None = None
        for expert in self._arrivals[rank]:
            for slot in self._holders[expert]:
                source = slot // self._num_slots
                if slot in self._drained or not (
                    source == rank or builder.can_send(source, self._size)
                ):
                    continue
                cost = builder.sending_cost(source, rank)
                key = (expert not in self._last_copy_rank, cost, expert)
                if best is None or (key, slot) < (best[0], best[2]):
                    best = key, expert, slot
        return None if best is None else best[1:]

    def _place(
        self, builder: RoundBuilder, slot: int, expert: int, source: int, *, direct: bool
    ) -> None:
        """Transfer ``expert`` from the slot ``source`` into the free departing ``slot``."""
        rank = slot // self._num_slots
        self._free[rank].remove(slot)
        self._arrivals[rank].remove(expert)
        self._wanting[expert].remove(rank)
        self._secure(expert)
        self._committed.append((slot, expert))
        ends = divmod(source, self._num_slots), divmod(slot, self._num_slots)
        builder.add(self._layer, expert, *ends, self._size, direct=direct)

    def _secure(self, expert: int) -> None:
        """``expert`` arrives in this round: its last copy is free from here on."""
        rank = self._last_copy_rank.pop(expert, None)
        if rank is not None:
            self._free[rank].append(self._last_copies[rank].pop(expert))
