from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

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


class Watched(dict[Any, Any]):
    """A dict of tasks. It records whether the lock is held when a task is added."""

    def __init__(self, refresher: Refresher) -> None:
        super().__init__()
        self.held: list[bool] = []
        self._refresher = refresher

    def __setitem__(self, task: Any, subject: Any) -> None:
        self.held.append(self._refresher._lock.locked())
        super().__setitem__(task, subject)


def test_task_is_added_under_the_lock_of_those_that_list_tasks(refresher: Refresher) -> None:
    """Otherwise a thread that lists the tasks during the addition gets a RuntimeError."""
    refresher._tasks = tasks = Watched(refresher)

    async def request() -> None:
        async def refresh() -> None:
            pass

        refresher.spawn(SUBJECT, refresh)
        await asyncio.sleep(0)

    asyncio.run(request())
    assert tasks.held == [True]


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


@pytest.mark.parametrize("end", ["loop.close", "asyncio.run", "stopped"])
def test_next_caller_finishes_a_refresh_that_its_loop_cut_off(refresher: Refresher, end: str) -> None:
    async def request() -> None:
        assert not refresher.enter(SUBJECT)
        refresher.spawn(SUBJECT, lambda: asyncio.sleep(60))
        await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    if end == "asyncio.run":
        asyncio.run(request())
    else:
        loop.run_until_complete(request())
    if end == "loop.close":
        loop.close()

    async def later() -> list[bool]:
        entered = [refresher.enter(SUBJECT), refresher.enter(SUBJECT)]
        refresher.leave(SUBJECT)
        return [*entered, refresher.enter(SUBJECT)]

    assert asyncio.run(later()) == [True, False, False], "one caller, once"
    if not loop.is_closed():
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def test_keys_cut_off_are_bounded(refresher: Refresher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_CUT_OFF", 3)
    for number in range(5):
        refresher.leave(("cache", str(number)), cut_off=True)
    assert [refresher.enter(("cache", str(number))) for number in range(5)] == [False, False, True, True, True]
