"""The web page, the API, `--json` and `/metrics` show the same numbers at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from agentperf_redis import AgentInstance, AgentPerf
from agentperf_redis.web import app
from agentperf_redis.web.pages.text import cost, duration, number, share, size
from tests.support import exposition
from tests.support.commandline import Run, document
from tests.support.markup import parsed
from tests.support.web import Browser

WINDOW = "3h"


@pytest.fixture
def used(perf: AgentPerf) -> Iterator[AgentPerf]:
    """A namespace in which nothing changes during the test."""
    for number_ in range(1200):
        agent = f"agent-{number_ % 7}"
        perf.metrics.record_execution(agent, 0.0013 * number_, number_ % 5 != 0, "TimeoutError" if number_ % 3 else "E")
        perf.metrics.record_llm(agent, model="m", tokens_in=11 * number_, tokens_out=7, cost=0.000123 * number_)
    assert perf.metrics.flush()
    cache = perf.cache("answers", max_size=100)
    for number_ in range(120):
        cache.get_or_compute(f"key {number_ % 90}", lambda: "x" * 1000)
    cache.flush()
    lb = perf.balancer()
    lb.register_instance(AgentInstance("i0", "coder", max_capacity=5))
    lb.register_instance(AgentInstance("i1", "coder", max_capacity=4))
    lb.mark_unhealthy("coder", "i1")
    held = [lb.acquire("coder") for _ in range(3)]
    yield perf
    for each in held:
        assert each is not None
        lb.release(each)


def test_page_shows_the_numbers_of_the_api(used: AgentPerf, runner: asyncio.Runner, agentperf: Run) -> None:
    browser = Browser(runner, app(used))
    page = parsed(browser.get(f"/agents?window={WINDOW}").text)
    snapshots = used.metrics.snapshots(window=WINDOW)
    listed = document(agentperf("agents", "--window", WINDOW, "--json"), "agents")["agents"]
    assert len(snapshots) == len(listed) == 7
    for plain in listed:
        name = plain["agent"]
        row, api = page.row(name), snapshots[name]
        for column, figure in (
            (2, number(api.task_count)),
            (4, share(api.failure_rate)),
            (5, duration(api.p50_execution_time)),
            (6, duration(api.p95_execution_time)),
            (7, duration(api.p99_execution_time)),
            (8, number(api.tokens_in + api.tokens_out)),
            (9, cost(api.cost)),
        ):
            assert row[column] == figure, (name, column)
        assert (plain["tasks"], plain["p95_s"]) == (api.task_count, api.p95_execution_time)
    overview = parsed(browser.get(f"/?window={WINDOW}").text).text
    total = used.metrics.summary(window=WINDOW)
    for figure in (number(total.total_tasks), share(total.total_successes / total.total_tasks)):
        assert figure in overview


def test_page_shows_the_caches_and_pools_of_the_api(used: AgentPerf, runner: asyncio.Runner) -> None:
    browser = Browser(runner, app(used))
    (cache,) = used.caches()
    row = parsed(browser.get("/caches").text).row("answers")
    assert (row[3], row[4], row[5]) == (share(cache.hit_rate), number(cache.hits), number(cache.misses))
    assert (row[7], row[8]) == (number(cache.size), size(cache.bytes))
    (pool,) = used.balancer().status("coder")
    row = parsed(browser.get("/pools").text).row("coder")
    assert row[4] == f"{number(pool.current_load)} of {number(pool.total_capacity)}"
    assert (row[7], row[8][-1]) == (number(len(pool.instances)), "1")


def test_metrics_have_the_numbers_of_the_api(used: AgentPerf, runner: asyncio.Runner) -> None:
    exposed = exposition.plain(Browser(runner, app(used)).get("/metrics", accept="text/plain").text)
    for name, api in used.metrics.snapshots().items():
        assert exposed.value("agentperf_agent_executions_total", agent=name, outcome="success") == api.success_count
        assert exposed.value("agentperf_agent_executions_total", agent=name, outcome="failure") == api.failure_count
    (cache,) = used.caches()
    assert exposed.value("agentperf_cache_requests_total", cache="answers", kind="lru", result="hit") == cache.hits
