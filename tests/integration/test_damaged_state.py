"""Whatever stored field is damaged, an operation that fails has written nothing and raises a documented error.

`tests/support/damage.py` damages each field of each key of a filled namespace in turn. Then each operation of the
service runs on the damaged state.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from agentperf_redis import AgentInstance, AgentPerf, MetricsCollector, PoolSettings, keys, presence
from agentperf_redis.alerts import commands as alerting
from agentperf_redis.alerts.model import AlertEvent, AlertState, TargetState
from agentperf_redis.alerts.rules_file import read_rules
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import LoadBalancingStrategy, Outcome
from agentperf_redis.balancer import commands as lb
from agentperf_redis.balancer import history as pool_history
from agentperf_redis.balancer.layouts import Layouts, layouts_of
from agentperf_redis.cache import commands as cached
from agentperf_redis.cache import entry_format, operator
from agentperf_redis.cache import history as cache_history
from agentperf_redis.cache.commands import inspection
from agentperf_redis.cache.model import Settings
from agentperf_redis.cache.process.access_buffer import AccessReport
from agentperf_redis.command import Command
from agentperf_redis.locks import commands as locking
from agentperf_redis.metrics import commands as metered
from agentperf_redis.metrics import workers
from agentperf_redis.metrics.accumulator import FAILED, OK, Part
from agentperf_redis.metrics.buffer import Buffer
from agentperf_redis.metrics.model import Interval
from agentperf_redis.metrics.retention import Retention
from tests.support import records
from tests.support.damage import Namespace, faults
from tests.support.servers import Server

Operations = dict[str, Callable[[], Any]]
"""Name of an operation -> a function that returns its command or flow."""

pytestmark = [pytest.mark.thorough, pytest.mark.servers("valkey")]  # some tests take a minute on each kind of server

HELD_MS = 600_000


@pytest.fixture(autouse=True)
def _marks_outlast_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the marks of moved keys for an hour. If they expired during a test, this would look like a write."""
    monkeypatch.setattr("agentperf_redis.cache.commands.layouts._MARKS_KEPT_MS", 3_600_000)


@pytest.fixture
def stored(own_server: Server, pytestconfig: pytest.Config) -> Iterator[Namespace]:
    with (
        own_server.client(encoding_errors="surrogateescape") as raw,
        own_server.client(decode_responses=False) as binary,
    ):
        yield Namespace(raw, binary, every=1 if pytestconfig.getoption("--everything") else 4)


def is_one_of(parts: tuple[str, ...], others: tuple[str, ...] = ()) -> Callable[[str], bool]:
    """Return a filter of keys by their last part. It accepts `parts`, or if `parts` is empty, all except `others`."""

    def accept(key: str) -> bool:
        name = key.rpartition("}:")[2]
        return name in parts if parts else name not in others

    return accept


def shortened(found: list[str]) -> list[str]:
    return [*found[:20], f"and {len(found) - 20} more"] if len(found) > 20 else found


# The load balancer

SETTINGS = PoolSettings(eject_after=2, adaptive=True, slow_start=60.0, slow_after=5.0)
GPU, BOTH = frozenset({"gpu"}), frozenset({"gpu", "eu"})
POOL_PARTS = ("state", "due")


def fill_pool(run: Callable[[Any], Any], pool: lb.Pool, strategy: LoadBalancingStrategy, stored: Namespace) -> None:
    """Make a pool in which each kind of record, flag and timer occurs."""
    unlimited, limited = lb.UNLIMITED, lb.Rates(600, 90_000)
    for name, labels, rates in (("p0", BOTH, unlimited), ("p1", BOTH, limited), ("p2", frozenset[str](), unlimited)):
        instance = AgentInstance(name, pool.agent_type, max_capacity=9, weight=1.5, labels=labels)
        run(lb.register(pool, instance, strategy, HELD_MS, rates=rates, settings=SETTINGS))
    for number in range(3):
        run(lb.acquire(pool, f"@held:{number}", HELD_MS, lb.Choice(require=BOTH), tokens=10))
    run(lb.acquire(pool, "@ended", HELD_MS, lb.ANY, tokens=10))
    run(lb.release(pool, "@ended", outcome=Outcome.TIMEOUT, response_time=1.0, tombstone_ms=HELD_MS))
    claimed = run(lb.claim_checks(pool, HELD_MS, 100))
    run(lb.report_checks(pool, claimed.at_ms, [("p0", True), ("p1", False)]))
    for name in ("p0", "p1", "p2"):  # all instances are drained, so that the waiters below stay in the queue
        run(lb.update(pool, name, on="draining"))
    for number in range(3):
        run(wait(pool, f"@wait:{number}"))
    # One more waiter has a grant that it has not fetched.
    stored.raw.hset(pool.keys.state, "@granted", f"grant instance=p0 fence={claimed.at_ms * 1000} ticket=5")
    now_ms = claimed.at_ms
    state = pool.keys.state
    for name, flags in (("p0", "-"), ("p1", "metered"), ("p2", "ejected")):
        records.change(stored.raw, state, name, flags=flags)
    stored.raw.hset(
        state,
        "+p2",
        records.changed(
            stored.raw.hget(state, "+p2"),
            ejections=1,
            ejected_until_ms=now_ms + HELD_MS,
            probe_since_us=now_ms * 1000,
            checks=-1,
        ),
    )
    resting = records.changed(stored.raw.hget(state, "+p1"), rest_until_ms=now_ms + HELD_MS, rest_set_ms=now_ms)
    stored.raw.hset(state, "+p1", resting)
    stored.raw.hset(state, mapping={"#calm": now_ms - HELD_MS, "#watched": now_ms + HELD_MS})
    timers = {"@granted": HELD_MS, "E:p2": HELD_MS, "P:0": HELD_MS, "V:p0": HELD_MS, "R:p1": HELD_MS, "C:p1": HELD_MS}
    stored.raw.zadd(pool.keys.due, {name: now_ms + left_ms for name, left_ms in timers.items()})
    stored.raw.zadd(pool.keys.ready, {"p0": 1.0, "p1": 2.0})
    for label in BOTH:
        stored.raw.zadd(pool.keys.ready_with(label), {"p0": 1.0, "p1": 2.0})
    loads = {"p0": 0, "p1": 0, "p2": 0}
    for text in stored.raw.hgetall(state).values():
        if records.kind_of(text) in records.HELD:
            loads[records.fields(text)["instance"]] += 1
    for name, load in loads.items():
        records.change(stored.raw, state, name, load=load, limit=0 if name == "p2" else 9)
    counts = {"#load": sum(loads.values()), "#cap": 18, "#usable": 3, "#unhealthy": 1, "#next": 0}
    stored.raw.hset(state, mapping=counts)
    run(pool_history.sample(pool))


def wait(pool: lb.Pool, token: str) -> Command[Any]:
    none = frozenset[str]()
    return lb.wait(pool, token, ttl_ms=HELD_MS, live_ms=3000, boost_ms=0, require=none, position="-")


def many(pool: lb.Pool, tokens: list[str], choice: lb.Choice, whole: bool = False) -> Command[Any]:
    command = lb.acquire_many(pool, tokens, 30_000, choice, 5, whole=whole)
    assert isinstance(command.args, Mapping)
    return replace(command, args={**command.args, "late": 1})  # with `late`, the script also writes tombstones


def pool_operations(pool: lb.Pool, layouts: Layouts) -> Operations:
    numbers = itertools.count()
    new, held = AgentInstance("p9", pool.agent_type, labels=GPU), AgentInstance("p0", pool.agent_type, labels=BOTH)
    found: Operations = {
        "acquire": lambda: lb.acquire(pool, f"@new:{next(numbers)}", 30_000, lb.Choice(affinity="a"), tokens=5),
        "acquire gpu": lambda: lb.acquire(pool, f"@new:{next(numbers)}", 30_000, lb.Choice(require=GPU)),
        "acquire both": lambda: lb.acquire(pool, f"@new:{next(numbers)}", 30_000, lb.Choice(require=BOTH)),
        "acquire many": lambda: many(pool, [f"@new:{next(numbers)}" for _ in range(4)], lb.Choice(affinity="a")),
        "acquire whole gpu": lambda: many(
            pool, [f"@new:{next(numbers)}" for _ in range(4)], lb.Choice(require=GPU), True
        ),
        "acquire whole both": lambda: many(
            pool, [f"@new:{next(numbers)}" for _ in range(4)], lb.Choice(require=BOTH), True
        ),
        "acquire many again": lambda: many(pool, ["@held:0", "@held:1"], lb.ANY),
        "acquire again": lambda: lb.acquire(pool, "@held:0", HELD_MS, lb.ANY),
        "wait": lambda: wait(pool, f"@new:{next(numbers)}"),
        "wait again": lambda: wait(pool, "@wait:0"),
        "fetch": lambda: wait(pool, "@granted"),
        "release": lambda: lb.release(pool, "@held:0", outcome=Outcome.OK, response_time=0.5),
        "release neutral": lambda: lb.release(pool, "@held:0", "p0"),
        "release failed": lambda: lb.release(pool, "@held:1", outcome=Outcome.ERROR, response_time=0.5, tokens=7),
        "release by hand": lambda: lb.release(pool, "@granted", by_hand=True, tombstone_ms=1000),
        "cancel": lambda: lb.release(pool, "@wait:2", tombstone_ms=1000),
        "renew": lambda: lb.renew(pool, ["@held:0", "@held:1", "@held:2"], 30_000),
        "watch": lambda: lb.watch(pool, frozenset(), 1000),
        "divide": lambda: lb.divide(pool, "set", 4),
        "count shards": lambda: lb.count_shards(pool),
        "select": lambda: lb.select(pool, lb.ANY),
        "select both": lambda: lb.select(pool, lb.Choice(require=BOTH)),
        "register": lambda: lb.register(pool, held, None, 0),
        "register new": lambda: lb.register(pool, new, None, 1000, settings=SETTINGS),
        "update": lambda: lb.update(pool, "p1", max_capacity=5, labels=frozenset({"eu"}), requests_per_minute=5.0),
        "mark healthy": lambda: lb.update(pool, "p2", off="unhealthy,heartbeat_missed,down,ejected,half_open,warming"),
        "remove": lambda: lb.remove(pool, "p1"),
        "heartbeat": lambda: lb.heartbeat(pool, ["p0", "p1", "p2"], 0),
        "status": lambda: lb.status(pool, 0, 100),
        "leases": lambda: lb.leases_page(pool, 0, 100),
        "repair": lambda: lb.repair(pool, 0, 100),
        "cool down": lambda: lb.cool_down(pool, "p1", 1000, "cooled_down"),
        "delete": lambda: lb.delete(pool),
        "extend": lambda: lb.extend(pool, "@held:0", 1000),
        "release limited": lambda: lb.release(pool, "@held:1", outcome=Outcome.RATE_LIMITED, rest_ms=1000),
        "configure": lambda: lb.configure(pool, SETTINGS, 0, 100),
        "claim checks": lambda: lb.claim_checks(pool, 1000, 100),
        "report checks": lambda: lb.report_checks(pool, int(time.time() * 1000), [("p0", False), ("p2", True)]),
        "events": lambda: lb.events(pool, None, 100),
        "find registered": lambda: lb.find_registered(pool, ["p0", "p9"]),
        "sample": lambda: pool_history.sample(pool),
        "series": lambda: pool_history.series(layouts, pool, "5m", "1m", None),
    }
    return found


PARTS = pytest.mark.parametrize("parts", [("state",), ("due",), ()], ids=["state", "due", "others"])


@PARTS
@pytest.mark.waits
def test_damaged_pool_is_reported_and_unchanged(
    stored: Namespace, own_server: Server, connect: Callable[..., Backend], parts: tuple[str, ...]
) -> None:
    backend = connect(own_server.url)
    pool = lb.Pool.of(backend.namespace, "planner")
    fill_pool(backend.run, pool, LoadBalancingStrategy.WEIGHTED, stored)
    damages = stored.damages(is_one_of(parts, POOL_PARTS))
    assert shortened(faults(stored, backend.run, damages, pool_operations(pool, layouts_of(backend)))) == []


@PARTS
def test_damaged_pool_with_an_overdue_lease_is_unchanged(
    stored: Namespace, own_server: Server, connect: Callable[..., Backend], parts: tuple[str, ...]
) -> None:
    """A lease is due. The script first ends it and grants its capacity, and then does its own work."""
    backend = connect(own_server.url)
    pool = lb.Pool.of(backend.namespace, "planner")
    fill_pool(backend.run, pool, LoadBalancingStrategy.WEIGHTED, stored)
    stored.raw.zadd(pool.keys.due, {"@held:1": 1.0})
    operations = pool_operations(pool, layouts_of(backend))
    names = ("acquire", "acquire many", "acquire whole gpu", "wait again", "release failed", "register", "status")
    operations = {name: operations[name] for name in names}
    damages = stored.damages(is_one_of(parts, POOL_PARTS))
    assert shortened(faults(stored, backend.run, damages, operations)) == []


@pytest.mark.parametrize(
    "strategy",
    [LoadBalancingStrategy.LEAST_LOADED, LoadBalancingStrategy.PEAK_EWMA, LoadBalancingStrategy.CONSISTENT_HASH],
)
def test_damaged_pool_of_other_strategy_is_unchanged(
    stored: Namespace, own_server: Server, connect: Callable[..., Backend], strategy: LoadBalancingStrategy
) -> None:
    backend = connect(own_server.url)
    pool = lb.Pool.of(backend.namespace, "planner")
    fill_pool(backend.run, pool, strategy, stored)
    stored.raw.zrem(pool.keys.waitq, *(f"@wait:{number}" for number in range(3)))
    stored.raw.hset(pool.keys.state, "#next", 4503599627370496)  # no maintenance is due, so the fast paths run
    operations = pool_operations(pool, layouts_of(backend))
    operations = {
        name: operations[name]
        for name in ("acquire", "acquire many", "acquire whole both", "select", "release", "release neutral")
    }
    damages = stored.damages(is_one_of(("state", "ready", "ring")))
    assert shortened(faults(stored, backend.run, damages, operations)) == []


def test_damaged_division_is_reported_and_unchanged(
    stored: Namespace, own_server: Server, connect: Callable[..., Backend]
) -> None:
    backend = connect(own_server.url)
    pool = lb.Pool.of(backend.namespace, "planner")
    backend.run(lb.divide(pool, "set", 4, LoadBalancingStrategy.WEIGHTED, SETTINGS))
    operations: Operations = {
        "divide": lambda: lb.divide(pool, "set", 4, None, SETTINGS),
        "divide again": lambda: lb.divide(pool, "set", 4),
        "divide otherwise": lambda: lb.divide(pool, "set", 8),
        "lapse": lambda: lb.divide(pool, "lapse", 4),
        "drop": lambda: lb.divide(pool, "drop", 4),
        "count shards": lambda: lb.count_shards(pool),
    }
    assert shortened(faults(stored, backend.run, stored.damages(lambda _: True), operations)) == []


# Locks


def fill_semaphore(run: Callable[[Any], Any], place: locking.Place, stored: Namespace) -> None:
    """Make a semaphore in which each kind of record occurs."""
    for number in range(2):
        run(locking.acquire(place, f"@held:{number}", ttl=HELD_MS / 1000, limit=2))
    for number in range(2):
        run(locking.acquire(place, f"@wait:{number}", ttl=HELD_MS / 1000, limit=2, live_ms=3000))
    fence = int(time.time() * 1e6)
    stored.raw.hset(place.keys.state, "@granted", f"grant fence={fence} ticket={fence - 5}")
    stored.raw.zadd(place.keys.held, {"@granted": fence / 1000 + HELD_MS})
    run(locking.release(place, "@spent", tombstone_ms=HELD_MS))


def semaphore_operations(place: locking.Place) -> Operations:
    numbers = itertools.count()

    def acquire(token: str, live_ms: int = 0, limit: int = 2) -> Command[Any]:
        return locking.acquire(place, token, ttl=30.0, limit=limit, live_ms=live_ms)

    found: Operations = {
        "acquire": lambda: acquire(f"@new:{next(numbers)}"),
        "acquire more": lambda: acquire(f"@new:{next(numbers)}", limit=9),
        "acquire again": lambda: acquire("@held:0"),
        "acquire spent": lambda: acquire("@spent"),
        "wait": lambda: acquire(f"@new:{next(numbers)}", 3000),
        "wait again": lambda: acquire("@wait:1", 3000),
        "fetch": lambda: acquire("@granted", 3000),
        "release": lambda: locking.release(place, "@held:0"),
        "cancel": lambda: locking.release(place, "@wait:0", tombstone_ms=1000),
        "extend": lambda: locking.extend(place, "@held:1", 60.0),
        "add time": lambda: locking.extend(place, "@held:1", 60.0, added=1 + next(numbers)),
        "look": lambda: locking.look(place, "@held:0"),
    }
    return found


@pytest.mark.parametrize("overdue", [False, True], ids=["usual", "overdue"])
def test_damaged_lock_is_reported_and_unchanged(
    stored: Namespace, own_server: Server, connect: Callable[..., Backend], overdue: bool
) -> None:
    backend = connect(own_server.url)
    place = locking.Place.of(backend.namespace, "semaphore", "gpus")
    fill_semaphore(backend.run, place, stored)
    if overdue:
        stored.raw.zadd(place.keys.held, {"@held:1": 1.0})
    found = faults(stored, backend.run, stored.damages(is_one_of(())), semaphore_operations(place))
    assert shortened(found) == []


# The cache

CACHES = {
    "lru": "lru capacity 0/0/6 bytes 1000 ttl 0/0/600000",
    "tinylfu": "tinylfu capacity 0/0/6 bytes 0 ttl 0/0/0",
    "tiered": "tinylfu capacity 1/2/3 bytes 0 ttl 600000/600000/600000",
}


def put(
    where: keys.CacheKeys,
    name: str,
    *,
    request: str,
    again: bool = False,
    token: str = "",
    tag: str = "t",
    mode: str = "",
) -> Any:
    now_ms = int(time.time() * 1000)
    request = request.ljust(5, "_")
    # Two entries get the short header. All others get the long header, with cost, fresh time and tags.
    plain = name in ("k3", "k7")
    payload = entry_format.payload(
        request, 0 if plain else 5, 0 if plain else 60_000, () if plain else (tag,), b"m\x01"
    )
    report = AccessReport(7, 1, 5, 0, (("k1", 1), ("k2", 2)))
    return cached.put(
        where,
        name,
        payload,
        request,
        until_ms=now_ms + HELD_MS,
        seen=0,
        again=again,
        ttl_ms=-1,
        tier=None,
        token=token,
        origin="o",
        writer="w1",
        report=report,
        tags=(tag,),
        mode=mode,
    )


def pop(where: keys.CacheKeys, name: str, request: str) -> Any:
    until_ms = int(time.time() * 1000) + HELD_MS
    return cached.pop(where, name, request.ljust(5, "_"), until_ms=until_ms, again=False, seen=0, origin="o")


def fill_cache(run: Callable[[Any], Any], where: keys.CacheKeys, settings: str) -> None:
    """Make a cache with each kind of key and field: evicted, expired, cleared and tagged entries, and leases."""
    parsed = Settings.parse(settings)
    assert parsed is not None
    run(cached.deploy(where, parsed))
    for number in range(3):
        run(put(where, f"c{number}", request=f"c{number}"))
    run(cached.clear(where, "o"))
    for number in range(9):
        run(put(where, f"k{number}", request=f"r{number}"))
    run(put(where, "k8", request="incr", mode="incr:5"))
    run(put(where, "k7", request="popped"))
    run(pop(where, "k7", "pop"))
    run(put(where, "k7", request="r7"))
    run(cached.invalidate_tags(where, ("u",), "o"))
    for number in (7, 8):
        run(cached.read_strictly(where, f"k{number}"))
    run(cached.cancel_puts(where, ("gone",), int(time.time() * 1000) + HELD_MS))
    run(cached.claim(where, "m1", "token", lease_ms=HELD_MS, ignore=""))
    run(cached.claim(where, "m2", "token", lease_ms=HELD_MS, ignore=""))
    run(cached.release(where, "m2", "token", error="ValueError no", error_ms=HELD_MS, origin="o"))
    run(cache_history.sample(where))
    run(cached.prepare(where, 0, (1, 100), (0,) * len(cached.COUNTERS)))
    run(cached.expect(where, ["moved", "k8"]))


def cache_operations(where: keys.CacheKeys, backend: Backend, service: str) -> Operations:
    report = AccessReport(9, 1, 5, 1, (("k7", 1), ("k8", 2)))
    numbers = itertools.count(1)
    marks = backend.run(cached.expect(where, ["moved"]))
    assert not isinstance(marks, cached.NoSettings)
    (mark,) = marks
    parsed = Settings.parse(CACHES["lru"])
    assert parsed is not None
    found: Operations = {
        "put": lambda: put(where, "k9", request=f"q{next(numbers)}"),
        "put known": lambda: put(where, "k8", request=f"q{next(numbers)}"),
        "put again": lambda: put(where, "k8", request=f"q{next(numbers)}", again=True),
        "put repeated": lambda: put(where, "k8", request="r8", again=True),
        "put computed": lambda: put(where, "m1", request=f"q{next(numbers)}", token="token"),
        "add": lambda: put(where, "k9", request=f"q{next(numbers)}", mode="add"),
        "add known": lambda: put(where, "k8", request=f"q{next(numbers)}", mode="add"),
        "replace": lambda: put(where, "k8", request=f"q{next(numbers)}", mode="replace", again=True),
        "if version": lambda: put(where, "k8", request=f"q{next(numbers)}", mode="if:0"),
        "touch": lambda: put(where, "k8", request=f"q{next(numbers)}", mode="touch"),
        "incr": lambda: put(where, "k8", request=f"q{next(numbers)}", mode="incr:5"),
        "incr new": lambda: put(where, "k9", request=f"q{next(numbers)}", mode="incr:5"),
        "incr repeated": lambda: put(where, "k8", request="incr", mode="incr:5", again=True),
        "pop": lambda: pop(where, "k8", f"q{next(numbers)}"),
        "pop repeated": lambda: pop(where, "k8", "pop"),
        "ttl": lambda: cached.time_to_live(where, "k8"),
        "get": lambda: cached.read_strictly(where, "k8"),
        "report": lambda: cached.report_reads(where, "w1", report),
        "claim": lambda: cached.claim(where, "new", f"t{next(numbers)}", lease_ms=1000, ignore=""),
        "claim held": lambda: cached.claim(where, "m1", f"t{next(numbers)}", lease_ms=1000, ignore="", awaited="token"),
        "claim again": lambda: cached.claim(where, "m1", "token", lease_ms=1000, ignore=""),
        "claim failed": lambda: cached.claim(where, "m2", "t", lease_ms=1000, ignore="", retry_ms=60_000),
        "claim known": lambda: cached.claim(where, "k8", "t", lease_ms=1000, ignore=""),
        "renew": lambda: cached.renew(where, "m1", "token", 1000),
        "release": lambda: cached.release(where, "m1", "token", error="x y", error_ms=10, origin="o"),
        "delete": lambda: cached.delete(where, ["k7", "k8"], "o"),
        "clear": lambda: cached.clear(where, "o"),
        "drop": lambda: cached.drop(where, 1000),
        "last used": lambda: existing(backend, service).last_used(),
        "invalidate": lambda: cached.invalidate_tags(where, ("t", "v"), "o"),
        "sweep": lambda: cached.sweep(where, "0"),
        "cancel": lambda: cached.cancel_puts(where, ("r1",), int(time.time() * 1000)),
        "deploy": lambda: cached.deploy(where, parsed),
        "deploy defaults": lambda: cached.deploy(where, parsed, "000000000"),
        "settings": lambda: cached.stored_settings(where),
        "prepare": lambda: cached.prepare(where, 0, (1, 100), (0,) * len(cached.COUNTERS)),
        "expect": lambda: cached.expect(where, ["moved", "k8", "k9"]),
        "adopt": lambda: adopt(where, "moved", mark),
        "adopt known": lambda: adopt(where, "k8", mark),
        "lower": lambda: cached.lower(where, (0, 50)),
        "lower to the end": lambda: cached.lower(where, None),
        "thin": lambda: cached.thin(where, 2, 50),
        "fence": lambda: cached.fence(where, "o"),
        "relayout": lambda: cached.relayout(where, "begin", 4, 0),
        "sample": lambda: cache_history.sample(where),
        "series": lambda: cache_history.series((where,), "5m", "1m", None),
        "counters": lambda: inspection.counters(where),
        "failed": lambda: cached.computing_failed(where, "m2"),
        "stats": lambda: existing(backend, service).stats(),
        "keys": lambda: existing(backend, service).keys(),
        "top": lambda: existing(backend, service).top(3),
        "entry": lambda: existing(backend, service).entry("k8"),
    }
    return found


def adopt(where: keys.CacheKeys, name: str, mark: int) -> Command[Any]:
    payload = entry_format.payload("q", 5, 60_000, ("t",), b"m\x01")
    entry = cached.Exported(b"178463520012345 4102444800000 " + payload, 3, 2, b"2855416320197520", HELD_MS)
    return cached.adopt(where, [(name, mark, entry)])


def closed_operations(where: keys.CacheKeys) -> Operations:
    numbers = itertools.count(1)
    return {
        "put": lambda: put(where, "k9", request=f"q{next(numbers)}"),
        "get": lambda: cached.read_strictly(where, "k8"),
        "claim": lambda: cached.claim(where, "new", f"t{next(numbers)}", lease_ms=1000, ignore=""),
        "clear": lambda: cached.clear(where, "o"),
        "invalidate": lambda: cached.invalidate_tags(where, ("t", "v"), "o"),
        "fence": lambda: cached.fence(where, "o"),
        "frozen": lambda: cached.frozen_epochs(where),
        "present": lambda: cached.present(where, "k8"),
        "export": lambda: cached.export(where, ["k1", "k7", "k8", "none"]),
        "forget": lambda: cached.forget(where, ["k1", "k7", "k8", "none"]),
        "forget nothing": lambda: cached.forget(where, ()),
        "thin": lambda: cached.thin(where, 2, 50),
        "retire": lambda: cached.retire(where, HELD_MS),
    }


def existing(backend: Backend, service: str) -> operator.ExistingCache:
    settings = Settings.parse(CACHES["lru"])
    assert settings is not None
    return operator.ExistingCache(backend, service, "c", settings)


@pytest.mark.parametrize("parts", [("meta",), ()], ids=["meta", "others"])
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.waits
def test_damaged_cache_is_reported_and_unchanged(
    stored: Namespace, own_server: Server, connect: Callable[..., Backend], kind: str, parts: tuple[str, ...]
) -> None:
    backend = connect(own_server.url)
    service = "tiered" if kind == "tiered" else "cache"
    where = keys.cache(backend.namespace, service, "c")
    fill_cache(backend.run, where, CACHES[kind])
    damages = stored.damages(is_one_of(parts, ("meta",)))
    assert shortened(faults(stored, backend.run, damages, cache_operations(where, backend, service))) == []


@pytest.mark.parametrize("kind", CACHES)
def test_damaged_closed_shard_is_reported_and_unchanged(
    stored: Namespace, own_server: Server, connect: Callable[..., Backend], kind: str
) -> None:
    backend = connect(own_server.url)
    where = keys.cache(backend.namespace, "tiered" if kind == "tiered" else "cache", "c")
    fill_cache(backend.run, where, CACHES[kind])
    backend.run(cached.fence(where, "o"))
    damages = stored.damages(is_one_of((), ()))
    assert shortened(faults(stored, backend.run, damages, closed_operations(where))) == []


# Metrics

SHARD = keys.metrics_shard("a")


def flush(namespace: str, seq: int, *, firm: bool = False, server_ms: int = -1, span: str = "plan") -> Command[Any]:
    """Flush executions, failures, tokens and a span of one agent, as the process "w"."""
    buffer = Buffer(on_first=lambda: None, clock=lambda: 0.0)
    for number in range(3):
        buffer.record("a", 0.1 + number, OK)
        buffer.record("a", 0.5, f"{FAILED}:TimeoutError")
    buffer.add("a", {"llm_calls": 1, "tok_in": 5, "tok_out": 6, "cost_nano": 7, "mdl:m:n": 1, "mdl:m:tok_in": 5})
    buffer.record(Part("a", (span,)), 0.1, OK)
    buffer.aggregate()
    (batch,) = buffer.batches()
    batch.writer, batch.seq = "w", seq
    return metered.flush(namespace, batch, now=0.0, retention=Retention(), firm=firm, server_ms=server_ms)


def flush_late(namespace: str, seq: int, now_s: float) -> Command[Any]:
    """As the process "late", flush executions of three minutes ago with many durations. This closes their slice."""
    clock = [-190.0]
    buffer = Buffer(on_first=lambda: None, clock=lambda: clock[0])
    buffer.synchronise(now_s, 0.0)
    for number in range(30):
        buffer.record("a", 1.3**number / 1000, OK)
    buffer.record("a", 0.5, f"{FAILED}:Timeout Error")
    clock[0] = 0.0
    buffer.record("a", 0.5, OK)
    buffer.aggregate()
    (batch,) = buffer.batches()
    batch.writer, batch.seq = "late", seq
    server_ms = round(now_s * 1000)
    return metered.flush(namespace, batch, now=0.0, retention=Retention(), server_ms=server_ms)


def metrics_operations(backend: Backend) -> Operations:
    space = backend.namespace
    numbers = itertools.count(100)
    collector = MetricsCollector(backend=backend)
    times: dict[str, dict[str, int]] = {
        "in all": {"window_ms": 0, "as_of_ms": -1},
        "in a window": {"window_ms": 300_000, "as_of_ms": -1},
    }
    found: Operations = {
        "flush": lambda: flush(space, next(numbers)),
        "flush another span": lambda: flush(space, next(numbers), span="search"),
        "flush repeated": lambda: flush(space, 1),
        "flush firmly": lambda: flush(space, next(numbers), firm=True),
        **{
            f"read {form} {name}": partial(metered.read, space, SHARD, ("a", "a/plan"), **time, max_exact=most)
            for name, time in times.items()
            for form, most in (("all", 100), ("plain", -1))
        },
        "series": lambda: partial(collector.series, ("a", "a/plan"), window="5m", step="1m"),
        "series of a day": lambda: partial(collector.series, window="1d", step="1h"),
        "agents": lambda: metered.agents(space, SHARD),
        "last seen": lambda: metered.last_seen(space, SHARD),
        "retention": lambda: metered.stored_retention(space, SHARD),
        "parts": lambda: metered.parts(space, "a"),
        "recent": lambda: metered.recent(space, "a", 10),
        "slowest": lambda: metered.slowest(space, "a", 10),
        "forget": lambda: metered.forget(space, "a", SHARD),
        "snapshots": lambda: partial(collector.snapshots, percentiles=True),
        "plain snapshots": lambda: partial(collector.snapshots, percentiles=False),
        "snapshots in a window": lambda: partial(collector.snapshots, window="5m"),
        "summary": lambda: partial(collector.get_system_summary),
        "spans": lambda: partial(collector.spans, "a"),
        "streams": lambda: partial(collector.streams, "a"),
        "rank": lambda: partial(collector.rank),
    }
    return found


@pytest.mark.parametrize("part", ["total", "slices", "closed", "others"])
def test_damaged_metrics_are_reported_and_unchanged(
    stored: Namespace, own_server: Server, connect: Callable[..., Backend], part: str
) -> None:
    backend = connect(own_server.url)
    backend.run(flush(backend.namespace, 1))
    seconds, micros = stored.raw.time()
    now_s, numbers = seconds + micros / 1e6, itertools.count(2)
    operations = metrics_operations(backend)
    if part == "closed":
        backend.run(flush_late(backend.namespace, 1, now_s))
        operations["late flush"] = lambda: flush_late(backend.namespace, next(numbers), now_s)
    kinds = {"total": ("total",), "slices": ("10s", "1m", "1h", "1d"), "closed": ("slices",)}

    def is_part(key: str) -> bool:
        kind = key.rpartition("}:")[2].partition(":")[0]
        return kind in kinds[part] if part in kinds else not any(kind in each for each in kinds.values())

    def run(what: Any) -> Any:
        return what() if callable(what) else backend.run(what)

    assert any(map(is_part, stored.raw.scan_iter()))
    found = faults(stored, run, stored.damages(is_part), operations)
    assert shortened(found) == []


# The workers


def test_damaged_workers_are_reported_and_unchanged(
    stored: Namespace, own_server: Server, connect: Callable[..., Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (presence, workers):  # so that no worker is forgotten during the test
        monkeypatch.setattr(module, "FORGET_S", HELD_MS / 1000)
    backends = [connect(own_server.url), connect(own_server.url)]
    one, other = map(presence.presence_of, backends)
    collector = MetricsCollector(backend=backends[0])
    calls = presence.OpenCalls((("a", time.perf_counter() - 2), ("b c", time.perf_counter() - 1)), 3)
    for each in (one, other):
        each.flush_state = lambda: presence.FlushState(1, 2, "no reply")
        backends[0].run(each.heartbeat(calls))
    new = presence.Presence(connect(own_server.url))
    operations: Operations = {
        "heartbeat": lambda: one.heartbeat(calls),
        "first heartbeat": lambda: new.heartbeat(presence.OpenCalls()),
        "departure": other.departure,
        "workers": lambda: workers.workers(collector._flusher),
        "running": lambda: workers.running(collector._flusher, "a"),
    }
    assert len(collector.running("a")) == 2
    damages = stored.damages(lambda key: "{workers}" in key)
    assert shortened(faults(stored, backends[0].run, damages, operations)) == []


# Alerts

RULES = """
[[alert]]
name = "a"
agents = "*"
when = "tasks >= 1"
window = "10s"
notify = ["ops"]
[[alert]]
name = "b"
cache = "c"
when = "hit_rate < 80%"
[[slo]]
name = "s"
agents = "*"
objective = "99%"
[notify.ops]
urls = ["json://127.0.0.1:9"]
command = ["/bin/false"]
"""
STATE = TargetState(AlertState.FIRING, 5, 6, 7, 8, 9, 2.5, 2.25, 2.75, "10:1:2:3,20:4:5:6")


def fill_alerts(run: Callable[[Any], Any], where: keys.AlertKeys) -> None:
    """Make alerts in which each kind of key and field occurs: a claim, states, events, silences, a failed attempt."""
    run(alerting.deploy(where, read_rules(RULES)))
    claimed = run(alerting.claim(where, as_of_ms=600_000, count=1, token="t"))
    run(alert_report(where, claimed.version, "t"))
    run(alerting.claim(where, as_of_ms=1_200_000, count=1, token="t"))
    (notice, _) = run(alerting.claim_notices(where, ("ops/0", "ops/command")))
    run(alerting.finish_notice(where, notice, retry_ms=HELD_MS, error="no way"))
    run(alerting.silence(where, ("a",), for_ms=HELD_MS, as_of_ms=-1, event="e"))


def alert_report(where: keys.AlertKeys, version: int, token: str) -> Command[bool]:
    event = AlertEvent("i", "a", "x", AlertState.OK, AlertState.FIRING, 1.5, 2.5, None, 3.0, Interval(1.0, 2.0), "why")
    return alerting.report(
        where,
        version,
        "a",
        token,
        states={"x": STATE},
        gone=("y",),
        events=(event,),
        notices=[("ops/0", "i", "{}"), ("ops/command", "i", "{}")],
    )


def alert_operations(where: keys.AlertKeys) -> Operations:
    notice = alerting.ClaimedNotice("ops/0", "i", 0, "{}")
    found: Operations = {
        "deploy": lambda: alerting.deploy(where, read_rules(RULES)),
        "deploy others": lambda: alerting.deploy(where, read_rules("")),
        "claim": lambda: alerting.claim(where, as_of_ms=2_400_000, count=9, token="u"),
        "claim nothing": lambda: alerting.claim(where, as_of_ms=2_400_000, count=0, token="u"),
        "report": lambda: alert_report(where, 1, "t"),
        "report late": lambda: alert_report(where, 1, "v"),
        "claim notices": lambda: alerting.claim_notices(where, ("ops/0", "ops/command")),
        "delivered": lambda: alerting.finish_notice(where, notice, retry_ms=0),
        "not delivered": lambda: alerting.finish_notice(where, notice, retry_ms=1000, error="x"),
        "silence": lambda: alerting.silence(where, ("a", "b"), for_ms=1000, as_of_ms=-1, event="e"),
        "unsilence": lambda: alerting.silence(where, ("a",), for_ms=0, as_of_ms=-1, event="e"),
        "rules": lambda: alerting.rules(where),
        "states": lambda: alerting.states(where, "a"),
        "silences": lambda: alerting.silences(where),
        "schedule": lambda: alerting.schedule(where),
        "receivers": lambda: alerting.receivers(where),
        "waiting": lambda: alerting.waiting(where, "ops/0"),
        "events": lambda: alerting.events(where, 10),
    }
    return found


def test_damaged_alerts_are_reported_and_unchanged(
    stored: Namespace, own_server: Server, connect: Callable[..., Backend]
) -> None:
    backend = connect(own_server.url)
    where = keys.alerts(backend.namespace)
    fill_alerts(backend.run, where)
    damages = stored.damages(lambda key: key.startswith(where.tag))
    assert shortened(faults(stored, backend.run, damages, alert_operations(where))) == []


# The namespace


def test_damaged_namespace_is_reported_and_unchanged(stored: Namespace, own_server: Server, namespace: str) -> None:
    with AgentPerf(own_server.url, namespace=namespace) as perf:
        perf.balancer().register_instance(AgentInstance("p0", "planner"))
        perf.cache("c", max_size=5).put("k", 1)
        perf.tiered_cache("c").put("k", 1)
        perf.metrics.record_execution("a", 0.1, True)
        perf.metrics.flush()

    def opened(use: Callable[[AgentPerf], Any]) -> Callable[[], Any]:
        def call() -> Any:
            with AgentPerf(own_server.url, namespace=namespace) as other:
                return use(other)

        return call

    operations: Operations = {
        "pools": lambda: opened(lambda perf: perf.balancer().status()),
        "caches": lambda: opened(lambda perf: perf.caches()),
        "cache": lambda: opened(lambda perf: perf.cache("c", max_size=5).put("k2", 2)),
        "metrics": lambda: opened(lambda perf: perf.metrics.snapshots()),
    }
    damages = stored.damages(lambda key: key in (f"{namespace}:meta", f"{namespace}:resources"))
    assert shortened(faults(stored, lambda what: what(), damages, operations)) == []


# Random bytes

ROUNDS = 12
"""Number of random damages in a run of the suite. `--hypothesis-profile explore` adds many more, of a new seed."""
EXPLORED_ROUNDS = 400


def _filled_pool(backend: Backend, stored: Namespace) -> Operations:
    pool = lb.Pool.of(backend.namespace, "planner")
    fill_pool(backend.run, pool, LoadBalancingStrategy.WEIGHTED, stored)
    return pool_operations(pool, layouts_of(backend))


def _filled_lock(backend: Backend, stored: Namespace) -> Operations:
    place = locking.Place.of(backend.namespace, "semaphore", "gpus")
    fill_semaphore(backend.run, place, stored)
    return semaphore_operations(place)


def _filled_cache(backend: Backend, stored: Namespace, kind: str) -> Operations:
    service = "tiered" if kind == "tiered" else "cache"
    where = keys.cache(backend.namespace, service, "c")
    fill_cache(backend.run, where, CACHES[kind])
    return cache_operations(where, backend, service)


def _filled_metrics(backend: Backend, stored: Namespace) -> Operations:
    backend.run(flush(backend.namespace, 1))
    seconds, micros = stored.raw.time()
    backend.run(flush_late(backend.namespace, 1, seconds + micros / 1e6))
    return metrics_operations(backend)


def _filled_alerts(backend: Backend, stored: Namespace) -> Operations:
    where = keys.alerts(backend.namespace)
    fill_alerts(backend.run, where)
    return alert_operations(where)


FILLED: dict[str, Callable[[Backend, Namespace], Operations]] = {
    "pool": _filled_pool,
    "lock": _filled_lock,
    "lru": partial(_filled_cache, kind="lru"),
    "tiered": partial(_filled_cache, kind="tiered"),
    "metrics": _filled_metrics,
    "alerts": _filled_alerts,
}


@pytest.mark.parametrize("service", FILLED)
def test_random_bytes_are_reported_and_unchanged(
    stored: Namespace,
    own_server: Server,
    connect: Callable[..., Backend],
    pytestconfig: pytest.Config,
    service: str,
) -> None:
    backend = connect(own_server.url)
    operations = FILLED[service](backend, stored)
    explores = pytestconfig.getoption("--hypothesis-profile", None) == "explore"
    seed = time.time_ns() % 1_000_000 if explores else 1
    print(f"seed {seed}")

    def run(what: Any) -> Any:
        return what() if callable(what) else backend.run(what)

    damages = stored.random_damages(random.Random(seed), EXPLORED_ROUNDS if explores else ROUNDS)
    assert shortened(faults(stored, run, damages, operations)) == []
