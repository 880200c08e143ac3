"""One row per token and rank, on the host and as a device computes it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_eplb.routing import arrivals, departures, meet


class Elsewhere(torch.Tensor):
    """Not to be read by numpy, as tensors on a device are not."""


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    ranks, slots = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    tokens, top_k = draw(st.integers(0, 6)), draw(st.integers(1, 4))
    ids = st.lists(st.integers(0, ranks * slots), min_size=top_k, max_size=top_k)
    chosen = draw(st.lists(ids, min_size=tokens, max_size=tokens))
    return torch.tensor(chosen, dtype=torch.int64).view(tokens, top_k), ranks, slots


@given(batches())
def test_every_choice_travels_in_one_row_and_arrives_in_its_slot(
    batch: tuple[torch.Tensor, int, int],
) -> None:
    physical, ranks, slots = batch
    met = meet(physical, ranks, slots)
    expected = [
        (rank, token)
        for rank in range(ranks)
        for token, ids in enumerate(physical.tolist())
        if rank in {i // slots for i in ids}
    ]
    assert met.nonzero().tolist() == [list(pair) for pair in expected]
    sent = departures(physical, met, len(expected), slots)
    assert sent.tokens_Q.tolist() == [token for _, token in expected]
    for token, ids in enumerate(physical.tolist()):
        begin, end = sent.begin_T[token : token + 2].tolist()
        own = sent.by_token_Q[begin:end].tolist()
        assert [expected[row] for row in own] == [p for p in expected if p[1] == token]
        for choice, i in enumerate(ids):
            row = int(sent.row_TK[token, choice])
            if i == ranks * slots:
                assert row == len(expected)
            else:
                assert expected[row] == (i // slots, token)
                assert sent.slots_QK[row, choice] == i % slots
    came = arrivals(sent.slots_QK, slots)
    assert len(came.flat_C) == (physical < ranks * slots).sum()
    assert came.slots_C.tolist() == sorted(came.slots_C.tolist())
    assert torch.equal(sent.slots_QK.reshape(-1).long()[came.flat_C], came.slots_C)
    for row in range(len(expected)):
        begin, end = came.begin_Q[row : row + 2].tolist()
        own = came.flat_C[came.by_row_C[begin:end]].tolist()
        top_k = physical.shape[1]
        mine = [k for k in range(top_k) if sent.slots_QK[row, k] < slots]
        assert own == [row * top_k + k for k in mine]


def room_for_more(met: torch.Tensor, seed: int) -> torch.Tensor:
    more = torch.randint(0, 4, (len(met),), generator=torch.Generator().manual_seed(seed))
    return met.sum(1) + (more if met.shape[1] else 0)


@given(batches(), st.integers(0, 9))
def test_rows_that_carry_nothing_stand_behind_those_of_their_rank(
    batch: tuple[torch.Tensor, int, int], seed: int
) -> None:
    physical, ranks, slots = batch
    met = meet(physical, ranks, slots)
    exact = departures(physical, met, int(met.sum()), slots)
    room = room_for_more(met, seed)
    padded = departures(physical, met, int(room.sum()), slots, room)
    carries = torch.cat(
        [torch.arange(int(most)) < used for most, used in zip(room, met.sum(1), strict=True)]
    )
    assert torch.equal(padded.tokens_Q[carries], exact.tokens_Q)
    assert torch.equal(padded.slots_QK[carries], exact.slots_QK)
    assert (padded.slots_QK[~carries] == slots).all()
    assert ((padded.tokens_Q >= 0) & (padded.tokens_Q < max(1, len(physical)))).all()
    number = torch.cat((carries.nonzero().view(-1), room.sum().view(1)))
    assert torch.equal(padded.row_TK, number[exact.row_TK])
    carried = int(padded.begin_T[-2])
    assert torch.equal(padded.by_token_Q[:carried], number[exact.by_token_Q])
    assert not carries[padded.by_token_Q[carried:]].any()
    assert torch.equal(padded.begin_T[:-1], exact.begin_T[:-1])
    assert padded.begin_T[-1] == len(carries)


@given(batches(), st.none() | st.integers(0, 9))
def test_a_device_finds_the_same_rows(
    batch: tuple[torch.Tensor, int, int], seed: int | None
) -> None:
    physical, ranks, slots = batch
    met = meet(physical, ranks, slots)
    room = None if seed is None else room_for_more(met, seed)
    num_rows = int((met if room is None else room).sum())
    sent = departures(physical, met, num_rows, slots, room)
    came = arrivals(sent.slots_QK, slots)
    elsewhere = physical.as_subclass(Elsewhere)
    met_there = meet(elsewhere, ranks, slots)
    assert torch.equal(met_there.as_subclass(torch.Tensor), met)
    sent_there = departures(elsewhere, met_there, num_rows, slots, room)
    came_there = arrivals(sent_there.slots_QK.as_subclass(Elsewhere), slots, len(came.flat_C))
    for host, device in zip((*sent, *came), (*sent_there, *came_there), strict=True):
        assert torch.equal(host, device.as_subclass(torch.Tensor))
