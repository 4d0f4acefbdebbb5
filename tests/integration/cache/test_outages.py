"""During and after an outage, callers of a cache get results, but no value that was invalidated in the meantime."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import RedisError

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache, TieredCache
from agentperf_redis.cache.flows import access_reports
from agentperf_redis.cache.flows import settings as settings_flows
from agentperf_redis.cache.process.shard import MAX_PENDING_INVALIDATIONS, InvalidationScope, Shard
from agentperf_redis.cache.process.shared_state import SharedState
from agentperf_redis.command import Flow
from agentperf_redis.errors import BackendUnavailable, InvalidArgument
from agentperf_redis.transport.pubsub import connection as pubsub_connection
from tests.support.caches import waiting
from tests.support.calls import Call
from tests.support.servers import Server, ServerKind, wait_until
from tests.support.stalls import StallDetector, hurry, overlap, union
from tests.support.workers import Workers

pytestmark = pytest.mark.thorough

NOWHERE = "redis://127.0.0.1:1/0"
STALE_S = 0.25
NOTICED_S = 1.0
"""A process detects within this time that the server is back."""


def copied(cache: LRUCache, *keys: str) -> None:
    """Wait until all keys have local copies at the same time. A gap in the messages of the bus drops earlier copies."""
    assert cache._local is not None
    local = cache._local

    def answers() -> bool:
        for key in keys:
            cache.get(key)
        return all(local.find(key) is not None for key in keys)

    wait_until(answers, "local copies")


def test_threads_share_one_computation_during_an_outage(connect: Callable[..., Backend]) -> None:
    cache = LRUCache(backend=connect(NOWHERE, deadline=0.2))
    calls: list[int] = []

    def work() -> list[int]:
        calls.append(1)
        if len(calls) == 1:
            wait_until(lambda: waiting(cache, "k") == 19, "all others to find the server unreachable, and wait")
        return [len(calls)]

    with ThreadPoolExecutor(20) as threads:
        values = list(threads.map(lambda _: cache.get_or_compute("k", work), range(20)))

    assert values == [[1]] * 20
    assert len({id(value) for value in values}) == 20, "each caller has its own value"
    assert cache.get_or_compute("k", work) == [2], "nothing is stored"


def test_tasks_share_one_error_during_an_outage(connect: Callable[..., Backend], runner: asyncio.Runner) -> None:
    cache = TieredCache(backend=connect(NOWHERE, deadline=0.2))
    calls: list[int] = []

    async def work() -> int:
        calls.append(1)
        while len(calls) == 1 and waiting(cache, "k") < 49:
            await asyncio.sleep(0.01)
        raise KeyError("no such thing")

    async def many() -> list[Any]:
        return await asyncio.gather(*(cache.aio.get_or_compute("k", work) for _ in range(50)), return_exceptions=True)

    assert {type(error) for error in runner.run(many())} == {KeyError}
    assert calls == [1]


@pytest.mark.parametrize("away", [False, True])
def test_library_error_of_the_function_reaches_all_waiters(
    connect: Callable[..., Backend], server: Server, away: bool
) -> None:
    """A function may use another server that is down. All waiters get its error, and do not call the function again."""
    cache = LRUCache(backend=connect(NOWHERE, deadline=0.2) if away else connect(server.url))
    calls: list[int] = []

    def work() -> int:
        calls.append(1)
        wait_until(lambda: waiting(cache, "k") == 9, "all others to wait")
        raise BackendUnavailable("another", "not_applied", "down")

    def ask(_: int) -> str:
        with pytest.raises(BackendUnavailable) as raised:
            cache.get_or_compute("k", work)
        return raised.value.address

    with ThreadPoolExecutor(10) as threads:
        assert list(threads.map(ask, range(10))) == ["another"] * 10
    assert calls == [1]


def test_on_unavailable_raise_raises_during_an_outage(call: Call, connect: Callable[..., Backend]) -> None:
    cache = LRUCache(on_unavailable="raise", name="default", backend=connect(NOWHERE, deadline=0.2))
    with pytest.raises(BackendUnavailable):
        call(cache, "get_or_compute", "k", lambda: pytest.fail("it is not called"))
    with pytest.raises(InvalidArgument) as refused:
        LRUCache(on_unavailable="ignore", name="default", backend=cache._backend)
    assert refused.value.argument == "on_unavailable"


@pytest.mark.parametrize("how", ["killed", "paused"])
def test_stale_copies_are_returned_up_to_the_limit(
    own_server: Server, connect: Callable[..., Backend], how: str
) -> None:
    backend = connect(own_server.url)
    cache = LRUCache(local_size=10, backend=backend)
    for key in "ab":
        cache.put(key, "of before", tags=[f"tag {key}"])
    copied(cache, *"ab")
    hurry(backend, 0.3)
    own_server.kill() if how == "killed" else own_server.pause()
    away = time.monotonic()
    try:
        wait_until(lambda: cache._local is not None and cache._local.find("a") is None, "the copies to be unusable")

        def ask(key: str, **options: Any) -> Any:
            return cache.get_or_compute(key, lambda: "computed", 60, **options)

        assert ask("a", stale_if_error=60) == ask("a", soft_ttl=30) == "of before"
        assert ask("a") == "computed", "no option allows a stale value"
        assert ask("missing", stale_if_error=60) == "computed"
        with pytest.raises(BackendUnavailable):
            cache.get("a")
        with pytest.raises(BackendUnavailable):
            cache.delete("a") if how == "killed" else cache.invalidate_tags("tag a")
        assert ask("a", stale_if_error=60) == "computed", "this process has invalidated the value"
        assert ask("b", stale_if_error=60) == "of before"
        wait_until(lambda: time.monotonic() > away + 1.1, "the limit")
        assert ask("b", stale_if_error=1) == "computed"
    finally:
        own_server.restart() if how == "killed" else own_server.resume()
    wait_until(lambda: answered(cache) is None, "the server to be back")


def test_copies_from_before_an_outage_are_dropped(
    own_server: Server, connect: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    # With this patch, the bus keeps its connection during the outage, even on a slow machine.
    monkeypatch.setattr(pubsub_connection, "LOST_AFTER_S", 60)
    assert copies_after_recovery(own_server, connect) == (0, "computed")


def test_copies_without_a_flush_fail_the_check(
    own_server: Server, connect: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pubsub_connection, "LOST_AFTER_S", 60)
    monkeypatch.setattr(SharedState, "_recovered", lambda shared: None)
    assert copies_after_recovery(own_server, connect) == (1, "of before")


def copies_after_recovery(server: Server, connect: Callable[..., Backend]) -> tuple[int, Any]:
    """Stop the server's replies for a while. No connection breaks, so only a new reply shows the end of the outage.

    Returns how many copies exist when the recovery is detected, and the value that a read returns in the next outage.
    """
    backend = connect(server.url)
    cache = LRUCache(local_size=10, name="default", backend=backend)
    cache.put("k", "of before")
    copied(cache, "k")
    hurry(backend, 0.3)
    known: list[int] = []
    backend.on_recovery(lambda: known.append(len(cache._local or ())))  # called after the cache's own callback

    def outage() -> None:
        server.pause()
        wait_until(
            lambda: isinstance(answered(cache), BackendUnavailable) and backend._breaker.open,
            "the outage to be detected",
        )

    outage()
    server.resume()
    wait_until(lambda: known, "its return to be detected")
    outage()
    try:
        return known[0], cache.get_or_compute("k", lambda: "computed", stale_if_error=60)
    finally:
        server.resume()


def answered(cache: LRUCache) -> Any:
    """Return the server's value of a key, or the error if the server does not answer."""
    try:
        return cache.get("a", fresh=True)
    except BackendUnavailable as error:
        return error


FORGET: dict[str, Callable[[LRUCache], object]] = {
    "delete": lambda cache: cache.delete("k"),
    "delete_many": lambda cache: cache.delete_many(["k", "other"]),
    "invalidate_tags": lambda cache: cache.invalidate_tags("t"),
    "clear": lambda cache: cache.clear(),
}


@pytest.mark.parametrize("forget", FORGET)
def test_failed_invalidation_is_sent_before_the_next_read(
    start_server: Callable[..., Server], connect: Callable[..., Backend], forget: str
) -> None:
    assert invalidated_meanwhile(start_server(aof=True), connect, forget) == []


def test_unsent_invalidation_fails_the_check(
    start_server: Callable[..., Server], connect: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    def drop_pending(shard: Shard) -> Flow[None]:
        shard.pending_invalidations.clear()
        yield from ()

    monkeypatch.setattr(settings_flows, "_flush_pending", drop_pending)
    assert invalidated_meanwhile(start_server(aof=True), connect, "delete") == ["old"]


def invalidated_meanwhile(server: Server, connect: Callable[..., Backend], forget: str) -> list[Any]:
    """Invalidate a key while the server is down. Restart the server with all its data. Return the old values read."""
    backend = connect(server.url)
    cache = LRUCache(name="default", backend=backend)
    cache.put("k", "old", tags=["t"])
    hurry(backend, 0.3)
    server.kill()
    with pytest.raises(BackendUnavailable):
        FORGET[forget](cache)
    server.restart()
    read: list[Any] = []
    end = time.monotonic() + 30
    while not read:
        assert time.monotonic() < end
        try:
            read.append(cache.get("k"))
        except BackendUnavailable:
            time.sleep(0.02)
    assert not cache._shared_state.shards[0].pending_invalidations
    return [value for value in read if value is not None]


def test_failed_invalidation_is_sent_without_reads(
    start_server: Callable[..., Server], connect: Callable[..., Backend]
) -> None:
    server = start_server(aof=True)
    backend = connect(server.url)
    cache = LRUCache(name="default", backend=backend)
    cache.put("k", "old")
    hurry(backend, 0.3)
    server.kill()
    with pytest.raises(BackendUnavailable):
        cache.delete("k")
    server.restart()

    remote = LRUCache(name="default", backend=connect(server.url))
    wait_until(lambda: remote.get("k") is None, "the background thread to send it")


def test_pending_invalidations_are_bounded(connect: Callable[..., Backend]) -> None:
    cache = LRUCache(backend=connect(NOWHERE, deadline=0.1))
    with pytest.raises(BackendUnavailable):
        cache.delete_many([f"k{number}" for number in range(MAX_PENDING_INVALIDATIONS)])
    assert len(cache._shared_state.shards[0].pending_invalidations) == MAX_PENDING_INVALIDATIONS
    with pytest.raises(BackendUnavailable):
        cache.invalidate_tags("one more")
    assert list(cache._shared_state.shards[0].pending_invalidations) == [(InvalidationScope.ALL, "")]


# In the test below, processes use the cache while the server is killed and restarted. Each cached value is the time at
# which its computation began.

DEADLINE_S = 1.0
KEYS = [f"k{number}" for number in range(4)]


Spans = list[tuple[float, float]]


@dataclass(frozen=True)
class Answer:
    """The result of one call, and when it began and ended."""

    key: str
    value: float
    begun: float
    ended: float


def use(url: str, namespace: str, progress: str, **options: Any) -> tuple[list[Answer], Spans]:
    """A worker process: request values until stopped. Returns its answers, and the time spans in which it could not run.

    It writes a byte into the file `progress` for each answer, and stops when a file ``<progress>.stop`` exists.
    """
    backend = Backend(url, namespace=namespace, deadline=DEADLINE_S)
    cache = LRUCache(local_size=50, name="default", backend=backend)
    seen: list[Answer] = []
    with StallDetector() as stalls, Path(progress).open("ab", buffering=0) as written:
        while is_running(progress):
            key = KEYS[len(seen) % len(KEYS)]
            begun = time.monotonic()
            value = cache.get_or_compute(key, time.monotonic, 60, tags=[f"tag of {key}"], **options)
            seen.append(Answer(key, value, begun, time.monotonic()))
            written.write(b".")
            time.sleep(0.002)
    backend.close()
    return seen, stalls.spans


def is_running(progress: str) -> bool:
    return not Path(f"{progress}.stop").exists()


def use_with_stale_copies(url: str, namespace: str, progress: str) -> tuple[list[Answer], Spans]:
    return use(url, namespace, progress, soft_ttl=0.5, stale_if_error=30)


def invalidate(url: str, namespace: str, progress: str) -> list[tuple[str, float, float]]:
    """A worker process: invalidate until stopped. Returns key, begin and end of each acknowledged invalidation."""
    backend = Backend(url, namespace=namespace, deadline=DEADLINE_S)
    cache = LRUCache(name="default", backend=backend)
    acknowledged: list[tuple[str, float, float]] = []
    count = 0
    with Path(progress).open("ab", buffering=0) as written:
        while is_running(progress):
            key, count = KEYS[count % len(KEYS)], count + 1
            begun = time.monotonic()
            try:
                if count % 2:
                    cache.delete(key)
                else:
                    cache.invalidate_tags(f"tag of {key}")
                acknowledged.append((key, begun, time.monotonic()))
                written.write(b".")
            except BackendUnavailable:
                pass
            time.sleep(0.02)
    backend.close()
    return acknowledged


@pytest.mark.thorough
@pytest.mark.servers("valkey", "redis82", "redis70")
@pytest.mark.parametrize("aof", [False, True], ids=["empty", "aof"])
def test_killed_server_costs_no_results_or_coherence(
    start_server: Callable[..., Server],
    server_kind: ServerKind,
    workers: Workers,
    namespace: str,
    aof: bool,
    tmp_path: Path,
) -> None:
    # With the default `appendfsync everysec`, the server may acknowledge a write before it has passed the write to the
    # operating system. If the server is killed in between, the write is lost. With `appendfsync no`, the server passes
    # each write to the operating system before it acknowledges the write.
    server = start_server(server_kind, *(("--appendfsync", "no") if aof else ()), aof=aof)
    files, written = [tmp_path / f"reader{number}" for number in range(3)], tmp_path / "writer"
    for file in (*files, written):
        file.touch()
    functions = (use, use_with_stale_copies, use_with_stale_copies)
    readers = [
        workers.start(function, server.url, namespace, str(file))
        for function, file in zip(functions, files, strict=True)
    ]
    writer = workers.start(invalidate, server.url, namespace, str(tmp_path / "writer"))

    def wait_for_calls(calls: int) -> None:
        """Wait until each reader has made at least `calls` more calls."""
        before = [file.stat().st_size for file in files]
        wait_until(
            lambda: all(file.stat().st_size >= at + calls for file, at in zip(files, before, strict=True)), "calls"
        )

    def ask() -> None:
        if server.nodes[0].alive:  # a dead server gets no ping, because an outage is not a stall
            with contextlib.suppress(RedisError):  # raised while the server loads its data
                client.ping()

    with server.client() as client, StallDetector(ask) as server_stalls:
        wait_for_calls(150)
        server.kill()
        killed = time.monotonic()
        time.sleep(DEADLINE_S + 0.5)  # longer than the deadline, so that the outage is detected
        wait_for_calls(30)
        server.restart()
        back = time.monotonic()
        acknowledged_before = written.stat().st_size
        time.sleep(NOTICED_S)
        wait_until(lambda: written.stat().st_size > acknowledged_before + 5, "invalidations")
        wait_for_calls(300)
        (tmp_path / "writer.stop").touch()
        acknowledged = writer.result()
        unchanged = time.monotonic()
        wait_for_calls(100)
    for file in files:
        Path(f"{file}.stop").touch()

    assert [end for _, _, end in acknowledged if end < killed]
    late = [(key, begun, end) for key, begun, end in acknowledged if begun > back]
    assert late
    for function, reader in zip(functions, readers, strict=True):
        seen, spans = reader.result()
        stalls = union(spans, server_stalls.spans)  # a stall of the server delays a call too
        for call in seen:
            if call.ended - call.begun > DEADLINE_S / 2:
                own = call.ended - call.begun - overlap(stalls, call.begun, call.ended)
                # In a call that began before the kill, the put of a computed value may wait for a report of reads.
                waited_s = access_reports._WAIT_SHARE * DEADLINE_S if call.begun < killed else 0.0
                assert own < DEADLINE_S + waited_s + 0.05, "no call exceeds its deadline"
        without = [call for call in seen if call.begun > killed + DEADLINE_S + 0.5 and call.ended < back]
        assert len(without) > 20, "there are results during the outage, too"
        after = [call for call in seen if call.begun - back - overlap(spans, back, call.begun) > NOTICED_S]
        assert len(after) > 100
        # With `use_with_stale_copies`, a reader may return a stale copy until it has detected that the server is back.
        for call in after if function is use_with_stale_copies else seen:
            over = call.begun - STALE_S
            newest = max((at for key, at, end in acknowledged if key == call.key and end < over), default=0.0)
            assert call.value > newest, (
                f"{call.key}: a value computed {newest - call.value:.3f} s before its invalidation"
            )
        quiet = [call for call in seen if call.begun > unchanged]
        assert len(quiet) > 90
        assert len([call for call in quiet if call.value > call.begun]) < len(quiet) / 4, "the cache answers again"
