"""Common fixtures of the unit tests of the cache's flows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.cache import LRUCache
from tests.support.renewed import Renewed


@pytest.fixture
def renewed() -> Renewed:
    """Records the leases to renew."""
    return Renewed()


@pytest.fixture
def deployed() -> Iterator[LRUCache]:
    """A cache without a server. Its settings count as deployed, and it reports no reads."""
    backend = Backend("redis://127.0.0.1:1", deadline=0.05)
    made = LRUCache(backend=backend)
    shared = made._shared_state
    shared.laid_out = shared.deployed = shared.shards[0].deployed = True
    shared.shards[0].access_buffer._filled = lambda: None
    yield made
    backend.close()
