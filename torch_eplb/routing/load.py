"""Load counters on the device, and the samples that policies see.

Counting costs one small addition per layer into ``counters``; samples are differences of copies of
that tensor, taken on the host side at the ends of sub-windows, so a window of any length takes no
device memory.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from torch_eplb.routing.device import count_dtype

__all__ = ["MAX_SAMPLES", "LoadCounters", "SampleWindow", "sample_steps"]

MAX_SAMPLES = 32
"""Most samples that policies see, and most sub-windows of one collection."""


class LoadCounters:
    """Tokens routed by this rank since wrapping, per logical expert and per destination rank.

    Of layers that hand over what arrived (`add_arrived`) they are the tokens that this rank got,
    and the destination is this rank. Either way the sum over ranks is the whole load.

    Attributes:
        values: int64 ``[layers, experts + ranks]`` on the device; written in place only. The first
            ``experts`` columns count tokens by logical expert, the rest by the rank whose slot was
            chosen.
        recording: int64 scalar on the device, 1 in steps that are recorded and 0 in others; a
            tensor, so that captured graphs see it change.
    """

    def __init__(
        self, num_layers: int, num_experts: int, num_ranks: int, device: torch.device
    ) -> None:
        self.num_experts = num_experts
        self.values = torch.zeros(
            (num_layers, num_experts + num_ranks), dtype=torch.int64, device=device
        )
        self.recording = torch.ones((), dtype=torch.int64, device=device)
        self._is_recording = True
        self._experts = [row[:num_experts] for row in self.values]
        self._ranks = [row[num_experts:] for row in self.values]

    def tensors(self) -> list[torch.Tensor]:
        """All that is written on the device."""
        return [self.values, self.recording]

    def add(self, layer: int, hits_E: torch.Tensor, sent_R: torch.Tensor) -> None:
        """Count one batch of one layer."""
        if torch.compiler.is_compiling():
            # Rows that were cut before would be further inputs of the graph on the same memory.
            row = self.values[layer]
            experts, ranks = row[: self.num_experts], row[self.num_experts :]
        else:
            experts, ranks = self._experts[layer], self._ranks[layer]
        self._add(experts, hits_E)
        self._add(ranks, sent_R)

    def add_arrived(
        self, layer: int, counts_S: torch.Tensor, experts_S: torch.Tensor, rank: int
    ) -> None:
        """Count what arrived at one layer in one batch.

        Args:
            layer: its index.
            counts_S: integers ``[slots]``, tokens that each slot of this rank got.
            experts_S: int64 ``[slots]``, the slots' logical experts.
            rank: this rank.
        """
        row = self.values[layer]
        dtype = count_dtype(row)
        counts_S = counts_S.to(dtype)
        here = self.num_experts + rank
        arrived = row.new_zeros(len(row), dtype=dtype).scatter_add_(0, experts_S, counts_S)
        arrived[here : here + 1] = counts_S.sum(0, keepdim=True, dtype=dtype)
        self._add(row, arrived)

    def _add(self, counters: torch.Tensor, counts: torch.Tensor) -> None:
        dtype = count_dtype(counters)
        if dtype == counters.dtype:
            counters.addcmul_(counts, self.recording)
        else:
            counters.add_(counts.to(dtype) * self.recording.to(dtype))

    def set_recording(self, recording: bool) -> None:
        """Whether the coming step is recorded."""
        if recording != self._is_recording:
            self.recording.fill_(int(recording))
            self._is_recording = recording

    @property
    def is_recording(self) -> bool:
        return self._is_recording


def sample_steps(interval: int, window: int) -> int:
    """Steps of a sample: as many as leave at most `MAX_SAMPLES` in a window.

    >>> sample_steps(600, 50), sample_steps(20, 50)
    (2, 1)
    """
    return -(-min(interval, window) // MAX_SAMPLES)


class SampleWindow:
    """What is sampled while load is collected: the whole coarsely, the last steps finely.

    Plans are made from the last steps: load drifts, and what it was long ago says little about
    what comes. Copies to the host are started at sub-window ends and looked at later, so that no
    step waits.

        steps        0 ................................ interval - window .... interval
        sub-windows  |        |        |        |        |        |        |        |   of length
        samples      |           earlier               | | | | | | | | | | | | | | | |   of fine

    A collection may be cut short while its window has not begun (`shorten`); what is sampled from
    then on is its window.

    Args:
        counters: what is sampled.
        interval: steps of a collection.
        window: steps before its end that plans are made from.

    Attributes:
        length: steps of a sub-window.
        fine: steps of a sample of the window.
        samples_per_length: samples that take as long, about.
    """

    def __init__(self, counters: LoadCounters, interval: int, window: int) -> None:
        self._counters = counters
        self.length = -(-interval // MAX_SAMPLES)
        self._interval, self._window = interval, window
        self._first = 0  # the first step of the window
        self.fine = sample_steps(interval, window)
        self.samples_per_length = -(-self.length // self.fine)
        self._on_device = counters.values.device.type != "cpu"
        self._copies: list[torch.Tensor] = []
        self._samples: list[torch.Tensor] = []
        self._event: torch.Event | None = None

    def start(self) -> None:
        """Forget what was sampled; the next sub-window starts now."""
        self._first = max(self._interval - self._window, 0)
        self._copies, self._samples = [], []
        self.step(0)

    def step(self, steps_since_start: int) -> None:
        """Called at every step boundary; takes a copy when a sub-window or a sample ends."""
        since = steps_since_start - self._first
        self._take(steps_since_start % self.length == 0, since >= 0 and since % self.fine == 0)

    def shorten(self, steps_since_start: int, steps: int) -> int | None:
        """Let the window begin at this step, after `step`, and take so many steps.

        Returns:
            the step at which the collection then ends; None where it ends soon anyway.
        """
        if steps_since_start + steps >= self._interval or steps_since_start >= self._first:
            return None
        self._first = steps_since_start
        self._take(False, True)
        return steps_since_start + steps

    def finish(self, steps_since_start: int) -> None:
        """The collection ends here, in the middle of a sub-window perhaps."""
        since = steps_since_start - self._first
        self._take(steps_since_start % self.length > 0, since % self.fine > 0)

    def _take(self, sub_window: bool, sample: bool) -> None:
        if not sub_window and not sample:
            return
        copy = self._copy()
        if sub_window:
            self._copies.append(copy)
        if sample:
            self._samples.append(copy)

    def _copy(self) -> torch.Tensor:
        values = self._counters.values
        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=self._on_device)
        copy.copy_(values, non_blocking=True)
        if self._on_device:
            self._event = torch.Event(values.device)
            self._event.record()
        return copy

    def ready(self) -> bool:
        """Whether all copies have arrived on the host."""
        return self._event is None or self._event.query()

    def last(self, copies: int) -> torch.Tensor | None:
        """int64 ``[layers, ranks]``: tokens by the rank chosen, between the last copy and the one
        so many before it; None while a copy is under way."""
        if not self.ready():
            return None
        difference = self._copies[-1] - self._copies[-1 - copies]
        return difference[:, self._counters.num_experts :]

    def samples(self) -> torch.Tensor:
        """int64 ``[1 + samples, layers, experts + ranks]`` on the host: first the sum of what came
        before the window."""
        stacked = torch.stack([self._copies[0], *self._samples])
        return stacked[1:] - stacked[:-1]


def split_samples(
    samples: torch.Tensor, num_experts: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Load ``[samples, layers, experts]`` and rank load ``[samples, layers, ranks]`` as numpy."""
    values = samples.numpy()
    return values[..., :num_experts], values[..., num_experts:]
