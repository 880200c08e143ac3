"""Routing tables: which physical experts serve a logical expert, for every layer, on the device.

The tensors are made once and updated in place, so that CUDA graphs and compiled code that captured
them stay valid. Knows placements and shares, no policy and no process group.

Shape suffixes in this package: T tokens, K top-k, N = T * K, L layers, E logical experts,
R ranks, S slots per rank, M most replicas of an expert, P length of a choice table.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_eplb.routing.device import to_device
from torch_eplb.routing.quotas import solve_quotas_host
from torch_eplb.values.choices import REPLICA_CHOICES
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology

__all__ = ["CHOICE_LENGTH", "RoutingTables", "spread"]

CHOICE_LENGTH = 120
"""Entries per expert of a choice table: shares are kept to 1/120, and 2, 3, 4, 5, 6, 8, 10 or 12
replicas take exactly equal turns."""

# Consecutive experts start their table this fraction of its length apart (the golden ratio gives
# the most even phases), and so do consecutive source ranks: otherwise the first tokens of a short
# batch would all choose the first replica.
_EXPERT_PHASE = 0.6180339887498949
_RANK_PHASE = 0.7548776662466927


class RoutingTables:
    """All layers' routing tables, in a few tensors that never change identity.

    Args:
        placement: the placement to start with.
        device: where the tables live.
        rank: this rank, a source of tokens.
        replica_choice: ``"batch"`` and ``"local"`` solve quotas for each batch and need
            ``slots_LEM`` only; ``"table"`` and ``"even"`` also keep ``choice_LEP``.
        max_replicas: M, the most replicas an expert will ever have;
            ``min(num_ranks, num_redundant_experts + 1)`` suffices for any placement.
        split: shares ``[layers, ranks, slots]`` for ``"table"``; None shares evenly.
        topology: which ranks share a node, for ``prefer_local``.
        prefer_local: with ``"table"``, choose the replica on this rank, then one on its node, as
            far as the shares allow when every rank sends equally much. The choice then depends on
            the rank, so ranks that share the same tokens (all-reduce dispatch) must not set it.
        weight_tokens: W of `torch_eplb.routing.costs`, for ``"batch"`` and ``"local"``.
        keep_experts: also keep ``experts_LS``.

    Attributes:
        slots_LEM: int64, the physical ids of an expert's live replicas, one per rank, padded with
            -1: ascending, or for ``"local"`` as this rank prefers them (see `_preference`).
        solver_LEM: ``slots_LEM`` with ranks renamed by their place in that order, so that rows
            ascend again, as `solve_quotas` wants it; the same tensor where rows ascend anyway.
        host_slots_LEM: the same on the host (the same tensor where ``device`` is the CPU).
        choice_LEP: int64 physical ids, or None; token number t of a batch that chose expert e goes
            to ``choice_LEP[l, e, t % P]``.
        choice_LBP: the same memory with one more row per layer, E, for choices that go to no slot
            (`torch_eplb.routing.ids`): it holds R * S throughout.
        home_LEM: int64, for ``"local"`` with ``weight_tokens``, or None: 1 at one replica of each
            expert in ``slots_LEM``, the same on all ranks, so that ranks have equally many.
        experts_LS: int64 ``[layers, slots]``, the logical experts of this rank's slots, or None.

    >>> placement = Placement(np.array([[[0, 1], [2, 0]]]), 3)
    >>> tables = RoutingTables(placement, device="cpu", rank=0, replica_choice="even",
    ...                        max_replicas=2, topology=Topology(2))
    >>> tables.slots_LEM.tolist()
    [[[0, 3], [1, -1], [2, -1]]]
    >>> tables.choice_LEP[0, 0, :4].tolist(), tables.choice_LEP[0, 1, :4].tolist()
    ([0, 3, 0, 3], [1, 1, 1, 1])
    """

    def __init__(
        self,
        placement: Placement,
        *,
        device: torch.device | str,
        rank: int,
        replica_choice: str,
        max_replicas: int,
        topology: Topology,
        split: NDArray[np.float64] | None = None,
        prefer_local: bool = False,
        weight_tokens: int = 0,
        keep_experts: bool = False,
    ) -> None:
        if replica_choice not in REPLICA_CHOICES:
            raise ValueError(
                f"replica_choice must be one of {', '.join(map(repr, REPLICA_CHOICES))}, "
                f"got {replica_choice!r}"
            )
        if not 0 <= rank < placement.num_ranks:
            raise ValueError(f"rank must be in 0..{placement.num_ranks - 1}, got {rank}")
        if max_replicas < 1:
            raise ValueError(f"max_replicas must be at least 1, got {max_replicas}")
        if topology.num_ranks != placement.num_ranks:
            raise ValueError(
                f"topology has {topology.num_ranks} ranks, the placement {placement.num_ranks}"
            )
        self.rank = rank
        self.num_ranks = placement.num_ranks
        self.num_slots = placement.num_slots
        self.num_experts = placement.num_experts
        self.num_layers = placement.num_layers
        self.replica_choice = replica_choice
        self.max_replicas = max_replicas
        self.topology = topology
        self.prefer_local = prefer_local
        self.weight_tokens = weight_tokens
        layers, experts = self.num_layers, self.num_experts
        self._place_R = np.arange(self.num_ranks)
        self.slots_LEM = torch.full((layers, experts, max_replicas), -1, device=device)
        self.solver_LEM = self.host_slots_LEM = self.slots_LEM
        if replica_choice == "local":
            self._place_R = _preference(rank, self.num_ranks)
            self.solver_LEM = torch.full_like(self.slots_LEM, -1)
        if self.slots_LEM.device.type != "cpu":
            self.host_slots_LEM = torch.full((layers, experts, max_replicas), -1)
        self.choice_LBP: Tensor | None = None
        self.choice_LEP: Tensor | None = None
        if replica_choice in ("table", "even"):
            bin_id = self.num_ranks * self.num_slots
            self.choice_LBP = torch.full(
                (layers, experts + 1, CHOICE_LENGTH), bin_id, dtype=torch.int64, device=device
            )
            self.choice_LEP = self.choice_LBP[:, :experts]
        self._used_L = [max_replicas] * layers  # columns that hold any replica
        self.home_LEM: Tensor | None = None
        if replica_choice == "local" and weight_tokens:
            self.home_LEM = torch.zeros_like(self.slots_LEM)
        self.experts_LS: Tensor | None = None
        if keep_experts:
            self.experts_LS = torch.zeros(
                (layers, self.num_slots), dtype=torch.int64, device=device
            )
        self.update(placement, split)

    def host_slots(self, layer: int) -> Tensor:
        """``[E, M]`` of ``host_slots_LEM``, with no more columns than its experts have replicas."""
        return self.host_slots_LEM[layer, :, : self._used_L[layer]]

    def tensors(self) -> list[Tensor]:
        """All that `update` writes on the device, each memory once."""
        tables = [self.slots_LEM]
        if self.solver_LEM is not self.slots_LEM:
            tables.append(self.solver_LEM)
        if self.choice_LBP is not None:
            tables.append(self.choice_LBP)
        if self.home_LEM is not None:
            tables.append(self.home_LEM)
        if self.experts_LS is not None:
            tables.append(self.experts_LS)
        return tables

    def update(
        self,
        placement: Placement,
        split: NDArray[np.float64] | None = None,
        live: NDArray[np.bool_] | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        """Write the tables in place; everything is checked before anything is written.

        Args:
            placement: as at construction; replicas beyond the first on a rank get no tokens.
            split: shares ``[layers, ranks, slots]``, at least 0; None shares evenly. Shares of
                slots that get no tokens fall to the expert's others.
            live: bool ``[layers, ranks, slots]``; slots that are not live (drained) get no tokens.
            layers: the layers to write; None writes all.

        Raises:
            ValueError: a shape differs from construction, a share is negative or not finite, or an
                expert has no live slot or more than ``max_replicas``.
        """
        shape = (self.num_layers, self.num_ranks, self.num_slots)
        if placement.experts.shape != shape or placement.num_experts != self.num_experts:
            raise ValueError(
                f"the tables were made for {list(shape)} slots and {self.num_experts} experts, "
                f"got {placement!r}"
            )
        for name, array in (("split", split), ("live", live)):
            if array is not None and array.shape != shape:
                raise ValueError(f"{name} must have the shape {list(shape)}, got {array.shape}")
        if split is not None and not (np.isfinite(split).all() and (split >= 0).all()):
            raise ValueError("split must hold finite shares of at least 0")
        chosen = list(range(self.num_layers)) if layers is None else list(layers)
        if not chosen:
            return
        slots = self._live_slots(placement, live, chosen)
        for layer, used in zip(chosen, (slots >= 0).any(axis=1).sum(axis=1).tolist(), strict=True):
            self._used_L[layer] = used
        index = torch.tensor(chosen)
        if self.choice_LEP is not None:
            given = None if split is None else split[chosen]
            self._write(self.choice_LEP, index, self._choices(slots, given))
        self._write(self.slots_LEM, index, slots)
        if self.host_slots_LEM is not self.slots_LEM:
            self._write(self.host_slots_LEM, index, slots)
        if self.solver_LEM is not self.slots_LEM:
            place, slot = self._place_R[slots // self.num_slots], slots % self.num_slots
            renamed = np.where(slots < 0, -1, place * self.num_slots + slot)
            self._write(self.solver_LEM, index, renamed)
        if self.home_LEM is not None:
            homes = [self._homes(layer) for layer in slots]
            self._write(self.home_LEM, index, np.stack(homes))
        if self.experts_LS is not None:
            held = placement.experts[chosen, self.rank]
            self._write(self.experts_LS, index, held.astype(np.int64))

    def _homes(self, slots_EM: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of slots in the order of preference, 1 at one replica of each expert."""
        order = np.argsort(np.where(slots_EM < 0, np.iinfo(np.int64).max, slots_EM), axis=1)
        ascending = np.take_along_axis(slots_EM, order, axis=1)  # alike on all ranks
        ones = np.ones(len(slots_EM), dtype=np.int64)
        chosen = solve_quotas_host(ones, ascending, self.num_ranks, self.num_slots)
        homes = np.zeros_like(slots_EM)
        np.put_along_axis(homes, order, chosen, axis=1)
        return homes

    @staticmethod
    def _write(table: Tensor, index: Tensor, rows: NDArray[np.int64]) -> None:
        # index_copy_ keeps the tensor's identity and writes all layers in one copy.
        device = table.device
        table.index_copy_(0, to_device(index, device), to_device(torch.from_numpy(rows), device))

    def _live_slots(
        self, placement: Placement, live: NDArray[np.bool_] | None, layers: list[int]
    ) -> NDArray[np.int64]:
        """``[layers, E, M]`` physical ids: the first live slot of every expert on every rank, in
        the order of preference."""
        experts = placement.experts[layers].reshape(len(layers), -1)
        position, physical = np.indices(experts.shape).reshape(2, -1)
        expert = experts.reshape(-1).astype(np.int64)
        if live is not None:
            kept = live[layers].reshape(-1)
            position, physical, expert = position[kept], physical[kept], expert[kept]
        # One replica per (layer, expert, rank): their code is unique, and its first slot is kept.
        entry = position * self.num_experts + expert
        codes, first = np.unique(
            entry * self.num_ranks + self._place_R[physical // self.num_slots], return_index=True
        )
        entries = codes // self.num_ranks
        counts = np.bincount(entries, minlength=len(layers) * self.num_experts)
        if counts.min() == 0:
            at, lost = divmod(int(counts.argmin()), self.num_experts)
            raise ValueError(f"layer {layers[at]}: expert {lost} has no live slot")
        if counts.max() > self.max_replicas:
            at, many = divmod(int(counts.argmax()), self.num_experts)
            raise ValueError(
                f"layer {layers[at]}: expert {many} has {counts.max()} replicas, the tables "
                f"were made for max_replicas={self.max_replicas}"
            )
        slots = np.full((len(counts), self.max_replicas), -1, dtype=np.int64)
        starts = np.cumsum(counts) - counts
        slots[entries, np.arange(len(entries)) - starts[entries]] = physical[first]
        return slots.reshape(len(layers), self.num_experts, self.max_replicas)

    def _choices(
        self, slots: NDArray[np.int64], split: NDArray[np.float64] | None
    ) -> NDArray[np.int64]:
        """``[layers, E, P]`` physical ids, for shares ``[layers, R, S]`` or even ones."""
        layers, experts, _ = slots.shape
        choices = np.broadcast_to(slots[:, :, :1], (layers, experts, CHOICE_LENGTH)).copy()
        # Few experts have replicas, and few replicas: the rest needs no arithmetic.
        layer, expert = np.nonzero((slots[:, :, 1:2] >= 0).any(axis=2))
        if len(layer) == 0:
            return choices
        replicas = slots[layer, expert]
        replicas = replicas[:, : (replicas >= 0).sum(axis=1).max()]
        given = None
        if split is not None:
            given = split.reshape(layers, -1)[layer[:, None], replicas]
        turns = spread(self._shares(replicas, given), CHOICE_LENGTH)
        phase = expert * _EXPERT_PHASE + (self.rank * _RANK_PHASE if self.prefer_local else 0.0)
        start = (phase % 1.0 * CHOICE_LENGTH).astype(np.int64)
        turn = (start[:, None] + np.arange(CHOICE_LENGTH)) % CHOICE_LENGTH
        replica = np.take_along_axis(turns, turn, axis=1)
        choices[layer, expert] = np.take_along_axis(replicas, replica, axis=1)
        return choices

    def _shares(
        self, replicas: NDArray[np.int64], given: NDArray[np.float64] | None
    ) -> NDArray[np.float64]:
        """``[rows, M]``: the share of each of an expert's replicas, summing to 1.

        ``replicas`` are physical ids, -1 where there is none and the share is 0; ``given`` are the
        shares that are wanted of them.
        """
        mask = replicas >= 0
        shares = even = mask / mask.sum(axis=1, keepdims=True)
        if self.replica_choice == "even":
            return even
        if given is not None:
            given = np.where(mask, given, 0.0)
            total = given.sum(axis=1, keepdims=True)
            shares = np.where(total > 0, given / np.where(total > 0, total, 1.0), even)
        return self._prefer_local(replicas, shares) if self.prefer_local else shares

    def _prefer_local(
        self, replicas: NDArray[np.int64], shares: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """This rank's row of shares: nearest replicas first, so that the sum over ranks stays.

        Every rank is taken to send 1 of an expert's R parts. A rank's own replica takes that
        part as far as its share reaches; what is left of ranks and of replicas is matched within
        each node in proportion, and at last over all nodes in proportion.
        """
        ranks, per_node = self.num_ranks, self.topology.ranks_per_node
        rank_of = np.where(replicas >= 0, replicas // self.num_slots, -1)
        mine = rank_of == self.rank
        node = np.where(replicas >= 0, rank_of // per_node, -1)
        near = node == self.rank // per_node
        own = np.minimum(shares, 1.0 / ranks)
        left = shares - own
        row = np.where(mine, own, 0.0)
        unsent = 1.0 / ranks - row.sum(axis=1, keepdims=True)
        node_unsent = per_node / ranks - np.where(near, own, 0.0).sum(axis=1, keepdims=True)
        node_left = np.where(near, left, 0.0).sum(axis=1, keepdims=True)
        met = np.minimum(node_unsent, node_left)
        row += np.where(near, left, 0.0) * met * unsent * _inverse(node_left * node_unsent)
        unsent = 1.0 / ranks - row.sum(axis=1, keepdims=True)
        # What each node's replicas keep for other nodes: their node's unmatched part.
        for n in range(self.topology.num_nodes):
            there = node == n
            open_slots = np.where(there, left, 0.0)
            total = open_slots.sum(axis=1, keepdims=True)
            sent = per_node / ranks - np.where(there, own, 0.0).sum(axis=1, keepdims=True)
            left -= open_slots * np.minimum(total, sent) * _inverse(total)
        left = left.clip(0.0)
        row += left * unsent * _inverse(left.sum(axis=1, keepdims=True))
        return row * ranks


def _preference(rank: int, num_ranks: int) -> NDArray[np.int64]:
    """Each rank's place in the order in which the source ``rank`` prefers replicas, ``[R]``.

    A source that balances its own tokens only has a choice between replicas that it has given
    equally many. If all sources broke such ties alike, the first replicas would be overloaded when
    each has but few tokens. So a source takes its own rank first, and then others in an order of
    its own.
    """
    place = np.random.default_rng(rank).permutation(num_ranks)
    return np.where(place < place[rank], place + 1, place) * (np.arange(num_ranks) != rank)


def _inverse(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / x, and 0 where x is too small to divide anything."""
    return np.where(x > 1e-12, 1.0 / np.where(x > 1e-12, x, 1.0), 0.0)


def spread(shares: NDArray[np.float64], length: int) -> NDArray[np.int64]:
    """Sequences in which every replica comes as often as its share says, evenly spaced.

    Args:
        shares: ``[rows, M]``, each row summing to 1.
        length: entries per row of the result.

    Returns:
        ``[rows, length]`` int64, indices of replicas. Turns are rounded by largest remainder;
        turn j of a replica with n turns stands at ``(j + 0.5) / n`` of the sequence.

    >>> spread(np.array([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]]), 8).tolist()
    [[0, 1, 0, 1, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0]]
    """
    rows, replicas = shares.shape
    ideal = shares * length
    turns = np.floor(ideal + 1e-9).astype(np.int64)
    missing = length - turns.sum(axis=1, keepdims=True)
    by_remainder = np.argsort(turns - ideal, axis=1, kind="stable")
    turns += np.argsort(by_remainder, axis=1, kind="stable") < missing
    flat = turns.reshape(-1)
    replica = np.repeat(np.tile(np.arange(replicas), rows), flat)
    turn = np.arange(rows * length) - np.repeat(np.cumsum(flat) - flat, flat)
    position = ((turn + 0.5) / np.repeat(flat, flat)).reshape(rows, length)
    order = np.argsort(position, axis=1, kind="stable")
    return np.take_along_axis(replica.reshape(rows, length), order, axis=1)
