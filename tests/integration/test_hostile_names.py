"""Names with code, patterns, braces or control characters are plain names for every service."""

from __future__ import annotations

import re

import pytest

from agentperf_redis import AgentInstance, AgentPerf
from tests.support.commandline import OK, Run
from tests.support.servers import Server

NAMES = ("]] redis.call('FLUSHALL')--", "'..redis.call('FLUSHALL')..'", "*?[a-z]", "a}b{c", "{}", "-x:state", "ü" * 200)
TEXT = "\r\nFLUSHALL\r\n\x00"
"""Added to the keys and values of caches, which may contain control characters."""
KEY = re.compile(r"[A-Za-z0-9_.-]+:(?:meta|resources|\{[^{}]+\}:.+)", re.DOTALL)
"""Every key begins with the namespace, and has one hash tag."""


def use(perf: AgentPerf, name: str) -> None:
    """Use each service with one name for everything."""
    metrics, lb = perf.metrics, perf.balancer()
    with metrics.track(name), metrics.span(name, name):
        metrics.record_llm(name, model=name, tokens_in=1)
    metrics.record_execution(name, 0.1, success=False, error_type=name)
    assert metrics.snapshots()[name].task_count == 2
    for cache in (perf.cache(name, max_size=3), perf.tiered_cache(name, hot_size=3)):
        key = name + TEXT
        assert cache.put(key, key, tags=[name])
        assert cache.get(key) == key
        cache.invalidate_tags(name)
        assert cache.get(key) is None
        assert cache.get_or_compute(key, lambda: 1) == 1
        assert list(cache.scan(match="*")) == [key]
    lb.register_instance(AgentInstance(name, name, max_capacity=1))
    with lb.lease(name, affinity=name) as lease:
        lease.check()
        assert lb.acquire(name) is None
    with perf.lock(name):
        assert perf.lock(name).locked()


@pytest.mark.thorough
@pytest.mark.servers("valkey", "redis82")
def test_names_are_neither_code_nor_patterns(own_server: Server, agentperf: Run, namespace: str) -> None:
    with own_server.client() as raw, AgentPerf(own_server.url, namespace=namespace) as perf:
        raw.set("canary", "alive")
        for name in NAMES:
            use(perf, name)
            for words in (("cache", "keys", "--kind", "lru"), ("lb", "events", "--once"), ("show",)):
                assert agentperf("--url", own_server.url, *words, "--", name).returncode == OK, words
        for command in ("status", "agents"):
            assert agentperf(command, "--url", own_server.url).returncode == OK
        assert raw.get("canary") == "alive"
        keys = set(raw.scan_iter(count=1000)) - {"canary"}
        assert [key for key in keys if not (key.startswith(f"{namespace}:") and KEY.fullmatch(key))] == []
        sent = {command.removeprefix("cmdstat_").upper() for command in raw.info("commandstats")}
    assert not sent & {"KEYS", "FLUSHALL", "FLUSHDB", "PSUBSCRIBE", "SUBSCRIBE"}
