"""The pages in headless Chromium: narrow and wide, light and dark, with much or no data, and without a server."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlencode

import pytest

from agentperf_redis import AgentInstance, AgentPerf
from agentperf_redis.metrics.accumulator import FAILED, OK
from tests.support import chromium
from tests.support.dashboard import dashboard
from tests.support.filled import Past
from tests.support.fleet import RULES, Fleet
from tests.support.programs import Programs
from tests.support.servers import Raw, Server, wait_until

pytestmark = [pytest.mark.thorough, pytest.mark.servers("valkey")]

ODD = "a/b?c=d#e f&g\"h'<script>alert(1)</script>%2F..;é"
"""A name with every character that means something in an address or in HTML."""
Looks: TypeAlias = Sequence[tuple[int, bool]]
MENU = [
    (name, f"/{name}".replace("/overview", "/"))
    for name in ("overview", "agents", "caches", "pools", "alerts", "memory")
]


@pytest.fixture(autouse=True)
def _browser() -> None:
    chromium.require()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder for screenshots. To keep them, name a folder in AGENTPERF_TEST_SCREENSHOTS."""
    return Path(os.environ.get("AGENTPERF_TEST_SCREENSHOTS", tmp_path))


@pytest.fixture
def looks(pytestconfig: pytest.Config) -> Looks:
    """The looks of the screenshots: all of them with ``--everything``, otherwise each width and each colour once."""
    return chromium.LOOKS if pytestconfig.getoption("--everything") else chromium.LOOKS[:2]


@pytest.fixture
def origin(server: Server, namespace: str, tmp_path: Path) -> Iterator[str]:
    """The dashboard of the test's namespace."""
    with dashboard(server.url, namespace, tmp_path / "dashboard.log") as found:
        yield found


def named(route: str, **names: str) -> str:
    return f"/{route}?{urlencode(names)}"


@pytest.mark.waits
def test_pages_of_a_working_fleet(
    server: Server, namespace: str, origin: str, folder: Path, tmp_path: Path, looks: Looks
) -> None:
    async def check() -> list[str]:
        async with AgentPerf(server.url, namespace=namespace) as perf:
            await perf.alerts.aio.deploy(text=RULES)
            work = asyncio.create_task(Fleet(perf, 1, seconds=12.0).run())
            await asyncio.sleep(11.0)
            await perf.alerts.aio.evaluate()
            await perf.alerts.aio.silence("coder is slow", "1h")
            pages = [
                *MENU,
                ("agent", named("agent", name="coder")),
                ("cache", named("cache", name="answers", kind="lru")),
                ("tiered", named("cache", name="pages", kind="tiered")),
                ("pool", named("pool", name="coder")),
                ("hour", "/agents?window=1h&sort=p95&order=asc&match=o"),
            ]
            wrong = await chromium.screenshots(origin, pages, folder, "fleet", looks)
            with dashboard(server.url, namespace, tmp_path / "acting.log", "--allow-actions") as acting:
                wrong += await chromium.screenshots(acting, [MENU[4], *pages[6:10]], folder, "actions", looks)
            await work
            return wrong

    assert asyncio.run(check()) == []


@pytest.mark.waits
def test_pages_of_a_running_demo(
    programs: Programs, raw: Raw, server: Server, namespace: str, origin: str, folder: Path, looks: Looks
) -> None:
    programs.write("demo.py", "from agentperf_redis.cli import main\n\nmain()\n")
    words = ("--url", server.url, "--namespace", namespace, "--files", "400", "--workers", "2")
    demo = programs.start("demo", "demo", *words)
    pools = f"{namespace}:{{lb:summariser}}:state"
    wait_until(lambda: demo.poll() is not None or raw.exists(pools), "the demo to work")
    pages = [
        *MENU[:4],
        ("agent", named("agent", name="reader")),
        ("cache", named("cache", name="files", kind="lru")),
        ("pool", named("pool", name="reader")),
    ]
    assert asyncio.run(chromium.screenshots(origin, pages, folder, "demo", looks)) == []


def test_pages_of_a_thousand_agents(
    raw: Raw, server: Server, namespace: str, origin: str, folder: Path, looks: Looks
) -> None:
    past, source = Past(raw, namespace), random.Random(1)
    for age in (6000.0, 600.0, 300.0, 100.0, 30.0):
        buffer = past.at(age)
        for number in range(1000):
            for _ in range(source.randrange(1, 4)):
                outcome = f"{FAILED}:TimeoutError" if source.random() < number / 5000 else OK
                buffer.record(f"team-{number % 17}/agent-{number:04d}", source.lognormvariate(0, 1), outcome)
    past.count()
    pages = [
        *MENU[:2],
        ("last", "/agents?page=9&sort=name"),
        ("agent", named("agent", name="team-0/agent-0000")),
        MENU[5],
    ]
    assert asyncio.run(chromium.screenshots(origin, pages, folder, "thousand", looks)) == []


def test_pages_of_nothing(origin: str, folder: Path, looks: Looks) -> None:
    pages = [
        *MENU,
        ("agent", named("agent", name="nobody")),
        ("cache", named("cache", name="nothing")),
        ("pool", named("pool", name="nothing")),
        ("invalid", "/agents?window=yesterday"),
    ]
    wrong = asyncio.run(chromium.screenshots(origin, pages, folder, "nothing", looks))
    reported = ("400 (Bad Request)", "404 (Not Found)")  # expected statuses, which the browser reports as errors
    assert [each for each in wrong if not any(status in each for status in reported)] == []


def test_pages_without_a_server(own_server: Server, tmp_path: Path, folder: Path, looks: Looks) -> None:
    with dashboard(own_server.url, "agentperf", tmp_path / "log") as origin:
        own_server.kill()
        pages = [*MENU, ("agent", named("agent", name="coder"))]
        assert asyncio.run(chromium.screenshots(origin, pages, folder, "away", looks)) == []


def test_token_opens_the_wanted_page_until_log_out(
    perf: AgentPerf, server: Server, namespace: str, tmp_path: Path, folder: Path, looks: Looks
) -> None:
    perf.metrics.record_execution("coder", 0.1, success=True)
    perf.metrics.flush()
    token = "correct-horse-battery"

    async def check(origin: str) -> list[str]:
        wrong = await chromium.screenshots(origin, [("login", "/login?next=/agents")], folder, "token", looks)
        async with chromium.browsing(origin) as visit:
            await visit.open("/agents?window=1h")
            for text in ("not the token at all", token):
                await visit.page.get_by_label("Token").fill(text)
                await visit.page.keyboard.press("Enter")
                await visit.page.wait_for_load_state("load")
            await visit.page.wait_for_url("**/agents?window=1h")
            assert await visit.page.locator("tbody th").all_inner_texts() == ["coder"]
            await visit.page.get_by_role("button", name="Log out").click()
            await visit.page.wait_for_url("**/login")
            await visit.open("/agents")
            assert "/login" in visit.page.url
        return wrong

    with dashboard(server.url, namespace, tmp_path / "log", "--token", token) as origin:
        assert asyncio.run(check(origin)) == []


def test_live_page_leads_to_the_login_that_has_ended(
    perf: AgentPerf, server: Server, namespace: str, tmp_path: Path
) -> None:
    token = "correct-horse-battery"

    async def check(origin: str) -> None:
        async with chromium.browsing(origin) as visit:
            await visit.open("/login?next=/agents?window=1h")
            await visit.page.get_by_label("Token").fill(token)
            await visit.page.keyboard.press("Enter")
            await visit.page.wait_for_url("**/agents?window=1h")
            await visit.page.get_by_role("button", name="Pause").click()
            await visit.page.context.clear_cookies()
            await visit.page.get_by_role("button", name="Resume").click()
            await visit.page.wait_for_url("**/login?next=%2Fagents%3Fwindow%3D1h")

    with dashboard(server.url, namespace, tmp_path / "log", "--token", token) as origin:
        asyncio.run(check(origin))


def test_ticked_box_outlives_a_refresh(perf: AgentPerf, server: Server, namespace: str, tmp_path: Path) -> None:
    cache = perf.cache("answers", max_size=10)
    cache.put("a", 1)

    async def check(origin: str) -> None:
        async with chromium.browsing(origin) as visit:
            await visit.open(named("cache", name="answers"))
            box = visit.page.get_by_label("Remove all entries")
            clear = visit.page.get_by_role("button", name="Clear the whole cache")
            await clear.click()
            assert await visit.page.locator(".notice").count() == 0, "the box is not ticked"
            await box.check()
            await clear.focus()
            entries = visit.page.locator(".tile", has_text="Entries").locator(".value")
            await asyncio.to_thread(cache.put, "b", 2)
            await _becomes(entries, "2")
            assert await box.is_checked()
            await clear.click()
            await visit.page.wait_for_load_state("load")
            assert "Cleared cache answers" in await visit.page.locator(".notice").inner_text()

    with dashboard(server.url, namespace, tmp_path / "log", "--every", "0.5", "--allow-actions") as origin:
        asyncio.run(check(origin))


def test_odd_names_lead_to_their_pages(perf: AgentPerf, origin: str) -> None:
    for name in (ODD, "..", "a//b", "?", "#"):
        perf.metrics.record_execution(name, 0.1, success=False, error_type=ODD)
        perf.cache(name).put(ODD, 1, tags=[ODD])
        lb = perf.balancer()
        lb.register_instance(AgentInstance(id=name, agent_type=name, max_capacity=1, labels=frozenset({ODD})))
    perf.metrics.flush()

    async def check() -> None:
        async with chromium.browsing(origin) as visit:
            for page in ("agents", "caches", "pools"):
                await visit.open(f"/{page}")
                names = await visit.page.locator("tbody th a").all_inner_texts()
                assert len(names) == 5, names
                for name in names:
                    await visit.open(f"/{page}")
                    await visit.page.get_by_role("link", name=name, exact=True).click()
                    await visit.page.wait_for_load_state("load")
                    heading = await visit.page.locator("h1").inner_text()
                    assert heading.partition("\n")[2] == name
            assert visit.complaints == []
            assert visit.elsewhere == []

    asyncio.run(check())


def test_filter_and_sort_stand_in_the_address(perf: AgentPerf, origin: str) -> None:
    for number, name in enumerate(("planner", "coder", "critic")):
        perf.metrics.record_execution(name, number + 0.5, success=True)
    perf.metrics.flush()

    async def names(visit: chromium.Visit) -> list[str]:
        found: list[str] = await visit.page.locator("tbody th").all_inner_texts()
        return found

    async def check(script: bool) -> None:
        async with chromium.browsing(origin, script=script) as visit:
            await visit.open("/agents?window=1h")
            await visit.page.get_by_role("link", name="p95").click()
            assert await names(visit) == ["critic", "coder", "planner"]
            await visit.page.get_by_role("link", name="p95").click()
            assert await names(visit) == ["planner", "coder", "critic"]
            assert await visit.page.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
            await visit.page.get_by_label("Filter by name").fill("c*")
            await visit.page.keyboard.press("Enter")
            await visit.page.wait_for_url("**match=**")
            assert await names(visit) == ["coder", "critic"]
            assert all(part in visit.page.url for part in ("window=1h", "sort=p95", "order=asc", "match=c"))

    asyncio.run(check(script=True))
    asyncio.run(check(script=False))


def test_page_is_live_until_it_is_paused(perf: AgentPerf, server: Server, namespace: str, tmp_path: Path) -> None:
    async def record(number: int) -> None:
        for _ in range(number):
            perf.metrics.record_execution("coder", 0.1, success=True)
        await perf.metrics.aio.flush()

    async def check(origin: str) -> None:
        async with chromium.browsing(origin) as visit:
            await record(1)
            await visit.open(named("agent", name="coder"))
            executions = visit.page.locator(".tile", has_text="Executions").locator(".value")
            await visit.page.locator("#numbers-executions summary").click()
            await visit.page.get_by_role("link", name="1h").focus()
            await record(4)
            await _becomes(executions, "5")
            assert await visit.page.locator("#numbers-executions").get_attribute("open") is not None
            assert await visit.page.evaluate("document.activeElement.textContent") == "the last 1h"
            await visit.page.get_by_role("button", name="Pause").click()
            await record(5)
            await asyncio.sleep(1.5)  # three intervals of live updates
            assert await executions.inner_text() == "5"
            assert "paused" in await visit.page.locator("#live-state").inner_text()
            await visit.page.get_by_role("button", name="Resume").click()
            await visit.page.locator("#numbers-executions summary").focus()
            await _becomes(executions, "10")
            assert await visit.page.evaluate("document.activeElement.parentElement.id") == "numbers-executions"
            assert visit.complaints == []

    with dashboard(server.url, namespace, tmp_path / "log", "--every", "0.5") as origin:
        asyncio.run(check(origin))


def test_filter_keeps_its_text_while_the_page_is_live(
    perf: AgentPerf, server: Server, namespace: str, tmp_path: Path
) -> None:
    async def check(origin: str) -> None:
        async with chromium.browsing(origin) as visit:
            await visit.open("/agents")
            await visit.page.get_by_label("Filter by name").fill("coder")
            await visit.page.keyboard.press("ArrowLeft")
            perf.metrics.record_execution("critic", 0.1, success=True)
            await perf.metrics.aio.flush()
            await _becomes(visit.page.locator("tbody th").nth(1), "critic")
            await visit.page.keyboard.type("X")  # at the cursor, which stands before the last character
            assert await visit.page.get_by_label("Filter by name").input_value() == "codeXr"
            assert await visit.page.locator("form#filter").count() == 1
            assert visit.complaints == []

    perf.metrics.record_execution("coder", 0.1, success=True)
    perf.metrics.flush()
    with dashboard(server.url, namespace, tmp_path / "log", "--every", "0.5") as origin:
        asyncio.run(check(origin))


@pytest.mark.waits
def test_live_page_keeps_its_size(
    perf: AgentPerf, server: Server, namespace: str, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """The page is updated 100 times, or with ``--everything`` 300 times, as in ten minutes at the usual interval."""
    updates = 300 if pytestconfig.getoption("--everything") else 100

    async def check(origin: str) -> None:
        async with chromium.browsing(origin) as visit:
            connections: list[str] = []
            visit.page.on(
                "request", lambda each: connections.append(each.url) if each.resource_type == "eventsource" else None
            )
            await visit.open(named("agent", name="coder"))
            await visit.page.evaluate("""() => {
                window.updates = 0;
                new MutationObserver(() => window.updates++).observe(document.getElementById("main"), {childList: true});
            }""")
            before: dict[str, float] = {}
            for count in (20, 20 + updates):
                deadline = time.monotonic() + 600
                while await visit.page.evaluate("window.updates") < count:
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.2)
                if not before:
                    before = await visit.kept()
            limits = {
                "Nodes": before["Nodes"] * 1.2 + 200,
                "JSEventListeners": before["JSEventListeners"],
                "JSHeapUsedSize": before["JSHeapUsedSize"] * 1.2 + 500_000,
            }
            deadline = time.monotonic() + 60
            # Wait until the browser has freed old contents. If each update leaked, this wait would fail.
            while True:
                after = await visit.kept()
                if all(after[name] <= limit for name, limit in limits.items()):
                    break
                assert time.monotonic() < deadline, (before, after)
                await asyncio.sleep(0.2)
            assert len(connections) == 1
            assert visit.complaints == []

    for number in range(50):
        perf.metrics.record_execution("coder", 0.1 + number / 100, success=number % 9 > 0, error_type="TimeoutError")
    perf.metrics.flush()
    with dashboard(server.url, namespace, tmp_path / "log", "--every", "0.5") as origin:
        asyncio.run(check(origin))


def test_keyboard_reaches_the_content(perf: AgentPerf, origin: str) -> None:
    async def focused(visit: chromium.Visit, script: str) -> Any:
        return await visit.page.evaluate(f"(() => {{ const each = document.activeElement; return {script}; }})()")

    async def check() -> None:
        async with chromium.browsing(origin) as visit:
            await visit.open("/agents")
            await visit.page.keyboard.press("Tab")
            assert await focused(visit, "each.textContent") == "Skip to the content"
            assert await focused(visit, "each.getBoundingClientRect().top >= 0"), "the focused link is in view"
            await visit.page.keyboard.press("Enter")
            assert await focused(visit, "each.id") == "main"
            reached = []
            while "coder" not in reached:
                await visit.page.keyboard.press("Tab")
                reached.append(await focused(visit, "each.textContent.trim()"))
                assert await focused(visit, "getComputedStyle(each).outlineStyle") != "none", reached[-1]
                assert len(reached) < 60, reached
            await visit.page.keyboard.press("Enter")
            await visit.page.wait_for_url("**/agent?name=coder")

    perf.metrics.record_execution("coder", 0.1, success=True)
    perf.metrics.flush()
    asyncio.run(check())


def test_page_comes_back_with_the_server(own_server: Server, tmp_path: Path) -> None:
    async def check(origin: str) -> None:
        async with chromium.browsing(origin) as visit:
            await visit.open("/agents")
            assert await visit.page.locator("h1").inner_text() == "Agents"
            own_server.kill()
            await _becomes(visit.page.locator("h1"), "Server unreachable")
            assert "since" in await visit.page.locator("main").inner_text()
            own_server.restart()
            await _becomes(visit.page.locator("h1"), "Agents")

    options = ("--every", "0.5")
    with dashboard(own_server.url, "agentperf", tmp_path / "log", *options) as origin:
        asyncio.run(check(origin))


async def _becomes(element: Any, text: str) -> None:
    from playwright.async_api import expect

    await expect(element).to_have_text(text, timeout=60_000)
