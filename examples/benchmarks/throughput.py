"""Tokens per second of two ranks under skewed traffic: without balancing, with it, and ideally.

    python examples/benchmarks/throughput.py

A stack of MoE layers in which experts take nearly all the time, on 2 gloo ranks of one thread
each. About 80% of the tokens want experts that rank 0 holds at first. Three services take turns
within one run, one forward each, so that whatever else the machine does slows all three alike:

    unbalanced  skewed traffic, experts never move
    balanced    skewed traffic, balanced by torch_eplb; measured after the first rebalance
    ideal       a perfectly balanced router, experts never move

Tokens per second are by the clock on the wall. They mean something where each rank has a core of
its own; where it has not, the CPU seconds of the busiest rank say how long a step would take.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F

import torch_eplb

RANKS, EXPERTS, TOP_K = 2, 16, 2
HIDDEN, INTERMEDIATE = 1024, 512
SHARE_OF_RANK_0 = 0.8


class Experts(nn.Module):
    """Gated experts with the forward and the attributes that torch_eplb recognises."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) * 0.02)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) * 0.02)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, choice = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            result = F.linear(F.silu(gate) * up, self.down_proj[expert])
            output.index_add_(0, token, result * top_k_weights[token, choice, None])
        return output


class Model(nn.Module):
    """MoE layers with residual connections; the router's choices come with the input."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(num_layers))

    def forward(self, hidden: Tensor, top_k_index: Tensor) -> Tensor:
        """``hidden`` [tokens, HIDDEN], ``top_k_index`` [layers, tokens, TOP_K]."""
        weights = torch.full(top_k_index.shape[1:], 1 / TOP_K)
        for layer, index in zip(self.layers, top_k_index, strict=True):
            hidden = hidden + layer(hidden, index, weights)
        return hidden


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1024, help="per rank and forward")
    parser.add_argument("--turns", type=int, default=30, help="measured forwards of each service")
    parser.add_argument("--short", action="store_true", help="some seconds, for a quick check")
    args = parser.parse_args()
    if args.short:
        args.layers, args.tokens, args.turns = 2, 256, 6
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (f"file://{Path(folder) / 'rendezvous'}", args), nprocs=RANKS)


def run(rank: int, rendezvous: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rendezvous, rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    popularity = skewed_popularity(args.layers)
    generator = torch.Generator().manual_seed(1 + rank)
    still = torch_eplb.wrap(Model(args.layers), policy="static")
    moving = torch_eplb.wrap(
        Model(args.layers), num_redundant_experts=2, collect_interval=24, plan_interval=2
    )
    hidden = torch.randn(args.tokens, HIDDEN, generator=generator)
    skewed = popularity[:, None].expand(-1, args.tokens, -1)

    def skewed_router() -> Tensor:
        return choose(skewed, generator)

    services = {
        "unbalanced": lambda: measure(still, hidden, skewed_router()),
        "balanced": lambda: measure(moving, hidden, skewed_router()),
        "ideal": lambda: measure(still, hidden, even_router(args)),
    }
    with still, moving, torch.inference_mode():
        until_rebalanced(moving, services["balanced"])
        first = moving.stats().step
        turns = [{name: serve() for name, serve in services.items()} for _ in range(args.turns)]
        after = moving.stats()
    if rank == 0:
        report(turns, args.tokens * RANKS)
        print(
            f"{after.rebalances} rebalances moved {after.experts_moved} experts; "
            f"the first was complete after {first} steps"
        )
    dist.destroy_process_group()


def until_rebalanced(balancer: torch_eplb.ExpertLoadBalancer, serve: Callable[[], Cost]) -> None:
    for _ in range(100):
        serve()
        if balancer.stats().rebalances:
            return
    raise RuntimeError(f"no rebalance within 100 steps: {balancer.stats()}")


def skewed_popularity(num_layers: int) -> Tensor:
    """Probability of each expert, ``[layers, experts]``: uneven, and 80% in rank 0's half."""
    weight = torch.rand(num_layers, RANKS, EXPERTS // RANKS) + 0.25
    weight /= weight.sum(dim=2, keepdim=True)
    return (weight * torch.tensor([SHARE_OF_RANK_0, 1 - SHARE_OF_RANK_0])[:, None]).flatten(1)


def choose(popularity: Tensor, generator: torch.Generator) -> Tensor:
    """TOP_K different experts for every token, ``[layers, tokens, TOP_K]``."""
    flat = popularity.flatten(0, 1)
    chosen = torch.multinomial(flat, TOP_K, generator=generator)
    return chosen.view(*popularity.shape[:2], TOP_K)


def even_router(args: argparse.Namespace) -> Tensor:
    """Every expert equally often, ``[layers, tokens, TOP_K]``."""
    index = torch.arange(args.tokens * TOP_K) % EXPERTS
    return index.view(1, args.tokens, TOP_K).expand(args.layers, -1, -1)


class Cost(NamedTuple):
    """Of one forward."""

    seconds: float  # until the last rank has its output
    busiest: float  # CPU seconds of the rank that used most


def measure(model: nn.Module, hidden: Tensor, top_k_index: Tensor) -> Cost:
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    model(hidden, top_k_index)
    used = torch.tensor(time.process_time() - cpu, dtype=torch.float64)
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    return Cost(time.perf_counter() - wall, used.item())


def report(turns: list[dict[str, Cost]], tokens: int) -> None:
    """Medians over the turns; ratios are formed within a turn."""
    print(f"{'':12s}{'tokens/s':>10s}{'of ideal':>10s}{'busiest rank':>16s}{'of ideal':>10s}")
    for name in turns[0]:
        costs, ideals = [t[name] for t in turns], [t["ideal"] for t in turns]
        rate = tokens / median(cost.seconds for cost in costs)
        share = median(i.seconds / c.seconds for c, i in zip(costs, ideals, strict=True))
        busiest = median(cost.busiest for cost in costs)
        busy_share = median(i.busiest / c.busiest for c, i in zip(costs, ideals, strict=True))
        print(f"{name:12s}{rate:10.0f}{share:10.1%}{busiest:10.3f} CPU s{busy_share:10.1%}")


if __name__ == "__main__":
    main()
