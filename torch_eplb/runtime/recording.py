"""Which steps are recorded, and writing the load of each to a trace (``record_path``)."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from torch_eplb.comm.communicator import Communicator, all_gather_single
from torch_eplb.files.expert_map import write_expert_map
from torch_eplb.files.paths import check_target
from torch_eplb.files.trace import TraceWriter
from torch_eplb.routing.load import LoadCounters
from torch_eplb.values.choices import PHASES, DispatchKind
from torch_eplb.values.placement import Placement

__all__ = ["MapWriter", "RecordedSteps", "StepRecorder"]

logger = logging.getLogger("torch_eplb")

# Gathers under way; beyond this the oldest is waited for, so that memory stays bounded.
_MOST_PENDING = 16


class RecordedSteps:
    """Which steps count as load: those of the wanted phase, outside of pauses.

    Args:
        wanted: "all", or the phase whose steps are recorded.
    """

    def __init__(self, wanted: str) -> None:
        self._wanted = wanted
        self._phase: str | None = None
        self._pauses = 0
        self._warned = False

    def wants(self) -> bool:
        """Whether the coming step is recorded."""
        if self._pauses:
            return False
        if self._wanted in ("all", self._phase):
            return True
        if self._phase is None and not self._warned:
            self._warned = True
            logger.warning(
                "phase=%r, but the model runs outside of balancer.phase(...): such steps are not "
                "recorded",
                self._wanted,
            )
        return False

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The steps inside are of phase ``name``."""
        names = [phase for phase in PHASES if phase != "all"]
        if name not in names:
            raise ValueError(f"phase must be one of {', '.join(names)}, got {name!r}")
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The steps inside are not recorded."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1


class MapWriter:
    """Writes planned placements as expert maps, each over the last (``record_map_path``).

    Args:
        path: the map to write.

    Attributes:
        failures: placements that could not be written.

    Raises:
        OSError, ValueError: nothing can be written there.
    """

    def __init__(self, path: str) -> None:
        self._path = check_target(path, "expert map")
        self.failures = 0

    def __call__(self, placement: Placement) -> None:
        """Write a placement; a failure costs a warning."""
        try:
            write_expert_map(self._path, placement)
        except (OSError, ValueError) as error:
            self.failures += 1
            logger.warning("the planned expert map is not written: %s; serving goes on", str(error))


class StepRecorder:
    """Gathers each step's load per source rank; rank 0 writes it. Every rank calls every method.

    A tool for studies: it costs one copy of the counters to the host and one gather per step.

    Args:
        path: the trace to write, on rank 0.
        comm: gives the control plane.
        counters: the load counters.
        dispatch: where all ranks hold the same tokens, one rank is the source.
        knows_sources: counters are of tokens that ranks sent. Else (some layer counts what arrived)
            the sum over ranks is written, as of one source.

    Attributes:
        failures: steps that could not be written.

    Raises:
        OSError, ValueError: on rank 0, nothing can be written there.
    """

    def __init__(
        self,
        path: str,
        comm: Communicator,
        counters: LoadCounters,
        dispatch: DispatchKind,
        knows_sources: bool = True,
    ) -> None:
        self._comm = comm
        self._counters = counters
        self._knows_sources = knows_sources
        self._sources = 1 if dispatch.shares_tokens or not knows_sources else comm.num_ranks
        layers = counters.values.shape[0]
        self._previous = torch.zeros((layers, counters.num_experts), dtype=torch.int64)
        self._pending: deque[tuple[torch.Tensor, dist.Work | None]] = deque()
        self._writer: TraceWriter | None = None
        self.failures = 0
        if comm.leads:
            self._writer = TraceWriter(
                path,
                num_source_ranks=self._sources,
                num_layers=layers,
                num_experts=counters.num_experts,
                meta={"source": "torch_eplb record_path", "dispatch": dispatch.name},
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
            if not self._comm.has_finished(work) and len(self._pending) <= most_pending:
                return
            self._comm.wait_for(work, "recording the load")
            self._pending.popleft()
            if self._writer is not None and bool(gathered.any()):
                if not self._knows_sources:
                    gathered = gathered.sum(0, keepdim=True)
                self._write(self._writer, gathered[: self._sources].numpy())

    def _write(self, writer: TraceWriter, counts: NDArray[np.int64]) -> None:
        """Write a step; a failure costs a warning, and what was written before is kept."""
        try:
            writer.append(counts)
        except (OSError, ValueError) as error:
            self.failures += 1
            if self.failures == 1:
                logger.warning("steps are missing in the trace: %s; serving goes on", str(error))

    def close(self) -> None:
        """Write what is under way and close the trace."""
        try:
            self._write_finished(0)
        finally:
            if self._writer is not None:
                try:
                    self._writer.close()
                except (OSError, ValueError) as error:
                    self.failures += self._writer.num_steps
                    logger.warning("the trace is not written: %s", str(error))
