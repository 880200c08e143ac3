"""An MoE layer that dispatches with Ascend's MC2 operators, balanced while it serves.

    torchrun --nproc-per-node 8 examples/ascend_mc2.py     # on NPUs, with torch_npu's operators
    python examples/ascend_mc2.py                          # elsewhere: 2 ranks on the CPU

`MC2Experts` calls `npu_moe_distribute_dispatch`, `npu_grouped_matmul` and
`npu_moe_distribute_combine` by their documented signatures, and hands over the `expert_token_nums`
that it gets as load. Where there is no NPU, or with ``--stand-in``, the three are those of
`StandIn` below, made of plain torch and ``all_to_all_single`` on the same group: they show that the
layer and the balancer go together, not what MC2 does.

torch_npu's own operators have limits of their own, which depend on the product: 8 ranks and more,
bfloat16, some hidden sizes (7168), at most 512 tokens per rank.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import torch_eplb

RANKS = 2
LAYERS = 2


def main() -> None:
    args = parse_arguments()
    if "RANK" not in os.environ:
        start_ranks()
    device = torch.device("cpu")
    if torch.accelerator.is_available() and torch.accelerator.current_accelerator().type == "npu":
        device = torch.device("npu", int(os.environ["LOCAL_RANK"]))
        torch.npu.set_device(device)
    dist.init_process_group("gloo" if device.type == "cpu" else "hccl")
    try:
        said = serve(args, device)
    finally:
        dist.destroy_process_group()
    if said:
        print(said)


def serve(args: argparse.Namespace, device: torch.device) -> str:
    """Wrap a model and serve until experts have moved; what rank 0 has to say about it.

    Raises:
        RuntimeError: an output or a weight is not the unwrapped model's, or nothing was moved.
    """
    stand_in = args.stand_in or device.type == "cpu"
    dtype = torch.float32 if stand_in else torch.bfloat16
    # MC2's own group: no other operator may run on it, and its buffers (HCCL_BUFFSIZE) must hold
    # a batch. So it is made without pg_options; the balancer makes small groups of its own.
    group = dist.new_group(range(dist.get_world_size()))
    mc2 = MC2(group, args.experts + args.redundant, device, stand_in)
    model = Model(args, mc2).to(device, dtype)
    plain = Model(args, None)
    plain.load_state_dict(model.state_dict())
    balancer = torch_eplb.wrap(
        model,
        dispatch="external",
        num_redundant_experts=args.redundant,
        replica_choice="table",  # one gather per layer, of fixed shape; the default on NPUs
        collect_interval=args.collect,  # longer than the capture of a graph takes
        plan_interval=2,
        hccl_buffer_size=16,  # MiB: of the group that moves weights, not of MC2's
    )
    with torch.inference_mode():
        worst, steps = decode(args, balancer, plain, device, dtype)
    stats = balancer.stats()
    # Two roundings: of the output, and of what the layer before has rounded.
    require(worst < (1e-4 if dtype == torch.float32 else 5e-2), f"outputs differ by {worst:.2g}")
    require(stats.experts_moved > 0, f"no expert was moved in {steps} steps: {stats}")
    window = balancer.window_load()
    assert window is not None
    choices = args.tokens * args.top_k * args.collect * dist.get_world_size()
    require((window[0].sum(axis=1) == choices).all(), f"counted {window[0].sum(1)}, not {choices}")
    for tensor, expected in zip(balancer.unwrap().parameters(), plain.parameters(), strict=True):
        require(torch.equal(tensor.cpu().float(), expected), "a weight has changed")
    if dist.get_rank():
        return ""
    return (
        f"{steps} steps on {device.type} with {'the stand-in' if stand_in else 'torch_npu'}: "
        f"{stats.rebalances} rebalances moved {stats.experts_moved} experts\n"
        f"outputs equal the unwrapped model's, to {worst:.1g}; all weights are what they were\n"
        f"PAR of the layers, last window: {', '.join(f'{par:.2f}' for par in stats.par_measured)}"
    )


def decode(
    args: argparse.Namespace,
    balancer: torch_eplb.ExpertLoadBalancer,
    plain: Model,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[float, int]:
    """Steps until experts have moved: the greatest difference from the model, and how many.

    On an NPU they are replays of a captured graph.
    """
    x = batch(args, 0).to(device, dtype)
    run, steps, worst = captured(balancer, x) if device.type == "npu" else None, 0, 0.0
    stats = balancer.stats()
    while steps < args.most_steps and (stats.rebalances < 2 or not stats.experts_moved):
        tokens = batch(args, steps).to(dtype)
        x.copy_(tokens)
        if run is None:
            y = balancer(x)
        else:
            balancer.step()  # a replay runs no Python: the step is counted here, on every rank
            y = run()
        # With what the routers chose: in bfloat16 a near tie may be decided either way.
        chosen = [(weights.cpu(), ids.cpu()) for weights, ids in balancer.module.chosen]
        expected = plain(tokens.float(), chosen)
        worst = max(worst, (y.cpu().float() - expected).abs().max().item())
        steps, stats = steps + 1, balancer.stats()
    return worst, steps


def captured(balancer: torch_eplb.ExpertLoadBalancer, x: Tensor) -> Any:
    """A forward with the input ``x`` as a graph; call it to replay.

    While a graph is captured, no thread of the process may make a synchronous copy: no ``.item()``,
    ``.cpu()``, ``balancer.load()``, ``state_dict()`` elsewhere, and no experts on their way. So it
    is captured before the first window of load ends.
    """
    with balancer.paused():
        balancer(x)  # makes what is made at the first call
    torch.npu.synchronize()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y = balancer(x)  # no step is counted

    def replay() -> Tensor:
        graph.replay()
        return y

    return replay


# ---- the layer ----------------------------------------------------------------------------------


class MC2:
    """MC2's operators on one group, and the arguments that all of its calls share.

    Args:
        group: ranks as in the group that `torch_eplb.wrap` is given, in their order.
        num_physical: experts with replicas, R * S.
        device: of the experts.
        stand_in: do without torch_npu's operators.
    """

    def __init__(
        self, group: dist.ProcessGroup, num_physical: int, device: torch.device, stand_in: bool
    ) -> None:
        rank = dist.get_rank(group)
        self.operators: Any = StandIn(group)
        name, a2 = "stand-in", False
        if not stand_in:
            import torch_npu

            self.operators = torch_npu
            name = group._get_backend(device).get_hccl_comm_name(rank)
            a2 = "910B" in torch.npu.get_device_name()
        self.sends_weights = a2  # Atlas A2 wants the router's weights on the way there, too
        self.shared = {
            "group_ep": name,
            "ep_world_size": dist.get_world_size(group),
            "ep_rank_id": rank,
            "moe_expert_num": num_physical,
            "expert_shard_type": 0,
            "shared_expert_rank_num": 0,
            "global_bs": 0,  # all ranks have as many tokens
        }


class MC2Experts(nn.Module):
    """Gated experts whose tokens MC2 brings and takes home.

    Stacked tensors with the experts on dim 0, in ND: no `npu_format_cast` to FRACTAL_NZ, whose
    experts lie across each other and cannot be moved. Ids are physical when they arrive.
    """

    def __init__(self, num_experts: int, hidden: int, width: int, mc2: MC2) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up = nn.Parameter(torch.randn(num_experts, hidden, 2 * width) / hidden**0.5)
        self.down = nn.Parameter(torch.randn(num_experts, width, hidden) / width**0.5)
        self.mc2 = mc2
        self.expert_token_nums: Tensor | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        operators, shared = self.mc2.operators, self.mc2.shared
        physical, weights = top_k_index.int(), top_k_weights.float()
        sent = {"expert_scales": weights} if self.mc2.sends_weights else {}
        arrived, _, expand_idx, token_nums, recv_counts, _, scales = (
            operators.npu_moe_distribute_dispatch(
                hidden_states,
                physical,
                quant_mode=0,
                expert_token_nums_type=1,  # numbers, not their sums: what token_counts wants
                **sent,
                **shared,
            )
        )
        self.expert_token_nums = token_nums
        gate, up = self._product(arrived, self.gate_up, token_nums).chunk(2, dim=-1)
        out = self._product(nn.functional.silu(gate) * up, self.down, token_nums)
        # The same physical ids as on the way there: tokens return from the replicas they went to.
        return operators.npu_moe_distribute_combine(
            out,
            physical,
            expand_idx,
            recv_counts,
            weights,
            **({"expand_scales": scales} if self.mc2.sends_weights else {}),
            **shared,
        )

    def _product(self, rows: Tensor, matrices: Tensor, token_nums: Tensor) -> Tensor:
        return self.mc2.operators.npu_grouped_matmul(
            [rows],
            [matrices],
            group_list=token_nums,
            split_item=2,
            group_type=0,
            group_list_type=1,
        )[0]


torch_eplb.register_layer(MC2Experts, tensors=["gate_up", "down"], token_counts="expert_token_nums")


class PlainExperts(MC2Experts):
    """The same on one device, which nobody wraps."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        gate, up = (hidden_states[:, None, None] @ self.gate_up[top_k_index]).chunk(2, dim=-1)
        out = (nn.functional.silu(gate) * up) @ self.down[top_k_index]
        return (out.squeeze(2) * top_k_weights.unsqueeze(-1)).sum(1)


class Model(nn.Module):
    """Residual MoE layers. Without ``mc2`` it is the model that outputs are compared with.

    Attributes:
        chosen: the routers' weights and ids of the last forward; in a graph, of the last replay.
    """

    def __init__(self, args: argparse.Namespace, mc2: MC2 | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.top_k = args.top_k
        self.chosen: list[tuple[Tensor, Tensor]] = []
        kind: Any = MC2Experts if mc2 is not None else PlainExperts
        self.routers = nn.ModuleList(
            nn.Linear(args.hidden, args.experts, bias=False) for _ in range(LAYERS)
        )
        self.experts = nn.ModuleList(
            kind(args.experts, args.hidden, args.width, mc2) for _ in range(LAYERS)
        )

    def forward(self, x: Tensor, chosen: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        self.chosen = [] if chosen is None else chosen
        for number, (router, experts) in enumerate(zip(self.routers, self.experts, strict=True)):
            if chosen is None:
                self.chosen.append(router(x).float().softmax(-1).topk(self.top_k, dim=-1))
            weights, ids = self.chosen[number]
            x = x + experts(x, ids, weights)
        return x


# ---- what stands in for the operators -----------------------------------------------------------


class StandIn:
    """torch_npu's three operators in plain torch: not their speed, precision or buffers.

    The signatures are torch_npu's, as far as `MC2Experts` uses them. Shapes are fixed, as theirs
    are, so that a forward can be captured. Suffixes: T tokens, K choices of each, N = T * K,
    R ranks, S slots of a rank, C rows for each pair of ranks, A = R * C rows that may arrive,
    H hidden.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def npu_moe_distribute_dispatch(
        self,
        x_TH: Tensor,
        expert_ids_TK: Tensor,
        group_ep: str,
        ep_world_size: int,
        ep_rank_id: int,
        moe_expert_num: int,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Rows for this rank's slots, in the order of slots; how many for each; the way back."""
        slots = moe_expert_num // ep_world_size
        tokens, top_k = expert_ids_TK.shape
        each = tokens * min(slots, top_k)
        ids_N = expert_ids_TK.reshape(-1).long()
        ranks_N = ids_N // slots
        to_rank_NR = ranks_N.unsqueeze(1) == torch.arange(ep_world_size, device=x_TH.device)
        turn_N = (to_rank_NR.long().cumsum(0) - 1).gather(1, ranks_N.unsqueeze(1)).squeeze(1)
        place_N = ranks_N * each + turn_N
        sent_AH = x_TH.new_zeros(ep_world_size * each, x_TH.shape[1])
        sent_AH.index_copy_(0, place_N, x_TH.repeat_interleave(top_k, 0))
        slots_A = ids_N.new_full((ep_world_size * each,), slots)  # of no row
        slots_A.index_copy_(0, place_N, ids_N % slots)
        arrived_AH, slots_A = self._exchange(sent_AH), self._exchange(slots_A)
        slots_A, order_A = slots_A.sort(stable=True)
        numbers_S = slots_A.new_zeros(slots + 1).scatter_add_(0, slots_A, torch.ones_like(slots_A))
        return arrived_AH[order_A], None, place_N.int(), numbers_S[:slots], order_A, None, None

    def npu_moe_distribute_combine(
        self,
        expand_x_AH: Tensor,
        expert_ids_TK: Tensor,
        expand_idx_N: Tensor,
        ep_send_counts_A: Tensor,
        expert_scales_TK: Tensor,
        group_ep: str,
        ep_world_size: int,
        ep_rank_id: int,
        moe_expert_num: int,
        **_: Any,
    ) -> Tensor:
        """Results at home, weighted and summed over each token's choices."""
        back_AH = torch.zeros_like(expand_x_AH).index_copy_(0, ep_send_counts_A, expand_x_AH)
        home_AH = self._exchange(back_AH)
        chosen_TKH = home_AH[expand_idx_N.long()].unflatten(0, expert_ids_TK.shape).float()
        return (chosen_TKH * expert_scales_TK.unsqueeze(-1)).sum(1).to(expand_x_AH.dtype)

    def npu_grouped_matmul(
        self, x: list[Tensor], weight: list[Tensor], *, group_list: Tensor, **_: Any
    ) -> list[Tensor]:
        """Each group of rows by its own matrix; rows beyond the groups are nobody's."""
        rows = torch.arange(len(x[0]), device=group_list.device)
        group = torch.searchsorted(group_list.cumsum(0), rows, right=True)
        group = group.clamp(max=len(group_list) - 1)
        return [(x[0].unsqueeze(1) @ weight[0][group]).squeeze(1)]

    def _exchange(self, rows: Tensor) -> Tensor:
        received = torch.empty_like(rows)
        dist.all_to_all_single(received, rows, group=self.group)
        return received


# ---- the rest -----------------------------------------------------------------------------------


def batch(args: argparse.Namespace, step: int) -> Tensor:
    """This rank's tokens ``[T, H]``, around a centre that all ranks share and that drifts."""
    shared = torch.Generator().manual_seed(step // 40)
    own = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    centre = torch.randn(1, args.hidden, generator=shared)
    return 3 * centre + torch.randn(args.tokens, args.hidden, generator=own)


def require(holds: Any, message: str) -> None:
    if not holds:
        raise RuntimeError(f"rank {dist.get_rank()}: {message}")


def start_ranks() -> None:
    """Becomes torchrun, which starts this script once per rank."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    ranks = ["--standalone", "--nproc-per-node", str(RANKS)]
    os.execve(sys.executable, [*torchrun, *ranks, *sys.argv], environment)


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stand-in", action="store_true", help="do without MC2's operators")
    parser.add_argument("--experts", type=int, default=16, help="per layer")
    parser.add_argument("--redundant", type=int, default=4, help="redundant experts per layer")
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16, help="per rank and step")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--width", type=int, default=32, help="of an expert")
    parser.add_argument("--collect", type=int, default=16, help="steps whose load a plan is for")
    parser.add_argument("--most-steps", type=int, default=1000)
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
