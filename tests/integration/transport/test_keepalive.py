"""Connections of each kind use TCP keepalive with short intervals. The tests read the options of the sockets."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from agentperf_redis.backend import Backend
from agentperf_redis.command import Command
from agentperf_redis.keys import meta
from agentperf_redis.transport.connector import keepalive_options
from tests.support.servers import wait_until

WANTED = {"TCP_KEEPIDLE": 30, "TCP_KEEPALIVE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


def assert_kept_alive(found: Any) -> None:
    assert found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) != 0
    for name, value in WANTED.items():
        if hasattr(socket, name):
            assert found.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value, name


def echo(backend: Backend) -> Command[None]:
    return Command("ECHO", (meta(backend.namespace),), (), lambda _: None)


@pytest.mark.standalone
def test_blocking_connections_are_kept_alive(backend: Backend) -> None:
    backend.run(echo(backend))
    ((connection,),) = backend._executor._connections._idle.values()
    assert_kept_alive(connection._sock)


@pytest.mark.standalone
def test_asyncio_connections_are_kept_alive(backend: Backend, runner: asyncio.Runner) -> None:
    runner.run(backend.arun(echo(backend)))
    (executor,) = backend._async_executors.values()
    ((connection,),) = executor._connections._idle.values()
    assert connection._writer is not None
    assert_kept_alive(connection._writer.get_extra_info("socket"))


@pytest.mark.standalone
def test_bus_connections_are_kept_alive(backend: Backend, namespace: str) -> None:
    subscription = backend.bus.subscribe(f"{namespace}:channel", lambda _: None, lambda: None)

    def sockets() -> list[Any]:
        listener = backend.bus._listener
        assert listener is not None
        return [each.socket for each in list(listener._connections.values()) if each.socket is not None]

    wait_until(lambda: len(sockets()) == 1, "the connection of the bus")
    assert_kept_alive(sockets()[0])
    subscription.close()


def test_options_fit_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WANTED:
        monkeypatch.delattr(socket, name, raising=False)
    assert keepalive_options() == {}
    monkeypatch.setattr(socket, "TCP_KEEPALIVE", 16, raising=False)  # macOS
    assert keepalive_options() == {16: 30}
