"""Fixtures of the unit tests. Unit tests need no server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from agentperf_redis.backend import Backend


@pytest.fixture
def dead_backend() -> Iterator[Backend]:
    """A Backend whose server does not exist: every command raises `BackendUnavailable`."""
    backend = Backend("redis://127.0.0.1:1/0", deadline=0.05)
    yield backend
    backend.close()
