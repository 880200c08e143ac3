"""How the tokens of one call travel: one row for every rank that has something to do with it.

A row brings its token's hidden states, the local slots that are to compute them, and the router's
weights, all in one exchange. Where it arrives it is expanded into one row per choice, in the order
of slots; results are weighted and summed there, and one row goes back, which its token's other
rows are added to. Backward is the same the other way round.

Shape suffixes: T tokens here, K choices per token, H hidden; Q rows (sent on one side, received on
the other), C choices computed here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from torch_eplb.comm.communicator import Communicator
from torch_eplb.layers.parcel import Parcel
from torch_eplb.layers.sums import Bags, add_up, weigh_back
from torch_eplb.routing import Arrivals, Departures, arrivals

__all__ = ["Journey"]


class Journey:
    """The rows of one call. `send` comes before `bring_back`.

    Args:
        rows: what this rank sends.
        send, receive: rows sent to and received from each rank, those that carry nothing included.
        num_choices: choices that come with them, where that is known.
        num_slots: S, slots of each rank.
        comm: the group.

    Attributes:
        found: the choices that came; set by `send`.
        nbytes: bytes of the rows that this rank has sent to others.
    """

    found: Arrivals

    def __init__(
        self,
        rows: Departures,
        send: list[int],
        receive: list[int],
        num_choices: int | None,
        num_slots: int,
        comm: Communicator,
    ) -> None:
        self._rows = rows
        self._sizes = send, receive
        self._num_choices = num_choices
        self._num_slots = num_slots
        self._comm = comm
        self._home = Bags(rows.by_token_Q, rows.begin_T, rows.tokens_Q)
        self.nbytes = 0

    def send(
        self, hidden_TH: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows ``[C, H]`` of the choices that this rank computes, by slot, and their weights.

        Collective; differentiable.
        """
        return _Send.apply(hidden_TH, weights_TK, self)

    def bring_back(self, results_CH: torch.Tensor, weights_C: torch.Tensor) -> torch.Tensor:
        """``[T, H]``: every token's weighted results, from wherever they were computed.

        Collective; differentiable.
        """
        return _BringBack.apply(results_CH, weights_C, self)

    # ---- the four ways, without gradients -------------------------------------------------------

    def there(
        self, hidden_TH: torch.Tensor, weights_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parcel = Parcel.of(hidden_TH, weights_TK, integers=weights_TK.shape[1])
        buffer = parcel.empty(self._rows.tokens_Q)
        hidden_QH, weights_QK, slots_QK = parcel.open(buffer)
        torch.index_select(hidden_TH, 0, self._rows.tokens_Q, out=hidden_QH)
        weights_QK.copy_(self._by_row(weights_TK))
        slots_QK.copy_(self._rows.slots_QK)
        hidden_QH, weights_QK, slots_QK = parcel.open(self._exchange(buffer))
        self.found = found = arrivals(slots_QK, self._num_slots, self._num_choices)
        weights_C = weights_QK.reshape(-1).index_select(0, found.flat_C)
        return hidden_QH.index_select(0, found.row_C), weights_C

    def back(self, results_CH: torch.Tensor, weights_C: torch.Tensor) -> torch.Tensor:
        partial_QH = add_up(results_CH, self._bags, weights_C)
        return self._at_home(self._exchange(partial_QH, home=True))

    def there_again(self, grad_TH: torch.Tensor) -> torch.Tensor:
        """Gradients ``[C, H]`` of the weighted results."""
        rows_QH = self._exchange(grad_TH.index_select(0, self._rows.tokens_Q))
        return rows_QH.index_select(0, self.found.row_C)

    def back_again(
        self, grad_CH: torch.Tensor, grad_C: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients ``[T, H]`` of hidden states and ``[T, K]`` of weights."""
        row_TK, found = self._rows.row_TK, self.found
        num_rows, top_k = sum(self._sizes[1]), row_TK.shape[1]
        grad_QK = grad_C.new_zeros(num_rows * top_k)
        grad_QK[found.flat_C] = grad_C
        parcel = Parcel.of(grad_CH, grad_QK.view(num_rows, top_k))
        buffer = parcel.empty(grad_QK[:num_rows])
        hidden_QH, weights_QK, _ = parcel.open(buffer)
        hidden_QH.copy_(add_up(grad_CH, self._bags))
        weights_QK.copy_(grad_QK.view(num_rows, top_k))
        hidden_QH, weights_QK, _ = parcel.open(self._exchange(buffer, home=True))
        # Choices in the bin find the row of zeros behind all rows.
        padded = torch.cat((weights_QK, weights_QK.new_zeros(1, top_k)))
        return self._at_home(hidden_QH), padded.gather(0, row_TK)

    # ---- what they are made of ------------------------------------------------------------------

    @property
    def _bags(self) -> Bags:
        return Bags(self.found.by_row_C, self.found.begin_Q, self.found.row_C)

    def _at_home(self, rows_QH: torch.Tensor) -> torch.Tensor:
        """``[T, H]``: sums over each token's rows, and none of those that carried nothing."""
        return add_up(rows_QH, self._home)[:-1]

    def _by_row(self, weights_TK: torch.Tensor) -> torch.Tensor:
        """Weights ``[Q, K]`` by row, 0 for choices of other ranks."""
        row_TK = self._rows.row_TK
        num_rows = len(self._rows.tokens_Q)
        by_row = weights_TK.new_zeros((num_rows + 1, row_TK.shape[1]))
        return by_row.scatter_(0, row_TK, weights_TK)[:num_rows]

    def _exchange(self, rows: torch.Tensor, home: bool = False) -> torch.Tensor:
        send, receive = reversed(self._sizes) if home else self._sizes
        others = sum(send) - send[self._comm.rank]
        self.nbytes += others * rows.shape[1:].numel() * rows.element_size()
        return self._comm.all_to_all(rows, send, receive)

    @property
    def num_rows(self) -> int:
        """Rows that this rank sends to others, there and back."""
        return sum(sum(sizes) - sizes[self._comm.rank] for sizes in self._sizes)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: torch.Tensor, weights_TK: torch.Tensor, journey: Journey
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.journey = journey
        return journey.there(hidden_TH, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_CH: torch.Tensor, grad_C: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        return *ctx.journey.back_again(grad_CH, grad_C), None


class _BringBack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, results_CH: torch.Tensor, weights_C: torch.Tensor, journey: Journey
    ) -> torch.Tensor:
        ctx.save_for_backward(results_CH, weights_C)
        ctx.journey = journey
        return journey.back(results_CH, weights_C)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        results_CH, weights_C = ctx.saved_tensors
        return *weigh_back(ctx.journey.there_again(grad_TH), results_CH, weights_C), None
