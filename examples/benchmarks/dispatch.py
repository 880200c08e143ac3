"""One MoE layer under expert parallelism: our dispatch and other ways to do it, side by side.

    python examples/benchmarks/dispatch.py                               # about two minutes
    python examples/benchmarks/dispatch.py --ranks 4 --tokens 64 1024 --dtype bfloat16 --skew
    python examples/benchmarks/dispatch.py --short                       # some seconds

The layer is Qwen3-MoE's experts module (64 experts of 1024 x 512, top-8; extra "demo"), the ranks
are processes of one thread each that talk gloo. All ways take turns within one run, one forward
each, and compute the same batch; their outputs are compared first. Printed is the time of each as
a share of ours in the same turn (median, and quartiles): above 1 is slower than ours.

    ours            torch_eplb.wrap with its defaults
    ours, module    the same with experts="module": the experts' own forward on the rows
    ours, gathered  the same with dispatch="all_gather"
    transformers    transformers' own all-to-all expert parallelism
    textbook        sort choices by expert, one row per choice there and back, sum at home
    all-gather      all tokens everywhere, each rank its own experts' choices, reduce-scatter
    torchtitan      torchtitan's dispatcher and its grouped experts, if it is installed
    unsharded       no dispatch: every rank holds all experts and computes its own tokens

Besides, per way: CPU time of the busiest rank as a share of ours, which means more than the clock
where ranks have no cores of their own; the most memory that a forward held at one time, in units of
[tokens, top-k, hidden]; and of ours the bytes that rank 0 sent to others, in units of
[tokens, hidden].
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _memory import AllocationObserver
from torch import Tensor, nn
from torch.nn import functional as F

import torch_eplb

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 64, 8, 1024, 512
Way = Callable[[Tensor, Tensor, Tensor], Tensor]
# torch 2.13 renamed them.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 64, 1024], help="per rank")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--skew", action="store_true", help="80%% of the choices want rank 0")
    parser.add_argument("--turns", type=int, default=15, help="measured forwards of each way")
    parser.add_argument("--short", action="store_true", help="some seconds, for a quick check")
    args = parser.parse_args()
    if args.short:
        args.tokens, args.turns = [4, 16], 3
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (f"file://{Path(folder) / 'rendezvous'}", args), nprocs=args.ranks)


def run(rank: int, rendezvous: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rendezvous, rank=rank, world_size=args.ranks)
    plain = make_experts(getattr(torch, args.dtype))
    with torch.inference_mode():
        ways = all_ways(plain, rank, args.ranks)
        for tokens in args.tokens:
            batch = make_batch(tokens, plain.down_proj.dtype, rank, args)
            check(ways, plain, batch)
            turns = [{name: cost(way, batch) for name, way in ways.items()} for _ in range(2)]
            turns = [
                {name: cost(way, batch) for name, way in ways.items()} for _ in range(args.turns)
            ]
            held = {name: peak(way, batch) for name, way in ways.items()}
            sent = {name: sent_bytes(way, batch) for name, way in ways.items()}
            if rank == 0:
                report(tokens, turns, held, sent, args)
    dist.destroy_process_group()


# ---- the layer and its batches ------------------------------------------------------------------


def make_experts(dtype: torch.dtype) -> nn.Module:
    """Qwen3-MoE's experts, the same on all ranks."""
    from transformers import AutoConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = AutoConfig.for_model(
        "qwen3_moe",
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
    )
    config._experts_implementation = "grouped_mm"
    module = Qwen3MoeExperts(config).to(dtype)
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data = (torch.randn(parameter.shape) * 0.03).to(dtype)
        parameter.requires_grad_(False)
    return module


def make_batch(
    tokens: int, dtype: torch.dtype, rank: int, args: argparse.Namespace
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, ids and weights of one rank."""
    generator = torch.Generator().manual_seed(1 + rank)
    popularity = torch.rand(EXPERTS, generator=torch.Generator().manual_seed(0)) + 0.25
    if args.skew:
        halves = popularity.split([EXPERTS // args.ranks, EXPERTS - EXPERTS // args.ranks])
        popularity = torch.cat(
            (0.8 * halves[0] / halves[0].sum(), 0.2 * halves[1] / halves[1].sum())
        )
    ids = torch.multinomial(popularity.expand(tokens, -1), TOP_K, generator=generator)
    weights = torch.rand(tokens, TOP_K, generator=generator)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    return hidden.to(dtype), ids, (weights / weights.sum(-1, keepdim=True)).to(dtype)


# ---- the ways -----------------------------------------------------------------------------------


def all_ways(plain: nn.Module, rank: int, ranks: int) -> dict[str, Way]:
    """By name; the first is ours."""
    fields = {field.name for field in dataclasses.fields(torch_eplb.Config)}
    ways: dict[str, Way] = {"ours": wrapped(plain)}
    if "experts" in fields:
        ways["ours, module"] = wrapped(plain, experts="module")
    ways["ours, gathered"] = wrapped(plain, dispatch="all_gather")
    local = shard(plain, rank, ranks)
    ways["transformers"] = transformers_way(copy.deepcopy(local), ranks)
    ways["textbook"] = lambda *batch: textbook(local, ranks, *batch)
    ways["all-gather"] = lambda *batch: gathered(local, rank, ranks, *batch)
    titan = torchtitan_way(local, ranks)
    if titan is not None:
        ways["torchtitan"] = titan
    ways["unsharded"] = plain
    return ways


def wrapped(plain: nn.Module, **options: Any) -> Way:
    return torch_eplb.wrap(copy.deepcopy(plain), collect_interval=10**6, policy="static", **options)


def shard(plain: nn.Module, rank: int, ranks: int) -> nn.Module:
    """One rank's experts, as transformers shards them."""
    module = copy.deepcopy(plain)
    size = EXPERTS // ranks
    for name in ("gate_up_proj", "down_proj"):
        full = getattr(plain, name)
        part = full[rank * size : (rank + 1) * size].clone()
        setattr(module, name, nn.Parameter(part, requires_grad=False))
    module.num_experts, module._is_expert_parallel = size, True
    return module


def transformers_way(local: nn.Module, ranks: int) -> Way:
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.expert_parallel import AllToAllEP

    mesh = init_device_mesh("cpu", (ranks, 1), mesh_dim_names=("ep", "tp"))
    return AllToAllEP(local, mesh["ep"], mesh["tp"])


def torchtitan_way(local: nn.Module, ranks: int) -> Way | None:
    """Its token dispatcher of the all-to-all kind around the same grouped products, or None."""
    try:
        from torchtitan.distributed.utils import set_spmd_backend
        from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher
    except ImportError:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    set_spmd_backend("default")  # meshes are given, not taken from its trainer
    config = AllToAllTokenDispatcher.Config(num_experts=EXPERTS, top_k=TOP_K)
    dispatcher = AllToAllTokenDispatcher(config)
    dispatcher.wire_meshes(ep_mesh=init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",)))

    def way(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        counts = torch.bincount(ids.reshape(-1), minlength=EXPERTS)
        rows, counts, kept = dispatcher.dispatch(hidden, weights, ids, counts)
        return dispatcher.combine(grouped(local, rows, counts), kept, hidden)

    return way


def grouped(local: nn.Module, rows: Tensor, counts: Tensor) -> Tensor:
    """The experts' products on rows in the order of experts."""
    ends = counts.cumsum(0).int()
    both = F.grouped_mm(rows, local.gate_up_proj.transpose(-2, -1), offs=ends)
    gate, up = both.chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, local.down_proj.transpose(-2, -1), offs=ends)


def textbook(local: nn.Module, ranks: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Counts, one row per choice in the order of experts, products, rows back, sum."""
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    send = torch.bincount(flat, minlength=EXPERTS).view(ranks, -1)
    receive = torch.empty_like(send)
    dist.all_to_all_single(receive, send)
    there, here = send.sum(1).tolist(), receive.sum(1).tolist()
    rows = hidden[order // TOP_K]
    came = rows.new_empty(sum(here), HIDDEN)
    dist.all_to_all_single(came, rows, here, there)
    expert = torch.arange(EXPERTS // ranks).repeat(ranks).repeat_interleave(receive.reshape(-1))
    by_expert = expert.argsort(stable=True)
    results = torch.empty_like(came)
    results[by_expert] = grouped(local, came[by_expert], receive.sum(0))
    dist.all_to_all_single(rows, results, there, here)
    back = torch.empty_like(rows)
    back[order] = rows
    return (back.view(-1, TOP_K, HIDDEN) * weights.unsqueeze(-1)).sum(1)


def gathered(
    local: nn.Module, rank: int, ranks: int, hidden: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """Everybody's tokens; the choices of this rank's experts; reduce-scatter of partial sums."""

    def everybody(mine: Tensor) -> Tensor:
        parts = mine.new_empty(ranks * len(mine), mine.shape[1])
        all_gather(parts, mine.contiguous())
        return parts

    all_hidden, all_ids, all_weights = (everybody(x) for x in (hidden, ids, weights))
    size = EXPERTS // ranks
    expert = all_ids.reshape(-1) - rank * size
    own = torch.where((expert >= 0) & (expert < size))[0]
    own = own[expert[own].argsort(stable=True)]
    results = grouped(local, all_hidden[own // TOP_K], torch.bincount(expert[own], minlength=size))
    results = results * all_weights.reshape(-1)[own, None]
    partial = torch.zeros_like(all_hidden).index_add_(0, own // TOP_K, results)
    total = torch.empty_like(hidden)
    reduce_scatter(total, partial)
    return total


# ---- measuring ----------------------------------------------------------------------------------


def check(ways: dict[str, Way], plain: nn.Module, batch: tuple[Tensor, ...]) -> None:
    """All ways compute the layer's output."""
    expected = plain(*batch).float()
    for name, way in ways.items():
        error = (way(*batch).float() - expected).abs().max() / expected.abs().max()
        assert error < (1e-4 if batch[0].dtype == torch.float32 else 0.03), (name, error)


@dataclasses.dataclass
class Cost:
    """Of one forward."""

    seconds: float  # until the last rank has its output
    busiest: float  # CPU seconds of the rank that used most


def cost(way: Way, batch: tuple[Tensor, ...]) -> Cost:
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    way(*batch)
    used = torch.tensor(
        [time.perf_counter() - wall, time.process_time() - cpu], dtype=torch.float64
    )
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    return Cost(*used.tolist())


def peak(way: Way, batch: tuple[Tensor, ...]) -> float:
    """Most memory held at one time during a forward, in units of ``[tokens, top-k, hidden]``.

    What one operation takes and gives back inside of it is not seen.
    """
    with AllocationObserver() as observer:
        way(*batch)
    return observer.peak / (batch[0].numel() * batch[0].element_size() * TOP_K)


def sent_bytes(way: Way, batch: tuple[Tensor, ...]) -> float:
    """Bytes that this rank sends to others in a forward, in units of ``[tokens, hidden]``."""
    engine = getattr(way, "engine", None)
    if engine is None or not hasattr(way.stats(), "token_bytes_sent"):
        return float("nan")
    before = way.stats().token_bytes_sent
    way(*batch)
    return (way.stats().token_bytes_sent - before) / (batch[0].numel() * batch[0].element_size())


def report(
    tokens: int,
    turns: list[dict[str, Cost]],
    held: dict[str, float],
    sent: dict[str, float],
    args: argparse.Namespace,
) -> None:
    """Ratios are formed within a turn."""
    traffic = "80% want rank 0" if args.skew else "no skew"
    print(f"\n{args.ranks} ranks, {tokens} tokens each, {args.dtype}, {traffic}")
    print(f"{'':16s}{'ms':>9s}{'/ ours':>9s}{'quartiles':>14s}{'CPU / ours':>12s}{'peak':>7s}"
          f"{'sent':>7s}")  # fmt: skip
    for name in turns[0]:
        ours = [turn["ours"] for turn in turns]
        costs = [turn[name] for turn in turns]
        ratios = [c.seconds / o.seconds for c, o in zip(costs, ours, strict=True)]
        busy = statistics.median(c.busiest / o.busiest for c, o in zip(costs, ours, strict=True))
        low, _, high = statistics.quantiles(ratios, n=4)
        ms = 1e3 * statistics.median(c.seconds for c in costs)
        print(f"{name:16s}{ms:9.2f}{statistics.median(ratios):9.2f}{low:8.2f} -{high:5.2f}"
              f"{busy:12.2f}{held[name]:7.1f}{sent[name]:7.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
