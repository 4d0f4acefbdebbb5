"""`agentperf inspect` explains every key that the library writes, and reports any other key as unknown."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from agentperf_redis import AgentInstance, AgentPerf, PoolSettings, keys
from tests.support.commandline import NOT_FOUND, OK, Run, document, has_line, shown
from tests.support.servers import Raw, wait_until


@pytest.fixture
def used(perf: AgentPerf, raw: Raw, namespace: str) -> Iterator[AgentPerf]:
    """A namespace in which each service has written many kinds of keys."""
    metrics, lb = perf.metrics, perf.balancer()
    with metrics.track("planner"), metrics.span("planner", "think"):
        metrics.record_llm("planner", model="m/1", tokens_in=3, tokens_out=1, cost=0.25)
    metrics.record_execution("planner", 0.1, success=False, error_type="KeyError")
    metrics.record_stream("planner", 12, 0.5, 0.01)
    metrics.record_cancellation("planner", 0.5)
    metrics.flush()
    for cache in (
        perf.cache("answers", max_size=2, default_ttl=60),
        perf.tiered_cache("docs", hot_size=1, warm_size=1, cold_size=4),
    ):
        for number in range(12):
            cache.put(f"key {number}", number, tags=["a/b"])
        cache.get("key 11")
        cache.flush()
        cache.invalidate_tags("a/b")
    perf.cache("cleared").put("key", 1)
    perf.cache("cleared").clear()
    lb.configure("coder", PoolSettings(eject_after=1, base_ejection_time=250, slow_start=60.0))
    for number in range(2):
        lb.register_instance(
            AgentInstance(f"p{number}", "coder", max_capacity=1, labels=frozenset({"gpu"})),
            heartbeat_ttl=600,
            requests_per_minute=60_000,
        )
    first = lb.acquire("coder")
    lb.release(lb.acquire("coder"), outcome="error")
    waiting = threading.Thread(target=lambda: lb.release(lb.acquire("coder", wait=30)))
    waiting.start()
    wait_until(lambda: raw.zcard(keys.pool(namespace, "coder").waitq), "a waiter")
    yield perf
    lb.release(first)
    waiting.join(60)


@pytest.mark.thorough
def test_every_stored_key_is_explained(agentperf: Run, used: AgentPerf, raw: Raw, namespace: str) -> None:
    stored = sorted(raw.scan_iter(f"{namespace}:*"))
    seen = set()
    for key in stored:
        found = document(agentperf("inspect", key, "--json"), "inspect")
        assert (found["known"], found["namespace"], found["type"]) == (True, namespace, found["expected_type"]), key
        assert found["holds"], key
        seen.add(key.rpartition("}:")[2].partition(":")[0])
        if found["type"] in ("hash", "zset"):
            assert found["complete"], key
            assert [each["name"] for each in found["items"] if not each["meaning"]] == [], key
    assert seen >= {
        "state",
        "due",
        "waitq",
        "away",
        "ids",
        "events",
        "e",
        "meta",
        "size",
        "tags",
        "total",
        "latest",
        "1h",
    }


def test_pool_is_shown_in_words(agentperf: Run, used: AgentPerf, namespace: str) -> None:
    text = shown(agentperf("inspect", keys.pool(namespace, "coder").state))
    assert has_line(text, "holds instances, leases, queue entries and facts of the pool coder")
    assert has_line(text, "TTL", "none: it stays until it is deleted")
    assert has_line(text, "#picks", "2", "leases granted so far")
    assert has_line(text, "p0", "load=", "the instance p0")
    assert has_line(text, "waiting ticket=", "a request for a lease")


def test_expiry_and_bounds_are_shown(agentperf: Run, used: AgentPerf, raw: Raw, namespace: str) -> None:
    (writer, *_) = raw.scan_iter(f"{namespace}:*:w:*")
    found = document(agentperf("inspect", writer, "--json"), "inspect")
    assert 0 < found["ttl_s"] <= 86_400
    events = keys.pool(namespace, "coder").events
    text = shown(agentperf("inspect", events, "--limit", "1"))
    assert "There is more; --limit shows more." in text
    entry = keys.cache(namespace, "cache", "big").entry("k")
    used.cache("big").put("k", os.urandom(5000))
    text = shown(agentperf("inspect", entry))
    assert "There is more." in text
    assert len(text) < 3000


def test_foreign_keys_are_called_unknown(agentperf: Run, used: AgentPerf, raw: Raw, namespace: str) -> None:
    raw.rpush(f"{namespace}:jobs", "a", "b\x1b[31m")
    done = agentperf("inspect", f"{namespace}:jobs")
    assert (done.returncode, done.stderr) == (OK, "")
    assert "unknown: this library has no key of this form" in done.stdout
    assert "\x1b" not in done.stdout
    found = document(agentperf("inspect", f"{namespace}:jobs", "--json"), "inspect")
    assert (found["known"], found["holds"], found["type"], found["size"]) == (False, None, "list", 2)
    raw.set(keys.pool(namespace, "odd").state, "text")
    assert (
        "a string, and a hash belongs here: another program wrote it"
        in agentperf("inspect", keys.pool(namespace, "odd").state).stdout
    )


@pytest.mark.privileged
@pytest.mark.parametrize("make", [lambda: "jobs", lambda: keys.pool("prd", "coder").due])
def test_missing_key_exits_4(agentperf: Run, make: Callable[[], str]) -> None:
    done = agentperf("inspect", make(), "--json")
    assert (done.returncode, done.stdout) == (NOT_FOUND, "")
    assert ("it would hold timers of the pool coder" in done.stderr) == ("prd" in make())


@pytest.mark.thorough
@pytest.mark.servers("cluster")
def test_keys_of_a_cluster_are_found(agentperf: Run, perf: AgentPerf, namespace: str) -> None:
    perf.balancer().register_instance(AgentInstance("p0", "coder"))
    found = json.loads(agentperf("inspect", keys.pool(namespace, "coder").ids, "--json").stdout)
    assert [each["name"] for each in found["items"]] == ["p0"]
