"""The collectives of counts, and of tokens that all ranks hold; these are differentiable."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from torch_eplb.comm.communicator import Communicator, all_gather_single

__all__ = ["all_gather_counts", "exchange_counts", "share_input", "sum_output"]


def exchange_counts(counts_RS: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """Row ``r`` goes to rank ``r``; the answer's row ``r`` came from rank ``r``."""
    one = [1] * comm.num_ranks
    return comm.all_to_all(counts_RS, one, one)


def all_gather_counts(counts_E: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """``[E]`` of every rank as ``[R, E]``."""
    comm.check_process()
    gathered = counts_E.new_empty(comm.num_ranks * counts_E.numel())
    work = all_gather_single(gathered, counts_E, group=comm.group, async_op=True)
    comm.wait_in_line(work)
    return gathered.view(comm.num_ranks, -1)


class _ShareInput(torch.autograd.Function):
    """Every rank reads the same value; its gradient is the sum over what the ranks did with it."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, comm: Communicator) -> torch.Tensor:
        ctx.comm = comm
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.comm.group)
        return grad, None


class _SumOutput(torch.autograd.Function):
    """Sum of the ranks' partial outputs; every rank goes on with the same sum."""

    @staticmethod
    def forward(ctx: Any, partial: torch.Tensor, comm: Communicator) -> torch.Tensor:
        total = partial.contiguous().clone()
        if torch.compiler.is_compiling():
            dist.all_reduce(total, group=comm.group)
        else:
            comm.check_process()
            work = dist.all_reduce(total, group=comm.group, async_op=True)
            comm.wait_in_line(work)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def share_input(value: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """Identity forwards, all-reduce backwards."""
    return _ShareInput.apply(value, comm)


def sum_output(partial: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """All-reduce forwards, identity backwards."""
    return _SumOutput.apply(partial, comm)
