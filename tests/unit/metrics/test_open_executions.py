from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any

import pytest

from agentperf_redis.metrics.open_executions import OpenExecutions
from agentperf_redis.metrics.spans import Span
from agentperf_redis.metrics.tracking import track_performance
from agentperf_redis.presence import OpenCalls


class Collector:
    """Tracks executions, and records nothing."""

    def __init__(self) -> None:
        self.firsts = 0
        self.executions = OpenExecutions(self._note_first)

    def _note_first(self) -> None:
        self.firsts += 1

    def track(self, agent: str) -> Span:
        return Span(agent, None, lambda span, outcome: None, executions=self.executions)

    def span(self, agent: str, name: str) -> Span:
        return Span(agent, name, lambda span, outcome: None, executions=self.executions)

    def record_stream(self, *_: object) -> None:
        pass

    def open(self, min_age: float = 0.0) -> list[str]:
        """Return the agents of the open executions, the oldest first."""
        oldest = self.executions.oldest(2.0**60, min_age, 50)
        assert oldest.more == 0
        return [agent for agent, _ in oldest.oldest]


@pytest.fixture
def collector() -> Collector:
    return Collector()


def test_execution_is_listed_from_begin_to_end(collector: Collector) -> None:
    with collector.track("a"):
        assert collector.open() == ["a"]
        with collector.span("a", "stage"), collector.track("b"), collector.span("c", "alone"):
            assert collector.open() == ["a", "b", "c"], "a span within an execution of its agent is a part of it"
        assert collector.open() == ["a"]
    assert collector.open() == []
    assert collector.firsts == 1


def test_oldest_executions_are_listed_and_the_rest_counted(collector: Collector) -> None:
    spans = [collector.track(f"agent-{number}").__enter__() for number in range(5)]
    found = collector.executions.oldest(2.0**60, 0.0, 2)
    assert found == OpenCalls((("agent-0", spans[0]._start), ("agent-1", spans[1]._start)), 3)
    for span in reversed(spans):
        span.__exit__(None, None, None)


def test_younger_executions_are_not_listed(collector: Collector) -> None:
    with collector.track("a") as span:
        assert collector.executions.oldest(span._start + 0.9, 1.0, 50) == OpenCalls()
        assert collector.executions.oldest(span._start + 1.0, 1.0, 50) == OpenCalls((("a", span._start),))


def test_execution_that_ends_after_it_was_listed_is_removed(collector: Collector) -> None:
    span = collector.track("a").__enter__()
    assert collector.open() == collector.open() == ["a"]
    span.__exit__(None, None, None)
    assert collector.open() == []
    assert not collector.executions._old
    assert not collector.executions._young


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize("listed", [False, True])
def test_dropped_execution_is_not_listed(collector: Collector, listed: bool) -> None:
    """Nothing refers to the dropped execution any longer, so it can never end."""

    async def work() -> None:
        pass

    @track_performance("a", collector)  # type: ignore[arg-type]
    def begin() -> Coroutine[Any, Any, None]:
        return work()

    dropped = begin()
    if listed:
        assert collector.open() == ["a"]
    del dropped
    collector.open()  # after this call, the collector has only weak references to the execution
    gc.collect()
    assert collector.open() == []


def test_all_kinds_of_calls_are_listed(collector: Collector) -> None:
    def decorated(function: Any) -> Any:
        return track_performance(function.__name__, collector)(function)  # type: ignore[arg-type]

    @decorated
    def generator() -> Iterator[int]:
        yield 1
        yield 2

    @decorated
    async def asynchronous() -> AsyncIterator[int]:
        yield 1

    @decorated
    async def coroutine(done: asyncio.Event) -> None:
        await done.wait()

    consumed = generator()
    assert collector.open() == [], "it has not begun"
    next(consumed)
    assert collector.open() == ["generator"], "also while its consumer works"
    consumed.close()

    async def main() -> None:
        done = asyncio.Event()
        stream = asynchronous()
        await anext(stream)
        tasks = [asyncio.create_task(coroutine(done)) for _ in range(3)]
        await asyncio.sleep(0)
        assert sorted(collector.open()) == ["asynchronous", *["coroutine"] * 3]
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        await stream.aclose()
        assert collector.open() == ["coroutine"] * 2
        done.set()
        await asyncio.gather(*tasks[1:])

    asyncio.run(main())
    assert collector.open() == []


def test_reset_forgets_the_executions_of_the_parent(collector: Collector) -> None:
    inherited = collector.track("parent").__enter__()
    collector.open()
    collector.executions.reset()
    assert collector.open() == []
    with collector.track("child"):
        assert collector.open() == ["child"]
    assert collector.firsts == 2, "the child has begun too"
    inherited.__exit__(None, None, None)


@pytest.mark.thorough
def test_listing_meanwhile_loses_no_execution(collector: Collector) -> None:
    """Four threads begin and end executions while two threads list them."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def guarded(work: Any) -> threading.Thread:
        def run() -> None:
            try:
                while not stop.is_set():
                    work()
            except BaseException as error:  # noqa: BLE001  the test reports it
                failures.append(error)

        return threading.Thread(target=run)

    def work() -> None:
        with collector.track("short"), collector.track("shorter"):
            pass

    with collector.track("long"):

        def look() -> None:
            assert "long" in [agent for agent, _ in collector.executions.oldest(2.0**60, 0.0, 50).oldest]

        threads = [*(guarded(work) for _ in range(4)), *(guarded(look) for _ in range(2))]
        for thread in threads:
            thread.start()
        stop.wait(3)
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert collector.open() == []
