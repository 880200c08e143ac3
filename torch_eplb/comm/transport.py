"""How a batch of point-to-point operations is carried out: one small class per kind of backend.

A `Transfer` is one batch. `start` lets it run beside the forward, `finished` tells without waiting
whether it is complete, `wait` waits for it, and `synchronize` orders the current stream behind it.

* `GlooTransfer`: somebody must post and wait. gloo's point-to-point works never report completion
  before they are waited for, and posting takes as long as the sockets' buffers and locks want,
  milliseconds for an expert. After `start` a thread does it (the GIL is released meanwhile);
  without it, `wait`.
* `DeviceTransfer`: an accelerator's backend is given its work at once, on the current stream, and
  is asked. `HcclTransfer` gives it in several batches.
* `StagedTransfer`: weights of an accelerator that travel over gloo, through memory of the host.
* `FakeTransfer`: torch's ``fake`` backend, which moves nothing and is done at once.
"""

from __future__ import annotations

import _thread
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from torch_eplb.values.errors import EPLBError

__all__ = [
    "DeviceTransfer",
    "FakeTransfer",
    "GlooTransfer",
    "HcclTransfer",
    "StagedTransfer",
    "Transfer",
    "group_options",
    "post",
    "split_by_peer",
]


class Transfer:
    """A batch of point-to-point operations under way.

    Args:
        operations: what to send and to receive.
        timeout: seconds that they may take.
        what: names them in messages.
    """

    def __init__(self, operations: Sequence[dist.P2POp], timeout: float, what: str) -> None:
        self._operations = list(operations)
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._what = what

    def start(self) -> None:
        """Let the operations run; without effect where they do."""

    def finished(self) -> bool:
        """Whether all operations are complete.

        Raises:
            RuntimeError, TimeoutError: one failed, or the time limit is over.
        """
        raise NotImplementedError

    def wait(self) -> None:
        """Block until all operations are complete, or raise like `finished`."""
        while not self.finished():
            time.sleep(0.0002)

    def synchronize(self) -> None:
        """Order the current stream behind the operations, which have finished."""

    def _overdue(self) -> TimeoutError:
        return TimeoutError(f"{self._what} took longer than {self._timeout:g} s")


class FakeTransfer(Transfer):
    """Nothing travels."""

    def __init__(self, operations: Sequence[dist.P2POp], timeout: float, what: str) -> None:
        super().__init__(operations, timeout, what)
        if self._operations:
            dist.batch_isend_irecv(self._operations)

    def finished(self) -> bool:
        return True


class DeviceTransfer(Transfer):
    """Posted at once on the current stream, and polled."""

    def __init__(self, operations: Sequence[dist.P2POp], timeout: float, what: str) -> None:
        super().__init__(operations, timeout, what)
        # One Work may stand for a whole batch (torch-npu), and None for one that is done.
        works = [work for batch in self._batches() for work in dist.batch_isend_irecv(batch)]
        self._works = [work for work in works if work is not None]

    def _batches(self) -> list[list[dist.P2POp]]:
        """The operations, in the batches in which the backend gets them."""
        return [self._operations] if self._operations else []

    def finished(self) -> bool:
        # Backends look for errors when they are asked for completion, and count what has failed as
        # complete.
        completed = [work.is_completed() for work in self._works]
        for work, over in zip(self._works, completed, strict=True):
            if over and (error := work.exception()) is not None:
                raise RuntimeError(f"{self._what} failed: {error!r}")
        if all(completed):
            return True
        if time.monotonic() > self._deadline:
            raise self._overdue()
        return False

    def synchronize(self) -> None:
        for work in self._works:
            work.wait()


class HcclTransfer(DeviceTransfer):
    """In batches with one message to and one from each peer at most.

    Below CANN 9 torch-npu gives a batch to HcclBatchSendRecv, whose contract allows no more.
    """

    def _batches(self) -> list[list[dist.P2POp]]:
        return split_by_peer(self._operations)


def split_by_peer(operations: Sequence[dist.P2POp]) -> list[list[dist.P2POp]]:
    """Batches of which the n-th has every peer's n-th message in either direction.

    Both sides of a pair list their messages in the same order, so they put each into the same
    batch, and no batch waits for a later one.
    """
    batches: list[list[dist.P2POp]] = []
    seen: Counter[tuple[Any, int]] = Counter()
    for operation in operations:
        key = (operation.op, operation.peer)
        if seen[key] == len(batches):
            batches.append([])
        batches[seen[key]].append(operation)
        seen[key] += 1
    return batches


class GlooTransfer(Transfer):
    """Carried out by a thread after `start`, else by `wait`."""

    def __init__(self, operations: Sequence[dist.P2POp], timeout: float, what: str) -> None:
        super().__init__(operations, timeout, what)
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._started = not self._operations
        if self._started:
            self._ended.set()

    def start(self) -> None:
        if not self._started:
            self._started = True
            # Not threading.Thread, whose start() waits until the new thread has had a turn. Like a
            # daemon thread it does not outlive the interpreter.
            _thread.start_new_thread(self._run_beside, ())

    def finished(self) -> bool:
        if not self._ended.is_set():
            return False  # the thread has a time limit of its own
        if self._error is not None:
            raise EPLBError(str(self._error)) from self._error
        return True

    def wait(self) -> None:
        if not self._started:
            self._started = True
            self._run()
        elif not self._ended.wait(self._timeout + 1.0):
            raise self._overdue()
        self.finished()

    def _run_beside(self) -> None:
        with contextlib.suppress(BaseException):  # `finished` raises it, in the main thread
            self._run()

    def _run(self) -> None:
        try:
            # Tensors made in this mode may be written in it only, and the mode is a thread's own.
            with torch.inference_mode():
                for work in dist.batch_isend_irecv(self._operations):
                    left = max(self._deadline - time.monotonic(), 0.001)
                    work.wait(timedelta(seconds=left))
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._ended.set()


class StagedTransfer(Transfer):
    """Weights of an accelerator over gloo, through pinned memory of the host.

    On the stream that is current when it is made: copies to the host, which take their turn there;
    once they are done, gloo's operations; then copies from the host. The host's memory is as
    much as the operations' tensors.
    """

    def __init__(self, operations: Sequence[dist.P2POp], timeout: float, what: str) -> None:
        super().__init__(operations, timeout, what)
        device = self._operations[0].tensor.device
        self._module = torch.get_device_module(device)
        self._stream = self._module.current_stream(device)
        # Another order of what is posted on both sides of a pair would be another match.
        self._on_host = [
            dist.P2POp(o.op, _pinned_like(o.tensor), o.peer, o.group) for o in self._operations
        ]
        for here, there in zip(self._on_host, self._operations, strict=True):
            if there.op is dist.isend:
                here.tensor.copy_(there.tensor, non_blocking=True)
        self._sent = self._record()
        self._inner: GlooTransfer | None = None
        self._landed: torch.Event | None = None

    def _record(self) -> torch.Event:
        event = torch.Event(self._stream.device)
        event.record(self._stream)
        return event

    def start(self) -> None:
        if self._inner is None and self._sent.query():
            left = max(self._deadline - time.monotonic(), 0.001)
            self._inner = GlooTransfer(self._on_host, left, self._what)
            self._inner.start()

    def finished(self) -> bool:
        self.start()
        if self._inner is not None and self._landed is None and self._inner.finished():
            self._land()
        if self._landed is not None and self._landed.query():
            return True
        if time.monotonic() > self._deadline:
            raise self._overdue()
        return False

    def _land(self) -> None:
        """Copy what was received to where it belongs."""
        with self._module.stream(self._stream), torch.inference_mode():
            for here, there in zip(self._on_host, self._operations, strict=True):
                if there.op is dist.irecv:
                    there.tensor.copy_(here.tensor, non_blocking=True)
            self._landed = self._record()

    def synchronize(self) -> None:
        if self._landed is not None:
            self._module.current_stream(self._stream.device).wait_event(self._landed)


def _pinned_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


_TRANSFERS: dict[str, type[Transfer]] = {
    "gloo": GlooTransfer,
    "hccl": HcclTransfer,
    "fake": FakeTransfer,
}


def post(backend: str, operations: Sequence[dist.P2POp], timeout: float, what: str) -> Transfer:
    """A batch of operations on a group of ``backend``."""
    kind = _TRANSFERS.get(backend, DeviceTransfer)
    if backend == "gloo" and any(each.tensor.device.type != "cpu" for each in operations):
        kind = StagedTransfer
    return kind(operations, timeout, what)


def group_options(backend: str, *, hccl_buffer_size: int, nccl_max_ctas: int) -> Any:
    """Options for a group that moves weights and nothing else: small buffers, few cores.

    Args:
        backend: "hccl", "nccl" or another, which has no options.
        hccl_buffer_size: MiB of each of a communicator's two buffers.
        nccl_max_ctas: most CTAs that NCCL may use.
    """
    if backend == "hccl":
        # Each HCCL communicator takes two buffers of HCCL_BUFFSIZE (200 MiB by default) when it is
        # first used; weights need no more than a few MiB in flight.
        from torch_npu._C._distributed_c10d import ProcessGroupHCCL

        options = ProcessGroupHCCL.Options()
        options.hccl_config = {"hccl_buffer_size": hccl_buffer_size}
        return options
    if backend == "nccl":
        # Few CTAs, so that kernels with a cooperative launch are not starved by transfers.
        options = dist.ProcessGroupNCCL.Options()
        options.config.min_ctas = 1
        options.config.max_ctas = nccl_max_ctas
        return options
    return None
