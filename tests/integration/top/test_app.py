"""The terminal view on a real server, driven by textual's pilot."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from textual.widgets import DataTable, Input, TabbedContent

from agentperf_redis import AgentPerf
from agentperf_redis.top import app
from agentperf_redis.top.screens import DetailScreen, ListingScreen
from tests.support.screens import NARROW, WIDE, Screen, fill, screen
from tests.support.servers import Raw, Server


@pytest.fixture
def view(perf: AgentPerf, runner: asyncio.Runner) -> Callable[..., None]:
    """Fill the namespace, and run a scenario: `view(scenario, size=WIDE)`."""

    def run(scenario: Callable[[Screen], Awaitable[None]], **options: object) -> None:
        held = fill(perf)

        async def body() -> None:
            async with screen(perf, **options) as shown:  # type: ignore[arg-type]
                await scenario(shown)

        runner.run(body())
        perf.balancer().release(held)

    return run


@pytest.mark.thorough
def test_reading_that_begins_after_the_user_has_quit_ends(perf: AgentPerf, runner: asyncio.Runner) -> None:
    async def body() -> None:
        async with screen(perf) as shown:
            await shown.shows("agentperf")
        await shown.app._read_once()

    runner.run(body())


@pytest.mark.thorough
def test_reading_that_begins_when_the_widgets_are_gone_ends(
    perf: AgentPerf, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    async def body() -> None:
        async with screen(perf) as shown:
            await shown.shows("agentperf")
            prune: Any = shown.app._prune

            async def prune_and_read(*nodes: Any) -> None:
                await prune(*nodes)
                await shown.app._read_once()
                read.append(nodes)

            monkeypatch.setattr(shown.app, "_prune", prune_and_read)

    runner.run(body())
    assert read


@pytest.mark.thorough
def test_tabs_show_all_services(view: Callable[..., None]) -> None:
    async def scenario(shown: Screen) -> None:
        await shown.shows("planner", "41", "24.4%")
        await shown.shows("51 tasks", "10 failed")
        await shown.shows("1 alert fires")
        await shown.press("2")
        await shown.shows("answers", "6", "85.7%")
        await shown.press("3")
        await shown.shows("coder", "1/12")
        await shown.press("4")
        await shown.shows("agents fail", "FIRING", "planner")
        await shown.shows("1 firing", "1 rule")
        await shown.press("1")
        await shown.shows("planner", "41")

    view(scenario)


@pytest.mark.thorough
def test_rows_are_sorted_by_key_and_by_click(view: Callable[..., None]) -> None:
    async def scenario(shown: Screen) -> None:
        await shown.shows("agent", "tasks ▼")
        assert shown.rows == ["planner", "critic"]
        await shown.press("r")
        await shown.until(lambda: shown.rows == ["critic", "planner"], "fewest tasks first")
        assert shown.has("tasks ▲")
        await shown.press("S")
        await shown.shows("agent ▲")
        await shown.press("s", "s", "s")
        await shown.shows("errors ▼")
        table = shown.app.screen.query_one("#agents-table", DataTable)
        await shown.pilot.click(table, offset=(3, 0))
        await shown.shows("agent ▲")
        await shown.pilot.click(table, offset=(3, 0))
        await shown.shows("agent ▼")

    view(scenario)


@pytest.mark.thorough
def test_filter_keeps_matching_rows(view: Callable[..., None]) -> None:
    async def scenario(shown: Screen) -> None:
        await shown.shows("critic")
        await shown.press("slash", *"PLAN")
        await shown.until(lambda: not shown.has("critic"), "only the planner")
        await shown.press("enter")
        await shown.shows("1 match 'PLAN'")
        await shown.until(lambda: shown.rows == ["planner"], "only the planner")
        await shown.press("slash", "slash", *"x*")
        await shown.until(lambda: shown.app.screen.query_one("#filter", Input).value == "/x*", "the typed text")
        await shown.shows("No name matches the filter.")
        shown.app.screen.query_one("#filter", Input).value = "a\tb"
        await shown.shows("view could not be read", "match is")
        await shown.press("escape")
        await shown.until(lambda: shown.rows == ["planner", "critic"], "all rows")
        assert not shown.has("could not be read")

    view(scenario)


@pytest.mark.thorough
def test_agent_is_opened_and_closed(view: Callable[..., None]) -> None:
    async def scenario(shown: Screen) -> None:
        await shown.shows("planner")
        await shown.press("enter")
        await shown.shows("agent planner")
        await shown.shows("41 tasks", "10 failed (24.4%)")
        await shown.shows("Errors (1)", "Spans (2)", "Slowest (20)")
        await shown.press("tab")
        await shown.shows("TimeoutError", "10", "100.0%")
        await shown.press("tab")
        await shown.shows("think")
        await shown.press("tab", "tab")
        await shown.shows("0.590", "ok")
        await shown.press(*["shift+tab"] * 5)
        await shown.until(lambda: active(shown) == "part-6", "the tab of running executions")
        await shown.press("escape")
        await shown.until(lambda: isinstance(shown.app.screen, ListingScreen), "the listing")
        assert shown.rows == ["planner", "critic"]

    def active(shown: Screen) -> str:
        return shown.app.screen.query_one("#parts", TabbedContent).active

    view(scenario)


@pytest.mark.thorough
def test_cache_and_pool_are_opened(view: Callable[..., None]) -> None:
    async def scenario(shown: Screen) -> None:
        await shown.shows("planner")
        await shown.press("2")
        await shown.shows("answers")
        await shown.press("enter")
        await shown.shows("lru cache, policy lru", "6 of 50 entries")
        await shown.shows("6 hits, 1 miss, hit rate 85.7%")
        await shown.press("tab", "tab")
        await shown.shows("key 0", "letters")
        await shown.press("tab", "tab", "tab")
        await shown.shows("letters", "6")
        await shown.press("escape", "3")
        await shown.shows("coder")
        await shown.press("enter")
        await shown.shows("least_loaded", "3 instances, 1 out")
        await shown.shows("coder-2", "unhealthy", "marked unhealthy by hand")
        assert shown.has("coder-2", "now") or shown.has("coder-2", " ago")
        await shown.press("tab")
        await shown.shows("coder-0", "held")
        await shown.press("tab", "tab")
        await shown.shows("unhealthy", "coder-2")

    view(scenario, size=WIDE)


@pytest.mark.thorough
def test_alert_opens_its_target(view: Callable[..., None]) -> None:
    async def scenario(shown: Screen) -> None:
        await shown.shows("planner")
        await shown.press("4")
        await shown.shows("agents fail", "FIRING")
        await shown.press("enter")
        await shown.shows("agent planner")

    view(scenario)


@pytest.mark.thorough
def test_second_click_on_a_row_opens_it(view: Callable[..., None]) -> None:
    async def scenario(shown: Screen) -> None:
        await shown.shows("critic")
        table = shown.app.screen.query_one("#agents-table", DataTable)
        await shown.shows("cost 0.25")  # the line above the table is now complete, so the table no longer moves
        await shown.pilot.pause()
        await shown.pilot.click(table, offset=(3, 2))
        await shown.pilot.click(table, offset=(3, 2))
        await shown.shows("agent critic")

    view(scenario)


@pytest.mark.thorough
def test_pause_keeps_the_numbers(view: Callable[..., None], perf: AgentPerf) -> None:
    async def scenario(shown: Screen) -> None:
        await shown.shows("planner", "41")
        await shown.press("p")
        await shown.shows("PAUSED at")
        perf.metrics.record_execution("planner", 0.1, True)
        await perf.metrics.aio.flush()
        await asyncio.sleep(0.6)  # an unpaused view would read three times in 0.6 s
        assert shown.has("planner", "41")
        # `w` causes one more read. The read counts the whole slice in which the pause began, so 42 may already appear.
        await shown.press("w")
        await shown.shows("last 1h")
        await shown.press("p")
        await shown.shows("planner", "42")
        assert not shown.has("PAUSED")

    view(scenario)


@pytest.mark.thorough
def test_pause_uses_the_clock_of_the_server(view: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of this machine is a day slow."""
    now = time.time()
    monkeypatch.setattr(app, "time", SimpleNamespace(time=lambda: now - 86_400, monotonic=time.monotonic))

    async def scenario(shown: Screen) -> None:
        await shown.shows("planner", "41")
        await shown.press("p")
        await shown.shows("PAUSED at")
        assert shown.app.paused_at is not None
        assert shown.app.paused_at > now - 3600
        await shown.press("w")
        await shown.shows("last 1h")
        await shown.shows("planner", "41")

    view(scenario)


@pytest.mark.thorough
def test_window_is_changed(view: Callable[..., None]) -> None:
    async def scenario(shown: Screen) -> None:
        await shown.shows("last 10m")
        for window in ("1h", "2h", "24h", "7d", "5m"):
            await shown.press("w")
            await shown.shows(f"last {window}")
            await shown.shows("planner", "41")
        await shown.press("W")
        await shown.shows("last 7d")

    view(scenario)


@pytest.mark.thorough
def test_columns_fit_the_terminal(view: Callable[..., None]) -> None:
    async def narrow(shown: Screen) -> None:
        await shown.shows("agent", "tasks ▼", "failed", "p95 s")
        assert not shown.has("top error")
        await shown.pilot.resize_terminal(*WIDE)
        await shown.shows("agent", "tokens", "cost", "over time", "top error")
        await shown.shows("planner", "TimeoutError × 10")

    view(narrow, size=NARROW)


@pytest.mark.thorough
def test_keys_are_shown_and_q_quits(view: Callable[..., None]) -> None:
    async def scenario(shown: Screen) -> None:
        await shown.shows("⏎ Open", "s Sort", "/ Filter", "w Window", "p Pause", "q Quit")
        await shown.press("question_mark")
        await shown.until(lambda: shown.app.screen.query("HelpPanel"), "the panel of keys")
        await shown.press("question_mark")
        await shown.until(lambda: not shown.app.screen.query("HelpPanel"), "no panel of keys")
        await shown.press("q")
        await shown.until(lambda: not shown.app.is_running, "the end")
        assert shown.app.return_code == 0

    view(scenario)


@pytest.mark.thorough
def test_empty_namespace_says_what_to_do(perf: AgentPerf, runner: asyncio.Runner) -> None:
    async def body() -> None:
        async with screen(perf) as shown:
            await shown.shows("No agent has recorded anything yet.")
            for key, text in (
                ("2", "No cache is in use."),
                ("3", "No instance is registered."),
                ("4", "alerts deploy"),
            ):
                await shown.press(key)
                await shown.shows(text)
            await shown.press("enter")
            assert isinstance(shown.app.screen, ListingScreen)

    runner.run(body())


@pytest.mark.thorough
def test_odd_names_are_shown_as_text(perf: AgentPerf, runner: asyncio.Runner) -> None:
    for name in ("[red]x[/red]", "<script>", "plan/ner #1 %41", "名前", ":boom:"):
        perf.metrics.record_execution(name, 0.1, False, "[bold]E[/bold]")

    async def body() -> None:
        async with screen(perf, WIDE) as shown:
            for name in ("[red]x[/red]", "<script>", "plan/ner #1 %41", "名前", ":boom:"):
                await shown.shows(name, "[bold]E[/bold] × 1")
            await shown.press("slash", *"[red]", "enter", "escape", "slash", *"x", "enter")
            await shown.until(lambda: shown.rows == ["[red]x[/red]"], "one row")
            await shown.press("enter")
            await shown.shows("agent [red]x[/red]")
            await shown.shows("1 task")

    runner.run(body())


@pytest.mark.thorough
def test_outage_keeps_old_numbers_and_ends(
    start_server: Callable[..., Server], namespace: str, runner: asyncio.Runner
) -> None:
    server = start_server(aof=True)

    async def body() -> None:
        async with AgentPerf(server.url, namespace=namespace, deadline=0.5) as perf:
            perf.metrics.record_execution("planner", 0.25, True)
            await perf.metrics.aio.flush()
            async with screen(perf) as shown:
                await shown.shows("planner", "1")
                server.kill()
                await shown.shows("OLD numbers of", "the server is away since")
                assert shown.has("planner", "1")
                await shown.press("enter")
                await shown.until(lambda: isinstance(shown.app.screen, DetailScreen), "the screen of the agent")
                await shown.shows("OLD numbers of")
                await shown.press("escape")
                server.restart()
                await shown.until(lambda: not shown.has("OLD"), "the end of the outage")
                assert shown.has("planner", "1")
                await shown.press("q")
                await shown.until(lambda: not shown.app.is_running, "the end")

    runner.run(body())


@pytest.mark.thorough
def test_damaged_pool_hides_no_other_tab(view: Callable[..., None], raw: Raw, namespace: str) -> None:
    async def scenario(shown: Screen) -> None:
        await shown.shows("planner")
        raw.set(f"{namespace}:{{lb:other}}:state", "x")
        raw.zadd(f"{namespace}:resources", {"lb:other": 1})
        await shown.press("3")
        await shown.shows("pools could not be read")
        await shown.press("2")
        await shown.shows("answers")

    view(scenario)
