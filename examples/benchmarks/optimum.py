"""How far placements are from the best there is, on instances that can be solved exactly.

    python examples/benchmarks/optimum.py            # a minute; needs scipy (the extra "bench")
    python examples/benchmarks/optimum.py --short    # some seconds

An instance is a few experts of one layer and a few samples: a part of the recorded trace, or made
up. Every sample is split on its own, as well as can be (``replica_choice="batch"``), and what is
minimised is the mean over the samples of PAR. The best placement comes from a mixed-integer linear
programme: which expert sits on which rank (binary), and each sample's tokens per expert and rank.

Below are splits of single batches by what they cost (`torch_eplb.routing.costs`): the costliest
rank under ours, and under the cheapest split there is, from a programme that decides which
replicas are active and how many tokens each gets.

Policies start from experts in order, may move what they like for any gain, and see the same
samples; "flow" widens their scatter before it judges, so all are judged on the widened samples.
Printed is the mean PAR over the instances of a size, and for flow how far it is above the optimum.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from torch_eplb import Placement, Topology
from torch_eplb.files.trace import read_trace
from torch_eplb.policies import flow
from torch_eplb.policies.registry import make_policy
from torch_eplb.policies.split import batch_rank_loads
from torch_eplb.routing import RoutingTables
from torch_eplb.routing.costs import rank_costs, split_batch_host

TRACE = Path(__file__).resolve().parent.parent / "data" / "trace.npz"
POLICIES = ("static", "deepseek", "swift", "flashlb", "flow")
SIZES = ((3, 10, 2), (4, 10, 2), (3, 13, 2), (4, 9, 3))  # ranks, experts, redundant experts
SAMPLES = 3
GAP = 1e-4  # the solver stops this near to its proof
WEIGHT = 200  # tokens that take as long as an expert's weights


def optimum(x: NDArray[np.float64], ranks: int, slots: int, limit: float) -> tuple[float, float]:
    """Least mean PAR of any placement, and what it is proven to be at least.

    Args:
        x: ``[samples, experts]`` in units of the mean rank load.
        limit: seconds.
    """
    samples, experts = x.shape
    x = x[:, np.argsort(-x.mean(axis=0))]
    held = np.arange(experts * ranks).reshape(experts, ranks)
    part = held.size + np.arange(samples * experts * ranks).reshape(samples, experts, ranks)
    peak = held.size + part.size + np.arange(samples)
    size = held.size + part.size + samples
    entries: list[tuple[list[int], list[float]]] = []
    least: list[float] = []
    most: list[float] = []

    def require(low: float, high: float, columns: list[int], factors: list[float]) -> None:
        entries.append((columns, factors))
        least.append(low)
        most.append(high)

    for rank in range(ranks):
        require(slots, slots, held[:, rank].tolist(), [1.0] * experts)
    for expert in range(experts):
        require(1, ranks, held[expert].tolist(), [1.0] * ranks)
    # Ranks are alike; so they come in the order of the hottest expert that they hold.
    for rank in range(1, ranks):
        for expert in range(experts):
            columns = [int(held[expert, rank]), *held[: expert + 1, rank - 1].tolist()]
            require(-np.inf, 0, columns, [1.0] + [-1.0] * (expert + 1))
    for sample in range(samples):
        for expert in range(experts):
            tokens = float(x[sample, expert])
            require(tokens, tokens, part[sample, expert].tolist(), [1.0] * ranks)
            for rank in range(ranks):  # tokens go where the expert is
                columns = [int(part[sample, expert, rank]), int(held[expert, rank])]
                require(-np.inf, 0, columns, [1.0, -tokens])
        for rank in range(ranks):
            columns = [*part[sample, :, rank].tolist(), int(peak[sample])]
            require(-np.inf, 0, columns, [1.0] * experts + [-1.0])

    rows = np.repeat(np.arange(len(entries)), [len(columns) for columns, _ in entries])
    columns = np.concatenate([columns for columns, _ in entries])
    factors = np.concatenate([factors for _, factors in entries])
    low, high = np.zeros(size), np.full(size, np.inf)
    high[: held.size] = 1
    low[peak] = 1
    cost = np.zeros(size)
    cost[peak] = 1 / samples
    solved = milp(
        cost,
        constraints=LinearConstraint(
            csr_array((factors, (rows, columns)), shape=(len(entries), size)), least, most
        ),
        bounds=Bounds(low, high),
        integrality=(np.arange(size) < held.size).astype(int),
        options={"time_limit": limit, "mip_rel_gap": GAP},
    )
    if solved.x is None:
        raise RuntimeError(f"no placement found within {limit:g} s: {solved.message}")
    return float(solved.fun), float(solved.mip_dual_bound)


def cheapest_split(
    counts_E: NDArray[np.int64],
    slots_EM: NDArray[np.int64],
    ranks: int,
    slots: int,
    limit: float,
    weight: int = WEIGHT,
) -> tuple[float, float]:
    """Least cost of the costliest rank under any split of a batch, and what it is proven to be at
    least. A replica with q tokens costs max(weight, q).

    Args:
        counts_E: ``[experts]``, tokens.
        slots_EM: ``[experts, M]``, physical ids padded with -1.
        limit: seconds.
    """
    expert, place = np.nonzero((slots_EM >= 0) & (counts_E[:, None] > 0))
    rank = slots_EM[expert, place] // slots
    # Of each replica: its tokens, whether it is active, what it costs. Then the costliest rank.
    one = np.eye(len(expert))
    none, column = np.zeros_like(one), np.zeros((len(expert), 1))
    held = np.equal.outer(np.arange(ranks), rank).astype(float)
    of = np.equal.outer(np.flatnonzero(counts_E), expert).astype(float)
    below = np.block(
        [
            [one, -one * counts_E[expert], none, column],
            [none, weight * one, -one, column],
            [one, none, -one, column],
            [0 * held, 0 * held, held, -np.ones((ranks, 1))],
        ]
    )
    exact = np.block([of, 0 * of, 0 * of, np.zeros((len(of), 1))])
    goal = np.zeros(below.shape[1])
    goal[-1] = 1
    most = np.full(len(goal), np.inf)
    most[len(expert) : 2 * len(expert)] = 1
    tokens = counts_E[counts_E > 0]
    solved = milp(
        goal,
        constraints=[
            LinearConstraint(csr_array(below), -np.inf, 0),
            LinearConstraint(csr_array(exact), tokens, tokens),
        ],
        bounds=Bounds(0, most),
        integrality=np.isfinite(most).astype(int),
        options={"time_limit": limit, "mip_rel_gap": GAP},
    )
    if solved.x is None:
        raise RuntimeError(f"no split found within {limit:g} s: {solved.message}")
    return float(solved.fun), float(solved.mip_dual_bound)


def compare_splits(ranks: int, tokens: int, instances: int, limit: float) -> None:
    """One row: batches of ``tokens`` choices a rank, of a step of the trace, on random replicas."""
    counts = read_trace(TRACE).counts
    experts = counts.shape[3]
    above, by_tokens, unproven = [], [], 0
    for seed in range(instances):
        rng = np.random.default_rng(seed)
        load = counts[rng.integers(len(counts)), :, rng.integers(counts.shape[2])].sum(axis=0)
        # Experts at random, and of the two hottest of a rank a replica on two others.
        own = rng.permutation(experts).reshape(ranks, -1)
        own = np.take_along_axis(own, np.argsort(-load[own], axis=1), axis=1)
        spare = [np.roll(own[:, column], shift) for column, shift in enumerate((1, 2))]
        tables = RoutingTables(
            Placement(np.column_stack((own, *spare))[None], experts),
            device="cpu",
            rank=0,
            replica_choice="batch",
            max_replicas=ranks,
            topology=Topology(ranks),
        )
        slots_EM, slots = tables.host_slots(0).numpy(), tables.num_slots
        counts_E = rng.multinomial(ranks * tokens, load / load.sum())

        def cost(weight: int) -> int:
            quotas = split_batch_host(counts_E, slots_EM, ranks, slots, weight)  # noqa: B023
            return int(rank_costs(quotas, slots_EM, ranks, slots, WEIGHT).max())  # noqa: B023

        best, bound = cheapest_split(counts_E, slots_EM, ranks, slots, limit)
        best = min(best, cost(WEIGHT))
        unproven += best > bound * (1 + 2 * GAP)
        above.append(cost(WEIGHT) / best - 1)
        by_tokens.append(cost(0) / best - 1)
    print(
        f"{ranks:5} {tokens:14} | {np.mean(above):9.2%} {np.max(above):6.2%} |"
        f" {np.mean(by_tokens):9.2%} {np.max(by_tokens):6.2%}"
        + (f"  ({unproven} not proven optimal)" if unproven else ""),
        flush=True,
    )


def from_trace(seed: int, experts: int) -> NDArray[np.float64]:
    """Neighbouring steps of the trace, some of a layer's experts: ``[samples, experts]``."""
    rng = np.random.default_rng(seed)
    counts = read_trace(TRACE).counts
    start, layer = rng.integers(len(counts) - SAMPLES), rng.integers(counts.shape[2])
    chosen = rng.choice(counts.shape[3], experts, replace=False)
    return counts[start : start + SAMPLES, :, layer, chosen].sum(axis=1).astype(float)


def made_up(seed: int, experts: int) -> NDArray[np.float64]:
    """Skewed experts that scatter by a third: ``[samples, experts]``."""
    rng = np.random.default_rng(seed)
    return 1000 * rng.lognormal(0, 1, experts) * rng.lognormal(0, 0.3, (SAMPLES, experts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="some seconds: fewer instances")
    parser.add_argument("--instances", type=int, help="of each kind and size")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds per instance at most")
    arguments = parser.parse_args()
    instances = arguments.instances or (1 if arguments.short else 5)
    print(f"{SAMPLES} samples; mean PAR over {instances} instance(s) per row\n")
    print("load      ranks experts slots | " + " ".join(f"{name:>8}" for name in POLICIES), end="")
    print("  optimum | flow above it: mean  worst  solver s")
    for ranks, experts, redundant in SIZES[: 2 if arguments.short else None]:
        slots = (experts + redundant) // ranks
        current, topology = Placement.initial(1, experts, ranks, slots), Topology(ranks)
        for name, make in (("trace", from_trace), ("made up", made_up)):
            reached, best, proven = [], [], []
            begin = time.perf_counter()
            for seed in range(instances):
                load = make(seed, experts)[:, None]
                x = flow.widen(flow.units(load, ranks), flow.SPREAD)
                reached.append([])
                for policy in POLICIES:
                    plan = make_policy(policy, min_gain=0.0, target_par=1.0)
                    peaks = batch_rank_loads(x, plan(load, current, topology).placement)
                    reached[-1].append(float(np.maximum(peaks.max(axis=2), 1.0).mean()))
                found, bound = optimum(x[:, 0], ranks, slots, arguments.limit)
                best.append(min(found, *reached[-1]))  # a policy may beat an unproven solution
                proven.append(found <= bound + 2 * GAP)
            seconds = time.perf_counter() - begin
            above = np.array(reached)[:, -1] / best - 1
            print(
                f"{name:9} {ranks:5} {experts:7} {slots:5} | "
                + " ".join(f"{value:8.4f}" for value in np.mean(reached, axis=0))
                + f" {np.mean(best):8.4f} | {above.mean():19.2%} {above.max():6.2%} {seconds:9.1f}"
                + ("" if all(proven) else f"  ({proven.count(False)} not proven optimal)"),
                flush=True,
            )
    print(f"\nSplits by cost, 64 experts, 2 redundant a rank, W = {WEIGHT}: above the optimum")
    print("ranks choices a rank | ours: mean  worst | by tokens: mean  worst")
    for ranks in (4,) if arguments.short else (4, 8):
        for tokens in (64, 4096) if arguments.short else (64, 512, 1024, 2048, 4096):
            compare_splits(ranks, tokens, 4 * instances, arguments.limit)


if __name__ == "__main__":
    main()
