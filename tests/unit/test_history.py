"""Tests of the history of caches and pools, on a simulated server with the test's clock, and of the `Sampler`."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentperf_redis import history, keys
from agentperf_redis.background import Background, Job
from agentperf_redis.balancer import history as pools
from agentperf_redis.balancer.commands import Pool
from agentperf_redis.cache import history as caches
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, CorruptState, InvalidArgument
from agentperf_redis.history import History, HistoryStep, Sampler, read_history, steps_of
from agentperf_redis.windows import Interval, TimeRange, asked_steps
from tests.support.fake import Fake

CACHE = keys.cache("n", "cache", "docs")
POOL = Pool.of("n", "coder")
NOON = 1_795_953_600.0
"""Noon of a day in UTC, s since 1970."""


class World:
    """A simulated server whose clock shows `now`, which the test sets."""

    def __init__(self, fake: Fake, now: float = NOON) -> None:
        self.fake = fake
        self.now = now

    def run(self, command: Any) -> Any:
        with mock.patch("time.time", return_value=self.now):
            return self.fake.run(command)

    def cache(self, **counters: int) -> None:
        self.fake.client.hset(CACHE.meta, mapping={"settings": "lru", **counters})

    def pool(self, load: int, unhealthy: int, waiters: int) -> None:
        self.fake.client.hset(
            POOL.keys.state,
            mapping={
                "#pool": "schema=2 strategy=least_loaded",
                "#load": load,
                **{
                    f"c{number}": f"limit=5 flags={'ejected' if number < unhealthy else '-'} cap=5"
                    for number in range(3)
                },
            },
        )
        self.fake.client.zadd(POOL.keys.ids, {f"c{number}": number for number in range(3)})
        self.fake.client.delete(POOL.keys.waitq)
        if waiters:
            self.fake.client.zadd(POOL.keys.waitq, {f"@{number}": number for number in range(waiters)})

    def cache_rows(self, window: str, step: str, as_of: float | None = None) -> list[tuple[Any, ...]]:
        found: History = self.run(read_history(CACHE.history))
        rows = [caches._row(each) for each in steps_of(found, *asked_steps(window, step, as_of))]
        return [(row.hits, row.misses, row.evictions, row.size, row.bytes) for row in rows]

    def pool_rows(self, window: str, step: str) -> list[tuple[Any, ...]]:
        found: History = self.run(read_history(POOL.keys.history))
        rows = [pools._row(each) for each in steps_of(found, *asked_steps(window, step, None))]
        return [(row.load, row.waiters, row.unhealthy) for row in rows]


@pytest.fixture
def world(fake: Fake) -> World:
    return World(fake)


NONE = (None,) * 5


def test_samples_become_rows(world: World) -> None:
    world.cache(hot=1, misses=2, bytes=10)
    assert world.run(caches.sample(CACHE)) == 10_000
    world.now += 10
    world.cache(hot=4, warm=2, cold=1, misses=5, evicted=2, bytes=30)
    world.fake.client.hset(CACHE.size, mapping={"a": 1, "b": 2})
    assert world.run(caches.sample(CACHE)) == 10_000
    world.now += 25
    assert world.cache_rows("1m", "10s")[-4:] == [(0, 0, 0, 0, 10), (6, 3, 2, 2, 30), NONE, NONE]
    assert world.cache_rows("1m", "1m")[-1] == (6, 3, 2, 2, 30)
    assert world.cache_rows("2h", "1h")[-1] == (6, 3, 2, 2, 30)


def test_a_slice_is_sampled_once(world: World) -> None:
    world.cache(hot=1)
    world.now += 3.5
    assert world.run(caches.sample(CACHE)) == 6500
    world.cache(hot=5)
    world.now += 6.4
    assert world.run(caches.sample(CACHE)) == 100
    assert world.cache_rows("1m", "10s")[-1] == (0, 0, 0, 0, 0)
    world.now += 0.1
    world.run(caches.sample(CACHE))
    assert world.cache_rows("1m", "10s")[-1] == (4, 0, 0, 0, 0), "counted from the sample before"


def test_unknown_cache_and_pool_are_not_sampled(world: World) -> None:
    assert world.run(caches.sample(CACHE)) == 0
    assert world.run(pools.sample(POOL)) == 0
    assert world.fake.client.keys("*") == []


def test_pool_rows_have_mean_load_and_peaks(world: World) -> None:
    for load, unhealthy, waiters in ((1, 0, 0), (4, 2, 7), (4, 1, 3)):
        world.pool(load, unhealthy, waiters)
        assert world.run(pools.sample(POOL)) == 10_000
        world.now += 10
    world.now += 5
    assert world.pool_rows("1m", "10s")[-4:] == [(1.0, 0, 0), (4.0, 7, 2), (4.0, 3, 1), (None, None, None)]
    assert world.pool_rows("1m", "1m")[-1] == (3.0, 7, 2)
    assert world.pool_rows("1h", "1h")[-1] == (3.0, 7, 2)


def test_late_sample_of_a_shard_leaves_no_gap() -> None:
    last = {"last_load": 1, "last_healthy": 4, "last_waiters": 5}
    early = History(0, {(10_000, at): {"samples": 1, "load": 2, "last_healthy": 3} for at in (0, 10_000, 20_000)})
    late = History(0, {(10_000, at): {"samples": 1, "load": 1, "waiters": 5, **last} for at in (0, 20_000)})
    added = pools._added([early, late]).slices
    assert [added[10_000, at]["last_healthy"] for at in (0, 10_000, 20_000)] == [7, 7, 7]
    rows = [pools._row(HistoryStep(Interval(0.0, 10.0), (added[10_000, at],))) for at in (0, 10_000, 20_000)]
    assert [(row.load, row.waiters) for row in rows] == [(3.0, 5)] * 3
    gone = pools._added([early, History(0, {})]).slices
    assert gone[10_000, 20_000]["last_healthy"] == 3


def test_small_loads_of_many_shards_are_not_rounded_away() -> None:
    shard = History(0, {(60_000, 0): {"samples": 5, "load": 2}})
    (added,) = pools._added([shard] * 16).slices.values()
    assert pools._row(HistoryStep(Interval(0.0, 60.0), (added,))).load == pytest.approx(16 * 2 / 5)


def test_total_that_fell_counts_from_zero(world: World) -> None:
    """The server lost the counters of the cache, but not the history."""
    for hot in (100, 3):
        world.cache(hot=hot)
        world.run(caches.sample(CACHE))
        world.now += 10
    assert world.cache_rows("1m", "10s")[-2][0] == 3


def test_clock_set_back_does_not_stop_the_samples(world: World) -> None:
    world.cache(hot=1)
    world.run(caches.sample(CACHE))
    world.now -= 3600
    world.cache(hot=3)
    assert world.run(caches.sample(CACHE)) == 10_000
    assert world.cache_rows("1m", "10s")[-1][0] == 2


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in (1, 2))])
def test_rows_of_any_step_add_up(world: World, seed: int) -> None:
    """Random samples with gaps over a day: each row is the sum of the samples in it, as long as slices are kept."""
    source = random.Random(seed)
    totals = {"hot": 0, "misses": 0, "evicted": 0}
    taken: list[tuple[float, ...]] = []
    for number in range(300):
        more = [source.randint(0, 9) if number else 0 for _ in totals]
        totals = {name: total + added for (name, total), added in zip(totals.items(), more, strict=True)}
        size = source.randint(0, 3)
        world.cache(**totals, bytes=number)
        world.fake.client.delete(CACHE.size)
        if size:
            world.fake.client.hset(CACHE.size, mapping={str(each): 1 for each in range(size)})
        world.run(caches.sample(CACHE))
        taken.append((world.now, *more, size, number))
        world.now += 10 * source.choice([1, 1, 1, 2, 30, 100])
    for window, step in (("14m", "10s"), ("10m", "90s"), ("2h", "1m"), ("170m", "5m"), ("20h", "1h"), ("3d", "6h")):
        length = asked_steps(window, step, None)[1] / 1000
        found: History = world.run(read_history(CACHE.history))
        for each in steps_of(found, *asked_steps(window, step, None)):
            row, begin = caches._row(each), each.interval.start
            inside = [sample for sample in taken if begin <= sample[0] < begin + length]
            if not inside:
                assert row == caches.CacheSeriesRow(each.interval)
                continue
            assert (row.hits, row.misses, row.evictions) == tuple(sum(part[at] for part in inside) for at in (1, 2, 3))
            assert (row.size, row.bytes) == inside[-1][4:]
    assert len(world.fake.client.hkeys(CACHE.history)) <= 2 + 90 + 180 + 192
    assert world.fake.client.pttl(CACHE.history) > 0


def test_rows_as_of_the_past_end_there(world: World) -> None:
    world.cache(hot=0)
    for _ in range(12):
        world.cache(hot=int(world.now - NOON))
        world.run(caches.sample(CACHE))
        world.now += 10
    assert world.cache_rows("30s", "10s", NOON + 40) == [(10, 0, 0, 0, 0)] * 3
    assert world.cache_rows("1m", "1m", NOON + 60) == [(50, 0, 0, 0, 0)]
    assert world.cache_rows("1m", "1m", NOON + 1000) == [], "no step begins after now"


@pytest.mark.parametrize(("window", "step", "needed"), [("1h", "10s", "1m"), ("1d", "1m", "1h"), ("20d", "90m", "1h")])
def test_step_without_kept_slices_is_refused(world: World, window: str, step: str, needed: str) -> None:
    with pytest.raises(InvalidArgument, match=f"a multiple of {needed}") as met:
        world.cache_rows(window, step)
    assert met.value.argument == "step"


def test_hit_rate_needs_reads() -> None:
    at = Interval(0.0, 10.0)
    assert caches.CacheSeriesRow(at, 3, 1).hit_rate == 0.75
    assert caches.CacheSeriesRow(at, 0, 0).hit_rate is None
    assert caches.CacheSeriesRow(at).hit_rate is None


@given(
    st.recursive(
        st.one_of(
            st.none(),
            st.integers(-5, 2**63),
            st.binary(max_size=12),
            st.just(b"10s:3"),
            st.just(b"at=1795953600000 samples=1 hits=4"),
        ),
        lambda parts: st.lists(parts, max_size=6),
    )
)
def test_any_reply_is_decoded_or_refused(reply: Any) -> None:
    try:
        found = read_history(CACHE.history).decode(reply)
    except CorruptState:
        return
    steps_of(found, TimeRange(60_000), 10_000)


# -- the process that samples


class Jobs(Background):
    """Replaces the thread; the test runs the job."""

    def __init__(self) -> None:
        super().__init__("none")
        self.planned: list[tuple[float, Job]] = []

    def at(self, due: float, job: Job) -> bool:
        self.planned.append((due, job))
        return True

    def run_next(self) -> float:
        due, job = self.planned.pop(0)
        job()
        return due


class Server:
    """Replaces the backend."""

    def __init__(self, result: Callable[[Any], Any]) -> None:
        self.result = result
        self.sampled: list[Any] = []

    def run(self, step: Any, deadline: float) -> list[Any]:
        commands = next(step).commands
        self.sampled.append(list(commands))
        return [self.result(each) for each in commands]


def sampler(server: Server, jobs: Jobs, in_use: Callable[[], dict[str, str]] = dict) -> Sampler[str]:
    fake: Any = server
    return Sampler(fake, jobs, lambda name: (name,), lambda: 1.0, in_use)  # type: ignore[arg-type,return-value]


def test_used_resources_are_sampled_once_a_slice() -> None:
    server, jobs = Server(lambda _: 7000), Jobs()
    sampling = sampler(server, jobs)
    begin = time.monotonic()
    for _ in range(5):
        sampling.used("a", "a")
        sampling.used("b", "b")
    (planned,) = jobs.planned
    assert planned[0] >= begin + history._FIRST_S
    jobs.run_next()
    assert server.sampled == [["a", "b"]]
    assert jobs.planned == [], "a resource without users is not sampled"
    sampling.used("a", "a")
    ((due, _),) = jobs.planned
    assert due >= begin + 7.0, "not before the next slice"
    jobs.run_next()
    assert server.sampled[-1] == ["a"]


def test_resource_in_use_is_sampled_without_further_calls() -> None:
    server, jobs = Server(lambda _: 10), Jobs()
    sampling = sampler(server, jobs, lambda: {"held": "held"})
    sampling.used("a", "a")
    for _ in range(3):
        jobs.run_next()
        assert len(jobs.planned) == 1
    assert server.sampled == [["a", "held"], ["held"], ["held"]]


def test_failed_sample_is_logged_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    failing = [True]
    error: AgentPerfError = CorruptState("key", "damaged by the test")
    server, jobs = Server(lambda _: error if failing[0] else 10), Jobs()
    sampling = sampler(server, jobs)
    for _ in range(3):
        sampling.used("a", "a")
        jobs.run_next()
    assert len(caplog.records) == 1
    failing[0] = False
    sampling.used("a", "a")
    jobs.run_next()
    failing[0] = True
    sampling.used("a", "a")
    jobs.run_next()
    assert len(caplog.records) == 2


def test_outage_and_close_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    error: AgentPerfError = BackendUnavailable("here", "not_applied", "by the test")
    server, jobs = Server(lambda _: error), Jobs()
    sampling = sampler(server, jobs)
    sampling.used("a", "a")
    jobs.run_next()
    assert [record for record in caplog.records if record.levelname != "DEBUG"] == []
    error = CorruptState("key", "damaged by the test")

    def close_meanwhile(_: object) -> AgentPerfError:
        jobs.close(0.0)
        return error

    closing = sampler(Server(close_meanwhile), jobs)
    closing.used("a", "a")
    jobs.run_next()
    assert [record for record in caplog.records if record.levelname != "DEBUG"] == []


def test_forked_child_starts_without_resources() -> None:
    server, jobs = Server(lambda _: 10), Jobs()
    sampling = sampler(server, jobs)
    sampling.used("a", "a")
    sampling.after_fork()
    sampling.used("b", "b")
    jobs.planned.pop(0)
    jobs.run_next()
    assert server.sampled == [["b"]]


def test_closing_thread_takes_no_sample() -> None:
    server, jobs = Server(lambda _: 10), Jobs()
    sampling = sampler(server, jobs)
    sampling.used("a", "a")
    jobs.close(0.0)
    jobs.run_next()
    assert server.sampled == []
