from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_eplb.routing import choose_locally, count_hits
from torch_eplb.routing.tables import CHOICE_LENGTH, RoutingTables, spread
from torch_eplb.values.placement import Placement
from torch_eplb.values.plan import Topology


def random_placement(seed: int, layers: int, experts: int, ranks: int, slots: int) -> Placement:
    """Random replicas on random ranks, never two of an expert on one rank."""
    rng = np.random.default_rng(seed)
    initial = Placement.initial(layers, experts, ranks, slots).experts.copy()
    for layer in initial:
        for _ in range(4 * ranks * slots):
            (r, q), (s, t) = rng.integers(ranks, size=2), rng.integers(slots, size=2)
            a, b = layer[r, s], layer[q, t]
            if r != q and a not in layer[q] and b not in layer[r]:
                layer[r, s], layer[q, t] = b, a
    return Placement(rng.permutation(experts).astype(np.int64)[initial], experts)


def make(placement: Placement, replica_choice: str = "batch", **kwargs: object) -> RoutingTables:
    arguments = {
        "device": "cpu",
        "rank": 0,
        "replica_choice": replica_choice,
        "max_replicas": min(placement.num_ranks, placement.num_redundant_experts + 1),
        "topology": Topology(placement.num_ranks),
        **kwargs,
    }
    return RoutingTables(placement, **arguments)  # type: ignore[arg-type]


def shares_of(choices: np.ndarray, num_physical: int) -> np.ndarray:
    """[experts, physical]: how often each physical expert stands in an expert's table."""
    return np.stack([np.bincount(row, minlength=num_physical) for row in choices]) / CHOICE_LENGTH


def test_slots_are_the_placements_physical_ids_ascending_and_padded() -> None:
    placement = random_placement(1, 3, 12, 4, 5)
    tables = make(placement)
    assert tables.choice_LEP is None
    for layer in range(3):
        for expert in range(12):
            row = tables.slots_LEM[layer, expert].tolist()
            slots = placement.slots_of(layer, expert)
            assert row == slots + [-1] * (len(row) - len(slots))


def test_a_source_that_balances_for_itself_prefers_its_own_replica_and_then_others_at_random() -> (
    None
):
    placement = random_placement(5, 2, 20, 8, 5)
    seen = set()
    for rank in range(8):
        tables = make(placement, "local", rank=rank)
        plain = make(placement, rank=rank).slots_LEM
        assert torch.equal(tables.slots_LEM.sort().values, plain.sort().values)
        first = tables.slots_LEM[..., 0] // 5
        for layer, expert in zip(*np.nonzero(placement.experts[:, rank] >= 0), strict=True):
            held = placement.experts[layer, rank, expert]
            assert first[layer, held] == rank
        # The solver sees the same replicas on renamed ranks, and rows that ascend.
        renamed, present = tables.solver_LEM, tables.slots_LEM >= 0
        assert torch.equal(renamed % 5, torch.where(present, tables.slots_LEM % 5, -1 % 5))
        names = torch.full((8,), -1)
        names[tables.slots_LEM[present] // 5] = renamed[present] // 5
        assert torch.equal(renamed[present] // 5, names[tables.slots_LEM[present] // 5])
        assert sorted(names.tolist()) == list(range(8))
        assert (renamed.diff(dim=-1)[present[..., 1:]] > 0).all()
        seen.add(tuple(names.tolist()))
    assert len(seen) == 8


def test_update_writes_in_place_and_only_the_layers_asked_for() -> None:
    tables = make(random_placement(1, 4, 8, 4, 3), "table")
    slots, choice = tables.slots_LEM, tables.choice_LEP
    assert choice is not None
    pointers = slots.data_ptr(), choice.data_ptr()
    before = slots.clone(), choice.clone()
    new = random_placement(2, 4, 8, 4, 3)
    tables.update(new, layers=[1, 3])
    assert tables.slots_LEM is slots
    assert tables.choice_LEP is choice
    assert (slots.data_ptr(), choice.data_ptr()) == pointers
    expected = make(new, "table")
    for old, now, fresh in (
        (before[0], slots, expected.slots_LEM),
        (before[1], choice, expected.choice_LEP),
    ):
        assert fresh is not None
        assert torch.equal(now[[0, 2]], old[[0, 2]])
        assert torch.equal(now[[1, 3]], fresh[[1, 3]])


def test_the_host_has_a_table_of_its_own_where_tokens_are_elsewhere() -> None:
    old, new = random_placement(3, 2, 8, 4, 3), random_placement(4, 2, 8, 4, 3)
    tables = make(old, device="meta")
    assert tables.host_slots_LEM.tolist() == make(old).slots_LEM.tolist()
    tables.update(new)
    assert tables.host_slots_LEM.tolist() == make(new).slots_LEM.tolist()


def test_a_slot_that_is_not_live_gets_no_tokens() -> None:
    placement = Placement(np.array([[[0, 1], [2, 0], [0, 3]]]), 4)
    live = np.ones((1, 3, 2), dtype=bool)
    live[0, 1, 1] = False
    tables = make(placement, "even")
    tables.update(placement, live=live)
    assert tables.slots_LEM[0, 0].tolist() == [0, 4, -1]
    assert tables.choice_LEP is not None
    assert set(tables.choice_LEP[0, 0].tolist()) == {0, 4}


def test_a_second_replica_on_a_rank_is_used_only_where_the_first_is_drained() -> None:
    placement = Placement(np.array([[[0, 0, 1], [0, 2, 3]]]), 4, allow_duplicates=True)
    tables = make(placement)
    assert tables.slots_LEM[0, 0].tolist() == [0, 3]
    live = np.array([[[False, True, True], [True, True, True]]])
    tables.update(placement, live=live)
    assert tables.slots_LEM[0, 0].tolist() == [1, 3]


def test_nothing_is_written_when_an_expert_would_lose_its_last_slot() -> None:
    placement = random_placement(1, 2, 8, 4, 3)
    tables = make(placement)
    before = tables.slots_LEM.clone()
    live = np.ones((2, 4, 3), dtype=bool)
    live[1][placement.experts[1] == 5] = False
    with pytest.raises(ValueError, match="layer 1: expert 5 has no live slot"):
        tables.update(placement, live=live)
    assert torch.equal(tables.slots_LEM, before)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"replica_choice": "best"}, "replica_choice"),
        ({"rank": 4}, "rank"),
        ({"max_replicas": 0}, "max_replicas"),
        ({"max_replicas": 1}, "has 2 replicas"),
        ({"topology": Topology(3)}, "topology"),
        ({"split": np.ones((1, 4, 3))}, "split must have the shape"),
        ({"split": np.full((2, 4, 3), np.nan)}, "finite"),
        ({"split": np.full((2, 4, 3), -0.5)}, "at least 0"),
    ],
)
def test_wrong_arguments_are_named(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(random_placement(1, 2, 8, 4, 3), **kwargs)


def test_a_placement_of_another_shape_is_refused() -> None:
    tables = make(random_placement(1, 2, 8, 4, 3))
    with pytest.raises(ValueError, match="tables were made for"):
        tables.update(random_placement(1, 3, 8, 4, 3))


@given(seed=st.integers(0, 1000), ranks=st.sampled_from([2, 3, 4, 8]), slots=st.integers(3, 6))
@settings(max_examples=40)
def test_choice_tables_follow_the_shares(seed: int, ranks: int, slots: int) -> None:
    experts = ranks * slots - ranks
    placement = random_placement(seed, 2, experts, ranks, slots)
    split = np.random.default_rng(seed).random((2, ranks, slots)) + 0.01
    tables = make(placement, "table", split=split)
    assert tables.choice_LEP is not None
    for layer in range(2):
        shares = shares_of(tables.choice_LEP[layer].numpy(), ranks * slots)
        flat = placement.experts[layer].reshape(-1)
        ideal = np.zeros_like(shares)
        ideal[flat, np.arange(flat.size)] = split[layer].reshape(-1)
        ideal /= ideal.sum(axis=1, keepdims=True)
        assert np.abs(shares - ideal).max() < 1 / CHOICE_LENGTH


def test_a_share_of_zero_everywhere_falls_back_to_even() -> None:
    placement = Placement(np.array([[[0, 1], [2, 0]]]), 3)
    tables = make(placement, "table", split=np.zeros((1, 2, 2)))
    assert tables.choice_LEP is not None
    assert np.bincount(tables.choice_LEP[0, 0].numpy(), minlength=4).tolist() == [60, 0, 0, 60]


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_local_preference_keeps_the_shares_over_all_ranks(nodes: int) -> None:
    ranks, slots, experts = 8, 6, 40
    placement = random_placement(3, 2, experts, ranks, slots)
    split = np.random.default_rng(3).random((2, ranks, slots)) + 0.05
    per_rank = []
    for rank in range(ranks):
        tables = make(
            placement,
            "table",
            rank=rank,
            split=split,
            topology=Topology(ranks, num_nodes=nodes),
            prefer_local=True,
        )
        assert tables.choice_LEP is not None
        per_rank.append(shares_of(tables.choice_LEP[0].numpy(), ranks * slots))
        # A source's own replica takes all it may.
        for expert in placement.experts[0, rank]:
            own = [p for p in placement.slots_of(0, expert) if p // slots == rank]
            everyone = [split[0].reshape(-1)[p] for p in placement.slots_of(0, expert)]
            share = split[0].reshape(-1)[own[0]] / sum(everyone)
            assert per_rank[-1][expert, own[0]] >= min(1.0, share * ranks) - 1 / CHOICE_LENGTH
    tables = make(placement, "table", split=split)
    assert tables.choice_LEP is not None
    plain = shares_of(tables.choice_LEP[0].numpy(), ranks * slots)
    assert np.abs(np.mean(per_rank, axis=0) - plain).max() < 2 / CHOICE_LENGTH


def test_local_preference_stays_on_the_node_before_it_leaves_it() -> None:
    # 4 ranks on 2 nodes; expert 0 on ranks 1 and 3, so rank 0 should use rank 1's replica.
    placement = Placement(np.array([[[1, 2], [0, 3], [4, 5], [0, 6]]]), 7)
    tables = make(placement, "table", topology=Topology(4, num_nodes=2), prefer_local=True)
    assert tables.choice_LEP is not None
    assert set(tables.choice_LEP[0, 0].tolist()) == {2}


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any),
    st.integers(1, 150),
)
@settings(max_examples=100)
def test_every_stretch_of_a_spread_is_near_the_shares(weights: list[int], length: int) -> None:
    shares = np.array([weights]) / sum(weights)
    sequence = spread(shares, length)[0]
    assert sequence.shape == (length,)
    for index, share in enumerate(shares[0]):
        seen = np.cumsum(sequence == index)
        assert abs(seen[-1] - share * length) < 1
        # Largest remainder moves the total by less than 1, spacing a prefix by at most M.
        assert np.abs(seen - share * np.arange(1, length + 1)).max() <= 1 + len(weights)


def test_few_tokens_meet_at_homes_that_all_ranks_know_and_that_are_level() -> None:
    placement = random_placement(6, 2, 20, 8, 5)
    homes = []
    for rank in range(8):
        tables = make(placement, "local", rank=rank, weight_tokens=50)
        assert tables.home_LEM is not None
        assert (tables.home_LEM.sum(2) == 1).all()
        homes.append(tables.slots_LEM.gather(2, tables.home_LEM.argmax(2, keepdim=True))[..., 0])
        ids = torch.arange(20).view(10, 2)
        physical = choose_locally(
            ids,
            count_hits(ids, 20),
            tables.slots_LEM[1],
            8,
            5,
            tables.solver_LEM[1],
            50,
            tables.home_LEM[1],
        )
        assert torch.equal(physical.view(-1), homes[-1][1])
    assert all(torch.equal(home, homes[0]) for home in homes)
    per_rank = torch.stack([torch.bincount(row // 5, minlength=8) for row in homes[0]])
    assert per_rank.max() == 3  # 20 experts on 8 ranks
    many = torch.zeros(40, 1, dtype=torch.int64)
    expert = int((tables.slots_LEM[0] >= 0).sum(1).argmax())
    spread_out = choose_locally(
        many + expert,
        count_hits(many + expert, 20),
        tables.slots_LEM[0],
        8,
        5,
        tables.solver_LEM[0],
        50,
        tables.home_LEM[0],
    )
    assert len(spread_out.unique()) > 1


def test_host_slots_have_no_more_columns_than_replicas() -> None:
    start, hot = (
        Placement.initial(2, 8, 4, 3),
        np.array([[0, 1, 2], [0, 3, 4], [0, 5, 6], [0, 7, 1]]),
    )
    tables = RoutingTables(
        start, device="cpu", rank=0, replica_choice="batch", max_replicas=4, topology=Topology(4)
    )
    assert tables.host_slots(1).tolist() == tables.slots_LEM[1, :, :2].tolist()
    after = Placement(np.stack([start.experts[0], hot]), 8)
    tables.update(after, layers=[1])
    for layer, used in ((0, 2), (1, 4)):
        assert tables.host_slots(layer).tolist() == tables.slots_LEM[layer, :, :used].tolist()
        assert (tables.slots_LEM[layer, :, used:] == -1).all()
    tables.update(start, layers=[1])
    assert tables.host_slots(1).shape == (8, 2)
