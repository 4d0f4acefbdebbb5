"""Fixtures of the unit tests, which need no server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agentperf_redis.backend import Backend


@pytest.fixture
def dead_backend() -> Iterator[Backend]:
    """A Backend without a server: every command raises `BackendUnavailable`."""
    backend = Backend("redis://127.0.0.1:1/0", deadline=0.05)
    yield backend
    backend.close()
