"""What moving experts costs: memory, bytes, time, and how little of it the model feels.

    python examples/benchmarks/migration.py            # starts its own 2 ranks, four minutes
    python examples/benchmarks/migration.py --short    # some seconds, for a quick check

An expert has the 36 MiB of one of Qwen3-235B in bfloat16; `--hidden` and `--width` make it another
size. With smaller ones, what does not depend on the size (the agreement between ranks, the routing
tables) weighs more.

Two ranks of one thread each, on CPU with gloo, or on the accelerators of a machine that has two.
Everything that is compared is measured in one run, in turns:

    staging     an allocation observer sees every tensor memory that the exchange makes, its pool
                included, for budgets of 1, 2 and 4 experts
    blocking    a model balanced with overlap=False: each round is posted and received in one stop
                and copied in the next one, before another is posted; each stop is followed by
                bare isend/irecv of the same sizes between the same ranks
    overlap     the same model and traffic with overlap=True
    idle        steps in which nothing is pending
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _memory import AllocationObserver
from torch import Tensor, nn
from torch.nn import functional as F

import torch_eplb
from torch_eplb.comm.communicator import make_communicator
from torch_eplb.layers.finding import find_layers
from torch_eplb.migration.exchange import Exchange
from torch_eplb.schedule.schedule import make_schedule
from torch_eplb.testing import Operation, record_operations, run_until
from torch_eplb.values.placement import Placement

RANKS, LAYERS, EXPERTS, REDUNDANT, TOP_K = 2, 2, 16, 2, 2
SLOTS = (EXPERTS + REDUNDANT) // RANKS
BUDGETS = (1, 2, 4)


class Experts(nn.Module):
    """Gated experts with the forward and the attributes that torch_eplb recognises."""

    def __init__(self, hidden: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        gate_up = torch.randn(EXPERTS, 2 * width, hidden, device=device) * 0.02
        down = torch.randn(EXPERTS, hidden, width, device=device) * 0.02
        self.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
        self.down_proj = nn.Parameter(down, requires_grad=False)

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

    def __init__(self, hidden: int, width: int, device: torch.device) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Experts(hidden, width, device) for _ in range(LAYERS))

    def forward(self, hidden: Tensor, top_k_index: Tensor) -> Tensor:
        """``hidden`` [tokens, hidden], ``top_k_index`` [layers, tokens, TOP_K]."""
        weights = torch.full(top_k_index.shape[1:], 1 / TOP_K, device=hidden.device)
        for layer, index in zip(self.layers, top_k_index, strict=True):
            hidden = hidden + layer(hidden, index, weights)
        return hidden


# ---- memory and bytes ------------------------------------------------------------------------


@dataclass
class Memory:
    """Peak and bytes of some rebalances under one budget, of the rank that is worst."""

    experts: int
    direct: bool
    peak: int
    budget: int
    bytes_sent: int
    least: int


def measure_memory(device: torch.device, experts: int, direct: bool, times: int) -> Memory:
    """Move a model's experts to random placements under an observer, and check where they end."""
    model = Model(512, 256, device)
    layers = find_layers(model)
    full = [[tensor.clone() for tensor in layer.tensors()] for layer in layers]
    expert_bytes = layers[0].expert_bytes
    assert dist.group.WORLD is not None
    comm = make_communicator(dist.group.WORLD, device, 60.0)
    comm.open_data_plane(hccl_buffer_size=16, nccl_max_ctas=4)
    placement = Placement.initial(LAYERS, EXPERTS, RANKS, SLOTS)
    for layer, held in zip(layers, placement.experts[:, comm.rank], strict=True):
        layer.shard(held.tolist())
    budget = experts * expert_bytes
    with AllocationObserver() as observer:
        exchange = Exchange(layers, comm, budget, verify=False)
    least = 0
    generator = np.random.default_rng(experts)
    for _ in range(times):
        wanted = random_placement(generator)
        least += int(placement.newly_held(wanted).sum()) * expert_bytes
        schedule = make_schedule(
            placement, wanted, expert_bytes=expert_bytes, staging_bytes=budget, direct=direct
        )
        for number, transfers in enumerate(schedule.rounds):
            with observer:
                exchange.post(number, transfers)
                exchange.wait()
            dist.barrier()
            with observer:
                exchange.commit()
        placement = schedule.target
    for layer, originals, held in zip(layers, full, placement.experts[:, comm.rank], strict=True):
        for tensor, original in zip(layer.tensors(), originals, strict=True):
            if not torch.equal(tensor, original[held.tolist()]):
                raise RuntimeError(f"{layer.name} does not hold its experts")
    totals = torch.tensor([exchange.bytes_sent], device=device)
    dist.all_reduce(totals)
    worst = torch.tensor([observer.peak], device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    comm.close()
    return Memory(experts, direct, int(worst), budget, int(totals), least)


def random_placement(generator: np.random.Generator) -> Placement:
    """Experts anywhere, each at least once and never twice on a rank."""
    layers: list[np.ndarray] = []
    while len(layers) < LAYERS:
        ranks = [generator.choice(EXPERTS, SLOTS, replace=False) for _ in range(RANKS)]
        if len(np.unique(ranks)) == EXPERTS:
            layers.append(np.stack(ranks))
    return Placement(np.stack(layers), EXPERTS)


# ---- time ------------------------------------------------------------------------------------


class BareTransfers:
    """isend/irecv of given sizes, and copies of what is staged, on buffers of its own.

    They are as large as a layer's slots and are used in turn, so that what is sent comes from
    memory and not from a cache, as weights do.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._source = torch.ones(nbytes, dtype=torch.uint8, device=device)
        self._target = torch.ones(nbytes, dtype=torch.uint8, device=device)
        self._used = [0, 0]
        self._group = dist.new_group(backend=None)

    def fill_caches(self) -> None:
        """Read as much memory as a forward does, so that nothing later finds what it needs."""
        for buffer in (self._source, self._target):
            buffer.view(torch.int64).sum()

    def seconds(self, operations: list[Operation]) -> tuple[float, float]:
        """Time of the transfers, and with the copies that staging needs."""
        posts, staged = [], []
        for operation in operations:
            receives = operation.kind == "receive"
            buffer = self._target if receives else self._source
            begin = self._used[receives]
            if begin + operation.nbytes > len(buffer):
                begin = 0
            self._used[receives] = begin + operation.nbytes
            part = buffer[begin : begin + operation.nbytes]
            if operation.staged:
                staged.append((self._source[begin : begin + operation.nbytes], part))
            call = dist.irecv if receives else dist.isend
            posts.append(dist.P2POp(call, part, operation.peer, self._group))
        self.fill_caches()
        dist.barrier()
        begin = time.perf_counter()
        for work in dist.batch_isend_irecv(posts) if posts else ():
            work.wait()
        synchronize(self._source.device)
        transferred = time.perf_counter() - begin
        for slot, part in staged:
            slot.view(torch.int64).copy_(part.view(torch.int64))
        synchronize(self._source.device)
        return transferred, time.perf_counter() - begin


@dataclass
class Service:
    """One wrapped model and what its steps took on this rank, in seconds."""

    balancer: torch_eplb.ExpertLoadBalancer
    posted: list[Operation]
    migrating_hooks: list[float] = field(default_factory=list)
    migrating_steps: list[float] = field(default_factory=list)
    quiet_steps: list[float] = field(default_factory=list)
    # Ours, bare, bare with the copies; for every round, and for every rebalance its rounds.
    rounds: list[tuple[float, float, float]] = field(default_factory=list)
    rebalances: list[list[tuple[float, float, float]]] = field(default_factory=list)

    def run_cycle(self, traffic: Traffic, bare: BareTransfers, repeat: bool) -> None:
        """Serve until one more rebalance is done; ``bare`` may repeat what each step has moved."""
        target = self.balancer.stats().rebalances + 1
        self.rounds = []
        run_until(
            lambda: self.balancer.stats().rebalances >= target,
            lambda: self.serve(traffic, bare, repeat),
        )
        if repeat:
            self.rebalances.append(self.rounds)

    def serve(self, traffic: Traffic, bare: BareTransfers, repeat: bool) -> None:
        hidden, index = traffic.batch()
        before = self.balancer.stats()
        self.posted.clear()
        bare.fill_caches()
        dist.barrier()
        begin = time.perf_counter()
        self.balancer(hidden, index)
        synchronize(hidden.device)
        step = time.perf_counter() - begin
        after = self.balancer.stats()
        hooks = after.hook_seconds - before.hook_seconds
        if "moving experts" in (before.stage, after.stage) or (
            after.placement_version != before.placement_version
        ):
            self.migrating_hooks.append(hooks)
            self.migrating_steps.append(step)
            if repeat:
                self.rounds.append((hooks, *bare.seconds(self.posted)))
        elif after.step > 2:
            self.quiet_steps.append(step)


class Traffic:
    """Batches of this rank."""

    def __init__(self, device: torch.device, tokens: int, hidden: int, rank: int) -> None:
        self._generator = torch.Generator().manual_seed(1 + rank)
        self._hidden = torch.randn(tokens, hidden, generator=self._generator).to(device)

    def batch(self) -> tuple[Tensor, Tensor]:
        tokens = len(self._hidden)
        scores = torch.rand(LAYERS, tokens, EXPERTS, generator=self._generator)
        return self._hidden, scores.topk(TOP_K, dim=-1).indices.to(self._hidden.device)


def wrapped(args: argparse.Namespace, device: torch.device, overlap: bool) -> Service:
    balancer = torch_eplb.wrap(
        Model(args.hidden, args.width, device),
        num_redundant_experts=REDUNDANT,
        policy="random",  # moves far more than a policy that looks at the load
        overlap=overlap,
        collect_interval=args.collect,
        plan_interval=2,
        staging_bytes=args.budget * expert_bytes(args),
        layers_per_step=args.layers_per_step,
    )
    return Service(balancer, record_operations(balancer))


def expert_bytes(args: argparse.Namespace) -> int:
    """Three float32 matrices."""
    return 3 * 4 * args.hidden * args.width


def idle_hook_seconds(device: torch.device, steps: int) -> float:
    """Mean time in the model's hook over the steps of one collection window."""
    model = torch_eplb.wrap(Model(64, 64, device), policy="static", collect_interval=steps + 200)
    with model:
        for _ in range(100):
            model.step()
        before = model.stats().hook_seconds
        for _ in range(steps):
            model.step()
        return (model.stats().hook_seconds - before) / steps


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


# ---- the run ---------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--width", type=int, default=768, help="of an expert; 36 MiB by default")
    parser.add_argument("--budget", type=int, default=1, help="experts that the staging holds")
    parser.add_argument("--layers-per-step", type=int, default=1, help=f"of {LAYERS}")
    parser.add_argument("--tokens", type=int, default=64, help="per rank and forward")
    parser.add_argument("--cycles", type=int, default=20, help="rebalances of each way")
    parser.add_argument("--collect", type=int, default=12, help="steps before each rebalance")
    parser.add_argument("--short", action="store_true", help="some seconds, for a quick check")
    args = parser.parse_args()
    if args.short:
        args.hidden, args.width, args.cycles, args.collect = 512, 256, 2, 6
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (f"file://{Path(folder) / 'rendezvous'}", args), nprocs=RANKS)


def run(rank: int, rendezvous: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if torch.accelerator.is_available() and torch.accelerator.device_count() >= RANKS:
        torch.accelerator.set_device_index(rank)
        device = torch.device(torch.accelerator.current_accelerator().type, rank)
    dist.init_process_group(None, rendezvous, rank=rank, world_size=RANKS)
    times = 1 if args.short else 3
    memory = [
        measure_memory(device, experts, direct, times)
        for direct in (False, True)
        for experts in BUDGETS
    ]
    idle = idle_hook_seconds(device, 400 if args.short else 2000)
    blocking, overlap = (wrapped(args, device, overlap) for overlap in (False, True))
    traffic = Traffic(device, args.tokens, args.hidden, rank)
    # A round moves an expert into a slot at most once.
    bare = BareTransfers(device, args.layers_per_step * SLOTS * expert_bytes(args))
    with blocking.balancer, overlap.balancer, torch.inference_mode():
        for _ in range(args.cycles):
            blocking.run_cycle(traffic, bare, repeat=True)
            overlap.run_cycle(traffic, bare, repeat=False)
    everyone: list[Any] = [None] * RANKS
    mine = [
        (s.migrating_hooks, s.migrating_steps, s.quiet_steps, s.rebalances)
        for s in (blocking, overlap)
    ]
    dist.all_gather_object(everyone, (mine, idle))
    if rank == 0:
        print(
            f"{RANKS} ranks on {device.type}, {SLOTS} slots each; an expert is "
            f"{expert_bytes(args) / 2**20:.1f} MiB; staging for {args.budget}, layers per step: "
            f"{args.layers_per_step}\n"
        )
        report(memory, everyone)
    dist.destroy_process_group()


def report(memory: list[Memory], everyone: list[Any]) -> None:
    """Print the table; each row with its aim."""
    for row in memory:
        name = f"peak staging, budget {row.experts}{', direct' if row.direct else ''}"
        line(name, f"{row.peak:,} of {row.budget:,} bytes", row.peak <= row.budget, "<= budget")
    one = next(row for row in memory if row.experts == 1)
    share = one.peak / (SLOTS * one.budget)
    line("of a layer-sized staging, budget 1", f"{share:.3f}", share <= 1 / SLOTS, f"<= 1/{SLOTS}")
    ratio = max(row.bytes_sent / row.least for row in memory)
    line("bytes sent / minimum, worst", f"{ratio:.3f}", ratio <= 1.05, "<= 1.05")

    # A round is over, of ours and of the bare ones, when it is over on every rank.
    totals = [
        np.array(per_rank).max(axis=0).sum(axis=0)
        for per_rank in zip(*(ways[0][3] for ways, _ in everyone), strict=True)
    ]
    ours, bare, copied = 1e3 * np.median(totals, axis=0)
    ratio = statistics.median(total[0] / total[1] for total in totals)
    text = f"{ratio:.2f} ({ours:.0f} ms / {bare:.0f} ms)"
    line("rebalance without overlap / bare isend", text, ratio <= 1.15, "<= 1.15")
    ratio = statistics.median(total[0] / total[2] for total in totals)
    line("the same / bare isend and staged copies", f"{ratio:.2f} ({copied:.0f} ms)", None, "")

    hooks = [np.concatenate([ways[way][0] for ways, _ in everyone]) for way in (0, 1)]
    for name, summary in (("mean", np.mean), ("p99", lambda x: np.percentile(x, 99))):
        blocking, overlap = (float(summary(values)) for values in hooks)
        text = f"{overlap / blocking:.2f} ({1e3 * overlap:.2f} ms / {1e3 * blocking:.2f} ms)"
        line(f"hooks while migrating / blocking, {name}", text, overlap <= blocking / 5, "<= 1/5")

    p99s, medians = [], []
    # Steps without migration are alike whatever follows them.
    quiet = np.concatenate([ways[way][2] for ways, _ in everyone for way in (0, 1)])
    for way in (0, 1):
        moving = np.concatenate([ways[way][1] for ways, _ in everyone])
        p99s.append(float(np.percentile(moving, 99) / np.percentile(quiet, 99)))
        medians.append(float(np.median(moving) / np.median(quiet)))
    for name, (blocking, overlap) in (("p99", p99s), ("median", medians)):
        text = f"{overlap:.2f}, blocking {blocking:.2f}"
        line(f"step while migrating / without, {name}", text, overlap < blocking, "lower")

    idle = max(rank[1] for rank in everyone)
    line("hook per step, nothing pending", f"{1e6 * idle:.1f} us", idle < 30e-6, "< 30 us")


def line(name: str, value: str, met: bool | None, aim: str) -> None:
    verdict = "" if met is None else "met" if met else "MISSED"
    print(f"{name:<42}{value:<38}{aim:<11}{verdict}".rstrip(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
