"""What `serve_moe.py` shows: the live table, the summary and the pictures."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.live import Live
from rich.table import Table
from torch import Tensor

from torch_eplb import Placement, Stats

Load = tuple[NDArray[np.int64], NDArray[np.int64]]  # [layers, experts] and [layers, ranks]

ROWS = 14  # of the live table
PLAIN_EVERY = 12  # batches, where standard output is not a terminal


@dataclass
class Row:
    """One batch: the balancer's figures after it, and the load that it caused."""

    stats: Stats
    unbalanced: NDArray[np.float64]  # [layers, ranks], tokens per rank had nothing ever moved
    balanced: NDArray[np.int64]  # [layers, ranks], tokens that each rank really computed

    @property
    def par_without(self) -> float:
        return mean_par(self.unbalanced)

    @property
    def par_now(self) -> float:
        return mean_par(self.balanced)

    def cells(self) -> list[str]:
        return [
            str(self.stats.step),
            f"{self.par_now:.2f}",
            f"{self.par_without:.2f}",
            str(self.stats.rebalances),
            str(self.stats.experts_moved),
            f"{self.stats.staging_bytes_peak >> 10} of {self.stats.staging_bytes >> 10} KiB",
        ]


COLUMNS = ["step", "PAR now", "PAR without balancing", "rebalances", "experts moved", "staging"]


@dataclass
class History:
    """Everything observed on this rank while it served."""

    initial: Placement
    rows: list[Row] = field(default_factory=list)

    def record(self, stats: Stats, before: Load, after: Load) -> None:
        """One batch, with what `balancer.load()` said before and after it. Collective."""
        expert_load, rank_load = (
            torch.from_numpy(new - old) for old, new in zip(before, after, strict=True)
        )
        dist.all_reduce(expert_load)
        dist.all_reduce(rank_load)
        unbalanced = even_split_load(expert_load.numpy(), self.initial)
        self.rows.append(Row(stats, unbalanced, rank_load.numpy()))

    def rebalanced_at(self) -> list[int]:
        """Steps at which a rebalance was complete."""
        return [
            after.stats.step
            for before, after in pairwise(self.rows)
            if after.stats.rebalances > before.stats.rebalances
        ]


@dataclass
class Checks:
    """Comparisons with the unwrapped model."""

    batches: int = 0
    largest_difference: float = 0.0
    largest_logit: float = 0.0
    tokens: int = 0
    different_tokens: int = 0

    def logits(self, ours: Tensor, expected: Tensor) -> None:
        self.batches += 1
        difference = (ours - expected).abs().max().item()
        self.largest_difference = max(self.largest_difference, difference)
        self.largest_logit = max(self.largest_logit, expected.abs().max().item())

    def greedy_tokens(self, ours: Tensor, expected: Tensor) -> None:
        self.tokens += expected.numel()
        self.different_tokens += int((ours != expected).sum())

    def over_ranks(self) -> Checks:
        """The results of all ranks taken together. Collective."""
        results: list[Checks] = [self] * dist.get_world_size()
        dist.all_gather_object(results, self)
        return Checks(
            batches=sum(r.batches for r in results),
            largest_difference=max(r.largest_difference for r in results),
            largest_logit=max(r.largest_logit for r in results),
            tokens=sum(r.tokens for r in results),
            different_tokens=sum(r.different_tokens for r in results),
        )


def even_split_load(expert_load: NDArray[np.int64], placement: Placement) -> NDArray[np.float64]:
    """Tokens per rank, ``[layers, ranks]``, when replicas share their expert's tokens evenly."""
    share = expert_load / placement.replica_counts()
    layer = np.arange(placement.num_layers)[:, None, None]
    return share[layer, placement.experts].sum(axis=2)


def mean_par(rank_load: NDArray[np.float64] | NDArray[np.int64]) -> float:
    """Peak-to-average ratio of the ranks' load ``[layers, ranks]``, averaged over the layers."""
    return float((rank_load.max(axis=1) / rank_load.mean(axis=1)).mean())


class Display:
    """A live table on a terminal, a line now and then elsewhere, nothing when not enabled."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.live = Live(refresh_per_second=8) if enabled and sys.stdout.isatty() else None

    def __enter__(self) -> Display:
        if self.live:
            self.live.start()
        elif self.enabled:
            print("  ".join(COLUMNS), flush=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live:
            self.live.stop()

    def show(self, history: History) -> None:
        """Shows the newest rows."""
        if self.live:
            table = Table(*COLUMNS, title="4 ranks, 4 MoE layers of 32 experts")
            for row in history.rows[-ROWS:]:
                table.add_row(*row.cells())
            self.live.update(table)
        elif self.enabled and len(history.rows) % PLAIN_EVERY == 1:
            cells = history.rows[-1].cells()
            widths = map(len, COLUMNS)
            print("  ".join(c.rjust(w) for c, w in zip(cells, widths, strict=True)), flush=True)


def print_summary(history: History, ranks: list[Stats], checks: Checks, seconds: float) -> None:
    """PAR, migration, staging and the results of the checks; ``ranks`` has each rank's stats."""
    rows, stats = history.rows, ranks[0]
    print(f"\n{len(rows)} batches, {stats.step} steps in {seconds:.0f} s")
    print("PAR (1 is perfect; mean of layers)   without balancing   with balancing")
    for name, part in {
        "before: until an expert moves": [r for r in rows if r.stats.placement_version == 0],
        "after: from the first rebalance on": [r for r in rows if r.stats.rebalances > 0],
        "last quarter of the run": rows[-(len(rows) // 4) :],
    }.items():
        if part:
            without = np.mean([row.par_without for row in part])
            now = np.mean([row.par_now for row in part])
            print(f"  {name:35s}{without:12.2f}{now:19.2f}")
    moving = sum(
        after.stats.placement_version != before.stats.placement_version
        for before, after in pairwise(rows)
    )
    print(
        f"migration: {stats.rebalances} rebalances, {stats.experts_moved} experts moved in "
        f"{moving} steps, {sum(r.bytes_sent for r in ranks) / 1e6:.2f} MB sent by all ranks\n"
        f"staging: peak {max(r.staging_bytes_peak for r in ranks):,} bytes per rank, "
        f"budget {stats.staging_bytes:,} bytes\n"
        f"outputs: largest difference from the unwrapped model {checks.largest_difference:.1e} "
        f"in {checks.batches} batches (logits up to {checks.largest_logit:.0f})"
    )
    if checks.different_tokens:
        print(f"greedy tokens: {checks.different_tokens} of {checks.tokens} DIFFER")
    else:
        print(f"greedy tokens: all {checks.tokens} equal to the unwrapped model's")


def draw(history: History, folder: Path) -> list[Path]:
    """Writes two PNG pictures and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "load_per_rank.png", folder / "par_over_time.png"]
    draw_load_per_rank(history).savefig(paths[0], dpi=120)
    draw_par_over_time(history).savefig(paths[1], dpi=120)
    return paths


def draw_load_per_rank(history: History) -> Figure:
    """Bars per layer and rank: the last quarter's load, had nothing moved, and as it was."""
    rows = history.rows[-(len(history.rows) // 4) :]
    loads = {
        "without balancing": np.sum([row.unbalanced for row in rows], axis=0),
        "with balancing": np.sum([row.balanced for row in rows], axis=0),
    }
    layers, ranks = loads["with balancing"].shape
    figure = Figure(figsize=(3 * layers, 3.2), layout="constrained")
    axes = figure.subplots(1, layers, sharey=True, squeeze=False)
    for layer, axis in enumerate(axes[0]):
        for offset, (name, load) in zip((-0.2, 0.2), loads.items(), strict=True):
            relative = load[layer] / load[layer].mean()
            axis.bar(np.arange(ranks) + offset, relative, 0.4, label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=f"layer {layer}", xlabel="rank", xticks=range(ranks))
    axes[0, 0].set_ylabel("load / mean load")
    axes[0, -1].legend(loc="lower right", fontsize="small")
    figure.suptitle("Load per rank, last quarter of the run")
    return figure


def draw_par_over_time(history: History) -> Figure:
    steps = [row.stats.step for row in history.rows]
    # Greedy decoding makes steps that are not observed; no line is drawn across them.
    gaps = np.flatnonzero(np.diff(steps) > 1) + 1
    figure = Figure(figsize=(10, 4), layout="constrained")
    axis = figure.subplots()
    for name, par in (
        ("without balancing", [row.par_without for row in history.rows]),
        ("with balancing", [row.par_now for row in history.rows]),
    ):
        x, y = (np.insert(np.asarray(values, float), gaps, np.nan) for values in (steps, par))
        axis.plot(x, y, ".-", markersize=3, label=name)
    for number, step in enumerate(history.rebalanced_at()):
        label = None if number else "rebalance complete"
        axis.axvline(step, color="gray", linestyle=":", linewidth=1, label=label)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(
        xlabel="step", ylabel="PAR, mean of layers", title="Peak-to-average ratio of rank load"
    )
    axis.legend(loc="upper right")
    return figure
