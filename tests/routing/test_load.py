"""What is sampled of a collection: the last steps finely, the steps before them in one sum."""

from __future__ import annotations

import pytest
import torch

from torch_eplb.routing.load import MAX_SAMPLES, LoadCounters, SampleWindow


@pytest.mark.parametrize(
    ("interval", "window", "steps"),  # of each sample, the first before the window
    [
        (600, 50, [550] + [2] * 25),
        (100, 64, [36] + [2] * 32),
        (130, 65, [65] + [3] * 21 + [2]),
        (20, 50, [0] + [1] * 20),
        (100, 500, [0] + [4] * 25),
        (1, 1, [0, 1]),
    ],
)
def test_samples_are_of_the_last_steps(interval: int, window: int, steps: list[int]) -> None:
    counters = LoadCounters(2, 3, 2, torch.device("cpu"))
    sampled = SampleWindow(counters, interval, window)
    for _ in range(2):  # a collection forgets the one before
        counters.values.random_(1000)
        sampled.start()
        counted = []
        for step in range(1, interval + 1):
            counted.append(torch.randint(100, counters.values.shape))
            counters.values += counted[-1]
            sampled.step(step)
        sampled.finish(interval)
        expected = [sum(part, torch.zeros(2, 5).long()) for part in _parts(counted, steps)]
        assert torch.equal(sampled.samples(), torch.stack(expected))
        assert len(steps) <= 1 + MAX_SAMPLES


def _parts(counted: list[torch.Tensor], steps: list[int]) -> list[list[torch.Tensor]]:
    ends = torch.tensor(steps).cumsum(0).tolist()
    return [counted[end - length : end] for end, length in zip(ends, steps, strict=True)]


def test_a_collection_cut_short_is_sampled_from_then_on() -> None:
    counters = LoadCounters(2, 3, 2, torch.device("cpu"))
    sampled = SampleWindow(counters, 600, 50)
    for cut in (26, 91):
        sampled.start()
        counted = []
        for step in range(1, cut + 16 + 1):
            counted.append(torch.randint(100, counters.values.shape))
            counters.values += counted[-1]
            sampled.step(step)
            if step == cut:
                assert sampled.shorten(step, 16) == cut + 16
        sampled.finish(cut + 16)
        expected = [
            sum(part, torch.zeros(2, 5).long()) for part in _parts(counted, [cut, *[2] * 8])
        ]
        assert torch.equal(sampled.samples(), torch.stack(expected))
    sampled.start()
    assert sampled.shorten(550, 16) is None  # the window has begun
    assert SampleWindow(counters, 40, 50).shorten(20, 16) is None  # all of it is the window
