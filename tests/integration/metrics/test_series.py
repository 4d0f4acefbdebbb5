"""Metrics over time on a real server: the rows of a series equal windows of the same time ranges."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.errors import BackendUnavailable, CorruptState, InvalidArgument
from agentperf_redis.metrics import series as series_module
from agentperf_redis.metrics.accumulator import CANCELLED, FAILED, OK
from agentperf_redis.metrics.client import MetricsCollector
from agentperf_redis.metrics.histogram import RELATIVE_ERROR
from agentperf_redis.metrics.model import OTHER, PerformanceMetrics
from agentperf_redis.metrics.retention import Retention
from agentperf_redis.metrics.series import SeriesRow, merged_rows
from agentperf_redis.windows import MAX_STEPS, asked_time, window_seconds
from tests.support.calls import Call
from tests.support.examples import examples
from tests.support.filled import Past
from tests.support.servers import Raw, Server, new_namespace

DAY_S = 86_400.0
SHARE_BOUND = RELATIVE_ERROR * (1 + 1e-9)


@pytest.fixture
def collector(backend: Backend) -> MetricsCollector:
    return MetricsCollector(backend=backend)


def assert_equal(row: SeriesRow, window: PerformanceMetrics) -> None:
    """Check that a row and a window of the same time range have the same data."""
    if window.interval.seconds:  # `seconds` is 0 if no slice of the time range is kept
        assert row.interval.start == window.interval.start
    assert (row.tasks, row.errors, row.cancelled) == (window.task_count, window.failure_count, window.cancelled_count)
    assert (row.tokens_in, row.tokens_out, row.cost) == (window.tokens_in, window.tokens_out, window.cost)
    assert (row.buckets, row.zeros) == (window.buckets, window.zeros)
    assert row.error_types == window.error_types
    assert (row.total_time, row.avg, row.max) == (
        window.total_execution_time,
        window.avg_execution_time,
        window.max_execution_time,
    )
    assert row.min == (window.min_execution_time if window.task_count else 0.0)
    for share, ours in ((0.5, row.p50), (0.95, row.p95), (0.99, row.p99), (0.3, row.quantile(0.3))):
        assert abs(ours - window.quantile(share)) <= SHARE_BOUND * window.quantile(share)


OUTCOMES = st.sampled_from([OK, OK, FAILED, f"{FAILED}:TimeoutError", f"{FAILED}:no tool: é%20", CANCELLED])
RECORDS = st.lists(
    st.tuples(
        st.one_of(st.floats(0.0, 100.0), st.floats(0.0, 3000.0), st.floats(0.0, 5 * DAY_S)),
        st.one_of(st.just(0.0), st.floats(0.000001, 30.0)),
        OUTCOMES,
        st.integers(0, 2000),
    ),
    max_size=30,
)
TIMES = st.sampled_from(
    [
        ("2m", "10s", None),
        ("5m", "1m", None),
        ("10m", "90s", None),
        ("1h", "10m", None),
        ("3d", "12h", None),
        ("6d", "2d", None),
        ("4m", "1m", 250.0),
        ("4m", "30s", 33.0),
        ("2d", "7h", 1.2 * DAY_S),
        ("5m", "1m", -120.0),
        ("1h", "20m", -DAY_S),
    ]
)


@examples(12, 150)
def test_rows_equal_windows_of_their_steps(server: Server, raw: Raw, examples: int) -> None:
    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(records=RECORDS, times=TIMES)
    def check(records: list[tuple[float, float, str, int]], times: tuple[str, str, float | None]) -> None:
        namespace = new_namespace("series")
        past = Past(raw, namespace)
        for age, seconds, outcome, tokens in sorted(records, reverse=True):
            past.at(age).record("research", seconds, outcome)
            past.buffer.add("research", {"tok_in": tokens, "tok_out": 1, "cost_nano": tokens * 10**9})
        past.count()
        window, step, age_of_end = times
        as_of = None if age_of_end is None else past.now - age_of_end
        with contextlib.closing(Backend(server.url, namespace=namespace)) as backend:
            collector = MetricsCollector(backend=backend)
            rows = collector.series("research", window=window, step=step, as_of=as_of)
            assert all(isinstance(row, SeriesRow) for row in rows)
            length = window_seconds(step)
            for row, following in itertools.pairwise(rows):
                assert row.interval.end == following.interval.start == row.interval.start + length
            for row in rows:
                end = row.interval.start + length
                assert_equal(row, collector.get_or_create_metrics("research", window=step, as_of=end))
            if rows:
                total = merged_rows(rows)
                both = collector.get_or_create_metrics(
                    "research",
                    window=rows[-1].interval.start + length - rows[0].interval.start,
                    as_of=rows[-1].interval.start + length,
                )
                assert_equal(total, both)

    check()


def test_rows_cover_the_window_and_end_now(collector: MetricsCollector, call: Call, raw: Raw, namespace: str) -> None:
    past = Past(raw, namespace)
    past.at(150.0).record("research", 2.0, OK)
    past.at(0.0).record("research", 1.0, FAILED)
    past.count()
    rows = call(collector, "series", "research", window="5m", step="1m")
    now = Past(raw, namespace).now
    assert len(rows) in (5, 6)
    assert all(row.interval.start % 60 == 0 for row in rows)
    assert rows[0].interval.start <= past.now - 300 + 60
    assert past.now - 1 < rows[-1].interval.end <= now + 0.002, "the current step ends now"
    assert sum(row.tasks for row in rows) == 2
    assert sum(row.errors for row in rows) == 1
    empty = [row for row in rows if not row.tasks]
    assert len(empty) == len(rows) - 2
    for row in empty:
        assert row == SeriesRow(row.interval)
        assert (row.p50, row.p99, row.avg, row.max, row.min, row.tokens, row.cost, row.error_bound) == (0,) * 8


def test_series_of_all_agents_contains_each_agent(
    collector: MetricsCollector, call: Call, raw: Raw, namespace: str
) -> None:
    past = Past(raw, namespace)
    names = [f"agent {number}" for number in range(40)]
    for age in (200.0, 20.0):
        for number, name in enumerate(names):
            past.at(age).record(name, 1.0 + number, OK)
    past.count()
    found = call(collector, "series", window="10m", step="1m")
    assert list(found) == sorted(names)
    assert {sum(row.tasks for row in rows) for rows in found.values()} == {2}
    assert len({tuple(row.interval.start for row in rows) for rows in found.values()}) == 1, "all have the same steps"
    some = call(collector, "series", iter([*names[:2], "unknown"]), window="10m", step="1m")
    assert list(some) == [*names[:2], "unknown"]
    assert sum(row.tasks for row in some["unknown"]) == 0
    assert {len(rows) for rows in some.values()} <= {10, 11}
    assert call(collector, "series", (), window="10m", step="1m") == {}
    whole = merged_rows(row for rows in found.values() for row in rows)
    combined = collector.combined(window="10m")
    assert (whole.tasks, whole.buckets) == (combined.task_count, combined.buckets) == (80, combined.buckets)


def test_other_is_added_over_all_shards(collector: MetricsCollector, call: Call, raw: Raw, namespace: str) -> None:
    for shard in (1, 2):
        tag = keys.metrics_tag(namespace, shard)
        now = time.gmtime(Past(raw, namespace).now)
        raw.zadd(f"{tag}:agents", {OTHER: 1})
        raw.hset(f"{tag}:settings", mapping={"10s": 0, "1m": 0, "1h": 0, "1d": 90 * 86_400_000})
        raw.hset(f"{tag}:1d:{time.strftime('%Y-%m-%d', now)}:{OTHER}", mapping={"n": 3, "ok": 3, "h:5": 3})
    for rows in (
        call(collector, "series", OTHER, window="1d", step="1d"),
        call(collector, "series", window="1d", step="1d")[OTHER],
    ):
        assert sum(row.tasks for row in rows) == 6
        assert merged_rows(rows).buckets == {5: 6}


def test_empty_namespace_has_no_series(collector: MetricsCollector, call: Call) -> None:
    assert call(collector, "series") == {}
    rows = call(collector, "series", "nobody", window="1m", step="10s")
    assert len(rows) in (6, 7)
    assert merged_rows(rows).tasks == 0


def test_own_pending_records_are_counted_first(backend: Backend, call: Call) -> None:
    collector = MetricsCollector(backend=backend, flush_every=60)
    collector.record_execution("research", 0.5, True)
    assert merged_rows(call(collector, "series", "research", window="1m", step="10s")).tasks == 1


@pytest.mark.parametrize(
    ("window", "step", "needed"), [("1h", "10s", "1m"), ("1d", "1m", "1h"), ("1d", "90m", "1h"), ("20d", "6h", "1d")]
)
def test_step_without_kept_slices_is_refused(
    collector: MetricsCollector, call: Call, window: str, step: str, needed: str, raw: Raw, namespace: str
) -> None:
    past = Past(raw, namespace)
    past.at(1.0).record("research", 0.1, OK)
    past.count()
    with pytest.raises(InvalidArgument, match=f"multiple of {needed}") as met:
        call(collector, "series", "research", window=window, step=step)
    assert met.value.argument == "step"


def test_other_retention_decides_which_steps_are_kept(
    server: Server, connect: Callable[..., Backend], call: Call
) -> None:
    retention = Retention(slices_10s=7200.0, slices_1m=0.0, slices_1h=0.0, slices_1d=0.0)
    collector = MetricsCollector(backend=connect(server.url), retention=retention)
    collector.record_execution("research", 0.5, True)
    collector.flush()
    for step in ("10s", "20s", "1m", "15m", "1h"):
        assert merged_rows(call(collector, "series", "research", window="1h", step=step)).tasks == 1
    assert merged_rows(call(collector, "series", "research", window="1d", step="1h")).tasks == 1, (
        "older steps are empty"
    )


@pytest.mark.parametrize(
    ("argument", "args", "options"),
    [
        ("agent_or_agents", ("",), {}),
        ("agent_or_agents", (7,), {}),
        ("agent_or_agents", (["a", ""],), {}),
        ("agent_or_agents", (b"a",), {}),
        ("window", ("a",), {"window": None}),
        ("window", ("a",), {"window": "soon"}),
        ("step", ("a",), {"step": None}),
        ("step", ("a",), {"step": "1x"}),
        ("step", ("a",), {"step": 15}),
        ("step", ("a",), {"step": "2h"}),
        ("step", ("a",), {"window": 10.0 * (MAX_STEPS + 1), "step": 10}),
        ("as_of", ("a",), {"as_of": "yesterday"}),
    ],
)
def test_invalid_arguments_are_rejected(
    collector: MetricsCollector, call: Call, argument: str, args: Any, options: Any
) -> None:
    with pytest.raises(InvalidArgument, match=argument) as met:
        call(collector, "series", *args, **options)
    assert met.value.argument == argument


@pytest.mark.servers("valkey")
def test_series_takes_one_round_trip_a_shard(collector: MetricsCollector, raw: Raw, namespace: str) -> None:
    past = Past(raw, namespace)
    for number in range(20):
        past.at(1.0).record(f"agent-{number}", 0.1, OK)
    past.count()
    collector.series(window="5m")  # loads the script
    raw.config_resetstat()
    collector.series(window="5m")
    calls = {name: each["calls"] for name, each in raw.info("commandstats").items()}
    shards = len({keys.metrics_shard(f"agent-{number}") for number in range(20)})
    assert calls["cmdstat_evalsha"] == shards
    assert calls["cmdstat_zrange"] == keys.METRICS_SHARDS, "one listing"


@pytest.mark.parametrize("damage", ["text", "type", "settings"])
def test_damaged_slice_is_named(collector: MetricsCollector, call: Call, raw: Raw, namespace: str, damage: str) -> None:
    past = Past(raw, namespace)
    past.at(125.0).record("research", 0.1, OK)  # in a past minute, so the one-minute slice is read
    past.count()
    tag = keys.metrics_tag(namespace, keys.metrics_shard("research"))
    damaged = f"{tag}:settings"
    if damage == "settings":
        raw.hset(damaged, "10s", "x")
    else:
        (damaged,) = raw.keys(f"{tag}:1m:*:research")
        if damage == "text":
            raw.hset(damaged, "h:0", "x")
        else:
            raw.delete(damaged)
            raw.set(damaged, "x")
    with pytest.raises(CorruptState) as met:
        call(collector, "series", "research", window="5m")
    assert met.value.key == damaged


def test_huge_sums_are_read_as_the_largest_integer(
    collector: MetricsCollector, call: Call, raw: Raw, namespace: str
) -> None:
    past = Past(raw, namespace)
    past.at(125.0).record("research", 0.1, OK)  # in a past minute, so the one-minute slice is read
    past.count()
    tag = keys.metrics_tag(namespace, keys.metrics_shard("research"))
    (minute,) = raw.keys(f"{tag}:1m:*:research")
    raw.hset(minute, mapping={"tok_in": "1.5e+17", "cost_nano": "1e+23", "n": "100000000000001"})
    row = merged_rows(call(collector, "series", "research", window="5m"))
    assert (row.tokens_in, row.tasks) == (150_000_000_000_000_000, 100_000_000_000_001)
    assert row.cost == 9223372036854774784 / 1e9
    assert (row.errors, row.max) == (0, 0.1)


def test_step_with_many_models_is_short(collector: MetricsCollector, call: Call, raw: Raw, namespace: str) -> None:
    for number in range(60):
        collector.record_llm("research", model=f"model {number}", tokens_in=2, tokens_out=3, cost=0.5)
    collector.record_execution("research", 0.25, False, "Timeout Error")
    collector.flush()
    row = merged_rows(call(collector, "series", "research", window="5m"))
    assert (row.tokens_in, row.tokens_out, row.cost) == (120, 180, 30.0)
    assert (row.tasks, row.errors, sum(row.buckets.values()), row.max) == (1, 1, 1, 0.25)
    shard, name = keys.metrics_shard("research"), keys.metrics_series("research")
    reply: Any = None

    def note(answer: Any) -> Any:
        nonlocal reply
        reply = answer

    command = series_module.read_series(namespace, shard, (name,), asked_time("5m", None), 60_000)
    collector._backend.run(type(command)(command.script, command.keys, command.args, note))
    assert b"mdl:" not in reply[5]
    assert len(reply[5]) < 400


def test_unreachable_server_is_reported(own_server: Server, connect: Callable[..., Backend], call: Call) -> None:
    collector = MetricsCollector(backend=connect(own_server.url, deadline=0.3))
    own_server.kill()
    with pytest.raises(BackendUnavailable):
        call(collector, "series", "research")
