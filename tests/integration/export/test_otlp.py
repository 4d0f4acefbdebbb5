"""Tests of OTLP requests: a receiver parses the protobuf and finds the same figures as the API returns."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from agentperf_redis import AgentPerf
from tests.support.proxy import Proxy
from tests.support.servers import wait_until

otlp = pytest.importorskip("agentperf_redis.export.otlp", reason="needs the extra otel", exc_type=ModuleNotFoundError)
service = pytest.importorskip("opentelemetry.proto.collector.metrics.v1.metrics_service_pb2")
pytestmark = pytest.mark.thorough  # the extra `otel` installs large packages


class Collector:
    """A receiver of OTLP over HTTP.

    Attributes:
        requests: the parsed requests.
        status: the HTTP status of the receiver's answers.
    """

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.paths: list[str] = []
        self.status = 200
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                if collector.status == 200:
                    collector.requests.append(service.ExportMetricsServiceRequest.FromString(body))
                    collector.paths.append(self.path)
                self.send_response(collector.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def metrics(self) -> dict[str, Any]:
        """Return the metrics of the last request by name."""
        (resource,) = self.requests[-1].resource_metrics
        (scope,) = resource.scope_metrics
        assert len({metric.name for metric in scope.metrics}) == len(scope.metrics)
        return {metric.name: metric for metric in scope.metrics}

    def resource(self) -> dict[str, str]:
        (resource,) = self.requests[-1].resource_metrics
        return attributes(resource.resource)


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def attributes(point: Any) -> dict[str, str]:
    return {each.key: each.value.string_value for each in point.attributes}


def by(metric: Any, *names: str) -> dict[tuple[str, ...], Any]:
    """Return the points of a metric by the values of some attributes."""
    points = getattr(metric, metric.WhichOneof("data")).data_points
    found = {tuple(attributes(point).get(name, "") for name in names): point for point in points}
    assert len(found) == len(points)
    return found


def fill(perf: AgentPerf) -> None:
    for agent in ("planner", "writer"):
        for us in (0, 1, 980, 500_000, 500_001, 1_000_000, 2_000_000, 64_000_000, 10**11):
            perf.metrics.record_execution(agent, us / 1e6, us != 980, "TimeoutError" if us == 980 else None)
        perf.metrics.record_llm(agent, model="gpt-x", tokens_in=100, tokens_out=20, tokens_cached_in=30, cost=0.25)
    assert perf.metrics.flush()
    perf.cache("answers").put("a", 1)


def test_histogram_equals_the_api_bucket_for_bucket(perf: AgentPerf, collector: Collector) -> None:
    fill(perf)
    pusher = otlp.Pusher(perf, otlp.endpoint("url", collector.url), 60.0)
    assert pusher.send()
    assert collector.paths == ["/v1/metrics"]
    duration = collector.metrics()["gen_ai.invoke_agent.duration"]
    assert (duration.unit, duration.exponential_histogram.aggregation_temporality) == ("s", 2)  # 2 means cumulative
    points = by(duration, "gen_ai.agent.name")
    agents = perf.metrics.snapshots()
    assert {name for (name,) in points} == set(agents)
    for (name,), point in points.items():
        agent = agents[name]
        counts = {point.positive.offset + at: count for at, count in enumerate(point.positive.bucket_counts) if count}
        assert (point.scale, counts, point.zero_count) == (4, agent.buckets, agent.zeros)
        assert (point.count, point.sum) == (agent.task_count, agent.total_execution_time)
        assert (point.min, point.max) == (agent.min_execution_time, agent.max_execution_time)
        assert point.start_time_unix_nano == round(agent.interval.start * 1000) * 1_000_000
        assert point.start_time_unix_nano < point.time_unix_nano
        assert attributes(point)["gen_ai.operation.name"] == "invoke_agent"
    pusher.stop()


def test_counters_equal_the_api(perf: AgentPerf, collector: Collector) -> None:
    fill(perf)
    pusher = otlp.Pusher(perf, otlp.endpoint("url", collector.url), 60.0)
    assert pusher.send()
    metrics, planner = collector.metrics(), perf.metrics.get_or_create_metrics("planner")
    executions = metrics["agentperf.agent.executions"]
    assert (executions.sum.is_monotonic, executions.sum.aggregation_temporality) == (True, 2)
    points = by(executions, "gen_ai.agent.name", "agentperf.outcome")
    assert points["planner", "success"].as_int == planner.success_count
    assert points["planner", "failure"].as_int == planner.failure_count == 1
    assert (
        by(metrics["agentperf.agent.errors"], "gen_ai.agent.name", "error.type")["planner", "TimeoutError"].as_int == 1
    )
    for kind, expected in (("input_tokens", 100), ("output_tokens", 20), ("cache_read.input_tokens", 30)):
        used = by(metrics[f"gen_ai.client.inference.usage.{kind}"], "gen_ai.agent.name", "gen_ai.request.model")
        assert used["planner", "gpt-x"].as_int == expected
    assert by(metrics["agentperf.agent.cost"], "gen_ai.agent.name")[("planner",)].as_double == planner.cost
    assert by(metrics["agentperf.cache.entries"], "agentperf.cache", "agentperf.tier")["answers", "cold"].as_int == 1
    assert collector.resource()["service.name"] == "agentperf"
    assert collector.resource()["agentperf.namespace"] == perf.backend.namespace
    pusher.stop()


def test_requests_repeat_at_the_interval(perf: AgentPerf, collector: Collector) -> None:
    fill(perf)
    pusher = otlp.Pusher(perf, otlp.endpoint("url", collector.url), 0.05)
    pusher.start()
    wait_until(lambda: len(collector.requests) >= 3, "three requests")
    perf.metrics.record_execution("planner", 1.0, success=True)
    assert perf.metrics.flush()

    def count() -> int:
        points = by(collector.metrics()["agentperf.agent.executions"], "gen_ai.agent.name", "agentperf.outcome")
        return int(points["planner", "success"].as_int)

    wait_until(lambda: count() == 9, "the new execution")
    pusher.stop()
    sent = len(collector.requests)
    time.sleep(0.2)
    assert len(collector.requests) == sent


def test_refusing_collector_is_reported_and_tried_again(perf: AgentPerf, collector: Collector) -> None:
    fill(perf)
    collector.status = 400
    seen: list[str | None] = []
    pusher = otlp.Pusher(perf, otlp.endpoint("url", collector.url), 0.05, on_sent=seen.append)
    pusher.start()
    wait_until(lambda: len(seen) >= 2, "two failures")
    assert all(error and collector.url in error for error in seen)
    collector.status = 200
    wait_until(lambda: seen[-1] is None, "a success")
    pusher.stop()


def test_stop_does_not_wait_for_an_absent_collector(perf: AgentPerf) -> None:
    fill(perf)
    pusher = otlp.Pusher(perf, "http://127.0.0.1:1/v1/metrics", 60.0)
    pusher.start()
    time.sleep(0.2)  # by now, the pusher retries its request; without `stop`, it would retry for up to ten seconds
    began = time.monotonic()
    pusher.stop()
    assert time.monotonic() - began < 5


@pytest.mark.standalone
def test_nothing_is_sent_during_an_outage(proxy: Proxy, namespace: str, collector: Collector) -> None:
    with AgentPerf(proxy.url, namespace=namespace, deadline=0.5) as perf:
        fill(perf)
        pusher = otlp.Pusher(perf, otlp.endpoint("url", collector.url), 60.0)
        assert pusher.send()
        proxy.close_port()
        assert not pusher.send()
        assert len(collector.requests) == 1
        proxy.open_port()
        wait_until(pusher.send, "the server to be reached again")
        first, *_, last = collector.requests
        points = [request.resource_metrics[0].scope_metrics[0].metrics for request in (first, last)]
        assert [metric.name for metric in points[0]] == [metric.name for metric in points[1]]
        pusher.stop()
