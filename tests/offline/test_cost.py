"""The cost model, against numbers that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from torch_eplb.offline.cost import HARDWARE, CostModel, Hardware, traffic
from torch_eplb.schedule.schedule import Schedule, make_schedule
from torch_eplb.values.placement import Placement

RANK = Hardware(flops_per_second=1000.0, link_bytes_per_second=10.0, efficiency=0.5, source="test")
MODEL = CostModel(RANK, expert_bytes=20, flops_per_token=5.0)


def schedule_of(current: list[list[int]], wanted: list[list[int]], experts: int) -> Schedule:
    return make_schedule(
        Placement(np.array([current]), experts),
        Placement(np.array([wanted]), experts),
        expert_bytes=20,
        staging_bytes=20,
    )


def test_a_step_takes_what_the_most_loaded_rank_of_each_layer_needs() -> None:
    peak_tokens = np.array([[100, 50], [0, 10]])
    assert MODEL.compute_seconds(peak_tokens).tolist() == pytest.approx([1.5, 0.1])


def test_a_swap_between_two_ranks_takes_one_expert_each_way_at_once() -> None:
    schedule = schedule_of([[0], [1]], [[1], [0]], 2)
    assert traffic(schedule) == 2
    assert MODEL.migration_seconds(schedule) == pytest.approx(2.0)


def test_a_rank_that_sends_to_many_is_the_bottleneck() -> None:
    schedule = schedule_of([[0, 1], [2, 1], [3, 1]], [[0, 1], [2, 0], [3, 0]], 4)
    assert traffic(schedule) == 2
    assert MODEL.migration_seconds(schedule) == pytest.approx(4.0)


def test_nothing_to_move_costs_nothing() -> None:
    schedule = schedule_of([[0], [1]], [[0], [1]], 2)
    assert traffic(schedule) == 0
    assert MODEL.migration_seconds(schedule) == 0


@pytest.mark.parametrize("name", HARDWARE)
def test_every_preset_names_its_source_and_what_is_assumed(name: str) -> None:
    assert "assumption" in HARDWARE[name].source


@pytest.mark.parametrize("field", ["flops_per_second", "link_bytes_per_second", "efficiency"])
def test_impossible_hardware_is_refused(field: str) -> None:
    values = {"flops_per_second": 1.0, "link_bytes_per_second": 1.0, "efficiency": 1.0}
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=field):
            Hardware(**{**values, field: wrong}, source="")


def test_an_expert_without_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="expert_bytes"):
        CostModel(RANK, expert_bytes=0, flops_per_token=1.0)
    with pytest.raises(ValueError, match="flops_per_token"):
        CostModel(RANK, expert_bytes=1, flops_per_token=0.0)
