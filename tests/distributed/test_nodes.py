"""Two nodes, each with a `torchrun` agent and ranks of its own: what knows which ranks are near."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from support.models import ToyModel, skewed_batch
from support.ranks import run_ranks

import torch_eplb

TESTS = Path(__file__).parents[1]
PROGRAM = """
import copy, json, os

import torch
import torch.distributed as dist
import torch_eplb
from support.models import ToyModel, skewed_batch

RANKS_PER_NODE = 2
dist.init_process_group("gloo")
rank = dist.get_rank()
other_node = [r for r in range(4) if r // RANKS_PER_NODE != rank // RANKS_PER_NODE]


def serve(balancer, reference, enough):
    for step in range(5000):
        if enough(step):
            return
        x = skewed_batch(12, 16, 100 * step + rank)
        torch.testing.assert_close(balancer(x), reference(x), atol=1e-5, rtol=1e-4)
    raise AssertionError("the condition never held")


def wrap(**options):
    # At first every node has every expert once.
    model = ToyModel()
    reference = copy.deepcopy(model)
    balancer = torch_eplb.wrap(model, num_redundant_experts=8, timeout=30, **options)
    return balancer, reference


# Groups of experts have to move until each is on one node as a whole.
balancer, reference = wrap(
    policy="deepseek", num_expert_groups=2, collect_interval=4, plan_interval=1, layers_per_step=2
)
serve(balancer, reference, lambda _: balancer.stats().rebalances >= 1)
nodes_of_groups = [
    sorted({slot_rank // RANKS_PER_NODE for slot_rank in range(4)
            if (balancer.placement.experts[:, slot_rank] // 4 == group).any()})
    for group in range(2)
]
moved = balancer.stats().experts_moved
balancer.close()

sent_away = {}
for told in (None, 1):
    balancer, reference = wrap(policy="static", replica_choice="table", num_nodes=told)
    serve(balancer, reference, lambda step: step == 10)
    away = torch.tensor(balancer.load()[1][:, other_node].sum())
    dist.all_reduce(away)
    sent_away[str(told)] = int(away)
    rows = balancer.load()[1].sum().item() * 4  # of all ranks
    balancer.close()

if rank == 0:
    local = os.environ["LOCAL_WORLD_SIZE"]
    print(json.dumps([local, moved, nodes_of_groups, sent_away, rows]), flush=True)
dist.destroy_process_group()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def agent(node: int, port: int, program: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
            *("--node-rank", str(node), "--nproc-per-node", "2"),
            *("--master-addr", "127.0.0.1", "--master-port", str(port), str(program)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)]),
            "OMP_NUM_THREADS": "1",
        },
    )


def test_nodes_are_known_from_torchrun_and_near_replicas_and_whole_groups_are_chosen(
    tmp_path: Path,
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    port = free_port()
    agents = [agent(node, port, program) for node in range(2)]
    try:
        said = [process.communicate(timeout=50)[0] for process in agents]
    finally:
        for process in agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert [process.returncode for process in agents] == [0, 0], "\n".join(said)
    result = json.loads(next(line for line in said[0].splitlines() if line.startswith("[")))
    ranks_per_node, moved, nodes_of_groups, sent_away, rows = result
    assert ranks_per_node == "2"
    assert moved > 0
    assert sorted(nodes_of_groups) == [[0], [1]]
    # Each expert is on both nodes, so that with turns from the table nothing has to leave its node.
    # Where nodes are not known, a rank without the expert sends to both replicas: a quarter of all.
    assert sent_away["None"] == 0
    assert sent_away["1"] > rows / 5


def serve_on_three_nodes(rank: int, world_size: int) -> list[int]:
    """Rows that left their node where nodes are known, and where all ranks are taken to be near."""
    sent_away = []
    for num_nodes in (3, 1):
        # Every node has every expert once.
        balancer = torch_eplb.wrap(
            ToyModel(), num_redundant_experts=16, policy="static", num_nodes=num_nodes, timeout=30
        )
        with torch.no_grad():
            for step in range(10):
                balancer(skewed_batch(6 + 3 * rank, 16, 100 * step + rank))
        others = [r for r in range(world_size) if r // 2 != rank // 2]
        away = torch.tensor(balancer.load()[1][:, others].sum())
        dist.all_reduce(away)
        sent_away.append(int(away))
        balancer.close()
    return sent_away


def test_where_batches_are_balanced_rows_leave_their_node_only_for_want_of_a_near_replica() -> None:
    known, ignored = run_ranks(serve_on_three_nodes, 6)[0]
    assert 0 < known < ignored
