"""The views on a real server: order, filter, changes, memory, and parts that cannot be read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from agentperf_redis import AgentInstance, AgentPerf
from agentperf_redis.errors import BackendUnavailable, InvalidArgument
from agentperf_redis.metrics.accumulator import FAILED, OK
from agentperf_redis.views import scanning
from agentperf_redis.views.agents import AgentSort, agents, read_agent, read_agents
from agentperf_redis.views.caches import read_cache, read_caches
from agentperf_redis.views.memory import SAMPLE_KEYS, read_memory
from agentperf_redis.views.overview import MIN_TASKS, NO_CHANGES, overview, read_changes, read_overview
from agentperf_redis.views.pools import read_pool, read_pools
from tests.support.filled import Past
from tests.support.screens import fill
from tests.support.servers import Raw, Server


def test_agents_are_sorted_filtered_and_paged(perf: AgentPerf, runner: asyncio.Runner) -> None:
    for number in range(12):
        for _ in range(number + 1):
            perf.metrics.record_execution(f"job-{number:02d}", number / 10, True)
    perf.metrics.flush()
    view = runner.run(read_agents(perf, limit=3, offset=1))
    assert [row.name for row in view.rows] == ["job-10", "job-09", "job-08"]
    assert (view.matching, view.known, view.total.task_count) == (12, 12, 78)
    view = runner.run(read_agents(perf, sort="p95", descending=False, match="*-0?", limit=2))
    assert [row.name for row in view.rows] == ["job-00", "job-01"]
    assert (view.matching, view.known, view.total.task_count) == (10, 12, 78)
    assert [sum(row.sparkline) for row in view.rows] == [1, 2]
    view = runner.run(read_agents(perf, sparklines=False, sort=AgentSort.NAME))
    assert [row.name for row in view.rows] == [f"job-{number:02d}" for number in range(12)]
    assert {row.sparkline for row in view.rows} == {()}


def test_blocking_and_asyncio_readers_agree(perf: AgentPerf, runner: asyncio.Runner) -> None:
    perf.metrics.record_execution("planner", 0.25, True)
    perf.metrics.flush()
    (blocking,) = perf.backend.run(agents(perf, "1h")).rows
    (other,) = runner.run(read_agents(perf, "1h")).rows
    assert replace(other.metrics, interval=blocking.metrics.interval) == blocking.metrics
    assert (other.name, other.seen, sum(other.sparkline)) == (blocking.name, blocking.seen, sum(blocking.sparkline))


def test_wrong_arguments_send_nothing(perf: AgentPerf) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"window": "x"}, "window"),
        ({"sort": "x"}, "sort"),
        ({"limit": -1}, "limit"),
    ]
    for wrong, argument in cases:
        with pytest.raises(InvalidArgument) as refused:
            agents(perf, **wrong)
        assert refused.value.argument == argument
    with pytest.raises(InvalidArgument):
        overview(perf, None)  # type: ignore[arg-type]


def test_unknown_agent_differs_from_an_idle_one(
    perf: AgentPerf, raw: Raw, namespace: str, runner: asyncio.Runner
) -> None:
    past = Past(raw, namespace)
    past.at(3000).record("idle", 0.5, OK)
    past.count()
    found = runner.run(read_agent(perf, "idle", "5m"))
    assert (found.known, found.metrics.task_count) == (True, 0)
    assert found.seen == pytest.approx(past.now - 3000, abs=60)
    assert not runner.run(read_agent(perf, "unknown", "5m")).known
    assert runner.run(read_overview(perf, "5m")).idle == 1


def test_agent_that_only_runs_is_known(
    perf: AgentPerf, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentperf_redis.metrics.flusher.MIN_AGE_S", 0.0)
    with perf.metrics.track("hung"):
        perf.metrics.workers()  # sends a heartbeat, which names the running execution
        found = runner.run(read_agent(perf, "hung", "5m"))
    assert (found.known, found.metrics.task_count, len(found.running)) == (True, 0, 1)


def test_changes_name_what_got_worse(perf: AgentPerf, raw: Raw, namespace: str, runner: asyncio.Runner) -> None:
    past = Past(raw, namespace)
    for number in range(2 * MIN_TASKS):
        buffer = past.at(5400 - number)
        for name in ("slower", "faster", "steady", "failing", "gone"):
            buffer.record(name, 1.0, OK)
    for number in range(2 * MIN_TASKS):
        buffer = past.at(600 - number)
        buffer.record("slower", 2.0, OK)
        buffer.record("faster", 0.5, OK)
        buffer.record("steady", 1.0, OK)
        buffer.record("failing", 1.0, f"{FAILED}:E" if number % 4 == 0 else OK)
        buffer.record("new", 1.0, OK)
    past.at(500).record("rare", 9.0, OK)
    past.count()
    found = runner.run(read_changes(perf))
    assert [(move.agent, move.figure, move.worse) for move in found.moves] == [
        ("failing", "failure rate", True),
        ("slower", "p95", True),
        ("faster", "p95", False),
    ]
    assert (found.appeared, found.vanished) == (("new", "rare"), ("gone",))
    compared = perf.metrics.compare("slower", window="1h")["p95_execution_time"]
    assert found.moves[1].change == compared


def test_new_namespace_has_no_changes(perf: AgentPerf, runner: asyncio.Runner) -> None:
    assert runner.run(read_changes(perf)) == NO_CHANGES
    perf.metrics.record_execution("planner", 0.25, True)
    assert runner.run(read_changes(perf)) == NO_CHANGES
    assert runner.run(read_overview(perf, charts=False, known_changes=NO_CHANGES)).steps == ()


def test_narrow_slices_that_are_not_kept_make_wider_steps(
    perf: AgentPerf, raw: Raw, namespace: str, runner: asyncio.Runner
) -> None:
    perf.metrics.record_execution("planner", 0.25, True)
    perf.metrics.flush()
    for shard in range(16):
        settings = {"schema": 2, "10s": "0ms", "1m": "10800000ms", "1h": "691200000ms", "1d": "7776000000ms"}
        raw.hset(f"{namespace}:{{metrics:{shard:02d}}}:settings", mapping=settings)
    view = runner.run(read_agent(perf, "planner", "10m"))
    assert [round(step.interval.seconds) for step in view.steps[:2]] == [60, 60]
    assert sum(step.tasks for step in view.steps) == 1


def test_damaged_part_hides_no_other(perf: AgentPerf, raw: Raw, namespace: str, runner: asyncio.Runner) -> None:
    held = fill(perf)
    raw.set(f"{namespace}:{{lb:other}}:state", "x")
    raw.zadd(f"{namespace}:resources", {"lb:other": 1})
    found = runner.run(read_overview(perf))
    assert [fault.part for fault in found.faults] == ["pools"]
    assert (found.total.task_count, len(found.caches), found.pools) == (51, 2, ())
    assert [fault.part for fault in runner.run(read_pools(perf)).faults] == ["pools"]
    assert runner.run(read_pool(perf, "coder")) is not None
    perf.balancer().release(held)


def test_fault_keeps_the_name_of_a_pool_or_cache(
    perf: AgentPerf, raw: Raw, namespace: str, runner: asyncio.Runner
) -> None:
    perf.balancer().register_instance(AgentInstance("a", "my_pool"))
    perf.cache("my_cache").put("a", 1)
    for name in ("lb:my_pool", "cache:my_cache"):
        raw.set(f"{namespace}:{{{name}}}:history", "x")
    assert [fault.part for fault in runner.run(read_pools(perf)).faults] == ["history of pool my_pool"]
    assert [fault.part for fault in runner.run(read_caches(perf)).faults] == ["history of lru cache my_cache"]


def test_entries_of_a_large_cache_are_read_in_part(
    perf: AgentPerf, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = perf.cache("answers", max_size=5000)
    cache.put_many({f"key {number}": number for number in range(3000)}, tags=("all",))
    cache.flush()
    view = runner.run(read_cache(perf, "answers"))
    assert view is not None
    assert view.entries is not None
    assert (view.entries.scanned, view.entries.complete) == (3000, True)
    assert [(use.tag, use.entries) for use in view.entries.tags] == [("all", 3000)]
    monkeypatch.setattr("agentperf_redis.views.caches.MAX_SCANNED", 1000)
    view = runner.run(read_cache(perf, "answers"))
    assert view is not None
    assert view.entries is not None
    assert not view.entries.complete
    assert 1000 <= view.entries.scanned < 3000
    assert runner.run(read_cache(perf, "answers", entries=False)).entries is None  # type: ignore[union-attr]


@pytest.mark.privileged
def test_memory_is_shown_by_kind(perf: AgentPerf, raw: Raw, namespace: str, runner: asyncio.Runner) -> None:
    held = fill(perf)
    cache = perf.cache("big", max_size=5000)
    cache.put_many({f"key {number}": "x" * 500 for number in range(3 * SAMPLE_KEYS)})
    cache.flush()
    found = runner.run(read_memory(perf))
    kinds = {kind.kind: kind for kind in found.kinds}
    assert next(iter(kinds)) == "cache big"
    exact = sum(raw.memory_usage(key) for key in raw.scan_iter(f"{namespace}:{{cache:big}}:*"))
    assert kinds["cache big"].bytes == pytest.approx(exact, rel=0.1)
    assert kinds["cache big"].keys > 3 * SAMPLE_KEYS
    assert sum(kind.share for kind in found.kinds) == pytest.approx(1)
    assert {"metrics, slices of a minute", "pool coder", "alerts", "tiered cache docs"} <= set(kinds)
    assert found.complete
    assert found.used is not None
    assert found.used > kinds["cache big"].bytes
    assert (found.agents, found.faults) == (2, ())
    assert found.forecast.total > 0
    assert found.retention.slices_10s == 900.0
    perf.balancer().release(held)


@pytest.mark.privileged
def test_memory_of_a_large_namespace_is_read_in_part(
    perf: AgentPerf, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = perf.cache("big", max_size=5000)
    cache.put_many({f"key {number}": number for number in range(3000)})
    monkeypatch.setattr(scanning, "MAX_PAGES", 1)
    found = runner.run(read_memory(perf))
    assert not found.complete
    assert found.kinds


@pytest.mark.standalone  # on a Cluster, each node has its own users
def test_user_without_scan_sees_the_rest(
    perf: AgentPerf, server: Server, raw: Raw, namespace: str, runner: asyncio.Runner
) -> None:
    held = fill(perf)
    raw.execute_command(
        "ACL", "SETUSER", "me", "on", ">secret", f"~{namespace}:*", f"&{namespace}:*", "+@all", "-scan", "-info"
    )

    async def read() -> None:
        async with AgentPerf(server.url.replace("://", "://me:secret@"), namespace=namespace) as other:
            found = await read_memory(other)
            assert (found.used, found.kinds, found.complete) == (None, (), False)
            assert {fault.part for fault in found.faults} == {"memory by kind", "memory of the server"}
            assert len(found.caches) == 2
            assert found.forecast.total > 0

    runner.run(read())
    perf.balancer().release(held)


def test_outage_is_raised(start_server: Callable[..., Server], namespace: str, runner: asyncio.Runner) -> None:
    server = start_server()

    async def read() -> None:
        async with AgentPerf(server.url, namespace=namespace, deadline=0.3) as perf:
            await read_overview(perf)
            server.kill()
            for reading in (read_overview(perf), read_agents(perf), read_caches(perf), read_pools(perf)):
                with pytest.raises(BackendUnavailable):
                    await reading

    runner.run(read())
