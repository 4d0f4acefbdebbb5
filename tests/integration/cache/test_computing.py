"""Threads, tasks and processes share one computation and its error. This file tests the decorator too."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, cast

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, TieredCache, cached, compute
from agentperf_redis.codec.codec import Codec
from agentperf_redis.codec.storable import Registry
from agentperf_redis.errors import BackendUnavailable, ComputeFailed, InvalidArgument
from tests.support.caches import waiting
from tests.support.calls import Call
from tests.support.places import ROOT
from tests.support.servers import Raw, Server, wait_until
from tests.support.stalls import StallDetector
from tests.support.workers import Workers


def where(namespace: str, part: str) -> str:
    return f"{namespace}:{{cache:default}}:{part}"


def test_missing_value_is_computed_once_then_cached(call: Call, backend: Backend) -> None:
    cache = LRUCache(name="default", backend=backend)
    calls: list[int] = []

    def work() -> list[int]:
        calls.append(1)
        time.sleep(0.02)
        return [1, 2]

    assert call(cache, "get_or_compute", "k", work, 60, tags=["t"]) == [1, 2]
    assert call(cache, "get_or_compute", "k", work) == [1, 2]
    assert calls == [1]
    stats = call(cache, "stats")
    assert (stats.hits, stats.misses) == (1, 1)
    assert stats.seconds_saved >= 0.02
    call(cache, "invalidate_tags", "t")
    call(cache, "get_or_compute", "k", work)
    assert calls == [1, 1]


def test_threads_share_one_computation_but_no_object(backend: Backend) -> None:
    cache = LRUCache(name="default", backend=backend)
    calls: list[int] = []

    def work() -> list[int]:
        calls.append(1)
        time.sleep(0.1)
        return [1]

    with ThreadPoolExecutor(20) as threads:
        values = list(threads.map(lambda _: cache.get_or_compute("k", work), range(20)))

    assert calls == [1]
    assert values == [[1]] * 20
    stats = cache.stats()
    assert (stats.hits, stats.misses) == (19, 1), "a value computed by another caller is a hit"
    assert stats.seconds_saved >= 19 * 0.09
    values[0].append(2)
    assert values[1:] == [[1]] * 19
    assert len({id(value) for value in values}) == 20


def test_tasks_share_one_computation(backend: Backend, runner: asyncio.Runner) -> None:
    cache = LRUCache(name="default", backend=backend)
    calls: list[int] = []

    async def work() -> str:
        calls.append(1)
        await asyncio.sleep(0.05)
        return "value"

    async def many() -> list[str]:
        return await asyncio.gather(*(cache.aio.get_or_compute("k", work) for _ in range(100)))

    assert runner.run(many()) == ["value"] * 100
    assert calls == [1]


def count_and_work(url: str, namespace: str, key: str, seconds: float) -> tuple[int, Any, float]:
    """A worker process: request one key from five threads.

    Returns the number of computations in this process, the value, and the time when all threads had the value.
    """
    cache = LRUCache(name="default", backend=Backend(url, namespace=namespace))
    calls: list[int] = []

    def work() -> int:
        calls.append(1)
        time.sleep(seconds)
        return os.getpid()

    with ThreadPoolExecutor(5) as threads:
        values = list(threads.map(lambda _: cache.get_or_compute(key, work), range(5)))
    assert len(set(values)) == 1
    return len(calls), values[0], time.monotonic()


def test_processes_share_one_computation(server: Server, namespace: str, workers: Workers, raw: Raw) -> None:
    results = workers.run(count_and_work, [(server.url, namespace, "k", 0.3)] * 4)

    assert sum(calls for calls, _, _ in results) == 1
    assert len({value for _, value, _ in results}) == 1
    assert raw.exists(where(namespace, "l:k")) == 0, "the lease is released"


def compute_for_ever(url: str, namespace: str) -> Iterator[str]:
    cache = LRUCache(name="default", backend=Backend(url, namespace=namespace))
    thread = threading.Thread(target=lambda: cache.get_or_compute("k", lambda: time.sleep(600)), daemon=True)
    thread.start()
    yield "computing"


def test_killed_leader_is_replaced_after_lease_expiry(
    backend: Backend, server: Server, namespace: str, workers: Workers, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    leader = workers.start(compute_for_ever, server.url, namespace)
    leader.said()
    wait_until(lambda: raw.exists(where(namespace, "l:k")), "the leader's lease")
    leader.kill()
    with StallDetector(raw.ping) as stalls:
        begun = time.monotonic()
        raw.pexpire(where(namespace, "l:k"), 300)  # the lease now ends after 0.3 s instead of its full TTL
        assert LRUCache(name="default", backend=backend).get_or_compute("k", lambda: "mine") == "mine"
        end = time.monotonic()
        assert end - begun >= 0.3
        assert stalls.own(begun, end) < 2.3


def test_lease_is_renewed_while_function_runs(
    backend: Backend, server: Server, connect: Callable[..., Backend], raw: Raw, namespace: str
) -> None:
    cache, remote = LRUCache(name="default", backend=backend), LRUCache(name="default", backend=connect(server.url))
    release = threading.Event()
    thread = threading.Thread(target=cache.get_or_compute, args=("k", lambda: release.wait(30)))
    thread.start()
    wait_until(lambda: raw.exists(where(namespace, "l:k")), "the lease")
    first = raw.pexpiretime(where(namespace, "l:k"))

    wait_until(lambda: raw.pexpiretime(where(namespace, "l:k")) > first + 1000, "the lease to be renewed")
    other = threading.Thread(target=remote.get_or_compute, args=("k", lambda: "never called"))
    other.start()
    release.set()
    thread.join()
    other.join()
    assert remote.get("k") is True


def test_error_reaches_all_waiters_without_retries(
    backend: Backend, server: Server, connect: Callable[..., Backend], raw: Raw, namespace: str
) -> None:
    cache, remote = LRUCache(name="default", backend=backend), LRUCache(name="default", backend=connect(server.url))
    calls: list[str] = []
    all_wait = threading.Event()

    def fail() -> None:
        calls.append("here")
        wait_until(lambda: raw.hget(where(namespace, "l:k"), "waited"), "the other process to wait")
        assert all_wait.wait(20)  # all calls must wait before the error, because a later call would compute again
        raise KeyError("no such thing")

    def ask(which: LRUCache) -> Exception:
        with pytest.raises(Exception) as raised:
            which.get_or_compute("k", fail)
        return raised.value

    with ThreadPoolExecutor(10) as threads:
        ours = [threads.submit(ask, cache) for _ in range(5)]
        wait_until(lambda: raw.exists(where(namespace, "l:k")), "the lease")
        theirs = [threads.submit(ask, remote) for _ in range(5)]
        wait_until(lambda: waiting(cache, "k") == waiting(remote, "k") == 4, "all other callers to wait")
        all_wait.set()
        assert {type(each.result()) for each in ours} == {KeyError}
        errors = [each.result() for each in theirs]

    assert calls == ["here"]
    for error in errors:
        assert isinstance(error, ComputeFailed)
        assert (error.key, error.error_type, error.message) == ("k", "KeyError", "'no such thing'")
    assert cache.get_or_compute("k", lambda: "again") == "again", "an error is not stored: a later caller computes"


@pytest.mark.filterwarnings("ignore:.* blocks the running event loop:RuntimeWarning")
def test_value_begun_before_invalidation_is_not_stored(call: Call, backend: Backend) -> None:
    for number, forget in enumerate(
        (
            lambda cache: cache.delete("k"),
            lambda cache: cache.clear(),
            lambda cache: cache.invalidate_tags("t"),
            lambda cache: cache.put("k", "newer"),
        )
    ):
        cache = LRUCache(name=f"c{number}", backend=backend)

        def work(cache: LRUCache = cache, forget: Callable[[LRUCache], object] = forget) -> str:
            forget(cache)
            return "old"

        assert call(cache, "get_or_compute", "k", work, tags=["t"]) == "old"
        assert call(cache, "get", "k") == ("newer" if number == 3 else None)


FORGET: dict[str, Callable[[LRUCache], object]] = {
    "delete": lambda cache: cache.delete("k"),
    "clear": lambda cache: cache.clear(),
    "invalidate_tags": lambda cache: cache.invalidate_tags("t"),
    "put": lambda cache: cache.put("k", "new"),
}


@pytest.mark.parametrize("how", FORGET)
@pytest.mark.parametrize("by", ["this process", "another process"])
def test_caller_after_invalidation_gets_no_earlier_computation(
    backend: Backend, server: Server, connect: Callable[..., Backend], how: str, by: str
) -> None:
    cache = LRUCache(name="default", backend=backend)
    begun, go = threading.Event(), threading.Event()

    def old() -> str:
        begun.set()
        assert go.wait(20)
        return "old"

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(cache.get_or_compute, "k", old, tags=["t"])
        assert begun.wait(10)
        FORGET[how](cache if by == "this process" else LRUCache(name="default", backend=connect(server.url)))
        second = threads.submit(cache.get_or_compute, "k", lambda: "new", tags=["t"])
        if how not in ("clear", "invalidate_tags") and by == "this process":
            assert second.result(10) == "new", "the later caller does not wait for the old computation"
        go.set()
        assert first.result(10) == "old", "an earlier caller may get the old value"
        assert second.result(10) == "new"

    assert cache.get("k") == "new"


def test_cancelled_leader_lets_another_compute(
    backend: Backend, runner: asyncio.Runner, raw: Raw, namespace: str
) -> None:
    cache = LRUCache(name="default", backend=backend)
    begun: list[asyncio.Event] = []

    async def work() -> str:
        begun[0].set()
        if len(begun) == 1:
            begun.append(begun[0])
            await asyncio.sleep(60)
        return "second"

    async def scene() -> str:
        begun.append(asyncio.Event())
        first = asyncio.create_task(cache.aio.get_or_compute("k", work))
        await begun[0].wait()
        second = asyncio.create_task(cache.aio.get_or_compute("k", work))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        return await asyncio.wait_for(second, 20)

    with StallDetector(raw.ping) as stalls:
        begin = time.monotonic()
        assert runner.run(scene()) == "second"
        assert stalls.own(begin, time.monotonic()) < 2, "the second caller did not wait for the first lease to expire"
    assert raw.exists(where(namespace, "l:k")) == 0


def test_unstorable_value_is_computed_once_for_all_tasks(
    runner: asyncio.Runner, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "_warned", {})  # an earlier run of this test may already have warned
    cache = LRUCache(name="default", backend=backend)
    calls: list[object] = []

    async def work() -> object:
        calls.append(object())
        while waiting(cache, "k") < 49:
            await asyncio.sleep(0.01)
        return calls[-1]

    async def together() -> list[object]:
        return await asyncio.gather(*(cache.aio.get_or_compute("k", work) for _ in range(50)))

    with pytest.warns(RuntimeWarning, match="cannot be stored"):
        values = runner.run(together())
    assert values == calls * 50, "all tasks get the same object"


class Unstorable:
    """A function whose value cannot be stored. Its calls last until `go_on` is set."""

    def __init__(self) -> None:
        self.calls: list[object] = []
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self) -> object:
        value = object()
        self.calls.append(value)
        self.begun.set()
        self.go_on.wait(20)
        return value


@pytest.mark.parametrize(
    "forget",
    [LRUCache.clear, lambda cache: cache.delete("k"), lambda cache: cache.invalidate_tags("t")],
    ids=["clear", "delete", "tag"],
)
def test_unstorable_value_from_before_an_invalidation_is_not_shared(
    server: Server, connect: Callable[..., Backend], backend: Backend, forget: Callable[[LRUCache], object]
) -> None:
    """Another process invalidates a value during its computation. A later caller computes the value again."""
    cache, other = (LRUCache(name="default", backend=each) for each in (backend, connect(server.url)))
    work = Unstorable()

    with ThreadPoolExecutor(2) as threads, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        first = threads.submit(cache.get_or_compute, "k", work, tags=["t"])
        assert work.begun.wait(20)
        forget(other)
        second = threads.submit(cache.get_or_compute, "k", work, tags=["t"])
        wait_until(lambda: waiting(cache, "k") == 1, "the second caller to wait")
        work.go_on.set()
        assert [first.result(20), second.result(20)] == work.calls
    assert len(work.calls) == 2


def test_each_process_computes_an_unstorable_value_once(
    server: Server, connect: Callable[..., Backend], backend: Backend
) -> None:
    """The callers of a second process wait for the first process. Then they share one computation of their own."""
    first, second = (LRUCache(name="default", backend=each) for each in (backend, connect(server.url)))
    work = Unstorable()

    with ThreadPoolExecutor(6) as threads, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        own = threads.submit(first.get_or_compute, "k", work)
        assert work.begun.wait(20)
        others = [threads.submit(second.get_or_compute, "k", work) for _ in range(5)]
        wait_until(lambda: waiting(second, "k") == 4 and second._shared_state._waiting, "the others to wait")
        work.go_on.set()
        assert own.result(20) is work.calls[0]
        assert {id(other.result(20)) for other in others} == {id(work.calls[1])}
    assert len(work.calls) == 2


@pytest.mark.parametrize("made", [lambda: iter([1, 2]), lambda: (x for x in (1, 2))], ids=["iterator", "generator"])
def test_values_that_are_read_once_are_not_shared(backend: Backend, made: Callable[[], Iterator[int]]) -> None:
    cache = LRUCache(name="default", backend=backend)
    calls: list[int] = []

    def work() -> Iterator[int]:
        calls.append(1)
        if len(calls) == 1:
            wait_until(lambda: waiting(cache, "k") == 4, "all others to wait")
        return made()

    with ThreadPoolExecutor(5) as threads, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        values = list(threads.map(lambda _: list(cache.get_or_compute("k", work)), range(5)))
    assert values == [[1, 2]] * 5


def test_unstorable_value_is_returned_with_one_warning(call: Call, backend: Backend) -> None:
    made = decorated(call, LRUCache(name="default", backend=backend), lambda x: [object(), x])
    with pytest.warns(RuntimeWarning, match="cannot be stored") as warned:
        values = [made(1)[1] for _ in range(3)]
    assert (values, len(warned)) == ([1, 1, 1], 1)
    assert made.cache_info().computed == 3


class Person:
    pass


@dataclass
class Draft:
    text: str
    score: float = field(init=False)


class Broken:
    pass


class BrokenZone(tzinfo):
    def utcoffset(self, moment: datetime | None) -> timedelta:
        raise LookupError("no offset")

    def dst(self, moment: datetime | None) -> None:
        return None

    def tzname(self, moment: datetime | None) -> str:
        return "broken"


def no_dump(broken: Broken) -> None:
    raise KeyError("closed")


@pytest.fixture
def codec() -> Codec:
    registry = Registry()
    registry.add(Draft)
    registry.add(Broken, dump=no_dump, load=lambda state: Broken())
    return Codec(max_bytes=1000, registry=registry)


UNSTORABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "class": (
        lambda: {"people": [1, Person()]},
        r"value\['people'\]\[1\] is a .*\.Person; allowed: None, bool.* with @agentperf_redis\.storable",
    ),
    "unset": (lambda: [Draft("a")], r"value\[0\] is a .*\.Draft; allowed: a Draft whose field score has a value"),
    "dump": (Broken, r"value is a .*\.Broken; allowed: .* its dump raised KeyError: .*closed"),
    "zone": (
        lambda: datetime(2026, 1, 1, tzinfo=BrokenZone()),
        "value is a datetime.datetime; .* LookupError: .*no offset",
    ),
    "size": (lambda: "x" * 2000, "value is a builtins.str; allowed: at most 1000 bytes"),
}


@pytest.mark.parametrize(("make", "words"), UNSTORABLE.values(), ids=UNSTORABLE)
@pytest.mark.parametrize("way", ["decorated", "refresh", "warm", "get_or_compute", "warm_up"])
def test_unstorable_result_warns_once_with_its_place(
    call: Call,
    backend: Backend,
    codec: Codec,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], Any],
    words: str,
    way: str,
) -> None:
    monkeypatch.setattr(compute, "_warned", {})
    cache, calls = LRUCache(name="default", backend=backend, codec=codec), []

    def work(x: object = None) -> Any:
        calls.append(x)
        return make()

    async def work_async(x: object = None) -> Any:
        return work(x)

    function = cache.cached()(work_async if call.is_async else work)
    ways: dict[str, Callable[[], Any]] = {
        "decorated": lambda: run(call, function, 1),
        "refresh": lambda: run(call, function.refresh, 1),
        "warm": lambda: run(call, function.warm, [1, 2]),
        "get_or_compute": lambda: call(cache, "get_or_compute", "k", work_async if call.is_async else work),
        "warm_up": lambda: call(cache, "warm_up", ["a", "b"], work_async if call.is_async else work),
    }
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        results = [ways[way]() for _ in range(2)]
    (text,) = [text for text in (str(each.message) for each in told) if "cannot be stored" in text]
    assert re.search(rf"work\S* returned a value that cannot be stored, .*: {words}", text), text
    if way in ("warm", "warm_up"):
        assert [(result.computed, result.errors) for result in results] == [(2, {}), (2, {})]
    else:
        assert {type(result) for result in results} == {type(make())}
    assert len(calls) == (4 if way in ("warm", "warm_up") else 2), "each call computes its own value"


def test_unstorable_refresh_keeps_the_stale_value(call: Call, backend: Backend, codec: Codec) -> None:
    made: list[Any] = ["first"]

    def work() -> Any:
        return made[-1]

    async def work_async() -> Any:
        return work()

    function = LRUCache(name="default", backend=backend, codec=codec).cached(60, soft_ttl=0.05)(
        work_async if call.is_async else work
    )
    assert run(call, function) == "first"
    made.append(Person())
    time.sleep(0.1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert run(call, function) == "first"
        wait_until(lambda: function.cache_info().uncacheable or run(call, asyncio.sleep, 0.01), "the refresh")
        assert run(call, function) == "first"
    assert [each.category for each in told] == [RuntimeWarning]


def run(call: Call, function: Any, *args: Any) -> Any:
    """Call a function; run the coroutine if it returns one."""
    result = function(*args)
    if not inspect.isawaitable(result):
        return result

    async def awaited() -> Any:
        return await result

    if call._runner is not None:
        return call._runner.run(awaited())
    return asyncio.run(awaited())


def test_function_is_called_during_an_outage(call: Call, connect: Callable[..., Backend]) -> None:
    backend = connect("redis://127.0.0.1:1/0", deadline=0.2)
    function = decorated(call, LRUCache(name="default", backend=backend), lambda x: x + 1)
    with StallDetector() as stalls:
        begun = time.monotonic()
        assert [function(1), function(1), function(2)] == [2, 2, 3]
        assert stalls.own(begun, time.monotonic()) < 1, (
            "after the first failure the cache does not try the server for a while"
        )
    with pytest.raises(BackendUnavailable):
        call(LRUCache(name="default", backend=backend), "get", "k")


# the decorator


class _Caller:
    """Calls a blocking or an asynchronous decorated function in the same way."""

    def __init__(self, call: Call, function: Any) -> None:
        self._call, self._function = call, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(self._function, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._function, name)
        if name not in ("invalidate", "refresh", "cache_clear"):
            return value
        return lambda *args, **kwargs: self._run(value, args, kwargs)

    def _run(self, function: Any, args: Any, kwargs: Any) -> Any:
        if not self._call.is_async:
            return function(*args, **kwargs)

        async def run() -> Any:
            return await function(*args, **kwargs)

        assert self._call._runner is not None
        return self._call._runner.run(run())


def decorated(call: Call, cache: LRUCache | TieredCache, body: Callable[..., Any], **options: Any) -> _Caller:
    if not call.is_async:

        def function(x: Any, y: Any = 2) -> Any:
            return body(x)

        return _Caller(call, cached(cache, **options)(function))

    async def coroutine(x: Any, y: Any = 2) -> Any:
        return body(x)

    return _Caller(call, cache.cached(**options)(coroutine))


def test_decorated_function_has_its_methods(call: Call, backend: Backend) -> None:
    cache = TieredCache(name="default", backend=backend)
    calls: list[Any] = []
    function = decorated(call, cache, calls.append, ttl=60)

    assert function(1) is None
    assert function(x=1, y=2) is None
    assert calls == [1], "None is a value; positional and keyword arguments are equivalent"
    assert function.key(1) == function.key(x=1, y=2) != function.key(1, 3)
    assert function.cache is cache
    assert (function.cache_info().calls, function.cache_info().hits) == (2, 1)
    assert function.invalidate(1) is True
    assert function.invalidate(1) is False
    function(1)
    function.refresh(1)
    assert calls == [1, 1, 1]
    function(2)
    function.cache_clear()
    function(1)
    function(2)
    assert calls == [1, 1, 1, 2, 1, 2]
    (tag,) = cache.entry(function.key(1)).tags
    assert tag.partition("#")[0] == f"function:{__name__}.decorated.<locals>." + (
        "coroutine" if call.is_async else "function"
    )


def test_different_arguments_have_different_keys(backend: Backend) -> None:
    @cached(LRUCache(name="default", backend=backend))
    def function(*args: Any, **kwargs: Any) -> str:
        return repr((args, kwargs))

    calls = [
        (1,),
        (1.0,),
        (True,),
        ("1",),
        (b"1",),
        ((1,),),
        ([1],),
        (None,),
        (),
        (1, 1),
        ({1: 2},),
        ({"1": 2},),
        ({1},),
    ]
    assert len({function.key(*args) for args in calls}) == len(calls)
    assert function.key(a={"x": 1, "y": 2}) == function.key(a={"y": 2, "x": 1})
    assert function.key({3, 1, 2}) == function.key({2, 3, 1})


@dataclass(frozen=True)
class Point:
    x: int


class Report:
    def __init__(self, number: int) -> None:
        self.number = number
        self.calls = 0


def test_methods_define_whether_self_is_in_key(backend: Backend) -> None:
    cache = LRUCache(name="default", backend=backend)

    class Plain(Report):
        @cached(cache)
        def total(self, x: int) -> int:
            return self.number + x

        @cached(cache, ignore=("self",))
        def shared(self, x: int) -> int:
            self.calls += 1
            return self.number + x

        @staticmethod
        @cached(cache)
        def static(x: int) -> int:
            return x

        @classmethod
        @cached(cache)
        def of_class(cls, x: int) -> str:
            return f"{cls.__name__}{x}"

        of_class_too: Any = cached(cache)(  # type: ignore[call-overload]  # works, but no overload declares it
            classmethod(lambda cls, x: f"{cls.__name__}{x}")
        )

    class Keyed(Report):
        def __cache_key__(self) -> int:
            return self.number

        @cached(cache)
        def total(self, x: int) -> int:
            self.calls += 1
            return self.number + x

    class Other(Plain):
        pass

    with pytest.raises(InvalidArgument, match=r"__cache_key__.*ignore=\('self',\)"):
        Plain(1).total(1)
    one, two = Plain(1), Plain(2)
    assert (one.shared(1), two.shared(1), two.calls) == (2, 2, 0)
    assert Plain.shared.invalidate(one, 1) is True
    first, same, other = Keyed(1), Keyed(1), Keyed(2)
    assert (first.total(1), same.total(1), other.total(1)) == (2, 2, 3)
    assert (first.calls, same.calls, other.calls) == (1, 0, 1)
    assert (Plain.static(5), one.static(5)) == (5, 5)
    plain, other_class = cast("Any", Plain), cast("Any", Other)
    assert (plain.of_class(1), other_class.of_class(1)) == ("Plain1", "Other1")
    assert (Plain.of_class_too(1), Other.of_class_too(1)) == ("Plain1", "Other1")


def test_custom_keys_replace_the_default_key(backend: Backend) -> None:
    cache = LRUCache(name="default", backend=backend)

    @cached(cache, key="user:{user_id}", version=3)
    def by_template(user_id: int, session: object = None) -> int:
        return user_id

    @cached(cache, key=lambda user_id, session: f"{user_id}")
    def by_function(user_id: int, session: object) -> int:
        return user_id

    assert re.search(r"by_template#\w+@3:user:5$", by_template.key(5))
    assert by_template(5, object()) == 5
    assert re.search(r"by_function#\w+:5$", by_function.key(5, object()))
    with pytest.raises(InvalidArgument, match="unknown"):
        cached(cache, ignore=("unknown",))(lambda x: x)

    def generator() -> Iterator[int]:
        yield 1

    with pytest.raises(InvalidArgument, match="not a generator"):
        cached(cache)(generator)


def test_key_includes_version_but_not_function_body(backend: Backend) -> None:
    cache = LRUCache(name="default", backend=backend)

    def make(result: str, version: int) -> Callable[[int], str]:
        """Return the function `work` of a module, before or after an edit."""
        module: dict[str, Any] = {"__name__": "a_module"}
        exec(f"def work(x): return {result!r}", module)
        made: Callable[[int], str] = cached(cache, version=version)(module["work"])
        return made

    assert make("old", 1)(5) == "old"
    assert make("new", 1)(5) == "old"
    assert make("new", 2)(5) == "new"


@pytest.mark.thorough
def test_keys_are_equal_in_all_processes() -> None:
    program = """
from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, cached
def f(*args, **kwargs): ...
f.__module__ = "m"
f = cached(LRUCache(backend=Backend("redis://127.0.0.1:1")))(f)
print(f.key({"b", "a", "c"}, {"x": 1, "y": (2, 3.5)}, z="z"))
"""
    keys = set()
    for seed in ("0", "1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", program]
        keys.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(keys) == 1


def test_decorated_coroutine_function_stays_a_coroutine_function(backend: Backend) -> None:
    async def function() -> None: ...

    assert asyncio.iscoroutinefunction(cached(LRUCache(name="default", backend=backend))(function))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inspect.unwrap(cached(LRUCache(name="default", backend=backend))(function)) is function


@pytest.mark.thorough
def test_functions_of_two_scripts_share_no_results(server: Server, namespace: str, tmp_path: Path) -> None:
    for name in ("bills", "offers"):
        (tmp_path / f"{name}.py").write_text(
            "import sys\n"
            "from agentperf_redis import AgentPerf\n"
            "perf = AgentPerf(sys.argv[1], namespace=sys.argv[2])\n"
            "@perf.cache().cached()\n"
            f"def total(x): return '{name}'\n"
            "print(total.key(1).split(':')[0], total(1))\n"
            "perf.close()\n"
        )

    def run(*script: str) -> str:
        words = [sys.executable, *script, server.url, namespace]
        paths = os.pathsep.join((str(ROOT), str(tmp_path)))
        return subprocess.run(
            words, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": paths}
        ).stdout.strip()

    other = tmp_path / "other"
    other.mkdir()
    (other / "bills.py").write_text((tmp_path / "offers.py").read_text())
    copied = tmp_path / "copied"
    copied.mkdir()
    (copied / "bills.py").write_text((tmp_path / "bills.py").read_text())

    bills, said = run(str(tmp_path / "bills.py")).split()
    assert (bills.partition("#")[0], said) == ("bills.total", "bills")
    assert run(str(tmp_path / "offers.py")).split()[1] == "offers"
    assert run(str(other / "bills.py")).split()[1] == "offers", "another script of the same name"
    assert run(str(copied / "bills.py")).split() == [bills, "bills"], "the same script in another folder"
    assert run("-m", "offers") == "offers.total offers"


def local_class() -> type:
    class Local:
        pass

    return Local


def test_class_and_its_name_have_different_keys(backend: Backend) -> None:
    @cached(LRUCache(name="default", backend=backend))
    def function(x: Any) -> str:
        return repr(x)

    keys = {function.key(x) for x in (Point, f"class {__name__}.Point", f"{__name__}.Point", _Caller)}
    assert len(keys) == 4
    with pytest.raises(InvalidArgument, match="part of a cache key"):
        function.key(local_class())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda cache: cache.cached(lambda x: x), r"write @cache\.cached\(\)"),
        (lambda cache: cached(cast("Any", "answers")), "cache is 'answers'; allowed: an LRUCache or TieredCache"),
        (lambda cache: cached(cache, key="user:{uid}")(waiting), r"of .*\.waiting: cache, key"),
        (lambda cache: cached(cache, key="user:{")(waiting), "a template such as"),
        (lambda cache: cached(cache)(cast("Any", functools.partial(len, "x"))), "needs name="),
    ],
)
def test_invalid_decorations_are_refused_at_once(backend: Backend, wrong: Callable[[Any], object], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        wrong(LRUCache(name="default", backend=backend))


def test_plain_function_that_returns_a_coroutine_is_refused(backend: Backend) -> None:
    async def later() -> int:
        return 1

    ask = cached(LRUCache(name="default", backend=backend))(lambda: later())  # noqa: PLW0108  must be a plain function
    for _ in range(2):
        with pytest.raises(InvalidArgument, match="declare a decorated function with async def"):
            _ = ask()


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a coroutine function in a plain function, as the decorators of vendors' clients do."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class AsyncCallable:
    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, x: int) -> int:
        await asyncio.sleep(0)
        self.calls += 1
        return x + 1


@pytest.mark.parametrize("form", ["wrapped", "object"])
@pytest.mark.parametrize("options", [{}, {"local_size": 9}], ids=["plain", "local"])
def test_coroutine_function_behind_a_plain_one_is_cached(
    backend: Backend, connect: Callable[..., Backend], server: Server, form: str, options: dict[str, Any]
) -> None:
    counted = AsyncCallable()

    async def ask(x: int) -> int:
        return await counted(x)

    def decorated(backend: Backend) -> Any:
        function = checked(ask) if form == "wrapped" else counted
        return cached(LRUCache(name="default", backend=backend, **options), name="ask")(function)

    first, elsewhere = decorated(backend), decorated(connect(server.url))

    async def main() -> None:
        assert list(await asyncio.gather(first(1), first(1), first(1))) == [2, 2, 2]
        assert [await first(1), await elsewhere(1), await elsewhere(1), await elsewhere(2)] == [2, 2, 2, 3]
        assert counted.calls == 2
        assert (await first.warm([1, 5])).computed == 1
        assert await first.refresh(1) == 2
        assert await first.invalidate(1) is True
        await first.cache_clear()
        assert await first(1) == 2

    asyncio.run(main())
    assert asyncio.run(first(1)) == 2, "the coroutine was made outside of a loop"
    assert asyncio.run(decorated(connect(server.url))(1)) == 2, "the same for the first call of a process"
    assert counted.calls == 5


def test_stale_value_of_a_wrapped_coroutine_function_is_refreshed(backend: Backend, raw: Raw, namespace: str) -> None:
    calls: list[int] = []

    async def count() -> int:
        calls.append(1)
        return len(calls)

    options: Any = {"name": "count", "soft_ttl": 0.05}
    assert asyncio.run(cached(LRUCache(name="default", backend=backend), 60, **options)(checked(count))()) == 1

    async def main() -> None:
        later = cached(LRUCache(name="default", backend=backend), 60, **options)(checked(count))
        await asyncio.sleep(0.1)
        assert await later() == 1, "the stale value"
        while await later() == 1:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(main(), 20))


def test_blocking_wrapper_of_a_coroutine_function_stays_blocking(backend: Backend) -> None:
    async def ask(x: int) -> int:
        return x + 1

    @cached(LRUCache(name="default", backend=backend))
    @functools.wraps(ask)
    def blocking(x: int) -> int:
        return asyncio.run(ask(x))

    results: list[Any] = [blocking(1), blocking(1), blocking(2)]
    assert results == [2, 2, 3]
    assert blocking.cache_info().computed == 2
    assert (blocking.warm([1, 3]).computed, blocking.refresh(1), blocking.invalidate(1)) == (1, 2, True)
    blocking.cache_clear()
    assert blocking(3) == 4
