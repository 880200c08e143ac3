"""``convert``: files as the sources of other engines write them become ours, and back."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_eplb.files.expert_map import read_expert_map, write_expert_map
from torch_eplb.files.recorded import to_logical
from torch_eplb.files.trace import Trace, read_load, read_trace, write_trace
from torch_eplb.offline.cli import main
from torch_eplb.values.placement import Placement

LAYERS, EXPERTS, RANKS, SLOTS = 3, 8, 2, 5
PHYSICAL = RANKS * SLOTS
RNG = np.random.default_rng(0)
COUNTS = RNG.integers(1, 300, (6, LAYERS, EXPERTS)).astype(np.int32)
# Valid on every layer: no rank has an expert twice.
TABLE = np.stack([[7, 2, 0, 3, 5, 6, 1, 4, 7, 2], [0, 1, 2, 3, 4, 5, 6, 7, 0, 1],
                  [4, 5, 6, 7, 0, 1, 2, 3, 4, 5]])  # fmt: skip


def run(*arguments: object) -> None:
    assert main(["convert", *map(str, arguments)]) == 0


def load_of(path: Path) -> Any:
    return read_trace(path).load()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.npz"


# ---- SGLang -----------------------------------------------------------------------------------


def sglang_stat(path: Path, counts: Any) -> Path:
    """As `_StatAccumulator.dump` of SGLang 0.5.23 saves it."""
    output = {
        "rank": 0,
        "logical_count": torch.from_numpy(np.array(counts)),
        "average_utilization_rate_over_window": None,
    }
    torch.save(output, str(path))
    return path


def test_sglangs_statistics_become_a_trace(tmp_path: Path, out: Path, capsys: Any) -> None:
    run(sglang_stat(tmp_path / "expert_distribution_recorder_1.pt", COUNTS), "--out", out)
    assert np.array_equal(load_of(out), COUNTS)
    assert "6 steps x 1 source ranks x 3 layers x 8 experts" in capsys.readouterr().out


def test_layers_without_load_are_named_and_dropped_on_request(
    tmp_path: Path, out: Path, capsys: Any
) -> None:
    counts = COUNTS.copy()
    counts[:, 0] = 0
    dump = sglang_stat(tmp_path / "dump.pt", counts)
    run(dump, "--out", out)
    assert "layers without load (--drop-empty-layers drops them): 0" in capsys.readouterr().out
    assert load_of(out).shape == (6, 3, 8)
    run(dump, "--out", out, "--drop-empty-layers")
    assert "layers without load dropped: 0" in capsys.readouterr().out
    assert np.array_equal(load_of(out), counts[:, 1:])
    assert read_trace(out).meta["layer_ids"] == [1, 2]


def test_an_earlier_conversions_layer_numbers_are_kept(tmp_path: Path, out: Path) -> None:
    counts = COUNTS.copy()
    counts[:, 0] = 0
    run(sglang_stat(tmp_path / "dump.pt", counts), "--out", out, "--drop-empty-layers")
    table = tmp_path / "load.csv"
    run(out, "--out", table)
    assert [line.split(",")[0] for line in table.read_text().splitlines()] == ["layer", "1", "2"]


def test_sglangs_records_of_all_ranks_are_summed_by_forward_pass(tmp_path: Path, out: Path) -> None:
    """As `_DetailAccumulator.dump` of SGLang 0.5.23 saves them, one file per rank."""
    physical = RNG.integers(0, 50, (RANKS, 4, LAYERS, PHYSICAL)).astype(np.int32)
    files = []
    for rank in range(RANKS):
        records = [
            {
                "forward_pass_id": 10 + number,
                "rank": rank,
                "gatherer_key": "primary",
                "input_ids": [1, 2, 3],
                "global_physical_count": torch.from_numpy(physical[rank, number]),
            }
            for number in (2, 0, 1, 3)
        ]
        files.append(tmp_path / f"expert_distribution_recorder_1_{rank}.pt")
        mapping = torch.from_numpy(TABLE)
        torch.save({"records": records, "last_physical_to_logical_map": mapping}, files[-1])
    run(*files, "--out", out)
    # What their reader does: the sum over ranks, scattered by the map.
    expected = torch.zeros(4, LAYERS, EXPERTS, dtype=torch.int64)
    index = torch.from_numpy(TABLE)[None].expand(4, -1, -1)
    expected.scatter_add_(2, index, torch.from_numpy(physical.sum(axis=0)).long())
    assert np.array_equal(load_of(out), expected.numpy())
    assert main(["convert", str(files[0]), str(files[0]), "--out", str(out)]) == 2


def test_a_trace_becomes_what_sglang_starts_from(tmp_path: Path, out: Path) -> None:
    write_trace(out, Trace(COUNTS[:, None]))
    for name in ("init.pt", "init.json"):
        run(out, "--to", "sglang", "--out", tmp_path / name)
    # As `compute_initial_expert_location_metadata` of SGLang 0.5.23 reads them.
    loaded = torch.load(tmp_path / "init.pt", weights_only=True, map_location="cpu")
    assert np.array_equal(loaded["logical_count"].numpy(), COUNTS)
    text = json.loads((tmp_path / "init.json").read_text())
    assert np.array_equal(np.array(text["logical_count"]), COUNTS)


def test_a_map_for_sglang_has_a_row_for_every_layer_and_comes_back(tmp_path: Path) -> None:
    ours, theirs, back = tmp_path / "m.json", tmp_path / "init.json", tmp_path / "back.json"
    placement = Placement(TABLE.reshape(LAYERS, RANKS, SLOTS), EXPERTS)
    write_expert_map(ours, placement, [1, 2, 4])
    run(ours, "--to", "sglang", "--layers", 5, "--out", theirs)
    rows = np.array(json.loads(theirs.read_text())["physical_to_logical_map"])
    assert np.array_equal(rows[[1, 2, 4]], TABLE)
    assert np.array_equal(rows[[0, 3]], np.tile(np.arange(PHYSICAL) % EXPERTS, (2, 1)))
    run(theirs, "--ranks", RANKS, "--first-layer", 1, "--out", back)
    assert [e["layer_id"] for e in json.loads(back.read_text())["layer_list"]] == [1, 2, 3, 4]
    sizes = {"num_experts": EXPERTS, "num_ranks": RANKS, "num_slots": SLOTS}
    read = read_expert_map(back, num_layers=4, **sizes)
    assert np.array_equal(read.experts.reshape(4, -1), rows[1:])


# ---- vLLM -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pt", "npz"])
def test_vllms_window_is_read_with_its_map(tmp_path: Path, out: Path, suffix: str) -> None:
    window = RNG.integers(0, 90, (5, LAYERS, PHYSICAL)).astype(np.float32)
    state = {"expert_load_window": window, "physical_to_logical_map": TABLE}
    path = tmp_path / f"state.{suffix}"
    if suffix == "pt":
        torch.save({name: torch.from_numpy(array) for name, array in state.items()}, path)
    else:
        np.savez(path, **state)
    run(path, "--out", out)
    expected = np.zeros((5, LAYERS, EXPERTS))
    for layer, row in enumerate(TABLE):
        for slot, expert in enumerate(row):
            expected[:, layer, expert] += window[:, layer, slot]
    assert np.array_equal(load_of(out), expected)


def test_a_slot_that_an_elastic_group_has_not_filled_counts_for_nobody(
    tmp_path: Path, out: Path
) -> None:
    table = np.array([[0, 1, 2, -1]])
    window = np.array([[[3, 4, 5, 99]]])
    np.savez(tmp_path / "s.npz", expert_load_window=window, physical_to_logical_map=table)
    run(tmp_path / "s.npz", "--out", out)
    assert load_of(out).tolist() == [[[3, 4, 5]]]


def test_the_json_lines_of_vllms_pull_request_41141(tmp_path: Path, out: Path) -> None:
    lines = [
        {"record_type": "eplb_load_meta", "version": 1, "num_layers": 2},
        *(
            {
                "record_type": "eplb_load_stats",
                "version": 1,
                "step": step,
                "num_ranks": 2,
                "expert_load": [[10, 1, 5, 2], [2, 8, 1, step]],
                "p2l_map": [[0, 1, 2, 0], [2, 1, 0, 1]],
            }
            for step in (7, 8)
        ),
    ]
    path = tmp_path / "stats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(path, "--out", out)
    assert load_of(out).tolist() == [[[12, 1, 5], [1, 15, 2]], [[12, 1, 5], [1, 16, 2]]]


def test_a_map_becomes_vllms_initial_mapping_and_comes_back(tmp_path: Path) -> None:
    ours, theirs, back = tmp_path / "m.json", tmp_path / "m.jsonl", tmp_path / "back.json"
    write_expert_map(ours, Placement(TABLE.reshape(LAYERS, RANKS, SLOTS), EXPERTS), [3, 4, 5])
    run(ours, "--out", theirs)
    record = json.loads(theirs.read_text())
    assert record["record_type"] == "eplb_initial_mapping"
    assert (record["num_slots"], record["num_redundant_experts"]) == (PHYSICAL, 2)
    assert record["initial_global_assignments"]["0"] == TABLE[0].tolist()
    run(theirs, "--ranks", RANKS, "--out", back)
    sizes = {"num_experts": EXPERTS, "num_ranks": RANKS}
    read = read_expert_map(back, num_layers=LAYERS, **sizes)
    assert np.array_equal(read.experts.reshape(LAYERS, -1), TABLE)


# ---- vLLM-Ascend, MindSpeed-RL ----------------------------------------------------------------


def test_maps_as_people_write_them_become_strict_ones(tmp_path: Path) -> None:
    def layer(number: int) -> dict[str, Any]:
        ranks = TABLE.reshape(LAYERS, RANKS, SLOTS)[0]
        devices = [{"device_id": str(r), "device_expert": ranks[r].tolist()} for r in (1, 0)]
        return {"layer_id": str(number), "device_list": devices}

    path, back = tmp_path / "loose.json", tmp_path / "strict.json"
    path.write_text(json.dumps({"layer_list": [layer(4), layer(3)]}))
    run(path, "--out", back)
    sizes = {"num_experts": EXPERTS, "num_ranks": RANKS, "num_slots": SLOTS}
    read = read_expert_map(back, num_layers=2, layer_ids=[3, 4], **sizes)
    assert np.array_equal(read.experts.reshape(2, -1), TABLE[[0, 0]])


def test_vllm_ascends_table_of_slots_becomes_a_map(tmp_path: Path) -> None:
    """``global_expert_map`` [layers, ranks, experts]: the slot of an expert on a rank, or -1."""
    table = np.full((LAYERS, RANKS, EXPERTS), -1)
    for layer, ranks in enumerate(TABLE.reshape(LAYERS, RANKS, SLOTS)):
        for rank, experts in enumerate(ranks):
            table[layer, rank, experts] = np.arange(SLOTS)
    torch.save(torch.from_numpy(table), tmp_path / "expert_map.pth")
    run(tmp_path / "expert_map.pth", "--out", tmp_path / "m.json")
    sizes = {"num_experts": EXPERTS, "num_ranks": RANKS}
    read = read_expert_map(tmp_path / "m.json", num_layers=LAYERS, **sizes)
    assert np.array_equal(read.experts.reshape(LAYERS, -1), TABLE)


def test_loads_by_slot_are_read_under_the_map_they_were_counted_under(
    tmp_path: Path, out: Path
) -> None:
    """vLLM-Ascend's moe_load is [layers, ranks, slots], or [stages, layers, ranks, slots]."""
    write_expert_map(tmp_path / "m.json", Placement(TABLE.reshape(LAYERS, RANKS, SLOTS), EXPERTS))
    by_slot = RNG.integers(0, 50, (4, LAYERS, RANKS, SLOTS))
    expected = to_logical(by_slot.reshape(4, LAYERS, -1), TABLE)
    for array, steps in ((by_slot, 4), (by_slot[0], 1)):
        np.save(tmp_path / "moe_load.npy", array)
        options = ["--as", "physical-load", "--map", tmp_path / "m.json"]
        run(tmp_path / "moe_load.npy", *options, "--out", out)
        assert np.array_equal(load_of(out), expected[:steps])


def test_mindspeeds_counts_keep_their_source_ranks(tmp_path: Path, out: Path) -> None:
    files = []
    for rank in range(2):
        files.append(tmp_path / f"eplb_token_collects_{rank}.json")
        files[-1].write_text(json.dumps({"0": {"0": 12, "1": 256}, "2": {"1": rank, "3": 7}}))
    run(*files, "--experts", 5, "--out", out)
    trace = read_trace(out)
    assert trace.counts.tolist() == [
        [[[12, 256, 0, 0, 0], [0, 0, 0, 7, 0]], [[12, 256, 0, 0, 0], [0, 1, 0, 7, 0]]]
    ]
    assert trace.meta["layer_ids"] == [0, 2]


# ---- tables -----------------------------------------------------------------------------------

WEIGHT = [[90, 132, 40, 61], [20, 107, 104, 64]]  # the load of DeepSeek EPLB's README, in part


@pytest.mark.parametrize(
    "text",
    [
        "90,132,40,61\n20,107,104,64\n",
        "# recorded in May\n90;132;40;61\n\n20;107;104;64\n",
        "e0,e1,e2,e3\n90,132,40,61\n20,107,104,64\n",
        "90 132  40 61\n20 107 104 64\n",
        "90.0,132.0,40.0,61.0\n20.0,107.0,104.0,64.0\n",
        "layer,expert,tokens\n"
        + "".join(f"{i},{j},{n}\n" for i, row in enumerate(WEIGHT) for j, n in enumerate(row)),
    ],
)
def test_csv_tables_of_load(tmp_path: Path, out: Path, text: str) -> None:
    path = tmp_path / "load.csv"
    path.write_text(text)
    run(path, "--out", out)
    assert load_of(out).tolist() == [WEIGHT]


@pytest.mark.parametrize("suffix", ["npy", "npz", "pt", "json"])
def test_plain_arrays_of_load(tmp_path: Path, out: Path, suffix: str) -> None:
    path = tmp_path / f"load.{suffix}"
    array = np.array(WEIGHT, np.float32)
    writers = {
        "npy": lambda: np.save(path, array),
        "npz": lambda: np.savez(path, weight=array),
        "pt": lambda: torch.save(torch.from_numpy(array), path),
        "json": lambda: path.write_text(json.dumps(WEIGHT)),
    }
    writers[suffix]()
    run(path, "--out", out)
    assert load_of(out).tolist() == [WEIGHT]


def test_fractions_are_scaled_on_request(tmp_path: Path, out: Path) -> None:
    np.save(tmp_path / "share.npy", np.array([[0.25, 0.75], [0.5, 0.5]]))
    run(tmp_path / "share.npy", "--scale", 1000, "--out", out)
    assert load_of(out).tolist() == [[[250, 750], [500, 500]]]


def test_files_of_one_recording_follow_one_another(tmp_path: Path, out: Path) -> None:
    parts = [sglang_stat(tmp_path / f"{i}.pt", COUNTS[3 * i : 3 * i + 3]) for i in range(2)]
    run(*parts, "--out", out)
    assert np.array_equal(load_of(out), COUNTS)


@pytest.mark.parametrize("suffix", ["npy", "csv"])
def test_deepseeks_tables_are_written_and_come_back(tmp_path: Path, out: Path, suffix: str) -> None:
    write_trace(out, Trace(COUNTS[:, None]))
    table, back = tmp_path / f"load.{suffix}", tmp_path / "back.npz"
    run(out, "--out", table)
    run(table, "--out", back)
    assert np.array_equal(load_of(back)[0], COUNTS.sum(axis=0))

    write_expert_map(tmp_path / "m.json", Placement(TABLE.reshape(LAYERS, RANKS, SLOTS), EXPERTS))
    flat, again = tmp_path / f"phy2log.{suffix}", tmp_path / "again.json"
    run(tmp_path / "m.json", "--out", flat)
    run(flat, "--as", "map", "--ranks", RANKS, "--out", again)
    sizes = {"num_experts": EXPERTS, "num_ranks": RANKS}
    read = read_expert_map(again, num_layers=LAYERS, **sizes)
    assert np.array_equal(read.experts.reshape(LAYERS, -1), TABLE)


# ---- wrong files ------------------------------------------------------------------------------


def bad_files(folder: Path) -> dict[str, Any]:
    files: dict[str, Any] = {
        "empty.csv": "",
        "words.csv": "1,2\n3,four\n",
        "ragged.csv": "1,2\n3\n",
        "twice.csv": "layer,expert,tokens\n0,0,1\n0,0,2\n",
        "half.json": '{"logical_count": [[1, 2]',
        "ragged.json": json.dumps({"logical_count": [[1, 2], [3]]}),
        "else.json": json.dumps({"weights": 1}),
        "scalar.json": '{"logical_count": 5}',
        "negative.json": "[[1, -2, 3], [4, 5, 6]]",
        "fraction.json": "[[1.5, 2]]",
        "zeros.json": "[[0, 0]]",
        "huge.json": "[[1e300, 2]]",
        "lines.jsonl": '{"record_type": "eplb_load_meta"}\n{"record_type": "x"}\n',
        "half.jsonl": '{"record_type": "eplb_load_stats"}\n{"record',
        "lacks.jsonl": '{"record_type": "eplb_load_stats"}\n',
        "binary": b"\x00\x01\x02",
        "header.npy": b"\x93NUMPY\x01\x00\x76\x00{'descr': '<i8', 'shape': (9999999, 9)}",
        "map.json": json.dumps({"layer_list": [{"layer_id": 0}]}),
        "no_expert_3.json": json.dumps({"physical_to_logical_map": [[0, 1, 2, 4]]}),
    }
    for name, content in files.items():
        mode = "wb" if isinstance(content, bytes) else "w"
        with open(folder / name, mode) as file:
            file.write(content)
    np.savez(folder / "objects.npz", load=np.array([[1, 2], None], dtype=object))
    np.savez(folder / "two.npz", a=np.ones((2, 2)), b=np.ones((2, 2)))
    np.save(folder / "line.npy", np.arange(5))
    np.save(folder / "nan.npy", np.array([[1.0, np.nan]]))
    (folder / "pickle.pt").write_bytes(pickle.dumps(subprocess.Popen))
    torch.save({"logical_count": torch.zeros(1, 1).expand(2**20, 2**20)}, folder / "claims.pt")
    torch.save({"records": [{"rank": 0}], "last_physical_to_logical_map": [[0, 1]]},
               folder / "records.pt")  # fmt: skip
    return files


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty.csv", "is empty; JSON, JSON lines, csv, npy, npz and pt"),
        ("words.csv", "row 2 of the table has 'four', which is no number"),
        ("ragged.csv", "rows have 1 to 2 columns"),
        ("twice.csv", "layer 0, expert 0 is listed twice"),
        ("half.json", "is not JSON"),
        ("ragged.json", "logical_count is object of the shape []; it must be numbers"),
        ("else.json", "has weights; expected one of: a trace"),
        ("scalar.json", "it must be numbers in 2 or 3 dimensions"),
        ("negative.json", "token counts from 0 to 2**53, got -2"),
        ("fraction.json", "whole tokens, got 1.5; --scale multiplies and rounds"),
        ("zeros.json", "no layer of it has any load"),
        ("huge.json", "token counts from 0 to 2**53, got 1e+300"),
        ("lines.jsonl", "records of the types ['eplb_load_meta', 'x']"),
        ("half.jsonl", "line 2 is not JSON"),
        ("lacks.jsonl", "an eplb_load_stats record lacks expert_load"),
        ("binary", "neither text nor a known binary format"),
        ("header.npy", "is not a readable npy file"),
        ("map.json", "is not an expert map (no 'device_list')"),
        ("no_expert_3.json", "layer 0: expert 3 has no slot on any rank"),
        ("objects.npz", "array 'load' is object"),
        ("two.npz", "has a, b; expected one of"),
        ("line.npy", "it must be numbers in 2 or 3 or 4 dimensions"),
        ("nan.npy", "holds values that are not finite"),
        ("pickle.pt", "nothing else is unpickled"),
        ("claims.pt", "takes more than the 4294967296 bytes allowed"),
        ("records.pt", "records[0] lacks forward_pass_id"),
        ("missing.pt", "No such file"),
        (".", "is a directory"),
    ],
)
def test_wrong_files_are_refused_with_what_was_expected(
    tmp_path: Path, out: Path, capsys: Any, name: str, message: str
) -> None:
    bad_files(tmp_path)
    options = ["--drop-empty-layers"] if name.startswith("zeros") else ["--ranks", "1"]
    out = out.with_suffix(".json") if "expert" in name else out
    assert main(["convert", str(tmp_path / name), *options, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert name in error or name == "."
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{load}", "--to", "vllm", "--out", "{x}.jsonl"], "--to vllm does not take; it takes a"),
        (["{load}", "--to", "sglang", "--out", "{x}.bin"], "SGLang reads files named .pt or .json"),
        (
            ["{load}", "--out", "{x}.json"],
            "does not say which format to write; end it in .npz, .pt",
        ),
        (["{map}", "--out", "{x}.txt"], ".npy, .csv, .json, or pass --to"),
        (["{load}", "--out", "{x}/y.npz"], "create it first"),
        (
            ["{load}", "--as", "physical-load", "--out", "{x}.npz"],
            "needs the map that it was counted",
        ),
        (
            ["{load}", "--as", "physical-load", "--map", "{map}", "--out", "{x}.npz"],
            "it must end in [layers, slots] = [3, 10]",
        ),
        (
            ["{load}", "--map", "{trace}", "--out", "{x}.npz"],
            "holds a load; --map takes an expert map",
        ),
        (["{load}", "--first-layer", "9", "--out", "{x}.npz"], "no layer is left"),
        (["{load}", "--first-layer", "-1", "--out", "{x}.npz"], "first_layer must not be negative"),
        (["{load}", "--scale", "0", "--out", "{x}.npz"], "scale must be a finite number above 0"),
        (["{load}", "{map}", "--out", "{x}.npz"], "maps are converted one at a time"),
        (["{load}", "{other}", "--out", "{x}.npz"], "files of one recording have the same"),
        (["{map}", "--to", "trace", "--out", "{x}"], "it takes a load"),
        (
            ["{map}", "--scale", "2", "--out", "{x}.json"],
            "--drop-empty-layers and --scale are for load",
        ),
        (["{flat}", "--as", "map", "--out", "{x}.json"], "pass --ranks"),
        (["{flat}", "--as", "map", "--ranks", "4", "--out", "{x}.json"], "do not divide evenly"),
        (["{flat}", "--as", "map", "--ranks", "3", "--out", "{x}.json"], "replicas belong on"),
        (["{map}", "--experts", "7", "--out", "{x}.json"], "expert 7 is not one of the 7 experts"),
        (["{late}", "--to", "sglang", "--out", "{x}.json"], "pass their number, dense ones inclu"),
        (["{late}", "--to", "sglang", "--layers", "4", "--out", "{x}.json"], "the model 4 layers"),
    ],
)
def test_wrong_uses_are_one_line(
    tmp_path: Path, capsys: Any, options: list[str], message: str
) -> None:
    files = ("x", "load", "map", "flat", "other", "late", "trace")
    names = {name: str(tmp_path / name) for name in files}
    write_trace(names["trace"], Trace(COUNTS[:, None]))
    np.save(names["load"] + ".npy", COUNTS[0])
    np.save(names["other"] + ".npy", COUNTS[0, :2])
    np.save(names["flat"] + ".npy", np.array([[0, 0, 1, 2, 3, 1]]))
    for name in ("load", "other", "flat"):
        names[name] += ".npy"
    placement = Placement(TABLE.reshape(LAYERS, RANKS, SLOTS), EXPERTS)
    write_expert_map(names["map"], placement)
    write_expert_map(names["late"], placement, [3, 4, 5])
    status = main(["convert", *(option.format(**names) for option in options)])
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["dump.pt", "load.npy", "load.csv", "window.npz", "float.npz"])
def test_plan_names_convert_for_the_files_of_others(tmp_path: Path, capsys: Any, name: str) -> None:
    path = tmp_path / name
    sglang_stat(tmp_path / "dump.pt", COUNTS)
    np.save(tmp_path / "load.npy", COUNTS)
    np.savez(tmp_path / "float.npz", load=COUNTS.astype(np.float32))
    np.savez(tmp_path / "window.npz", logical_count=COUNTS)
    (tmp_path / "load.csv").write_text("1,2\n3,4\n")
    assert main(["plan", str(path), "--ranks", "2", "--out", str(tmp_path / "m.json")]) == 2
    assert "python -m torch_eplb convert" in capsys.readouterr().err
    run(path, "--out", tmp_path / "trace.npz")
    assert read_load(tmp_path / "trace.npz").shape[-1] in (2, EXPERTS)


def test_the_expert_map_reader_names_convert_for_the_maps_of_others(tmp_path: Path) -> None:
    path = tmp_path / "init.json"
    sizes = {"num_layers": 1, "num_experts": 2, "num_ranks": 1}
    for text in ('{"physical_to_logical_map": [[0, 1]]}', "[[0, 1]]", "PK"):
        path.write_text(text)
        with pytest.raises(ValueError, match="python -m torch_eplb convert"):
            read_expert_map(path, **sizes)


def test_converting_needs_torch_for_pt_files_only(tmp_path: Path) -> None:
    (tmp_path / "load.csv").write_text("1,2\n3,4\n")
    code = (
        "import sys; from torch_eplb.offline.cli import main; "
        "assert main(['convert', 'load.csv', '--out', 'x.npz']) == 0; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)


def test_a_pt_file_cannot_run_code(tmp_path: Path, out: Path, capsys: Any) -> None:
    marker = tmp_path / "ran"

    class Attack:
        def __reduce__(self) -> Any:
            return (open, (str(marker), "w"))

    torch.save({"logical_count": Attack()}, tmp_path / "attack.pt")
    assert main(["convert", str(tmp_path / "attack.pt"), "--out", str(out)]) == 2
    assert "nothing else is unpickled" in capsys.readouterr().err
    assert not marker.exists()


@settings(max_examples=150)
@given(st.binary(max_size=300), st.sampled_from(["", "PK\x03\x04", "{", "[", "\x93NUMPY\x01\x00"]))
def test_arbitrary_bytes_are_refused_in_one_line(data: bytes, start: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any"
        path.write_bytes(start.encode("latin-1") + data)
        # A table of digits may well be a load; all else is an error, never an exception.
        assert main(["convert", str(path), "--out", f"{folder}/x.npz"]) in (0, 2)


@settings(max_examples=60)
@given(st.binary(min_size=1, max_size=4), st.integers(0, 10_000), st.booleans())
def test_damaged_dumps_are_refused(patch: bytes, at: int, cut: bool) -> None:
    import tempfile

    buffer = io.BytesIO()
    torch.save({"logical_count": torch.ones(2, 3, 4, dtype=torch.int32)}, buffer)
    data = bytearray(buffer.getvalue())
    at %= len(data)
    data[at : at + len(patch)] = patch
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dump.pt"
        path.write_bytes(data[: at + 1] if cut else data)
        assert main(["convert", str(path), "--out", f"{folder}/x.npz"]) in (0, 2)


def test_a_zip_of_something_else_is_refused(tmp_path: Path, out: Path, capsys: Any) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert main(["convert", str(tmp_path / "a.zip"), "--out", str(out)]) == 2
    assert "a.zip" in capsys.readouterr().err
