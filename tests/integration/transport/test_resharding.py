"""All slots of a Cluster are moved repeatedly while all three services use it. Nothing is lost, and no call fails.

Slots are moved key by key, as `redis-cli --cluster reshard` does. If the server can move slots atomically, this is
tested too.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count

import pytest

from agentperf_redis import AgentInstance, AgentPerf, LRUCache, TieredCache, keys
from agentperf_redis.keys import SLOTS, key_slot
from tests.support.servers import Server, ServerKind, wait_until
from tests.support.slot_moves import SlotMover

KEY_PAUSE_S = 0.0005
"""Pause after each moved key, so that commands meet a slot in each state."""
DEADLINE_S = 120.0
"""Deadline of every call. A slot is moved within a second, or within a few on a busy machine, so no call may fail."""
CAPACITY = 2
STALE_S = 0.25
MAX_TAKEOVER_S = 2.0
"""Timeout of the nodes, s. Before it ends, the old node of an atomically moved slot knows the new node."""
POOLS = ("coder", "critic")
AGENTS = tuple({keys.metrics_shard(name): name for name in map("agent {}".format, range(200))}.values())
"""One agent in each shard of the metrics."""
BUSY_AGENTS = AGENTS[:4]
PAUSE_S = 0.01
"""Pause of each thread after an operation. Without it, the threads would use up the processor and delay the moves."""


class Written:
    """One cache key and its only writer. Version n is written by the n-th operation, a put or a delete."""

    def __init__(self, cache: LRUCache | TieredCache, key: str) -> None:
        self._cache = cache
        self.key = key
        self.acknowledged: list[float] = []
        self._deletes: set[int] = set()

    def write(self, *, delete: bool = False) -> None:
        version = len(self.acknowledged)
        if delete:
            self._deletes.add(version)
            self._cache.delete(self.key)
        else:
            assert self._cache.put(self.key, version)
        self.acknowledged.append(time.monotonic())

    def assert_fresh(self, reader: LRUCache | TieredCache) -> None:
        """Read the key. The value must not be older than the last write acknowledged before this read."""
        latest = len(self.acknowledged) - 1
        read = reader.get(self.key, fresh=True)
        if read is None:
            assert any(version >= latest for version in self._deletes), f"{self.key}: version {latest} is missing"
        else:
            assert read >= latest, f"{self.key}: version {read} was read after {latest} was acknowledged"

    def age(self, reader: LRUCache) -> float:
        """Read a key that is never deleted. Return for how many seconds the value was outdated when the read began."""
        begun = time.monotonic()
        following = reader.get(self.key) + 1
        return begun - self.acknowledged[following] if following < len(self.acknowledged) else 0.0


class Load:
    """Threads that use all services until `stop`. Two clients stand for two processes.

    Attributes:
        max_age: maximum time in s from the acknowledgement of a newer value to a read that still found the old copy.
    """

    def __init__(self, connect: Callable[[], AgentPerf]) -> None:
        self.perf, self.other = connect(), connect()
        self.max_age = 0.0
        self._errors: list[str] = []
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._work: Counter[str] = Counter()
        self._lock = threading.Lock()
        # Load balancer
        self._held: Counter[str] = Counter()
        self._released: Counter[str] = Counter()
        # Metrics
        self._recorded: Counter[str] = Counter()
        # Caches
        self._answers = [perf.cache("answers", max_size=100) for perf in (self.perf, self.other)]
        docs = self.perf.tiered_cache("docs")
        self._written: dict[LRUCache | TieredCache, list[Written]] = {
            self._answers[1]: [Written(self._answers[0], f"key {number}") for number in range(4)]
        }
        self._written[self.other.tiered_cache("docs")] = [Written(docs, f"page {number}") for number in range(4)]
        """The written keys, by the cache through which the other process reads them."""
        self._copied = Written(self.perf.cache("near", max_size=100), "shared")
        self._copies = self.other.cache("near", max_size=100, local_size=10)
        self._computing = [perf.cache("computed", max_size=10, lease=DEADLINE_S) for perf in (self.perf, self.other)]

    def start(self) -> None:
        for pool in POOLS:
            for name in ("a", "b"):
                instance = AgentInstance(id=f"{pool}-{name}", agent_type=pool, max_capacity=CAPACITY)
                self.perf.balancer().register_instance(instance)
        for agent in AGENTS:
            self._record(self.perf, agent)
        self.perf.metrics.flush()
        self._write_all(deletes=False)
        self._copied.write()
        leasing = [self._lease(perf, pool) for perf in (self.perf, self.other) for pool in POOLS for _ in range(2)]
        jobs: list[tuple[str, Callable[[], object]]] = [
            *(("balancer", job) for job in leasing),
            *(("metrics", self._count(perf)) for perf in (self.perf, self.other)),
            ("metrics", self._read_counts),
            ("metrics", self._forget()),
            ("caches", self._write_all),
            ("caches", self._read),
            ("caches", self._compute()),
            ("copies", self._copied.write),
            ("copies", self._read_copy),
        ]
        self._threads = [threading.Thread(target=self._repeat, args=job) for job in jobs]
        self._threads.append(threading.Thread(target=lambda: asyncio.run(self._use_asyncio())))
        for thread in self._threads:
            thread.start()

    def await_progress(self) -> None:
        """Wait until every service has done some more work."""
        with self._lock:
            before = Counter(self._work)

        def worked() -> bool:
            kinds = ("balancer", "metrics", "caches", "copies", "asyncio")
            return bool(self._errors) or all(self._work[kind] > before[kind] + 5 for kind in kinds)

        wait_until(worked, "all services to work", DEADLINE_S)
        assert self._errors == []

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)
        assert not any(thread.is_alive() for thread in self._threads)
        assert self._errors == []

    def _repeat(self, name: str, job: Callable[[], None]) -> None:
        try:
            while not self._stopping.is_set():
                job()
                self._worked(name)
                time.sleep(PAUSE_S)
        except BaseException:  # noqa: BLE001  the test reports it
            self._errors.append(traceback.format_exc())

    def _worked(self, name: str) -> None:
        with self._lock:
            self._work[name] += 1

    # Load balancer

    def _lease(self, perf: AgentPerf, pool: str) -> Callable[[], None]:
        balancer = perf.balancer()

        def work() -> None:
            instance = balancer.acquire(pool, wait=DEADLINE_S)
            assert instance is not None
            self._use(instance)
            time.sleep(0.002)
            self._unuse(instance)
            assert balancer.release(instance)
            self._note_release(instance)

        return work

    def _use(self, instance: AgentInstance) -> None:
        with self._lock:
            self._held[instance.id] += 1
            assert self._held[instance.id] <= CAPACITY, "over capacity"

    def _unuse(self, instance: AgentInstance) -> None:
        with self._lock:
            self._held[instance.id] -= 1

    def _note_release(self, instance: AgentInstance) -> None:
        with self._lock:
            self._released[instance.id] += 1

    # Metrics

    def _record(self, perf: AgentPerf, agent: str) -> None:
        perf.metrics.record_execution(agent, 0.001, success=True)

    def _count(self, perf: AgentPerf) -> Callable[[], None]:
        def work() -> None:
            for agent in BUSY_AGENTS:
                self._record(perf, agent)
            perf.metrics.flush()
            with self._lock:
                self._recorded.update(BUSY_AGENTS)

        return work

    def _read_counts(self) -> None:
        for window in (None, "1h"):
            with self._lock:
                least = {agent: 1 + n for agent, n in self._recorded.items()}
            found = self.other.metrics.snapshots(window=window)
            assert len(found) >= len(AGENTS)
            for agent, counted in least.items():
                assert found[agent].task_count >= counted, f"{agent} in {window}"

    def _forget(self) -> Callable[[], None]:
        numbers = count()

        def work() -> None:
            agent = f"temporary {next(numbers) % 4}"
            with self.perf.metrics.track(agent), self.perf.metrics.span(agent, "step"):
                pass
            assert self.perf.metrics.forget(agent)
            assert self.perf.metrics.get_or_create_metrics(agent).task_count == 0
            assert len(self.perf.metrics.spans(agent).spans) <= 1  # at most the agent itself is left

        return work

    # Caches

    def _write_all(self, *, deletes: bool = True) -> None:
        for group in self._written.values():
            for each in group:
                each.write(delete=deletes and len(each.acknowledged) % 7 == 0)

    def _read(self) -> None:
        for reader, group in self._written.items():
            for each in group:
                each.assert_fresh(reader)

    def _compute(self) -> Callable[[], None]:
        numbers = count()

        def work() -> None:
            key, calls = f"computed {next(numbers)}", list[str]()

            def function() -> str:
                calls.append(key)
                return key

            with ThreadPoolExecutor(2) as pool:
                results = [pool.submit(cache.get_or_compute, key, function) for cache in self._computing]
            assert [result.result() for result in results] == [key, key]
            assert calls == [key], "the value was computed more than once"

        return work

    def _read_copy(self) -> None:
        self.max_age = max(self.max_age, self._copied.age(self._copies))

    async def _use_asyncio(self) -> None:
        try:
            cache, balancer = self.other.cache("aio", max_size=100).aio, self.other.balancer().aio
            for number in count():
                if self._stopping.is_set():
                    break
                await cache.put("key", number)
                assert await cache.get("key") == number
                instance = await balancer.acquire("coder", wait=DEADLINE_S)
                assert instance is not None
                self._use(instance)
                self._unuse(instance)
                assert await balancer.release(instance)
                self._note_release(instance)
                self._worked("asyncio")
                await asyncio.sleep(PAUSE_S)
        except BaseException:  # noqa: BLE001  the test reports it
            self._errors.append(traceback.format_exc())

    # After the end

    def assert_all_applied(self) -> None:
        """Check that the servers hold exactly what they acknowledged."""
        everything = Counter(AGENTS) + self._recorded
        for window in (None, "1h"):
            found = self.other.metrics.snapshots(window=window)
            assert {agent: found[agent].task_count for agent in AGENTS} == everything, window
        for perf in (self.perf, self.other):
            state = perf.metrics.delivery()
            assert (state.counted, state.pending, state.dropped, state.uncertain) == (state.recorded, 0, 0, 0)
        balancer = self.other.balancer()
        for pool in balancer.status(*POOLS):
            for status in pool.instances:
                assert status.instance.current_load == 0
                assert status.served == self._released[status.instance.id]
                assert status.peak_load <= CAPACITY
            assert balancer.leases(pool.agent_type).leases == ()
            assert balancer.repair(pool.agent_type).wrong == 0
        self._read()
        self._write_all(deletes=False)
        self._read()
        for cache in (*self._written, self._copies):
            cache.flush()
            assert cache.stats().corrupt == 0
            assert cache.size() == len(cache.keys())


@contextmanager
def loaded(server: Server, namespace: str) -> Iterator[tuple[Load, SlotMover]]:
    made: list[AgentPerf] = []

    def connect() -> AgentPerf:
        made.append(AgentPerf(server.url, namespace=namespace, deadline=DEADLINE_S))
        return made[-1]

    mover, load = SlotMover(server), Load(connect)
    try:
        load.start()
        yield load, mover
    finally:
        load.stop()
        for each in made:
            each.close()
        mover.close()


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["cluster", "cluster82"])
@pytest.mark.waits
def test_slots_moved_round_under_load_lose_nothing(
    kind: ServerKind, start_server: Callable[..., Server], namespace: str, pytestconfig: pytest.Config
) -> None:
    server = start_server(kind)
    rounds = 2 if pytestconfig.getoption("--everything") else 1
    with loaded(server, namespace) as (load, mover):
        load.await_progress()
        for _ in range(rounds * len(server.nodes)):  # after one move per node, each slot is on its first node again
            # The slot of the workers' heartbeats counts as used even if it is empty now. Heartbeats expire and begin
            # again, so this slot may soon be in use.
            used = sorted({*mover.used_slots(), key_slot(keys.workers_seen(namespace))})
            for slot in used:
                mover.move(slot, mover.next_after(mover.owners[slot]), KEY_PAUSE_S)
            mover.move_empty(set(range(SLOTS)).difference(used))
            load.await_progress()
        assert load.max_age <= STALE_S + mover.max_disagreement
        if mover.moves_atomically:
            mover.move_all_atomically()
            load.await_progress()
            assert load.max_age <= STALE_S + max(mover.max_disagreement, MAX_TAKEOVER_S)
        load.stop()
        load.assert_all_applied()
        mover.assert_keys_are_on_one_node()
