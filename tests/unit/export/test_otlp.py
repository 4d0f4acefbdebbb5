"""Tests of the data that OTLP requests contain. The requests themselves are tested in tests/integration/export."""

from __future__ import annotations

import pytest

from agentperf_redis.errors import InvalidArgument
from tests.support.readings import BUCKETS, reading

otlp = pytest.importorskip("agentperf_redis.export.otlp", reason="needs the extra otel", exc_type=ModuleNotFoundError)
pytestmark = pytest.mark.thorough  # the imported packages are large


@pytest.mark.parametrize(
    ("given", "complete"),
    [
        ("http://localhost:4318", "http://localhost:4318/v1/metrics"),
        ("https://otel.example/", "https://otel.example/v1/metrics"),
        ("https://otel.example/api/otlp/v1/metrics", "https://otel.example/api/otlp/v1/metrics"),
        ("http://[::1]:4318", "http://[::1]:4318/v1/metrics"),
    ],
)
def test_endpoint_gets_the_path_of_otlp(given: str, complete: str) -> None:
    assert otlp.endpoint("url", given) == complete


@pytest.mark.parametrize(
    "given", ["", "localhost:4318", "grpc://h:4317", "http://", "http://h:x", "http://h:0", "http://[::1"]
)
def test_invalid_endpoint_is_refused(given: str) -> None:
    with pytest.raises(InvalidArgument, match="url is"):
        otlp.endpoint("url", given)


def test_secrets_of_the_url_are_masked() -> None:
    assert otlp.masked("https://me:hunter2@h:1/v1?key=hunter2") == "https://***@h:1/v1?***"
    assert otlp.masked("http://h:1/v1/metrics") == "http://h:1/v1/metrics"
    with pytest.raises(InvalidArgument) as refused:
        otlp.endpoint("url", "grpc://me:hunter2@h:4317?key=hunter2")
    assert "hunter2" not in str(refused.value)


def test_histogram_has_the_stored_buckets() -> None:
    (scoped,) = otlp.metrics_data(reading("a"), 5).resource_metrics[0].scope_metrics
    (metric,) = [each for each in scoped.metrics if each.name == "gen_ai.invoke_agent.duration"]
    (point,) = metric.data.data_points
    counts = {point.positive.offset + place: count for place, count in enumerate(point.positive.bucket_counts) if count}
    assert (counts, point.zero_count, point.scale) == (BUCKETS, 2, 4)
    assert (point.start_time_unix_nano, point.time_unix_nano) == (1_760_000_000_000_000_000, 5)
    assert (point.min, point.max, point.sum) == (0.0, 40_000.0, 123.456789)
