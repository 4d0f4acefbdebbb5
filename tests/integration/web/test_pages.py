"""The pages show what the views read, each number with its unit. Where there is no data, they say what to do."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest

from agentperf_redis import AgentInstance, AgentPerf
from agentperf_redis.cache.commands import inspection
from agentperf_redis.errors import CorruptState
from agentperf_redis.metrics.accumulator import OK
from agentperf_redis.views.timeline import WINDOWS
from agentperf_redis.web import app
from agentperf_redis.web.pages import rendering
from agentperf_redis.web.pages.pools import pool
from tests.support.filled import Past
from tests.support.markup import parsed
from tests.support.proxy import Proxy
from tests.support.servers import Raw
from tests.support.web import Browser

MENU = ("/", "/agents", "/caches", "/pools", "/alerts", "/memory")
RULES = """
[[alert]]
name = "coder fails"
agents = "coder"
when = "failure_rate > 5%"
min_events = 1
"""


@pytest.fixture
def browser(perf: AgentPerf, runner: asyncio.Runner) -> Browser:
    return Browser(runner, app(perf, refresh=0.05))


@pytest.fixture
def filled(perf: AgentPerf) -> Iterator[AgentPerf]:
    metrics, lb = perf.metrics, perf.balancer()
    for number in range(20):
        with metrics.span("coder", "write"):
            pass
        failed = number % 4 == 0
        metrics.record_execution("coder", 0.5 + number / 10, not failed, "TimeoutError" if failed else None)
    metrics.record_execution("planner", 0.002, True)
    metrics.record_llm("coder", model="m-1", tokens_in=1200, tokens_out=34, cost=0.5)
    metrics.flush()
    answers = perf.cache("answers", max_size=10)
    answers.put("question", random.Random(1).randbytes(5000), tags=["faq"])
    assert answers.get("question") is not None
    answers.flush()
    for number in (1, 2):
        lb.register_instance(AgentInstance(f"coder-{number}", "coder", max_capacity=2, labels=frozenset({"gpu"})))
    lb.mark_unhealthy("coder", "coder-2")
    held = lb.acquire("coder")
    assert held is not None
    perf.alerts.deploy(text=RULES)
    assert perf.alerts.evaluate(as_of=time.time() + 60).events
    yield perf
    with suppress(CorruptState):  # one of the tests damages the pool
        lb.release(held)


def words(html: str) -> str:
    """Return the visible text with single spaces."""
    return " ".join(parsed(html).text.split())


def test_pages_answer_with_nothing_stored(browser: Browser) -> None:
    advice = {
        "/": "with perf.metrics.track",
        "/agents": "with perf.metrics.track",
        "/caches": "perf.cache(",
        "/pools": "lb.register_instance(",
        "/alerts": "agentperf alerts deploy",
        "/memory": "no rate to forecast",
    }
    for path in MENU:
        reply = browser.get(path)
        assert reply.status == 200, path
        assert advice[path] in words(reply.text), path


@pytest.mark.parametrize("path", ["/cache?name=none", "/pool?name=none"])
def test_page_of_a_missing_object_says_so(browser: Browser, path: str) -> None:
    reply = browser.get(path)
    assert reply.status == 404
    assert "There is no" in words(reply.text)


def test_page_of_an_unknown_agent_says_so(browser: Browser) -> None:
    reply = browser.get("/agent?name=nobody")
    assert reply.status == 200
    assert "No records of this agent" in words(reply.text)


@pytest.mark.parametrize(
    "query", ["window=soon", "sort=height", "order=up", "page=-1", "match=" + "x" * 300, "window=0s", "window=99999d"]
)
def test_invalid_address_is_refused_with_the_reason(browser: Browser, query: str) -> None:
    reply = browser.get(f"/agents?{query}")
    assert reply.status == 400
    found = words(reply.text)
    assert f"{query.partition('=')[0]} is" in found
    assert "allowed" in found


def test_overview_shows_the_totals(browser: Browser, filled: AgentPerf) -> None:
    found = words(browser.get("/").text)
    assert "21 executions" in found
    assert "76.2%" in found
    assert "1,200 in, 34 out" in found
    assert re.search(r"Alert coder fails: .* since \w{3} \d+ [\d:]{8} UTC", found)
    assert "1 of 2 instances takes no work: coder-2 unhealthy" in found
    assert "nothing to compare with yet" in found


def test_overview_shows_what_changed(browser: Browser, raw: Raw, namespace: str) -> None:
    past = Past(raw, namespace)
    for age, seconds in ((5400.0, 0.5), (600.0, 2.0)):
        for _ in range(100):
            past.at(age).record("coder", seconds, OK)
    past.at(300.0).record("<new>", 1.0, OK)
    past.count()
    page = parsed(browser.get("/").text)
    assert ["coder", "p95", "500 ms", "2.00 s", "▲ 4.0× worse"] in page.rows
    assert "New:<new>" in page.text


def test_table_of_agents_has_a_row_for_each(browser: Browser, filled: AgentPerf) -> None:
    page = parsed(browser.get("/agents").text)
    name, _, tasks, _, failed, p50, *_ = page.row("coder")
    assert (name, tasks, failed, p50) == ("coder", "20", "25.0%", "1.50 s")
    assert page.row("planner")[5] == "2.00 ms"


def test_last_seen_uses_the_clock_of_the_server(
    browser: Browser, perf: AgentPerf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of this machine is two days fast."""
    perf.metrics.record_llm("coder", model="m-1", tokens_in=12)  # a model call without an execution
    perf.metrics.flush()
    monkeypatch.setattr(rendering, "time", SimpleNamespace(time=lambda: time.time() + 2 * 86_400))
    assert " d ago" not in words(browser.get("/agents").text)
    page = words(browser.get("/agent?name=coder").text)
    assert "The last one ended" in page
    assert " d ago" not in page


def test_sorted_column_is_marked(browser: Browser, filled: AgentPerf) -> None:
    def agents(query: str) -> list[str]:
        html = browser.get(f"/agents?{query}").text
        assert html.count("aria-sort") == 1
        return [row[0] for row in parsed(html).rows[1:]]

    assert agents("sort=p95") == ["coder", "planner"]
    assert agents("sort=p95&order=asc") == ["planner", "coder"]
    assert agents("sort=name") == ["coder", "planner"]
    assert agents("match=plan*") == ["planner"]
    assert 'aria-sort="ascending"' in browser.get("/agents?sort=name").text


def test_filter_without_a_match_offers_all(browser: Browser, filled: AgentPerf) -> None:
    assert "No agent has a name like" in words(browser.get("/agents?match=zzz&window=1h").text)
    assert "/agents?window=1h" in parsed(browser.get("/agents?match=zzz&window=1h").text).links


def test_page_of_an_agent_shows_errors_spans_and_models(browser: Browser, filled: AgentPerf) -> None:
    page = parsed(browser.get("/agent?name=coder").text)
    assert page.row("TimeoutError") == ["TimeoutError", "5", "25.0%"]
    assert page.row("write")[0] == "write"
    assert page.row("m-1") == ["m-1", "1", "1,200", "34", "0.5"]
    assert "p50 1.50 s" in " ".join(page.text.split())


def test_page_of_a_cache_shows_keys_and_tags(browser: Browser, filled: AgentPerf) -> None:
    page = parsed(browser.get("/cache?name=answers&kind=lru").text)
    assert page.row("faq") == ["faq", "1", "4.9 KiB"]
    assert page.row("cold")[2:4] == ["1", "10"]


def test_entries_of_a_cache_are_read_less_often(
    browser: Browser, filled: AgentPerf, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, read = [], inspection.sizes_page

    def counted(*args: Any) -> Any:
        reads.append(args)
        return read(*args)

    monkeypatch.setattr(inspection, "sizes_page", counted)
    browser.get("/cache?name=answers")
    filled.cache("answers", max_size=10).put("other", 1)
    time.sleep(0.1)  # two refresh intervals
    page = parsed(browser.get("/cache?name=answers&window=1h").text)
    assert page.row("cold")[2] == "2"
    assert page.row("faq")[1] == "1"
    assert len(reads) == 1


def test_damaged_entries_do_not_hide_the_cache(browser: Browser, filled: AgentPerf, raw: Raw, namespace: str) -> None:
    raw.set(f"{namespace}:{{cache:answers}}:epochs", "x")
    reply = browser.get("/cache?name=answers")
    assert reply.status == 200
    assert "The entries could not be read" in words(reply.text)
    assert "Hit rate over time" in words(reply.text)


def test_alert_leads_to_its_tiered_cache(browser: Browser, perf: AgentPerf) -> None:
    docs = perf.tiered_cache("docs")
    docs.put("page", "text")
    perf.alerts.deploy(text='[[alert]]\nname = "docs grow"\ncache = "docs"\nwhen = "size > 0"\n')
    assert perf.alerts.evaluate(as_of=time.time() + 60).events
    page = parsed(browser.get("/alerts").text)
    assert page.row("✕ firing")[2] == "cache docs (tiered)"
    (link,) = (each for each in page.links if each.startswith("/cache?"))
    assert "Tiered cache" in words(browser.get(link).text)


def test_problem_leads_to_the_cache_of_its_kind(browser: Browser, perf: AgentPerf) -> None:
    perf.cache("docs").put("page", "text")
    docs = perf.tiered_cache("docs")
    for number in range(1000):
        docs.get(str(number))
    docs.flush()
    page = parsed(browser.get("/").text)
    assert "only 0.0% of 1000 reads found a value" in page.text
    (link,) = {each for each in page.links if each.startswith("/cache?") and "kind=lru" not in each}
    assert "Tiered cache" in words(browser.get(link).text)


def test_overview_shows_an_alert_when_nothing_else_is_left(browser: Browser, perf: AgentPerf) -> None:
    perf.metrics.record_execution("coder", 0.1, False, "TimeoutError")
    perf.metrics.flush()
    perf.alerts.deploy(text=RULES)
    assert perf.alerts.evaluate(as_of=time.time() + 60).events
    assert perf.metrics.forget("coder")
    assert "Alert coder fails" in words(browser.get("/").text)


@pytest.mark.parametrize("path", ["/agents", "/caches", "/pools", "/alerts"])
def test_page_after_the_last_row_says_so(browser: Browser, filled: AgentPerf, path: str) -> None:
    page = parsed(browser.get(f"{path}?page=3").text)
    assert "This page is after the last" in page.text
    assert path in page.links
    assert "301 to" not in page.text


def test_page_of_a_pool_says_which_instance_is_out_and_why(browser: Browser, filled: AgentPerf) -> None:
    page = parsed(browser.get("/pool?name=coder").text)
    assert "marked unhealthy by hand" in next(row[1] for row in page.rows if row and row[0] == "coder-2")
    # The row of a lease has four cells, and the third cell is a time in seconds.
    assert "coder-1" in next(row[0] for row in page.rows if len(row) == 4 and row[2].endswith("s"))
    assert any(row[1] == "✕ unhealthy" for row in page.rows if len(row) > 1)


def test_instances_of_a_large_pool_are_shown_page_by_page(
    browser: Browser, filled: AgentPerf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pool.__globals__, "MAX_INSTANCES", 2)
    for number in (3, 4, 5):
        filled.balancer().register_instance(AgentInstance(f"coder-{number}", "coder"))

    def shown(page: int) -> list[str]:
        rows = parsed(browser.get(f"/pool?name=coder&page={page}").text).rows
        return [row[0] for row in rows if len(row) == 8 and row[0] != "Instance"]

    assert [shown(page) for page in range(3)] == [["coder-2", "coder-1"], ["coder-3", "coder-4"], ["coder-5"]]
    first = browser.get("/pool?name=coder")
    assert "1 to 2 of 5 instances" in words(first.text)
    assert "/pool?name=coder&page=1" in parsed(first.text).links
    assert "after the last instance" in words(browser.get("/pool?name=coder&page=3").text)


def test_firing_alerts_come_first(browser: Browser, filled: AgentPerf) -> None:
    page = parsed(browser.get("/alerts").text)
    first = page.rows[1]
    assert (first[0], first[1], first[2]) == ("✕ firing", "coder fails", "agent coder")
    assert first[5] == "25.00%"
    assert "1 alert fires" in " ".join(page.text.split())


@pytest.mark.privileged
def test_page_of_memory_names_what_takes_the_space(browser: Browser, filled: AgentPerf) -> None:
    page = parsed(browser.get("/memory").text)
    assert page.row("cache answers")[3].endswith("KiB")
    assert "Time slices" in page.text


def test_window_is_kept_in_all_links(browser: Browser, filled: AgentPerf) -> None:
    page = parsed(browser.get("/agents?window=1h").text)
    inside = {each for each in page.links if each.startswith(("/agent", "/cache", "/pool", "/alerts")) and "?" in each}
    assert inside
    others = {f"/agents?window={each}" for each in WINDOWS}
    assert all("window=1h" in each for each in inside - others)


def test_every_page_works_without_script_and_inline_style(browser: Browser, filled: AgentPerf) -> None:
    """Follow all links of all pages. `Markup.active` lists everything that a strict policy (CSP) would forbid."""
    seen, waiting = set[str](), {"/"}
    while waiting:
        path = waiting.pop()
        seen.add(path)
        reply = browser.get(path)
        assert reply.status == 200, path
        page = parsed(reply.text)
        assert page.active == [], path
        assert len(re.findall(r"<h1[ >]", reply.text)) == 1, path
        found = {each for each in page.links if each.startswith("/") and not each.startswith("/static/")}
        waiting |= {each for each in found if each not in seen and "window=" not in each and "sort=" not in each}
    assert len(seen) >= 10


def test_ids_of_a_page_are_unique(browser: Browser, filled: AgentPerf) -> None:
    for path in (*MENU, "/agent?name=coder", "/cache?name=answers", "/pool?name=coder"):
        html = browser.get(path).text
        found = re.findall(r' id="([^"]+)"', html)
        assert len(found) == len(set(found)), path
        assert set(re.findall(r'aria-labelledby="([^"]+)"', html)) <= set(found), path


def test_damaged_part_does_not_hide_the_others(browser: Browser, filled: AgentPerf, raw: Raw, namespace: str) -> None:
    key = next(iter(raw.scan_iter(f"{namespace}:{{lb:coder}}:state")))
    raw.unlink(key)
    raw.set(key, "no hash")
    reply = browser.get("/")
    assert reply.status == 200
    found = words(reply.text)
    assert "The pools could not be read" in found
    assert "21 executions" in found


def test_unreachable_server_is_named_with_the_time(proxy: Proxy, namespace: str, runner: asyncio.Runner) -> None:
    perf = AgentPerf(proxy.url, namespace=namespace, deadline=0.5)
    browser = Browser(runner, app(perf, refresh=0.05))
    try:
        assert browser.get("/agents").status == browser.get("/memory").status == 200
        proxy.close_port()
        proxy.cut()
        since = set()
        for path in (*MENU[:5], "/agent?name=coder"):
            browser.get("/memory")  # this reply is not checked, because it may show data up to a minute old
            reply = browser.get(path)
            assert reply.status == 503, path
            found = words(reply.text)
            since |= set(re.findall(r"has been unreachable since (\w{3} \d+ [\d:]{8} UTC)", found))
            assert perf.backend.address.masked in found
            assert 'http-equiv="refresh"' in reply.text
        assert len(since) == 1
        proxy.open_port()
        deadline = time.monotonic() + 30
        while browser.get("/agents").status != 200:
            assert time.monotonic() < deadline
    finally:
        runner.run(perf.aclose())


@pytest.mark.thorough
def test_agents_are_shown_a_hundred_a_page(browser: Browser, perf: AgentPerf) -> None:
    for number in range(250):
        perf.metrics.record_execution(f"agent-{number:03d}", 0.1, True)
    perf.metrics.flush()
    first, last = browser.get("/agents?sort=name").text, browser.get("/agents?sort=name&page=2").text
    assert [row[0] for row in parsed(first).rows[1:]] == [f"agent-{number:03d}" for number in range(100)]
    assert [row[0] for row in parsed(last).rows[1:]] == [f"agent-{number:03d}" for number in range(200, 250)]
    assert "1 to 100 of 250 agents" in words(first)
    assert "/agents?sort=name&page=1" in parsed(first).links
    assert "Next page" not in words(last)
