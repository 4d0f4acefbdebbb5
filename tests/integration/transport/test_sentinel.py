"""A failover under Sentinel: after a bounded outage, the client finds the new primary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.command import Command
from tests.support.driving import Run, add
from tests.support.sentinels import sentinel_group

TIMEOUT = 30.0


@pytest.mark.thorough
@pytest.mark.privileged
@pytest.mark.servers("valkey")
def test_client_follows_a_sentinel_failover(
    tmp_path: Path, connect: Callable[..., Backend], run: Run, namespace: str, server_kind: str
) -> None:
    with sentinel_group(tmp_path) as group:
        backend = connect(group.url, deadline=TIMEOUT)
        assert run(backend, add(namespace)) == 1
        group.replicated()
        group.allow_failover()
        group.primary.kill()
        assert run(backend, add(namespace)) >= 2
        port = run(backend, Command("CONFIG", (), ("GET", "port"), lambda reply: int(reply[1])))
        assert port == group.replica.port
