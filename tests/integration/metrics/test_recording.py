"""Metrics on a real server: records appear unchanged in Redis and in the results."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from fractions import Fraction

import numpy as np
import pytest

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.errors import CorruptState, InvalidArgument
from agentperf_redis.metrics import commands
from agentperf_redis.metrics.client import MetricsCollector
from agentperf_redis.metrics.histogram import RELATIVE_ERROR
from agentperf_redis.metrics.model import OTHER
from tests.support.calls import Call
from tests.support.forks import in_child
from tests.support.servers import Raw, Server, wait_until


@pytest.fixture
def collector(backend: Backend) -> MetricsCollector:
    return MetricsCollector(backend=backend)


def total_of(raw: Raw, namespace: str, agent: str) -> dict[str, int]:
    """Return the stored all-time counters of an agent."""
    stored = raw.hgetall(keys.metrics_total(namespace, keys.metrics_shard(agent), keys.metrics_series(agent)))
    return {name: int(value) for name, value in stored.items()}


def test_records_are_read_in_the_in_memory_form(
    collector: MetricsCollector, call: Call, raw: Raw, namespace: str
) -> None:
    for number in range(1, 11):
        collector.record_execution("research", number / 10, number != 10, None if number != 10 else "TimeoutError")
    collector.record_execution("writer", 2.0, True)

    assert call(collector, "get_all_metrics") == {
        "research": {
            "agent_name": "research",
            "task_count": 10,
            "success_rate": "90.0%",
            "failure_rate": "10.0%",
            "avg_execution_time": "0.55s",
            "p50_execution_time": "0.60s",
            "p95_execution_time": "1.00s",
            "p99_execution_time": "1.00s",
            "min_execution_time": "0.10s",
            "max_execution_time": "1.00s",
            "top_errors": {"TimeoutError": 1},
        },
        "writer": {
            "agent_name": "writer",
            "task_count": 1,
            "success_rate": "100.0%",
            "failure_rate": "0.0%",
            "avg_execution_time": "2.00s",
            "p50_execution_time": "2.00s",
            "p95_execution_time": "2.00s",
            "p99_execution_time": "2.00s",
            "min_execution_time": "2.00s",
            "max_execution_time": "2.00s",
            "top_errors": {},
        },
    }
    summary = call(collector, "get_system_summary")
    assert list(summary) == [
        "uptime",
        "total_tasks",
        "total_successes",
        "total_failures",
        "overall_success_rate",
        "throughput",
        "active_agents",
        "agent_rankings",
    ]
    assert (summary["total_tasks"], summary["total_successes"], summary["total_failures"]) == (11, 10, 1)
    assert (summary["overall_success_rate"], summary["active_agents"]) == ("90.9%", 2)
    assert summary["agent_rankings"] == [
        {"agent": "research", "score": "0.581", "success_rate": "90.0%", "avg_time": "0.55s"},
        {"agent": "writer", "score": "0.333", "success_rate": "100.0%", "avg_time": "2.00s"},
    ]
    stored = total_of(raw, namespace, "research")
    assert (stored["n"], stored["ok"], stored["err"], stored["err:TimeoutError"]) == (10, 9, 1, 1)
    assert (stored["sum_us"], stored["min_us"], stored["max_us"]) == (5_500_000, 100_000, 1_000_000)
    assert sum(count for name, count in stored.items() if name.startswith("h:")) == 10


def test_every_field_of_an_agent_is_read(collector: MetricsCollector, call: Call) -> None:
    before = datetime.now()  # noqa: DTZ005  as in the in-memory version
    times = [0.734, 0.001234, 12.0, 0.0]
    for seconds in times:
        collector.record_execution("research", seconds, True)
    collector.record_execution("research", 1.5, False)
    collector.record_execution("research", 1.5, False, "TimeoutError")
    collector.record_cancellation("research", 0.25)

    metrics = call(collector, "get_or_create_metrics", "research")

    assert (metrics.agent_name, metrics.task_count, metrics.success_count) == ("research", 7, 4)
    assert (metrics.failure_count, metrics.cancelled_count, metrics.error_types) == (2, 1, {"TimeoutError": 1})
    assert sorted(metrics.execution_times) == sorted([*times, 1.5, 1.5, 0.25])
    assert (metrics.min_execution_time, metrics.max_execution_time) == (0.0, 12.0)
    assert math.isclose(metrics.total_execution_time, 15.985234)
    assert (metrics.p50_execution_time, metrics.p99_execution_time) == (0.734, 12.0)
    assert (metrics.exact, metrics.error_bound) == (True, 0.0)
    assert metrics.last_execution is not None
    assert before - timedelta(seconds=5) < metrics.last_execution < before + timedelta(seconds=30)


def test_unknown_agent_has_no_metrics(collector: MetricsCollector, call: Call, raw: Raw, namespace: str) -> None:
    metrics = call(collector, "get_or_create_metrics", "unknown")
    assert (metrics.task_count, metrics.min_execution_time, metrics.last_execution) == (0, math.inf, None)
    assert call(collector, "get_all_metrics") == {}
    assert call(collector, "get_system_summary")["throughput"] == "0 tasks/s"
    assert not raw.keys(f"{namespace}:{{metrics*")


def test_in_memory_attributes_are_available(collector: MetricsCollector) -> None:
    collector.record_execution("research", 1.0, True)
    assert collector.metrics["research"].task_count == 1
    assert datetime.now() - collector.start_time < timedelta(seconds=60)  # noqa: DTZ005  as in the in-memory version


@pytest.mark.parametrize(
    "name", ["a b{1}", "}{", "*?[", "é", "e\N{COMBINING ACUTE ACCENT}", "a:b/c#d|e%f", "__other__", "x" * 200]
)
def test_unusual_names_have_separate_counts(collector: MetricsCollector, name: str) -> None:
    collector.record_execution(name, 1.0, False, "E|:x}")
    collector.record_execution("plain", 1.0, True)
    metrics = collector.metrics
    assert set(metrics) == {name, "plain"}
    assert metrics[name].error_types == {"E|:x}": 1}


def test_percentiles_are_exact_up_to_1000_samples(collector: MetricsCollector, call: Call) -> None:
    source = random.Random(3)
    times = [round(source.lognormvariate(0.7, 0.8), 6) for _ in range(1500)]
    for count in (1000, 1500):
        for seconds in times[count - 1000 if count == 1000 else 1000 : count]:
            collector.record_execution("research", seconds, True)
        ordered = sorted(times[:count])
        metrics = call(collector, "get_or_create_metrics", "research")
        assert metrics.task_count == count
        assert metrics.exact == (count == 1000)
        for share, found in (
            (0.5, metrics.p50_execution_time),
            (0.95, metrics.p95_execution_time),
            (0.99, metrics.p99_execution_time),
        ):
            exact = ordered[int(count * share)]
            assert abs(found - exact) <= metrics.error_bound * exact
            assert metrics.error_bound in (0.0, RELATIVE_ERROR)


def test_windows_contain_only_their_records(collector: MetricsCollector, call: Call) -> None:
    for _ in range(5):
        collector.record_execution("research", 0.5, True)
    for window in ("10s", "1m", "5m", "1h", "1d", "30d", 90):
        summary = call(collector, "get_system_summary", window=window)
        assert (window, summary["total_tasks"]) == (window, 5)
    before = time.time() - 3600
    assert call(collector, "get_all_metrics", window="5m", as_of=before)["research"]["task_count"] == 0
    assert call(collector, "get_system_summary", window="5m", as_of=before)["active_agents"] == 0
    later = datetime.now() + timedelta(minutes=30)  # noqa: DTZ005  naive local time
    assert call(collector, "get_or_create_metrics", "research", window="1h", as_of=later).task_count == 5
    assert call(collector, "get_or_create_metrics", "research", window="5m", as_of=later).task_count == 0


def test_integers_and_other_reals_are_accepted_durations(collector: MetricsCollector) -> None:
    for value in (2, Fraction(1, 4), np.float64(0.5), np.float32(0.5), np.int64(3)):
        collector.record_execution("research", value, True)  # type: ignore[arg-type]  # fractions are Real, not float
    assert sorted(collector.metrics["research"].execution_times) == [0.25, 0.5, 0.5, 2.0, 3.0]


def test_collectors_of_a_backend_share_one_buffer(backend: Backend) -> None:
    first, second = MetricsCollector(backend=backend), MetricsCollector(backend=backend)
    first.record_execution("research", 1.0, True)
    assert second.metrics["research"].task_count == 1
    assert first.delivery() == second.delivery()


def test_records_are_flushed_in_the_background(collector: MetricsCollector, raw: Raw, namespace: str) -> None:
    collector.record_execution("research", 1.0, True)
    wait_until(lambda: total_of(raw, namespace, "research").get("n") == 1, "the background flush")
    wait_until(lambda: collector.delivery().pending == 0, "its reply")


def test_close_flushes_pending_records(
    server: Server, connect: Callable[..., Backend], raw: Raw, namespace: str
) -> None:
    backend = connect(server.url)
    collector = MetricsCollector(backend=backend)
    collector.record_execution("research", 1.0, True)
    backend.close()
    assert total_of(raw, namespace, "research")["n"] == 1
    with pytest.warns(RuntimeWarning, match="is closed"):
        collector.record_execution("research", 1.0, True)
    assert collector.delivery().pending == 1


def test_agents_beyond_the_limit_are_counted_together(
    collector: MetricsCollector, monkeypatch: pytest.MonkeyPatch, raw: Raw, namespace: str
) -> None:
    monkeypatch.setattr(commands, "MAX_AGENTS", 3)
    names = [name for name in (f"agent-{number}" for number in range(1000)) if keys.metrics_shard(name) == 7][:10]
    for name in names:
        for _ in range(2):
            collector.record_execution(name, 0.5, False, "E")
    collector.flush()
    for name in names:  # the first three agents are known, and keep their own counts
        collector.record_execution(name, 0.5, True)

    metrics = collector.metrics
    assert {name: metrics[name].task_count for name in metrics} == {**dict.fromkeys(names[:3], 3), OTHER: 21}
    assert metrics[OTHER].error_types == {"E": 14}
    assert collector.delivery().other == 21
    assert raw.zcard(keys.metrics_agents(namespace, 7)) == 4
    assert metrics[OTHER].exact
    assert collector.get_system_summary(window="5m")["total_tasks"] == 30


def test_error_types_beyond_the_limit_are_counted_together(
    collector: MetricsCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "MAX_ERRORS", 3)
    for number in range(5):
        collector.record_execution("research", 0.5, False, f"E{number}:detail")
    collector.flush()
    for number in range(5):
        collector.record_execution("research", 0.5, False, f"E{number}:detail")
    for window in (None, "5m", "1d"):
        metrics = collector.get_or_create_metrics("research", window=window)
        assert metrics.error_types == {**{f"E{number}:detail": 2 for number in range(3)}, OTHER: 4}
        assert sum(metrics.error_types.values()) == metrics.failure_count


def test_slices_have_their_ttls(collector: MetricsCollector, raw: Raw, namespace: str) -> None:
    collector.record_execution("research", 1.0, True)
    collector.flush()
    tag = keys.metrics_tag(namespace, keys.metrics_shard("research"))
    ttls = {key.split(":")[3]: raw.pttl(key) / 1000 for key in raw.keys(f"{tag}:*") if "research" in key}
    quarter, hours, days, months = 900, 3 * 3600, 8 * 86_400, 90 * 86_400
    assert ttls["total"] < 0, "totals never expire"
    for width, name, ttl in ((10, "10s", quarter), (60, "1m", hours), (3600, "1h", days), (86_400, "1d", months)):
        assert ttl - 5 < ttls[name] <= ttl + width
    assert 3590 < ttls["latest"] <= 3600
    assert 8 * 86_400 - 5 < ttls["slow"] <= 8 * 86_400


def test_recent_and_slow_samples_are_bounded(collector: MetricsCollector, raw: Raw, namespace: str) -> None:
    for number in range(700):
        collector.record_execution("research", number / 1000, True)
    collector.flush()
    for number in range(700):
        collector.record_execution("research", number / 1000 + 0.0005, number % 2 == 0, "E")
    collector.flush()
    shard = keys.metrics_shard("research")
    slow = raw.zrange(keys.metrics_slow(namespace, shard, "research"), 0, -1, withscores=True)
    assert [score for _, score in slow] == sorted(us for us in range(675_000, 700_000, 500))
    assert slow[-1][0].split("|")[1:3] == ["699500us", "err:E"]
    recent = keys.metrics_latest(namespace, shard, "research")
    assert 350 < raw.llen(recent) <= 1000
    delivery = collector.delivery()
    assert delivery.samples_dropped > 0
    assert (delivery.recorded, delivery.counted, delivery.pending) == (1400, 1400, 0)


def test_forked_child_counts_only_its_own_records(
    server: Server, collector: MetricsCollector, raw: Raw, namespace: str
) -> None:
    collector.record_execution("parent", 1.0, True)  # this record is in the buffer during the fork

    def child() -> None:
        assert collector.delivery().recorded == 0
        for _ in range(3):
            collector.record_execution("child", 1.0, True)
        assert collector.flush()

    in_child(child)
    for _ in range(2):
        collector.record_execution("parent", 1.0, True)
    assert {name: each.task_count for name, each in collector.metrics.items()} == {"parent": 3, "child": 3}


def test_plain_counters_are_read_without_percentiles(collector: MetricsCollector, call: Call) -> None:
    for number in range(10):
        collector.record_execution("research", number / 10, number != 3, "E")
    for window in (None, "5m"):
        plain = call(collector, "snapshots", percentiles=False, window=window)["research"]
        whole = call(collector, "snapshots", window=window)["research"]
        for figure in ("task_count", "failure_count", "avg_execution_time", "min_execution_time", "max_execution_time"):
            assert getattr(plain, figure) == getattr(whole, figure)
        assert math.isnan(plain.p95_execution_time)
        assert not plain.exact
        assert whole.p95_execution_time == 0.9
    with pytest.raises(InvalidArgument, match="percentiles"):
        call(collector, "snapshots", percentiles=1)


def test_plain_counters_equal_those_of_a_full_read(collector: MetricsCollector, call: Call) -> None:
    collector.record_execution("fine", 0.25, True)
    collector.record_execution("fine", 0.0, True)
    collector.record_execution("failing", 0.5, False, "TimeoutError")
    collector.record_execution("failing", 1.5, True)
    collector.record_cancellation("cancelled", 0.75)
    collector.record_llm("model", tokens_in=100, tokens_out=20, cost=0.0125, model="gpt-x", calls=2)
    collector.record_llm(
        "model", tokens_in=9, tokens_cached_in=5, tokens_cache_write=3, tokens_out=2, tokens_reasoning=1
    )
    collector.record_tool_calls("tools", calls=3)
    collector.record_stream("stream", 7, 0.1, 0.01)

    figures = [
        "task_count", "success_count", "failure_count", "cancelled_count", "total_execution_time", "min_execution_time",
        "max_execution_time", "avg_execution_time", "last_execution", "tokens_in", "tokens_out", "cost",
        "tokens_cached_in", "tokens_cache_write", "tokens_reasoning",
        "llm_calls", "tool_calls",
    ]  # fmt: skip
    for window in (None, "5m"):
        whole = call(collector, "snapshots", window=window)
        plain = call(collector, "snapshots", window=window, percentiles=False)
        assert sorted(plain) == ["cancelled", "failing", "fine", "model", "stream", "tools"]
        for agent in plain:
            for name in figures:
                assert getattr(plain[agent], name) == getattr(whole[agent], name), (agent, name)
            assert plain[agent].interval.start == whole[agent].interval.start
    assert (plain["model"].cost, plain["tools"].tool_calls, plain["failing"].failure_count) == (0.0125, 3, 1)


def test_combined_agents_read_as_one_agent(collector: MetricsCollector, call: Call) -> None:
    for number in range(30):
        collector.record_execution(f"agent-{number % 3}", number / 10, number % 10 != 0, "E")
    for names in ((), ("agent-0", "agent-1", "agent-2", "agent-0")):
        for window in (None, "5m"):
            found = call(collector, "combined", *names, window=window)
            assert (found.task_count, found.error_types) == (30, {"E": 3})
            assert (found.p50_execution_time, found.p95_execution_time, found.exact) == (1.5, 2.8, True)
    assert call(collector, "combined", "agent-1").task_count == 10
    assert call(collector, "combined", "unknown").task_count == 0
    with pytest.raises(InvalidArgument, match="agent_names"):
        call(collector, "combined", "")


def test_recent_and_slowest_samples_are_listed(collector: MetricsCollector, call: Call) -> None:
    collector.record_execution("research", 0.25, True)
    collector.flush()
    time.sleep(0.002)  # end times are stored in whole milliseconds, and must differ here
    collector.record_execution("research", 3.0, False, "a|b c")
    collector.flush()
    time.sleep(0.002)
    collector.record_cancellation("research", 1.0)
    recent = call(collector, "recent", "research")
    assert [(each.seconds, each.success, each.cancelled, each.error_type) for each in recent] == [
        (1.0, False, True, None),
        (3.0, False, False, "a|b c"),
        (0.25, True, False, None),
    ]
    assert [each.seconds for each in call(collector, "slowest", "research", limit=2)] == [3.0, 1.0]
    assert abs((datetime.now() - recent[0].ended).total_seconds()) < 30  # noqa: DTZ005  naive local time
    assert call(collector, "recent", "unknown") == ()
    with pytest.raises(InvalidArgument, match="limit"):
        call(collector, "recent", "research", limit=0)


def test_foreign_raw_sample_is_named(collector: MetricsCollector, call: Call, raw: Raw, namespace: str) -> None:
    key = keys.metrics_slow(namespace, keys.metrics_shard("research"), "research")
    raw.zadd(key, {"foreign data": 1})
    with pytest.raises(CorruptState) as caught:
        call(collector, "slowest", "research")
    assert caught.value.key == key


def test_forget_deletes_an_agent(collector: MetricsCollector, call: Call, raw: Raw, namespace: str) -> None:
    for name in ("research", "writer"):
        with collector.track(name), collector.span(name, "plan"):
            pass
    assert call(collector, "forget", "research")
    assert not call(collector, "forget", "research")
    assert set(call(collector, "snapshots")) == {"writer"}
    assert call(collector, "get_or_create_metrics", "research").task_count == 0
    left = {key.split(":")[3] for key in raw.keys(f"{namespace}:*") if "research" in key}
    assert left == {"10s", "1m", "1h", "1d"}, "the slices expire later"
    with collector.track("research"):
        pass
    assert call(collector, "get_or_create_metrics", "research").task_count == 1
    with pytest.raises(InvalidArgument, match="agent_name"):
        call(collector, "forget", "")
