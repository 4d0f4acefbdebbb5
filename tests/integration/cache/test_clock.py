"""The server's clock is set back by an hour. Compute leases end after their TTL, and earlier failures are ignored."""

from __future__ import annotations

import pytest

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.cache import commands
from agentperf_redis.cache.commands import Await, Failed, Lead
from agentperf_redis.keys import CacheKeys
from tests.support.clock import set_back_cache
from tests.support.servers import Raw

HOUR = 3600
LEASE_MS = 60_000


@pytest.fixture
def cache(backend: Backend) -> CacheKeys:
    return keys.cache(backend.namespace, "cache", "answers")


def claim(backend: Backend, cache: CacheKeys, token: str, retry_ms: int | None = None) -> commands.ClaimReply:
    return backend.run(commands.claim(cache, "k", token, lease_ms=LEASE_MS, ignore="", retry_ms=retry_ms))


def test_compute_lease_of_a_dead_process_ends_after_its_ttl(backend: Backend, raw: Raw, cache: CacheKeys) -> None:
    assert isinstance(claim(backend, cache, "dead"), Lead)
    set_back_cache(raw, cache, HOUR)
    waiting = claim(backend, cache, "other")
    assert isinstance(waiting, Await)
    assert waiting.left_ms <= LEASE_MS
    assert raw.pttl(cache.lease("k")) <= LEASE_MS


def test_failure_from_before_does_not_stop_refreshes(backend: Backend, raw: Raw, cache: CacheKeys) -> None:
    claim(backend, cache, "first")
    backend.run(commands.release(cache, "k", "first", error="ValueError no", error_ms=HOUR * 1000, origin="o"))
    assert isinstance(claim(backend, cache, "second", retry_ms=HOUR * 1000), Failed)
    set_back_cache(raw, cache, HOUR)
    assert isinstance(claim(backend, cache, "third", retry_ms=HOUR * 1000), Lead)
