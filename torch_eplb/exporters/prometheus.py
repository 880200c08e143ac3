"""Prometheus: a collector for a registry, the text format, an endpoint if one is asked for.

Needs prometheus-client (extra ``prometheus``).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch_eplb.exporters.metrics import MAX_SERIES, METRICS, PREFIX, Metric, series
from torch_eplb.exporters.snapshots import Snapshot, Source, snapshot

__all__ = ["PrometheusExporter"]


class PrometheusExporter:
    """Shows the latest snapshot of each source to whoever scrapes.

    Every series has the label ``rank`` (of the process) beside the table's and the snapshot's own.

    Args:
        registry: the registry to join; None makes one of its own. The program's is
            ``prometheus_client.REGISTRY``.
        source: a balancer to ask at every scrape, in place of `attach`; it is not kept alive.
        labels: of ``source``; see `torch_eplb.exporters.snapshot`.
        max_series: a metric with more series than this is left out; its summaries are not.

    Raises:
        ImportError: prometheus-client is missing; the message names the extra.
        ValueError: the registry has such an exporter already. One serves several balancers, told
            apart by ``labels``.
    """

    def __init__(
        self,
        registry: Any = None,
        *,
        source: Source | None = None,
        labels: dict[str, str] | None = None,
        max_series: int = MAX_SERIES,
    ) -> None:
        self._client = _import_client()
        self.registry = self._client.CollectorRegistry() if registry is None else registry
        self._max_series = max_series
        self._source = None if source is None else weakref.ref(source)
        self._labels = dict(labels or {})
        self._latest: dict[tuple[Any, ...], Snapshot] = {}
        self._server: Any = None
        self.registry.register(self)
        self._registered = True

    def export(self, snapshot: Snapshot) -> None:
        """Shows ``snapshot`` from now on."""
        # Replaced as a whole: a scrape in another thread sees the old dict or the new one.
        self._latest = {**self._latest, snapshot.key: snapshot}

    def describe(self) -> Iterator[Any]:
        """What may be collected; with it a registry refuses two of us."""
        yield from (self._family(metric, ()) for metric in METRICS)

    def collect(self) -> Iterator[Any]:
        """Called by the registry at a scrape."""
        source = None if self._source is None else self._source()
        if source is not None:
            self.export(snapshot(source, labels=self._labels))
        latest = list(self._latest.values())
        names = sorted({name for taken in latest for name in taken.labels})
        families: dict[str, Any] = {}
        for taken in latest:
            common = [str(taken.rank), *(taken.labels.get(name, "") for name in names)]
            for point in series(taken, self._max_series):
                metric = point.metric
                if metric.name not in families:
                    families[metric.name] = self._family(metric, ("rank", *names))
                families[metric.name].add_metric([*common, *point.labels], point.value)
        yield from families.values()

    def _family(self, metric: Metric, common: tuple[str, ...]) -> Any:
        core = self._client.core
        kind = core.CounterMetricFamily if metric.kind == "counter" else core.GaugeMetricFamily
        # The client appends _total to counters itself.
        name = PREFIX + metric.name.removesuffix("_total")
        return kind(name, metric.help, labels=[*common, *metric.labels])

    def text(self) -> str:
        """Everything that the registry has, in Prometheus' text format."""
        return str(self._client.generate_latest(self.registry).decode())

    def serve(self, port: int, address: str = "127.0.0.1") -> int:
        """Opens an endpoint for this registry.

        Args:
            port: 0 takes any free one. Ranks of one machine need one each.
            address: the interface; "0.0.0.0" for all of them.

        Returns:
            The port.

        Raises:
            RuntimeError: it is open already.
            OSError: the port is taken.
        """
        if self._server is not None:
            raise RuntimeError("the endpoint is open already; close() the exporter first")
        self._server = self._client.start_http_server(port, address, registry=self.registry)
        return int(self._server[0].server_port)

    def close(self) -> None:
        """Leaves the registry and closes the endpoint. Idempotent."""
        if self._server is not None:
            server, thread = self._server
            server.shutdown()
            server.server_close()
            thread.join()
            self._server = None
        if self._registered:
            self.registry.unregister(self)
            self._registered = False


def _import_client() -> Any:
    try:
        import prometheus_client
        import prometheus_client.core
    except ImportError as error:
        raise ImportError(
            f"PrometheusExporter needs prometheus-client ({error}); install it with: "
            "pip install torch-eplb[prometheus]"
        ) from None
    return prometheus_client
