"""How a batch of point-to-point operations is carried out: one small class per kind of backend.

A `Transfer` is one batch. `start` lets it run beside the forward, `finished` tells without waiting
whether it is complete, `wait` waits for it, and `synchronize` orders the current stream behind it.

* `GlooTransfer`: somebody must post and wait. gloo's point-to-point works never report completion
  before they are waited for, and posting takes as long as the sockets' buffers and locks want,
  milliseconds for an expert. After `start` a thread does it (the GIL is released meanwhile);
  without it, `wait`.
* `DeviceTransfer`: an accelerator's backend is given its work at once, on the current stream, and
  is asked.
* `FakeTransfer`: torch's ``fake`` backend, which moves nothing and is done at once.
"""

from __future__ import annotations

import _thread
import contextlib
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from torch_eplb.values.errors import EPLBError

__all__ = ["DeviceTransfer", "FakeTransfer", "GlooTransfer", "Transfer", "group_options", "post"]


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
        # One Work may stand for the whole batch (torch-npu), and None for one that is done.
        works = dist.batch_isend_irecv(self._operations) if self._operations else []
        self._works = [work for work in works if work is not None]

    def finished(self) -> bool:
        if all(work.is_completed() for work in self._works):
            return True
        if time.monotonic() > self._deadline:
            raise self._overdue()
        return False

    def synchronize(self) -> None:
        for work in self._works:
            work.wait()


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


_TRANSFERS: dict[str, type[Transfer]] = {"gloo": GlooTransfer, "fake": FakeTransfer}


def post(backend: str, operations: Sequence[dist.P2POp], timeout: float, what: str) -> Transfer:
    """A batch of operations on a group of ``backend``."""
    return _TRANSFERS.get(backend, DeviceTransfer)(operations, timeout, what)


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
