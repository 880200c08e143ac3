"""The Triton kernel without a GPU: its logic in Triton's interpreter, its code ahead of time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

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


SIZES = [(64, 8, 10), (256, 16, 18), (256, 32, 9), (512, 16, 40), (256, 8, 64), (1024, 8, 136)]
"""Experts, ranks and slots per rank; some at the bounds of what the kernel is made for."""


def compiled(size: tuple[int, int, int], *target: Any) -> Any:
    """The kernel, ahead of time: no GPU is needed."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from torch_eplb.routing import quotas_triton

    experts, ranks, slots = size
    assert quotas_triton.fits(*size)
    replicated, everything = quotas_triton.tiles(*size)
    columns = triton.next_power_of_2(ranks)
    constants = {
        "M": min(ranks, ranks * slots - experts + 1),
        "X": replicated // columns,
        "R_PAD": columns,
        "E_PAD": everything // columns,
        "ITERATIONS": quotas_triton._ITERATIONS,
        "GROUPS": quotas_triton._GROUPS,
    }
    kernel = quotas_triton._kernel
    names = list(kernel.arg_names)
    kinds = {
        name: "constexpr" if name in constants else "*i64" if name.endswith("_ptr") else "i32"
        for name in names
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=values)
    return triton.compile(source, target=GPUTarget(*target), options={"num_warps": 8}).asm


@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_spilled_on_an_sm_90(size: tuple[int, int, int], tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(compiled(size, "cuda", 90, 32)["ptx"])
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    said = subprocess.run(
        [ptxas, "-v", "--gpu-name", "sm_90a", ptx, "-o", tmp_path / "kernel.cubin"],
        capture_output=True, text=True, timeout=300, check=True,
    ).stderr  # fmt: skip
    assert re.findall(r"(\d+) bytes spill", said) == ["0", "0"], said


@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_spilled_on_a_gfx942(size: tuple[int, int, int]) -> None:
    text = compiled(size, "hip", "gfx942", 64)["amdgcn"]
    assert dict(re.findall(r"\.(\w+_spill_count):\s+(\d+)", text)) == {
        "sgpr_spill_count": "0",
        "vgpr_spill_count": "0",
    }


if __name__ == "__main__":
    check_random_batches()
