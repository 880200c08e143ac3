"""How long policies plan for large models on one core, what they move, and what that reaches.

    OMP_NUM_THREADS=1 python examples/benchmarks/planning.py            # two minutes
    OMP_NUM_THREADS=1 python examples/benchmarks/planning.py --short    # a few seconds

The load is made up: every layer has eight topics with an expert popularity of their own, and each
sample is a draw from a mix of them that drifts from window to window. Policies plan from a window
of 25 samples and are judged on the next one. Columns, of policy, checks and prediction:

  first s      CPU time of the first plan, which starts from experts in order
  later s      the same of the plans that follow, median
  moved        slots whose expert changed, per layer, in the first plan and in later ones
  even, batch  mean PAR of the windows after the plans, with replicas in turn and with the split of
               every batch solved; policies plan for the latter where they can
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from torch_eplb import Placement, Topology
from torch_eplb.policies.registry import POLICIES, make_policy
from torch_eplb.policies.split import judged_par

SAMPLES, TOPICS = 25, 8
TOKENS = 256  # per expert and sample, mean


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


def measure(policy: str, layers: int, experts: int, ranks: int, redundant: int, plans: int) -> None:
    """Print a row."""
    plan = make_policy(policy)
    placement = Placement.initial(layers, experts, ranks, (experts + redundant) // ranks)
    seconds, moved = [], []
    pars: dict[str, list[float]] = {"even": [], "batch": []}
    before, *following = windows(layers, experts, plans + 1)
    for after in following:
        start = time.process_time()
        planned = plan(before, placement, Topology(ranks))
        seconds.append(time.process_time() - start)
        moved.append(float(placement.newly_held(planned.placement).mean()))
        placement, before = planned.placement, after
        for choice, found in pars.items():
            found.append(float(judged_par(after, placement, planned.split, choice).mean()))
    print(
        f"{policy:9} {seconds[0]:8.2f} {statistics.median(seconds[1:]):8.2f}"
        f" {moved[0]:8.1f} {statistics.mean(moved[1:]):8.1f}"
        f" {statistics.mean(pars['even']):8.3f} {statistics.mean(pars['batch']):8.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a few seconds: small models")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, metavar="NAME",
                        default=["deepseek", "swift", "flashlb", "flow"])  # fmt: skip
    arguments = parser.parse_args()
    sizes = [(58, 256, 32, 32), (58, 256, 320, 384)]
    if arguments.short:
        sizes = [(4, 64, 8, 8), (4, 64, 16, 16)]
    for layers, experts, ranks, redundant in sizes:
        slots = (experts + redundant) // ranks
        print(
            f"\n{layers} layers x {experts} experts, {ranks} ranks, {redundant} redundant experts"
            f" ({slots} slots a rank), {SAMPLES} samples"
        )
        print("policy     first s  later s    moved    later     even    batch")
        for policy in arguments.policies:
            measure(policy, layers, experts, ranks, redundant, 3 if arguments.short else 4)


if __name__ == "__main__":
    main()
