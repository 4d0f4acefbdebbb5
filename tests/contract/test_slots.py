"""No script uses a key outside its slot.

On a Cluster, the server rejects such an access if the script has a shebang. The conftest adds a shebang to all scripts.
Other tests run on a Cluster too, but this test ensures that every script has run on a Cluster.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import pytest

from agentperf_redis import AgentInstance, AgentPerf, LoadBalancingStrategy, PoolSettings, history
from agentperf_redis import keys as names
from agentperf_redis.alerts.notify import deliver_all
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import commands as balancer_commands
from agentperf_redis.balancer import history as balancer_history
from agentperf_redis.cache import commands as cache_commands
from agentperf_redis.cache import history as cache_history
from agentperf_redis.cache.flows.resharding import Resharding
from agentperf_redis.cache.operator import find_all
from agentperf_redis.command import Command
from agentperf_redis.errors import BackendUnavailable, ScriptFailed
from agentperf_redis.presence import presence_of
from agentperf_redis.script import Script
from tests.support import headers
from tests.support.servers import Server


@pytest.fixture
def ran(_scripts_are_stricter: None, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the scripts that have been sent so far."""
    sent: set[str] = set()
    plain = Script.__dict__["sha"].fget

    def sha(script: Script) -> str:
        sent.add(script.name)
        return str(plain(script))

    monkeypatch.setattr(Script, "sha", property(sha))
    return sent


@pytest.mark.servers("cluster")
def test_no_script_leaves_its_slot(perf: AgentPerf, backend: Backend, ran: set[str], namespace: str) -> None:
    for strategy in LoadBalancingStrategy:
        agent = f"planner {strategy.value}"
        balancer = perf.balancer(strategy)
        for id_ in ("p1", "p2"):
            instance = AgentInstance(id=id_, agent_type=agent, max_capacity=2, labels=frozenset({"gpu"}))
            balancer.register_instance(instance, heartbeat_ttl=60)
        balancer.update_instance(agent, "p1", max_capacity=3)
        balancer.configure(agent, PoolSettings(slow_start=1.0))
        pool = balancer_commands.Pool.of(namespace, agent)
        claimed = backend.run(balancer_commands.claim_checks(pool, 1000, 8))
        results = [(each.id, True) for each in claimed.instances]
        assert backend.run(balancer_commands.report_checks(pool, claimed.at_ms, [*results, ("p9", False)])) == ["p9"]
        balancer.heartbeat(agent, "p1", "p2")
        leased = balancer.acquire(agent, require={"gpu"})
        assert leased is not None
        assert leased.lease is not None
        assert balancer.release_many(balancer.acquire_many(agent, 2, all_or_none=True)) == [True, True]
        assert balancer.select_instance(agent) is not None
        assert balancer.status(agent)
        assert balancer.acquire(agent, wait=0.01, require={"no instance has this"}) is None
        assert balancer.leases(agent).leases
        assert balancer.repair(agent).wrong == 0
        assert not backend.run(balancer_commands.renew(pool, [leased.lease.token], 60_000))
        leased.lease.extend(60)
        assert balancer.release(leased)
        assert balancer.cool_down(agent, "p1", 1)
        assert balancer.remove_instance(agent, "p2")
    perf.balancer().configure_pool("divided", shards=3)
    for number in range(6):
        perf.balancer().register_instance(AgentInstance(f"p{number}", "divided", max_capacity=1))
    held = perf.balancer().acquire_many("divided", 6)
    shard = balancer_commands.Pool.of(namespace, "divided", 0, 3)
    assert not backend.run(balancer_commands.watch(shard, frozenset(), 1000))
    assert perf.balancer().release_many(held) == [True] * 6
    assert perf.balancer().delete_pool("divided")
    perf.balancer().register_instance(AgentInstance("p1", "deleted", labels=frozenset({"gpu"})))
    assert perf.balancer().delete_pool("deleted")

    for lock in (perf.lock("one", timeout=60), perf.semaphore("four", 4, timeout=60)):
        with lock:
            assert lock.owned()
            assert lock.extend(60)
            assert perf.lock("one").acquire(blocking_timeout=0.01) is (lock.name == "four")

    docs = perf.tiered_cache("docs", hot_size=1, warm_size=1, cold_size=1)
    lru = perf.cache("lru", max_size=2, default_ttl=60)
    for cache in (docs, lru, perf.cache("strict", max_size=2, strict=True)):
        for number in range(4):
            cache.put(f"key {number}", number, tags=("even", "odd")[number % 2 : number % 2 + 1])
        assert cache.get("key 3") == 3
        cache.flush()
        assert cache.get_or_compute("computed", lambda: "value") == "value"
        assert cache.add("counter", 1, ttl=60)
        assert cache.incr("counter") == 2
        assert cache.touch("counter", 50)
        assert cache.ttl("counter") is not None
        assert cache.pop("counter") == 2
        cache.delete("key 3")
        cache.invalidate_tags("even")
        cache.clear()
        cache.sweep()
    divided = perf.cache("divided", max_size=1000)
    divided.put_many({"a": 1, "b": 2})
    change = Resharding(backend, "cache", "divided", 2)
    state = backend.run(change.begin())
    assert divided.get("a") == 1
    while state is not None and not state.done:
        state = backend.run(change.step())
    assert divided.get("b") == 2
    where = names.cache(namespace, "cache", "lru")
    claim = cache_commands.claim(where, "claimed", "token", lease_ms=60_000, ignore="", awaited="")
    assert isinstance(backend.run(claim), cache_commands.Lead)
    assert backend.run(cache_commands.renew(where, "claimed", "token", 60_000))
    backend.run(cache_commands.cancel_puts(where, ("request",), 0))
    assert backend.run(cache_commands.release(where, "claimed", "token", error=None, error_ms=0, origin="test"))

    for number in range(4):
        perf.metrics.record_execution(f"agent {number}", 0.25, number > 0, None if number else "ValueError")
    assert len(perf.metrics.get_all_metrics(window="5m")) == 4
    assert len(perf.metrics.series(window="5m")) == 4
    for key in (names.pool(namespace, "planner round_robin").history, where.history):
        assert backend.run(history.read_history(key)).now_ms > 0
    assert backend.run(balancer_history.sample(balancer_commands.Pool.of(namespace, "planner round_robin"))) > 0
    assert backend.run(cache_history.sample(where)) > 0
    for existing in backend.run(find_all(backend)):
        backend.run(existing.drop())
    assert perf.metrics.forget("agent 0")
    assert len(perf.metrics.workers()) == 1
    presence_of(perf.backend).leave()

    rules = '[[alert]]\nname = "a"\nagents = "*"\nwhen = "tasks >= 1"\nnotify = ["ops"]\n[notify.ops]\ncommand = ["/bin/true"]'
    perf.alerts.deploy(text=rules)
    assert perf.alerts.evaluate(as_of=time.time() + 120).events
    assert deliver_all(perf.alerts._service, 60.0)
    assert perf.alerts.silence("a", "1h")

    assert ran == set(headers.scripts())


@pytest.mark.privileged
@pytest.mark.servers("cluster")
def test_script_that_leaves_its_slot_fails(server: Server, connect: Callable[..., Backend], ran: set[str]) -> None:
    """The check of `test_no_script_leaves_its_slot` detects a script that leaves its slot."""

    class Stray(Script):
        source = "#!lua\nreturn {redis.call('GET', KEYS[1]), redis.call('GET', 'elsewhere')}"
        sha = hashlib.sha1(source.encode()).hexdigest()

    # The three keys belong to two nodes. Only one of these nodes owns the slot of `elsewhere`. The node without this
    # slot returns an error that can also mean that a key is being moved. So the client retries until the deadline.
    backend = connect(server.url, deadline=2.0)
    for number in range(3):
        with pytest.raises((ScriptFailed, BackendUnavailable), match=r"do not hash to the same slot|non local"):
            backend.run(Command(Stray("test/stray"), (f"{{{number}}}:key",), (), lambda reply: reply))
