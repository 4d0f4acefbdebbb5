"""The OTLP exporter: sends all-time counts to an OpenTelemetry collector at an interval.

Temporality is cumulative, so a lost or repeated request does no harm, and a new exporter continues the same series. The
buckets of durations are sent unchanged, as an exponential histogram of scale 4.

Needs the extra ``otel``. The SDK's own instruments are not used, because they aggregate measurements of this process,
but the counts to send are on the server.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit, urlunsplit

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics import export as sdk
from opentelemetry.sdk.metrics.export import AggregationTemporality, MetricExportResult
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.export.families import STATUS, Durations, Family, FamilyKind, Samples, values
from agentperf_redis.export.histograms import dense
from agentperf_redis.export.otel_names import NAMES, Name
from agentperf_redis.export.reading import Reading, read
from agentperf_redis.metrics.histogram import SCALE

_PATH = "/v1/metrics"
_MAX_SEND_S = 10.0
"""How long the SDK retries a failed request. After that, the next interval sends newer counts anyway."""
_SECRETS = re.compile(r"(?<=//).*(?=@)|(?<=\?).*")
"""User, password and query in a text that may be an invalid URL."""
_UNSET_NS = 0
"""OTLP's value for an unknown start of a series."""


def endpoint(argument: str, url: str) -> str:
    """Check and return the URL of a collector. A URL without a path gets the path of OTLP over HTTP.

    Raises:
        InvalidArgument: for anything but a URL with http or https and a host.
    """
    allowed = "a URL such as http://localhost:4318"
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or a broken IPv6 address
        valid = False
    if not valid:
        raise InvalidArgument(argument, masked(url), allowed)
    return urlunsplit(parts._replace(path=_PATH)) if parts.path in ("", "/") else url


def masked(url: str) -> str:
    """Return a URL without its user, password and query, which may hold secrets."""
    return _SECRETS.sub("***", url)


def metrics_data(reading: Reading, now_ns: int) -> sdk.MetricsData:
    """Return a reading in the data model of OpenTelemetry.

    Args:
        reading: the reading.
        now_ns: time of the reading, ns since 1970.
    """
    starts = {
        agent: counters.counts["first_ms"] * 1_000_000
        for agent, counters in reading.agents.items()
        if "first_ms" in counters.counts
    }
    metrics = [
        metric
        for family, samples in values(reading)
        if samples and family not in STATUS
        for metric in _metrics(family, samples, starts, now_ns)
    ]
    resource = Resource.create({"service.name": "agentperf", "agentperf.namespace": reading.namespace})
    scope = InstrumentationScope("agentperf_redis", reading.version)
    scoped = sdk.ScopeMetrics(scope=scope, metrics=metrics, schema_url="")
    return sdk.MetricsData([sdk.ResourceMetrics(resource=resource, scope_metrics=[scoped], schema_url="")])


def _metrics(family: Family, samples: Samples, starts: dict[str, int], now_ns: int) -> Iterator[sdk.Metric]:
    """Yield one metric for each name that the table of names gives to samples of the family."""
    by_name: dict[Name, Samples] = {}
    for labels, value in samples:
        by_name.setdefault(NAMES[family].of(labels), []).append((labels, value))
    of_agents = family.labels[:1] == ("agent",)
    for name, named in by_name.items():
        points = [
            (
                name.attributes(family.labels, labels),
                starts.get(labels[0], _UNSET_NS) if of_agents else _UNSET_NS,
                value,
            )
            for labels, value in named
        ]
        yield sdk.Metric(name.name, family.meaning, name.unit, _data(family, points, now_ns))


def _data(
    family: Family, points: list[tuple[dict[str, str], int, int | float | Durations]], now_ns: int
) -> sdk.Sum | sdk.Gauge | sdk.ExponentialHistogram:
    if family.kind is FamilyKind.HISTOGRAM:
        histograms = [
            _histogram_point(attributes, start, now_ns, value)
            for attributes, start, value in points
            if isinstance(value, Durations)
        ]
        return sdk.ExponentialHistogram(histograms, AggregationTemporality.CUMULATIVE)
    numbers = [
        sdk.NumberDataPoint(attributes, start, now_ns, value)
        for attributes, start, value in points
        if not isinstance(value, Durations)
    ]
    if family.kind is FamilyKind.GAUGE:
        return sdk.Gauge(numbers)
    return sdk.Sum(numbers, AggregationTemporality.CUMULATIVE, is_monotonic=True)


def _histogram_point(
    attributes: dict[str, str], start_ns: int, now_ns: int, durations: Durations
) -> sdk.ExponentialHistogramDataPoint:
    offset, counts = dense(durations.buckets)
    return sdk.ExponentialHistogramDataPoint(
        attributes=attributes,
        start_time_unix_nano=start_ns,
        time_unix_nano=now_ns,
        count=durations.count,
        sum=durations.sum_us / 1e6,
        scale=SCALE,
        zero_count=durations.zeros,
        positive=sdk.Buckets(offset, counts),
        negative=sdk.Buckets(0, []),
        flags=0,
        min=durations.min_us / 1e6,
        max=durations.max_us / 1e6,
    )


class Pusher:
    """Sends the counts of a namespace at an interval, on a thread.

    Args:
        perf: the server and the namespace.
        url: the collector, as `endpoint` returns it. Headers, certificates and compression come from the SDK's
            variables ``OTEL_EXPORTER_OTLP_*``.
        every: seconds between two requests.
        on_read: is called with each reading.
        on_sent: is called after each request: with None, or with the error if the request failed.
    """

    def __init__(
        self,
        perf: AgentPerf,
        url: str,
        every: float,
        on_read: Callable[[Reading], object] = lambda _: None,
        on_sent: Callable[[str | None], object] = lambda _: None,
    ) -> None:
        self._perf = perf
        self._every = every
        self._on_read = on_read
        self._on_sent = on_sent
        self._where = masked(url)
        self._exporter = OTLPMetricExporter(endpoint=url, timeout=_MAX_SEND_S)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="agentperf-otlp", daemon=True)

    def start(self) -> None:
        """Start sending; the first request is sent at once."""
        self._thread.start()

    def stop(self) -> None:
        """Send no further request. A request under way ends early if the collector does not answer."""
        self._stopped.set()
        self._exporter.shutdown()
        if self._thread.ident is not None:
            self._thread.join()

    def send(self) -> bool:
        """Read the server and send the counts now. Returns whether the collector has accepted them."""
        reading = read(self._perf)
        self._on_read(reading)
        if not reading.up:
            return False
        sent = self._exporter.export(metrics_data(reading, time.time_ns())) is MetricExportResult.SUCCESS
        if not self._stopped.is_set():
            self._on_sent(None if sent else f"{self._where} did not accept the request")
        return sent

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopped.is_set():
            self.send()
            due = max(due + self._every, time.monotonic())  # a slow collector delays requests, but no requests pile up
            self._stopped.wait(due - time.monotonic())
