"""A worker process: threads that use the balancer, the caches, the metrics and the alerts, all with random choices.

The worker works until its stop file exists, or until it is killed. It writes everything that a check needs into its
journal. Errors that the library documents for an unreachable or full server are expected; any other error is a fault.
"""

from __future__ import annotations

import logging
import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from agentperf_redis import AgentPerf
from agentperf_redis.alerts.notify import Deliveries
from agentperf_redis.cache.model import MIN_SHARD_ENTRIES
from agentperf_redis.errors import BackendFull, BackendUnavailable, ComputeFailed, LeaseLost, NoCapacity
from tests.torture.journal import Journal
from tests.torture.mutants import applied

POOL = "coder"
LEASE_TTL_S = 0.5
CACHE = "answers"
CACHE_SIZE = 30
"""Maximum number of local copies, and of entries in a cache with one shard. It is so small that entries are evicted."""
PUT_KEYS = tuple(f"put{number}" for number in range(8))
FILL_KEYS = tuple(f"fill{number}" for number in range(4))
TTL_KEYS = tuple(f"brief{number}" for number in range(4))
TTL_S = 0.3
TAGS = ("even", "odd")
DEADLINE_S = 2.0
VIRTUAL_MINUTE_S = 0.25
"""In this many seconds of real time, one minute passes in the history on which the alerts are evaluated."""

EXPECTED = (BackendUnavailable, BackendFull, LeaseLost, NoCapacity, ComputeFailed)


@dataclass(frozen=True, slots=True)
class Job:
    """The task of a worker.

    Attributes:
        url: the server, or a proxy in front of it.
        namespace: the namespace.
        folder: the folder of the journals.
        stop: the worker ends when this file exists.
        seed: seed of the random choices.
        mutant: name of a mutant; empty for none.
        shards: number of shards of the pool, and of the cache.
        alerts_from: virtual time at which the alerts start, s since 1970.
        epoch: the value of `time.monotonic`, in s, that corresponds to `alerts_from`.
    """

    url: str
    namespace: str
    folder: Path
    stop: Path
    seed: int
    mutant: str
    shards: int
    alerts_from: float
    epoch: float


def tag_of(key: str) -> str:
    """Return the tag of a key."""
    return TAGS[int(key[-1]) % len(TAGS)]


def work(job: Job, number: int) -> Iterator[None]:
    """Work until the stop file exists. Yields once, after the threads have started. Ends when everything is counted."""
    logging.getLogger("agentperf_redis").addHandler(logging.FileHandler(job.folder / f"{number}.log"))
    with ExitStack() as stack:
        stack.enter_context(applied(job.mutant))
        perf = stack.enter_context(AgentPerf(job.url, namespace=job.namespace, deadline=DEADLINE_S))
        worker = Worker(job, number, perf)
        threads = [threading.Thread(target=worker.loop, args=(each,)) for each in worker.loops]
        for thread in threads:
            thread.start()
        yield
        for thread in threads:
            thread.join()
        worker.deliver_metrics()


class Worker:
    """The loops of one process."""

    def __init__(self, job: Job, number: int, perf: AgentPerf) -> None:
        self._job, self._perf = job, perf
        self._journal = Journal(job.folder, number)
        self._chance = random.Random(f"{job.seed}/{number}")
        self._number = number
        self._agent = f"agent-{number}"
        self._balancer = perf.balancer()
        size = CACHE_SIZE if job.shards == 1 else MIN_SHARD_ENTRIES * job.shards
        self._cache = perf.cache(CACHE, max_size=size, local_size=CACHE_SIZE, lease=1.0, shards=job.shards)
        self._cache._shared_state.warn = self._note_warning  # type: ignore[method-assign]
        self._deliveries = Deliveries(perf.alerts._service)
        self._writes = self._recorded = 0
        self.loops: tuple[Callable[[], None], ...] = (
            *(self._use_pool, self._use_pool, self._use_cache, self._compute, self._record, self._evaluate),
        )

    def loop(self, step: Callable[[], None]) -> None:
        """Repeat a step until the stop file exists. An error that the library does not document ends the loop."""
        while not self._job.stop.exists():
            try:
                step()
            except EXPECTED as error:
                self._journal.write("error", step.__name__, type(error).__name__, str(error))
                time.sleep(0.01)
            except BaseException as error:  # noqa: BLE001  the check reports it
                self._journal.write("fault", step.__name__, type(error).__name__, traceback.format_exc())
                return

    # The balancer

    def _use_pool(self) -> None:
        wait = self._chance.choice([0.0, 0.05, 0.5])
        instance = self._balancer.acquire(POOL, wait=wait, ttl=LEASE_TTL_S, priority=self._chance.randrange(3))
        if instance is None:
            time.sleep(0.005)
            return
        assert instance.lease is not None
        token = instance.lease.token
        self._journal.write("got", token)
        time.sleep(self._chance.choice([0.0, 0.002, 0.02]))
        if self._chance.random() < 0.02:
            self._balancer._operations.keeper.drop(instance.lease)  # the lease is no longer renewed, so it expires
        elif self._balancer.release(instance, outcome=self._chance.choice(["ok"] * 38 + ["error", "neutral"])):
            self._journal.write("freed", token)

    # Values that are put, deleted and invalidated

    def _use_cache(self) -> None:
        if self._chance.random() < 0.06:
            self._change(self._chance.choice(PUT_KEYS + FILL_KEYS))
        key, fresh = self._chance.choice(PUT_KEYS + FILL_KEYS), self._chance.random() < 0.2
        begun = time.monotonic()
        found = self._cache.get(key, fresh=fresh)
        if found is not None:
            self._journal.write("read", key, found, begun, fresh)
        time.sleep(0.001)

    def _change(self, key: str) -> None:
        how = self._chance.choice(("put", "put", "put", "delete", "tag", "clear"))
        if how == "put" and key in FILL_KEYS:
            how = "delete"
        concerned = {
            "put": [key],
            "delete": [key],
            "tag": [each for each in PUT_KEYS + FILL_KEYS if tag_of(each) == tag_of(key)],
            "clear": [*PUT_KEYS, *FILL_KEYS],
        }[how]
        value = self._new_value()
        self._journal.write("write", how, value, concerned)
        match how:
            case "put":
                self._cache.put(key, value, tags=[tag_of(key)])
            case "delete":
                self._cache.delete(key)
            case "tag":
                self._cache.invalidate_tags(tag_of(key))
            case _:
                self._cache.clear()
        self._journal.write("wrote", value)

    def _new_value(self) -> str:
        self._writes += 1
        return f"{self._number}.{threading.get_ident()}.{self._writes}"

    # Values that are computed

    def _note_warning(self, message: str, *args: object) -> None:
        """Note a warning of the cache, such as the one that a value is computed without the server."""
        self._journal.write("warned", message % args)

    def _compute(self) -> None:
        key = self._chance.choice(FILL_KEYS + TTL_KEYS)
        value = self._new_value()

        def compute() -> str:
            self._journal.write("computes", key, value, asked)
            time.sleep(self._chance.choice([0.0, 0.01, 0.05]))
            self._journal.write("computed", key, value)
            return value

        asked = time.monotonic()
        ttl, tags = (TTL_S, []) if key in TTL_KEYS else (None, [tag_of(key)])
        found = self._cache.get_or_compute(key, compute, ttl, tags=tags)
        self._journal.write("found", key, found, asked)
        time.sleep(0.003)

    # Executions

    def _record(self) -> None:
        count = self._chance.randrange(1, 40)
        self._recorded += count
        self._journal.write("records", self._recorded)
        for _ in range(count):
            self._perf.metrics.record_execution(self._agent, self._chance.lognormvariate(-3, 1), success=True)
        delivery = self._perf.metrics.delivery()
        self._journal.write("delivered", delivery.counted, delivery.dropped, delivery.uncertain)
        time.sleep(0.01)
        if self._chance.random() < 0.1:
            self._perf.metrics.flush()

    def deliver_metrics(self) -> None:
        """Flush until everything is counted, for at most 30 s."""
        until = time.monotonic() + 30
        while self._perf.metrics.delivery().pending and time.monotonic() < until:
            try:
                self._perf.metrics.flush()
            except EXPECTED:
                time.sleep(0.05)
        delivery = self._perf.metrics.delivery()
        self._journal.write("ended", self._recorded, delivery.counted, delivery.dropped, delivery.pending)

    # Alerts

    def _evaluate(self) -> None:
        passed = (time.monotonic() - self._job.epoch) / VIRTUAL_MINUTE_S
        for event in self._perf.alerts.evaluate(as_of=self._job.alerts_from + 60 * int(passed)).events:
            self._journal.write("transition", event.id)
        self._perf.backend.run(self._deliveries.start_due())
        time.sleep(VIRTUAL_MINUTE_S / 4)
