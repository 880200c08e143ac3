"""The collectives of counts, and of tokens that all ranks hold; these are differentiable."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from torch_eplb.comm.communicator import Communicator, all_gather_single
from torch_eplb.comm.numbered import Numbered
from torch_eplb.layers.parcel import Parcel

__all__ = [
    "all_gather_counts",
    "exchange_counts",
    "gather_tokens",
    "register",
    "scatter_sums",
    "share_input",
    "sum_output",
]


def exchange_counts(counts_RS: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """Row ``r`` goes to rank ``r``; the answer's row ``r`` came from rank ``r``."""
    one = [1] * comm.num_ranks
    return comm.all_to_all(counts_RS, one, one)


def all_gather_counts(counts_E: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """``[E]`` of every rank as ``[R, E]``."""
    return _gather_rows(counts_E, comm).view(comm.num_ranks, -1)


def _gather_rows(rows: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """Equally many rows of every rank, one rank's after the other's."""
    comm.check_process()
    gathered = rows.new_empty((comm.num_ranks * len(rows), *rows.shape[1:]))
    work = all_gather_single(gathered, rows.contiguous(), group=comm.group, async_op=True)
    comm.wait_in_line(work)
    return gathered


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


# ---- tokens of all ranks ------------------------------------------------------------------------


def gather_tokens(
    hidden_PH: torch.Tensor,
    weights_PK: torch.Tensor,
    integers_PI: torch.Tensor,
    comm: Communicator,
    number: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Equally many rows of every rank, ``[R * P, ...]`` each, in one message.

    ``number`` is the group's, for graphs. Collective; differentiable in hidden states and weights,
    whose gradients are summed over ranks.
    """
    if torch.compiler.is_compiling():
        return _gather_op(hidden_PH, weights_PK, integers_PI, number, comm.num_ranks)
    return _GatherTokens.apply(hidden_PH, weights_PK, integers_PI, comm)


def scatter_sums(partial: torch.Tensor, comm: Communicator, number: int) -> torch.Tensor:
    """Every rank's rows of ``[R * P, ...]``, summed over ranks: ``[P, ...]``.

    ``number`` is the group's. Collective; differentiable. Sums are made here, in at least float32
    and in the order of ranks.
    """
    if torch.compiler.is_compiling():
        return _scatter_op(partial, number, comm.num_ranks)
    return _ScatterSums.apply(partial, comm)


def _gather(
    hidden: torch.Tensor, weights: torch.Tensor, integers: torch.Tensor, comm: Communicator
) -> list[torch.Tensor]:
    parcel = Parcel.of(hidden, weights, integers=integers.shape[1])
    gathered = _gather_rows(parcel.pack(hidden, weights, integers), comm)
    return [field.contiguous() for field in parcel.open(gathered)]


def _scatter(rows: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """Rows ``[R * P, ...]`` of the others' tokens to them, and theirs of ours: ``[R, P, ...]``."""
    sizes = [len(rows) // comm.num_ranks] * comm.num_ranks
    return comm.all_to_all(rows, sizes, sizes).unflatten(0, (comm.num_ranks, -1))


def _summed(rows: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.sum(0, dtype=wide).to(rows.dtype)


def _scatter_gradients(
    hidden: torch.Tensor, weights: torch.Tensor, comm: Communicator
) -> tuple[torch.Tensor, torch.Tensor]:
    parcel = Parcel.of(hidden, weights)
    received = _scatter(parcel.pack(hidden, weights), comm)
    fields = parcel.open(received.flatten(0, 1))[:2]
    summed = [_summed(field.unflatten(0, received.shape[:2])) for field in fields]
    return summed[0], summed[1]


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        integers: torch.Tensor,
        comm: Communicator,
    ) -> tuple[torch.Tensor, ...]:
        ctx.comm = comm
        gathered = _gather(hidden, weights, integers, comm)
        ctx.mark_non_differentiable(gathered[2])
        return tuple(gathered)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, hidden: torch.Tensor, weights: torch.Tensor, _: Any
    ) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        return *_scatter_gradients(hidden, weights, ctx.comm), None, None


class _ScatterSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: torch.Tensor, comm: Communicator) -> torch.Tensor:
        ctx.comm = comm
        return _summed(_scatter(partial, comm))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _gather_rows(grad, ctx.comm), None


# The same as operations of compiled graphs, which find the group by a number.

_comms: Numbered[Communicator] = Numbered()


def register(comm: Communicator) -> int:
    """A number for `gather_tokens` and `scatter_sums`."""
    return _comms.add(comm)


def _of(number: int) -> Communicator:
    comm = _comms.get(number)
    assert comm is not None  # a hook that runs holds it
    return comm


@torch.library.custom_op("torch_eplb::gather_tokens", mutates_args=())
def _gather_op(
    hidden: torch.Tensor, weights: torch.Tensor, integers: torch.Tensor, number: int, ranks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    first, second, third = _gather(hidden, weights, integers, _of(number))
    return first, second, third


@_gather_op.register_fake
def _(
    hidden: torch.Tensor, weights: torch.Tensor, integers: torch.Tensor, number: int, ranks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        hidden.new_empty((ranks * hidden.shape[0], *hidden.shape[1:])),
        weights.new_empty((ranks * weights.shape[0], *weights.shape[1:])),
        integers.new_empty((ranks * integers.shape[0], *integers.shape[1:])),
    )


@torch.library.custom_op("torch_eplb::scatter_gradients", mutates_args=())
def _scatter_gradients_op(
    hidden: torch.Tensor, weights: torch.Tensor, number: int, ranks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _scatter_gradients(hidden, weights, _of(number))


@_scatter_gradients_op.register_fake
def _(
    hidden: torch.Tensor, weights: torch.Tensor, number: int, ranks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        hidden.new_empty((hidden.shape[0] // ranks, *hidden.shape[1:])),
        weights.new_empty((weights.shape[0] // ranks, *weights.shape[1:])),
    )


@torch.library.custom_op("torch_eplb::scatter_sums", mutates_args=())
def _scatter_op(partial: torch.Tensor, number: int, ranks: int) -> torch.Tensor:
    return _summed(_scatter(partial, _of(number)))


@_scatter_op.register_fake
def _(partial: torch.Tensor, number: int, ranks: int) -> torch.Tensor:
    return partial.new_empty((partial.shape[0] // ranks, *partial.shape[1:]))


@torch.library.custom_op("torch_eplb::gather_rows", mutates_args=())
def _gather_rows_op(rows: torch.Tensor, number: int, ranks: int) -> torch.Tensor:
    return _gather_rows(rows, _of(number))


@_gather_rows_op.register_fake
def _(rows: torch.Tensor, number: int, ranks: int) -> torch.Tensor:
    return rows.new_empty((ranks * rows.shape[0], *rows.shape[1:]))


def _keep_group(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *_, ctx.number, ctx.ranks = inputs


def _gather_backward(
    ctx: Any, hidden: torch.Tensor, weights: torch.Tensor, _: Any
) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
    return *_scatter_gradients_op(hidden, weights, ctx.number, ctx.ranks), None, None, None


def _scatter_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return _gather_rows_op(grad, ctx.number, ctx.ranks), None, None


_gather_op.register_autograd(_gather_backward, setup_context=_keep_group)
_scatter_op.register_autograd(_scatter_backward, setup_context=_keep_group)
