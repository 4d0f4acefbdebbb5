"""A failover under Sentinel while processes use all services: the loss, against what the README says about it.

The test knows a moment up to which the replica has everything ("safe"), and kills the primary later. Of the work
acknowledged between the two, everything may be lost; of any other, nothing. Beside that, only BackendUnavailable is
raised, and no lease is granted beyond the capacity that the granting primary knows of.
"""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agentperf_redis import AgentInstance, AgentPerf
from agentperf_redis.errors import BackendUnavailable
from tests.support.sentinels import Group, sentinel_group
from tests.support.servers import wait_until
from tests.support.workers import Workers

pytestmark = [pytest.mark.thorough, pytest.mark.privileged, pytest.mark.servers("valkey")]

PROCESSES = 2
POOL, CAPACITY, TTL_S = "coder", 6, 4.0
DEADLINE_S = 1.0
"""Shorter than the outage, so that calls fail."""
LOCAL_LAG_S = 0.25
"""How much older than the last acknowledged write a local copy may be."""


@dataclass
class Work:
    """What a process did. All times are of `time.monotonic`, which all processes of a machine share.

    Attributes:
        writes: each acknowledged write: its number, when it was sent, and when it was acknowledged.
        reads: each read of the newest number of another process: the number, when it was sent and answered, and
            whether local copies were allowed.
        leases: each lease: when it was requested, when it was granted, and when its holder gave it up.
        counts: at several times: executions recorded, and executions that the server has confirmed.
        refusals: number of calls that raised BackendUnavailable.
        faults: tracebacks of all other errors.
    """

    writes: list[tuple[int, float, float]] = field(default_factory=list)
    reads: list[tuple[int, float, float, bool]] = field(default_factory=list)
    leases: list[tuple[float, float, float]] = field(default_factory=list)
    counts: list[tuple[float, int, int]] = field(default_factory=list)
    refusals: int = 0
    faults: list[str] = field(default_factory=list)


def work(url: str, namespace: str, number: int) -> Generator[None, None, Work]:
    """Use all services. After the answer, go on until all of them have worked again. Returns what was done."""
    with AgentPerf(url, namespace=namespace, deadline=DEADLINE_S) as perf:
        process = Process(perf, number)
        process.start()
        process.wait_for_all(time.monotonic())
        yield
        process.wait_for_all(time.monotonic())
        process.stop()
        return process.done


class Process:
    """The threads of a process."""

    def __init__(self, perf: AgentPerf, number: int) -> None:
        self.done = Work()
        self._number, self._metrics, self._balancer = number, perf.metrics, perf.balancer()
        self._cache = perf.cache("answers", max_size=100_000, local_size=100)
        self._chance = random.Random(number)
        self._stop = threading.Event()
        steps = [self._write, self._read, self._record, *[self._lease] * CAPACITY]
        self._progress = [0.0] * len(steps)
        self._threads = [threading.Thread(target=self._loop, args=each) for each in enumerate(steps)]
        self._last_write = self._recorded = 0

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def wait_for_all(self, since: float) -> None:
        """Wait until each thread has succeeded at a step begun after this time, or until one has failed."""
        wait_until(lambda: self.done.faults or min(self._progress) > since, "all services")

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        wait_until(self._delivered, "the delivery of all records")

    def _loop(self, index: int, step: Callable[[], None]) -> None:
        while not self._stop.is_set():
            begun = time.monotonic()
            try:
                step()
                self._progress[index] = begun
            except BackendUnavailable:
                self.done.refusals += 1
                time.sleep(0.02)
            except BaseException:  # noqa: BLE001  the test reports it
                self.done.faults.append(traceback.format_exc())
                return

    def _write(self) -> None:
        self._last_write += 1
        begun = time.monotonic()
        self._cache.put(f"{self._number}-{self._last_write}", self._last_write)
        self._cache.put(f"newest-{self._number}", self._last_write)
        self.done.writes.append((self._last_write, begun, time.monotonic()))
        time.sleep(0.002)

    def _read(self) -> None:
        local, begun = self._chance.random() < 0.5, time.monotonic()
        found = self._cache.get(f"newest-{(self._number + 1) % PROCESSES}", 0, fresh=not local)
        self.done.reads.append((found, begun, time.monotonic(), local))
        time.sleep(0.002)

    def _record(self) -> None:
        for _ in range(5):
            self._metrics.record_execution(f"agent-{self._number}", 0.01, success=True)
        self._recorded += 5
        try:
            self._metrics.flush()
        finally:
            self.done.counts.append((time.monotonic(), self._recorded, self._metrics.delivery().counted))
        time.sleep(0.01)

    def _lease(self) -> None:
        asked = time.monotonic()
        instance = self._balancer.acquire(POOL, wait=0.2, ttl=TTL_S)
        granted = time.monotonic()
        if instance is None:
            return
        self._stop.wait(self._chance.choice([0.01] * 15 + [3.0]))  # a few leases outlast the failover
        self.done.leases.append((asked, granted, time.monotonic()))
        self._balancer.release(instance)

    def _delivered(self) -> bool:
        try:
            self._metrics.flush()
        except BackendUnavailable:
            self.done.refusals += 1
        return not self._metrics.delivery().pending


@dataclass(frozen=True, slots=True)
class Moments:
    """When the failover happened.

    Attributes:
        safe: the replica had everything that was acknowledged before.
        killed: just before the primary was killed.
        dead: just after its end.
        replica_until: the replica was certainly not yet primary.
    """

    safe: float
    killed: float
    dead: float
    replica_until: float


@pytest.mark.parametrize("lag", [0.0, 0.5], ids=["replica-close-behind", "replica-half-a-second-behind"])
def test_failover_loses_only_what_was_not_replicated(
    lag: float,
    tmp_path: Path,
    workers: Workers,
    namespace: str,
    server_kind: str,
    record_property: Callable[[str, object], None],
) -> None:
    with sentinel_group(tmp_path) as group, AgentPerf(group.url, namespace=namespace, deadline=30.0) as perf:
        balancer, cache = perf.balancer(), perf.cache("answers", max_size=100_000)
        for each, capacity in ((POOL, CAPACITY), ("fixed", 4)):
            balancer.register_instance(AgentInstance(f"{each}-1", each, max_capacity=capacity))
        processes = [workers.start(work, group.url, namespace, number) for number in range(PROCESSES)]
        for process in processes:
            process.said()
        known = [balancer.acquire("fixed", ttl=60.0) for _ in range(2)]
        perf.metrics.record_execution("tester", 0.01, success=True)
        perf.metrics.flush()

        safe = group.replicated()
        unknown = []
        if lag:
            group.link.hold()
            unknown = [balancer.acquire("fixed", ttl=60.0) for _ in range(2)]
            assert None not in unknown
            assert balancer.acquire("fixed") is None
            cache.put("late", 1)
            perf.metrics.record_execution("tester", 0.01, success=True)
            perf.metrics.flush()
            time.sleep(lag)
        moments = fail_over(group, safe)

        # The replica did not know the leases in `unknown`, so their capacity is leased a second time. The leases in
        # `known` stay valid.
        again = [balancer.acquire("fixed", ttl=60.0) for _ in range(3)]
        assert [each is not None for each in again] == [True, True, False]
        assert [balancer.release(each) for each in known] == [True, True]
        assert [balancer.release(each) for each in unknown] == [False] * len(unknown)
        assert cache.get("late", fresh=True) is None
        assert perf.metrics.snapshots()["tester"].task_count == 1

        for process in processes:
            process.answer()
        done = [process.result() for process in processes]
        assert [fault for each in done for fault in each.faults] == []
        lost_writes = sum(check_writes(perf, number, each, moments) for number, each in enumerate(done))
        for number, each in enumerate(done):
            check_reads(each, done[(number + 1) % PROCESSES], moments)
        lost_counts = sum(check_counts(perf, number, each, moments) for number, each in enumerate(done))
        beyond = check_leases([lease for each in done for lease in each.leases], moments)
        wait_until(lambda: balancer.acquire_many(POOL, CAPACITY, all_or_none=True), "all capacity, after the TTL")
    findings = {
        "milliseconds between the last replicated moment and the kill": round((moments.dead - safe) * 1000),
        "acknowledged writes": sum(len(each.writes) for each in done),
        "of these, lost": lost_writes,
        "executions": sum(each.counts[-1][1] for each in done),
        "of these, lost after confirmation": lost_counts,
        "leases": sum(len(each.leases) for each in done),
        "leases at a time beyond the capacity": beyond,
        "seconds until the next acknowledged write": round(back(done, moments) - moments.killed, 2),
        "calls that raised BackendUnavailable": sum(each.refusals for each in done),
    }
    for name, value in findings.items():
        record_property(name, value)
        print(f"{name}: {value}")


def fail_over(group: Group, safe: float) -> Moments:
    """Kill the primary, with all that the link keeps back, and wait until the replica is primary."""
    group.allow_failover()
    killed = time.monotonic()
    group.primary.kill()
    dead = time.monotonic()
    group.link.close()
    replica_until = dead

    def promoted() -> bool:
        nonlocal replica_until
        begun = time.monotonic()
        role = group.role()
        if role == "slave":
            replica_until = begun
        return role == "master"

    wait_until(promoted, "the new primary")
    return Moments(safe, killed, dead, replica_until)


def survives(begun: float, acknowledged: float, moments: Moments) -> bool:
    """Return whether a request must not be lost: it was replicated, or the new primary answered it."""
    return acknowledged < moments.safe or begun > moments.dead


def back(done: Iterable[Work], moments: Moments) -> float:
    """Return when the first write after the failover was acknowledged."""
    return min(acknowledged for each in done for _, begun, acknowledged in each.writes if begun > moments.dead)


def check_writes(perf: AgentPerf, number: int, done: Work, moments: Moments) -> int:
    """Check that the replicated writes are there. Return how many others are not."""
    cache = perf.cache("answers")
    found = cache.get_many([f"{number}-{write}" for write, _, _ in done.writes], fresh=True)
    lost = [each for each in done.writes if f"{number}-{each[0]}" not in found]
    assert [each for each in lost if survives(each[1], each[2], moments)] == []
    assert cache.get(f"newest-{number}", fresh=True) == done.writes[-1][0]
    return len(lost)


def check_reads(reader: Work, writer: Work, moments: Moments) -> None:
    """Check that no read returned a number older than the newest one that it had to know."""
    for found, begun, answered, local in reader.reads:
        known_at = begun - LOCAL_LAG_S * local
        before = answered < moments.killed
        newest = max(
            (
                write
                for write, sent, acknowledged in writer.writes
                if acknowledged < known_at and (before or survives(sent, acknowledged, moments))
            ),
            default=0,
        )
        assert found >= newest, (begun - moments.dead, local)


def check_counts(perf: AgentPerf, number: int, done: Work, moments: Moments) -> int:
    """Check that only executions confirmed after `safe` are lost, and that none counts twice. Return the loss."""
    lost = done.counts[-1][1] - perf.metrics.snapshots()[f"agent-{number}"].task_count
    confirmed = max((counted for at, _, counted in done.counts if at < moments.safe), default=0)
    recorded = next(recorded for at, recorded, _ in done.counts if at > moments.dead)
    assert 0 <= lost <= recorded - confirmed
    return lost


def check_leases(leases: list[tuple[float, float, float]], moments: Moments) -> int:
    """Check that each primary kept the capacity that it knew of. Return how many leases at a time were beyond it."""
    held = [(asked, granted, min(given_up, asked + TTL_S)) for asked, granted, given_up in leases]
    by_old = [each for each in held if each[1] < moments.replica_until]
    by_new = [each for each in held if each[0] > moments.dead]
    replicated = [each for each in by_old if each[1] < moments.safe]
    assert most_at_a_time(by_old) <= CAPACITY
    assert most_at_a_time(by_new + replicated) <= CAPACITY
    beyond = max(0, most_at_a_time(held) - CAPACITY)
    unknown = [each for each in held if each not in by_new + replicated and each[2] > moments.dead]
    assert beyond <= len(unknown)
    return beyond


def most_at_a_time(leases: Iterable[tuple[float, float, float]]) -> int:
    """Return how many leases were held at the same time, at most."""
    changes = sorted([(granted, 1) for _, granted, _ in leases] + [(end, -1) for _, _, end in leases])
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most
