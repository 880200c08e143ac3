"""Runs one round: the only place that posts point-to-point operations.

A round has three moments. `post` starts all sends (from the live weights) and receives (into the
staging pool, or straight into drained slots). `finished` tells, without waiting, whether this
rank's part is done. `commit` copies what was staged into its slots; the caller changes the routing
tables in the same step, and calls it only when every rank has finished, because until then a peer
may still be reading our live weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from torch_eplb.comm import Planes, WorkWatcher
from torch_eplb.layers.experts import ExpertLayer
from torch_eplb.migration.rounds import (
    LAYER,
    SOURCE_RANK,
    SOURCE_SLOT,
    TARGET_RANK,
    TARGET_SLOT,
    Round,
)

__all__ = ["Exchange", "checksum"]


class Exchange:
    """This rank's part of the rounds of one wrapped model.

    Args:
        layers: the model's MoE layers, whose slots are read and written.
        planes: gives the data plane.
        staging_bytes: size of the staging pool, allocated here, once.
        verify: send a checksum with every expert and check it.

    Attributes:
        bytes_sent, bytes_received: over the data plane, since construction.
        staging_peak: most bytes of the pool that a round has used.
        on_post: called with the round's index and operations just before they are posted.
    """

    def __init__(
        self, layers: Sequence[ExpertLayer], planes: Planes, staging_bytes: int, verify: bool
    ) -> None:
        self._layers = layers
        self._planes = planes
        self._verify = verify
        with torch.inference_mode(False):
            self._pool = torch.empty(staging_bytes, dtype=torch.uint8, device=planes.device)
        self._stream = _side_stream(planes.device)
        self._watcher: WorkWatcher | None = None
        self._staged: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._received_sums: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        self._sent_sums: list[torch.Tensor] = []
        self.bytes_sent = 0
        self.bytes_received = 0
        self.staging_peak = 0
        self.on_post: Callable[[int, list[dist.P2POp]], None] | None = None

    @property
    def staging_bytes(self) -> int:
        return self._pool.numel()

    @property
    def active(self) -> bool:
        """Whether a round was posted and neither committed nor dropped."""
        return self._watcher is not None

    def operations(self, transfers: Round) -> list[dist.P2POp]:
        """This rank's sends and receives, in the order in which they are posted.

        Local copies are carried out here. Both sides of a pair list a round's transfers in the same
        order, because several operations between one pair are matched by order.
        """
        rank = self._planes.rank
        operations: list[dist.P2POp] = []
        used = 0
        self._staged, self._received_sums, self._sent_sums = [], [], []
        for row, direct in zip(
            transfers.transfers.tolist(), transfers.direct.tolist(), strict=True
        ):
            if rank not in (row[SOURCE_RANK], row[TARGET_RANK]):
                continue
            layer = self._layers[row[LAYER]]
            if row[SOURCE_RANK] == rank:
                live = layer.slot_bytes(row[SOURCE_SLOT])
            if row[TARGET_RANK] == rank:
                slot = layer.slot_bytes(row[TARGET_SLOT])
                landing = slot
                if not direct:
                    landing, used = self._stage(slot, used)
                    self._staged.extend(zip(slot, landing, strict=True))
                if row[SOURCE_RANK] == rank:
                    for target, source in zip(landing, live, strict=True):
                        target.copy_(source)
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
            landing.append(self._pool[used : used + tensor.numel()])
            used += tensor.numel()
        if used > self._pool.numel():
            raise RuntimeError(
                f"a round needs {used} bytes of staging, more than the {self._pool.numel()} allowed"
            )
        return landing, used

    def _send(self, tensors: list[torch.Tensor], peer: int) -> list[dist.P2POp]:
        operations = [self._planes.send(tensor, peer) for tensor in tensors]
        if self._verify:
            sums = checksum(tensors)
            self._sent_sums.append(sums)
            operations.append(self._planes.send(sums, peer))
        self.bytes_sent += sum(tensor.numel() for tensor in tensors)
        return operations

    def _receive(self, tensors: list[torch.Tensor], peer: int) -> list[dist.P2POp]:
        operations = [self._planes.receive(tensor, peer) for tensor in tensors]
        if self._verify:
            sums = torch.zeros(2, dtype=torch.int64, device=self._planes.device)
            self._received_sums.append((sums, tensors))
            operations.append(self._planes.receive(sums, peer))
        self.bytes_received += sum(tensor.numel() for tensor in tensors)
        return operations

    def post(self, round_index: int, transfers: Round) -> None:
        """Start a round's sends and receives.

        Raises:
            RuntimeError: the backend refused, for instance because a peer's connection is gone.
                With gloo it is `finished` that raises.
        """
        with _on_stream(self._stream, self._planes.device), torch.inference_mode():
            operations = self.operations(transfers)
            if self.on_post is not None:
                self.on_post(round_index, operations)
            self._watcher = WorkWatcher(
                lambda: dist.batch_isend_irecv(operations) if operations else (),
                self._planes,
                f"round {round_index}",
            )

    def finished(self) -> bool:
        """Whether this rank's sends and receives are complete.

        Raises:
            RuntimeError, TimeoutError: one failed, or the time limit is over.
        """
        return self._watcher is None or self._watcher.finished()

    def wait(self) -> None:
        """Block until `finished`, at most the time limit."""
        if self._watcher is not None:
            self._watcher.wait()

    def verified(self) -> bool:
        """Whether everything received matches its sender's checksum (True without ``verify``)."""
        return all(
            torch.equal(expected, checksum(tensors)) for expected, tensors in self._received_sums
        )

    def commit(self) -> None:
        """Write what was staged into its slots. Call only when every rank has finished."""
        if self._watcher is not None:
            self._watcher.synchronize()
        if self._stream is not None:
            # Local copies and checksums ran on the side stream.
            device_module = torch.get_device_module(self._planes.device)
            device_module.current_stream(self._planes.device).wait_stream(self._stream)
        # A round may be posted inside and committed outside of the user's inference mode (by
        # close(), say), or the other way round. Inside, tensors of either kind may be written.
        with torch.inference_mode():
            for slot, landing in self._staged:
                slot.copy_(landing)
        self.drop()

    def drop(self) -> None:
        """Forget the round; staged data is not used. Drained slots hold what had arrived."""
        self._watcher = None
        self._staged, self._received_sums, self._sent_sums = [], [], []


def checksum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """int64 ``[2]``: a sum and a position-weighted sum over the bytes of flat uint8 tensors.

    >>> a = torch.arange(8, dtype=torch.uint8)
    >>> bool((checksum([a]) == checksum([a.flip(0)])).all())
    False
    """
    total = torch.zeros(2, dtype=torch.int64, device=tensors[0].device)
    for number, tensor in enumerate(tensors, start=1):
        whole = tensor.numel() // 1024 * 1024
        for part in (tensor[:whole].view(-1, 1024), tensor[whole:].view(-1, 1)):
            # Bytes are summed by column first: no copy of the expert in a wider type.
            columns = part.sum(0, dtype=torch.int64)
            place = torch.arange(1, columns.numel() + 1, device=columns.device)
            total[0] += columns.sum() * number
            total[1] += (columns * place).sum() * number
        rows = tensor[:whole].view(-1, 1024).sum(1, dtype=torch.int64)
        rows = torch.cat((rows, tensor[whole:].to(torch.int64)))
        total[1] += (rows * torch.arange(1, rows.numel() + 1, device=rows.device)).sum() * 1031
    return total


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
