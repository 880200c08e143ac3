"""One row per token and rank: which rows a batch's choices need, and which choices rows bring.

A token whose K choices fall on two ranks travels twice, not K times. Starts no communication.
Suffixes are those of `torch_eplb.routing.tables`, and Q counts rows that travel, C choices that
are computed here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torch_eplb.routing.choose import order_by_id
from torch_eplb.routing.device import count_dtype, divide, remainder, running_sum, sort_key
from torch_eplb.routing.host import on_host

__all__ = ["Arrivals", "Departures", "arrivals", "departures", "meet"]


class Departures(NamedTuple):
    """The rows that this rank sends.

    Attributes:
        tokens_Q: int64, the token of each row; rows stand by rank, then by token.
        row_TK: int64, the row that carries each choice; Q for those in the bin.
        slots_QK: int32, per row the local slots on its rank that compute it; S where a choice is
            another rank's, and in rows that carry nothing.
        by_token_Q: int64, the rows by token, then by rank; those that carry nothing are last.
        begin_T: int64 ``[T + 2]``, where each token's rows begin in ``by_token_Q``, where those
            that carry nothing begin, and Q.
    """

    tokens_Q: Tensor
    row_TK: Tensor
    slots_QK: Tensor
    by_token_Q: Tensor
    begin_T: Tensor


class Arrivals(NamedTuple):
    """The choices that rows bring, in the order in which experts compute them: by slot.

    Attributes:
        flat_C: int64, flat positions (row * K + choice) of the choices.
        row_C: int64, their rows.
        slots_C: int64, their local slots, ascending.
        by_row_C: int64, positions among these, by row, then by choice.
        begin_Q: int64 ``[Q + 1]``, where each row's choices begin in ``by_row_C``.
    """

    flat_C: Tensor
    row_C: Tensor
    slots_C: Tensor
    by_row_C: Tensor
    begin_Q: Tensor


def meet(physical_TK: Tensor, num_ranks: int, slots_per_rank: int) -> Tensor:
    """Which tokens go to which ranks.

    Args:
        physical_TK: int64 ``[tokens, top-k]``, physical ids; R * S is the bin.
        num_ranks: R.
        slots_per_rank: S.

    Returns:
        bool ``[ranks, tokens]``; its sums are the numbers of rows.

    >>> meet(torch.tensor([[0, 3], [1, 0], [2, 4]]), 2, 2).int().tolist()   # 4 is the bin
    [[1, 1, 0], [1, 0, 1]]
    """
    ranks_TK = divide(physical_TK, slots_per_rank)
    num_tokens = physical_TK.shape[0]
    if on_host(physical_TK):
        met = np.zeros((num_ranks + 1, num_tokens), dtype=np.bool_)
        met[ranks_TK.numpy(), np.arange(num_tokens)[:, None]] = True
        return torch.from_numpy(met[:num_ranks])
    met_RT = torch.zeros((num_ranks + 1, num_tokens), dtype=torch.bool, device=physical_TK.device)
    return met_RT.scatter_(0, ranks_TK.t(), True)[:num_ranks]


def departures(
    physical_TK: Tensor,
    met_RT: Tensor,
    num_rows: int,
    slots_per_rank: int,
    room_R: Tensor | None = None,
) -> Departures:
    """The rows that this rank sends.

    Args:
        physical_TK: as in `meet`.
        met_RT: from `meet`.
        num_rows: Q, the sum of ``met_RT``, or of ``room_R``.
        slots_per_rank: S.
        room_R: int64 ``[ranks]``, how many rows go to each rank, at least the sums of ``met_RT``;
            those left over carry nothing.

    >>> ids = torch.tensor([[0, 3], [1, 0], [2, 4]])
    >>> rows = departures(ids, meet(ids, 2, 2), 4, 2)
    >>> rows.tokens_Q.tolist()      # 0 and 1 to rank 0, 0 and 2 to rank 1
    [0, 1, 0, 2]
    >>> rows.row_TK.tolist()
    [[0, 2], [1, 1], [3, 4]]
    >>> rows.slots_QK.tolist()
    [[0, 2], [1, 0], [2, 1], [0, 2]]
    >>> rows = departures(ids, meet(ids, 2, 2), 6, 2, room_R=torch.tensor([3, 3]))
    >>> rows.slots_QK.tolist()
    [[0, 2], [1, 0], [2, 2], [2, 1], [0, 2], [2, 2]]
    """
    (num_tokens, top_k), device = physical_TK.shape, physical_TK.device
    turns_T = torch.arange(num_tokens, device=device)
    if on_host(physical_TK):
        place_RT, token_Q = _places_on_host(met_RT, room_R, num_rows)
    else:
        # Every row finds its place without a look at how many there are.
        place_RT = _places(met_RT, room_R, num_rows)
        token_Q = turns_T.new_full((num_rows + 1,), num_tokens)
        token_Q.scatter_(0, place_RT.view(-1), turns_T.expand_as(place_RT).reshape(-1))
        token_Q = token_Q[:num_rows]
    row = torch.cat((place_RT.view(-1), place_RT.new_full((num_tokens,), num_rows)))
    row_TK = row[divide(physical_TK, slots_per_rank) * num_tokens + turns_T.unsqueeze(1)]
    slots = torch.full((num_rows + 1, top_k), slots_per_rank, dtype=torch.int32, device=device)
    slots.scatter_(0, row_TK, remainder(physical_TK, slots_per_rank).int())
    begin_T = torch.full((num_tokens + 2,), num_rows, dtype=torch.int64, device=device)
    begin_T[:1] = 0
    running_sum(met_RT.sum(0), out=begin_T[1:-1])
    tokens_Q = token_Q if room_R is None else token_Q.clamp(max=max(num_tokens - 1, 0))
    return Departures(tokens_Q, row_TK, slots[:num_rows], order_by_id(token_Q), begin_T)


def _places(met_RT: Tensor, room_R: Tensor | None, num_rows: int) -> Tensor:
    """int64 ``[R, T]``: the row of each token to each rank; Q where none goes."""
    dtype = count_dtype(met_RT)
    place_RT = met_RT.view(-1).cumsum(0, dtype=dtype).view(met_RT.shape) - 1
    if room_R is not None:
        sent_R = met_RT.sum(1, dtype=dtype)
        left_R = room_R.to(dtype) - sent_R
        place_RT += (left_R.cumsum(0, dtype=dtype) - left_R).unsqueeze(1)
    return torch.where(met_RT, place_RT, num_rows).long()


def _places_on_host(met_RT: Tensor, room_R: Tensor | None, num_rows: int) -> tuple[Tensor, Tensor]:
    """The same, and the token of each row, T in those that carry nothing."""
    met = met_RT.numpy()
    ranks_Q, tokens_Q = np.nonzero(met)
    places = np.arange(len(tokens_Q))
    if room_R is not None:
        left_R = room_R.numpy() - np.bincount(ranks_Q, minlength=len(met))
        places += (left_R.cumsum() - left_R)[ranks_Q]
        tokens, tokens_Q = tokens_Q, np.full(num_rows, met.shape[1])
        tokens_Q[places] = tokens
    place_RT = np.full(met.shape, num_rows)
    place_RT[met] = places
    return torch.from_numpy(place_RT), torch.from_numpy(tokens_Q)


def arrivals(slots_QK: Tensor, num_slots: int, num_choices: int | None = None) -> Arrivals:
    """The choices that rows bring.

    Args:
        slots_QK: integers ``[rows, top-k]``, local slots; S where there is nothing to compute.
        num_slots: S.
        num_choices: C, where it is known; otherwise a device is waited for.

    >>> found = arrivals(torch.tensor([[1, 2], [0, 1]]), 2)     # the second choice is elsewhere
    >>> found.row_C.tolist(), found.slots_C.tolist()
    ([1, 0, 1], [0, 1, 1])
    >>> found.by_row_C.tolist(), found.begin_Q.tolist()
    ([1, 0, 2], [0, 1, 3])
    """
    num_rows, top_k = slots_QK.shape
    ids_N = slots_QK.reshape(-1).long()
    here_N = ids_N < num_slots
    begin_Q = torch.zeros(num_rows + 1, dtype=torch.int64, device=ids_N.device)
    running_sum(here_N.view(num_rows, top_k).sum(1), out=begin_Q[1:])
    if num_choices is None or on_host(ids_N):
        num_choices = int(begin_Q[-1])
    flat_C = order_by_id(ids_N)[:num_choices]
    if on_host(ids_N):
        place = np.empty(len(ids_N), dtype=np.int64)
        place[flat_C.numpy()] = np.arange(num_choices)
        by_row_C = torch.from_numpy(place[here_N.numpy()])
    else:
        by_row_C = torch.sort(sort_key(flat_C)).indices
    return Arrivals(flat_C, divide(flat_C, top_k), ids_N[flat_C], by_row_C, begin_Q)
