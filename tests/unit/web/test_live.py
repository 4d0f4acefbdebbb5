"""Tests of the feeds of live pages."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio
import pytest
from sse_starlette.event import ServerSentEvent

from agentperf_redis.web.live import Live, pause

INTERVAL_S = 0.02


class Page:
    """Renders a text and counts how often."""

    def __init__(self) -> None:
        self.text = "one"
        self.rendered = 0
        self.error: Exception | None = None

    async def __call__(self) -> str:
        self.rendered += 1
        if self.error is not None:
            raise self.error
        return self.text


def never() -> bool:
    return False


def run(test: Callable[[Live, Page], Awaitable[None]]) -> None:
    async def running() -> None:
        async with asyncio.timeout(30):
            await test(Live(INTERVAL_S), Page())

    asyncio.run(running())


async def texts(events: AsyncIterator[ServerSentEvent], count: int) -> list[str]:
    found = []
    async for event in events:
        found.append(str(event.data))
        if len(found) == count:
            break
    return found


def test_readers_share_one_feed() -> None:
    async def test(live: Live, page: Page) -> None:
        streams = [live.events("a", page, never, anyio.Event()) for _ in range(20)]
        first = await asyncio.gather(*(texts(stream, 1) for stream in streams))
        assert first == [["one"]] * 20
        assert (live.pages, len(live)) == (20, 1)
        assert page.rendered < 20
        for stream in streams:
            await stream.aclose()
        assert (live.pages, len(live)) == (0, 0)
        before = page.rendered
        await asyncio.sleep(5 * INTERVAL_S)
        assert page.rendered == before, "nothing is read without readers"

    run(test)


def test_unchanged_page_is_not_sent_again() -> None:
    async def test(live: Live, page: Page) -> None:
        async with contextlib.aclosing(live.events("a", page, never, anyio.Event())) as events:
            assert await texts(events, 1) == ["one"]
        async with contextlib.aclosing(live.events("a", page, never, anyio.Event())) as events:
            await anext(events)
            waiting = asyncio.ensure_future(anext(events))
            rendered = page.rendered
            while page.rendered < rendered + 5:
                await asyncio.sleep(INTERVAL_S)
            assert not waiting.done()
            page.text = "two"
            assert (await waiting).data == "two"

    run(test)


def test_slow_reader_gets_the_newest_version() -> None:
    async def test(live: Live, page: Page) -> None:
        async with contextlib.aclosing(live.events("a", page, never, anyio.Event())) as events:
            await anext(events)
            for number in range(5):
                page.text = f"version {number}"
                rendered = page.rendered
                while page.rendered < rendered + 2:
                    await asyncio.sleep(INTERVAL_S)
            assert (await anext(events)).data == "version 4"

    run(test)


def test_fault_of_a_page_does_not_end_its_feed(caplog: pytest.LogCaptureFixture) -> None:
    async def test(live: Live, page: Page) -> None:
        page.error = ValueError("broken")
        async with contextlib.aclosing(live.events("a", page, never, anyio.Event())) as events:
            waiting = asyncio.ensure_future(anext(events))
            while page.rendered < 3:
                await asyncio.sleep(INTERVAL_S)
            page.error = None
            assert (await waiting).data == "one"

    run(test)
    assert "a live page was not rendered" in caplog.text


def test_events_end_with_the_login() -> None:
    async def test(live: Live, page: Page) -> None:
        ended = [False]
        async with contextlib.aclosing(live.events("a", page, lambda: ended[0], anyio.Event())) as events:
            await anext(events)
            ended[0], page.text = True, "two"
            with pytest.raises(StopAsyncIteration):
                await anext(events)

    run(test)


def test_events_end_with_the_server() -> None:
    async def test(live: Live, page: Page) -> None:
        closing = anyio.Event()
        async with contextlib.aclosing(live.events("a", page, never, closing)) as events:
            await anext(events)
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0)
            closing.set()
            with pytest.raises(StopAsyncIteration):
                await waiting
        assert (live.pages, len(live)) == (0, 0)

    run(test)


def test_slow_pages_are_rendered_less_often() -> None:
    assert [pause(2.0, took) for took in (0.0, 0.5, 0.6, 1.1, 3.0, 60.0)] == [2.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert pause(60.0, 30.0) == 60.0
