"""The history of caches and pools on a real server. The processes that use a cache or pool take turns to sample it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from agentperf_redis import AgentInstance, AgentPerf, CacheSeriesRow, PoolSeriesRow, history, keys
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import history as pools
from agentperf_redis.balancer.commands import Pool
from agentperf_redis.cache import history as caches
from agentperf_redis.command import Command
from agentperf_redis.errors import CorruptState, InvalidArgument
from tests.support.calls import Call
from tests.support.clock import server_ms
from tests.support.servers import Raw, Server, wait_until
from tests.support.stalls import StallDetector
from tests.support.workers import Workers

SLICE_S = 10.0


@pytest.fixture
def promptly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the first sample soon after the first use."""
    monkeypatch.setattr(history, "_FIRST_S", 0.1)


def sampled(rows: Any) -> list[Any]:
    """Return the rows that have a sample."""
    return [row for row in rows if (row.size if isinstance(row, CacheSeriesRow) else row.load) is not None]


@pytest.mark.parametrize("kind", ["cache", "tiered_cache"])
def test_sampled_cache_has_rows(perf: AgentPerf, backend: Backend, call: Call, namespace: str, kind: str) -> None:
    cache = getattr(perf, kind)("docs")
    rows = call(cache, "series", window="5m", step="1m")
    assert len(rows) in (5, 6)
    assert rows == tuple(CacheSeriesRow(row.interval) for row in rows)
    call(cache, "put", "a", 1)
    backend.run(caches.sample(keys.cache(namespace, {"cache": "cache", "tiered_cache": "tiered"}[kind], "docs")))
    for step in ("10s", "1m"):
        (row,) = sampled(call(cache, "series", window="5m", step=step))
        assert (row.hits, row.misses, row.evictions, row.size) == (0, 0, 0, 1)
        assert row.bytes > 0
        assert row.hit_rate is None


def test_sampled_pool_has_rows(perf: AgentPerf, backend: Backend, call: Call, namespace: str) -> None:
    lb = perf.balancer()
    for number in range(2):
        lb.register_instance(AgentInstance(f"coder-{number}", "coder", max_capacity=3))
    with lb.lease("coder"), lb.lease("coder"):
        backend.run(pools.sample(Pool.of(namespace, "coder")))
    for step in ("10s", "1m"):
        (row,) = sampled(call(lb, "series", "coder", window="5m", step=step))
        assert (row.load, row.waiters, row.unhealthy) == (2.0, 0, 0)


@pytest.mark.thorough
@pytest.mark.usefixtures("promptly")
def test_process_samples_what_it_uses(perf: AgentPerf) -> None:
    cache, tiered, lb = perf.cache("docs"), perf.tiered_cache("docs"), perf.balancer()
    lb.register_instance(AgentInstance("coder-1", "coder"))

    def all_are_sampled() -> bool:
        cache.put("a", 1)
        tiered.get("a")
        with lb.lease("coder"):
            pass
        options: Any = {"window": "2m", "step": "10s"}
        rows = (cache.series(**options), tiered.series(**options), lb.series("coder", **options))
        return all(map(sampled, rows))

    wait_until(all_are_sampled, "a sample of each")


@pytest.mark.thorough
@pytest.mark.waits
@pytest.mark.usefixtures("promptly")
def test_held_lease_keeps_its_pool_sampled(perf: AgentPerf) -> None:
    lb = perf.balancer()
    lb.register_instance(AgentInstance("coder-1", "coder"))
    with lb.lease("coder", ttl=3600.0, max_hold=3600.0):
        wait_until(lambda: len(sampled(lb.series("coder", window="5m", step="10s"))) >= 3, "three", timeout=60.0)


def test_rows_of_an_unused_pool_are_empty(perf: AgentPerf, call: Call) -> None:
    rows = call(perf.balancer(), "series", "coder")
    assert len(rows) in (60, 61)
    assert all(row == PoolSeriesRow(row.interval) for row in rows)


def test_short_use_takes_no_sample(perf: AgentPerf, raw: Raw, namespace: str) -> None:
    cache = perf.cache("docs")
    cache.put("a", 1)
    assert cache.get("a") == 1
    perf.close()
    assert not raw.exists(keys.cache(namespace, "cache", "docs").history)


def test_one_of_many_attempts_samples_a_slice(perf: AgentPerf, backend: Backend, raw: Raw, namespace: str) -> None:
    where = keys.cache(namespace, "cache", "docs")
    cache = perf.cache("docs")
    cache.put("a", 1)
    slices: set[int] = set()
    begin = server_ms(raw)
    for _ in range(20):
        assert 0 < backend.run(caches.sample(where)) <= 10_000
        slices.add(server_ms(raw) // 10_000)
    rows = sampled(cache.series(window="2m", step="10s"))
    assert len(rows) <= len(slices | {begin // 10_000}), "a busy machine may take several slices"
    found = backend.run(history.read_history(where.history))
    assert all(sample["samples"] == 1 for (width, _), sample in found.slices.items() if width == 10_000)
    assert 0 < raw.pttl(where.history) <= 8 * 86_400_000


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("window", {"window": None}),
        ("step", {"step": 15}),
        ("step", {"step": "2h"}),
        ("step", {"window": "1h", "step": "10s"}),
        ("as_of", {"as_of": "soon"}),
    ],
)
def test_invalid_arguments_are_rejected(perf: AgentPerf, call: Call, argument: str, options: Any) -> None:
    for client, args in ((perf.cache("docs"), ()), (perf.tiered_cache("docs"), ()), (perf.balancer(), ("coder",))):
        with pytest.raises(InvalidArgument, match=argument) as met:
            call(client, "series", *args, **options)
        assert met.value.argument == argument
    with pytest.raises(InvalidArgument, match="agent_type"):
        call(perf.balancer(), "series", "")


def test_damaged_history_is_named_and_unchanged(perf: AgentPerf, backend: Backend, raw: Raw, namespace: str) -> None:
    cache, lb = perf.cache("docs"), perf.balancer()
    cache.put("a", 1)
    lb.register_instance(AgentInstance("coder-1", "coder"))
    where, pool = keys.cache(namespace, "cache", "docs"), Pool.of(namespace, "coder")
    samples: list[tuple[str, Command[int]]] = [
        (where.history, caches.sample(where)),
        (pool.keys.history, pools.sample(pool)),
    ]
    for key, sample in samples:
        raw.hset(key, "totals", "hits=x")
        before = raw.hgetall(key)
        with pytest.raises(CorruptState) as met:
            backend.run(sample)
        assert met.value.key == key
        assert raw.hgetall(key) == before
        raw.delete(key)
        raw.set(key, "x")
        with pytest.raises(CorruptState) as met:
            backend.run(sample)
        assert met.value.key == key
        with pytest.raises(CorruptState) as met:
            backend.run(history.read_history(key))
        assert met.value.key == key
        raw.delete(key)


def use_cache(url: str, namespace: str) -> Iterator[int]:
    """Use a cache all the time, until this process is killed."""
    with AgentPerf(url, namespace=namespace) as perf:
        cache = perf.cache("docs")
        cache.put("a", 1)
        yield 1
        while True:
            cache.get("a")
            time.sleep(0.1)


@pytest.mark.thorough
@pytest.mark.waits
def test_history_goes_on_when_a_sampling_process_is_killed(
    server: Server, perf: AgentPerf, raw: Raw, namespace: str, workers: Workers
) -> None:
    """Two processes sample in turn. After one of them is killed, the other one samples within two intervals."""
    first, second = (workers.start(use_cache, server.url, namespace) for _ in range(2))
    for worker in (first, second):
        worker.said()
        worker.answer()
    cache = perf.cache("docs")

    def slices() -> list[CacheSeriesRow]:
        return sampled(cache.series(window="5m", step="10s"))

    wait_until(lambda: len(slices()) >= 2, "two samples", timeout=60.0)
    with StallDetector() as stalls:
        first.kill()
        killed, at_s = time.monotonic(), server_ms(raw) / 1000
        wait_until(lambda: slices()[-1].interval.start > at_s, "the next sample", timeout=60.0)
        assert stalls.own(killed, time.monotonic()) < 2 * SLICE_S
    assert slices()[-1].hits, "the reads of the second process are counted"
    second.kill()
