"""What counting and routing cost per MoE layer, against the layer itself and a plain torch version.

    python examples/benchmarks/hot_path.py            # a few minutes, 2.5 GB
    python examples/benchmarks/hot_path.py --short    # a few seconds

Everything is measured in one process, in turns (A B C A B C ...), and reported as medians. One
device routes its batch as one rank of expert parallelism does; "layer" is the forward of an experts
module like Qwen3-MoE's with all experts on this device.

Columns, in microseconds:
  layer        the experts module without us
  plain        (b) scatter_add of counts, a random replica by gather
  table        ours, replica_choice="table": counts, one gather
  local        ours, replica_choice="local": counts, quotas of this batch, choice by quota
  plain+sort   plain, then the order and sizes that an all-to-all dispatch needs
  batch        ours, replica_choice="batch": counts, quotas of all ranks' batches, the same order
               and sizes, and what arrives (saves the exchange of sizes)
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_eplb.routing import (
    RoutingTables,
    choose_from_table,
    choose_locally,
    count_hits,
    plan_dispatch,
    solve_quotas,
)
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology

TOP_K = 8
HIDDEN, INTERMEDIATE = 1024, 512


class Experts(nn.Module):
    """Gated experts, computed one after another: the eager form of Qwen3-MoE's experts module."""

    def __init__(self, num_experts: int, device: torch.device) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(
            torch.randn(num_experts, 2 * INTERMEDIATE, HIDDEN, device=device) / 32,
            requires_grad=False,
        )
        self.down = nn.Parameter(
            torch.randn(num_experts, HIDDEN, INTERMEDIATE, device=device) / 22, requires_grad=False
        )

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden)
        mask = F.one_hot(top_k_index, self.gate_up.shape[0]).permute(2, 1, 0)
        for expert in mask.sum((1, 2)).nonzero().view(-1):
            choice, token = torch.where(mask[expert])
            gate, up = F.linear(hidden[token], self.gate_up[expert]).chunk(2, dim=-1)
            out = F.linear(F.silu(gate) * up, self.down[expert])
            result.index_add_(0, token, out * top_k_weights[token, choice, None])
        return result


def placement_of(popularity: np.ndarray, ranks: int, redundant: int) -> Placement:
    """Replicas for the hottest experts, then heaviest first onto the lightest rank with room."""
    experts = len(popularity)
    replicas = np.ones(experts, dtype=np.int64)
    for _ in range(redundant):
        replicas[np.argmax(np.where(replicas < ranks, popularity / replicas, -1.0))] += 1
    per_rank = (experts + redundant) // ranks
    held: list[list[int]] = [[] for _ in range(ranks)]
    loads = np.zeros(ranks)
    # Experts with many replicas go first, so that the last ones find a rank without them.
    for expert in np.lexsort((-popularity / replicas, -replicas)).tolist():
        for _ in range(replicas[expert]):
            free = [r for r in range(ranks) if len(held[r]) < per_rank and expert not in held[r]]
            rank = min(free, key=lambda r: (loads[r], len(held[r])))
            held[rank].append(expert)
            loads[rank] += popularity[expert] / replicas[expert]
    return Placement(np.array([held]), experts)


def layer_tables(
    popularity: np.ndarray, ranks: int, redundant: int, device: torch.device
) -> RoutingTables:
    return RoutingTables(
        placement_of(popularity, ranks, redundant),
        device=device,
        rank=0,
        replica_choice="table",
        max_replicas=min(ranks, redundant + 1),
        topology=Topology(ranks),
    )


def draw_ids(popularity: np.ndarray, tokens: int, rng: np.random.Generator) -> Tensor:
    """``[tokens, TOP_K]`` distinct experts by popularity (Gumbel top-k)."""
    keys = np.log(popularity) + rng.gumbel(size=(tokens, len(popularity)))
    return torch.from_numpy(np.argpartition(-keys, TOP_K, axis=1)[:, :TOP_K].copy())


def medians_us(
    calls: Mapping[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, float]:
    """Median time of each call, measured in turns for about ``seconds`` in all."""
    synchronize = (
        torch.get_device_module(device).synchronize if device.type != "cpu" else lambda: None
    )
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 3:
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def compare_routing(
    num_experts: int, tokens: int, ranks: int, redundant: int, device: torch.device, seconds: float
) -> None:
    """One row of the table: all ways to route ``tokens`` of this rank."""
    rng = np.random.default_rng(tokens + num_experts)
    popularity = rng.lognormal(0, 0.8, num_experts)
    tables = layer_tables(popularity, ranks, redundant, device)
    slots_EM, per_rank = tables.slots_LEM[0], tables.num_slots
    host_slots_EM = tables.host_slots_LEM[0]
    assert tables.choice_LEP is not None  # "table" makes it
    choice_EP = tables.choice_LEP[0]
    replicas_E = (slots_EM >= 0).sum(1)
    batches = [draw_ids(popularity, tokens, rng) for _ in range(ranks)]
    counts_RE = torch.stack([count_hits(ids, num_experts) for ids in batches]).to(device)
    ids_TK = batches[0].to(device)

    def plain() -> Tensor:
        flat = ids_TK.reshape(-1)
        counts_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
        counts_E.scatter_add_(0, flat, torch.ones_like(flat))
        draw = torch.randint(0, 1 << 30, flat.shape, device=device)
        return slots_EM[flat, draw % replicas_E[flat]]

    def plain_and_sort() -> tuple[Tensor, Tensor]:
        physical = plain()
        sizes = torch.zeros(ranks * per_rank, dtype=torch.int64, device=device)
        sizes.scatter_add_(0, physical, torch.ones_like(physical))
        return torch.argsort(physical), sizes

    def table() -> Tensor:
        count_hits(ids_TK, num_experts)
        return choose_from_table(ids_TK, choice_EP)

    def local() -> Tensor:
        counts_E = count_hits(ids_TK, num_experts)
        return choose_locally(ids_TK, counts_E, slots_EM, ranks, per_rank)

    def batch() -> object:
        count_hits(ids_TK, num_experts)
        return plan_dispatch(ids_TK, counts_RE, 0, host_slots_EM, ranks, per_rank)

    calls: dict[str, Callable[[], object]] = {
        "plain": plain,
        "table": table,
        "local": local,
        "plain+sort": plain_and_sort,
        "batch": batch,
    }
    times = medians_us(calls, device, seconds)
    experts = Experts(num_experts, device)
    hidden = torch.randn(tokens, HIDDEN, device=device)
    weights = torch.full(ids_TK.shape, 1 / TOP_K, device=device)
    layer = medians_us({"layer": lambda: experts(hidden, ids_TK, weights)}, device, 0.0)["layer"]
    print(
        f"{num_experts:7} {tokens:7} {layer:11.0f} | {times['plain']:7.0f} {times['table']:7.0f}"
        f" {times['table'] / times['plain']:6.2f}x {times['local']:7.0f}"
        f" {times['local'] / times['plain']:6.2f}x | {times['plain+sort']:10.0f}"
        f" {times['batch']:7.0f} {times['batch'] / times['plain+sort']:6.2f}x |"
        f" {times['table'] / layer:7.2%} {times['local'] / layer:7.2%}"
        f" {times['batch'] / layer:7.2%}",
        flush=True,
    )


def measure_solver(
    num_experts: int, ranks: int, redundant: int, device: torch.device, seconds: float
) -> None:
    """One row: the quota solver on several batches of one layer, and the PAR that it leaves."""
    rng = np.random.default_rng(num_experts + ranks)
    popularity = rng.lognormal(0, 0.8, num_experts)
    tables = layer_tables(popularity, ranks, redundant, device)
    slots_EM, per_rank = tables.slots_LEM[0], tables.num_slots
    times: list[float] = []
    even_pars: list[float] = []
    pars: list[float] = []
    for _ in range(8):
        drifted = popularity * rng.lognormal(0, 0.4, num_experts)
        counts = rng.multinomial(ranks * 1024 * TOP_K, drifted / drifted.sum())
        counts_E = torch.from_numpy(counts).to(device)
        solve = partial(solve_quotas, counts_E, slots_EM, ranks, per_rank)
        times.append(medians_us({"solve": solve}, device, seconds / 8)["solve"])
        quotas_EM = solve_quotas(counts_E, slots_EM, ranks, per_rank).double()
        present = slots_EM >= 0
        even_EM = counts_E.unsqueeze(1) * present / present.sum(1, keepdim=True)
        for split, found in ((quotas_EM, pars), (even_EM, even_pars)):
            loads = torch.zeros(ranks, dtype=torch.float64, device=device)
            loads.index_add_(0, slots_EM[present] // per_rank, split[present].double())
            found.append((loads.max() / loads.mean()).item())
    print(
        f"{num_experts:7} {ranks:5} {redundant:9} {statistics.median(times):9.0f} {max(times):9.0f}"
        f" {statistics.mean(even_pars):9.3f} {statistics.mean(pars):9.3f}",
        flush=True,
    )


def measure_host(num_experts: int, ranks: int, redundant: int, seconds: float) -> None:
    """One row: what "batch" costs a rank's host per layer, and the parts of it that grow."""
    device = torch.device("cpu")
    rng = np.random.default_rng(num_experts + ranks)
    popularity = rng.lognormal(0, 0.8, num_experts)
    tables = layer_tables(popularity, ranks, redundant, device)
    drifted = popularity * rng.lognormal(0, 0.4, num_experts)
    batches = [draw_ids(drifted, 256, rng) for _ in range(ranks)]
    counts_RE = torch.stack([count_hits(ids, num_experts) for ids in batches])
    counts_E, ids_TK = counts_RE.sum(0), batches[0]
    slots_EM, per_rank = tables.host_slots(0), tables.num_slots

    def batch(ranks_per_node: int | None) -> None:
        count_hits(ids_TK, num_experts)
        plan_dispatch(ids_TK, counts_RE, 0, slots_EM, ranks, per_rank, ranks_per_node)

    calls: dict[str, Callable[[], object]] = {
        "all": partial(batch, None),
        "nodes": partial(batch, 8),
        "solve": partial(solve_quotas, counts_E, slots_EM, ranks, per_rank),
    }
    times = medians_us(calls, device, seconds)
    print(
        f"{num_experts:7} {ranks:5} {redundant:9} {times['all']:9.0f} {times['nodes']:9.0f}"
        f" {times['solve']:9.0f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="torch device, default cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads, default 1")
    parser.add_argument("--short", action="store_true", help="a few seconds: the smallest sizes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    seconds = 0.2 if arguments.short else 3.0
    print(f"torch {torch.__version__}, {device}, {arguments.threads} thread(s), top-{TOP_K}")
    print(
        f"\nOne layer of {HIDDEN}x{INTERMEDIATE} experts, 8 ranks, 16 redundant experts; "
        "microseconds, ratios to plain torch, shares of the layer's forward"
    )
    print(
        "experts  tokens       layer |   plain   table  ratio   local  ratio |"
        " plain+sort   batch  ratio |   table   local   batch"
    )
    with torch.inference_mode():
        for num_experts in (64,) if arguments.short else (64, 256):
            for tokens in (64, 1024) if arguments.short else (64, 1024, 16384):
                compare_routing(num_experts, tokens, 8, 16, device, seconds)
        print(
            "\nQuota solver, one layer; microseconds (median and worst of 8 batches), and the mean "
            "PAR of even shares and of the quotas on those batches"
        )
        print("experts ranks redundant    median     worst  PAR even PAR batch")
        for num_experts in (64, 128, 256):
            for ranks in (8, 64) if arguments.short else (8, 16, 32, 64):
                redundant = 64 if ranks == 64 else max(16, ranks)
                measure_solver(num_experts, ranks, redundant, device, seconds / 3)
        print(
            "\nThe host's part of a layer under batch, 256 tokens a rank: count, solve, sizes, "
            "order; microseconds. The same with nodes of 8 ranks; of it, the solver"
        )
        print("experts ranks redundant       all     nodes     solve")
        for ranks, redundant in (
            ((8, 16), (320, 384))
            if arguments.short
            else ((8, 16), (32, 32), (64, 64), (128, 128), (320, 384))
        ):
            measure_host(256, ranks, redundant, seconds)


if __name__ == "__main__":
    main()
