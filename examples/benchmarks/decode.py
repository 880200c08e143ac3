"""What small batches cost under each split: the most active experts on a rank, and step time.

    python examples/benchmarks/decode.py TRACE.npz [--weight-tokens 200] [--ranks 32 64]

A batch of n tokens is drawn from a step of the trace's second half: n times top-k different
experts, by the step's load (Gumbel's top-k). Placements are planned from batches of the first half.
Time is that of the costliest rank, each replica costing the time of its tokens or of its weights,
whichever is longer (`torch_eplb.routing.costs`), in parts of what it is without replicas; PAR is of
tokens. "by cost, placed by tokens" shows what the placement brings.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torch_eplb.files.trace import read_trace
from torch_eplb.policies import flow
from torch_eplb.routing import RoutingTables
from torch_eplb.routing.costs import active_experts, rank_costs, split_batch_host
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology

Ints = NDArray[np.int64]
SAMPLES = 50
TRIALS = 25


@dataclass
class Result:
    """Means over trials.

    Attributes:
        active: most active experts on a rank.
        cost: of the costliest rank, in tokens' time.
        par: of tokens.
    """

    active: float
    cost: float
    par: float


def draw(load_E: Ints, tokens: int, top_k: int, rng: np.random.Generator) -> Ints:
    """Counts of a batch."""
    score = np.log(np.maximum(load_E, 1e-9)) + rng.gumbel(size=(tokens, len(load_E)))
    return np.bincount(
        np.argpartition(-score, top_k, axis=1)[:, :top_k].reshape(-1), minlength=len(load_E)
    )


def batches(load: Ints, tokens: int, top_k: int, count: int, seed: int) -> Iterator[Ints]:
    """``[layers, experts]`` each, from steps spread over ``load``."""
    rng = np.random.default_rng(seed)
    for step in np.linspace(0, len(load) - 1, count).astype(int):
        yield np.stack([draw(row, tokens, top_k, rng) for row in load[step]])


def tables(placement: Placement) -> Ints:
    """Physical ids ``[layers, experts, M]``."""
    made = RoutingTables(
        placement,
        device="cpu",
        rank=0,
        replica_choice="batch",
        max_replicas=min(placement.num_ranks, placement.num_redundant_experts + 1),
        topology=Topology(placement.num_ranks),
    )
    return made.slots_LEM.numpy()


def measure(placement: Placement, seen: list[Ints], weight: int, by_cost: bool) -> Result:
    slots = tables(placement)
    sizes = placement.num_ranks, placement.num_slots
    values = []
    for batch in seen:
        for layer, counts_E in enumerate(batch):
            quotas = split_batch_host(counts_E, slots[layer], *sizes, weight if by_cost else 0)
            tokens = rank_costs(quotas, slots[layer], *sizes, 0)
            values.append(
                (
                    active_experts(quotas, slots[layer], *sizes).max(),
                    rank_costs(quotas, slots[layer], *sizes, weight).max(),
                    tokens.max() / tokens.mean(),
                )
            )
    return Result(*np.mean(values, axis=0).tolist())


def planned(load: Ints, start: Placement, weight: int) -> Placement:
    knobs = flow.Knobs(weight_tokens=weight)
    return flow.plan(load.astype(np.float64), start, Topology(start.num_ranks), "batch", knobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trace")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--weight-tokens", type=int, default=200)
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256, 1024, 4096])
    options = parser.parse_args()
    load = read_trace(options.trace).load()
    before, after = np.array_split(load, 2)
    layers, experts = load.shape[1:]
    weight = options.weight_tokens
    print(f"{options.trace}: {layers} layers, {experts} experts, W = {weight} tokens")
    print(
        "| ranks + replicas | tokens | split | active | time | PAR |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    for ranks in options.ranks:
        plain = Placement.initial(layers, experts, ranks, experts // ranks)
        spare = Placement.initial(layers, experts, ranks, experts // ranks + 1)
        for tokens in options.tokens:
            seen = list(batches(after, tokens, options.top_k, TRIALS, seed=1))
            past = np.stack(list(batches(before, tokens, options.top_k, SAMPLES, seed=2)))
            none = measure(planned(past, plain, weight), seen, weight, True)
            by_tokens = planned(past, spare, 0)
            by_cost = planned(past, spare, weight)
            rows = [
                ("no replicas", none),
                ("by tokens", measure(by_tokens, seen, weight, False)),
                ("by cost, placed by tokens", measure(by_tokens, seen, weight, True)),
                ("by cost", measure(by_cost, seen, weight, True)),
            ]
            for name, result in rows:
                extra = 0 if name == "no replicas" else ranks
                print(
                    f"| {ranks} + {extra} | {tokens} | {name} | {result.active:.2f} | "
                    f"{result.cost / none.cost:.3f} | {result.par:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
