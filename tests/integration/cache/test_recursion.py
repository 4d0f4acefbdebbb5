"""A caller that would wait for itself computes directly. An example is a function that needs its own value."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache
from tests.support.calls import Call
from tests.support.servers import Raw

TIMEOUT_S = 10.0


def in_time(function: Callable[[], Any]) -> Any:
    """Call a function that may deadlock, on a thread that does not outlast the tests."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(function())
        except BaseException as error:  # noqa: BLE001  raised again below
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    assert outcome, "the call waits for itself"
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def self_referencing(call: Call, cache: LRUCache, meanwhile: Callable[[], object]) -> tuple[Any, list[int]]:
    """Return a function that computes k from k, three levels deep. Also return the list of its calls."""
    calls: list[int] = []

    def blocking() -> int:
        calls.append(1)
        meanwhile()
        return 1 if len(calls) == 3 else 1 + cache.get_or_compute("k", blocking)

    async def waiting() -> int:
        calls.append(1)
        meanwhile()
        if len(calls) == 3:
            return 1
        inner = cache.aio.get_or_compute("k", waiting)
        values = await asyncio.gather(inner) if len(calls) == 1 else [await inner]
        return 1 + values[0]

    return (waiting if call.is_async else blocking), calls


@pytest.mark.filterwarnings("ignore:.* blocks the running event loop:RuntimeWarning")
@pytest.mark.parametrize("meanwhile", ["nothing", "a tag is invalidated", "the key is deleted"])
def test_self_referencing_function_runs_as_if_uncached(
    call: Call, backend: Backend, raw: Raw, namespace: str, meanwhile: str
) -> None:
    cache = LRUCache(name="default", backend=backend)
    acts: dict[str, Callable[[], object]] = {
        "nothing": int,
        "a tag is invalidated": lambda: cache.invalidate_tags("t"),
        "the key is deleted": lambda: cache.delete("k"),
    }
    function, calls = self_referencing(call, cache, acts[meanwhile])

    assert in_time(lambda: call(cache, "get_or_compute", "k", function)) == 3

    assert len(calls) == 3
    assert cache.get("k") == (None if meanwhile == "the key is deleted" else 3), (
        "the value has no tag, and a deletion refuses a value begun before it"
    )
    assert not raw.exists(f"{namespace}:{{cache:default}}:l:k")


def test_self_referencing_function_runs_during_an_outage(call: Call, connect: Callable[..., Backend]) -> None:
    cache = LRUCache(name="default", backend=connect("redis://127.0.0.1:1", deadline=0.05))
    function, calls = self_referencing(call, cache, int)
    assert in_time(lambda: call(cache, "get_or_compute", "k", function)) == 3
    assert len(calls) == 3


def test_endless_recursion_raises_recursion_error(backend: Backend) -> None:
    cache = LRUCache(name="default", backend=backend)

    def endless() -> int:
        value: int = cache.get_or_compute("k", endless)
        return value

    with pytest.raises(RecursionError):
        in_time(endless)
    assert cache.get_or_compute("k", lambda: 1) == 1, "the failed computation has ended"


def test_recursive_function_computes_each_value_once(backend: Backend) -> None:
    cache, calls = LRUCache(name="default", backend=backend), list[int]()

    @cache.cached()
    def fibonacci(number: int) -> int:
        calls.append(number)
        return number if number < 2 else fibonacci(number - 1) + fibonacci(number - 2)

    assert in_time(lambda: fibonacci(20)) == 6765
    assert sorted(calls) == list(range(21))


@pytest.mark.filterwarnings("ignore:.* blocks the running event loop:RuntimeWarning")
def test_blocking_call_on_loop_computes_directly(backend: Backend) -> None:
    cache = LRUCache(name="default", backend=backend)

    async def main() -> tuple[int, int, int]:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slow() -> int:
            begun.set()
            await go_on.wait()
            return await asyncio.to_thread(cache.get_or_compute, "k", lambda: 3) - 2

        task = asyncio.create_task(cache.aio.get_or_compute("k", slow))
        await begun.wait()
        blocking = cache.get_or_compute("k", lambda: 2)
        go_on.set()
        return blocking, await task, await cache.aio.get("k")

    assert in_time(lambda: asyncio.run(main())) == (2, 1, 1)
