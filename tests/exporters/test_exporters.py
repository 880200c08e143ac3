"""Each exporter, read back by the program that it is for."""

from __future__ import annotations

import io
import json
import math
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.running import LOAD, RANK_LOAD, Fresh, Running

from torch_eplb.exporters import (
    JsonLinesExporter,
    OpenTelemetryExporter,
    PrometheusExporter,
    TensorBoardExporter,
    read_snapshots,
    series,
    snapshot,
)
from torch_eplb.exporters.heat import heat, png, relative
from torch_eplb.exporters.metrics import METRICS
from torch_eplb.exporters.snapshots import Snapshot

prometheus = pytest.importorskip("prometheus_client")


def taken(source: Any = None, **more: Any) -> Snapshot:
    return snapshot(source or Running(), rank=1, **more)


# ---- Prometheus -------------------------------------------------------------------------------


def parsed(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    from prometheus_client.parser import text_string_to_metric_families

    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_reads_every_series_back() -> None:
    exporter = PrometheusExporter()
    exporter.export(taken())
    found = parsed(exporter.text())
    expected = {}
    for point in series(taken()):
        labels = dict(zip(point.metric.labels, point.labels, strict=True), rank="1")
        expected["torch_eplb_" + point.metric.name, tuple(sorted(labels.items()))] = point.value
    assert found == expected
    exporter.close()


def test_prometheus_knows_kinds_and_help() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    exporter = PrometheusExporter()
    exporter.export(taken())
    families = {f.name: f for f in text_string_to_metric_families(exporter.text())}
    for metric in METRICS:
        name = "torch_eplb_" + metric.name.removesuffix("_total")
        if name in families:
            assert families[name].type == metric.kind
            assert families[name].documentation == metric.help


def test_the_open_metrics_format_is_valid_too() -> None:
    from prometheus_client.openmetrics.exposition import generate_latest
    from prometheus_client.openmetrics.parser import text_string_to_metric_families

    exporter = PrometheusExporter()
    exporter.export(taken())
    text = generate_latest(exporter.registry).decode()
    names = {family.name for family in text_string_to_metric_families(text)}
    assert "torch_eplb_steps" in names


def test_a_registry_takes_one_exporter_which_serves_several_balancers() -> None:
    registry = prometheus.CollectorRegistry()
    exporter = PrometheusExporter(registry)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        PrometheusExporter(registry)
    exporter.export(taken(labels={"model": "large"}))
    exporter.export(taken(Running(step=5), labels={"model": "draft"}))
    exporter.export(taken(Running(step=6), labels={"model": "draft"}))
    found = parsed(prometheus.generate_latest(registry).decode())
    steps = {k[1]: v for k, v in found.items() if k[0] == "torch_eplb_steps_total"}
    assert steps == {
        (("model", "large"), ("rank", "1")): 1234,
        (("model", "draft"), ("rank", "1")): 6,
    }
    exporter.close()
    exporter.close()
    assert prometheus.generate_latest(registry) == b""
    PrometheusExporter(registry).close()


def test_a_source_is_asked_at_every_scrape_and_not_kept_alive() -> None:
    source = Running()
    exporter = PrometheusExporter(source=source)
    assert "torch_eplb_steps_total" in exporter.text()
    source.change(step=4321)
    assert ("torch_eplb_steps_total", (("rank", "0"),)) in parsed(exporter.text())
    assert parsed(exporter.text())["torch_eplb_steps_total", (("rank", "0"),)] == 4321
    import weakref

    alive = weakref.ref(source)
    del source
    assert alive() is None
    assert "4321" in exporter.text()


def test_an_endpoint_is_opened_only_when_asked_and_is_gone_after_close() -> None:
    exporter = PrometheusExporter()
    assert exporter._server is None
    port = exporter.serve(0)
    with pytest.raises(RuntimeError, match="open already"):
        exporter.serve(0)
    exporter.export(taken())
    url = f"http://127.0.0.1:{port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as response:
        assert "torch_eplb_par_measured_ratio" in response.read().decode()
    exporter.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=10)


def test_before_any_snapshot_a_scrape_is_empty() -> None:
    assert PrometheusExporter().text() == ""


# ---- OpenTelemetry ----------------------------------------------------------------------------


def test_opentelemetrys_sdk_reads_every_series_back() -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()
    exporter = OpenTelemetryExporter(MeterProvider([reader]))
    exporter.export(taken(labels={"model": "large"}))
    data = reader.get_metrics_data()
    found = {}
    for metric in data.resource_metrics[0].scope_metrics[0].metrics:
        for point in metric.data.data_points:
            found[metric.name, frozenset(point.attributes.items())] = (point.value, metric.unit)
    expected = {}
    for point in series(taken()):
        labels = dict(zip(point.metric.labels, point.labels, strict=True), rank=1, model="large")
        key = "torch_eplb_" + point.metric.name, frozenset(labels.items())
        expected[key] = (point.value, point.metric.unit)
    assert found == expected
    exporter.close()
    assert reader.get_metrics_data() is None


# ---- TensorBoard ------------------------------------------------------------------------------


def test_tensorboard_reads_scalars_distributions_and_pictures_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    source = Running()
    exporter = TensorBoardExporter(tmp_path)
    exporter.export(taken(source))
    source.change(step=1300, par_measured=[1.1, 1.1, 1.1])
    exporter.export(taken(source))  # the same window: no second picture
    source.window = (LOAD[::-1], RANK_LOAD)
    source.change(step=1400)
    exporter.export(taken(source))
    exporter.close()

    events = EventAccumulator(
        str(tmp_path), size_guidance={"images": 0, "scalars": 0, "histograms": 0}
    )
    events.Reload()
    steps = [(e.step, e.value) for e in events.Scalars("eplb/par_measured_mean_ratio")]
    assert steps == [(1234, 1.25), (1300, pytest.approx(1.1)), (1400, pytest.approx(1.1))]
    assert [e.value for e in events.Scalars("eplb/received_bytes_total")] == [2.0**21] * 3
    histogram = events.Histograms("eplb/par_measured_ratio")[0].histogram_value
    assert (histogram.num, histogram.max) == (3, 1.5)
    pictures = events.Images("eplb/load")
    assert [picture.step for picture in pictures] == [1234, 1400]
    assert pictures[0].encoded_image_string.startswith(b"\x89PNG")
    assert (pictures[0].height, pictures[0].width) == (180, 480)
    assert [p.step for p in events.Images("eplb/rank_load")] == [1234]


def test_tensorboard_leaves_a_writer_that_is_not_its_own_open(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        exporter = TensorBoardExporter(writer)
        exporter.export(taken(Fresh(), labels={"model": "large"}))
        exporter.close()
        writer.add_scalar("mine", 1.0, 1)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"mine", "eplb/large/steps_total"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == []


# ---- heat maps --------------------------------------------------------------------------------


def test_heat_maps_are_pictures_with_the_mean_in_white() -> None:
    from PIL import Image

    values = relative(np.array([[1, 1, 1, 1], [0, 1, 3, 4], [0, 0, 0, 0]]))
    colours = heat(values, most=2)
    assert colours[0].tolist() == [[247, 247, 247]] * 4
    assert colours[1, 0].tolist() == [33, 102, 172]
    assert colours[1, 3].tolist() == [178, 24, 43]
    assert colours[2].tolist() == [[247, 247, 247]] * 4
    image = Image.open(io.BytesIO(png(colours)))
    assert np.array_equal(np.asarray(image), colours)


# ---- JSON lines -------------------------------------------------------------------------------


def assert_same(found: Snapshot, expected: Snapshot) -> None:
    for name in ("par_measured", "par_predicted"):
        assert np.array_equal(found.stats[name], expected.stats[name], equal_nan=True)
    rest = [{k: v for k, v in s.stats.items() if "par" not in k} for s in (found, expected)]
    assert rest[0] == rest[1]
    assert (found.time, found.rank, found.labels) == (
        expected.time,
        expected.rank,
        expected.labels,
    )  # fmt: skip
    for name in ("placement", "load", "rank_load"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None)
        assert a is None or np.array_equal(a, b)


def test_json_lines_are_read_back_and_repeat_no_large_array(tmp_path: Path) -> None:
    path, source = tmp_path / "stats.jsonl", Running()
    shots = [taken(Fresh()), taken(source)]
    shots.append(taken(source))
    source.window = (LOAD * 2, RANK_LOAD)
    shots.append(taken(source))
    exporter = JsonLinesExporter(path)
    for shot in shots:
        exporter.export(shot)
    exporter.close()
    exporter.close()
    with pytest.raises(ValueError, match="the exporter is closed"):
        exporter.export(shots[0])
    for found, expected in zip(read_snapshots(path), shots, strict=True):
        assert_same(found, expected)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [sorted({"load", "rank_load", "placement"} & set(line)) for line in lines] == [
        ["placement"],
        ["load", "rank_load"],
        [],
        ["load"],
    ]
    assert lines[0]["stats"]["par_measured"] == [None] * 3
    assert math.isnan(read_snapshots(path)[0].stats["par_measured"][0])


def test_several_balancers_can_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    draft = Running()
    draft.window = (LOAD + 5, RANK_LOAD + 5)
    shots = [taken(labels={"model": "large"}), taken(draft, labels={"model": "draft"})] * 2
    exporter = JsonLinesExporter(path)
    for shot in shots:
        exporter.export(shot)
    exporter.close()
    for found, expected in zip(read_snapshots(path), shots, strict=True):
        assert_same(found, expected)
    assert ["load" in json.loads(line) for line in path.read_text().splitlines()] == [
        True, True, False, False,
    ]  # fmt: skip


def test_a_file_is_continued_and_every_run_stands_for_itself(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    for _ in range(2):
        exporter = JsonLinesExporter(path)
        exporter.export(taken())
        exporter.close()
    assert ["load" in json.loads(line) for line in path.read_text().splitlines()] == [True, True]


def test_a_bound_on_size_starts_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    exporter = JsonLinesExporter(path, max_bytes=3000)
    for step in range(20):
        exporter.export(taken(Running(step=step)))
    exporter.close()
    assert path.stat().st_size <= 3000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stats.jsonl", "stats.jsonl.1"]
    last = read_snapshots(path)
    assert last[-1].stats["step"] == 19
    assert last[0].load is not None
    with pytest.raises(ValueError, match="max_bytes must be at least 1, got 0"):
        JsonLinesExporter(path, max_bytes=0)


def test_a_line_that_is_being_written_is_left_for_later(tmp_path: Path) -> None:
    from torch_eplb.exporters.jsonl import SnapshotLines

    path = tmp_path / "stats.jsonl"
    exporter = JsonLinesExporter(path)
    exporter.export(taken())
    lines = SnapshotLines(path)
    assert len(list(lines.read())) == 1
    with open(path, "ab") as file:
        file.write(b'{"torch_eplb": 1, ')
    assert list(lines.read()) == []
    path.write_bytes(path.read_bytes().rpartition(b"\n")[0] + b"\n")
    exporter.export(taken(Running(step=99)))
    assert [shot.stats["step"] for shot in lines.read()] == [99]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no snapshot; name a file that torch_eplb.exporters.JsonLinesExporter wrote"),
        ("hello\n", "holds a line that is no snapshot"),
        ('{"torch_eplb": 2}\n', "version 2"),
        ('{"step": 1}\n', "no 'torch_eplb'"),
        ('{"torch_eplb": 1, "time": 0, "rank": 0}\n', "no 'stats'"),
        ('{"torch_eplb": 1, "time": 0, "rank": 0, "stats": {"step": 1}}\n', "no 'stage'"),
        ('{"torch_eplb": 1, "rank": 0, "load": [[1, -1]]}\n', "an array is int64 of the shape"),
        ("[" * 100000 + "\n", "holds a line that is no snapshot"),
    ],
)
def test_what_is_no_file_of_snapshots_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "stats.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_snapshots(path)
    assert "stats.jsonl" in str(error.value)


# ---- what is missing --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "build", "extra"),
    [
        ("prometheus_client", lambda: PrometheusExporter(), "prometheus"),
        ("opentelemetry", lambda: OpenTelemetryExporter(), "opentelemetry"),
        ("tensorboard", lambda: TensorBoardExporter("x"), "tensorboard"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, build: Any, extra: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [n for n in sys.modules if n == module or n.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install torch-eplb\[{extra}\]"):
        build()
