"""A stale value is returned at once and refreshed in the background. If refreshes fail, the value has a maximum age."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest

from agentperf_redis import random_numbers
from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, TieredCache, maintenance
from agentperf_redis.cache.flows.single_flight import SingleFlight
from agentperf_redis.cache.freshness import Age, Freshness
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.keys import stored_name
from tests.support.forks import in_child
from tests.support.servers import Raw, Server, wait_until
from tests.support.stalls import StallDetector
from tests.support.workers import Workers

STALL_S = 0.2
"""If the machine stalls for this many seconds or more during a run, the run is repeated."""


def where(namespace: str, part: str) -> str:
    return f"{namespace}:{{cache:default}}:{part}"


COST_MS = "return string.match(redis.call('GET', KEYS[1]), '^%d+ (%d+) ', 15)"


class Source:
    """A function to cache. It counts its calls, takes a given time, and fails on request."""

    def __init__(self, takes_s: float = 0.0) -> None:
        self.calls = 0
        self.takes_s = takes_s
        self.fails = False
        self.threads: set[int] = set()
        self.may_return = threading.Event()
        self.may_return.set()

    def __call__(self) -> list[int]:
        self.calls += 1
        self.threads.add(threading.get_ident())
        time.sleep(self.takes_s)
        assert self.may_return.wait(20)
        if self.fails:
            raise ValueError(f"call {self.calls}")
        return [self.calls]


class Reader:
    """Reads one key of a cache repeatedly, through the blocking or the asyncio API."""

    def __init__(
        self, cache: LRUCache | TieredCache, source: Source, runner: asyncio.Runner | None, **options: Any
    ) -> None:
        self.cache, self.source, self.runner, self.options = cache, source, runner, options

    def ask(self) -> Any:
        if self.runner is None:
            return self.cache.get_or_compute("k", self.source, **self.options)

        async def read() -> Any:
            async def function() -> list[int]:
                return self.source()

            value = await self.cache.aio.get_or_compute("k", function, **self.options)
            await asyncio.sleep(0.002)  # gives background refreshes time to run on this loop
            return value

        return self.runner.run(read())

    def until(self, wanted: object, timeout_s: float = 10) -> float:
        """Read until the result is `wanted`: a value, or the type of an error. Return the elapsed seconds."""
        begun = now = time.monotonic()
        while now < begun + timeout_s:
            now = time.monotonic()
            try:
                answer: object = self.ask()
            except ValueError as error:
                answer = type(error)
            if answer == wanted:
                return time.monotonic() - begun
            time.sleep(0.005)
        raise AssertionError(f"never {wanted!r}")


NO_LONGER_FRESH = """
local before, fresh, after = string.match(redis.call('GET', KEYS[1]), '^(..............%d+ %d+ )(%d+)( .*)$')
redis.call('SET', KEYS[1], before .. string.rep('0', #fresh - 1) .. '1' .. after, 'KEEPTTL')
"""
"""Makes an entry fresh for one millisecond from its write."""


def no_longer_fresh(cache: LRUCache | TieredCache, raw: Raw, key: str) -> None:
    """Expire the soft TTL of an entry at once instead of waiting, and drop the local copies of the entry."""
    raw.eval(NO_LONGER_FRESH, 1, cache._shared_state.keys.entry(key))
    if cache._shared_state.local is not None:
        cache._shared_state.local.drop(stored_name(key))
    time.sleep(0.002)


@pytest.fixture(params=["blocking", "asyncio"])
def loop(request: pytest.FixtureRequest, runner: asyncio.Runner) -> asyncio.Runner | None:
    return runner if request.param == "asyncio" else None


@pytest.mark.parametrize("kind", ["redis", "local", "strict", "tiered"])
def test_stale_value_returns_at_once_and_is_refreshed(
    backend: Backend, raw: Raw, loop: asyncio.Runner | None, kind: str
) -> None:
    kinds: dict[str, Callable[[], LRUCache | TieredCache]] = {
        "redis": lambda: LRUCache(name="default", backend=backend),
        "local": lambda: LRUCache(local_size=10, name="default", backend=backend),
        "strict": lambda: LRUCache(strict=True, name="default", backend=backend),
        "tiered": lambda: TieredCache(name="default", backend=backend),
    }
    cache = kinds[kind]()
    source = Source()
    reader = Reader(cache, source, loop, ttl=60, soft_ttl=30)
    assert reader.ask() == [1]
    assert reader.ask() == [1]
    no_longer_fresh(cache, raw, "k")
    cache.get("k")  # if `kind` is "local", this read makes a local copy of the stale value

    if loop is None:  # only without a loop: on a loop, a blocked function would block the reader, too
        source.may_return.clear()
    assert reader.ask() == [1], "the stale value is returned at once: the function has not returned yet"
    source.may_return.set()
    reader.until([2])
    assert source.calls == 2
    if loop is None:
        assert source.threads == {threading.get_ident(), *source.threads}
        assert len(source.threads) == 2, "another thread has refreshed it"


@dataclass(frozen=True)
class Reading:
    """The observations of one process that read one key continuously.

    Attributes:
        computed: start and end of each computation in the process.
        waits: how often the process computed or waited for a computation.
        reads: when each read began, and how long it took.
    """

    computed: list[tuple[float, float]]
    waits: int
    reads: list[tuple[float, float]]


def read_for(url: str, namespace: str, seconds: float, soft_ttl: float, takes_s: float) -> Reading:
    """A worker process: read one key continuously."""
    cache = LRUCache(name="default", backend=Backend(url, namespace=namespace))
    computed: list[tuple[float, float]] = []
    waits: list[str] = []
    reads: list[tuple[float, float]] = []
    compute_lease = SingleFlight._join_or_claim

    def noted(self: SingleFlight, name: str, key: str, *, look: bool, blocking: bool) -> Any:
        waits.append(key)  # this call computes, or waits for a computation
        return compute_lease(self, name, key, look=look, blocking=blocking)

    def work() -> int:
        begun = time.monotonic()
        time.sleep(takes_s)
        computed.append((begun, time.monotonic()))
        return os.getpid()

    cache.get("k")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SingleFlight, "_join_or_claim", noted)
        end = time.monotonic() + seconds
        while (begun := time.monotonic()) < end:
            cache.get_or_compute("k", work, 60, soft_ttl=soft_ttl)
            reads.append((begun, time.monotonic() - begun))
    wait_until(lambda: not cache._shared_state.flights._flights, "background refreshes to end")
    cache._backend.close()
    return Reading(computed, len(waits), reads)


@pytest.mark.thorough
def test_processes_refresh_once_per_soft_ttl_without_waiting(
    server: Server, namespace: str, workers: Workers, connect: Callable[..., Backend]
) -> None:
    seconds, soft_ttl, takes_s = 3.0, 0.75, 0.25
    for attempt in range(4):
        place = f"{namespace}.{attempt}"
        LRUCache(name="default", backend=connect(server.url, namespace=place)).get_or_compute(
            "k", lambda: 0, 60, soft_ttl=0.001
        )
        results = workers.run(read_for, [(server.url, place, seconds, soft_ttl, takes_s)] * 4)

        computed = sorted(each for result in results for each in result.computed)
        reads = sorted(each for result in results for each in result.reads)
        assert [result.waits for result in results] == [0] * 4
        # A value is fresh for the soft TTL after its write. But a process only estimates the server's time, so the
        # process may refresh the value too early. The estimate is ahead by at most one round trip. No round trip is
        # longer than the longest read. Roundings add at most 2 ms.
        early_s = max(took for _, took in reads) + 0.002
        fresh_s = max(0.0, soft_ttl - early_s)
        assert all(later >= ended + fresh_s for (_, ended), (later, _) in pairwise(computed)), "one refresher at a time"
        times = sorted(took for _, took in reads)
        gap = max(later - sooner for (sooner, _), (later, _) in pairwise(reads))
        computing_s = max(ended - begun for begun, ended in computed)
        if gap < STALL_S and early_s < STALL_S and computing_s < takes_s + STALL_S:
            assert len(reads) > 1000
            assert abs(len(computed) - seconds / soft_ttl) <= 1
            assert times[-len(times) // 500] < takes_s
            return
    # The machine stalled in every attempt. So only a lower bound for the number of computations is checked here. The
    # check with `fresh_s` above gives the upper bound. No computation starts while the computing process or all readers
    # stall, so the time of the stalls is subtracted.
    stalls = sum(later - sooner for (sooner, _), (later, _) in pairwise(reads) if later - sooner > STALL_S / 4)
    late = sum(max(0.0, ended - begun - takes_s) for begun, ended in computed)
    assert (seconds - stalls - late) / soft_ttl - 1 <= len(computed)


def test_failing_function_raises_after_the_stale_limit(
    backend: Backend, loop: asyncio.Runner | None, raw: Raw, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "REPORT_AFTER_S", 3600)  # no reports: they would correct the estimated server time
    soft_ttl, limit = 0.1, 0.8
    source = Source()
    reader = Reader(
        LRUCache(name="default", backend=backend), source, loop, ttl=60, soft_ttl=soft_ttl, stale_if_error=limit
    )
    before = time.monotonic()
    assert reader.ask() == [1]
    written = time.monotonic()
    source.fails = True

    served, refused = list[float](), list[float]()
    # `known` is the time when this test first finds a failed computation on the server. The call that starts the
    # failing refresh returns the stale value, even after the stale limit.
    known = math.inf
    while len(refused) < 3 and time.monotonic() < written + 30:
        begun = time.monotonic()
        try:
            assert reader.ask() == [1]
            served.append(begun)
        except ValueError:
            refused.append(time.monotonic())
        if known == math.inf and raw.hexists(where(namespace, "l:k"), "failed"):
            known = time.monotonic()
        time.sleep(0.005)

    assert len(refused) == 3
    # The estimate of the server's time is wrong by at most the duration of the first call. Roundings add at most 2 ms.
    assert min(refused) > before + soft_ttl + limit - (written - before) - 0.002
    assert max(served) < max(known, written + soft_ttl + limit + 0.002)
    assert max(served) > before + soft_ttl, "stale values were returned"
    assert source.calls <= 5, "a failed refresh is not retried for a second; then errors are raised"
    source.fails = False
    assert reader.ask() == [source.calls], "a reader that got errors computes, so it is the first to see the recovery"


@pytest.mark.parametrize("options", [{}, {"strict": True}, {"local_size": 10}], ids=str)
def test_failed_read_is_a_miss_and_saves_nothing(
    backend: Backend, raw: Raw, namespace: str, loop: asyncio.Runner | None, options: dict[str, Any]
) -> None:
    cache, source = LRUCache(name="default", backend=backend, **options), Source(takes_s=0.05)
    reader = Reader(cache, source, loop, ttl=60, soft_ttl=0.05, stale_if_error=0.1)
    served = failed = 0
    reader.ask()
    cache.get("k")
    cost_ms = int(raw.eval(COST_MS, 1, where(namespace, "e:k")))
    assert cost_ms >= 50
    source.fails, source.takes_s = True, 0.0
    end = time.monotonic() + 10
    while failed < 20 and time.monotonic() < end:
        try:
            reader.ask()
            served += 1
        except ValueError:
            failed += 1
    assert failed == 20
    wait_until(lambda: not cache._shared_state.flights._flights, "background refreshes to end")

    stats = cache.stats()

    assert (stats.hits, stats.misses) == (served + 1, 1 + failed)
    assert round(stats.seconds_saved * 1000) == (served + 1) * cost_ms, "with and without strict"


def test_too_old_copy_is_not_reported_as_read(backend: Backend, raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread reports the reads after a reader has found the copy, and before this reader checks its age."""
    cache, age, seen, served = (
        LRUCache(local_size=10, name="default", backend=backend),
        Freshness.age,
        list[Age](),
        list[str](),
    )

    def reported_meanwhile(freshness: Freshness, *args: Any) -> Age:
        cache.flush()
        seen.append(age(freshness, *args))
        return seen[-1]

    cache.get_or_compute("k", lambda: "old", 60, soft_ttl=0.001)
    wait_until(lambda: cache.get("k") and cache._local is not None and cache._local.find("k"), "a local copy")
    cache.flush()
    hits = cache.stats().hits
    monkeypatch.setattr(Freshness, "age", reported_meanwhile)

    def fail() -> str:
        raise ValueError

    def refused() -> bool:
        with contextlib.suppress(ValueError):
            served.append(cache.get_or_compute("k", fail, 60, soft_ttl=0.001, stale_if_error=0.002))
            return False
        return True

    wait_until(refused, "the copy to be too old")
    wait_until(lambda: not cache._shared_state.flights._flights, "background refreshes to end")
    assert Age.OLD in seen
    assert cache.stats().hits - hits == len(served)


@pytest.mark.thorough
def test_failed_refresh_delays_retries_of_all_processes(
    backend: Backend, server: Server, connect: Callable[..., Backend]
) -> None:
    source = Source()
    readers = [
        Reader(LRUCache(name="default", backend=each), source, None, ttl=60, soft_ttl=0.05)
        for each in (backend, connect(server.url))
    ]
    assert readers[0].ask() == [1]
    source.fails = True
    begin = time.monotonic()
    while time.monotonic() < begin + 1.5 or source.calls < 2:
        assert [reader.ask() for reader in readers] == [[1], [1]]
        time.sleep(0.01)
    assert source.calls <= 2 + (time.monotonic() - begin), "after 0.05 s, and then once a second"
    source.fails = False
    readers[1].until([source.calls + 1])


def test_hard_expiry_overrides_all_options(backend: Backend, raw: Raw, loop: asyncio.Runner | None) -> None:
    source = Source()
    reader = Reader(
        LRUCache(local_size=10, name="default", backend=backend), source, loop, ttl=0.4, soft_ttl=0.1, stale_if_error=60
    )
    with StallDetector(raw.ping) as stalls:
        begun = time.monotonic()
        assert reader.ask() == [1]
        source.fails = True
        reader.until(ValueError)
        ended = time.monotonic()
        assert ended - begun >= 0.4
        assert stalls.own(begun, ended) < 1.5


@pytest.mark.parametrize("forget", ["delete", "clear", "invalidate_tags", "put"])
def test_refresh_begun_before_invalidation_is_not_stored(
    backend: Backend, server: Server, connect: Callable[..., Backend], forget: str
) -> None:
    cache, remote = LRUCache(name="default", backend=backend), LRUCache(name="default", backend=connect(server.url))
    begun, release = threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        assert release.wait(20)
        return "of before"

    options: Any = {"ttl": 60, "soft_ttl": 0.05, "tags": ["t"]}
    assert cache.get_or_compute("k", lambda: "old", **options) == "old"
    time.sleep(0.06)
    assert cache.get_or_compute("k", slow, **options) == "old"
    assert begun.wait(10)

    match forget:
        case "delete":
            remote.delete("k")
        case "clear":
            remote.clear()
        case "invalidate_tags":
            remote.invalidate_tags("t")
        case _:
            remote.put("k", "put")

    expected = "put" if forget == "put" else None
    assert remote.get("k") == expected, "the stale value is gone as well"
    release.set()
    wait_until(lambda: not cache._shared_state.flights._flights, "the refresh to end")
    assert cache.get("k") == remote.get("k") == expected
    assert remote.get_or_compute("k", lambda: "new", **options) == (expected or "new")


def refresh_for_ever(url: str, namespace: str) -> Iterator[str]:
    cache = LRUCache(name="default", backend=Backend(url, namespace=namespace))
    assert cache.get_or_compute("k", lambda: time.sleep(600), 60, soft_ttl=0.05) == "old"
    yield "refreshing"


def test_killed_refresher_is_replaced_without_waiting_readers(
    backend: Backend, server: Server, namespace: str, workers: Workers, raw: Raw
) -> None:
    cache, source = LRUCache(name="default", backend=backend), Source()
    cache.get_or_compute("k", lambda: "old", 60, soft_ttl=0.05)
    time.sleep(0.06)
    worker = workers.start(refresh_for_ever, server.url, namespace)
    worker.said()
    wait_until(lambda: raw.exists(where(namespace, "l:k")), "the refresher's lease")
    worker.kill()

    reader = Reader(cache, source, None, ttl=60, soft_ttl=0.05)
    assert reader.ask() == "old"
    assert source.calls == 0
    raw.pexpire(where(namespace, "l:k"), 100)  # the lease now ends after 0.1 s instead of its full TTL
    reader.until([1])


@pytest.mark.thorough
def test_early_refresh_prevents_misses(backend: Backend, raw: Raw) -> None:
    for attempt in range(10):
        cache, source = LRUCache(name=f"c{attempt}", backend=backend), Source(takes_s=0.05)
        reader = Reader(cache, source, None, ttl=1.0, early_refresh=2.0)
        with StallDetector(raw.ping) as stalls:
            reader.ask()
            misses = cache.stats().misses
            begin = time.monotonic()
            while source.calls < 4:
                reader.ask()
                time.sleep(0.001)
            end = time.monotonic()
            missed = cache.stats().misses - misses
            # While the machine stalls, no value is refreshed early. So a value may expire and be missed.
            if not missed or stalls.within(begin, end) < 0.2:
                break
    assert missed == 0, "no reader missed the value, so none waited"
    assert end - begin > 0.75, "the value was not refreshed all the time"


def test_jitter_spreads_values_stored_together(backend: Backend, raw: Raw, namespace: str) -> None:
    lru, tiered = LRUCache(100, 50, name="default", backend=backend), TieredCache(name="default", backend=backend)
    random_numbers.seed(20)
    for number in range(20):
        lru.get_or_compute(f"hard{number}", lambda: 1, jitter=0.1)
        lru.get_or_compute(f"soft{number}", lambda: 1, 40, soft_ttl=20, jitter=0.1)
        tiered.get_or_compute(f"tier{number}", lambda: 1, jitter=0.1)
    hard = [raw.pttl(where(namespace, f"e:hard{number}")) for number in range(20)]
    soft = [int(raw.get(where(namespace, f"e:soft{number}"))[14:].split(" ")[2]) for number in range(20)]
    whole = [raw.pttl(where(namespace, f"e:soft{number}")) for number in range(20)]
    tier = [raw.pttl(f"{namespace}:{{tiered:default}}:e:tier{number}") for number in range(20)]
    for ttls, middle in ((hard, 50_000), (soft, 20_000), (tier, 3_600_000)):
        assert 0.85 * middle < min(ttls) < 0.99 * middle
        assert 1.01 * middle < max(ttls) <= 1.1 * middle
    assert max(whole) <= 40_000, "with a soft TTL, the hard TTL is not varied"


def test_decorated_function_is_refreshed_with_its_arguments(backend: Backend, raw: Raw) -> None:
    cache = LRUCache(local_size=10, name="default", backend=backend)
    calls: list[str] = []

    @cache.cached(60, soft_ttl=30)
    def ask(question: str) -> str:
        calls.append(question)
        return f"{question}{calls.count(question)}"

    assert [ask("a"), ask("b")] == ["a1", "b1"]
    for question in "ab":
        no_longer_fresh(cache, raw, ask.key(question))
    assert [ask("a"), ask("b")] == ["a1", "b1"]
    wait_until(lambda: (ask("a"), ask("b")) == ("a2", "b2"), "both to be refreshed")
    assert ask.cache_info().computed == len(calls)
    ask.invalidate("a")
    assert ask("a")[:-1] == "a"


@pytest.mark.parametrize("options", [{"soft_ttl": 60}, {"jitter": 2}, {"stale_if_error": -1}, {"unknown": 1}])
def test_invalid_options_are_refused_before_any_command(
    backend: Backend, raw: Raw, namespace: str, runner: asyncio.Runner, options: dict[str, Any]
) -> None:
    cache = LRUCache(name="default", backend=backend)
    for refuse in (
        lambda: cache.get_or_compute("k", lambda: 1, 30, **options),
        lambda: runner.run(cache.aio.get_or_compute("k", lambda: 1, 30, **options)),
        lambda: cache.cached(30, **options),
    ):
        with pytest.raises(InvalidArgument):
            refuse()
    assert not list(raw.scan_iter(match=f"{namespace}:*"))


def test_closing_cancels_refreshes_of_a_loop(
    backend: Backend, runner: asyncio.Runner, raw: Raw, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = LRUCache(name="default", backend=backend)

    async def scene() -> None:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def slow() -> str:
            begun.set()
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()
            return "late"

        await cache.aio.get_or_compute("k", lambda: "old", 60, soft_ttl=0.02)
        await asyncio.sleep(0.03)
        assert await cache.aio.get_or_compute("k", slow, 60, soft_ttl=0.02) == "old"
        await asyncio.wait_for(begun.wait(), 10)
        await backend.aclose()
        await asyncio.wait_for(ended.wait(), 20)

    runner.run(scene())
    assert raw.exists(where(namespace, "l:k")) == 0, "the lease was released while the connection was open"
    assert caplog.records == []


def test_closing_and_forked_child_skip_slow_refreshes(server: Server, connect: Callable[..., Backend]) -> None:
    backend = connect(server.url)
    cache = LRUCache(name="default", backend=backend)
    release, begun = threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        release.wait(20)
        return "late"

    cache.get_or_compute("k", lambda: "old", 60, soft_ttl=0.02)
    time.sleep(0.03)
    assert cache.get_or_compute("k", slow, 60, soft_ttl=0.02) == "old"
    assert begun.wait(10)

    def child() -> None:
        assert cache.get_or_compute("k", slow, 60, soft_ttl=0.02) == "old"
        assert cache.get_or_compute("child", lambda: 1, 60, soft_ttl=0.02) == 1
        backend.close()

    in_child(child)
    with StallDetector() as stalls:
        closing = time.monotonic()
        backend.close()
        assert stalls.own(closing, time.monotonic()) < 2
    release.set()
