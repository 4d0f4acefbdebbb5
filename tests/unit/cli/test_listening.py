"""Tests of the check that something listens at an address."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from agentperf_redis.cli import listening
from agentperf_redis.errors import BackendUnavailable
from agentperf_redis.transport.address import parse_url
from tests.support.servers import free_port


def refusal(url: str, *, defaulted: bool = False) -> BackendUnavailable:
    started = time.monotonic()
    with pytest.raises(BackendUnavailable) as raised:
        listening.check(parse_url(url), 60.0, defaulted=defaulted)
    assert time.monotonic() - started < 30
    return raised.value


def test_refused_connection_fails_at_once() -> None:
    port = free_port()
    error = refusal(f"redis://me:hunter2@127.0.0.1:{port}")
    assert error.outcome == "not_applied"
    assert error.reason.startswith(f"nothing listens on 127.0.0.1:{port}; is a server running there? `agentperf up`")
    assert "hunter2" not in str(error)
    assert "default address" in refusal(f"redis://127.0.0.1:{port}", defaulted=True).reason


def test_missing_and_abandoned_sockets_are_refused(tmp_path: Path) -> None:
    where = tmp_path / "s"
    assert f"nothing listens on {where}" in refusal(f"unix://{where}").reason
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(where))
    assert f"nothing listens on {where}" in refusal(f"unix://{where}").reason


def test_one_node_that_listens_suffices() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, other = server.getsockname()[1], free_port()
        listening.check(parse_url(f"redis://127.0.0.1:{port}"), 5.0)
        listening.check(parse_url(f"redis+cluster://127.0.0.1:{other},127.0.0.1:{port}"), 5.0)
    error = refusal(f"redis+cluster://127.0.0.1:{other},127.0.0.1:{port}")
    assert f"nothing listens on 127.0.0.1:{other} and nothing listens on 127.0.0.1:{port}" in error.reason


def test_unknown_host_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", fail)
    assert refusal("redis://nowhere.example").reason.startswith(
        "there is no host nowhere.example; is the address right"
    )


@pytest.mark.parametrize(
    "error", [TimeoutError("timed out"), OSError(113, "No route to host"), socket.gaierror(socket.EAI_AGAIN, "later")]
)
def test_other_faults_are_left_to_the_library(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(socket, "create_connection", fail)
    listening.check(parse_url("redis://nowhere.example"), 5.0)
