"""Every policy with every replica choice, on recorded and made-up load: docs/tables.md.

    OMP_NUM_THREADS=1 python examples/benchmarks/planning.py            # ten minutes
    OMP_NUM_THREADS=1 python examples/benchmarks/planning.py --short    # half a minute
    ... --only recorded served --traces mine.npz                        # some of it, on your own

Four kinds of load, one table each:

  recorded  the traces of examples/data. A plan every 100 steps from the 50 before, judged on the
            steps that follow
  made-up   level: a well-balanced router, 250 tokens an expert and step. noise-N: an unchanging
            skew, N tokens an expert and step, independent: no move pays after the first plan.
            turning: a hot spot that wanders through all experts. switching: another skew every 150
            steps, which are no multiple of the interval. Planned as the recorded load
  served    the traces from their first step on, as a server would: default arguments, then
            without early plans
  deep      58 layers of 256 experts, made up: every layer has eight topics with an expert
            popularity of their own, and a window's mix of them drifts. Planned from 25 samples,
            judged on the next window; seconds are CPU time of one core

PAR is the peak-to-average ratio of rank loads, over steps and layers. Moved are slots whose expert
changed, per layer; MB those of experts of 1 MB, all layers. Seconds are those of policy, checks and
rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_eplb import Placement, Topology
from torch_eplb.files.trace import read_trace
from torch_eplb.offline.cost import HARDWARE, CostModel
from torch_eplb.offline.replay import NO_BALANCING, Replay, Settings, replay
from torch_eplb.offline.serving import Cycle
from torch_eplb.policies.registry import POLICIES, make_policy
from torch_eplb.policies.split import judged_par

DATA = Path(__file__).parents[1] / "data"
CHOICES = ("batch", "table", "even")
SIZES = {64: [(8, 8), (16, 0)], 128: [(16, 16), (16, 0)], 256: [(32, 32), (32, 0), (64, 64)]}
EXPERT = CostModel(HARDWARE["ascend-910c"], 10**6, 10**6)

Ints = NDArray[np.int64]


def settings_of(ranks: int, redundant: int, **given: Any) -> Settings:
    return Settings(num_ranks=ranks, num_redundant_experts=redundant, cost=EXPERT, **given)


def print_head(title: str, columns: Sequence[str]) -> None:
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)


def print_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


RESULTS = ("PAR", "p95", "p99", "max", "moved first", "later", "MB a plan", "plans", "s a plan")


def results(found: Replay) -> list[str]:
    """What a replay comes to, by the columns of `RESULTS`."""
    quantiles = np.quantile(found.par, (0.95, 0.99, 1.0))
    cells = [f"{found.par.mean():.4f}", *(f"{value:.3f}" for value in quantiles)]
    if not len(found.plan_steps):
        return [*cells, "", "", "", "0", ""]
    later = f"{found.moved[1:].mean():.1f}" if len(found.moved) > 1 else ""
    return [
        *cells,
        f"{found.moved[0].mean():.1f}",
        later,
        f"{found.travelled.mean():.0f}",
        str(len(found.plan_steps)),
        f"{statistics.median(found.plan_seconds):.2f}",
    ]


def recorded(arguments: argparse.Namespace) -> None:
    for path in arguments.traces:
        counts = read_trace(path).counts
        for ranks, redundant in sizes_for(counts.shape[3], arguments.short):
            title = f"{path.name}: {counts.shape[3]} experts on {ranks} ranks, +{redundant}"
            compare(title, counts, ranks, redundant, arguments)


def made_up(arguments: argparse.Namespace) -> None:
    for name, load in LOADS.items():
        if not arguments.short:
            compare(f"{name}: 128 experts on 16 ranks, +16", load(128, 400), 16, 16, arguments)
        if name == "level" or name.startswith("noise") or arguments.short:
            compare(f"{name}: 128 experts on 16 ranks, +0", load(128, 400), 16, 0, arguments)


def compare(
    title: str, counts: Ints, ranks: int, redundant: int, arguments: argparse.Namespace
) -> None:
    """A table of policies and replica choices, planned every 100 steps."""
    print_head(title, ("policy", "replicas", *RESULTS))
    settings = settings_of(ranks, redundant, interval=100)
    print_row(NO_BALANCING, "", *results(replay(counts, settings, NO_BALANCING, "even")))
    for choice in CHOICES if redundant else ("even",):
        for policy in arguments.policies:
            found = replay(counts, settings, policy, choice)
            print_row(policy, choice if redundant else "", *results(found))


def served(arguments: argparse.Namespace) -> None:
    for path in arguments.traces:
        counts = read_trace(path).counts
        for ranks, redundant in sizes_for(counts.shape[3], arguments.short)[:1]:
            title = f"{path.name}, served: {counts.shape[3]} experts on {ranks} ranks, +{redundant}"
            print_head(title, ("policy", "early plans", *RESULTS))
            for above in (Cycle.replan_above, None):
                settings = settings_of(ranks, redundant, cycle=Cycle(replan_above=above))
                for policy in arguments.policies:
                    found = replay(counts, settings, policy, "batch")
                    print_row(policy, "yes" if above else "no", *results(found))


def sizes_for(experts: int, short: bool) -> list[tuple[int, int]]:
    sizes = SIZES.get(experts, [(8, 8 * -(-experts // 8) - experts + 8)])
    return sizes[:1] if short else sizes


# ---- made-up load: [steps, 1, layers, experts] ----


def sampled(popularity: NDArray[np.float64], tokens: float, steps: int, seed: int) -> Ints:
    """Independent tokens, so many an expert and step; popularity ``[steps or 1, 2, experts]``."""
    rng = np.random.default_rng(seed)
    share = popularity / popularity.mean(axis=-1, keepdims=True)
    load = rng.poisson(tokens * np.broadcast_to(share, (steps, *share.shape[1:])))
    return load[:, None].astype(np.int64)


def skew(experts: int, seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).lognormal(0, 0.8, (1, 2, experts))


def turning(experts: int, steps: int) -> Ints:
    at = np.arange(steps)[:, None, None] * experts / 400
    place = np.random.default_rng(4).permutation(experts)  # neighbours are not on one rank
    away = np.abs((place - at + experts / 2) % experts - experts / 2)
    return sampled(1 + 6 * np.exp(-away / 4) + np.zeros((1, 2, 1)), 250, steps, 4)


def switching(experts: int, steps: int) -> Ints:
    parts = [skew(experts, 10 + part) for part in range(-(-steps // 150))]
    return sampled(np.concatenate(parts).repeat(150, axis=0)[:steps], 250, steps, 5)


LOADS: dict[str, Callable[[int, int], Ints]] = {
    "level": lambda experts, steps: sampled(np.ones((1, 2, experts)), 250, steps, 0),
    "noise-5": lambda experts, steps: sampled(skew(experts, 1), 5, steps, 1),
    "noise-50": lambda experts, steps: sampled(skew(experts, 1), 50, steps, 2),
    "noise-250": lambda experts, steps: sampled(skew(experts, 1), 250, steps, 3),
    "turning": turning,
    "switching": switching,
}


# ---- production depth ----

SAMPLES, TOPICS = 25, 8
TOKENS = 256  # per expert and sample, mean


def deep(arguments: argparse.Namespace) -> None:
    sizes = [(58, 256, 32, 32), (58, 256, 64, 64), (58, 256, 128, 128), (58, 256, 320, 384)]
    if arguments.short:
        sizes = [(4, 64, 8, 8), (4, 64, 16, 16)]
    for layers, experts, ranks, redundant in sizes:
        print_head(
            f"{layers} layers of {experts} experts on {ranks} ranks, +{redundant}",
            ("policy", "first s", "later s", "moved first", "later", "PAR even", "PAR batch"),
        )
        for policy in arguments.policies:
            print_row(policy, *plan_deep(policy, layers, experts, ranks, redundant))


def windows(layers: int, experts: int, count: int) -> Iterator[NDArray[np.float64]]:
    """Windows of load, ``[samples, layers, experts]`` each."""
    rng = np.random.default_rng(0)
    popularity = rng.dirichlet(np.full(experts, 0.3), (TOPICS, layers)) * experts
    mix = rng.dirichlet(np.ones(TOPICS))
    for _ in range(count):
        window = []
        for _ in range(SAMPLES):
            mix = 0.97 * mix + 0.03 * rng.dirichlet(np.full(TOPICS, 0.3))
            now = rng.dirichlet(8 * mix + 1e-3)
            window.append(rng.poisson(TOKENS * np.tensordot(now, popularity, 1)))
        yield np.array(window, dtype=np.float64)


def plan_deep(policy: str, layers: int, experts: int, ranks: int, redundant: int) -> list[str]:
    plan = make_policy(policy)
    placement = Placement.initial(layers, experts, ranks, (experts + redundant) // ranks)
    seconds, moved = [], []
    pars: dict[str, list[float]] = {"even": [], "batch": []}
    before, *following = windows(layers, experts, 4)
    for after in following:
        start = time.process_time()
        planned = plan(before, placement, Topology(ranks))
        seconds.append(time.process_time() - start)
        moved.append(float(placement.newly_held(planned.placement).mean()))
        placement, before = planned.placement, after
        for choice, found in pars.items():
            found.append(float(judged_par(after, placement, planned.split, choice).mean()))
    return [
        f"{seconds[0]:.2f}",
        f"{statistics.median(seconds[1:]):.2f}",
        f"{moved[0]:.1f}",
        f"{statistics.mean(moved[1:]):.1f}",
        f"{statistics.mean(pars['even']):.3f}",
        f"{statistics.mean(pars['batch']):.3f}",
    ]


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "recorded": recorded,
    "made-up": made_up,
    "served": served,
    "deep": deep,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="half a minute: fewer, smaller")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=", ".join(PARTS))  # fmt: skip
    parser.add_argument("--policies", nargs="+", choices=POLICIES, metavar="NAME",
                        default=["deepseek", "swift", "flashlb", "flow"])  # fmt: skip
    parser.add_argument("--traces", nargs="+", type=Path, metavar="FILE",
                        default=sorted(DATA.glob("trace*.npz")))  # fmt: skip
    arguments = parser.parse_args()
    if arguments.short:
        arguments.traces = arguments.traces[:1]
    for part in arguments.only:
        print(f"\n## {part}", flush=True)
        PARTS[part](arguments)


if __name__ == "__main__":
    main()
