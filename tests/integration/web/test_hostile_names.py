"""Names that users choose never become markup, wherever a page shows them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from urllib.parse import urlencode

import pytest

from agentperf_redis import AgentInstance, AgentPerf
from agentperf_redis.web import app
from tests.support.markup import parsed
from tests.support.web import TOKEN, Browser, OpenPage

BAD = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> /..?#%00&amp;"
"""A name with everything that could end a text, an attribute, a path or a query."""
LABEL = "<b>gpu</b>"
RULES = """
[[alert]]
name = "x"
agents = "*"
when = "failure_rate > 1%"
min_events = 1
"""


@pytest.fixture
def named_badly(perf: AgentPerf) -> Iterator[AgentPerf]:
    metrics, lb = perf.metrics, perf.balancer()
    metrics.record_execution(BAD, 0.1, success=True)
    metrics.record_execution(BAD, 0.2, success=False, error_type=BAD)
    metrics.record_llm(BAD, model=BAD, tokens_in=3, cost=0.25)
    with metrics.span(BAD, BAD):
        pass
    cache = perf.cache(BAD, max_size=7)
    cache.get_or_compute(BAD, lambda: BAD, tags=[BAD])
    cache.get(BAD)
    cache.flush()
    lb.register_instance(AgentInstance(BAD, BAD, max_capacity=2, labels=frozenset({LABEL})))
    held = lb.acquire(BAD)
    assert held is not None
    with metrics.track(BAD):
        time.sleep(0)
        metrics.flush()
        perf.alerts.deploy(text=RULES)
        assert perf.alerts.evaluate(as_of=time.time() + 120).events
        yield perf
    lb.release(held)


@pytest.mark.parametrize("actions", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_no_page_contains_markup_of_a_name(named_badly: AgentPerf, runner: asyncio.Runner, actions: bool) -> None:
    browser = Browser(runner, app(named_badly, allow_actions=actions))
    name = urlencode({"name": BAD})
    shown = {
        "/": 1,
        "/agents": 1,
        f"/agent?{name}": 3,
        "/caches": 1,
        f"/cache?{name}": 2,
        "/pools": 1,
        f"/pool?{name}": 2,
    }
    shown |= {"/alerts": 1, "/memory": 0, f"/agents?{urlencode({'match': BAD})}": 1}
    shown |= {f"/agent?{urlencode({'name': BAD + 'x'})}": 1, f"/agents?{urlencode({'window': BAD})}": 0}
    links: set[str] = set()
    for path, times in shown.items():
        reply = browser.get(path)
        assert reply.status == (400 if "window" in path else 200), path
        page = parsed(reply.text)
        assert page.active == [], path
        assert page.text.replace("\u200b", "").count("<script>alert(1)</script>") >= times, path
        links |= page.links
    assert LABEL in parsed(browser.get(f"/pool?{name}").text).text
    followed = [link for link in links if not link.startswith(("/static", "/actions", "#", "/log"))]
    assert len(followed) > 20
    for link in sorted(followed)[:80]:
        assert browser.get(link).status in (200, 404), link


def test_live_page_contains_no_markup_of_a_name(named_badly: AgentPerf, runner: asyncio.Runner) -> None:
    browser = Browser(runner, app(named_badly, refresh=0.1))

    async def test() -> None:
        async with OpenPage(browser, f"/agent?{urlencode({'name': BAD})}") as page:
            await page.wait()
            assert page.last.startswith("<main")
            assert parsed(page.last).active == []
            assert "alert(1)" in parsed(page.last).text

    runner.run(test())


def test_page_of_another_address_is_not_shown_in_the_login(perf: AgentPerf, runner: asyncio.Runner) -> None:
    browser = Browser(runner, app(perf, token=TOKEN))
    reply = browser.get(f"/login?{urlencode({'next': '/' + BAD})}")
    assert parsed(reply.text).active == []
