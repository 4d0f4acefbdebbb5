"""Tests of `/metrics`: in each format, it has the same figures as the API. It survives faults of the server."""

from __future__ import annotations

import gzip
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

import pytest

from agentperf_redis import AgentInstance, AgentPerf, keys
from agentperf_redis.export.families import FAMILIES
from agentperf_redis.export.histograms import BOUNDS
from agentperf_redis.export.prometheus import Exporter, listening
from agentperf_redis.metrics.model import PerformanceMetrics
from tests.support import exposition
from tests.support.exposition import Exposed
from tests.support.proxy import Proxy
from tests.support.servers import Raw, wait_until

CLASSIC = "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.3"
NATIVE = "application/openmetrics-text;version=2.0.0;q=0.7,text/plain;version=0.0.4;q=0.3"
DURATIONS_S = (0.0, 0.000001, 0.00098, 0.5, 0.5, 0.500001, 1.0, 2.0, 2.5, 64.0, 5000.0, 100_000.0)


def fill(perf: AgentPerf) -> AgentInstance:
    """Use every metric: two agents with successes, failures, cancellations and models, two caches, one pool.

    Returns:
        The instance with the lease that is still held.
    """
    metrics = perf.metrics
    for agent, faster in (("planner", 1.0), ('say "hi"\\', 3.0)):
        for number, seconds in enumerate(DURATIONS_S):
            failed = number % 3 == 0
            metrics.record_execution(agent, seconds / faster, not failed, "TimeoutError" if failed else None)
        metrics.record_cancellation(agent, 0.25)
        metrics.record_llm(agent, model="gpt-x", tokens_in=100, tokens_out=20, tokens_cached_in=30, cost=0.25)
        metrics.record_llm(agent, tokens_in=7, tokens_out=2)
        metrics.record_tool_calls(agent, calls=2)
    assert metrics.flush()
    cache = perf.cache("answers", max_size=2)
    for key in "abc":
        cache.put(key, key)
    cache.get("c")
    cache.get("gone")
    assert cache.stats().misses == 1  # `stats` reports the reads of this process to the server
    perf.tiered_cache("docs").put("a", 1)
    balancer = perf.balancer()
    for name in ("i1", "i2"):
        balancer.register_instance(AgentInstance(name, "coder", max_capacity=3))
    balancer.release(balancer.acquire("coder"))
    held = balancer.acquire("coder")
    assert held is not None
    return held


def page(exporter: Exporter, accept: str) -> tuple[str, str]:
    """Return the Content-Type and the text of a scrape."""
    status, headers, body = exporter.answer("GET", "/metrics", accept)
    assert status is HTTPStatus.OK
    return dict(headers)["Content-Type"], body.decode()


def scrape(exporter: Exporter, accept: str = CLASSIC) -> Exposed:
    _, text = page(exporter, accept)
    return exposition.plain(text) if accept is CLASSIC else exposition.openmetrics(text)


def assert_counts_equal(found: Exposed, agent: PerformanceMetrics) -> None:
    def count(name: str, **labels: str) -> float:
        return found.value(f"agentperf_agent_{name}", agent=agent.agent_name, **labels)

    assert count("executions_total", outcome="success") == agent.success_count
    assert count("executions_total", outcome="failure") == agent.failure_count
    assert count("executions_total", outcome="cancelled") == agent.cancelled_count
    assert count("errors_total", error_type="TimeoutError") == agent.error_types["TimeoutError"]
    assert count("tool_calls_total") == agent.tool_calls
    assert agent.last_execution is not None
    assert count("last_execution_timestamp_seconds") == agent.last_execution.timestamp()

    def over_models(name: str, **labels: str) -> float:
        values = found.of(f"agentperf_agent_{name}").items()
        return sum(value for own, value in values if dict(own).items() >= {"agent": agent.agent_name, **labels}.items())

    assert over_models("llm_calls_total") == agent.llm_calls
    assert over_models("tokens_total", type="input") == agent.tokens_in
    assert over_models("tokens_total", type="output") == agent.tokens_out
    assert over_models("token_parts_total", type="cache_read") == agent.tokens_cached_in
    assert over_models("cost_total") == agent.cost
    assert count("tokens_total", model="gpt-x", type="input") == agent.models["gpt-x"].tokens_in


@pytest.mark.parametrize("accept", [CLASSIC, OPENMETRICS])
def test_classic_histograms_equal_the_api(perf: AgentPerf, accept: str) -> None:
    fill(perf)
    found, agents = scrape(Exporter(perf), accept), perf.metrics.snapshots()
    name = "agentperf_agent_execution_seconds"
    for agent in agents.values():
        assert_counts_equal(found, agent)
        assert found.value(f"{name}_count", agent=agent.agent_name) == agent.task_count == len(DURATIONS_S) + 1
        assert found.value(f"{name}_sum", agent=agent.agent_name) == agent.total_execution_time
        assert agent.execution_times  # the server still has all durations, so the test can count them itself
        for bound in BOUNDS:
            expected = sum(each <= bound for each in agent.execution_times)
            assert found.value(f"{name}_bucket", agent=agent.agent_name, le=str(bound)) == expected
        assert found.value(f"{name}_bucket", agent=agent.agent_name, le="+Inf") == agent.task_count
    assert set(agents) == {"planner", 'say "hi"\\'}


def test_native_histograms_equal_the_api(perf: AgentPerf) -> None:
    fill(perf)
    found = scrape(Exporter(perf), NATIVE)
    for agent in perf.metrics.snapshots().values():
        assert_counts_equal(found, agent)
        key = "agentperf_agent_execution_seconds", frozenset({("agent", agent.agent_name)})
        histogram = found.native[key]
        assert (histogram.schema, histogram.zero_count) == (4, agent.zeros)
        assert (histogram.count_value, histogram.sum_value) == (agent.task_count, agent.total_execution_time)
        assert {index - 1: count for index, count in exposition.native_buckets(histogram).items()} == agent.buckets


def test_caches_and_pools_equal_the_api(perf: AgentPerf) -> None:
    held = fill(perf)
    found = scrape(Exporter(perf))
    (stats,) = (each for each in perf.caches() if each.name == "answers")
    own = {"cache": "answers", "kind": "lru"}
    assert found.value("agentperf_cache_requests_total", **own, result="hit") == stats.hits == 1
    assert found.value("agentperf_cache_requests_total", **own, result="miss") == stats.misses == 1
    assert found.value("agentperf_cache_evictions_total", **own) == stats.evictions == 1
    assert found.value("agentperf_cache_entries", **own, tier="cold") == stats.size == 2
    assert found.value("agentperf_cache_bytes", **own) == stats.bytes > 0
    assert found.value("agentperf_cache_tier_hits_total", cache="docs", kind="tiered", tier="hot") == 0
    (pool,) = perf.balancer().status()
    assert found.value("agentperf_pool_load", pool="coder") == pool.current_load == held.current_load == 1
    assert found.value("agentperf_pool_capacity", pool="coder") == pool.total_capacity == 6
    assert found.value("agentperf_pool_instances", pool="coder", state="up") == 2
    assert found.value("agentperf_pool_leases_granted_total", pool="coder") == pool.granted == 2
    served = [
        found.value("agentperf_instance_releases_total", pool="coder", agent_instance=i, outcome="success")
        for i in ("i1", "i2")
    ]
    assert sorted(served) == sorted(each.served for each in pool.instances) == [0, 1]


def test_every_family_has_samples_once_it_is_used(perf: AgentPerf) -> None:
    fill(perf)
    perf.tiered_cache("bounded", max_bytes=10**6).put("a", 1)
    _, text = page(Exporter(perf), CLASSIC)
    used = {line.partition("{")[0].partition(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    missing = [each.name for each in FAMILIES if not any(name.startswith(each.name) for name in used)]
    assert missing == []


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "text/plain; version=0.0.4"),
        ("*/*", "text/plain; version=0.0.4"),
        ("application/openmetrics-text", "application/openmetrics-text; version=1.0.0"),
        (OPENMETRICS, "application/openmetrics-text; version=1.0.0"),
        (NATIVE, "application/openmetrics-text; version=2.0.0"),
        ("application/openmetrics-text;version=abc", "text/plain; version=0.0.4"),
        ("application/openmetrics-text;version=", "application/openmetrics-text; version=1.0.0"),
        (";;;,=,version", "text/plain; version=0.0.4"),
    ],
)
def test_accept_header_chooses_the_format(perf: AgentPerf, accept: str, kind: str) -> None:
    content_type, text = page(Exporter(perf), accept)
    assert content_type.startswith(kind)
    (exposition.openmetrics if "openmetrics" in kind else exposition.plain)(text)


@contextmanager
def served(exporter: Exporter) -> Iterator[str]:
    server = listening(exporter, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_exporter_answers_over_http(perf: AgentPerf) -> None:
    perf.metrics.record_execution("planner", 1.0, success=True)
    with served(Exporter(perf)) as url:
        request = urllib.request.Request(f"{url}/metrics", headers={"Accept": OPENMETRICS, "Accept-Encoding": "gzip"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            assert reply.headers["Content-Encoding"] == "gzip"
            found = exposition.openmetrics(gzip.decompress(reply.read()).decode())
        assert found.value("agentperf_agent_executions_total", agent="planner", outcome="success") == 1
        with urllib.request.urlopen(urllib.request.Request(f"{url}/metrics", method="HEAD"), timeout=30) as reply:
            assert (reply.status, reply.read()) == (200, b"")
        with urllib.request.urlopen(url, timeout=30) as reply:
            assert b"/metrics" in reply.read()
        for wanted, code in ((f"{url}/other", 404), (urllib.request.Request(f"{url}/metrics", data=b"x"), 405)):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(wanted, timeout=30)
            assert refused.value.code == code
            refused.value.close()


def test_outage_shows_up_0_and_no_counts(proxy: Proxy, namespace: str) -> None:
    with AgentPerf(proxy.url, namespace=namespace, deadline=0.5) as perf:
        exporter = Exporter(perf)
        perf.metrics.record_execution("planner", 1.0, success=True)
        before = scrape(exporter)
        assert before.value("agentperf_up") == 1
        proxy.close_port()
        absent = scrape(exporter)
        assert absent.value("agentperf_up") == 0
        assert absent.value("agentperf_exporter_part_read", part="agents") == 0
        names = {name for name, _ in absent.values}
        assert not any(name.startswith(("agentperf_agent", "agentperf_cache", "agentperf_pool")) for name in names)
        proxy.open_port()
        wait_until(lambda: scrape(exporter).value("agentperf_up") == 1, "the server to be reached again")
        after = scrape(exporter).of("agentperf_agent_executions_total")
        assert after == before.of("agentperf_agent_executions_total")


def test_damaged_part_does_not_hide_the_others(perf: AgentPerf, raw: Raw, namespace: str) -> None:
    held = fill(perf)
    key = keys.metrics_agents(namespace, keys.metrics_shard("planner"))
    raw.unlink(key)
    raw.set(key, "text")
    errors: list[str] = []
    found = scrape(Exporter(perf, lambda reading: errors.extend(map(str, reading.errors.values()))))
    assert found.value("agentperf_up") == 1
    parts = {dict(labels)["part"]: value for labels, value in found.of("agentperf_exporter_part_read").items()}
    assert parts == {"agents": 0, "caches": 1, "pools": 1}
    assert found.value("agentperf_pool_load", pool="coder") == held.current_load == 1
    assert found.of("agentperf_agent_executions_total") == {}
    assert [key in error for error in errors] == [True]


def test_concurrent_scrapes_agree(perf: AgentPerf) -> None:
    fill(perf)
    exporter = Exporter(perf)
    found: list[Exposed] = []
    threads = [threading.Thread(target=lambda: found.append(scrape(exporter))) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    counts = [each.of("agentperf_agent_execution_seconds_bucket") for each in found]
    assert len(counts) == 6
    assert all(each == counts[0] for each in counts)
