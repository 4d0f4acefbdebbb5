"""Conservation: despite faults, the counts on the server equal the records of many processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterable
from typing import Any

import pytest

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.errors import BackendUnavailable, CorruptState
from agentperf_redis.metrics import commands
from agentperf_redis.metrics.client import MetricsCollector
from agentperf_redis.metrics.histogram import bucket_index
from agentperf_redis.metrics.model import Delivery
from tests.support.mutants import without_sequence_check
from tests.support.proxy import Proxy
from tests.support.servers import Raw, Server, wait_until
from tests.support.workers import Workers

AGENTS = [f"agent-{number}" for number in range(20)]
Expected = dict[str, Counter[str]]


def record_some(collector: MetricsCollector, source: random.Random, count: int) -> Expected:
    """Record `count` random executions, and return the expected counters of each agent."""
    expected: Expected = {agent: Counter() for agent in AGENTS}
    for _ in range(count):
        agent = source.choice(AGENTS)
        us = round(source.lognormvariate(-2, 1.5) * 1e6)
        sums = expected[agent]
        sums["n"] += 1
        sums["sum_us"] += us
        sums[f"h:{bucket_index(us)}" if us else "h:zero"] += 1
        if source.random() < 0.9:
            sums["ok"] += 1
            collector.record_execution(agent, us / 1e6, True)
        else:
            error = source.choice(("TimeoutError", "ValueError", "KeyError"))
            sums["err"] += 1
            sums[f"err:{error}"] += 1
            collector.record_execution(agent, us / 1e6, False, error)
    return expected


def added(parts: Iterable[Expected]) -> Expected:
    total: Expected = {agent: Counter() for agent in AGENTS}
    for part in parts:
        for agent, sums in part.items():
            total[agent].update(sums)
    return total


def record_rounds(collector: MetricsCollector, seed: int, count: int) -> Expected:
    """Record in four rounds, with flushes and a fork. The child records too. Finally, flush until all is counted.

    Returns the expected counters of each agent.
    """
    source = random.Random(seed)
    parts = []
    for turn in range(4):
        parts.append(record_some(collector, source, count // 5))
        if turn == 1:
            pid = os.fork()
            child_source = random.Random(-seed - 1)
            if pid == 0:
                try:
                    record_some(collector, child_source, count // 5)
                    deliver_all(collector)
                    os._exit(0 if collector.delivery().pending == 0 else 1)
                finally:
                    os._exit(2)
            parts.append(record_some(_Nowhere(), child_source, count // 5))
            assert os.waitpid(pid, 0)[1] == 0
        if turn == 2:
            with contextlib.suppress(BackendUnavailable):
                collector.flush(timeout=0.01)  # after this short timeout, the flush may still be running
    deliver_all(collector)
    return added(parts)


def work(url: str, namespace: str, seed: int, count: int, mutant: bool = False) -> tuple[Expected, Delivery]:
    if mutant:
        commands.FLUSH = without_sequence_check()
    backend = Backend(url, namespace=namespace, deadline=2.0)
    collector = MetricsCollector(backend=backend)
    expected = record_rounds(collector, seed, count)
    backend.close()
    return expected, collector.delivery()


SPOILED, SPOILED_COUNT, LATE_COUNT = "spoiled", 30, 100


def work_until_cut_off(
    url: str, namespace: str, seed: int, count: int
) -> Generator[tuple[Expected, Delivery], None, None]:
    """Record like `work`, and also for an agent whose records cannot be counted. Then record during an outage.

    The flush of these late records must fail. They are counted when the server is reachable again.
    """
    collector = MetricsCollector(backend=Backend(url, namespace=namespace, deadline=2.0))
    for _ in range(SPOILED_COUNT):
        collector.record_execution(SPOILED, 0.1, True)
    expected = record_rounds(collector, seed, count)
    yield expected, collector.delivery()
    record_late(collector)
    with pytest.raises(BackendUnavailable):
        collector.flush()
    yield expected, collector.delivery()
    deliver_all(collector)
    yield added([expected, record_late(_Nowhere())]), collector.delivery()


def record_late(collector: MetricsCollector) -> Expected:
    """Record executions of the agents in turn, and return the expected increase of their counters."""
    sums = Counter({"n": 1, "ok": 1, "sum_us": 100_000, f"h:{bucket_index(100_000)}": 1})
    agents = [AGENTS[number % len(AGENTS)] for number in range(LATE_COUNT)]
    for agent in agents:
        collector.record_execution(agent, 0.1, True)
    return added({agent: sums} for agent in agents)


def deliver_all(collector: MetricsCollector) -> None:
    """Flush until all records are counted, for at most 30 s."""
    deadline = time.monotonic() + 30
    while collector.delivery().pending and time.monotonic() < deadline:
        with contextlib.suppress(BackendUnavailable, CorruptState):
            collector.flush()


class _Nowhere(MetricsCollector):
    """A collector that discards records. The parent uses it to compute the counters expected of the child."""

    def __init__(self) -> None:
        pass

    def record_execution(self, *_: Any) -> None:
        pass


def assert_conserved(expected: Expected, raw: Raw, namespace: str, url: str) -> None:
    for agent in AGENTS:
        stored = raw.hgetall(keys.metrics_total(namespace, keys.metrics_shard(agent), agent))
        sums = {
            name: int(value)
            for name, value in stored.items()
            if name not in ("min_us", "max_us", "first_ms", "last_ms", "types")
        }
        assert sums == dict(expected[agent]), agent
        assert sum(count for name, count in sums.items() if name.startswith("h:")) == sums["n"]
        assert sum(count for name, count in sums.items() if name.startswith("err:")) == sums["err"]
    backend = Backend(url, namespace=namespace)
    try:
        collector = MetricsCollector(backend=backend)
        for window in (None, "10m", "1h", "1d"):
            read = collector.snapshots(window=window)
            assert {agent: each.task_count for agent, each in read.items()} == {
                agent: sums["n"] for agent, sums in expected.items()
            }
            for agent, each in read.items():
                histogram = {int(name[2:]): count for name, count in expected[agent].items() if name[:2] == "h:"}
                assert each.buckets == histogram
                assert (each.failure_count, each.success_count) == (expected[agent]["err"], expected[agent]["ok"])
    finally:
        backend.close()


def test_counts_equal_the_records_of_all_processes(server: Server, namespace: str, raw: Raw, workers: Workers) -> None:
    results = workers.run(work, [(server.url, namespace, seed, 2_000) for seed in range(4)])
    for _, delivery in results:
        assert delivery.recorded == delivery.counted == 1_600, "the child counts its own records"
        assert (delivery.pending, delivery.dropped, delivery.uncertain) == (0, 0, 0)
    assert_conserved(added(expected for expected, _ in results), raw, namespace, server.url)


class Trouble:
    """Injects faults with a proxy: lost and incomplete replies, requests that never arrive, cut connections.

    The next fault comes after a number of flushes, not after a time. So even on a slow machine, some flushes succeed
    between two faults.
    """

    def __init__(self, proxy: Proxy, seed: int) -> None:
        self._proxy = proxy
        self._source = random.Random(seed)
        self._stop = threading.Event()
        self.happened: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            kind = self._source.choice(("reset_after_reply", "half_reply", "reset_before_request"))
            fault = getattr(self._proxy, kind)(only=commands.FLUSH, nth=self._source.randint(*FLUSHES_BETWEEN_FAULTS))
            while not self._stop.is_set() and not fault.caught.wait(0.01):
                pass
            self.happened[kind] += fault.caught.is_set()
            if self._source.random() < 0.25 and not self._stop.is_set():
                self._proxy.cut()
                self.happened["cut"] += 1

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._proxy.clear()


FLUSHES_BETWEEN_FAULTS = (5, 40)


@pytest.mark.thorough
def test_eight_processes_count_exactly_over_a_broken_network(
    server: Server, proxy: Proxy, namespace: str, raw: Raw, workers: Workers
) -> None:
    """Recorded = counted + pending + dropped, and Redis holds the counted records. Each of these numbers is above zero.

    At the end, the server is unreachable and each flush fails. A worker that is killed at that time loses its pending
    records and nothing else. The pending records of the other workers are counted later.
    """
    raw.set(keys.metrics_total(namespace, keys.metrics_shard(SPOILED), SPOILED), "foreign data")
    trouble = Trouble(proxy, 1)
    crew = [workers.start(work_until_cut_off, proxy.url, namespace, seed, 20_000) for seed in range(8)]
    try:
        done = [worker.said() for worker in crew]
    finally:
        trouble.stop()
    assert trouble.happened["reset_after_reply"] + trouble.happened["half_reply"] >= 5, trouble.happened
    own = 16_000  # of 20,000 records; the forked child makes the other 4,000
    for _, delivery in done:
        assert (delivery.recorded, delivery.counted) == (own + SPOILED_COUNT, own)
        assert (delivery.pending, delivery.dropped, delivery.uncertain) == (0, SPOILED_COUNT, 0)
    expected = added(each for each, _ in done)
    assert_conserved(expected, raw, namespace, server.url)

    proxy.close_port()
    for worker in crew:
        worker.answer()
    for _, delivery in (worker.said() for worker in crew):
        assert (delivery.recorded, delivery.counted) == (own + SPOILED_COUNT + LATE_COUNT, own)
        assert (delivery.pending, delivery.dropped, delivery.uncertain) == (LATE_COUNT, SPOILED_COUNT, 0)
    killed, living = crew[:4], crew[4:]
    for worker in killed:
        worker.kill()
    assert_conserved(expected, raw, namespace, server.url)
    proxy.open_port()
    for worker in living:
        worker.answer()
    ended = [worker.said() for worker in living]
    for _, delivery in ended:
        assert (delivery.recorded, delivery.counted) == (own + SPOILED_COUNT + LATE_COUNT, own + LATE_COUNT)
        assert (delivery.pending, delivery.dropped, delivery.uncertain) == (0, SPOILED_COUNT, 0)
    expected = added([*(each for each, _ in done[:4]), *(each for each, _ in ended)])
    assert_conserved(expected, raw, namespace, server.url)


def test_missing_sequence_check_breaks_conservation(
    server: Server, proxy: Proxy, namespace: str, raw: Raw, workers: Workers
) -> None:
    """The test above fails if the script does not check sequence numbers."""
    mutant = without_sequence_check()
    raw.script_load(mutant.source)
    lost = proxy.reset_after_reply(only=mutant, nth=2)
    results = workers.run(work, [(proxy.url, namespace, seed, 500, True) for seed in range(2)])
    lost.wait()
    with pytest.raises(AssertionError, match="agent-"):
        assert_conserved(added(expected for expected, _ in results), raw, namespace, server.url)


def record_until_killed(url: str, namespace: str) -> Generator[tuple[int, int], None, None]:
    """After every 100 records, yield the numbers of recorded and of confirmed executions."""
    collector = MetricsCollector(backend=Backend(url, namespace=namespace))
    recorded = 0
    while True:
        for _ in range(100):
            collector.record_execution("research", 0.1, True)
        recorded += 100
        if recorded % 1000 == 0:
            collector.flush()
        yield recorded, collector.delivery().counted


def test_killed_process_loses_only_pending_records(server: Server, namespace: str, raw: Raw, workers: Workers) -> None:
    worker = workers.start(record_until_killed, server.url, namespace)
    recorded = counted = 0
    for _ in range(25):
        recorded, counted = worker.said()
        worker.answer()
    recorded, counted = worker.said()  # the worker now waits for the test's answer, which never comes
    wait_until(lambda: stored_count(raw, namespace) >= counted, "the confirmed records")
    worker.kill()
    assert counted <= stored_count(raw, namespace) <= recorded


def stored_count(raw: Raw, namespace: str) -> int:
    return int(raw.hget(keys.metrics_total(namespace, keys.metrics_shard("research"), "research"), "n") or 0)


def end_without_closing(url: str, namespace: str) -> None:
    MetricsCollector(backend=Backend(url, namespace=namespace)).record_execution("research", 0.1, True)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing_worker_flushes_at_exit(server: Server, namespace: str, raw: Raw, method: str) -> None:
    process: Any = multiprocessing.get_context(method).Process(  # type: ignore[attr-defined]  # the base class lacks it
        target=end_without_closing, args=(server.url, namespace)
    )
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert stored_count(raw, namespace) == 1


def test_program_flushes_at_exit(server: Server, namespace: str, raw: Raw) -> None:
    import subprocess
    import sys

    program = (
        "from agentperf_redis import MetricsCollector;"
        "from agentperf_redis.backend import Backend;"
        f"collector = MetricsCollector(backend=Backend({server.url!r}, namespace={namespace!r}));"
        "collector.record_execution('research', 0.1, True)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert stored_count(raw, namespace) == 1
