"""Tests of how the replies to the handshake decide whether a server is accepted."""

from __future__ import annotations

from typing import Any

import pytest

from agentperf_redis import AgentInstance, AgentPerf
from agentperf_redis.errors import SchemaMismatch
from agentperf_redis.transport.handshake import Handshake
from agentperf_redis.transport.resp import ServerError
from tests.support.fake import fake_server

OPENED = [1, b"1", b"epoch"]


def judged(hello: Any) -> Any:
    return Handshake("redis://h:1/0", "ns", lambda _: None).parse([hello, OPENED])


@pytest.mark.parametrize(
    ("server", "version"),
    [
        (b"redis", b"7.0.0"),
        (b"redis", b"8.10.1"),
        (b"valkey", b"7.2.5"),
        (b"fakeredis", b"2.41.0"),
        (b"another server", b"1"),
    ],
)
def test_supported_and_unknown_servers_are_accepted(server: bytes, version: bytes) -> None:
    assert judged([b"server", server, b"version", version, b"proto", 2]) is None


@pytest.mark.parametrize("hello", [ServerError("ERR unknown command 'HELLO'"), None, [b"server"], [b"server", None]])
def test_server_without_a_name_is_accepted(hello: Any) -> None:
    assert judged(hello) is None


@pytest.mark.parametrize(("server", "version"), [("redis", "6.2.14"), ("valkey", "7.1.9")])
def test_old_servers_are_refused(server: str, version: str) -> None:
    refusal = judged([b"server", server.encode(), b"version", version.encode()])
    assert isinstance(refusal, SchemaMismatch)
    assert (refusal.where, refusal.found) == (f"{server} at redis://h:1/0", version)


def test_empty_namespace_of_a_reading_user_has_no_epoch() -> None:
    epochs: list[str] = []
    handshake = Handshake("redis://h:1/0", "ns", epochs.append)
    assert handshake.parse([None, [1, 1, b""]]) is None
    assert handshake.parse([None, OPENED]) is None
    assert epochs == ["epoch"]


def test_services_work_on_the_server_of_fakeredis() -> None:
    with fake_server() as url, AgentPerf(url) as perf:
        lb, cache = perf.balancer(), perf.cache("answers")
        lb.register_instance(AgentInstance("coder-1", "coder", max_capacity=1))
        with lb.lease("coder"):
            assert lb.acquire("coder") is None
        assert cache.put("a", 1)
        assert cache.get("a") == 1
        perf.metrics.record_execution("planner", 0.1, success=True)
        assert perf.metrics.flush()
        assert perf.metrics.snapshots()["planner"].task_count == 1
