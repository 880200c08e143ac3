"""PAR over the last steps: of all ranks' tokens, between the windows' ends, and nobody waits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.models import ToyModel, skewed_batch
from support.ranks import run_ranks

import torch_eplb
from torch_eplb.policies.split import par
from torch_eplb.routing.load import SampleWindow
from torch_eplb.testing import fake_process_group


def look(rank: int, world_size: int) -> None:
    for dispatch in ("all_to_all", "all_reduce"):
        options: dict[str, Any] = {"dispatch": dispatch, "policy": "random"}
        balancer = torch_eplb.wrap(
            ToyModel(), num_redundant_experts=2, collect_interval=100, plan_interval=1, **options
        )
        totals = []  # all ranks' tokens [layers, ranks] since wrapping, after every step

        def serve(totals: list[Any] = totals, balancer: Any = balancer, d: str = dispatch) -> None:
            seed = len(totals) if d == "all_reduce" else 1000 * rank + len(totals)
            with torch.no_grad():
                balancer(skewed_batch(8, 16, seed))
            total = torch.from_numpy(balancer.load()[1])
            dist.all_reduce(total)
            totals.append(total.numpy())

        # Sub-windows of 4 steps: a look is 16 steps long, and begins 8 steps after its last copy.
        shown = []
        for _ in range(60):
            serve()
            shown.append(balancer.stats().par_now)
        assert np.isnan(shown[24]).all()  # the look at steps 8..24 begins now
        for seen, first, last in ((shown[30], 8, 24), (shown[46], 24, 40)):
            counted = totals[last - 1] - totals[first - 1]
            np.testing.assert_allclose(seen, par(counted), err_msg=f"{dispatch} {first}")
        with balancer.paused():
            for _ in range(30):
                serve()
        # A look of which a part was recorded, and then one of nothing, which says nothing.
        counted = totals[71] - totals[55]
        np.testing.assert_allclose(balancer.stats().par_now, par(counted))
        assert balancer.stats().seconds_since_rebalance is None
        assert balancer.stats().migration_seconds == 0
        while balancer.stats().rebalances < 1:
            serve()
        stats = balancer.stats()
        assert stats.experts_moved > 0
        assert 0 < stats.migration_seconds < stats.hook_seconds
        assert 0 <= stats.seconds_since_rebalance < 60  # type: ignore[operator]
        # The window's last sub-window with tokens: the newest there is.
        np.testing.assert_allclose(stats.par_now, par(totals[99] - totals[95]))
        balancer.close()


def test_it_is_par_of_all_ranks_tokens_and_padding_changes_nothing() -> None:
    run_ranks(look, 2)


def test_a_copy_that_is_under_way_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_process_group(world_size=2):
        balancer = torch_eplb.wrap(ToyModel(), collect_interval=600)
        batch = skewed_batch(8, 16, 0)
        with torch.no_grad():
            monkeypatch.setattr(SampleWindow, "ready", lambda window: False)
            for _ in range(40):
                balancer(batch)
            assert all(map(math.isnan, balancer.stats().par_now))
            monkeypatch.undo()
            for _ in range(19):
                balancer(batch)
        expected = par(balancer.load()[1])  # every step is the same
        np.testing.assert_allclose(balancer.stats().par_now, expected)
        balancer.close()
