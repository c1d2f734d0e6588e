"""The endpoint that Prometheus scrapes (package ``prometheus-client``, extra ``watch``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ullage.errors import InputError, MissingExtraError
from ullage.guard.watch.metrics import METRICS, Value
from ullage.i18n import _


def serve(values: Callable[[], list[Value]], *, port: int, address: str) -> tuple[int, Callable[[], None]]:
    """Serve ``/metrics``; return the port (0 asks for a free one) and what stops it.

    Raises:
        InputError: the port is taken or not allowed. MissingExtraError: no prometheus-client.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError:
        raise MissingExtraError("prometheus-client", "watch") from None
    registry = CollectorRegistry()
    registry.register(_Collector(values))
    try:
        server, thread = start_http_server(port, addr=address, registry=registry)
    except (OSError, OverflowError) as error:
        raise InputError(
            _("cannot listen on {address}:{port}: {why}").format(
                address=address, port=port, why=getattr(error, "strerror", None) or error
            ),
            where="--port",
        ) from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)

    return int(server.server_address[1]), stop


class _Collector:
    """Gives the values of the last samples; nothing is measured while a scrape waits."""

    def __init__(self, values: Callable[[], list[Value]]) -> None:
        self._values = values

    def describe(self) -> list[Any]:
        """Return nothing: the names are unchecked, the table is the only place that registers."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield a family per metric."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        now = self._values()
        for metric in METRICS:
            make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = make(metric.name, metric.help, labels=metric.labels)
            for found, labels, value in now:
                if found is metric:
                    family.add_metric(labels, value)
            yield family
