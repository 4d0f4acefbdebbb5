"""Tests of the reads that pages share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from agentperf_redis.errors import BackendUnavailable
from agentperf_redis.web.reader import MAX_KEPT, Shared


class Source:
    """Counts its reads. Each read waits until `go` is set."""

    def __init__(self) -> None:
        self.reads = 0
        self.go = asyncio.Event()
        self.go.set()
        self.error: Exception | None = None

    async def __call__(self) -> int:
        self.reads += 1
        number = self.reads
        await self.go.wait()
        if self.error is not None:
            raise self.error
        return number


def run(test: Callable[[Shared, Source, list[float]], Awaitable[None]]) -> None:
    async def running() -> None:
        clock = [0.0]
        await test(Shared(2.0, lambda: clock[0]), Source(), clock)

    asyncio.run(running())


def test_pages_share_a_read_within_the_interval() -> None:
    async def test(shared: Shared, source: Source, clock: list[float]) -> None:
        assert await asyncio.gather(*(shared.get("a", source) for _ in range(20))) == [1] * 20
        clock[0] = 1.9
        assert await shared.get("a", source) == 1
        assert await shared.get("b", source) == 2
        clock[0] = 2.0
        assert await shared.get("a", source) == 3

    run(test)


def test_slow_read_is_not_repeated() -> None:
    async def test(shared: Shared, source: Source, clock: list[float]) -> None:
        source.go.clear()
        first = asyncio.create_task(shared.get("a", source))
        await asyncio.sleep(0)
        clock[0] = 100.0
        second = asyncio.create_task(shared.get("a", source))
        await asyncio.sleep(0)
        source.go.set()
        assert (await first, await second, source.reads) == (1, 1, 1)

    run(test)


def test_error_is_shared_too() -> None:
    async def test(shared: Shared, source: Source, clock: list[float]) -> None:
        source.error = BackendUnavailable("redis://x", "not_applied", "gone")
        results = await asyncio.gather(*(shared.get("a", source) for _ in range(5)), return_exceptions=True)
        assert results == [source.error] * 5
        assert source.reads == 1
        source.error, clock[0] = None, 3.0
        assert await shared.get("a", source) == 2

    run(test)


def test_error_is_not_shared_for_the_time_of_a_rare_read() -> None:
    async def test(shared: Shared, source: Source, clock: list[float]) -> None:
        source.error = BackendUnavailable("redis://x", "not_applied", "gone")
        with pytest.raises(BackendUnavailable):
            await shared.get("a", source, 60.0)
        source.error, clock[0] = None, 2.0
        assert await shared.get("a", source, 60.0) == 2
        clock[0] = 61.9
        assert await shared.get("a", source, 60.0) == 2
        clock[0] = 62.0
        assert await shared.get("a", source, 60.0) == 3

    run(test)


def test_closed_page_does_not_end_the_read_of_others() -> None:
    async def test(shared: Shared, source: Source, clock: list[float]) -> None:
        source.go.clear()
        closed = asyncio.create_task(shared.get("a", source))
        other = asyncio.create_task(shared.get("a", source))
        await asyncio.sleep(0)
        closed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closed
        source.go.set()
        assert (await other, source.reads) == (1, 1)

    run(test)


def test_results_are_bounded_and_forgotten() -> None:
    async def test(shared: Shared, source: Source, clock: list[float]) -> None:
        for number in range(3 * MAX_KEPT):
            await shared.get(number, source)
        assert len(shared) <= MAX_KEPT
        clock[0] = 5.0
        await shared.get("new", source)
        assert len(shared) == 1
        shared.forget()
        assert await shared.get("new", source) == 3 * MAX_KEPT + 2

    run(test)
