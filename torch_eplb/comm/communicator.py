"""The process groups of a wrapped model, and whatever its ranks say to each other through them.

Two planes (see docs/architecture.md):

* control plane: a CPU (gloo) group for load reduction, plan broadcast and agreement. It never
  touches the device's communication.
* data plane: a group of its own that carries expert weights and nothing else, made with the
  smallest buffers its backend allows and warmed up at construction, because the first
  point-to-point call of a group must involve all its ranks and allocates.

Under the ``fake`` backend both planes are fake groups: a gloo group cannot be made there.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from torch_eplb.comm import groups, transport
from torch_eplb.comm.loss import LossDetector
from torch_eplb.comm.processes import ProcessIdentity
from torch_eplb.comm.store import BoundedStore
from torch_eplb.values.errors import EPLBError, PeerLostError

__all__ = ["Communicator", "all_gather_single", "backend_of", "device_of", "make_communicator"]

_BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
_WATCHED = ("nccl", "hccl")
"""Backends that end the process when an operation takes longer than its group's time limit."""
_WATCHDOG_PATIENCE = 10
"""That limit, in ours: transfers are polled, and whoever is late is lost long before."""
# torch 2.13 renamed it and warns about the old name, which is the only one before.
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def _let_threads_finish() -> None:
    """Give the GIL to gloo's threads for a moment before the interpreter ends.

    After an operation they drop its tensors, for which they need the GIL. One that still waits for
    it when the interpreter is finalised is ended from within C++, which aborts the process: seen in
    one of twelve programs that ended right after a forward.
    """
    time.sleep(0.02)


atexit.register(_let_threads_finish)


def backend_of(group: dist.ProcessGroup, device: torch.device) -> str:
    """Name of the backend that serves ``device`` in ``group``: "gloo", "nccl", "hccl", "fake"."""
    name = str(dist.get_backend(group)).lower()
    if name == "fake":
        return name
    config = str(dist.get_backend_config(group))
    by_device = dict(part.split(":", 1) for part in config.split(",") if ":" in part)
    return by_device.get(device.type, _BACKENDS.get(device.type, name))


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where the tensors of a model go that is not on a device yet.

    The current accelerator if the group has a backend of the accelerator's own, else the CPU.
    """
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        assert device is not None
        if backend_of(group, device) == _BACKENDS.get(device.type):
            return torch.device(device.type, torch.accelerator.current_device_index())
    return torch.device("cpu")


def make_communicator(
    group: dist.ProcessGroup, device: torch.device, timeout: float
) -> Communicator:
    """The communicator of one wrapped model, with its control plane. Collective.

    Args:
        group: the expert-parallel group whose ranks hold the experts.
        device: where the expert weights are.
        timeout: seconds that any operation may take.

    Raises:
        PeerLostError: a rank did not come within ``timeout``.
    """
    kind = FakeCommunicator if backend_of(group, device) == "fake" else Communicator
    return kind(group, device, timeout)


class Communicator:
    """The process groups of one wrapped model, and how its ranks wait for each other.

    Args:
        group, device, timeout: see `make_communicator`.

    Attributes:
        rank, num_ranks: in the group.
        global_ranks: of the group's ranks, in the whole world.
        backend: that serves the device in the group.
        leads: whether this rank plans for all.
        control: the control plane's group.
        round_in_flight: tells the round of transfers that is in flight, or None; for messages.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout: float) -> None:
        self.group = group
        self.device = device
        self.timeout = timeout
        self.rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)
        self.global_ranks: list[int] = dist.get_process_group_ranks(group)
        self.backend = backend_of(group, device)
        self.round_in_flight: Callable[[], int | None] = lambda: None
        self._owner = os.getpid()
        self._data: dist.ProcessGroup | None = None
        self._data_backend = self.backend
        self._abandoned = False
        self._open_control_plane()

    def _open_control_plane(self) -> None:
        self._name = groups.settle_name(self.group, self.timeout)
        store = dist.PrefixStore(f"{self._name}/loss", groups.default_store())
        self._losses = LossDetector(BoundedStore(store), self.rank, self.num_ranks, self.timeout)
        try:
            self.control = self._make_group("control", "gloo", None)
        except RuntimeError as error:
            raise self.peer_lost("making the control plane", error) from error
        own = json.dumps(asdict(ProcessIdentity.own())).encode()
        everyone = self.gather_bytes(own, "the first exchange of the control plane")
        self._losses.watch([ProcessIdentity(**json.loads(data)) for data in everyone])

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def failure(self) -> PeerLostError | None:
        """The last loss of a peer that was met, in whatever operation."""
        return self._losses.failure

    def open_data_plane(
        self, *, over_gloo: bool = False, hccl_buffer_size: int, nccl_max_ctas: int
    ) -> None:
        """Make the group that moves weights, and warm it up. Collective.

        Args:
            over_gloo: weights travel through the host's memory, whatever the device.
            hccl_buffer_size, nccl_max_ctas: see `transport.group_options`.
        """
        if over_gloo and self.backend != "fake":
            self._data_backend = "gloo"
        options = transport.group_options(
            self._data_backend, hccl_buffer_size=hccl_buffer_size, nccl_max_ctas=nccl_max_ctas
        )
        self._data = self._make_group("data", self._data_backend, options)
        self._warm_up()

    @property
    def data(self) -> dist.ProcessGroup:
        """The data plane's group."""
        if self._data is None:
            raise RuntimeError("the data plane is not open")
        return self._data

    def _make_group(self, purpose: str, backend: str, options: Any) -> dist.ProcessGroup:
        name = f"{self._name}/{purpose}"
        timeout = self.timeout
        if backend in _WATCHED:
            timeout *= _WATCHDOG_PATIENCE
        return groups.make_group(name, self.global_ranks, backend, options, timeout)

    def _warm_up(self) -> None:
        """Exchange one byte with every peer, so that connections and buffers exist from now on."""
        here = torch.zeros(1, dtype=torch.uint8, device=self.device)
        there = torch.zeros(self.num_ranks, dtype=torch.uint8, device=self.device)
        operations = []
        for peer in range(self.num_ranks):
            if peer != self.rank:
                operations.append(self.send(here, peer))
                operations.append(self.receive(there[peer : peer + 1], peer))
        what = "the first exchange of the data plane"
        transfer = self.post(operations, what)
        try:
            transfer.wait()
        except (RuntimeError, TimeoutError) as error:
            raise self.peer_lost(what, error) from error
        transfer.synchronize()
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    # ---- moving weights -----------------------------------------------------------------------

    def send(self, tensor: torch.Tensor, peer: int) -> dist.P2POp:
        """An operation for `post`: send to rank ``peer`` of the group."""
        return dist.P2POp(dist.isend, tensor, self.global_ranks[peer], self.data)

    def receive(self, tensor: torch.Tensor, peer: int) -> dist.P2POp:
        """An operation for `post`: receive from rank ``peer`` of the group."""
        return dist.P2POp(dist.irecv, tensor, self.global_ranks[peer], self.data)

    def post(self, operations: Sequence[dist.P2POp], what: str) -> transport.Transfer:
        """Carry out a batch of operations on the data plane; ``what`` names it in messages."""
        return transport.post(self._data_backend, operations, self.timeout, what)

    # ---- moving tokens ------------------------------------------------------------------------

    def all_to_all(self, rows: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        """Send ``send[r]`` rows to rank ``r``, in order; ``receive[r]`` rows come from it."""
        self.check_process()
        received = rows.new_empty((sum(receive), *rows.shape[1:]))
        work = dist.all_to_all_single(
            received, rows.contiguous(), receive, send, group=self.group, async_op=True
        )
        self.wait_in_line(work)
        return received

    def heard(self, numbers: list[int]) -> list[int]:
        """The numbers that all ranks told each other in an `all_to_all`, in rank order."""
        return numbers

    # ---- waiting ------------------------------------------------------------------------------

    def wait_for(self, work: dist.Work | None, what: str) -> None:
        """Wait for one operation, at most ``timeout`` seconds.

        Raises:
            PeerLostError: a peer died or the time is over; ``what`` names the operation.
        """
        self._losses.wait(work, what, self.round_in_flight())

    def wait_in_line(self, work: dist.Work | None, what: str = "the dispatch of tokens") -> None:
        """Wait for an operation on the user's own group.

        On an accelerator this orders the current stream behind the operation, and the host goes on:
        a time limit would stop the host until the kernel is done (NCCL), or is ignored (HCCL).

        Raises:
            PeerLostError: on the CPU, a peer died or the time is over.
        """
        if self.device.type == "cpu":
            self.wait_for(work, what)
        elif work is not None:
            work.wait()

    def has_finished(self, work: dist.Work | None) -> bool:
        """Whether `wait_for` would not have to wait."""
        return work is None or work.is_completed()

    def peer_lost(
        self, what: str, error: BaseException, round_index: int | None = None
    ) -> PeerLostError:
        """The exception for a failed operation, with the names of the ranks that are lost."""
        if round_index is None:
            round_index = self.round_in_flight()
        return self._losses.lost(what, error, round_index)

    def gather_bytes(self, data: bytes, what: str) -> list[bytes]:
        """What every rank passes, in rank order. Collective; blocks. ``what`` names it in messages.

        Raises:
            PeerLostError: a rank did not come within the time limit.
        """
        self.check_process()
        own = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)
        sizes = torch.zeros(self.num_ranks, dtype=torch.int64)
        size = torch.tensor([len(data)])
        work = all_gather_single(sizes, size, group=self.control, async_op=True)
        self.wait_for(work, what)
        padded = torch.zeros(max(int(sizes.max()), 1), dtype=torch.uint8)
        padded[: own.numel()] = own
        everyone = torch.zeros(self.num_ranks * padded.numel(), dtype=torch.uint8)
        work = all_gather_single(everyone, padded, group=self.control, async_op=True)
        self.wait_for(work, what)
        rows = everyone.view(self.num_ranks, -1).numpy()
        return [row[:n].tobytes() for row, n in zip(rows, sizes.tolist(), strict=True)]

    # ---- its own process ----------------------------------------------------------------------

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that made the groups, and cannot use them."""
        return os.getpid() != self._owner

    def check_process(self) -> None:
        """Refuse to communicate in a forked process, where nothing would ever arrive.

        Raises:
            EPLBError: this process was forked.
        """
        if self.forked:
            raise EPLBError(
                f"this process ({os.getpid()}) was forked from the one that wrapped the model "
                f"({self._owner}), whose process groups it cannot use. Fork before wrapping, or "
                "call unwrap() first to hand the plain model to forked processes"
            )

    def abandon_data_plane(self) -> None:
        """After a loss: end what the device still waits for. No weights travel from now on."""
        if self._data is not None and self._data_backend in _WATCHED and not self._abandoned:
            self._abandoned = True
            with contextlib.suppress(RuntimeError):  # the user may have destroyed all groups
                groups.abort_group(self._data, self.device)

    def close(self) -> None:
        """Give both groups back. Never raises: a group whose peer is gone may not close cleanly."""
        if self.forked:
            return  # they are the parent's, and destroying them would wait for its threads
        if self.failure is not None:
            self.abandon_data_plane()  # or its end would wait for what the device waits for
        for group in (self.control, self._data):
            # The default group may be gone already (destroyed by the user): then so are these.
            with contextlib.suppress(RuntimeError, ValueError, AssertionError):
                if group is not None:
                    dist.destroy_process_group(group)


class FakeCommunicator(Communicator):
    """One rank of a group whose other ranks are only pretended: torch's ``fake`` backend.

    What others would send stays zero, everybody says what this rank says, and every rank plans for
    itself.
    """

    def _open_control_plane(self) -> None:
        self._name = f"torch_eplb/{uuid.uuid4().hex}"
        store = BoundedStore(dist.HashStore())
        self._losses = LossDetector(store, self.rank, self.num_ranks, self.timeout)
        self.control = self._make_group("control", "fake", None)

    @property
    def leads(self) -> bool:
        return True

    def _warm_up(self) -> None:
        pass

    def has_finished(self, work: dist.Work | None) -> bool:
        return True  # FakeWork never says so

    def all_to_all(self, rows: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        self.check_process()
        received = rows.new_zeros((sum(receive), *rows.shape[1:]))
        here, own = self.rank, min(send[self.rank], receive[self.rank])
        first, start = sum(receive[:here]), sum(send[:here])
        received[first : first + own] = rows[start : start + own]
        return received

    def heard(self, numbers: list[int]) -> list[int]:
        return [numbers[self.rank]] * self.num_ranks

    def gather_bytes(self, data: bytes, what: str) -> list[bytes]:
        self.check_process()
        return [data] * self.num_ranks
