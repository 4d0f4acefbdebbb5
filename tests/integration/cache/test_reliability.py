"""Faults of networks, servers and forks: a cache does nothing twice and returns nothing outdated."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, TieredCache, compute, maintenance
from agentperf_redis.cache.commands import entries
from agentperf_redis.cache.entry_format import unpack_size
from agentperf_redis.cache.flows import access_reports
from agentperf_redis.cache.maintenance import Maintenance
from agentperf_redis.cache.process.access_buffer import AccessBuffer, AccessReport
from agentperf_redis.cache.process.compute_lease import ComputeLease
from agentperf_redis.cache.process.shard import Shard
from agentperf_redis.command import Command, Wait
from agentperf_redis.errors import BackendFull, BackendUnavailable
from agentperf_redis.script import Script
from tests.support.cache_scan import faults
from tests.support.calls import Call
from tests.support.forks import in_child
from tests.support.proxy import Proxy
from tests.support.servers import Raw, Server, wait_until
from tests.support.stalls import StallDetector, hurry

LONG_S = 60.0
"""TTL of a lease: so long that nothing in a test waits for its end."""
PUT, TOUCH, RENEW = Script("cache/put"), Script("cache/report_reads"), Script("cache/renew_claim")


def state(raw: Raw, namespace: str) -> dict[str, Any]:
    """Return the order of a cache's entries, their sizes and hit counts, and the cache's counters."""
    where = f"{namespace}:{{cache:default}}"
    meta = raw.hgetall(f"{where}:meta")
    counters = {name: meta.get(name, "0") for name in ("bytes", "evicted", "hot", "warm", "cold", "misses")}
    return {"order": raw.zrange(f"{where}:cold", 0, -1), "size": raw.hgetall(f"{where}:size"), **counters}


def everything(raw: Raw) -> dict[str, Any]:
    return {key: raw.dump(key) for key in raw.scan_iter()}


@pytest.fixture
def through_proxy(proxy: Proxy, connect: Callable[..., Backend]) -> Backend:
    return connect(proxy.url)


def test_put_with_lost_reply_is_executed_once(
    call: Call, through_proxy: Backend, proxy: Proxy, raw: Raw, namespace: str
) -> None:
    cache = LRUCache(max_size=3, name="default", backend=through_proxy)
    for key in "abc":
        call(cache, "put", key, key)
    call(cache, "get", "a")
    call(cache, "get", "nothing")
    lost, before = proxy.reset_after_reply(only=PUT), proxy.count(PUT)

    assert call(cache, "put", "d", 4) is True

    assert lost.caught.is_set()
    assert proxy.count(PUT) - before == 2
    after = state(raw, namespace)
    assert after["order"] == ["c", "a", "d"]
    assert unpack_size(after["size"]["a"])[0] == 1, "the read is counted once"
    assert (after["evicted"], after["cold"], after["misses"]) == ("1", "1", "1")
    assert call(cache, "stats").hits == 1, "the report with unknown result was sent again and recognised"
    assert faults(raw, namespace, "cache", "default") == []


def test_lost_put_is_sent_again(call: Call, through_proxy: Backend, proxy: Proxy, raw: Raw, namespace: str) -> None:
    cache = LRUCache(name="default", backend=through_proxy)
    call(cache, "put", "k", "old")
    proxy.reset_before_request(only=PUT)

    assert call(cache, "put", "k", "new") is True

    assert call(cache, "get", "k") == "new"
    assert faults(raw, namespace, "cache", "default") == []


@pytest.mark.parametrize("many", [False, True])
def test_cancelled_put_does_not_overwrite_a_newer_one(
    through_proxy: Backend, proxy: Proxy, runner: asyncio.Runner, raw: Raw, namespace: str, *, many: bool
) -> None:
    cache = LRUCache(name="default", backend=through_proxy)
    cache.put("k", "older")
    names = ["j", "k"] if many else ["k"]  # `k` is the last key, so the fault below holds the put of `k`
    held = proxy.hold(only=PUT, nth=len(names), reset=False)

    async def scene() -> None:
        put = cache.aio.put_many(dict.fromkeys(names, "old")) if many else cache.aio.put("k", "old")
        old = asyncio.create_task(put)
        await asyncio.to_thread(held.wait)
        old.cancel()
        with pytest.raises(asyncio.CancelledError):
            await old
        assert await cache.aio.put("k", "new")

    runner.run(scene())
    held.deliver()

    assert cache.get("k") == "new"
    assert faults(raw, namespace, "cache", "default") == []


def test_closing_waits_once_for_a_lost_server(connect: Callable[..., Backend], server: Server) -> None:
    backend = connect(server.url)
    caches = [LRUCache(name=f"c{number}", backend=backend) for number in range(8)]
    for cache in caches:
        cache.put("k", 1)
        cache.get("k")
    server.pause()
    try:
        with StallDetector() as stalls:
            begun = time.monotonic()
            backend.close()
            assert stalls.own(begun, time.monotonic()) < 2
    finally:
        server.resume()


@pytest.mark.thorough
def test_cancelled_claim_leaves_no_lease(
    through_proxy: Backend, proxy: Proxy, runner: asyncio.Runner, raw: Raw, namespace: str
) -> None:
    cache = LRUCache(name="default", backend=through_proxy)
    cache.put("other", 1)
    lost = proxy.swallow(only=Script("cache/claim"))  # the lease is granted, but the reply is lost

    async def scene() -> None:
        first = asyncio.create_task(cache.aio.get_or_compute("k", lambda: "never called"))
        await asyncio.to_thread(lost.wait)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first

    runner.run(scene())

    assert raw.exists(f"{namespace}:{{cache:default}}:l:k") == 0


@pytest.mark.parametrize("script", ["claim", "put"])
def test_lease_whose_end_was_lost_is_released_when_the_server_answers(
    call: Call, proxy: Proxy, connect: Callable[..., Backend], server: Server, script: str
) -> None:
    """Either the lease is granted but the reply to the claim is lost, or the put of the value never arrives."""
    cache = LRUCache(name="default", backend=connect(proxy.url, deadline=0.3), lease=LONG_S)
    remote = LRUCache(name="default", backend=connect(server.url), lease=LONG_S)
    call(cache, "put", "other", 1)
    fault = proxy.swallow if script == "claim" else proxy.reset_before_request
    lost = fault(only=Script(f"cache/{script}"), times=math.inf)
    assert call(cache, "get_or_compute", "k", lambda: "mine") == "mine"
    lost.times = 0

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(remote.get_or_compute, "k", lambda: "other").result(LONG_S / 2) == "other"
    wait_until(lambda: not cache._shared_state.shards[0].pending_releases, "the reply to the release")


def test_report_with_lost_reply_counts_once(
    call: Call, through_proxy: Backend, proxy: Proxy, raw: Raw, namespace: str
) -> None:
    cache = LRUCache(name="default", backend=through_proxy)
    call(cache, "put_many", {"a": 1, "b": 2})
    call(cache, "flush")
    lost = proxy.reset_after_reply(only=TOUCH)
    for key in ("a", "a", "b", "x"):
        call(cache, "get", key)

    call(cache, "flush")

    assert lost.caught.is_set()
    stats = call(cache, "stats")
    assert (stats.hits, stats.misses) == (3, 1)
    assert [unpack_size(text)[0] for text in raw.hmget(f"{namespace}:{{cache:default}}:size", "a", "b")] == [2, 1]


@pytest.mark.parametrize("begins", ["before the put looks", "after the put looked"])
def test_put_follows_the_reads_being_reported(
    proxy: Proxy,
    connect: Callable[..., Backend],
    raw: Raw,
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
    begins: str,
) -> None:
    monkeypatch.setattr(maintenance, "REPORT_AFTER_S", 3600)
    cache = LRUCache(name="default", backend=connect(proxy.url, deadline=20.0))
    cache.put_many({"a": 1, "b": 2})
    cache.flush()
    cache.get("a")
    held = proxy.hold(only=TOUCH, reset=False, after=0.6)
    flushing = threading.Thread(target=cache.flush)
    take = AccessBuffer.take

    def begin() -> None:
        flushing.start()
        held.wait()

    def take_when_that_has_begun(self: AccessBuffer, *, flush: bool = False) -> AccessReport:
        if not flush and begins == "after the put looked" and not held.caught.is_set():
            begin()
        return take(self, flush=flush)

    monkeypatch.setattr(AccessBuffer, "take", take_when_that_has_begun)
    if begins == "before the put looks":
        begin()

    assert cache.put("c", 3) is True

    flushing.join()
    assert held.caught.is_set()
    assert state(raw, namespace)["order"] == ["b", "a", "c"]


def test_keys_include_reads_that_another_thread_reports(
    proxy: Proxy, connect: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "REPORT_AFTER_S", 3600)
    cache = LRUCache(name="default", backend=connect(proxy.url, deadline=20.0))
    cache.put_many({"a": 1, "b": 2, "c": 3})
    cache.flush()
    cache.get("a")
    held = proxy.hold(only=TOUCH, reset=False, after=0.6)
    reporting = threading.Thread(target=cache.flush)
    take = AccessBuffer.take

    def take_when_that_has_begun(self: AccessBuffer, *, flush: bool = False) -> AccessReport:
        if threading.current_thread() is not reporting and not held.caught.is_set():
            reporting.start()
            held.wait()
            cache.get("b")  # this read is not in the report that is being sent
        return take(self, flush=flush)

    monkeypatch.setattr(AccessBuffer, "take", take_when_that_has_begun)

    assert cache.keys() == ["c", "a", "b"]

    reporting.join()
    assert held.caught.is_set()


def test_late_put_does_not_overwrite_a_newer_one(
    call: Call, proxy: Proxy, server: Server, connect: Callable[..., Backend], raw: Raw, namespace: str
) -> None:
    backend = connect(proxy.url)
    slow, other = LRUCache(name="default", backend=backend), LRUCache(name="default", backend=connect(server.url))
    call(slow, "put", "k", "first")
    hurry(backend, 0.3)
    held = proxy.hold(only=PUT, reset=False)
    with pytest.raises(BackendUnavailable) as lost:
        call(slow, "put", "k", "late")
    assert lost.value.outcome == "unknown"
    call(other, "put", "k", "newer")
    wait_until(held.caught.is_set, "the request to be in flight")
    wait_until(lambda: call(other, "put", "later", 1), "time to pass")
    server_ms = int(raw.time()[0]) * 1000 + raw.time()[1] // 1000
    wait_until(lambda: raw.time()[0] * 1000 + raw.time()[1] // 1000 > server_ms + 400, "the deadline to pass")

    assert b"\r\n:-6" in held.deliver(), "too late"

    assert call(other, "get", "k") == "newer"
    assert faults(raw, namespace, "cache", "default") == []


def test_late_first_copy_changes_nothing(
    call: Call,
    through_proxy: Backend,
    proxy: Proxy,
    server: Server,
    connect: Callable[..., Backend],
    raw: Raw,
    namespace: str,
) -> None:
    cache, other = (
        LRUCache(name="default", backend=through_proxy),
        LRUCache(name="default", backend=connect(server.url)),
    )
    call(cache, "put", "k", "first")
    held = proxy.hold(only=PUT)
    assert call(cache, "put", "k", "second") is True, "the repetition arrived"
    call(other, "put", "k", "third")

    held.deliver()

    assert call(cache, "get", "k") == "third"
    assert faults(raw, namespace, "cache", "default") == []


def test_doubtful_repetition_makes_the_key_a_miss(
    call: Call,
    through_proxy: Backend,
    proxy: Proxy,
    server: Server,
    connect: Callable[..., Backend],
    raw: Raw,
    namespace: str,
) -> None:
    """A put is executed, but its reply is lost. Another process overwrites the value before the put is repeated.

    The repetition must not restore the overwritten value.
    """
    cache, other = (
        LRUCache(name="default", backend=through_proxy),
        LRUCache(name="default", backend=connect(server.url)),
    )
    call(cache, "put", "k", "first")

    def overwrite(request: tuple[bytes, ...]) -> bool:
        if request[0] != b"EVALSHA" or b"second" not in b"".join(request):
            return False
        if seen:
            other.put("k", "third")
        seen.append(request)
        return True

    seen: list[tuple[bytes, ...]] = []
    other.put("x", 1)
    proxy.reset_after_reply(only=overwrite)
    proxy.delay(0, only=overwrite)

    stored = call(cache, "put", "k", "second")

    assert len(seen) == 2
    assert stored is False
    assert call(cache, "get", "k") is None
    assert faults(raw, namespace, "cache", "default") == []


def test_unloaded_script_is_not_a_repetition(call: Call, own_server: Server, connect: Callable[..., Backend]) -> None:
    cache = LRUCache(name="default", backend=connect(own_server.url))
    call(cache, "put", "k", 1)
    with own_server.client() as client:
        client.script_flush()
        assert call(cache, "put", "k", 2) is True
        assert not list(client.scan_iter(match="*resent"))
    assert call(cache, "get", "k") == 2


def test_unloaded_script_is_sent_once_for_all_puts(
    call: Call, own_server: Server, connect: Callable[..., Backend]
) -> None:
    cache = LRUCache(max_size=1000, name="default", backend=connect(own_server.url))
    call(cache, "put", "k", 1)
    with own_server.client() as client:
        client.script_flush()
        client.config_resetstat()
        assert call(cache, "put_many", {f"k{number}": number for number in range(600)}) == 600
        # One EVAL is enough for all puts. On a slow machine, background jobs send a few more.
        assert client.info("commandstats")["cmdstat_eval"]["calls"] < 10
        assert client.info("stats")["total_net_input_bytes"] < 1_800_000  # 600 copies of the script would be over 30 MB
    assert call(cache, "get", "k599") == 599


def test_emptied_server_gets_its_settings_again(
    call: Call, own_server: Server, connect: Callable[..., Backend]
) -> None:
    cache, tiered = (
        LRUCache(max_size=2, name="default", backend=connect(own_server.url)),
        TieredCache(name="default", backend=connect(own_server.url)),
    )
    call(cache, "put", "a", 1)
    call(tiered, "put", "a", 1)
    own_server.restart()
    assert call(cache, "get", "a") is None
    for key in "abc":
        assert call(cache, "put", key, key) is True
    with own_server.client() as client:
        client.flushall()  # breaks no connection, so the process is not notified
    assert call(tiered, "get", "a") is None
    assert call(tiered, "delete", "a") is False
    assert call(tiered, "get_or_compute", "a", lambda: 3) == 3
    assert call(tiered, "get", "a") == 3
    assert call(cache, "get_stats")["max_size"] == 2


def test_freeing_commands_work_on_a_full_server(
    call: Call, own_server: Server, connect: Callable[..., Backend]
) -> None:
    cache = LRUCache(name="default", backend=connect(own_server.url))
    call(cache, "put_many", {f"k{number}": "x" * 100 for number in range(50)})
    with own_server.client() as client:
        client.config_set("maxmemory", "1")
        before = everything(client)
        with pytest.raises(BackendFull):
            call(cache, "put", "more", 1)
        assert call(cache, "get_or_compute", "more", lambda: "computed") == "computed"
        assert call(cache, "get", "more") is None
        assert everything(client) == before
        assert call(cache, "get", "k1") == "x" * 100
        assert call(cache, "delete", "k1") is True
        call(cache, "invalidate_tags", "t")
        call(cache, "clear")
        assert 0 < call(cache, "sweep") <= 49  # a report of reads may already have deleted some entries
        assert client.keys("*:e:*") == []
        client.config_set("maxmemory", "0")
    assert call(cache, "size") == 0
    assert call(cache, "put", "more", 1) is True


@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param(more, marks=pytest.mark.thorough) for more in ({"strict": True}, {"local_size": 10}))],
)
def test_reads_work_on_a_full_server(
    call: Call, own_server: Server, connect: Callable[..., Backend], options: dict[str, Any]
) -> None:
    cache = LRUCache(2000, name="default", backend=connect(own_server.url), **options)
    call(cache, "put_many", {f"k{number}": number for number in range(600)}, 60, tags=["t"])
    call(cache, "invalidate_tags", "u")
    latecomer = LRUCache(2000, name="default", backend=connect(own_server.url), **options)
    with own_server.client() as client:
        client.config_set("maxmemory", "1")
        assert [call(cache, "get", f"k{number}") for number in range(400)] == list(range(400))
        assert call(latecomer, "get", "k1") == 1
        assert call(latecomer, "get", "none") is None
        assert len(call(latecomer, "get_many", [f"k{number}" for number in range(400)])) == 400
        assert call(cache, "get_or_compute", "k2", lambda: "again") == 2
        assert call(cache, "entry", "k3").value == 3
        assert len(call(cache, "keys")) == 600
        assert call(cache, "stats").hits == 0, "the reads are not reported yet"
        with pytest.raises(BackendFull):
            call(cache, "put", "more", 1)
        client.config_set("maxmemory", "0")
    if "strict" not in options:
        call(latecomer, "flush")
        stats = call(cache, "stats")
        assert (stats.hits, stats.misses) == (400 + 1 + 400 + 1, 1)


def test_forked_child_starts_with_empty_buffers(backend: Backend, raw: Raw, namespace: str) -> None:
    cache = LRUCache(name="default", backend=backend)
    cache.put("k", 1)
    for _ in range(3):
        cache.get("k")
    busy, release = threading.Event(), threading.Event()

    def work() -> str:
        busy.set()
        release.wait(30)
        return "parent's"

    leader = threading.Thread(target=cache.get_or_compute, args=("slow", work))
    leader.start()
    assert busy.wait(10)

    def child() -> None:
        assert cache.get("k") == 1
        assert not cache._shared_state.flights._flights
        cache.put("child", 2)
        backend.close()

    in_child(child)
    release.set()
    leader.join()
    assert cache.stats().hits == 4, "three here, one in the child"
    assert (cache.get("child"), cache.get("slow")) == (2, "parent's")


def test_put_waits_for_the_same_report_once(backend: Backend) -> None:
    cache = LRUCache(name="default", backend=backend)
    cache.put("a", 1)
    cache.flush()
    cache._shared_state.shards[0].access_buffer.missed()
    cache._shared_state.shards[0].access_buffer.take(flush=True)  # the report is taken but never sent
    steps: Any = cache._flows.writer.put("b", 2, None, ())
    waits, step = 0, next(steps)
    while not (isinstance(step, Command) and step.script == entries._PUT):
        if isinstance(step, Wait):
            waits += 1
            step = steps.send(False)
        else:
            step = steps.send(backend.run(step))
    steps.close()
    assert waits == 1


@pytest.mark.filterwarnings("ignore:.* blocks the running event loop:RuntimeWarning")
def test_blocking_put_does_not_wait_for_its_loop(backend: Backend) -> None:
    cache = LRUCache(name="default", backend=backend)
    cache.put("a", 1)

    async def main() -> float:
        cache._shared_state.shards[0].access_buffer.missed()
        report = cache._shared_state.shards[0].access_buffer.take(
            flush=True
        )  # as if a task of this loop were sending the report
        begin = time.monotonic()
        assert cache.put("b", 2)
        took = time.monotonic() - begin
        cache._shared_state.shards[0].access_buffer.settle(report, confirmed=False)
        return took

    assert asyncio.run(main()) < access_reports._WAIT_SHARE * backend.deadline


class _EndlessRenewals:
    """Renewals that do not stop when a put ends. Only the caller would stop them, but the caller is cancelled."""

    def drop(self, compute_lease: ComputeLease) -> None: ...


@pytest.mark.thorough
@pytest.mark.parametrize("sound", [True, False], ids=["sound", "renewed though cancelled"])
def test_cancelled_store_releases_the_key(
    proxy: Proxy,
    connect: Callable[..., Backend],
    server: Server,
    runner: asyncio.Runner,
    raw: Raw,
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
    sound: bool,
) -> None:
    # Without this patch, a release of the lease after the outage would hide endless renewals.
    monkeypatch.setattr(Shard, "release_later", lambda *_: None)
    if not sound:
        end = compute._end
        forgetful = cast("Maintenance", _EndlessRenewals())
        monkeypatch.setattr(
            compute,
            "_end",
            lambda flight, maintenance, compute_lease, rest: end(flight, forgetful, compute_lease, rest),
        )
    assert other_computes(proxy, connect, server, runner) is sound


def other_computes(proxy: Proxy, connect: Callable[..., Backend], server: Server, runner: asyncio.Runner) -> bool:
    """Cancel a task whose value cannot reach the server. Returns whether another process then computes the value.

    The other process cannot compute if the lease is still renewed long after the last attempt to store the value.
    """
    lease_s = 1.0  # long enough that even a busy machine renews the lease in time
    cache = LRUCache(name="default", backend=connect(proxy.url, deadline=0.4), lease=lease_s)
    remote = LRUCache(name="default", backend=connect(server.url), lease=lease_s)
    runner.run(cache.aio.put("warm", 1))
    lost = proxy.reset_before_request(only=PUT, times=math.inf)

    def compute_elsewhere() -> str:
        lost.wait()  # returns when a put is lost; by that time, the task has the lease
        return remote.get_or_compute("k", lambda: "other")

    def wait_for_other_or_renewals() -> None:
        before = proxy.count(RENEW)
        # A lease is renewed three times per TTL, so 12 renewals take 4 s. A put gives up after 0.4 s.
        wait_until(
            lambda: other.done() or proxy.count(RENEW) > before + 12, "the other to compute, or the lease to be kept"
        )

    async def cancelled() -> None:
        task = asyncio.create_task(cache.aio.get_or_compute("k", lambda: "never stored"))
        await asyncio.to_thread(lost.wait)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(wait_for_other_or_renewals)  # the loop must run until the put has failed

    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(compute_elsewhere)
        runner.run(cancelled())
        computes = other.done()
        cache._backend.close()  # ends any remaining renewals, so that the lease expires
        assert other.result(20) == "other"
    return computes
