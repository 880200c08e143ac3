"""PAR over the last steps, between one collection window's sum and the next: `PresentPar`."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from torch_eplb.comm.communicator import Communicator
from torch_eplb.policies.drift import look_steps, read_after
from torch_eplb.policies.split import par
from torch_eplb.routing.load import SampleWindow

__all__ = ["PresentPar"]


class PresentPar:
    """Looks at the load while it is collected, every 16 steps or some more.

    A look is the difference of two copies that the window has taken anyway, summed over ranks by an
    all-reduce on the control plane. It is started half a look after the second copy, for which
    nobody waits: a rank whose copy is still under way adds nothing but that it is, and then the
    look counts nowhere. Which looks are started, and when they are read, is the same on all ranks,
    as steps are.

    Args:
        comm: what ranks sum by.
        window: takes the copies.
        num_layers: MoE layers.

    Attributes:
        values: float64 ``[layers]``; NaN where nothing is known yet. Where a look counted nothing
            (dummy batches) it says what it said before. Same on all ranks.
        tokens: that the last look counted, per rank and summed over the layers.
    """

    def __init__(self, comm: Communicator, window: SampleWindow, num_layers: int) -> None:
        self._comm = comm
        self._window = window
        self._steps = look_steps(window.length)
        self._copies = self._steps // window.length  # of the window, per look
        self._sum_at, self._read_at = read_after(self._steps)
        self._sum: torch.Tensor | None = None
        self._work: dist.Work | None = None
        self.values: NDArray[np.float64] = np.full(num_layers, np.nan)
        self.tokens = 0.0

    def start(self) -> None:
        """A window begins; a look at the last one is forgotten."""
        self._sum, self._work = None, None

    def step(self, steps_since_start: int) -> bool:
        """Called at every boundary inside of a window, on all ranks.

        Returns:
            whether a look has counted something that is known from now on; same on all ranks.

        Raises:
            PeerLostError: a look failed, or its time is over.
        """
        looks, offset = divmod(steps_since_start, self._steps)
        if looks and offset == self._sum_at:
            self._look()
        elif self._sum is not None and offset == self._read_at:
            return self._read()
        return False

    def take(self, rank_load: NDArray[np.int64]) -> None:
        """What is known from elsewhere: tokens ``[layers, ranks]`` of the last steps."""
        counted = rank_load.sum(axis=1) > 0
        self.values = np.where(counted, par(rank_load), self.values)

    def _look(self) -> None:
        counted = self._window.last(self._copies)
        missing = torch.ones(1, dtype=torch.int64) if counted is None else torch.zeros(1).long()
        if counted is None:
            counted = torch.zeros((len(self.values), self._comm.num_ranks), dtype=torch.int64)
        self._sum = torch.cat([missing, counted.reshape(-1)])
        self._work = dist.all_reduce(self._sum, group=self._comm.control, async_op=True)

    def _read(self) -> bool:
        assert self._sum is not None
        self._comm.wait_for(self._work, "a look at the load")
        missing, counted = self._sum[0], self._sum[1:]
        self._sum, self._work = None, None
        if missing or not counted.any():
            return False
        self.tokens = float(counted.sum()) / self._comm.num_ranks
        self.take(counted.view(len(self.values), -1).numpy())
        return True
