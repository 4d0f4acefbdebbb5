"""All ways to see a namespace show the same numbers of one moment: views, --json, /metrics and the terminal view."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from agentperf_redis import AgentPerf
from agentperf_redis.cli.agents import plain_agent
from agentperf_redis.export.prometheus import Exporter
from agentperf_redis.metrics.model import Interval, PerformanceMetrics
from agentperf_redis.views.agents import AgentView, read_agent, read_agents
from agentperf_redis.views.alerts import read_alerts
from agentperf_redis.views.caches import read_cache, read_caches
from agentperf_redis.views.overview import Overview, read_overview
from agentperf_redis.views.pools import read_pool, read_pools
from agentperf_redis.views.text import seconds_cell
from tests.support import exposition
from tests.support.commandline import Run, document
from tests.support.exposition import Exposed
from tests.support.screens import WIDE, fill, screen

WINDOW = "1h"


@dataclass(frozen=True)
class Moment:
    """A namespace at rest: nothing records, reads or leases any more.

    Attributes:
        at: the end of all windows, s since 1970.
        overview: its overview.
        exposed: the page of the exporter.
    """

    at: float
    overview: Overview
    exposed: Exposed


@pytest.fixture
def moment(perf: AgentPerf, runner: asyncio.Runner) -> Iterator[Moment]:
    held = fill(perf)
    at = time.time() + 60  # in the future, so that the window contains everything that was recorded
    overview = runner.run(read_overview(perf, WINDOW, as_of=at))
    _, _, body = Exporter(perf).answer("GET", "/metrics")
    yield Moment(at, overview, exposition.plain(body.decode()))
    perf.balancer().release(held)


def numbers(metrics: PerformanceMetrics) -> PerformanceMetrics:
    """Return metrics without the end of their window. That end is the time of the read, so it differs between reads."""
    return replace(metrics, interval=Interval(metrics.interval.start, 0.0))


def plain_numbers(agent: dict[str, Any]) -> dict[str, Any]:
    """Return the --json output of an agent without its rate, which depends on the time of the read."""
    return {name: value for name, value in agent.items() if name != "throughput_per_s"}


def words(moment: Moment) -> tuple[str, ...]:
    return "--window", WINDOW, "--as-of", str(moment.at), "--json"


def test_agents_are_the_same_everywhere(
    moment: Moment, perf: AgentPerf, agentperf: Run, runner: asyncio.Runner
) -> None:
    view = runner.run(read_agents(perf, WINDOW, as_of=moment.at))
    api = perf.metrics.snapshots(window=WINDOW, as_of=moment.at)
    assert {row.name: numbers(row.metrics) for row in view.rows} == {name: numbers(each) for name, each in api.items()}
    assert [numbers(row.metrics) for row in view.rows] == [numbers(row.metrics) for row in moment.overview.agents]
    printed = document(agentperf("agents", *words(moment)), "agents")["agents"]
    assert {each["agent"]: plain_numbers(each) for each in printed} == {
        row.name: plain_numbers(plain_agent(row.metrics)) for row in view.rows
    }
    assert {each["agent"]: each["throughput_per_s"] for each in printed} == {
        row.name: pytest.approx(row.rate, rel=0.1) for row in view.rows
    }
    for row in view.rows:
        shown = document(agentperf("show", row.name, *words(moment)), "show")
        found = (shown["tasks"], shown["failures"], shown["cancelled"], shown["p99_s"], shown["cost"])
        assert found == (row.tasks, row.errors, row.metrics.cancelled_count, row.p99, row.cost)
        assert sum(row.sparkline) == row.tasks
        assert_exposed(moment.exposed, row.metrics)


def assert_exposed(exposed: Exposed, metrics: PerformanceMetrics) -> None:
    """Check the counters of an agent. All its executions must be in the window."""
    name = metrics.agent_name
    counts = {"success": metrics.success_count, "failure": metrics.failure_count, "cancelled": metrics.cancelled_count}
    for outcome, count in counts.items():
        found = exposed.of("agentperf_agent_executions_total").get(
            frozenset({("agent", name), ("outcome", outcome)}), 0
        )
        assert found == count
    assert exposed.value("agentperf_agent_execution_seconds_count", agent=name) == metrics.task_count
    total = exposed.value("agentperf_agent_execution_seconds_sum", agent=name)
    assert total == pytest.approx(metrics.total_execution_time, abs=1e-6)
    for error, count in metrics.error_types.items():
        assert exposed.value("agentperf_agent_errors_total", agent=name, error_type=error) == count
    for model, usage in metrics.models.items():
        tokens = {"input": usage.tokens_in, "output": usage.tokens_out}
        for kind, count in tokens.items():
            assert exposed.value("agentperf_agent_tokens_total", agent=name, model=model, type=kind) == count
        assert exposed.value("agentperf_agent_cost_total", agent=name, model=model) == pytest.approx(usage.cost)


def test_totals_are_the_same_everywhere(moment: Moment, perf: AgentPerf, agentperf: Run) -> None:
    total, api = moment.overview.total, perf.metrics.combined(window=WINDOW, as_of=moment.at)
    assert numbers(total) == numbers(api)
    assert total.task_count == sum(row.tasks for row in moment.overview.agents)
    assert sum(step.tasks for step in moment.overview.steps) == total.task_count
    assert sum(step.errors for step in moment.overview.steps) == total.failure_count
    status = document(agentperf("status", *words(moment)), "status")["summary"]
    assert (status["tasks"], status["failures"]) == (total.task_count, total.failure_count)
    line = document(agentperf("top", "--count", "1", "--window", WINDOW, "--json"), "top")
    found = [line[name] for name in ("tasks", "failures", "p50_s", "p95_s", "p99_s", "tokens_in", "tokens_out", "cost")]
    assert found == [
        *(total.task_count, total.failure_count),
        *(total.p50_execution_time, total.p95_execution_time, total.p99_execution_time),
        *(total.tokens_in, total.tokens_out, total.cost),
    ]
    assert line["problems"] == [each.plain for each in moment.overview.problems]


def test_one_agent_is_the_same_everywhere(
    moment: Moment, perf: AgentPerf, agentperf: Run, runner: asyncio.Runner
) -> None:
    view: AgentView = runner.run(read_agent(perf, "planner", WINDOW, as_of=moment.at))
    api = perf.metrics.get_or_create_metrics("planner", window=WINDOW, as_of=moment.at)
    assert numbers(view.metrics) == numbers(api)
    step = f"{round(view.steps[0].interval.seconds)}s"
    rows = perf.metrics.series("planner", window=WINDOW, step=step, as_of=moment.at)
    assert view.steps[:-1] == rows[:-1]
    # The last step ends at the time of the read, so its interval differs between the two reads.
    assert view.steps[-1] == replace(rows[-1], interval=view.steps[-1].interval)
    printed = document(agentperf("series", "planner", "--step", step, *words(moment)), "series")["rows"]
    assert [(row["start"], row["tasks"], row["errors"], row["p95_s"]) for row in printed] == [
        (row.interval.start, row.tasks, row.errors, row.p95) for row in view.steps
    ]
    assert sum(sum(band.counts) for band in view.heatmap.bands) == view.metrics.task_count
    errors: dict[str, int] = {}
    for row in view.steps:
        for error, count in row.error_types.items():
            errors[error] = errors.get(error, 0) + count
    assert errors == view.metrics.error_types == {"TimeoutError": 10}
    spans = perf.metrics.spans("planner", window=WINDOW, as_of=moment.at)
    assert [(span.path, span.self_time, numbers(span.metrics)) for span in view.spans.spans] == [
        (span.path, span.self_time, numbers(span.metrics)) for span in spans.spans
    ]
    assert view.slowest == perf.metrics.slowest("planner")
    assert view.recent == perf.metrics.recent("planner")


def test_caches_are_the_same_everywhere(
    moment: Moment, perf: AgentPerf, agentperf: Run, runner: asyncio.Runner
) -> None:
    view = runner.run(read_caches(perf))
    assert sorted((row.stats for row in view.rows), key=lambda stats: stats.name) == perf.caches()
    assert {row.name: row.stats for row in moment.overview.caches} == {row.name: row.stats for row in view.rows}
    printed = {each["cache"]: each for each in document(agentperf("cache", "list", "--json"), "cache list")["caches"]}
    for row in view.rows:
        stats, labels = row.stats, {"cache": row.name, "kind": row.kind}
        listed = printed[row.name]
        assert (listed["entries"], listed["hits"], listed["misses"]) == (stats.size, stats.hits, stats.misses)
        requests = {"hit": stats.hits, "miss": stats.misses}
        for result, count in requests.items():
            assert moment.exposed.value("agentperf_cache_requests_total", **labels, result=result) == count
        assert moment.exposed.value("agentperf_cache_bytes", **labels) == stats.bytes == listed["bytes"]
        one = runner.run(read_cache(perf, row.name, kind=row.kind))
        assert one is not None
        assert one.row.stats == stats
    assert runner.run(read_cache(perf, "none")) is None


def test_pools_are_the_same_everywhere(moment: Moment, perf: AgentPerf, agentperf: Run, runner: asyncio.Runner) -> None:
    view = runner.run(read_pools(perf))
    assert [row.status for row in view.rows] == perf.balancer().status()
    (row,) = view.rows
    (printed,) = document(agentperf("lb", "status", "--json"), "lb status")["pools"]
    assert (
        (printed["load"], printed["capacity"], printed["waiting"])
        == (row.load, row.capacity, row.waiters)
        == (1, 12, 0)
    )
    for name, value in (("load", row.load), ("capacity", row.capacity), ("waiters", row.waiters)):
        assert moment.exposed.value(f"agentperf_pool_{name}", pool="coder") == value
    one = runner.run(read_pool(perf, "coder"))
    assert one is not None
    assert one.row.status == row.status
    reasons: dict[str, Any] = {
        each["instance"]: (each["out_since"], each["out_reason"]) for each in printed["instances"]
    }
    assert {each.name: (each.since, each.reason or None) for each in one.row.instances} == reasons
    assert reasons["coder-2"][0] is not None
    (lease,) = one.leases.leases
    (held,) = document(agentperf("lb", "leases", "coder", "--json"), "lb leases")["leases"]
    assert (held["token"], held["fence"]) == (lease.token, lease.fence)
    assert runner.run(read_pool(perf, "none")) is None


def test_alerts_are_the_same_everywhere(
    moment: Moment, perf: AgentPerf, agentperf: Run, runner: asyncio.Runner
) -> None:
    view = runner.run(read_alerts(perf))
    api = perf.alerts.list()
    assert sorted(view.alerts, key=lambda alert: alert.target) == sorted(api.alerts, key=lambda alert: alert.target)
    printed = document(agentperf("alerts", "list", "--json"), "alerts list")["alerts"]
    assert {each["target"]: (each["state"], each["value"]) for each in printed} == {
        each.target: (each.state.value, each.value) for each in view.alerts
    }
    assert view.firing == len(moment.overview.firing) == 1
    assert list(view.events) == list(perf.alerts.log())[::-1]


@pytest.mark.thorough
def test_terminal_view_shows_these_numbers(moment: Moment, perf: AgentPerf, runner: asyncio.Runner) -> None:
    async def body() -> None:
        async with screen(perf, WIDE, window=WINDOW) as shown:
            for row in moment.overview.agents:
                about = "" if row.exact else "≈"
                percentiles = (f"{about}{seconds_cell(value or 0.0)}" for value in (row.p50, row.p95, row.p99))
                await shown.shows(row.name, str(row.tasks), f"{row.failure_rate:.1%}", *percentiles)
            await shown.press("2")
            for cache in moment.overview.caches:
                await shown.shows(cache.name, str(cache.stats.size), str(cache.stats.hits), str(cache.stats.misses))
            await shown.press("3")
            (pool,) = moment.overview.pools
            await shown.shows(pool.name, f"{pool.load}/{pool.capacity}", f"{pool.load_share:.1%}")

    runner.run(body())
