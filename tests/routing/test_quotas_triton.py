"""The Triton kernel under Triton's interpreter: its logic, on machines without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def check_random_batches() -> None:
    import numpy as np
    import torch

    from torch_eplb.routing.quotas import solve_quotas_host
    from torch_eplb.routing.quotas_triton import solve_quotas_triton

    for seed, (experts, ranks, redundant) in enumerate(
        [(8, 2, 2), (12, 3, 3), (16, 4, 0), (64, 8, 16), (64, 8, 64), (64, 16, 32)]
    ):
        rng = np.random.default_rng(seed)
        per_rank = (experts + redundant) // ranks
        # Experts in order, each rank's second half moved on by one rank: replicas share ranks.
        flat = (np.arange(ranks * per_rank) % experts).reshape(ranks, per_rank)
        flat[:, per_rank // 2 :] = np.roll(flat[:, per_rank // 2 :], 1, axis=0)
        most = min(ranks, redundant + 1)
        slots = np.full((experts, most), -1)
        for expert in range(experts):
            # One replica on a rank, as `RoutingTables` keeps them.
            held = np.flatnonzero(flat == expert)
            held = held[np.unique(held // per_rank, return_index=True)[1]]
            slots[expert, : len(held)] = held
        present = slots >= 0
        shared = present & (present.sum(axis=1, keepdims=True) > 1)
        rounding = np.bincount(slots[shared] // per_rank, minlength=ranks).max()
        for tokens in (0, 97, 65536, 1 << 40):
            weights = rng.lognormal(0, 1, experts)
            counts = rng.multinomial(tokens, weights / weights.sum())
            quotas = solve_quotas_triton(
                torch.from_numpy(counts), torch.from_numpy(slots), ranks, per_rank
            ).numpy()
            assert (quotas >= 0).all()
            assert (quotas[~present] == 0).all()
            assert (quotas.sum(axis=1) == counts).all()
            peaks = []
            for found in (quotas, solve_quotas_host(counts, slots, ranks, per_rank)):
                loads = np.zeros(ranks)
                np.add.at(loads, slots[present] // per_rank, found[present])
                peaks.append(loads.max())
            assert peaks[0] <= peaks[1] * 1.005 + rounding, (seed, tokens, peaks)


def test_the_kernel_conserves_counts_and_reaches_the_hosts_peak() -> None:
    pytest.importorskip("triton")
    # Triton decides when it is imported whether to interpret, so in a process of its own.
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    check_random_batches()
