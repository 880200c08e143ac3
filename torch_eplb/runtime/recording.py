"""Writing the load of every step to a trace (``record_path``)."""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist

from torch_eplb.comm.communicator import Communicator, all_gather_single, wait_for
from torch_eplb.files.trace import TraceWriter
from torch_eplb.routing.load import LoadCounters

__all__ = ["StepRecorder"]

# Gathers under way; beyond this the oldest is waited for, so that memory stays bounded.
_MOST_PENDING = 16


class StepRecorder:
    """Gathers each step's load per source rank; rank 0 writes it. Every rank calls every method.

    A tool for studies: it costs one copy of the counters to the host and one gather per step.

    Args:
        path: the trace to write, on rank 0.
        comm: gives the control plane.
        counters: the load counters.
        dispatch: with "all_reduce" all ranks hold the same tokens, so that one rank is the source.
    """

    def __init__(
        self, path: str, comm: Communicator, counters: LoadCounters, dispatch: str
    ) -> None:
        self._comm = comm
        self._counters = counters
        self._sources = 1 if dispatch == "all_reduce" else comm.num_ranks
        layers = counters.values.shape[0]
        self._previous = torch.zeros((layers, counters.num_experts), dtype=torch.int64)
        self._pending: deque[tuple[torch.Tensor, dist.Work | None]] = deque()
        self._writer: TraceWriter | None = None
        if comm.rank == 0 or comm.fake:
            self._writer = TraceWriter(
                path,
                num_source_ranks=self._sources,
                num_layers=layers,
                num_experts=counters.num_experts,
                meta={"source": "torch_eplb record_path", "dispatch": dispatch},
            )

    def boundary(self) -> None:
        """Record the step that has just ended (nothing, if it was not to be recorded)."""
        counted = self._counters.values[:, : self._counters.num_experts]
        present = counted.to("cpu", copy=True)
        step = present - self._previous
        self._previous = present
        gathered = step.new_empty((self._comm.num_ranks, *step.shape))
        work = all_gather_single(
            gathered.view(-1), step.view(-1), group=self._comm.control, async_op=True
        )
        self._pending.append((gathered, work))
        self._write_finished(_MOST_PENDING)

    def _write_finished(self, most_pending: int) -> None:
        while self._pending:
            gathered, work = self._pending[0]
            done = work is None or self._comm.fake or work.is_completed()
            if not done and len(self._pending) <= most_pending:
                return
            wait_for(work, self._comm, "recording the load")
            self._pending.popleft()
            if self._writer is not None and bool(gathered.any()):
                self._writer.append(gathered[: self._sources].numpy())

    def close(self) -> None:
        """Write what is under way and close the trace."""
        try:
            self._write_finished(0)
        finally:
            if self._writer is not None:
                self._writer.close()
