"""Runs one round: the only place that posts point-to-point operations.

A round has four moments. `post` makes all sends (from the live weights) and receives (into the
staging pool, or straight into drained slots) and hands them to the backend; where the backend needs
a thread for them (gloo), `start` lets it run. `finished` tells, without waiting, whether this
rank's part is done; `wait` waits for it. `commit` copies what was staged into its slots; the caller
changes the routing tables in the same step, and calls it only when every rank has finished, because
until then a peer may still be reading our live weights.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from torch_eplb.comm.communicator import Communicator
from torch_eplb.comm.transport import Transfer
from torch_eplb.layers.experts import ExpertLayer
from torch_eplb.layers.slots import byte_view, copy_bytes, write_bytes
from torch_eplb.values.rounds import (
    LAYER,
    SOURCE_RANK,
    SOURCE_SLOT,
    TARGET_RANK,
    TARGET_SLOT,
    Round,
)

__all__ = ["Exchange", "StagingTooSmall", "checksum"]

# Checksums are made piece by piece, and a piece is looked at as a matrix of so many bytes per row.
_PIECE, _ROW = 1 << 22, 1 << 13


class StagingTooSmall(ValueError):
    """Experts have become larger than what is set aside to receive them."""


class Exchange:
    """This rank's part of the rounds of one wrapped model.

    Args:
        layers: the model's MoE layers, whose slots are read and written.
        comm: gives the data plane.
        staging_bytes: size of the staging pool, allocated here, once.
        verify: send a checksum with every expert and check it.

    Attributes:
        bytes_sent, bytes_received: over the data plane, since construction.
        staging_peak: most bytes of the pool that a round has used.
        on_post: called with the round's index and operations just before they are posted.
    """

    def __init__(
        self, layers: Sequence[ExpertLayer], comm: Communicator, staging_bytes: int, verify: bool
    ) -> None:
        self._layers = layers
        self._comm = comm
        self._verify = verify
        with torch.inference_mode(False):
            self._pool = torch.empty(staging_bytes, dtype=torch.uint8, device=comm.device)
        self._stream = _side_stream(comm.device)
        self._transfer: Transfer | None = None
        self._staged: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._written_later: list[ExpertLayer] = []
        self._posted_with: list[tuple[ExpertLayer, list[torch.Tensor]]] = []
        self._received_sums: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        self._sent_sums: list[torch.Tensor] = []
        self._check: tuple[torch.Tensor, torch.Event] | None = None
        self.bytes_sent = 0
        self.bytes_received = 0
        self.staging_peak = 0
        self.on_post: Callable[[int, list[dist.P2POp]], None] | None = None

    @property
    def staging_bytes(self) -> int:
        return self._pool.numel()

    def is_staged(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a part of the staging pool."""
        return tensor.untyped_storage().data_ptr() == self._pool.untyped_storage().data_ptr()

    @property
    def active(self) -> bool:
        """Whether a round was posted and neither committed nor dropped."""
        return self._transfer is not None

    @property
    def replaced(self) -> bool:
        """Whether experts of the posted round have been given other memory since: by a cast, say.

        What is received would be written where nobody looks. The same on all ranks, where all have
        done the same to the model.
        """
        return any(
            now.data_ptr() != then.data_ptr()
            for layer, before in self._posted_with
            for now, then in zip(layer.tensors(), before, strict=True)
        )

    def require_room(self, layer: ExpertLayer) -> None:
        """Refuse a layer of which not even one expert can be received.

        Raises:
            StagingTooSmall: it has been cast to a wider dtype since it was wrapped.
        """
        self._require_bytes(layer.expert_bytes, layer)

    def require_room_for(self, transfers: Round) -> None:
        """Refuse a round that some rank has no room for. The same on all ranks, as `replaced`.

        Raises:
            StagingTooSmall: layers have been cast to a wider dtype since they were wrapped.
        """
        staged = transfers.transfers[~transfers.direct]
        sizes = {
            index: self._layers[index].expert_bytes for index in set(staged[:, LAYER].tolist())
        }
        needed: dict[int, int] = {}
        for row in staged.tolist():
            needed[row[TARGET_RANK]] = needed.get(row[TARGET_RANK], 0) + sizes[row[LAYER]]
        if needed:
            largest = max(sizes, key=lambda index: sizes[index])
            self._require_bytes(max(needed.values()), self._layers[largest])

    def _require_bytes(self, needed: int, layer: ExpertLayer) -> None:
        if needed > self.staging_bytes:
            dtypes = ", ".join(sorted({str(tensor.dtype) for tensor in layer.tensors()}))
            raise StagingTooSmall(
                f"staging_bytes={self.staging_bytes} has no room for the {needed} bytes that are "
                f"to be received: an expert of layer {layer.name} has {layer.expert_bytes} since "
                f"the model was cast ({dtypes}). Cast before wrapping, or pass a larger "
                "staging_bytes; experts stay where they are now"
            )

    def operations(self, transfers: Round) -> list[dist.P2POp]:
        """This rank's sends and receives, in the order in which they are posted.

        Local copies are carried out here. Both sides of a pair list a round's transfers in the same
        order, because several operations between one pair are matched by order.
        """
        rank = self._comm.rank
        operations: list[dist.P2POp] = []
        used = 0
        self._staged, self._received_sums, self._sent_sums = [], [], []
        self._written_later = []
        for row, direct in zip(
            transfers.transfers.tolist(), transfers.direct.tolist(), strict=True
        ):
            if rank not in (row[SOURCE_RANK], row[TARGET_RANK]):
                continue
            layer = self._layers[row[LAYER]]
            if row[SOURCE_RANK] == rank:
                live = layer.slot_bytes(row[SOURCE_SLOT])
            if row[TARGET_RANK] == rank:
                slot = layer.slot(row[TARGET_SLOT])
                if not direct:
                    landing, used = self._stage(slot, used)
                    self._staged.extend(zip(slot, landing, strict=True))
                    self._written_later.append(layer)
                else:
                    landing = [byte_view(tensor) for tensor in slot]
                    _tell_autograd(layer)
                if row[SOURCE_RANK] == rank:
                    for target, source in zip(landing, live, strict=True):
                        copy_bytes(target, source)
                    continue
                operations += self._receive(landing, row[SOURCE_RANK])
            else:
                operations += self._send(live, row[TARGET_RANK])
        self.staging_peak = max(self.staging_peak, used)
        return operations

    def _stage(self, slot: list[torch.Tensor], used: int) -> tuple[list[torch.Tensor], int]:
        """A part of the pool for every tensor of an expert."""
        landing = []
        for tensor in slot:
            landing.append(self._pool[used : used + tensor.nbytes])
            used += tensor.nbytes
        if used > self._pool.numel():
            raise RuntimeError(
                f"a round needs {used} bytes of staging, more than the {self._pool.numel()} allowed"
            )
        return landing, used

    def _send(self, tensors: list[torch.Tensor], peer: int) -> list[dist.P2POp]:
        operations = [self._comm.send(tensor, peer) for tensor in tensors]
        if self._verify:
            sums = checksum(tensors)
            self._sent_sums.append(sums)
            operations.append(self._comm.send(sums, peer))
        self.bytes_sent += sum(tensor.numel() for tensor in tensors)
        return operations

    def _receive(self, tensors: list[torch.Tensor], peer: int) -> list[dist.P2POp]:
        operations = [self._comm.receive(tensor, peer) for tensor in tensors]
        if self._verify:
            sums = torch.zeros(2, dtype=torch.int64, device=self._comm.device)
            self._received_sums.append((sums, tensors))
            operations.append(self._comm.receive(sums, peer))
        self.bytes_received += sum(tensor.numel() for tensor in tensors)
        return operations

    def post(self, round_index: int, transfers: Round) -> None:
        """Make a round's sends and receives, and start them unless that is for `start` to do.

        Raises:
            RuntimeError: the backend refused, for instance because a peer's connection is gone.
                With gloo it is `finished` or `wait` that raises.
        """
        # All of the round's layers, so that all ranks see the same; held, so that no new tensor can
        # have the address of an old one.
        self._posted_with = [
            (layer, [tensor.detach() for tensor in layer.tensors()])
            for layer in (
                self._layers[i] for i in sorted(set(transfers.transfers[:, LAYER].tolist()))
            )
        ]
        with _on_stream(self._stream, self._comm.device), torch.inference_mode():
            operations = self.operations(transfers)
            if self.on_post is not None:
                self.on_post(round_index, operations)
            self._transfer = self._comm.post(operations, f"round {round_index}")

    def start(self) -> None:
        """Let a posted round run beside the forward; it may have been running since `post`."""
        if self._transfer is not None:
            self._transfer.start()

    def finished(self) -> bool:
        """Whether this rank's sends and receives are complete, and `verified` can tell.

        Raises:
            RuntimeError, TimeoutError: one failed, or the time limit is over.
        """
        if self._transfer is None:
            return True
        if not self._transfer.finished():
            return False
        if self._stream is None or not self._received_sums:
            return True
        if self._check is None:
            self._check = self._start_check(self._stream)
        return self._check[1].query()

    def wait(self) -> None:
        """Block until `finished`, or raise like it."""
        if self._transfer is None:
            return
        self._transfer.wait()
        deadline = time.monotonic() + self._comm.timeout
        while not self.finished():
            if time.monotonic() > deadline:
                raise TimeoutError(f"checking took longer than {self._comm.timeout:g} s")
            time.sleep(0.0002)

    def verified(self) -> bool:
        """Whether everything received matches its sender's checksum (True without ``verify``)."""
        return bool(self._intact() if self._check is None else self._check[0])

    def _intact(self) -> torch.Tensor:
        """bool scalar on the device."""
        checks = [expected == checksum(tensors) for expected, tensors in self._received_sums]
        return torch.stack(checks).all() if checks else torch.tensor(True)

    def _start_check(self, stream: torch.Stream) -> tuple[torch.Tensor, torch.Event]:
        """Check on the side stream, so that the host waits neither for that nor for a forward.

        Returns:
            The result, on the host, and the event after which it is there.
        """
        assert self._transfer is not None
        device = self._comm.device
        with torch.get_device_module(device).stream(stream), torch.inference_mode():
            # The backend received on a stream of its own.
            self._transfer.synchronize()
            result = torch.empty((), dtype=torch.bool, pin_memory=device.type != "cpu")
            result.copy_(self._intact(), non_blocking=True)
            event = torch.Event(device)
            event.record(stream)
        return result, event

    def commit(self) -> None:
        """Write what was staged into its slots. Call only when every rank has finished."""
        if self._transfer is not None:
            self._transfer.synchronize()
        if self._stream is not None:
            # Local copies and checksums ran on the side stream.
            device_module = torch.get_device_module(self._comm.device)
            device_module.current_stream(self._comm.device).wait_stream(self._stream)
        # A round may be posted inside and committed outside of the user's inference mode (by
        # close(), say), or the other way round. Inside, tensors of either kind may be written.
        with torch.inference_mode():
            for slot, landing in self._staged:
                write_bytes(slot, landing)
        for layer in self._written_later:
            _tell_autograd(layer)
        torch.clear_autocast_cache()  # it keeps casts of whole parameters, of the old ones
        self.drop()

    def drop(self) -> None:
        """Forget the round; staged data is not used. Drained slots hold what had arrived."""
        self._transfer, self._check = None, None
        self._staged, self._received_sums, self._sent_sums = [], [], []
        self._written_later, self._posted_with = [], []


def checksum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """int64 ``[2]``: a sum and a position-weighted sum over the bytes of flat uint8 tensors.

    Where the tensors lie in memory does not matter. Takes no copy of an expert.

    >>> a = torch.arange(8, dtype=torch.uint8)
    >>> bool((checksum([a]) == checksum([a.flip(0)])).all())
    False
    """
    plain, placed = [], []
    pieces = (piece for tensor in tensors for piece in tensor.split(_PIECE))
    for number, piece in enumerate(pieces):
        if piece.storage_offset() % 8:
            piece = piece.clone()  # wide words must be aligned
        whole = piece.numel() // _ROW * _ROW
        body, tail = piece[:whole], piece[whole:]
        # Wide words are summed quickly. Sums of 32 bits fit into 64; those of 64 bits wrap around,
        # which may hide a pair of wrong top bits in a row, but no more.
        rows = body.view(torch.int32).view(-1, _ROW // 4).sum(1, dtype=torch.int64)
        columns = body.view(torch.int64).view(-1, _ROW // 8).sum(0)
        for kind, sums in enumerate((rows, columns, tail.to(torch.int64))):
            weight = 3 * number + kind + 1
            place = torch.arange(1, sums.numel() + 1, device=sums.device)
            plain.append(sums.sum() * weight)
            placed.append((sums * place).sum() * weight)
    return torch.stack((torch.stack(plain).sum(), torch.stack(placed).sum()))


def _tell_autograd(layer: ExpertLayer) -> None:
    """The layer's tensors are written from now on: a backward that saved them must not use them.

    Neither the backend nor the copies in inference mode count versions by themselves. A tensor has
    one version for all its slots, so a backward raises torch's usual error even if it needs others.
    """
    for tensor in layer.tensors():
        if not tensor.is_inference():  # those have no versions, and no backward
            torch.autograd.graph.increment_version(tensor)


def _side_stream(device: torch.device) -> torch.Stream | None:
    return None if device.type == "cpu" else torch.get_device_module(device).Stream(device=device)


@contextlib.contextmanager
def _on_stream(stream: torch.Stream | None, device: torch.device) -> Iterator[None]:
    """Run on the side stream, after all that the current stream was given so far.

    The transfers read weights that an earlier commit wrote, and write slots that an earlier forward
    read, both on the current stream.
    """
    if stream is None:
        yield
        return
    module = torch.get_device_module(device)
    stream.wait_stream(module.current_stream(device))
    with module.stream(stream):
        yield
