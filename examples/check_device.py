"""Checks that torch_eplb works on this machine's accelerator, and writes a report in Markdown.

    python examples/check_device.py                              # one rank
    torchrun --nproc-per-node 4 examples/check_device.py         # several, one device each
    python examples/check_device.py --out report.md --seconds 5  # attach the report to an issue

It takes the accelerator that it finds (Ascend NPU, CUDA), or the CPU. Small models are served and
compared with unwrapped copies while their experts move, in every way there is; then graphs are
captured, the solver is compared with the host's, waits of the host are counted, and memory and time
are measured: of what moves experts and of the hot path next to what the device takes for the bare
transfers and copies, and of forwards that experts move beside. The exit status is 1 if anything was
wrong.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import torch_eplb

EXPERTS, HIDDEN, WIDTH, TOP_K = 16, 64, 32, 2
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
MOST_STEPS = 3000
# torch 2.13 renamed it.
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


# ---- the models ---------------------------------------------------------------------------------


class Experts(nn.Module):
    """Fetches the weights of every choice: few operations, and no wait for the device."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.up = nn.Parameter(torch.randn(EXPERTS, width, hidden) / hidden**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, hidden, width) / width**0.5)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        # An id past the last expert is nobody's; its weight is 0.
        ids = top_k_index.clamp(max=self.num_experts - 1)
        return compute(hidden_states, ids, top_k_weights, self.up, self.down)


class OwnDispatch(Experts):
    """Brings all ranks' slots here instead of tokens there, and computes by physical id."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        slots = [gather(tensor.detach()) for tensor in (self.up, self.down)]
        return compute(hidden_states, top_k_index, top_k_weights, *slots)


def compute(hidden: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    inner = nn.functional.silu(up[ids] @ hidden[:, None, :, None])
    return ((down[ids] @ inner).squeeze(-1) * weights.unsqueeze(-1)).sum(1)


def gather(mine: Tensor) -> Tensor:
    everyone = mine.new_empty(dist.get_world_size() * mine.shape[0], *mine.shape[1:])
    all_gather_single(everyone, mine.contiguous())
    return everyone


class Layer(nn.Module):
    def __init__(self, kind: type[Experts], hidden: int, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, EXPERTS, bias=False)
        self.experts = kind(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(TOP_K, dim=-1)
        return self.experts(x, ids, weights)


class Model(nn.Module):
    def __init__(
        self, kind: type[Experts] = Experts, hidden: int = HIDDEN, width: int = WIDTH
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(kind, hidden, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


torch_eplb.register_layer(Experts, skips_sentinel=True)


def make(kind: type[Experts] = Experts, **sizes: int) -> tuple[Model, Model]:
    """A model on the device, and one with the same weights that nobody wraps."""
    model = Model(kind, **sizes)
    plain = Model(Experts, **sizes)
    plain.load_state_dict(model.state_dict())
    return model.to(device), plain.to(device)


def batch(step: int, shared: bool) -> Tensor:
    """Tokens around a centre that changes, so that some experts are hot."""
    generator = torch.Generator().manual_seed(1000 * step + (0 if shared else dist.get_rank()))
    centre = torch.randn(1, HIDDEN, generator=generator)
    return (2 * centre + torch.randn(32, HIDDEN, generator=generator)).to(device)


def wrap(model: nn.Module, **options: Any) -> torch_eplb.ExpertLoadBalancer:
    quick: dict[str, Any] = {"collect_interval": 8, "plan_interval": 1, "policy": "random"}
    redundant = EXPERTS // 4 if dist.get_world_size() > 1 else 0
    redundant -= (EXPERTS + redundant) % dist.get_world_size()
    quick["num_redundant_experts"] = max(redundant, 0)
    return torch_eplb.wrap(model, **{**quick, **options})


# ---- the checks ---------------------------------------------------------------------------------

CHECKS: list[tuple[str, Callable[..., str], dict[str, Any]]] = []


def check(name: str, **options: Any) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Add a function to the checks; it returns what is to be reported, or raises."""

    def add(function: Callable[..., str]) -> Callable[..., str]:
        # Decorators run from the last to the first.
        present = [other for _, other, _ in CHECKS]
        place = present.index(function) if function in present else len(present)
        CHECKS.insert(place, (name, function, options))
        return function

    return add


@check("all_to_all, batch", dispatch="all_to_all", replica_choice="batch")
@check("all_to_all, local", dispatch="all_to_all", replica_choice="local")
@check("all_to_all, table", dispatch="all_to_all", replica_choice="table")
@check("all_to_all, even", dispatch="all_to_all", replica_choice="even")
@check("all_gather, batch", dispatch="all_gather", replica_choice="batch")
@check("all_gather, table", dispatch="all_gather", replica_choice="table", max_tokens_per_rank=32)
@check("all_reduce, batch", dispatch="all_reduce", replica_choice="batch")
@check("all_reduce, table", dispatch="all_reduce", replica_choice="table")
@check("external, local", dispatch="external", replica_choice="local")
@check("external, table", dispatch="external", replica_choice="table")
@check("checksums, staging only", replica_choice="table", verify=True, direct=False)
@check("rounds between forwards", replica_choice="table", verify=True, overlap=False)
@check("weights over gloo", replica_choice="table", verify=True, transport="gloo")
def serving(**options: Any) -> str:
    """Outputs are the unwrapped model's while experts move, and so are the weights at the end."""
    external = options.get("dispatch") == "external"
    model, plain = make(OwnDispatch if external else Experts)
    with wrap(model, **options) as balancer, torch.inference_mode():
        worst, step = 0.0, 0
        wanted = 2 if dist.get_world_size() > 1 else 1
        while balancer.stats().rebalances < wanted and step < MOST_STEPS:
            x = batch(step, options.get("dispatch") == "all_reduce")
            worst = max(worst, (balancer(x) - plain(x)).abs().max().item())
            step += 1
        stats = balancer.stats()
        require(stats.rebalances >= wanted, f"{stats.rebalances} rebalances in {step} steps")
        require(worst < 1e-3, f"outputs differ by {worst:.2g}")
        model = balancer.unwrap()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        require(torch.equal(ours, theirs), "weights differ after unwrap")
    return f"{step} forwards, {stats.experts_moved} experts moved, differ by {worst:.1g} at most"


@check("captured graph, all_reduce", dispatch="all_reduce", replica_choice="table")
@check(
    "captured graph, all_gather",
    dispatch="all_gather",
    replica_choice="table",
    max_tokens_per_rank=32,
)
@check("captured graph, external", dispatch="external", replica_choice="table")
def captured(dispatch: str, **options: Any) -> str:
    """One captured forward stays right while experts move beneath it."""
    module = torch.get_device_module(device)
    new_graph = getattr(module, "CUDAGraph", None) or getattr(module, "NPUGraph", None)
    if device.type == "cpu" or new_graph is None:
        return f"skipped: no graphs on {device.type}"
    model, plain = make(OwnDispatch if dispatch == "external" else Experts)
    with wrap(model, dispatch=dispatch, **options) as balancer, torch.inference_mode():
        x = batch(0, dispatch == "all_reduce")
        side = module.Stream()
        side.wait_stream(module.current_stream())
        with module.stream(side):
            for _ in range(3):
                balancer(x)
        module.current_stream().wait_stream(side)
        graph = new_graph()
        with module.graph(graph):
            y = balancer(x)
        worst, step = 0.0, 1
        while balancer.stats().rebalances < 2 and step < MOST_STEPS:
            x.copy_(batch(step, dispatch == "all_reduce"))
            balancer.step()
            graph.replay()
            worst = max(worst, (y - plain(x)).abs().max().item())
            step += 1
        require(worst < 1e-3, f"outputs differ by {worst:.2g}")
        moved = balancer.stats().experts_moved
    return f"{step} replays, {moved} experts moved, differ by {worst:.1g} at most"


@check("solver of the device")
def solver() -> str:
    """The device's split of a batch is near the host's, which is optimal to 0.1%."""
    from torch_eplb.routing.quotas import solve_quotas, solve_quotas_host

    ranks, experts, redundant = 16, 128, 32
    per_rank = (experts + redundant) // ranks
    flat = (np.arange(ranks * per_rank) % experts).reshape(ranks, per_rank)
    rng = np.random.default_rng(0)
    worst, seconds = 1.0, []
    slots = np.full((experts, 2), -1)
    for expert in range(experts):
        held = np.flatnonzero(flat == expert)
        slots[expert, : len(held)] = held
    for _ in range(20):
        weights = rng.lognormal(0, 1, experts)
        counts = rng.multinomial(65536, weights / weights.sum())
        arguments = (torch.tensor(counts).to(device), torch.tensor(slots).to(device))
        synchronize()
        start = time.perf_counter()
        quotas = solve_quotas(*arguments, ranks, per_rank)
        synchronize()
        seconds.append(time.perf_counter() - start)
        ours, best = quotas.cpu().numpy(), solve_quotas_host(counts, slots, ranks, per_rank)
        require((ours.sum(1) == counts).all() and (ours >= 0).all(), "tokens are lost")
        peaks = [
            np.bincount(slots[slots >= 0] // per_rank, weights=q[slots >= 0]).max()
            for q in (ours, best)
        ]
        worst = max(worst, peaks[0] / peaks[1])
    require(worst < 1.01, f"the peak is {worst:.4f} times the host's")
    median = 1e6 * sorted(seconds)[len(seconds) // 2]
    return f"peak at most {worst:.4f} times the host's; {median:.0f} us ({solver_name()})"


def solver_name() -> str:
    if device.type == "cpu":
        return "host"
    if device.type == "cuda":
        try:
            import triton
        except ImportError:
            return "torch operations, no Triton"
        return f"Triton {triton.__version__}"
    return "torch operations"


@check("waits of the host, all_reduce, table", dispatch="all_reduce", expected=0)
@check("waits of the host, all_gather, table", dispatch="all_gather", expected=0)
@check("waits of the host, external, table", dispatch="external", expected=0)
@check("waits of the host, all_to_all, table", dispatch="all_to_all", expected=2)
@check("waits of the host, all_to_all, batch", dispatch="all_to_all", choice="batch", expected=2)
def waits(dispatch: str, expected: int, choice: str = "table") -> str:
    """A forward of two layers makes the host wait as often as is documented."""
    module = torch.get_device_module(device)
    if not hasattr(module, "set_sync_debug_mode"):
        return f"skipped: {device.type} does not count them"
    model, _ = make(OwnDispatch if dispatch == "external" else Experts)
    options: dict[str, Any] = {"dispatch": dispatch, "replica_choice": choice}
    if dispatch == "all_gather":
        options["max_tokens_per_rank"] = 32
    with wrap(model, **options) as balancer, torch.inference_mode():
        x = batch(0, dispatch == "all_reduce")
        balancer(x)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module.set_sync_debug_mode("warn")
            try:
                balancer(x)
            finally:
                module.set_sync_debug_mode("default")
    found = sum("synchroniz" in str(warning.message) for warning in caught)
    require(found <= expected, f"{found} waits, at most {expected} are documented")
    return f"{found} in a forward of 2 layers"


@check("memory and speed of moving weights", transport="device")
@check("the same over gloo", transport="gloo")
def moving(transport: str) -> str:
    """How much memory the communicator takes, and how fast experts change ranks."""
    before = free_memory()
    model, _ = make(hidden=1024, width=512)
    taken = before - free_memory()
    balancer = wrap(model, num_redundant_experts=0, replica_choice="table", transport=transport)
    group = before - taken - free_memory() - balancer.stats().staging_bytes
    placement = balancer.placement
    with balancer:
        swapped = torch_eplb.Placement(np.roll(placement.experts, 1, axis=1), EXPERTS)
        synchronize()
        start = time.perf_counter()
        balancer.engine.move_to(swapped)
        synchronize()
        seconds = time.perf_counter() - start
        received = balancer.stats().bytes_received
    ranks = dist.get_world_size()
    bare = bare_transfers(received) if ranks > 1 and transport == "device" else 0.0
    memory = "" if device.type == "cpu" else f"{max(group, 0) / 2**20:.0f} MiB for both planes; "
    if ranks == 1:
        return f"{memory}one rank moves nothing"
    said = f"{memory}{received / 2**20:.0f} MiB received in {seconds:.2f} s"
    return f"{said}, bare transfers take {bare:.2f} s" if bare else said


def bare_transfers(nbytes: int) -> float:
    """Seconds in which a rank gets so many bytes from the one before it, in 16 messages."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    pieces = torch.empty(2, 16, nbytes // 16, dtype=torch.uint8, device=device)
    seconds = 0.0
    for _ in range(2):  # the first makes connections
        operations = [
            dist.P2POp(function, pieces[side, i], (rank + step) % ranks)
            for i in range(16)
            for side, (function, step) in enumerate(((dist.isend, 1), (dist.irecv, -1)))
        ]
        synchronize()
        dist.barrier()
        start = time.perf_counter()
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        synchronize()
        seconds = time.perf_counter() - start
    return seconds


@check("forwards beside which experts move")
def beside() -> str:
    """How much longer they take than others."""
    if dist.get_world_size() == 1:
        return "skipped: one rank moves nothing"
    model, _ = make(hidden=1024, width=512)
    quiet, moving = [], []
    with wrap(model, replica_choice="table") as balancer, torch.inference_mode():
        step = 0
        while balancer.stats().rebalances < 2 and step < MOST_STEPS:
            before = balancer.stats().bytes_received
            x = batch(step, shared=False).repeat(1, 1024 // HIDDEN)
            synchronize()
            start = time.perf_counter()
            balancer(x)
            synchronize()
            seconds = time.perf_counter() - start
            (quiet if balancer.stats().bytes_received == before else moving).append(seconds)
            step += 1
    require(len(quiet) > 2 and len(moving) > 0, f"{len(quiet)} without moves, {len(moving)} with")
    usual, other = (1e3 * sorted(times)[len(times) // 2] for times in (quiet[2:], moving))
    return f"median {usual:.1f} ms, {other:.1f} ms where something has arrived"


@check("hot path")
def hot_path() -> str:
    """What is added to a layer of 4096 tokens besides the exchange of tokens."""
    from torch_eplb.routing import choose_from_table, count_hits

    ids = torch.rand(4096, 256, generator=torch.Generator().manual_seed(0)).topk(8).indices
    ids = ids.to(device)
    choices = torch.zeros(257, 120, dtype=torch.int64, device=device)
    count = per_call(lambda: count_hits(ids, 256))
    choose = per_call(lambda: choose_from_table(ids, choices))
    copy = per_call(ids.clone)
    return (
        f"4096 tokens, top 8 of 256: counting {count:.0f} us, choosing {choose:.0f} us, and a copy "
        f"of the ids {copy:.0f} us"
    )


def per_call(function: Callable[[], Any]) -> float:
    """Microseconds of a call among many."""
    function()
    synchronize()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < arguments.seconds:
        for _ in range(10):
            function()
        synchronize()
        calls += 10
    return 1e6 * (time.perf_counter() - start) / calls


# ---- the machine --------------------------------------------------------------------------------


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AssertionError(otherwise)


def synchronize() -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def free_memory() -> int:
    """Of the device, in bytes."""
    if device.type == "cpu":
        return 0
    synchronize()
    return torch.get_device_module(device).mem_get_info()[0]


def find_device() -> torch.device:
    """This rank's, which becomes the current one."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    found = torch.device(kind.type, int(os.environ.get("LOCAL_RANK", 0)))
    torch.get_device_module(found).set_device(found)
    return found


def describe() -> Iterator[tuple[str, str]]:
    yield "torch_eplb", torch_eplb.__version__
    yield "torch", torch.__version__
    yield "Python, machine", f"{platform.python_version()}, {platform.machine()}"
    name = "CPU"
    if device.type != "cpu":
        name = torch.get_device_module(device).get_device_name(device)
    yield "device", f"{device.type}: {name}"
    if device.type == "npu":
        import torch_npu

        yield "torch_npu", torch_npu.__version__
    if device.type == "cuda":
        yield "CUDA, NCCL", f"{torch.version.cuda}, {torch.cuda.nccl.version()}"
    yield "ranks", f"{dist.get_world_size()} over {dist.get_backend()}"


def run_all() -> tuple[list[str], bool]:
    """The report's lines, and whether all was right."""
    lines = ["# torch_eplb on this device", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in describe()]
    lines += ["", "| check | result | |", "| --- | --- | --- |"]
    words = dist.new_group(backend="gloo")  # says what went wrong, whatever it was
    right = True
    for name, function, options in CHECKS:
        start = time.perf_counter()
        try:
            outcome = function(**options)
        except Exception as error:
            traceback.print_exc()
            outcome = f"FAILED: {type(error).__name__}: {error}"
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, outcome, group=words)
        failed = [o for o in outcomes if o.startswith("FAILED")]
        right = right and not failed
        said = (failed or outcomes)[0].replace("\n", " ").replace("|", "/")
        state = "wrong" if failed else "skipped" if said.startswith("skipped: ") else "right"
        said = said.removeprefix("skipped: ")
        lines.append(f"| {name} | {state} | {said} |")
        if dist.get_rank() == 0:
            print(f"{time.perf_counter() - start:6.1f} s  {state:8}{name}: {said}", flush=True)
    return lines, right


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the report to this file")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each timing")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_arguments()
    device = find_device()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29533")
    dist.init_process_group(
        BACKENDS[device.type],
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
    )
    report, all_right = run_all()
    if dist.get_rank() == 0:
        text = "\n".join(report) + "\n"
        print(f"\n{text}")
        if arguments.out is not None:
            arguments.out.write_text(text)
    dist.destroy_process_group()
    sys.exit(0 if all_right else 1)
