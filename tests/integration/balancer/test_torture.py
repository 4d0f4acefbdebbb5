"""Workers acquire, wait for and abandon leases. Some workers are killed or paused. Then the pool's history is checked.

For these tests, the scripts log their actions to a list beside the pool's keys, in the order of execution. The check
replays this list. Tests with mutants of the scripts show that the check can fail. During the run, a proxy delays some
requests. The callers retry these requests, and release the leases before the delayed copies arrive.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import pytest

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import AgentInstance, EventKind, LoadBalancer, PoolSettings, commands
from tests.support import records
from tests.support.mutants import changed
from tests.support.pool_history import JUMPY, LOGGING, SCRIPTS, Unsound, check_histories, check_history, check_replies
from tests.support.proxy import Proxy
from tests.support.servers import TIMEOUT, Raw, Server, wait_until
from tests.support.workers import Worker, Workers
from tests.torture.mutants import POOL_MUTANTS

TTL, CAPACITY, INSTANCES, PROCESSES, SECONDS = 0.4, 2, 3, 8, 10.0
DIVIDED = 8
"""Number of shards of the pools with several shards. They have more instances, so that some share a shard."""
LATE_S = 0.2
"""How long a request is delayed, s: much longer than a retry and a release take."""


def logged(mutant: str | None) -> AbstractContextManager[None]:
    """Make the scripts of this process log their history, and optionally apply a mutant to them."""
    return changed(SCRIPTS, LOGGING, POOL_MUTANTS[mutant] if mutant else ())


@pytest.fixture
def mutant(request: pytest.FixtureRequest) -> str | None:
    return getattr(request, "param", None)


@pytest.fixture(autouse=True)
def history_is_written(mutant: str | None) -> Iterator[None]:
    with logged(mutant):
        yield


def pools_of(namespace: str, shards: int) -> list[keys.PoolKeys]:
    """Return the keys of the shards of the pool."""
    return [keys.pool(namespace, "planner", number, shards) for number in range(shards)]


def units_of(shards: int) -> dict[str, int]:
    """Return the capacities of the instances of a pool, by id: 6 units in one shard, or 10 units in several shards."""
    if shards == 1:
        return {f"p{number}": CAPACITY for number in range(INSTANCES)}
    return {f"p{number}": 1 for number in range(10)}


def read_histories(raw: Raw, pools: list[keys.PoolKeys]) -> list[list[str]]:
    """Read the history of each shard."""
    return [raw.lrange(f"{pool.state}:log", 0, -1) for pool in pools]


def work(url: str, namespace: str, mutant: str | None, file: str, seed: int) -> None:
    """Acquire leases with random waits and priorities until SIGKILL. The file of replies survives the signal."""
    with logged(mutant):
        use_pool(LoadBalancer(backend=Backend(url, namespace=namespace)), file, random.Random(seed))


def use_pool(balancer: LoadBalancer, file: str, chance: random.Random) -> NoReturn:
    """Acquire and release leases, and write each grant and each release to the file."""
    seen = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    forgotten = []
    while True:
        if chance.random() < 0.2:
            several = balancer.acquire_many("planner", chance.randint(2, 4), all_or_none=chance.random() < 0.5, ttl=TTL)
            tokens = [each.lease.token for each in several if each.lease is not None]
            os.write(seen, "".join(f"got {token}\n" for token in tokens).encode())
            time.sleep(chance.choice([0.0, 0.001, 0.01]))
            freed = zip(tokens, balancer.release_many(several), strict=True)
            os.write(seen, "".join(f"freed {token}\n" for token, is_freed in freed if is_freed).encode())
            continue
        wait = chance.choice([0.0, 0.0, 0.05, 1.0])
        instance = balancer.acquire("planner", wait=wait, ttl=TTL, priority=chance.randrange(3))
        if instance is None:
            time.sleep(0.002)
            continue
        assert instance.lease is not None
        token = instance.lease.token
        os.write(seen, f"got {token}\n".encode())
        time.sleep(chance.choice([0.0, 0.001, 0.01]))
        if chance.random() < 0.02:
            balancer._operations.keeper.drop(instance.lease)  # without renewal, the lease expires
            forgotten.append(instance)
        elif balancer.release(instance, outcome=chance.choice(["ok"] * 38 + ["error", "neutral"])):
            os.write(seen, f"freed {token}\n".encode())


def observed(folder: Path) -> list[str]:
    """Return the replies in the files of the workers, without incomplete lines."""
    return [line for file in folder.iterdir() for line in file.read_text().splitlines() if line.count(" ") == 1]


def torture(
    server: Server,
    proxy: Proxy | None,
    namespace: str,
    workers: Workers,
    folder: Path,
    mutant: str | None,
    seconds: float,
    enough: Callable[[], bool],
    shards: int = 1,
) -> None:
    """Let workers use one pool, and kill and pause some of them, for at least `seconds` and until `enough` is true.

    With a proxy, copies of some requests for leases arrive late. The proxy does not work with a Cluster.
    """
    chance = random.Random(4)
    url = server.url if proxy is None else proxy.url
    backend = Backend(server.url, namespace=namespace)
    # The mutant "no capacity check" raises a script error if the limit of an instance is 0, for example during an
    # ejection. Therefore mutants run without ejection.
    balancer = LoadBalancer(settings=PoolSettings(eject_after=None) if mutant else JUMPY, backend=backend)
    balancer.configure_pool("planner", shards=shards)
    for name, capacity in units_of(shards).items():
        balancer.register_instance(
            AgentInstance(name, "planner", max_capacity=capacity),
            requests_per_minute=60_000 if name == "p0" else math.inf,
        )
    backend.close()

    def start(number: int) -> Worker:
        return workers.start(work, url, namespace, mutant, str(folder / f"{number}"), number)

    crowd = [start(number) for number in range(PROCESSES)]
    end = time.monotonic() + seconds
    while time.monotonic() < end or (time.monotonic() < end + TIMEOUT and not enough()):
        if proxy is not None:
            for script in (commands.ACQUIRE, commands.ACQUIRE_MANY, commands.WAIT):
                proxy.hold(only=script, after=LATE_S)
        victim = chance.randrange(PROCESSES)
        if chance.random() < 0.3:
            crowd[victim].kill()
            crowd[victim] = start(len(list(folder.iterdir())) + PROCESSES)
        else:
            crowd[victim].pause()
            time.sleep(chance.choice([0.05, TTL * 1.5]))
            crowd[victim].resume()
        time.sleep(0.05)
    for worker in crowd:
        worker.kill()
    if proxy is not None:
        time.sleep(2 * LATE_S)  # long enough for every delayed request to arrive


def units(raw: Raw, pool: keys.PoolKeys) -> list[str]:
    """Return the tokens of leases and of unfetched grants. Both hold capacity."""
    return records.held(raw.hgetall(pool.state))


def wait_until_all_end(raw: Raw, *pools: keys.PoolKeys) -> None:
    """Wait until all leases and waiters have expired by the server's clock, without running a script on the pool."""

    def over() -> bool:
        seconds, micros = raw.time()
        due = [timer for pool in pools for timer in raw.zrange(pool.due, 0, -1, withscores=True)]
        return all(at <= seconds * 1000 + micros // 1000 for name, at in due if name[0] == "@" or name[:2] == "W@")

    wait_until(over, "everything to have ended")


def acquire_all(url: str, namespace: str) -> Iterator[list[str]]:
    """Acquire leases until no capacity of the pool is left, and yield the tokens of the leases."""
    with logged(None):
        balancer = LoadBalancer(backend=Backend(url, namespace=namespace))
        held = [balancer.acquire("planner", ttl=TTL) for _ in range(INSTANCES * CAPACITY)]
        yield [each.lease.token for each in held if each is not None and each.lease is not None]


def test_killed_process_frees_all_units_after_ttl(
    server: Server, backend: Backend, namespace: str, raw: Raw, workers: Workers
) -> None:
    pool = keys.pool(namespace, "planner")
    balancer = LoadBalancer(backend=backend)
    for number in range(INSTANCES):
        balancer.register_instance(AgentInstance(f"p{number}", "planner", max_capacity=CAPACITY))
    worker = workers.start(acquire_all, server.url, namespace)
    held = worker.said()
    assert len(held) == INSTANCES * CAPACITY
    worker.kill()
    assert sorted(units(raw, pool)) == sorted(held)
    wait_until_all_end(raw, pool)
    assert raw.hget(pool.state, "#load") == str(len(held)), "without an operation, nothing changes"

    instance = balancer.acquire("planner")

    assert instance is not None
    assert instance.lease is not None
    assert units(raw, pool) == [instance.lease.token]
    assert raw.hget(pool.state, "#load") == "1"
    loads = {f"p{n}": int(records.number(raw.hget(pool.state, f"p{n}"), "load")) for n in range(INSTANCES)}
    assert loads == {f"p{n}": int(f"p{n}" == instance.id) for n in range(INSTANCES)}
    assert set(check_history(raw.lrange(f"{pool.state}:log", 0, -1))) == {instance.lease.token}


@pytest.mark.thorough
@pytest.mark.parametrize("shards", [1, DIVIDED])
def test_crashes_and_pauses_leave_the_pool_consistent(
    server: Server,
    make_proxy: Callable[[Server], Proxy],
    namespace: str,
    raw: Raw,
    workers: Workers,
    tmp_path: Path,
    shards: int,
) -> None:
    pools, units = pools_of(namespace, shards), units_of(shards)
    proxy = None if server.kind == "cluster" else make_proxy(server)

    def enough() -> bool:
        return sum(entry.startswith("grant ") for history in read_histories(raw, pools) for entry in history) > 500

    torture(server, proxy, namespace, workers, tmp_path, None, SECONDS, enough, shards)

    backend = Backend(server.url, namespace=namespace)
    balancer = LoadBalancer(backend=backend)
    # No process is left to renew leases, so all leases expire. A dead waiter loses its position after three seconds
    # without a poll. An unfetched grant expires after three seconds.
    wait_until_all_end(raw, *pools)
    first = balancer.acquire("planner")
    assert first is not None, "no capacity became free after the TTL and one operation"
    kinds = Counter(event.kind for event in balancer.events("planner", limit=1000))
    assert kinds[EventKind.EJECTED]
    assert kinds[EventKind.HALF_OPEN]
    assert kinds[EventKind.EXPIRED]
    for name, capacity in units.items():  # so that every instance can be leased up to its capacity
        balancer.mark_healthy("planner", name)
        balancer.update_instance("planner", name, max_capacity=capacity, requests_per_minute=math.inf)
    everything: list[Any] = [first, *(balancer.acquire("planner") for _ in range(sum(units.values()) - 1))]
    assert all(everything), "not all capacity became free"
    histories = read_histories(raw, pools)
    assert set(check_histories(histories)) == {instance.lease.token for instance in everything}
    history = list(itertools.chain(*histories))
    check_replies(history, observed(tmp_path))
    entries = Counter(entry.split(" ")[0] for entry in history)
    assert entries["grant"] > 500
    assert entries["end"] > 5
    assert sum(int(raw.hget(pool.state, "#load") or 0) for pool in pools) == sum(units.values())
    backend.close()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("mutant", "expected"),
    [
        ("no capacity check", "were held"),
        # Without tombstones, a late request gets a second grant, or a release ends a lease that has already expired.
        (
            "no tombstone",
            "for the second time|which was not held",
        ),
        ("token made by the server", "granted 0 times"),
    ],
    indirect=["mutant"],
)
@pytest.mark.parametrize("shards", [1, DIVIDED])
def test_torture_catches_all_mutants(
    server: Server,
    proxy: Proxy,
    namespace: str,
    raw: Raw,
    workers: Workers,
    tmp_path: Path,
    mutant: str,
    expected: str,
    shards: int,
) -> None:
    """Runs the same load and checks on mutants of the scripts, until a check fails."""
    complaints: list[str] = []

    def caught() -> bool:
        seen = observed(tmp_path)  # read before the histories, so that every reply already has its entry there
        try:
            histories = read_histories(raw, pools_of(namespace, shards))
            check_histories(histories)
            check_replies(list(itertools.chain(*histories)), seen)
        except Unsound as unsound:
            complaints.append(str(unsound))
        return bool(complaints)

    torture(server, proxy, namespace, workers, tmp_path, mutant, 0.0, caught, shards)
    assert complaints, "no check failed"
    assert re.search(expected, complaints[0])


@pytest.mark.parametrize("mutant", [None, "no tombstone", "token made by the server"], indirect=True)
def test_checker_detects_mutants_with_late_requests(
    namespace: str, raw: Raw, proxy: Proxy, connect: Callable[..., Backend], mutant: str | None
) -> None:
    balancer = LoadBalancer(backend=connect(proxy.url))
    balancer.register_instance(AgentInstance("p0", "planner"))
    assert balancer.release(balancer.acquire("planner")) is (mutant != "token made by the server")
    held = proxy.hold(only=commands.ACQUIRE)
    instance = balancer.acquire("planner")
    assert instance is not None
    assert instance.lease is not None
    seen = [f"got {instance.lease.token}"]
    if balancer.release(instance):
        seen.append(f"freed {instance.lease.token}")
    held.deliver()

    history = raw.lrange(f"{keys.pool(namespace, 'planner').state}:log", 0, -1)
    expected = {None: "", "no tombstone": "second time", "token made by the server": "granted 0 times"}[mutant]
    complaint = ""
    try:
        live = check_history(history)
        check_replies(history, seen)
    except Unsound as unsound:
        complaint = str(unsound)
    assert expected in complaint
    if mutant is None:
        assert complaint == ""
        assert live == {}
