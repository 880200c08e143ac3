"""Expert maps: round trips, and errors that name the file, the layer and the rank."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_eplb.files.expert_map import read_expert_map, write_expert_map
from torch_eplb.values.placement import Placement

PLACEMENT = Placement(np.array([[[0, 1], [2, 0]], [[2, 1], [0, 1]]]), 3)
MODEL: dict[str, int] = {"num_layers": 2, "num_experts": 3, "num_ranks": 2}


def document() -> Any:
    """PLACEMENT, as vLLM-Ascend would write it."""
    return {
        "moe_layer_count": 2,
        "layer_list": [
            {
                "layer_id": layer,
                "device_count": 2,
                "device_list": [
                    {"device_id": rank, "device_expert": PLACEMENT.experts[layer, rank].tolist()}
                    for rank in range(2)
                ],
            }
            for layer in range(2)
        ],
    }


def test_a_map_in_vllm_ascends_layout_is_read(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps(document(), indent=4))
    assert read_expert_map(path, **MODEL) == PLACEMENT
    assert read_expert_map(path, num_slots=2, **MODEL) == PLACEMENT


def test_layers_and_ranks_may_be_listed_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    shuffled = document()
    shuffled["layer_list"].reverse()
    shuffled["layer_list"][0]["device_list"].reverse()
    path.write_text(json.dumps(shuffled))
    assert read_expert_map(path, **MODEL) == PLACEMENT


def test_what_is_written_is_vllm_ascends_layout(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    write_expert_map(path, PLACEMENT)
    assert json.loads(path.read_text()) == document()
    assert os.listdir(tmp_path) == ["map.json"]


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 5), st.integers(0, 9)
)
def test_any_placement_survives_the_round_trip(
    tmp_path_factory: Any, layers: int, ranks: int, per_rank: int, extra: int, seed: int
) -> None:
    experts = ranks * per_rank
    slots = per_rank + min(extra, experts - per_rank)
    rng = np.random.default_rng(seed)
    table = Placement.initial(layers, experts, ranks, slots).experts
    placement = Placement(rng.permutation(experts).astype(np.int32)[table], experts)
    path = tmp_path_factory.mktemp("map") / "map.json"
    ids = [3 * layer + 1 for layer in range(layers)]
    for layer_ids in (None, ids):
        write_expert_map(path, placement, layer_ids)
        again = read_expert_map(
            path, num_layers=layers, num_experts=experts, num_ranks=ranks, layer_ids=layer_ids
        )
        assert again == placement


def test_a_model_with_dense_layers_keeps_its_layer_ids(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    write_expert_map(path, PLACEMENT, layer_ids=[3, 4])
    assert [e["layer_id"] for e in json.loads(path.read_text())["layer_list"]] == [3, 4]
    assert read_expert_map(path, **MODEL) == PLACEMENT
    with pytest.raises(ValueError, match="layer 2 is missing"):
        read_expert_map(path, layer_ids=[2, 4], **MODEL)
    with pytest.raises(ValueError, match="layer_ids"):
        write_expert_map(path, PLACEMENT, layer_ids=[4, 3])


def edit(change: str) -> Any:
    """A document after one edit, written as Python on ``d`` (document) and ``l`` (its layers)."""
    d = copy.deepcopy(document())
    exec(change, {"d": d, "l": d["layer_list"]})
    return d


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("del l[1]; d['moe_layer_count'] = 1", "layer 1 is missing: the map has 1 layers"),
        ("l.append({**l[1], 'layer_id': 7})", "layer 7 is unknown"),
        ("l[1]['layer_id'] = 0", "layer 0: is listed twice"),
        ("d['moe_layer_count'] = 5", "moe_layer_count is 5, but layer_list has 2"),
        ("d['moe_layer_count'] = 2**60", "moe_layer_count is"),
        ("del d['layer_list']", "the file: layer_list must be a list, got None"),
        ("l[0] = 4", "entry 0 of layer_list: layer_id must be a whole number"),
        ("l[1]['layer_id'] = True", "entry 1 of layer_list: layer_id must be a whole number"),
        ("l[1]['device_count'] = 3", "layer 1: device_count is 3, but device_list has 2"),
        ("l[1]['device_count'] = None", "layer 1: device_count must be a whole number, got None"),
        ("l[1]['device_list'] = {}", "layer 1: device_list must be a list"),
        ("del l[1]['device_list'][0]; l[1]['device_count'] = 1", "layer 1, rank 0: is missing"),
        ("l[1]['device_list'][0]['device_id'] = 1", "layer 1, rank 1: is listed twice"),
        ("l[1]['device_list'][0]['device_id'] = 9", "layer 1, rank 9: the group has 2 ranks"),
        ("l[1]['device_list'][1] = []", "layer 1, entry 1 of device_list: device_id must be"),
        ("l[0]['device_list'][1]['device_expert'][0] = 3", "layer 0, rank 1: 3 is not one of"),
        ("l[0]['device_list'][1]['device_expert'][0] = -1", "layer 0, rank 1: -1 is not one of"),
        ("l[0]['device_list'][1]['device_expert'][0] = 1.0", "layer 0, rank 1: 1.0 is not one of"),
        ("l[0]['device_list'][1]['device_expert'][0] = [[]]", "layer 0, rank 1: a list is not"),
        ("l[0]['device_list'][1]['device_expert'][0] = 'x' * 999", "layer 0, rank 1: 'xxx"),
        (
            "l[0]['device_list'][0]['device_expert'] = [1, 1]",
            "layer 0, rank 0: expert 1 is listed twice",
        ),
        (
            "l[0]['device_list'][1]['device_expert'] = [1, 0]",
            "layer 0: expert 2 is on none of the ranks 0..1",
        ),
        (
            "l[1]['device_list'][1]['device_expert'].append(2)",
            "layer 1, rank 1: 3 experts, where the first rank has 2",
        ),
        ("l[1]['device_list'][1]['device_expert'] = []", "layer 1, rank 1: 0 experts"),
    ],
)
def test_a_malformed_map_is_refused_with_path_layer_and_rank(
    tmp_path: Path, change: str, message: str
) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps(edit(change)))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_expert_map(path, **MODEL)
    assert str(caught.value).startswith(str(path))


def test_a_map_for_another_redundancy_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    write_expert_map(path, PLACEMENT)
    with pytest.raises(ValueError, match="layer 0, rank 0: 2 experts, expected 3"):
        read_expert_map(path, num_slots=3, **MODEL)


@pytest.mark.parametrize(
    "text", ["", "{", "\xff\xfe", "[" * 200_000, '{"moe_layer_count": ' + "9" * 5000 + "}", "NaN x"]
)
def test_what_is_not_json_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "map.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"map\.json: is not JSON"):
        read_expert_map(path, **MODEL)


@pytest.mark.parametrize("text", ["3", "null", "[]", '"x"'])
def test_json_that_is_no_map_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "map.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"map\.json: the file: layer_list must be a list"):
        read_expert_map(path, **MODEL)


def test_a_directory_a_missing_file_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        read_expert_map(tmp_path, **MODEL)
    with pytest.raises(FileNotFoundError, match="none"):
        read_expert_map(tmp_path / "none", **MODEL)
    huge = tmp_path / "huge"
    with open(huge, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="huge: 1099511627776 bytes are more than"):
        read_expert_map(huge, **MODEL)


def test_an_unreadable_map_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    write_expert_map(path, PLACEMENT)
    path.chmod(0)
    root = os.geteuid() == 0
    if root:  # root may read everything, so be somebody else for a moment
        for folder in (tmp_path, *tmp_path.parents[:2]):
            folder.chmod(0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError, match="map"):
            read_expert_map(path, **MODEL)
    finally:
        if root:
            os.seteuid(0)


def test_a_failed_write_leaves_the_old_map(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "map.json"
    write_expert_map(path, PLACEMENT)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_expert_map(path, Placement.initial(2, 3, 1, 3))
    assert read_expert_map(path, **MODEL) == PLACEMENT
    assert os.listdir(tmp_path) == ["map.json"]


def test_a_link_to_a_map_stays_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("{}")
    link.symlink_to(real)
    write_expert_map(link, PLACEMENT)
    assert link.is_symlink()
    assert read_expert_map(real, **MODEL) == PLACEMENT
