"""Many open pages cost the server of the namespace no more than one page, and leave nothing behind."""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest

from agentperf_redis import AgentPerf
from agentperf_redis.views import agents, overview
from agentperf_redis.web import app
from tests.support.every_command import fill, release
from tests.support.servers import Raw, Server
from tests.support.web import Browser, OpenPage, small_site

AGENTS = 1000


def fill_with_agents(perf: AgentPerf) -> None:
    """Record executions of many agents."""
    for number in range(AGENTS):
        perf.metrics.record_execution(f"agent-{number}", 0.001 * number, number % 7 != 0, "TimeoutError")
    assert perf.metrics.flush()


def calls(raw: Raw) -> int:
    """Return how many commands the server has executed so far, for clients and in scripts."""
    return sum(each["calls"] for name, each in raw.info("commandstats").items() if name != "cmdstat_info")


def connections(raw: Raw) -> int:
    return len(raw.client_list())


def resident_kb() -> int:
    gc.collect()
    (line,) = (each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmRSS"))
    return int(line.split()[1])


def filtered(number: int) -> str:
    """Return one of many addresses that show the agents. They differ in filter, order and page number."""
    order = ("name", "tasks", "p95", "last_seen")[number % 4]
    return f"/agents?sort={order}&match={'plan*'[: 1 + number % 5]}&page={number // 10}&n={number}"


@pytest.mark.thorough
@pytest.mark.parametrize(("actions", "of_agents"), [(False, False), (True, False), (False, True)])
def test_twenty_pages_cost_what_one_costs(
    own_server: Server,
    namespace: str,
    runner: asyncio.Runner,
    monkeypatch: pytest.MonkeyPatch,
    actions: bool,
    of_agents: bool,
) -> None:
    """With actions, each browser gets its own page, with its own CSRF token. These pages still share their reads.

    Pages of agents that differ in filter, order and page number also share their reads.
    """
    perf, interval, reads = AgentPerf(own_server.url, namespace=namespace), 0.1, [0]
    token = fill(perf)
    assert token
    view: Any = agents if of_agents else overview
    read_name = "read_all_agents" if of_agents else "read_overview"
    read = getattr(view, read_name)

    async def counted(*args: object, **options: object) -> object:
        reads[0] += 1
        return await read(*args, **options)

    monkeypatch.setattr(view, read_name, counted)
    site = app(perf, allow_actions=actions, refresh=interval)

    async def cost(pages: int, refreshes: int = 12) -> tuple[float, int, float]:
        """Return the commands per read, the number of reads, and the largest number of reads that sharing allows."""
        async with AsyncExitStack() as stack:
            for number in range(pages):
                browser, page = Browser(runner, site), filtered(number) if of_agents else "/"
                reply = await browser.sending("GET", page, {"accept": "text/html"})
                assert (reply.status, bool(browser.cookies)) == (200, actions)
                await stack.enter_async_context(OpenPage(browser, page))
            while len(site.state.live) < (pages if actions or of_agents else 1):
                await asyncio.sleep(0.01)
            with own_server.client() as raw:
                assert connections(raw) < 15, "pages have no connections of their own"
                before, first, began = calls(raw), reads[0], time.monotonic()
                while reads[0] < first + refreshes:
                    await asyncio.sleep(interval / 20)
                made, intervals = reads[0] - first, (time.monotonic() - began) / interval
                await asyncio.sleep(0)
                # A result is shared for 0.9 intervals, so the beginnings of two reads lie at least that far apart, and
                # n such distances hold at most n + 1 reads. One more read may have been due before the measurement.
                return (calls(raw) - before) / made, made, intervals / 0.9 + 2

    async def both() -> None:
        async with asyncio.timeout(180):
            await cost(1, 3)  # a warm-up, which also reads the data that is rarely refreshed
            one, twenty = await cost(1), await cost(20)
        assert twenty[0] <= 1.2 * one[0] + 5, f"{twenty[0]:.0f} commands a read with 20 pages, {one[0]:.0f} with one"
        assert twenty[1] <= twenty[2], "the pages share their reads"

    runner.run(both())
    assert (site.state.live.pages, len(site.state.live)) == (0, 0)
    release(perf)
    runner.run(perf.aclose())


def test_different_filters_share_the_reads_of_agents(
    perf: AgentPerf, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted(f"plan-{number}" for number in range(150))
    for number, name in enumerate(names):
        perf.metrics.record_execution(name, 0.001 * number, number % 7 != 0, "TimeoutError")
    assert perf.metrics.flush()
    windows: list[object] = []
    drawn: list[str] = []
    read_all_agents, read_sparklines = agents.read_all_agents, agents.read_sparklines

    async def counted(perf: AgentPerf, window: Any) -> Any:
        windows.append(window)
        return await read_all_agents(perf, window)

    async def noted(perf: AgentPerf, names: list[str], window: Any) -> Any:
        drawn.extend(names)
        return await read_sparklines(perf, names, window)

    monkeypatch.setattr(agents, "read_all_agents", counted)
    monkeypatch.setattr(agents, "read_sparklines", noted)
    browser = Browser(runner, app(perf, refresh=3600.0))  # nothing is read again during the test
    pages = [browser.get(filtered(number)) for number in range(20)]
    assert [page.status for page in pages] == [200] * 20
    assert len({page.text for page in pages}) == 20
    assert windows == ["10m"]
    assert sorted(drawn) == names, "the executions of each agent are read step by step once"
    assert browser.get("/agents?window=5m").status == 200
    assert windows == ["10m", "5m"]


@pytest.mark.thorough
@pytest.mark.waits
def test_ten_minutes_leave_nothing_behind(perf: AgentPerf, runner: asyncio.Runner, raw: Raw) -> None:
    """Twenty pages of 6 kinds get 300 refreshes, as many as in ten minutes. Their numbers change at each refresh."""
    fill(perf)
    site = app(perf, refresh=0.05)
    paths = ["/", "/agents", "/agent?name=planner", "/caches", "/pools", "/alerts"]

    async def test() -> None:
        browser, sizes = Browser(runner, site), []
        async with AsyncExitStack() as stack:
            pages = [await stack.enter_async_context(OpenPage(browser, paths[n % len(paths)])) for n in range(20)]
            for refresh in range(300):
                seen = pages[1].events
                await asyncio.to_thread(record, refresh)
                await pages[1].wait(seen + 1)
                if refresh in (100, 299):
                    sizes.append((resident_kb(), len(asyncio.all_tasks()), connections(raw)))
            assert all(page.events for page in pages)
            assert site.state.live.pages == len(pages)
            assert len(site.state.live) == len(paths)
        (kb_before, tasks_before, sockets_before), (kb_after, tasks_after, sockets_after) = sizes
        # If each refresh kept one copy of each page, the copies would take 12 MB.
        assert kb_after - kb_before < 8_000, f"{kb_before} kB, later {kb_after} kB"
        assert tasks_after - tasks_before < 100  # if each refresh from 101 to 299 left a task, 199 tasks would stay
        assert sockets_after <= sockets_before + 2
        assert (site.state.live.pages, len(site.state.live)) == (0, 0)
        assert len(site.state.views.shared) < 30

    def record(number: int) -> None:
        perf.metrics.record_execution("planner", 0.01 * (number % 50), success=True)
        assert perf.metrics.flush()

    runner.run(test())
    release(perf)


@pytest.mark.thorough
def test_first_page_of_a_thousand_agents_is_small(perf: AgentPerf, runner: asyncio.Runner) -> None:
    fill_with_agents(perf)
    browser, sizes = Browser(runner, app(perf)), {}
    for path in ("/", "/agents"):
        page = browser.get(path, accept_encoding="gzip")
        assert page.status == 200
        sizes[path] = page.sent
        for link in page.resources():
            reply = browser.get(urljoin(path, link), accept_encoding="gzip", accept="*/*")
            assert reply.status == 200, link
            sizes[path] += reply.sent
    assert max(sizes.values()) <= 200_000, sizes


def test_charts_of_many_agents_have_fewer_steps() -> None:
    assert [overview.max_steps(agents) for agents in (0, 1, 100, 1000, 10_000)] == [30, 30, 30, 10, 6]


def test_closed_page_frees_its_place(perf: AgentPerf, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentperf_redis.web.live.MAX_PAGES", 2)
    site = small_site(perf)

    async def test() -> None:
        browser = Browser(runner, site)
        async with OpenPage(browser) as first, OpenPage(browser) as second:
            await first.wait()
            await second.wait()
            reply = await browser.sending("GET", "/live?page=/", {})
            assert (reply.status, reply.headers["retry-after"]) == (503, "60")
        async with OpenPage(browser) as third:
            await third.wait()
            assert third.status == 200

    runner.run(test())
