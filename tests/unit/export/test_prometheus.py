"""Tests of the exporter that need no server. The figures are tested in tests/integration/export."""

from __future__ import annotations

from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from agentperf_redis import AgentPerf
from agentperf_redis.export import prometheus
from agentperf_redis.export.families import FAMILIES
from agentperf_redis.export.prometheus import Collector, Exporter, negotiated
from agentperf_redis.export.text import Form
from tests.support.readings import reading


def test_registration_reads_nothing() -> None:
    with AgentPerf("redis://127.0.0.1:1") as perf:
        registry = CollectorRegistry(auto_describe=True)
        registry.register(Collector(perf))
        with pytest.raises(ValueError, match="agentperf_agent_executions"):
            registry.register(Collector(perf))
    assert [each.name for each in Collector(perf).describe()] == [each.name for each in FAMILIES]


def test_newer_openmetrics_gets_native_histograms() -> None:
    assert negotiated("application/openmetrics-text;version=2.1.0")[0] is Form.NATIVE
    assert negotiated("application/openmetrics-text;version=1.3.0")[0] is Form.OPENMETRICS
    assert negotiated("text/plain;version=1.0.0;escaping=allow-utf-8")[0] is Form.PLAIN


def test_each_reading_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    found = reading("planner")
    monkeypatch.setattr(prometheus, "read", lambda _: found)
    seen: list[Any] = []
    unread: Any = None
    exporter = Exporter(unread, seen.append)
    exporter.answer("GET", "/metrics")
    exporter.answer("GET", "/")
    assert seen == [found]
