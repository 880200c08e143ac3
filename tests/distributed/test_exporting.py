"""A real balancer is exported while it serves; its forwards do nothing for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import QUICK, ToyModel, skewed_batch
from support.ranks import run_ranks
from support.resources import levels
from support.running import Collected

import torch_eplb
from torch_eplb import exporters


def serve(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    pytest.importorskip("prometheus_client")
    lines = exporters.JsonLinesExporter(f"{folder}/{rank}.jsonl")
    prometheus = exporters.PrometheusExporter()
    balancer = torch_eplb.wrap(ToyModel(), **QUICK)

    def waits() -> None:
        raise AssertionError("an exporter waited for the device")

    balancer.load = waits  # type: ignore[assignment]
    with torch.no_grad(), exporters.attach(balancer, lines, every=0.002):
        exporters.attach(balancer, prometheus, every=0.002)
        step = 0
        while balancer.stats().rebalances < 3:
            step += 1
            balancer(skewed_batch(16, 16, 100 * step + rank))
        stats = balancer.stats()
        balancer.close()
    lines.close()
    text = exporters.report(balancer.stats(), balancer.placement)
    return {
        "stats": stats,
        "placement": balancer.placement.experts,
        "report": text,
        "prometheus": prometheus.text(),
    }


def test_what_is_exported_is_what_the_balancer_says(tmp_path: Path) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    for rank, result in enumerate(run_ranks(serve, 2, str(tmp_path))):
        shots = exporters.read_snapshots(tmp_path / f"{rank}.jsonl")
        last, stats = shots[-1], result["stats"]
        assert {taken.rank for taken in shots} == {rank}
        assert last.stats["stage"] == "closed"
        assert last.stats["experts_moved"] == stats.experts_moved > 0
        assert last.stats["par_measured"] == stats.par_measured
        assert last.placement is not None
        assert (last.placement == result["placement"]).all()
        moved = [taken.stats["experts_moved"] for taken in shots]
        assert moved == sorted(moved)
        versions = [taken.stats["placement_version"] for taken in shots]
        assert versions == sorted(versions)
        families = {f.name: f for f in text_string_to_metric_families(result["prometheus"])}
        sample = families["torch_eplb_experts_moved"].samples[0]
        assert sample.labels == {"rank": str(rank)}
        assert f"step {stats.step:,}: closed" in result["report"]
    page = tmp_path / "page.html"
    from torch_eplb.offline.cli import main

    files = [str(tmp_path / f"{rank}.jsonl") for rank in range(2)]
    assert main(["report", *files, "--out", str(page)]) == 0


def leave(rank: int, world_size: int) -> list[dict[str, int]]:
    seen = []
    for _ in range(4):
        balancer = torch_eplb.wrap(ToyModel(), **QUICK)
        attachment = exporters.attach(balancer, Collected(), every=0.002)
        with torch.no_grad():
            for step in range(12):
                balancer(skewed_batch(8, 16, step))
        balancer.close()
        attachment._thread.join(30)
        assert attachment.closed
        del balancer, attachment
        seen.append(levels())
    return seen


def test_nothing_is_left_of_an_attachment_when_the_balancer_is_closed() -> None:
    for seen in run_ranks(leave, 2):
        for what in ("threads", "file descriptors", "child processes"):
            assert seen[-1][what] <= seen[1][what], what
