"""Processes take units of a semaphore as fast as they can, and some are killed. The limit holds, and no unit is lost."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from agentperf_redis import AgentPerf, keys
from tests.support.servers import Raw, Server
from tests.support.workers import Workers

pytestmark = pytest.mark.thorough

LIMIT, PROCESSES, SECONDS, TTL = 2, 6, 6.0, 0.5


def use(url: str, namespace: str, seed: int) -> list[tuple[int, float, float]]:
    """Return the fencing token, the start and the end of each turn. All processes share the clock time.monotonic."""
    turns = []
    chance = random.Random(seed)
    with AgentPerf(url, namespace=namespace) as perf:
        semaphore = perf.semaphore("x", LIMIT, ttl=TTL)
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            if not semaphore.acquire(blocking_timeout=chance.choice((0.0, 0.01, 60.0))):
                continue
            begin, fence = time.monotonic(), semaphore.fence
            time.sleep(chance.choice((0.0, 0.001, 0.01)))
            end = time.monotonic()
            # After a stall longer than the TTL, another process may hold the unit. So the recorded turn ends at a time
            # at which this process certainly still held the unit.
            end = min(end, begin + semaphore.remaining) if semaphore.remaining else begin
            try:
                semaphore.release()
            except Exception:  # noqa: BLE001  a lease lost by a stall of the machine is no fault
                continue
            assert fence is not None
            turns.append((fence, begin, end))
    return turns


def hold(url: str, namespace: str) -> Any:
    with AgentPerf(url, namespace=namespace) as perf:
        semaphore = perf.semaphore("x", LIMIT, ttl=TTL)
        while not semaphore.acquire(blocking_timeout=60):
            pass
        yield semaphore.fence


def test_limit_holds_while_processes_are_killed(server: Server, raw: Raw, workers: Workers, namespace: str) -> None:
    users = [workers.start(use, server.url, namespace, seed) for seed in range(PROCESSES)]
    killed = []
    for _ in range(4):
        worker = workers.start(hold, server.url, namespace)
        killed.append(worker.said())
        worker.kill()
    turns = [each for user in users for each in user.result()]
    assert len(turns) > 50
    fences = [fence for fence, _, _ in turns] + killed
    assert len(set(fences)) == len(fences)
    events = sorted([(begin, 1) for _, begin, _ in turns] + [(end, -1) for _, _, end in turns])
    held = peak = 0
    for _, change in events:
        held += change
        peak = max(peak, held)
    assert peak <= LIMIT
    place = keys.lock(namespace, "semaphore", "x")
    assert all(0 < raw.pttl(key) <= 60_000 for key in raw.scan_iter(f"{place.tag}:*"))
    with AgentPerf(server.url, namespace=namespace) as perf:
        last = [perf.semaphore("x", LIMIT) for _ in range(LIMIT)]
        assert all(each.acquire(blocking_timeout=60) for each in last)
        for each in last:
            each.release()
