"""Process groups: the only room that makes them, and the only one that knows how they fail.

Two planes (see the architecture section of the README):

* control plane: a CPU (gloo) group for load reduction, plan broadcast and agreement. It never
  touches the device's communication.
* data plane: a group of its own that carries expert weights and nothing else, made with the
  smallest buffers its backend allows and warmed up at construction, because the first
  point-to-point call of a group must involve all its ranks and allocates.

Under the ``fake`` backend both planes are fake groups: a gloo group cannot be made there.
"""

from __future__ import annotations

import _thread
import atexit
import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from torch_eplb.runtime.config import Config
from torch_eplb.values.errors import EPLBError, PeerLostError

__all__ = [
    "Communicator",
    "WorkWatcher",
    "all_gather_single",
    "backend_of",
    "device_of",
    "find_lost_ranks",
    "peer_lost",
    "wait_for",
]

_BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
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


def _options(backend: str, config: Config) -> Any:
    """The data plane's options: small buffers, few cores."""
    if backend == "hccl":
        # Each HCCL communicator takes two buffers of HCCL_BUFFSIZE (200 MiB by default) when it is
        # first used; weights need no more than a few MiB in flight.
        from torch_npu._C._distributed_c10d import ProcessGroupHCCL

        options = ProcessGroupHCCL.Options()
        options.hccl_config = {"hccl_buffer_size": config.hccl_buffer_size}
        return options
    if backend == "nccl":
        # Few CTAs, so that kernels with a cooperative launch are not starved by transfers.
        options = dist.ProcessGroupNCCL.Options()
        options.config.min_ctas = 1
        options.config.max_ctas = config.nccl_max_ctas
        return options
    return None


class Communicator:
    """The two groups of one wrapped model; the control plane is made here.

    Args:
        group: the expert-parallel group whose ranks hold the experts.
        device: where the expert weights are.
        timeout: seconds that any operation may take.

    Attributes:
        round_index: the round of transfers that is in flight, or None; for error messages.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout: float) -> None:
        self.group = group
        self.device = device
        self.timeout = timeout
        self.rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)
        self.global_ranks: list[int] = dist.get_process_group_ranks(group)
        self.backend = backend_of(group, device)
        self.fake = self.backend == "fake"
        self.round_index: int | None = None
        self._owner = os.getpid()
        self.control = self._new_group("fake" if self.fake else "gloo", None)
        self._data: dist.ProcessGroup | None = None

    def open_data_plane(self, config: Config) -> None:
        """Make the group that moves weights, and warm it up. Collective."""
        self._data = self._new_group(self.backend, _options(self.backend, config))
        self._warm_up()

    @property
    def data(self) -> dist.ProcessGroup:
        """The data plane's group."""
        if self._data is None:
            raise RuntimeError("the data plane is not open")
        return self._data

    def _new_group(self, backend: str, options: Any) -> dist.ProcessGroup:
        return dist.new_group(
            self.global_ranks,
            timeout=timedelta(seconds=self.timeout),
            backend=backend,
            pg_options=options,
            # Members of a part of the world make the planes by themselves; for the whole world the
            # default naming keeps repeated groups apart.
            use_local_synchronization=len(self.global_ranks) != dist.get_world_size(),
            group_desc="torch_eplb",
        )

    def _warm_up(self) -> None:
        """Exchange one byte with every peer, so that connections and buffers exist from now on."""
        if self.num_ranks == 1 or self.fake:
            return
        here = torch.zeros(1, dtype=torch.uint8, device=self.device)
        there = torch.zeros(self.num_ranks, dtype=torch.uint8, device=self.device)
        operations = []
        for peer in range(self.num_ranks):
            if peer != self.rank:
                operations.append(self.send(here, peer))
                operations.append(self.receive(there[peer : peer + 1], peer))
        for work in dist.batch_isend_irecv(operations):
            wait_for(work, self, "the first exchange of the data plane")
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def send(self, tensor: torch.Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(dist.isend, tensor, self.global_ranks[peer], self.data)

    def receive(self, tensor: torch.Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(dist.irecv, tensor, self.global_ranks[peer], self.data)

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order. Blocks; for construction only."""
        self.check_process()
        if self.fake:
            return [value] * self.num_ranks
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = torch.zeros(self.num_ranks, dtype=torch.int64)
        size = torch.tensor([data.numel()])
        wait_for(
            all_gather_single(sizes, size, group=self.control, async_op=True),
            self,
            "comparing the ranks' settings",
        )
        padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        padded[: data.numel()] = data
        everyone = torch.zeros(self.num_ranks * padded.numel(), dtype=torch.uint8)
        wait_for(
            all_gather_single(everyone, padded, group=self.control, async_op=True),
            self,
            "comparing the ranks' settings",
        )
        rows = everyone.view(self.num_ranks, -1)
        return [
            json.loads(bytes(row[:n].tolist())) for row, n in zip(rows, sizes.tolist(), strict=True)
        ]

    def agree(self, settings: dict[str, str] | None, error: Exception | None) -> None:
        """Compare ``settings`` over all ranks; a rank that found an error tells it instead.

        Raises:
            ValueError: ranks differ (naming each field and its values), or another rank found an
                error; on every rank.
            Exception: ``error`` itself, on the rank that found it.
        """
        everyone = self.gather_json({"settings": settings, "error": error and str(error)})
        if error is not None:
            raise error
        failed = [
            (rank, answer["error"]) for rank, answer in enumerate(everyone) if answer["error"]
        ]
        if failed:
            raise ValueError(
                "the model cannot be wrapped, because of "
                + "; ".join(f"rank {rank}: {message}" for rank, message in failed)
            )
        differing = _differences([answer["settings"] for answer in everyone])
        if differing:
            raise ValueError(
                "ranks must be wrapped with the same settings, but differ in "
                + " | ".join(differing)
            )

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

    def close(self) -> None:
        """Give both groups back. Never raises: a group whose peer is gone may not close cleanly."""
        if self.forked:
            return  # they are the parent's, and destroying them would wait for its threads
        groups = [self.control] if self._data is None else [self.control, self._data]
        for group in groups:
            # The default group may be gone already (destroyed by the user): then so are these.
            with contextlib.suppress(RuntimeError, ValueError, AssertionError):
                dist.destroy_process_group(group)


def wait_for(work: dist.Work | None, comm: Communicator, what: str) -> None:
    """Wait for one operation, at most ``timeout`` seconds.

    Raises:
        PeerLostError: a peer died or the time is over; ``what`` names the operation.
    """
    if work is None:  # the fake backend, and collectives that completed at once
        return
    try:
        work.wait(timedelta(seconds=comm.timeout))
    except (RuntimeError, dist.DistBackendError) as error:
        raise peer_lost(comm, what, error) from error


def peer_lost(comm: Communicator, what: str, error: BaseException) -> PeerLostError:
    """The exception for a failed operation, with the names of the ranks that do not answer."""
    lost = find_lost_ranks(comm)
    who = f"rank{'s' if len(lost) > 1 else ''} {', '.join(map(str, lost))}" if lost else "a rank"
    round_index = comm.round_index
    where = f" in round {round_index}" if round_index is not None else ""
    return PeerLostError(
        f"{who} did not answer within {comm.timeout:g} s during {what}{where}: {error}",
        ranks=tuple(lost),
        round_index=round_index,
    )


def find_lost_ranks(comm: Communicator, patience: float = 2.0) -> list[int]:
    """Ranks that do not report to the store within ``patience`` seconds; best effort.

    Every rank that meets a failure reports; those that are dead or stuck cannot.
    """
    if comm.fake:
        return []
    try:
        store = dist.PrefixStore(
            f"torch_eplb/lost/{comm.control.group_name}",
            dist.distributed_c10d._get_default_store(),
        )
        store.set(str(comm.rank), "alive")
        waiting = set(range(comm.num_ranks)) - {comm.rank}
        deadline = time.monotonic() + min(patience, comm.timeout)
        while waiting and time.monotonic() < deadline:
            waiting = {rank for rank in waiting if not store.check([str(rank)])}
            time.sleep(0.02)
        return sorted(waiting)
    except (RuntimeError, ValueError, dist.DistBackendError):
        # The store lives in rank 0's process (or in the launcher): it is gone, and so is rank 0.
        return [0] if comm.rank != 0 else []


def _differences(everyone: list[dict[str, str]]) -> list[str]:
    """
    >>> _differences([{"a": "1", "b": "x"}, {"a": "2", "b": "x"}, {"a": "1", "b": "x"}])
    ['a: 1 on ranks 0, 2; 2 on rank 1']
    """
    differing = []
    for name in dict.fromkeys(name for settings in everyone for name in settings):
        by_value: dict[str, list[int]] = {}
        for rank, settings in enumerate(everyone):
            by_value.setdefault(settings.get(name, "(missing)"), []).append(rank)
        if len(by_value) > 1:
            listing = "; ".join(
                f"{value} on rank{'s' if len(ranks) > 1 else ''} {_ranges(ranks)}"
                for value, ranks in by_value.items()
            )
            differing.append(f"{name}: {listing}")
    return differing


def _ranges(ranks: Sequence[int]) -> str:
    """
    >>> _ranges([0, 1, 2, 5])
    '0-2, 5'
    """
    parts = []
    for _, run in itertools.groupby(enumerate(ranks), lambda pair: pair[1] - pair[0]):
        members = [rank for _, rank in run]
        parts.append(f"{members[0]}" if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ", ".join(parts)


class WorkWatcher:
    """Carries out a batch of P2P operations and tells, without blocking, whether it has finished.

    Accelerators' backends are given their work at once, on the current stream, and are asked.
    With gloo somebody must post and wait: its point-to-point works never report completion before
    that, and posting them takes as long as the sockets' buffers and locks want, milliseconds for
    an expert. After `start` a thread does it (the GIL is released meanwhile); without it, `wait`.

    Args:
        operations: what to send and to receive.
        comm: gives backend and time limit.
        what: names the operations in messages.
    """

    def __init__(self, operations: list[dist.P2POp], comm: Communicator, what: str) -> None:
        self._comm = comm
        self._what = what
        self._deadline = time.monotonic() + comm.timeout
        self._works: list[dist.Work] = []
        self._operations = operations
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._started = False
        if not operations:
            self._started = True
            self._ended.set()
        elif comm.backend != "gloo":
            self._started = True
            self._post()

    def start(self) -> None:
        """With gloo: begin, in a thread. Without effect where that has been done."""
        if not self._started:
            self._started = True
            # Not threading.Thread, whose start() waits until the new thread has had a turn. Like a
            # daemon thread it does not outlive the interpreter.
            _thread.start_new_thread(self._run_beside, ())

    def _run_beside(self) -> None:
        with contextlib.suppress(BaseException):  # `finished` raises it, in the main thread
            self._run()

    def _post(self) -> None:
        works = dist.batch_isend_irecv(self._operations)
        self._works = [work for work in works if work is not None]

    def _run(self) -> None:
        try:
            # Tensors made in this mode may be written in it only, and the mode is a thread's own.
            with torch.inference_mode():
                self._post()
                for work in self._works:
                    left = max(self._deadline - time.monotonic(), 0.001)
                    work.wait(timedelta(seconds=left))
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._ended.set()

    def finished(self) -> bool:
        """Whether all operations are complete.

        Raises:
            RuntimeError, TimeoutError: one failed, or the time limit is over.
        """
        if self._ended.is_set():
            if self._error is not None:
                raise EPLBError(str(self._error)) from self._error
            return True
        if self._comm.backend == "gloo":
            return False  # the thread has a time limit of its own
        if self._comm.fake or all(work.is_completed() for work in self._works):
            return True
        if time.monotonic() > self._deadline:
            raise TimeoutError(f"{self._what} took longer than {self._comm.timeout:g} s")
        return False

    def wait(self) -> None:
        """Block until all operations are complete, or raise like `finished`."""
        if not self._started:
            self._started = True
            self._run()
        elif self._comm.backend == "gloo" and not self._ended.wait(self._comm.timeout + 1.0):
            raise TimeoutError(f"{self._what} took longer than {self._comm.timeout:g} s")
        while not self.finished():
            time.sleep(0.0002)

    def synchronize(self) -> None:
        """Order the current stream behind the operations, which have finished."""
        if self._comm.backend not in ("gloo", "fake"):
            for work in self._works:
                work.wait()
