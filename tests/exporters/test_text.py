"""`report`: a table for people."""

from __future__ import annotations

import dataclasses

import numpy as np
from support.running import LOAD, RANK_LOAD, STATS, Fresh, Running

from torch_eplb.exporters import report
from torch_eplb.values.placement import Placement


def test_a_balancer_that_has_rebalanced() -> None:
    text = report(STATS, Running().placement, (LOAD, RANK_LOAD))
    assert text + "\n" == (
        """\
torch_eplb: 3 layers, 8 experts and 2 redundant ones on 2 ranks of 5 slots
step 1,234: collecting load

PAR (1 is perfect)          mean      worst layer
last steps                 1.500  2.000 (layer 2)
last window                1.250  1.500 (layer 0)
expected by the last plan  1.010  1.020 (layer 1)

rebalances           3, the last 75 s ago; planned early: 1
experts moved        21 in 7 rounds
active experts       3.5 on the rank with most, mean over layers' calls
this rank's traffic  3.00 MiB sent, 2.00 MiB received
staging              512 KiB used at most of 1.00 MiB
time                 0.25 s planning beside the model, 1.50 s at step boundaries (0.50 s moving)
faults               plans failed: 1, planner restarts: 2, rebalances abandoned: 0

layers
layer    PAR  expected  experts with replicas  hottest expert  its load / mean  ranks' load / mean
    0  1.500     1.010            2 (up to 2)               7             1.78        0.56 to 1.44
    1  1.250     1.020            2 (up to 2)               7             1.28        0.84 to 1.16
    2  1.000     1.000            2 (up to 2)               7             1.17        0.90 to 1.10
"""
    )


def test_before_the_first_window_it_says_so() -> None:
    text = report(Fresh().now, Fresh().placement)
    assert "PAR: not known before the first collection window has ended" in text
    assert "    0    -         -" in text
    assert "hottest" not in text


def test_troubles_stand_at_the_top() -> None:
    ill = dataclasses.replace(
        STATS, stalled="moving experts for 1000 steps", disabled="lost rank 2"
    )
    lines = report(ill, Running().placement).splitlines()
    assert lines[2:4] == ["STALLED: moving experts for 1000 steps", "OFF FOR GOOD: lost rank 2"]


def test_of_many_layers_the_worst_are_shown_and_lines_are_short() -> None:
    layers = 60
    par = (1 + np.arange(layers) / 100).tolist()
    stats = dataclasses.replace(STATS, par_measured=par, par_predicted=par)
    placement = Placement.initial(layers, 256, 32, 9)
    load = np.ones((layers, 256), int), np.zeros((layers, 32), int)
    load[0][59] = 0
    lines = report(stats, placement, load).splitlines()
    assert "the 12 layers with the largest PAR, of 60" in lines
    shown = [line.split()[0] for line in lines[-12:]]
    assert shown == [str(layer) for layer in range(59, 47, -1)]
    assert "no load" in lines[-12]
    assert max(map(len, lines)) <= 100
