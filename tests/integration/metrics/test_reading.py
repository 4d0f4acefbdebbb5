"""Spans, streams, models, rankings, comparisons, windows and retention, on a real server."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from agentperf_redis import keys
from agentperf_redis.backend import DEFAULT_NAMESPACE, Backend
from agentperf_redis.background import Background, Job
from agentperf_redis.errors import BackendUnavailable, CorruptState, InvalidArgument
from agentperf_redis.metrics import commands, spans
from agentperf_redis.metrics.accumulator import OK
from agentperf_redis.metrics.client import MetricsCollector
from agentperf_redis.metrics.comparison import RankBy
from agentperf_redis.metrics.histogram import RELATIVE_ERROR, bucket_index, exact_quantile
from agentperf_redis.metrics.model import OTHER, ModelUsage
from agentperf_redis.metrics.retention import Retention, memory_forecast
from agentperf_redis.metrics.tracking import track_performance
from tests.support.calls import Call
from tests.support.distributions import DISTRIBUTIONS
from tests.support.filled import Past, fill_slices
from tests.support.forks import in_child
from tests.support.servers import Raw, Server, wait_until
from tests.support.stalls import hurry


@pytest.fixture
def collector(backend: Backend) -> MetricsCollector:
    return MetricsCollector(backend=backend)


# -- tracking


def test_every_callable_kind_records_outcome_and_duration(collector: MetricsCollector, call: Call) -> None:
    step = 0.02

    class Agent:
        @track_performance("method", collector)
        def work(self) -> int:
            time.sleep(step)
            return 1

    @track_performance("generator", collector)
    def generator() -> Iterator[int]:
        for number in range(3):
            time.sleep(step)
            yield number

    @track_performance("async generator", collector)
    async def async_generator() -> AsyncIterator[int]:
        for number in range(3):
            await asyncio.sleep(step)
            yield number

    @track_performance("cancelled", collector)
    async def endless() -> None:
        await asyncio.sleep(60)

    @track_performance("failing", collector)
    async def failing() -> None:
        await asyncio.sleep(step)
        raise TimeoutError

    took: dict[str, float] = {}
    """Duration of each call, measured by the caller."""

    @contextlib.contextmanager
    def noted(name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        took[name] = time.perf_counter() - begin

    async def main() -> None:
        with noted("async generator"):
            assert [number async for number in async_generator()] == [0, 1, 2]
        with noted("cancelled"):
            task = asyncio.create_task(endless())
            await asyncio.sleep(step)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        with noted("failing"), pytest.raises(TimeoutError):
            await failing()

    with noted("method"):
        assert Agent().work() == 1
    with noted("generator"):
        assert list(generator()) == [0, 1, 2]
    asyncio.run(main())

    found = call(collector, "snapshots")
    assert {
        name: (each.task_count, each.success_count, each.failure_count, each.cancelled_count)
        for name, each in found.items()
    } == {
        "method": (1, 1, 0, 0),
        "generator": (1, 1, 0, 0),
        "async generator": (1, 1, 0, 0),
        "cancelled": (1, 0, 0, 1),
        "failing": (1, 0, 1, 0),
    }
    assert found["failing"].error_types == {"TimeoutError": 1}
    for name, minimum in (("method", 1), ("generator", 3), ("async generator", 3), ("cancelled", 0.5), ("failing", 1)):
        assert minimum * step <= found[name].avg_execution_time < took[name] + 1e-6, name
    for name in ("generator", "async generator"):
        streams = call(collector, "streams", name)
        assert (streams.items, streams.first.task_count, streams.between.task_count) == (3, 1, 1)
        assert step <= streams.first.max_execution_time < took[name] - 1.9 * step
        assert step * 0.9 <= streams.between.max_execution_time < (took[name] - 0.9 * step) / 2
    assert call(collector, "streams", "method").items == 0


class Clock:
    """The clock of spans, advanced by the test."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def test_span_tree_names_its_bottleneck(
    collector: MetricsCollector, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, agent = Clock(), "reviewer"
    monkeypatch.setattr(spans, "perf_counter", clock)

    @track_performance(agent, collector)
    async def review() -> None:
        with collector.span(agent, "read"):
            clock.advance(0.01)

        async def think(number: int) -> None:
            with collector.span(agent, f"model-{number}"):
                await asyncio.sleep(0)  # lets the other task begin
                clock.advance(0.02)
                with collector.span(agent, "parse"):
                    await asyncio.sleep(0)
                    clock.advance(0.005)

        with collector.span(agent, "think"):
            await asyncio.gather(think(1), think(2))
        with collector.span(agent, "check") as around:

            def check() -> None:
                with collector.span(agent, "slow rule", parent=around):
                    clock.advance(0.12)

            thread = threading.Thread(target=check)
            thread.start()
            await asyncio.to_thread(thread.join)

    for _ in range(3):
        asyncio.run(review())
    report = call(collector, "spans", agent)
    assert {span.name: span.metrics.task_count for span in report.spans} == dict.fromkeys(
        (
            "", "read", "think", "think/model-1", "think/model-1/parse", "think/model-2", "think/model-2/parse",
            "check", "check/slow rule",
        ),
        3,
    )  # fmt: skip
    assert math.isclose(report.total, 3 * (0.01 + 2 * 0.025 + 0.12), abs_tol=1e-6 * 3 * len(report.spans))
    total = call(collector, "get_or_create_metrics", agent).total_execution_time
    assert math.isclose(report.total, total, abs_tol=1e-6 * 3 * len(report.spans)), "self times add up to the total"
    assert math.isclose(sum(span.share for span in report.spans), 1.0)
    recent = call(collector, "spans", agent, window="5m")
    assert {span.name for span in recent.spans} == {span.name for span in report.spans}
    assert set(call(collector, "snapshots")) == {agent}, "spans are not agents"
    assert report.bottleneck.name == "check/slow rule"
    assert math.isclose(report.bottleneck.self_time, 0.36, abs_tol=1e-5)
    assert report.bottleneck.share > 0.5
    assert [span.name for span in report.tree][:3] == ["", "check", "check/slow rule"]


def test_spans_beyond_the_limit_are_counted_together(
    collector: MetricsCollector, monkeypatch: pytest.MonkeyPatch, raw: Raw, namespace: str
) -> None:
    monkeypatch.setattr(commands, "MAX_PARTS", 3)
    for number in range(10):
        with collector.span("agent", f"span-{number}"):
            pass
    report = collector.spans("agent")
    counts = {span.name: span.metrics.task_count for span in report.spans}
    assert len(counts) == 4
    assert counts[OTHER] == 7
    assert raw.zcard(keys.metrics_parts(namespace, keys.metrics_shard("agent"), "agent")) == 4


@pytest.mark.parametrize(
    ("argument", "args", "options"),
    [
        ("agent_name", ("", "x"), {}),
        ("name", ("a", ""), {}),
        ("name", ("a", "x\n"), {}),
        ("parent", ("a", "x"), {"parent": "root"}),
    ],
)
def test_invalid_spans_are_rejected(collector: MetricsCollector, argument: str, args: Any, options: Any) -> None:
    with pytest.raises(InvalidArgument, match=argument):
        collector.span(*args, **options)


# -- models


def test_model_usage_counts_for_agent_and_span(collector: MetricsCollector, call: Call) -> None:
    with collector.track("research"):
        collector.record_llm(tokens_in=100, tokens_out=20, cost=0.0125, model="gpt-x")
        with collector.span("research", "summarise"):
            collector.record_llm(usage={"model": "claude-x", "usage": {"input_tokens": 5, "output_tokens": 7}})
            collector.record_tool_calls(calls=2)
    collector.record_llm("research", tokens_in=1, model="gpt-x", calls=3)

    for window in (None, "5m"):
        found = call(collector, "get_or_create_metrics", "research", window=window)
        assert (found.tokens_in, found.tokens_out, found.cost) == (106, 27, 0.0125)
        assert (found.llm_calls, found.tool_calls, found.task_count) == (5, 2, 1)
        assert found.models == {"gpt-x": ModelUsage(4, 101, 20, 0.0125), "claude-x": ModelUsage(1, 5, 7, 0.0)}
    (stage,) = [span for span in call(collector, "spans", "research").spans if span.name == "summarise"]
    assert (stage.metrics.tokens_in, stage.metrics.tokens_out, stage.metrics.tool_calls) == (5, 7, 2)


def test_token_parts_are_counted_separately(collector: MetricsCollector, call: Call) -> None:
    with collector.track("research"), collector.span("research", "summarise"):
        collector.record_llm(
            tokens_in=100, tokens_cached_in=60, tokens_cache_write=10, tokens_out=20, tokens_reasoning=15, model="gpt-x"
        )
        collector.record_llm(
            usage={"model": "claude-x", "usage": {"input_tokens": 5, "cache_read_input_tokens": 40, "output_tokens": 7}}
        )
    collector.record_llm("plain", tokens_in=1, tokens_out=1)

    for window in (None, "5m"):
        found = call(collector, "get_or_create_metrics", "research", window=window)
        assert (found.tokens_in, found.tokens_cached_in, found.tokens_cache_write) == (145, 100, 10)
        assert (found.tokens_out, found.tokens_reasoning) == (27, 15)
        assert found.models == {
            "gpt-x": ModelUsage(1, 100, 20, 0.0, 60, 10, 15),
            "claude-x": ModelUsage(1, 45, 7, 0.0, 40),
        }
        plain = call(collector, "snapshots", window=window, percentiles=False)["research"]
        assert (plain.tokens_cached_in, plain.tokens_cache_write, plain.tokens_reasoning) == (100, 10, 15)
        both = call(collector, "combined", window=window)
        assert (both.tokens_in, both.tokens_cached_in, both.tokens_reasoning) == (146, 100, 15)
    (stage,) = [span for span in call(collector, "spans", "research").spans if span.name == "summarise"]
    assert (stage.metrics.tokens_cached_in, stage.metrics.tokens_reasoning) == (100, 15)


def test_zero_token_parts_take_no_memory(collector: MetricsCollector, raw: Raw, namespace: str) -> None:
    collector.record_llm("plain", tokens_in=3, tokens_out=4, tokens_cached_in=0, model="gpt-x")
    collector.flush()
    fields = set(raw.hkeys(keys.metrics_total(namespace, keys.metrics_shard("plain"), "plain")))
    assert {"tok_in", "mdl:gpt-x:tok_in"} <= fields
    assert not [field for field in fields if "cache" in field or "reasoning" in field]


def test_usage_sum_counts_its_calls_and_models(collector: MetricsCollector, call: Call) -> None:
    collector.record_llm("a", usage={"usage": {"input_tokens": 5, "output_tokens": 6, "requests": 3}})
    collector.record_llm("b", usage={"usage": {"input_tokens": 5, "output_tokens": 6, "requests": 3}}, calls=1)
    by_model = {
        "m-1": {"prompt_tokens": 5, "completion_tokens": 6},
        "m-2": {"prompt_tokens": 7, "completion_tokens": 8},
    }
    collector.record_llm("c", usage=by_model, cost=None)
    collector.record_llm("d", usage=by_model, cost=Decimal("0.25"), model="m-3")
    found = call(collector, "snapshots")
    assert (found["a"].llm_calls, found["b"].llm_calls) == (3, 1)
    assert found["c"].models == {"m-1": ModelUsage(1, 5, 6), "m-2": ModelUsage(1, 7, 8)}
    assert found["d"].models == {"m-3": ModelUsage(2, 12, 14, 0.25)}


def test_events_of_a_stream_are_counted_as_one_call(collector: MetricsCollector, call: Call) -> None:
    started = {"id": "msg_1", "model": "claude-x", "usage": {"input_tokens": 10, "output_tokens": 1}}
    collector.record_llm("a", usage={"type": "message_start", "message": started})
    collector.record_llm("a", usage={"type": "message_delta", "usage": {"output_tokens": 15}})
    collector.record_llm("a", usage={"type": "message_stop"})
    chunk = {"object": "chat.completion.chunk", "id": "c", "model": "gpt-x", "usage": None}
    collector.record_llm("a", usage=chunk)
    assert collector.delivery().usage_unread == 1
    collector.record_llm("a", usage=chunk | {"usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}})
    found = call(collector, "get_or_create_metrics", "a")
    assert (found.llm_calls, found.tokens_in, found.tokens_out) == (2, 12, 18)
    assert found.models["claude-x"] == ModelUsage(1, 10, 15)
    assert collector.delivery().usage_unread == 0


def test_inconsistent_total_is_logged_once_and_counted(
    collector: MetricsCollector, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        collector.record_llm("a", usage={"input_tokens": 10, "output_tokens": 5, "total_tokens": 99})
    collector.record_llm("a", usage={"input_tokens": 10, "output_tokens": 5, "total_tokens": 15})
    found = call(collector, "get_or_create_metrics", "a")
    assert (found.tokens_in, found.tokens_out) == (40, 20)
    delivery = collector.delivery()
    assert (delivery.usage_inconsistent, delivery.usage_unread) == (3, 0)
    (record,) = caplog.records
    assert "total" in record.getMessage()


def test_usage_errors_never_reach_the_caller(collector: MetricsCollector, call: Call) -> None:
    class Odd:
        def __getattribute__(self, name: str) -> Any:
            raise RuntimeError(name)

    class OddClass(type):
        def __getattribute__(cls, name: str) -> Any:
            raise RuntimeError(name)

    collector.record_llm("a", usage=Odd())
    collector.record_llm("a", usage=type.__call__(OddClass("Odd", (), {})))
    collector.record_llm("a", usage={"usage": {"prompt_tokens": 3, "cost": 1e300}})
    found = call(collector, "get_or_create_metrics", "a")
    assert (found.llm_calls, found.tokens_in, found.cost) == (3, 3, 0.0)
    assert collector.delivery().usage_unread == 2


def test_usage_without_counts_keeps_the_call_and_warns(
    collector: MetricsCollector, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    class Odd:
        def __str__(self) -> str:
            raise RuntimeError

    for _ in range(2):
        collector.record_llm("research", usage={"secret": "text", "tokens_used": 5, Odd(): 1}, model="gpt-x")
    collector.record_llm("research", usage=object())
    # The next call does not count as `usage_unread`, because `tokens_in` is given.
    collector.record_llm("research", usage={"tokens_used": 5}, tokens_in=6)
    collector.record_llm("research", usage=None)
    with pytest.raises(InvalidArgument, match="calls"):
        collector.record_llm("research", usage=object(), calls=-1)

    found = call(collector, "get_or_create_metrics", "research")
    assert (found.llm_calls, found.tokens_in, found.models["gpt-x"].calls) == (5, 6, 2)
    assert collector.delivery().usage_unread == 3
    first, second = [record.getMessage() for record in caplog.records]
    assert "Odd, secret, tokens_used" in first
    assert "text" not in first, "its content may be private"
    assert "object" in second


def test_models_beyond_the_limit_are_counted_together(
    collector: MetricsCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "MAX_ERRORS", 2)
    for _ in range(2):
        for number in range(4):
            collector.record_llm("research", tokens_in=10, tokens_out=1, model=f"m:{number}")
        collector.flush()
    found = collector.get_or_create_metrics("research")
    assert set(found.models) == {"m:0", "m:1", OTHER}
    assert found.models[OTHER] == ModelUsage(4, 40, 4, 0.0)
    assert sum(usage.tokens_in for usage in found.models.values()) == found.tokens_in == 80


# -- ranking and comparing


def test_rank_orders_agents_by_each_figure(collector: MetricsCollector, call: Call) -> None:
    for name, seconds, errors, cost in (("fast", 0.1, 0, 0.5), ("slow", 3.0, 0, 2.0), ("failing", 0.5, 2, 0.1)):
        for number in range(4):
            collector.record_execution(name, seconds, number >= errors, "E")
        collector.record_llm(name, cost=cost)
    collector.record_execution("lucky", 0.0, True)

    def order(by: str, **options: Any) -> list[str]:
        return [entry.metrics.agent_name for entry in call(collector, "rank", by, **options)]

    assert order("score") == ["lucky", "fast", "failing", "slow"]
    assert order("score", min_tasks=2) == ["fast", "failing", "slow"]
    assert order("p95") == ["slow", "failing", "fast", "lucky"]
    assert order("cost") == ["slow", "fast", "failing", "lucky"]
    assert order("error_rate")[0] == "failing"
    assert order("total_time", window="5m") == ["slow", "failing", "fast", "lucky"]
    assert call(collector, "rank", RankBy.COST)[0].value == 2.0
    with pytest.raises(InvalidArgument, match="by"):
        call(collector, "rank", "beauty")
    with pytest.raises(InvalidArgument, match="min_tasks"):
        call(collector, "rank", "score", min_tasks=-1)


def test_compare_reports_changes_between_agents(collector: MetricsCollector, call: Call) -> None:
    for _ in range(10):
        collector.record_execution("old", 2.0, True)
        collector.record_execution("new", 1.0, True)
        collector.record_llm("old", cost=0.25)
    found = call(collector, "compare", "new", "old")
    assert (found.first.agent_name, found.second.agent_name) == ("old", "new")
    change = found["p95_execution_time"]
    assert (change.first, change.second, change.ratio, change.difference, change.certain) == (2.0, 1.0, 0.5, -1.0, True)
    assert not found["success_rate"].certain
    assert found["cost_per_task"].first == 0.25
    with pytest.raises(InvalidArgument, match="other"):
        call(collector, "compare", "new")
    with pytest.raises(KeyError):
        found["beauty"]


def test_compare_uses_the_time_before_the_window(
    collector: MetricsCollector, call: Call, raw: Raw, namespace: str
) -> None:
    fill(raw, namespace, {30.0: 3, 90.0: 5, 110.0: 1})  # age in seconds: number of executions
    found = call(collector, "compare", "research", window="1m")
    assert found.first.interval.end == found.second.interval.start
    total = found.first.task_count + found.second.task_count
    assert total in (8, 9)
    assert found.second.task_count >= 3


# -- windows


def fill(
    raw: Raw, namespace: str, ages: dict[float, int], agent: str = "research", times: Iterator[float] | None = None
) -> float:
    """Count executions with the given ages in seconds, and return the server's time.

    Without `times`, the first execution of each age takes 0.1 s. Each further execution of the same age takes 1 us
    longer than the previous execution.
    """
    past = Past(raw, namespace)
    for age in sorted(ages, reverse=True):
        buffer = past.at(age)
        for number in range(ages[age]):
            buffer.record(agent, (100_000 + number) / 1e6 if times is None else next(times), OK)
    past.count()
    return past.now


WINDOWS = {"1m": 60, "5m": 300, "1h": 3600, "24h": 86_400, "7d": 7 * 86_400}


def test_burst_appears_in_every_window_that_covers_it(
    collector: MetricsCollector, call: Call, raw: Raw, namespace: str
) -> None:
    burst = fill(raw, namespace, {5.0: 40}) - 5.0
    for later in (0, 30, 59, 100, 250, 400, 1800, 3500, 4000, 40_000, 86_000, 100_000, 500_000, 700_000):
        for window, length in WINDOWS.items():
            found = call(collector, "get_or_create_metrics", "research", window=window, as_of=burst + later)
            covered = found.interval
            inside = covered.start <= burst < covered.end
            assert found.task_count == (40 if inside else 0), (window, later)
            assert inside or later > length - 1, (window, later)
            assert not inside or later < length + 11, (window, later)  # slices may begin up to 10 s before the window


def test_past_windows_use_the_remaining_slices(
    collector: MetricsCollector, call: Call, raw: Raw, namespace: str
) -> None:
    ages = {10.0: 1, 100.0: 2, 1000.0: 4, 5000.0: 8, 20_000.0: 16, 200_000.0: 32, 800_000.0: 64, 5_000_000.0: 128}
    now = fill(raw, namespace, ages)
    for age, count in ages.items():
        timestamp = now - age
        for window, length in WINDOWS.items():
            found = call(collector, "get_or_create_metrics", "research", window=window, as_of=timestamp + 1)
            covered = found.interval
            expected = sum(each for other, each in ages.items() if covered.start - 1 <= now - other < covered.end + 1)
            assert found.task_count == expected, (age, window)
            assert found.task_count >= count, "the end of the window is covered"
            assert covered.start <= timestamp + 1 - min(length, 1)
    assert call(collector, "get_or_create_metrics", "research", window="80d").task_count == sum(ages.values())
    assert call(collector, "get_or_create_metrics", "research").task_count == sum(ages.values())


@pytest.mark.servers("valkey")
def test_windows_read_few_slices(collector: MetricsCollector, raw: Raw) -> None:
    collector.record_execution("research", 0.5, True)
    collector.flush()
    for window, maximum in (("1m", 12), ("5m", 15), ("1h", 75), ("24h", 55), ("7d", 40), ("80d", 115)):
        raw.config_resetstat()
        collector.get_or_create_metrics("research", window=window)
        assert 1 <= raw.info("commandstats")["cmdstat_hgetall"]["calls"] <= maximum, window


def test_combined_windows_equal_the_combined_data(
    collector: MetricsCollector, call: Call, raw: Raw, namespace: str
) -> None:
    source = random.Random(7)
    ages = {float(age): 50 for age in range(0, 7000, 250)}
    drawn = {
        agent: [round(source.lognormvariate(0.7, 0.8) * 1e6) for _ in range(50 * len(ages))] for agent in ("one", "two")
    }
    for agent, times in drawn.items():
        fill(raw, namespace, ages, agent, (us / 1e6 for us in times))
    times = sorted(drawn["one"] + drawn["two"])

    found = call(collector, "combined", "one", "two", window="2h")

    assert found.task_count == len(times) == 2 * 50 * 28
    assert found.buckets == Counter(map(bucket_index, times)), "merged from two agents and many slices"
    assert found.total_execution_time == sum(times) / 1e6
    assert (found.min_execution_time, found.max_execution_time) == (times[0] / 1e6, times[-1] / 1e6)
    assert not found.exact
    for share in (0.01, 0.5, 0.95, 0.99, 0.999):
        exact = exact_quantile(times, share) / 1e6
        assert abs(found.quantile(share) - exact) <= found.error_bound * exact * (1 + 1e-9)


@pytest.mark.parametrize(
    "name",
    ["lognormal", *(pytest.param(name, marks=pytest.mark.thorough) for name in DISTRIBUTIONS if name != "lognormal")],
)
def test_percentiles_stay_within_their_error_bound(collector: MetricsCollector, name: str) -> None:
    """Percentiles equal those of the sorted samples, or differ by at most the reported error bound."""
    drawn = DISTRIBUTIONS[name](np.random.default_rng(11), 1_000_000)
    times = np.maximum(0, np.rint(drawn * 1e6)).astype(np.int64)
    recorded = 0
    for size in (100, 1_000, 10_000, 100_000, 1_000_000):
        for us in times[recorded:size].tolist():
            collector.record_execution(name, us / 1e6, True)
        recorded = size
        found = collector.get_or_create_metrics(name)
        assert found.task_count == size
        assert found.exact == (size <= 1_000)
        assert found.error_bound == (0.0 if found.exact else RELATIVE_ERROR)
        ordered = np.sort(times[:size])
        for share, estimate in (
            (0.5, found.p50_execution_time),
            (0.95, found.p95_execution_time),
            (0.99, found.p99_execution_time),
            (0.999, found.quantile(0.999)),
        ):
            exact = int(ordered[int(size * share)]) / 1e6
            assert abs(estimate - exact) <= found.error_bound * exact * (1 + 1e-9), (size, share)


# -- outages


@pytest.mark.thorough
@pytest.mark.waits
def test_samples_of_an_outage_count_in_their_slices(own_server: Server, connect: Callable[..., Backend]) -> None:
    """The server is paused and resumed in real time, with real clocks."""
    backend = connect(own_server.url)
    collector = MetricsCollector(backend=backend)
    ended: list[tuple[float, float]] = []
    """For each execution, two timestamps between which it ended. They may be far apart on a busy machine."""

    def record() -> None:
        begin = time.time()
        collector.record_execution("research", 0.1, True)
        ended.append((begin, time.time()))

    record()
    assert collector.flush()
    hurry(backend, 0.3)
    own_server.pause()
    end = time.monotonic() + 30.0
    while time.monotonic() < end:
        record()
        time.sleep(0.05)
    assert collector.delivery().pending == len(ended) - 1
    own_server.resume()
    wait_until(lambda: collector.delivery().pending == 0, "the server to be reached again")
    hurry(backend, 5.0)

    for timestamp in range(int(ended[0][0]) // 10 * 10, int(ended[-1][1]) + 1, 10):
        found = collector.get_or_create_metrics("research", window=10, as_of=timestamp + 10)
        assert found.interval.start == timestamp
        assert found.interval.end <= timestamp + 10, "the last slice ends now"
        certain = sum(timestamp + 0.2 <= before and after < timestamp + 9.8 for before, after in ended)
        possible = sum(timestamp - 0.2 <= after and before < timestamp + 10.2 for before, after in ended)
        assert certain <= found.task_count <= possible, "no burst at the end, and no gap before"
    assert collector.get_or_create_metrics("research", window="5m").task_count == len(ended)


def test_fork_inside_a_span_leaves_the_parent_intact(collector: MetricsCollector) -> None:
    def child() -> None:
        with collector.span("agent", "child"):
            pass
        assert collector.flush()

    with collector.track("agent"):
        in_child(child)
    report = collector.spans("agent")
    assert {span.name: span.metrics.task_count for span in report.spans} == {"": 1, "child": 1}


# -- retention

FRUGAL = Retention(slices_10s=300.0, slices_1m=900.0, slices_1h=0.0, slices_1d=0.0, recent_count=100)


SHORT_TTLS = {"schema": "2", "10s": "0ms", "1m": "1800000ms", "1h": "7200000ms", "1d": "0ms"}


def test_namespace_stores_its_retention(
    server: Server, connect: Callable[..., Backend], raw: Raw, namespace: str
) -> None:
    short = Retention(slices_10s=0.0, slices_1m=1800.0, slices_1h=7200.0, slices_1d=0.0, recent=60.0, recent_count=5)
    keeper = MetricsCollector(backend=connect(server.url), retention=short)
    other = MetricsCollector(backend=connect(server.url))
    for _ in range(10):
        keeper.record_execution("research", 0.5, True)
    keeper.flush()
    other.record_execution("research", 0.5, True)
    other.flush()

    tag = keys.metrics_tag(namespace, keys.metrics_shard("research"))
    assert {key.split(":")[3] for key in raw.keys(f"{tag}:*:research")} == {"total", "1m", "1h", "latest", "slow"}
    assert raw.hgetall(f"{tag}:settings") == SHORT_TTLS
    assert other.get_or_create_metrics("research", window="5m").task_count == 11, "reads use the stored retention"
    assert keeper.get_or_create_metrics("research", window="3d").task_count == 11
    assert not keeper.get_or_create_metrics("research").exact, "five samples are not all eleven"

    firm = MetricsCollector(backend=connect(server.url), retention=Retention())
    firm.record_execution("research", 0.5, True)
    firm.flush()
    assert raw.hget(f"{tag}:settings", "10s") == "900000ms", "the last writer's retention applies"


def test_window_beyond_the_retention_begins_with_the_oldest_slice(
    server: Server, connect: Callable[..., Backend], raw: Raw, namespace: str
) -> None:
    retention = Retention(slices_10s=0.0, slices_1m=1800.0, slices_1h=7200.0, slices_1d=0.0)
    past = Past(raw, namespace)
    for age in (5400.0, 600.0, 0.0):
        past.at(age).record("research", 0.5, "ok")
    past.count(retention)
    collector = MetricsCollector(backend=connect(server.url), retention=retention)
    for window in ("3d", "26h", "3h"):
        assert collector.get_or_create_metrics("research", window=window).task_count == 3
    assert sum(row.tasks for row in collector.series("research", window="3d", step="12h")) == 3


def test_settings_of_an_older_version_are_replaced(collector: MetricsCollector, raw: Raw, namespace: str) -> None:
    collector.record_execution("research", 0.5, True)
    collector.flush()
    key = f"{keys.metrics_tag(namespace, keys.metrics_shard('research'))}:settings"
    raw.hset(key, mapping={"10s": 0, "1m": 1_800_000, "1h": 7_200_000, "1d": 0})
    raw.hdel(key, "schema")
    assert collector.get_or_create_metrics("research", window="5m").task_count == 1
    collector.record_execution("research", 0.5, True)
    collector.flush()
    assert raw.hgetall(key) == SHORT_TTLS
    assert collector.get_or_create_metrics("research", window="5m").task_count == 2


def test_missing_ttl_is_stored_again(server: Server, connect: Callable[..., Backend], raw: Raw, namespace: str) -> None:
    key = f"{keys.metrics_tag(namespace, keys.metrics_shard('research'))}:settings"
    retention = Retention(slices_10s=0.0, slices_1m=1800.0, slices_1h=7200.0, slices_1d=0.0)
    firm, other = (MetricsCollector(backend=connect(server.url), retention=each) for each in (retention, None))
    for removed in ((), ("10s",), ("1d", "schema")):
        if removed:
            raw.hdel(key, *removed)
        for collector in (firm, other):
            collector.record_execution("research", 0.5, True)
            collector.flush()
        assert raw.hgetall(key) == SHORT_TTLS


@pytest.mark.parametrize("schema", ["", "x", "2.0", "a\r\nb"])
def test_damaged_schema_of_settings_is_named(
    collector: MetricsCollector, raw: Raw, namespace: str, schema: str
) -> None:
    key = f"{keys.metrics_tag(namespace, keys.metrics_shard('research'))}:settings"
    raw.hset(key, "schema", schema)
    collector.record_execution("research", 0.5, True)
    with pytest.raises(CorruptState, match="a schema that is no number"):
        collector.flush()
    raw.delete(key)


def test_settings_of_a_newer_version_are_refused(collector: MetricsCollector, raw: Raw, namespace: str) -> None:
    key = f"{keys.metrics_tag(namespace, keys.metrics_shard('research'))}:settings"
    raw.hset(key, mapping={"schema": 3, "10s": 0, "1m": 1_800_000, "1h": 7_200_000, "1d": 0})
    collector.record_execution("research", 0.5, True)
    for use in (collector.flush, lambda: collector.get_or_create_metrics("research", window="5m")):
        with pytest.raises(CorruptState, match="the schema 3") as met:
            use()
        assert met.value.key == key
    raw.delete(key)
    assert collector.flush(), "the record is kept until the settings can be read"


def test_outdated_raw_samples_count_as_dropped(
    backend: Backend, raw: Raw, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector = MetricsCollector(backend=backend, retention=Retention(recent=10.0))
    buffer = collector._flusher.buffer
    monkeypatch.setattr(buffer, "_clock", lambda: time.monotonic() - 60.0)
    for _ in range(5):
        collector.record_execution("research", 0.5, True)
    assert collector.flush()
    delivery = collector.delivery()
    assert (delivery.counted, delivery.samples_dropped) == (5, 5)
    assert not collector.get_or_create_metrics("research").exact


def test_conflicting_retentions_in_one_process_are_rejected(backend: Backend) -> None:
    MetricsCollector(backend=backend, retention=Retention(recent=60.0))
    MetricsCollector(backend=backend, retention=Retention(recent=60.0))
    with pytest.raises(InvalidArgument, match="retention"):
        MetricsCollector(backend=backend, retention=Retention())


# -- the flush interval


class Jobs(Background):
    """Replaces the flushing thread. It records how long the thread would sleep, and lets the test run the job."""

    def __init__(self) -> None:
        super().__init__("none")
        self.waits: list[float] = []
        self._job: Job | None = None

    def at(self, due: float, job: Job) -> bool:
        if self._job is None:
            self.waits.append(due - time.monotonic())
            self._job = job
        return True

    def let_time_pass(self) -> None:
        job, self._job = self._job, None
        assert job is not None, "the thread would never wake up"
        job()


@pytest.mark.parametrize(("chosen", "expected"), [(None, 1.0), (0.2, 0.2), (30.0, 30.0)])
def test_flushes_follow_the_chosen_interval(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, chosen: float | None, expected: float
) -> None:
    collector = MetricsCollector(backend=backend, flush_every=chosen)
    jobs = Jobs()
    monkeypatch.setattr(collector._flusher, "_jobs", jobs)
    monkeypatch.setattr(collector._flusher.presence, "begin", lambda _: None)  # no heartbeats
    collector.record_execution("research", 0.5, True)
    fails = iter([True, False, True])
    run = backend.run

    def sometimes(flow: Any, deadline: float | None = None) -> Any:
        if next(fails):
            raise BackendUnavailable("here", "not_applied", "by the test")
        return run(flow, deadline)

    monkeypatch.setattr(backend, "run", sometimes)
    jobs.let_time_pass()
    jobs.let_time_pass()
    collector.record_execution("research", 0.5, True)
    jobs.let_time_pass()
    assert [round(wait, 1) for wait in jobs.waits] == [expected, 1.0, expected, 1.0], "sooner again after a failure"
    monkeypatch.undo()
    assert collector.delivery().counted == 1


def test_reads_flush_pending_records_first(backend: Backend, call: Call) -> None:
    collector = MetricsCollector(backend=backend, flush_every=60)
    for count in (1, 2):
        collector.record_execution("research", 0.5, True)
        for window in (None, "5m", "1d"):
            assert call(collector, "get_or_create_metrics", "research", window=window).task_count == count


@pytest.mark.parametrize("flush_every", [0, 0.01, 61, math.nan, "1s", True])
def test_invalid_flush_intervals_are_rejected(backend: Backend, flush_every: Any) -> None:
    with pytest.raises(InvalidArgument, match="flush_every"):
        MetricsCollector(backend=backend, flush_every=flush_every)


def test_conflicting_flush_intervals_are_rejected(backend: Backend) -> None:
    MetricsCollector(backend=backend, flush_every=5)
    MetricsCollector(backend=backend)
    with pytest.raises(InvalidArgument, match="flush_every"):
        MetricsCollector(backend=backend, flush_every=2)


@pytest.mark.parametrize(
    ("retention", "per_second"),
    [(Retention(), 1), pytest.param(Retention(), 5, marks=pytest.mark.thorough), (FRUGAL, 1)],
)
def test_memory_forecast_is_near_used_memory(own_server: Server, retention: Retention, per_second: int) -> None:
    # Every key contains the namespace, so a longer namespace than the default would take more memory.
    with own_server.client() as raw:
        taken = fill_slices(raw, DEFAULT_NAMESPACE, retention, agents=5, per_second=per_second)
    forecast = memory_forecast(retention, agents=5, per_second=per_second)
    assert forecast.total == forecast.slices + forecast.totals + forecast.samples
    assert taken / 1.5 < forecast.total < taken * 1.5, (taken, forecast)


@pytest.mark.parametrize(
    ("field", "value"), [("agents", 0), ("per_second", 0), ("per_second", math.nan), ("spans", -1)]
)
def test_invalid_forecast_arguments_are_rejected(field: str, value: float) -> None:
    options: dict[str, Any] = {"agents": 1, "per_second": 1.0, field: value}
    with pytest.raises(InvalidArgument, match=field):
        memory_forecast(Retention(), **options)
