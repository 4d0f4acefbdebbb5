"""The Prometheus exporter: `/metrics` over HTTP, and a collector for a registry of prometheus_client.

Needs the extra ``prometheus``.
"""

from __future__ import annotations

import gzip
import socket
import socketserver
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import Metric
from prometheus_client.exposition import ThreadingWSGIServer, choose_encoder, gzip_accepted
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.samples import BucketSpan, NativeHistogram

from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.export.families import FAMILIES, Durations, Family, FamilyKind, Samples, values
from agentperf_redis.export.histograms import BOUNDS, cumulative, spans_and_deltas
from agentperf_redis.export.reading import Reading, read
from agentperf_redis.export.text import Form, text
from agentperf_redis.metrics.histogram import SCALE

_PLAIN_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_GZIP_LEVEL = 1
"""The fastest level. Level 9, the default, takes 7 times as long and makes the text only a fifth smaller."""
_CLIENT_TIMEOUT_S = 30.0
"""How long a client may take to send its request or to read the answer."""


class Collector:
    """The metrics of a namespace, for a registry of prometheus_client: ``REGISTRY.register(Collector(perf))``.

    It reads the server at each scrape. Register it in only one process per namespace, because every process would
    report the same totals.

    Args:
        perf: the server and the namespace.
        native: whether histograms are native; prometheus_client can write native histograms only in OpenMetrics 2.0.
    """

    def __init__(self, perf: AgentPerf, *, native: bool = False) -> None:
        self._perf = perf
        self._native = native

    def describe(self) -> Iterator[Metric]:
        """Yield all families, but no samples. In `register`, a registry calls this method instead of `collect`."""
        for family in FAMILIES:
            yield _metric(family, [], native=self._native)

    def collect(self) -> Iterator[Metric]:
        """Read the server, and yield all families."""
        for family, samples in values(read(self._perf)):
            yield _metric(family, samples, native=self._native)


def _metric(family: Family, samples: Samples, *, native: bool) -> Metric:
    name, meaning, labels = family.name, family.meaning, family.labels
    if family.kind is not FamilyKind.HISTOGRAM:
        kind = CounterMetricFamily if family.kind is FamilyKind.COUNTER else GaugeMetricFamily
        plain = kind(name, meaning, labels=labels, unit=family.unit)
        for own, value in samples:
            if not isinstance(value, Durations):
                plain.add_metric(own, value)
        return plain
    histogram = HistogramMetricFamily(name, meaning, labels=labels, unit=family.unit)
    for own, value in samples:
        if isinstance(value, Durations) and native:
            histogram.add_sample(name, dict(zip(labels, own, strict=True)), 0.0, native_histogram=_native(value))
        elif isinstance(value, Durations):
            counts = cumulative(value.buckets, value.zeros)
            bounds = [*map(str, BOUNDS), "+Inf"]
            histogram.add_metric(own, list(zip(bounds, counts, strict=True)), value.sum_us / 1e6)
    return histogram


def _native(durations: Durations) -> NativeHistogram:
    spans, deltas = spans_and_deltas(durations.buckets)
    return NativeHistogram(
        count_value=durations.count,
        sum_value=durations.sum_us / 1e6,
        schema=SCALE,
        zero_threshold=0.0,
        zero_count=durations.zeros,
        pos_spans=[BucketSpan(*span) for span in spans],
        pos_deltas=deltas,
    )


def negotiated(accept: str) -> tuple[Form, str]:
    """Choose the format by the Accept header of a scraper.

    Returns:
        The format and its Content-Type. Native histograms need OpenMetrics 2.0 or newer.
    """
    try:
        encoder, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # the client sent a version that is no number
        return Form.PLAIN, _PLAIN_TYPE
    if not content_type.startswith("application/openmetrics-text"):
        return Form.PLAIN, content_type
    version: str = getattr(encoder, "keywords", {}).get("version", "1.0.0")
    return (Form.OPENMETRICS if version.split(".", maxsplit=1)[0] == "1" else Form.NATIVE), content_type


class Exporter:
    """A WSGI application with one page, `/metrics`.

    While the server is unreachable, the page contains ``agentperf_up 0`` and no metrics of agents, caches and pools. So
    Prometheus can distinguish an unreachable server from an absent exporter, and no counter moves backwards.

    Args:
        perf: the server and the namespace.
        on_read: is called with each reading.
    """

    def __init__(self, perf: AgentPerf, on_read: Callable[[Reading], object] = lambda _: None) -> None:
        self._perf = perf
        self._on_read = on_read

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
        """Answer a request."""
        status, headers, body = self.answer(
            environ["REQUEST_METHOD"],
            environ.get("PATH_INFO", ""),
            environ.get("HTTP_ACCEPT", ""),
            environ.get("HTTP_ACCEPT_ENCODING", ""),
        )
        headers.append(("Content-Length", str(len(body))))
        start_response(f"{status.value} {status.phrase}", headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def answer(
        self, method: str, path: str, accept: str = "", accept_encoding: str = ""
    ) -> tuple[HTTPStatus, list[tuple[str, str]], bytes]:
        """Return status, headers and body for a request."""
        plain = [("Content-Type", "text/plain; charset=utf-8")]
        if method not in ("GET", "HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED, [*plain, ("Allow", "GET, HEAD")], b"use GET\n"
        if path == "/":
            page = b'<!doctype html><title>agentperf exporter</title><a href="/metrics">/metrics</a>\n'
            return HTTPStatus.OK, [("Content-Type", "text/html; charset=utf-8")], page
        if path != "/metrics":
            return HTTPStatus.NOT_FOUND, plain, b"the metrics are at /metrics\n"
        form, content_type = negotiated(accept)
        reading = read(self._perf)
        self._on_read(reading)
        body = text(values(reading), form).encode()
        headers = [("Content-Type", content_type), ("Vary", "Accept, Accept-Encoding")]
        if gzip_accepted(accept_encoding):
            body = gzip.compress(body, compresslevel=_GZIP_LEVEL)
            headers.append(("Content-Encoding", "gzip"))
        return HTTPStatus.OK, headers, body


class _Handler(WSGIRequestHandler):
    timeout = _CLIENT_TIMEOUT_S

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the name in the standard library
        """Log no requests."""


class _Server(ThreadingWSGIServer):
    def server_bind(self) -> None:
        """Bind without the reverse DNS query of `HTTPServer.server_bind`, which may take seconds without a network."""
        socketserver.TCPServer.server_bind(self)
        host, self.server_port = self.server_address[:2]
        self.server_name = str(host)
        self.setup_environ()


def listening(exporter: Exporter, host: str, port: int) -> WSGIServer:
    """Bind the exporter to an address. `serve_forever` of the result answers requests, each on a thread.

    Raises:
        OSError: if the address cannot be bound.
    """
    family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    server = type("_ServerOfFamily", (_Server,), {"address_family": family})
    return make_server(host, port, exporter, server, _Handler)
