"""A stand-in for HCCL on the CPU, of the shape that torch-npu gives it.

* a backend registered as "hccl", here for CPU tensors and over gloo, whose creator gets the options
  object and keeps it for the test to look at;
* a module ``torch_npu._C._distributed_c10d`` with ``ProcessGroupHCCL.Options`` and its
  ``hccl_config``;
* ``batch_isend_irecv`` replaced, as torch-npu does: one Work for the whole batch, whose
  ``is_completed`` tells the truth.
"""

from __future__ import annotations

import sys
import threading
import types
from datetime import timedelta
from importlib.machinery import ModuleSpec
from typing import Any

import torch.distributed as dist

created: list[Any] = []
"""The options of every group that was made, in order; None where there were none."""


class Options:
    def __init__(self) -> None:
        self.hccl_config: dict[str, int | str] = {}
        self.is_high_priority_stream = False


class BatchWork:
    """One Work for a whole batch."""

    def __init__(self, works: list[dist.Work]) -> None:
        self._works = works
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._wait, daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        try:
            for work in self._works:
                work.wait()
        except BaseException as error:
            self._error = error

    def is_completed(self) -> bool:
        return not self._thread.is_alive()

    def exception(self) -> BaseException | None:
        return None if self._thread.is_alive() else self._error

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._thread.join(timeout.total_seconds() if timeout else None)
        if self._thread.is_alive():
            raise RuntimeError("the batch timed out")
        if self._error is not None:
            raise self._error
        return True


def install() -> None:
    """Make this process believe that torch-npu is there."""

    def create(options: Any, pg_options: Any) -> Any:
        created.append(pg_options)
        return dist.ProcessGroupGloo(
            options.store, options.group_rank, options.group_size, options.timeout
        )

    dist.Backend.register_backend("hccl", create, extended_api=True, devices=["cpu"])
    module = types.ModuleType("torch_npu._C._distributed_c10d")
    module.ProcessGroupHCCL = types.SimpleNamespace(Options=Options)  # type: ignore[attr-defined]
    for name in ("torch_npu", "torch_npu._C"):
        sys.modules[name] = types.ModuleType(name)
        # Other libraries look for it with importlib.util.find_spec, which wants one.
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    sys.modules[module.__name__] = module
    original = dist.batch_isend_irecv

    def batch_isend_irecv(operations: list[dist.P2POp]) -> list[Any]:
        return [BatchWork(original(operations))]

    dist.batch_isend_irecv = batch_isend_irecv
