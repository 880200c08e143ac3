"""Load counters on the device, and the samples that policies see.

Counting costs one small addition per layer into ``counters``; samples are differences of copies of
that tensor, taken on the host side at the ends of sub-windows, so a window of any length takes no
device memory.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["MAX_SAMPLES", "LoadCounters", "SampleWindow"]

MAX_SAMPLES = 32
"""Most sub-windows of one collection window."""


class LoadCounters:
    """Tokens routed by this rank since wrapping, per logical expert and per destination rank.

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
        experts.addcmul_(hits_E, self.recording)
        ranks.addcmul_(sent_R, self.recording)

    def set_recording(self, recording: bool) -> None:
        """Whether the coming step is recorded."""
        if recording != self._is_recording:
            self.recording.fill_(int(recording))
            self._is_recording = recording

    @property
    def is_recording(self) -> bool:
        return self._is_recording


class SampleWindow:
    """One collection window: up to `MAX_SAMPLES` sub-window sums of the counters.

    Copies to the host are started at sub-window ends and looked at later, so that no step waits.

    Args:
        counters: what is sampled.
        interval: steps of a window.

    Attributes:
        length: steps of a sub-window.
    """

    def __init__(self, counters: LoadCounters, interval: int) -> None:
        self._counters = counters
        self.length = -(-interval // MAX_SAMPLES)
        self._on_device = counters.values.device.type != "cpu"
        self._copies: list[torch.Tensor] = []
        self._event: torch.Event | None = None

    def start(self) -> None:
        """Forget what was sampled; the next sub-window starts now."""
        self._copies = []
        self._copy()

    def step(self, steps_since_start: int) -> None:
        """Called at every step boundary; takes a sample when a sub-window ends."""
        if steps_since_start > 0 and steps_since_start % self.length == 0:
            self._copy()

    def finish(self, steps_since_start: int) -> None:
        """The window ends here, in the middle of a sub-window perhaps."""
        if steps_since_start % self.length:
            self._copy()

    def _copy(self) -> None:
        values = self._counters.values
        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=self._on_device)
        copy.copy_(values, non_blocking=True)
        self._copies.append(copy)
        if self._on_device:
            self._event = torch.Event(values.device)
            self._event.record()

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
        """int64 ``[samples, layers, experts + ranks]`` on the host: sums over the sub-windows."""
        stacked = torch.stack(self._copies)
        return stacked[1:] - stacked[:-1]


def split_samples(
    samples: torch.Tensor, num_experts: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Load ``[samples, layers, experts]`` and rank load ``[samples, layers, ranks]`` as numpy."""
    values = samples.numpy()
    return values[..., :num_experts], values[..., num_experts:]
