"""A collector rejects a call with invalid arguments, and neither keeps nor sends anything of this call."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.errors import AgentPerfError, InvalidArgument
from agentperf_redis.metrics.client import MetricsCollector
from agentperf_redis.metrics.retention import memory_forecast
from tests.support.refusals import assert_refused


@pytest.mark.parametrize(
    ("argument", "args"),
    [
        ("agent_name", ("", 1.0, True)),
        ("agent_name", ("a\r\n", 1.0, True)),
        ("agent_name", ("x" * 1_000_000, 1.0, True)),
        ("agent_name", (["x"], 1.0, True)),
        ("execution_time", ("x", math.nan, True)),
        ("execution_time", ("x", math.inf, True)),
        ("execution_time", ("x", -1e-9, True)),
        ("execution_time", ("x", 1e300, True)),
        ("execution_time", ("x", True, True)),
        ("execution_time", ("x", "5", True)),
        ("execution_time", ("x", None, True)),
        ("success", ("x", 1.0, 1)),
        ("success", ("x", 1.0, None)),
        ("error_type", ("x", 1.0, False, 5)),
        ("error_type", ("x", 1.0, False, "a\0")),
        ("error_type", ("x", 1.0, False, "\ud800")),
        ("error_type", ("x", 1.0, False, ["x"])),
    ],
)
def test_invalid_record_is_rejected_and_not_kept(dead_backend: Backend, argument: str, args: Any) -> None:
    collector = MetricsCollector(backend=dead_backend)
    with pytest.raises(InvalidArgument, match=argument):
        collector.record_execution(*args)
    assert collector.delivery().recorded == 0


@pytest.mark.parametrize(
    ("argument", "method", "args", "options"),
    [
        ("agent_name", "get_or_create_metrics", ("",), {}),
        ("window", "get_all_metrics", ("5x",), {}),
        ("window", "get_system_summary", (0,), {}),
        ("as_of", "snapshots", (), {"as_of": 1.0}),
        ("as_of", "summary", (), {"window": "5m", "as_of": "x"}),
        ("timeout", "flush", (-1,), {}),
        ("timeout", "flush", (math.nan,), {}),
    ],
)
def test_invalid_argument_is_rejected_by_name(
    dead_backend: Backend, argument: str, method: str, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    assert_refused(MetricsCollector(backend=dead_backend), argument, method, *args, **options)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("agent_name", {}),
        ("agent_name", {"agent_name": ""}),
        ("tokens_in", {"agent_name": "a", "tokens_in": -1}),
        ("tokens_in", {"agent_name": "a", "tokens_in": 1.5}),
        ("tokens_out", {"agent_name": "a", "tokens_out": True}),
        ("tokens_out", {"agent_name": "a", "tokens_out": 2**64}),
        ("tokens_cached_in", {"agent_name": "a", "tokens_cached_in": 1}),
        ("tokens_cached_in", {"agent_name": "a", "tokens_in": 5, "tokens_cached_in": 6}),
        ("tokens_cached_in", {"agent_name": "a", "tokens_in": 5, "tokens_cached_in": -1}),
        ("tokens_cache_write", {"agent_name": "a", "tokens_in": 5, "tokens_cached_in": 3, "tokens_cache_write": 3}),
        ("tokens_reasoning", {"agent_name": "a", "tokens_out": 5, "tokens_reasoning": 6}),
        ("tokens_reasoning", {"agent_name": "a", "usage": {"completion_tokens": 5}, "tokens_reasoning": 6}),
        ("tokens_reasoning", {"agent_name": "a", "tokens_out": 5, "tokens_reasoning": 1.5}),
        ("cost", {"agent_name": "a", "cost": math.nan}),
        ("cost", {"agent_name": "a", "cost": Decimal("sNaN")}),
        ("cost", {"agent_name": "a", "cost": Decimal(-1)}),
        ("cost", {"agent_name": "a", "cost": -0.1}),
        ("cost", {"agent_name": "a", "cost": "1"}),
        ("model", {"agent_name": "a", "model": ""}),
        ("model", {"agent_name": "a", "model": 5}),
        ("calls", {"agent_name": "a", "calls": -1}),
    ],
)
def test_invalid_model_usage_is_rejected_and_not_kept(dead_backend: Backend, argument: str, options: Any) -> None:
    collector = MetricsCollector(backend=dead_backend)
    with pytest.raises(InvalidArgument, match=argument):
        collector.record_llm(**options)
    assert collector.delivery().recorded == 0


@pytest.mark.parametrize("retention", ["7d", 3600, {"slices_1d": 86_400}, object()])
def test_retention_of_another_class_is_rejected(dead_backend: Backend, retention: Any) -> None:
    """If it were accepted, each flush would fail, and calls that wait for a flush would hang."""
    with pytest.raises(InvalidArgument, match="retention"):
        MetricsCollector(backend=dead_backend, retention=retention)
    with pytest.raises(InvalidArgument, match="retention"):
        memory_forecast(retention, agents=1, per_second=1)


def test_unhashable_error_type_counts_by_its_text(dead_backend: Backend) -> None:
    class Unhashable(str):
        __slots__ = ()
        __hash__ = None  # type: ignore[assignment]

    collector = MetricsCollector(backend=dead_backend)
    collector.record_execution("a", 1.0, False, Unhashable("TimeoutError"))
    assert collector.delivery().recorded == 1


def test_agent_that_cannot_be_hashed_is_rejected(dead_backend: Backend) -> None:
    class Unhashable:
        def __hash__(self) -> int:
            raise RuntimeError("no")

    agent: Any = Unhashable()
    collector = MetricsCollector(backend=dead_backend)
    with pytest.raises(InvalidArgument, match="agent_name"):
        collector.record_execution(agent, 1.0, True)


def test_fault_in_a_failed_flush_does_not_block_its_caller(
    dead_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector = MetricsCollector(backend=dead_backend)
    collector.record_execution("a", 1.0, True)

    def fail(_: object) -> None:
        raise RuntimeError("a fault of the library")

    with monkeypatch.context() as patch:
        patch.setattr(collector._flusher.buffer, "downsample", fail)
        with pytest.raises(AgentPerfError, match="flushing metrics failed"):
            collector.flush(timeout=60)
