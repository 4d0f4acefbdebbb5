from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.cache.process import refresher as module
from agentperf_redis.cache.process.refresher import Refresher

SUBJECT = ("cache", "key")


@pytest.fixture
def refresher() -> Iterator[Refresher]:
    backend = Backend("redis://127.0.0.1:1")
    yield Refresher(backend)
    backend.close()


def test_refresh_of_a_closed_loop_frees_its_key(refresher: Refresher) -> None:
    ended: list[str] = []

    async def refresh() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("finally")

    async def request() -> None:
        refresher.spawn(SUBJECT, refresh)
        await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(request())
    loop.close()
    done: list[int] = []

    async def later() -> None:
        async def again() -> None:
            done.append(1)

        refresher.spawn(SUBJECT, again)
        await asyncio.sleep(0)

    asyncio.run(later())
    assert (ended, done) == (["finally"], [1])


def test_thread_limit_leaves_refreshes_to_later_readers(refresher: Refresher, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    done: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "start_new_thread", refused)
        for _ in range(2 * module.MAX_THREADS):
            refresher.submit(SUBJECT, lambda: done.append(1))
    refresher.submit(SUBJECT, lambda: done.append(2))
    deadline = time.monotonic() + 10
    while not done and time.monotonic() < deadline:
        time.sleep(0.001)
    assert done == [2]
