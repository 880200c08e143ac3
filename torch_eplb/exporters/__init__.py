"""A running balancer's numbers, where people look at numbers:

    exporter = exporters.PrometheusExporter()          # opens no port; exporter.serve(9400) does
    exporters.attach(balancer, exporter, every="10s")  # from a thread of its own

or, without a thread, ``exporter.export(exporters.snapshot(balancer))`` whenever you like. All of
them export what is in one table, `torch_eplb.exporters.metrics.METRICS`. A snapshot reads what the
host knows anyway: it waits for no device and starts no operation on one.

Names are loaded when they are first used; each exporter needs its extra (``prometheus``,
``tensorboard``, ``opentelemetry``), JSON lines need nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_eplb.exporters.attaching import Attachment, attach
    from torch_eplb.exporters.jsonl import JsonLinesExporter, read_snapshots
    from torch_eplb.exporters.metrics import METRICS, Metric, series
    from torch_eplb.exporters.opentelemetry import OpenTelemetryExporter
    from torch_eplb.exporters.prometheus import PrometheusExporter
    from torch_eplb.exporters.snapshots import Exporter, Snapshot, Source, snapshot
    from torch_eplb.exporters.tensorboard import TensorBoardExporter
    from torch_eplb.exporters.text import report

_HOMES = {
    "METRICS": "metrics",
    "Attachment": "attaching",
    "Exporter": "snapshots",
    "JsonLinesExporter": "jsonl",
    "Metric": "metrics",
    "OpenTelemetryExporter": "opentelemetry",
    "PrometheusExporter": "prometheus",
    "Snapshot": "snapshots",
    "Source": "snapshots",
    "TensorBoardExporter": "tensorboard",
    "attach": "attaching",
    "read_snapshots": "jsonl",
    "report": "text",
    "series": "metrics",
    "snapshot": "snapshots",
}

__all__ = [
    "METRICS",
    "Attachment",
    "Exporter",
    "JsonLinesExporter",
    "Metric",
    "OpenTelemetryExporter",
    "PrometheusExporter",
    "Snapshot",
    "Source",
    "TensorBoardExporter",
    "attach",
    "read_snapshots",
    "report",
    "series",
    "snapshot",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
