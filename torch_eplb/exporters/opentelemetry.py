"""OpenTelemetry: observable instruments over the table of metrics.

Needs the API, opentelemetry-api (extra ``opentelemetry``); where metrics go is decided by the
program's SDK and meter provider. Without an SDK nothing is collected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch_eplb.exporters.metrics import MAX_SERIES, METRICS, PREFIX, Metric, series
from torch_eplb.exporters.snapshots import Snapshot
from torch_eplb.version import __version__

__all__ = ["OpenTelemetryExporter"]


class OpenTelemetryExporter:
    """Offers the latest snapshot of each source to the program's meter provider.

    Instruments are named as in the table of metrics, with its units; attributes are the table's
    labels, the snapshot's, and ``rank``.

    Args:
        meter_provider: None takes the program's.
        max_series: a metric with more series than this is left out; its summaries are not.

    Raises:
        ImportError: opentelemetry-api is missing; the message names the extra.
    """

    def __init__(self, meter_provider: Any = None, *, max_series: int = MAX_SERIES) -> None:
        self._api = _import_api()
        self._max_series = max_series
        self._latest: dict[tuple[Any, ...], Snapshot] = {}
        meter = self._api.get_meter("torch_eplb", __version__, meter_provider)
        for metric in METRICS:
            create: Callable[..., Any] = (
                meter.create_observable_counter
                if metric.kind == "counter"
                else meter.create_observable_gauge
            )
            create(
                PREFIX + metric.name,
                callbacks=[partial(self._observe, metric)],
                unit=metric.unit,
                description=metric.help,
            )

    def export(self, snapshot: Snapshot) -> None:
        """Offers ``snapshot`` from now on."""
        self._latest = {**self._latest, snapshot.key: snapshot}

    def _observe(self, metric: Metric, options: Any) -> Iterable[Any]:
        for taken in self._latest.values():
            for point in series(taken, self._max_series, (metric,)):
                names = dict(zip(metric.labels, point.labels, strict=True))
                attributes = {"rank": taken.rank, **taken.labels, **names}
                yield self._api.Observation(point.value, attributes)

    def close(self) -> None:
        """Offers nothing any more; instruments stay, as OpenTelemetry cannot take them back."""
        self._latest = {}


def _import_api() -> Any:
    try:
        from opentelemetry import metrics
    except ImportError as error:
        raise ImportError(
            f"OpenTelemetryExporter needs opentelemetry-api ({error}); install it with: "
            "pip install torch-eplb[opentelemetry]"
        ) from None
    return metrics
