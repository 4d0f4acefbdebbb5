"""A server with an evicting policy drops single keys of a pool. The pool works again after the next registration."""

from __future__ import annotations

import pytest

from agentperf_redis import AgentInstance, AgentPerf
from agentperf_redis.errors import LeaseLost
from tests.support.servers import Raw

CAPACITY = 3


@pytest.mark.parametrize(
    "strategy", ["least_loaded", pytest.param("consistent_hash", marks=pytest.mark.thorough), "weighted"]
)
def test_pool_survives_the_eviction_of_any_key(perf: AgentPerf, raw: Raw, namespace: str, strategy: str) -> None:
    lb = perf.balancer(strategy)

    def filled(pool: str) -> list[AgentInstance]:
        lb.register_instance(AgentInstance("i0", pool, max_capacity=CAPACITY, labels=frozenset({"gpu"})))
        held = [lb.acquire(pool, affinity="user") for _ in range(CAPACITY - 1)]
        return [each for each in held if each is not None]

    first = filled("first")
    parts = sorted(key.rpartition("}:")[2] for key in raw.keys(f"{namespace}:{{lb:first}}:*"))
    assert {"state", "ids", "due"} < set(parts)
    assert all(lb.release(each) for each in first)
    for part in parts:
        pool = f"without-{part.replace('@', '-')}"
        held = filled(pool)
        assert raw.unlink(f"{namespace}:{{lb:{pool}}}:{part}") == 1
        lb.register_instance(AgentInstance("i0", pool, max_capacity=CAPACITY, labels=frozenset({"gpu"})))
        known = [lb.release(each) for each in held]
        assert known == [part != "state"] * len(held), (part, "only with the records, the leases are lost")
        again = [lb.acquire(pool, affinity="user", require=["gpu"]) for _ in range(CAPACITY + 1)]
        assert [each is not None for each in again] == [True] * CAPACITY + [False], part
        assert [each.instance.id for status in lb.status(pool) for each in status.instances] == ["i0"]
        assert [lb.release(each) for each in again[:CAPACITY]] == [True] * CAPACITY, part


def test_lease_of_an_evicted_record_is_lost(perf: AgentPerf, raw: Raw, namespace: str) -> None:
    lb = perf.balancer()
    lb.register_instance(AgentInstance("i0", "coder", max_capacity=1))
    held = lb.acquire("coder")
    assert held is not None
    assert held.lease is not None
    assert raw.unlink(f"{namespace}:{{lb:coder}}:state") == 1
    with pytest.raises(LeaseLost):
        held.lease.extend(60)
    successor = lb.acquire("coder")
    assert successor is not None, "the process has registered its instance again"
    assert successor.lease is not None
    assert successor.lease.fence > held.lease.fence
    assert lb.release(held) is False
    assert lb.release(successor) is True
