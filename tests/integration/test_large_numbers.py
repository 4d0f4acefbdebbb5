"""Numbers that Redis 7.2 would write with an exponent. Its commands do not read this form where they need an integer."""

from __future__ import annotations

import pytest

from agentperf_redis import AgentPerf, keys
from agentperf_redis.cache import commands
from tests.support.script_texts import change_scripts, with_exponents
from tests.support.servers import Raw

pytestmark = pytest.mark.servers("valkey")


@pytest.fixture(autouse=True)
def _large_numbers_have_exponents(monkeypatch: pytest.MonkeyPatch) -> None:
    change_scripts(monkeypatch, with_exponents)


def test_exponents_are_written(perf: AgentPerf, raw: Raw) -> None:
    assert raw.eval(with_exponents("-- a script\nreturn redis.call('ECHO', 300000000)"), 0) == "3.000000000000000e+08"
    assert raw.eval(with_exponents("-- a script\nreturn redis.call('ECHO', 300000001)"), 0) == "300000001"


def test_entry_with_a_long_ttl_is_stored(perf: AgentPerf) -> None:
    cache = perf.cache("answers")
    assert cache.put("why", 42, ttl=100_000) is True
    assert 99_990 < (cache.ttl("why") or 0) <= 100_000
    assert cache.touch("why", 2_000_000) is True
    assert 1_999_990 < (cache.ttl("why") or 0) <= 2_000_000


def test_puts_are_cancelled_until_any_time(perf: AgentPerf, raw: Raw, namespace: str) -> None:
    cache = keys.cache(namespace, "cache", "answers")
    for until_ms in (8_000_000_000_000 - 1, 8_000_000_000_000):
        perf.backend.run(commands.cancel_puts(cache, ("request",), until_ms))
        assert raw.hget(cache.meta, "resent") == str(until_ms)
        assert raw.pexpiretime(cache.resent) == until_ms + 1


def test_large_sums_of_metrics_are_whole_numbers(perf: AgentPerf, raw: Raw, namespace: str) -> None:
    total = keys.metrics_total(namespace, keys.metrics_shard("coder"), "coder")
    for cost in ("1000000000", "2000000000"):
        perf.metrics.record_execution("coder", 100.0, success=True)
        perf.metrics.record_llm("coder", cost=1.0)
        perf.metrics.flush()
        assert raw.hget(total, "cost_nano") == cost
        assert raw.hget(total, "max_us") == "100000000"
    assert sum(row.cost for row in perf.metrics.series("coder", window="5m", step="1m")) == 2.0


def test_numbers_that_were_stored_with_exponents_are_read(perf: AgentPerf, raw: Raw, namespace: str) -> None:
    perf.metrics.record_execution("coder", 1.0, success=True)
    perf.metrics.record_llm("coder", cost=1.0)
    perf.metrics.flush()
    sums = [key for key in raw.keys(f"{namespace}:*") if raw.type(key) == "hash" and raw.hexists(key, "cost_nano")]
    for key in sums:
        raw.hset(key, "cost_nano", "1e+09")
    assert sums
    assert sum(row.cost for row in perf.metrics.series("coder", window="5m", step="1m")) == 1.0
