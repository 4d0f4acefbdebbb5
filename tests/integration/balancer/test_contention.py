"""Many processes contend for few instances: capacity is never exceeded, and nothing is left behind."""

from __future__ import annotations

import time

import pytest

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import AgentInstance, LoadBalancer, commands
from tests.support import records
from tests.support.servers import Raw, Server
from tests.support.workers import Workers

PROCESSES, INSTANCES, CAPACITY = 16, 2, 3
ROUNDS = 60
HELD_S = 0.01  # much longer than a call takes, so that many leases overlap even with few cores

# These replacements remove all capacity checks: full instances stay in the index, and no script compares the load of an
# instance with its limit.
MUTATIONS = (
    ("  if load < limit then\n    if score", "  if true then\n    if score"),
    ("    if load >= limit then\n", "    if false then\n"),
    ("  if r and r.load < r.limit then\n    local fence", "  if r then\n    local fence"),
)


def contend(url: str, namespace: str, mutant: bool) -> tuple[int, int]:
    """Acquire and release, holding each lease for HELD_S; return the counts of grants and refusals."""
    if mutant:
        remove_capacity_check()
    backend = Backend(url, namespace=namespace, deadline=30.0)
    balancer = LoadBalancer(backend=backend)
    granted = refused = 0
    for _ in range(ROUNDS):
        instance = balancer.acquire("planner")
        if instance is None:
            refused += 1
            continue
        granted += 1
        time.sleep(HELD_S)
        assert balancer.release(instance)
    backend.close()
    return granted, refused


def remove_capacity_check() -> None:
    for script in (commands.ACQUIRE, commands.RELEASE, commands.REGISTER):
        source = script.source
        for sound, broken in MUTATIONS:
            source = source.replace(sound, broken)
        assert source != script.source
        script._source, script._sha = source, None


def peaks(raw: Raw, namespace: str) -> dict[str, int]:
    """Return the highest load of each instance, as recorded by the scripts."""
    found = records.instances(raw.hgetall(keys.pool(namespace, "planner").state))
    return {name: int(record["peak"]) for name, record in found.items()}


def contention(server: Server, namespace: str, workers: Workers, *, mutant: bool) -> list[tuple[int, int]]:
    backend = Backend(server.url, namespace=namespace)
    balancer = LoadBalancer(backend=backend)
    for number in range(INSTANCES):
        balancer.register_instance(AgentInstance(f"p{number}", "planner", max_capacity=CAPACITY))
    backend.close()
    args = [(server.url, namespace, mutant)] * PROCESSES
    return workers.run(contend, args)


@pytest.mark.thorough
def test_contending_processes_never_exceed_capacity(server: Server, raw: Raw, namespace: str, workers: Workers) -> None:
    results = contention(server, namespace, workers, mutant=False)

    granted, refused = (sum(column) for column in zip(*results, strict=True))
    assert granted + refused == PROCESSES * ROUNDS
    assert refused >= 100
    assert peaks(raw, namespace) == {f"p{number}": CAPACITY for number in range(INSTANCES)}
    pool = keys.pool(namespace, "planner")
    assert raw.zcard(pool.due) == 0
    assert not [field for field in raw.hkeys(pool.state) if field.startswith("@")]
    assert raw.hget(pool.state, "#load") == "0"
    assert raw.hget(pool.state, "#picks") == str(granted)


@pytest.mark.thorough
def test_contention_detects_a_missing_capacity_check(
    server: Server, raw: Raw, namespace: str, workers: Workers
) -> None:
    contention(server, namespace, workers, mutant=True)

    assert max(peaks(raw, namespace).values()) > CAPACITY
