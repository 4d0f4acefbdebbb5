"""Tests of `Connections.exchange`, driven with `send()`: which connection it uses, and which ones an error closes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.exceptions import ConnectionError as Broken
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from agentperf_redis.errors import AgentPerfError, BackendUnavailable, SchemaMismatch
from agentperf_redis.transport.address import parse_url
from agentperf_redis.transport.connector import Connector
from agentperf_redis.transport.delivery import Exchange, ExchangeFailed
from agentperf_redis.transport.exchange import Connect, Connections, ExchangeFlow, Open, Talk
from agentperf_redis.transport.handshake import Handshake
from agentperf_redis.transport.resp import ServerError
from agentperf_redis.transport.topology import Node

NODE = Node("server", 6379)
PAYLOAD = b"payload"
LATE = (TimeoutError(), RedisTimeoutError("Timeout reading from socket"))


class Name(str):  # noqa: SLOT000  unlike a str, a Name can be weakly referenced
    """Stands for a connection."""


class FixedHandshake(Handshake):
    """A handshake with a fixed result."""

    def __init__(self, refusal: AgentPerfError | None = None) -> None:
        self.refusal = refusal

    def request(self) -> bytes:
        return b"hello"

    def parse(self, replies: Any) -> AgentPerfError | None:
        assert replies == [b"hello yourself"]
        return self.refusal


class Pool:
    """The connections of a driver, each a `Name`, and the list of dropped connections."""

    def __init__(self, handshake: Handshake | None = None, url: str = "redis://server") -> None:
        self.dropped: list[Name] = []
        connector = Connector(parse_url(url))
        self.connections = Connections[Name](connector, handshake or FixedHandshake(), self.dropped.append)
        self.made = 0

    def begin(self, node: Node = NODE) -> ExchangeFlow[Name]:
        return self.connections.exchange(Exchange(node, PAYLOAD, 1, 2.5))

    def talking(self, node: Node = NODE) -> tuple[ExchangeFlow[Name], Talk[Name], bool]:
        """Run an exchange until it sends its payload.

        Return the exchange, the step that sends the payload, and whether there was a handshake on a new connection.
        """
        exchange = self.begin(node)
        step, handshaken = next(exchange), False
        if step == Open(node):
            self.made += 1
            step = exchange.send(Name(f"c{self.made}"))
            assert step == Connect(Name(f"c{self.made}"))
            step = exchange.send(None)
            assert isinstance(step, Talk)
            if step.payload == b"hello":
                handshaken = True
                step.replies.append(b"hello yourself")
                step = exchange.send(None)
        assert isinstance(step, Talk)
        assert (step.payload, step.count, step.replies) == (PAYLOAD, 1, [])
        return exchange, step, handshaken

    def idle(self, count: int) -> None:
        """Create a number of idle connections, named c1, c2, ..."""
        in_flight = [self.talking() for _ in range(count)]
        for exchange, step, _ in reversed(in_flight):
            finish(exchange, step)


def finish(exchange: ExchangeFlow[Name], step: Talk[Name]) -> list[Any]:
    step.replies.append(b"reply")
    with pytest.raises(StopIteration) as done:
        exchange.send(None)
    replies: list[Any] = done.value.value
    return replies


def failed(exchange: ExchangeFlow[Name], error: BaseException) -> ExchangeFailed:
    with pytest.raises(ExchangeFailed) as raised:
        exchange.throw(error)
    return raised.value


def test_connection_is_handshaken_once_and_reused() -> None:
    pool = Pool()
    exchange, step, handshaken = pool.talking()
    assert (step.connection, handshaken) == ("c1", True)
    assert finish(exchange, step) == [b"reply"]

    exchange, step, handshaken = pool.talking()
    assert (step.connection, handshaken) == ("c1", False)
    second, second_step, handshaken = pool.talking()
    assert (second_step.connection, handshaken) == ("c2", False), "the handshake is done once per server"
    finish(exchange, step)
    finish(second, second_step)
    assert pool.dropped == []


def test_each_node_but_no_sentinel_gets_handshake() -> None:
    pool = Pool()
    assert pool.talking()[2]
    assert pool.talking(Node("other", 6379))[2]
    assert not pool.talking(Node("sentinel", 26379, sentinel=True))[2]


def test_new_connection_after_total_loss_gets_handshake() -> None:
    pool = Pool()
    pool.idle(2)
    exchange, _, _ = pool.talking()
    failed(exchange, Broken("gone"))
    assert pool.talking()[2]


@pytest.mark.parametrize(
    "error", [Broken("gone"), ConnectionResetError(), *LATE], ids=lambda error: type(error).__name__
)
def test_broken_reused_connection_drops_idle_ones(error: Exception) -> None:
    pool = Pool()
    pool.idle(3)
    exchange, step, _ = pool.talking()

    failure = failed(exchange, error)

    assert pool.dropped[0] == step.connection
    assert sorted(pool.dropped) == ["c1", "c2", "c3"]
    late = error in LATE
    assert (failure.sent, failure.timed_out, failure.stale) == (True, late, not late)


def test_broken_new_connection_is_dropped_alone() -> None:
    pool = Pool()
    first, _, _ = pool.talking()
    second, step, _ = pool.talking()
    finish(second, step)

    failure = failed(first, Broken("gone"))

    assert pool.dropped == ["c1"]
    assert (failure.sent, failure.stale) == (True, False)
    assert pool.talking()[1].connection == "c2"


def test_replies_before_a_failure_are_kept() -> None:
    pool = Pool()
    pool.idle(1)
    exchange, step, _ = pool.talking()
    step.replies.append(b"first")
    failure = failed(exchange, Broken("gone"))
    assert (failure.replies, failure.stale) == ([b"first"], False)


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyboardInterrupt(), ZeroDivisionError()])
def test_interrupted_exchange_drops_only_its_connection(error: BaseException) -> None:
    pool = Pool()
    pool.idle(2)
    exchange, step, _ = pool.talking()
    with pytest.raises(type(error)) as raised:
        exchange.throw(error)
    assert raised.value is error
    assert pool.dropped == [step.connection]


def test_garbage_collected_exchange_drops_its_connection() -> None:
    pool = Pool()
    exchange, _, _ = pool.talking()
    exchange.close()
    assert pool.dropped == ["c1"]


@pytest.mark.parametrize("at", ["open", "connect", "greet"])
def test_failure_before_handshake_counts_as_unsent(at: str) -> None:
    pool = Pool()
    exchange = pool.begin()
    next(exchange)
    if at != "open":
        exchange.send(Name("c1"))
    if at == "greet":
        exchange.send(None)
    failure = failed(exchange, Broken("refused"))
    assert (failure.sent, failure.final, failure.stale) == (False, False, False)
    assert pool.dropped == ([] if at == "open" else ["c1"])
    assert "agentperf up" in failure.reason or "is the address right" in failure.reason


@pytest.mark.parametrize(
    ("error", "final", "expected"),
    [
        (ResponseError("WRONGPASS no"), True, "check user name"),
        (ResponseError("LOADING it"), False, "LOADING"),
        (BackendUnavailable("here", "not_applied", "no server program"), True, "no server program"),
        (TimeoutError(), False, "no answer for 2.5 s; "),
    ],
    ids=["refused", "passing", "embedded", "late"],
)
def test_connect_errors_are_reported_with_cause(error: Exception, final: bool, expected: str) -> None:
    pool = Pool()
    exchange = pool.begin()
    next(exchange)
    exchange.send(Name("c1"))
    failure = failed(exchange, error)
    assert (failure.sent, failure.final) == (False, final)
    assert expected in failure.reason


def test_tls_timeout_error_suggests_a_plain_server() -> None:
    pool = Pool(url="rediss://server")
    exchange = pool.begin()
    next(exchange)
    exchange.send(Name("c1"))
    assert "is it a plain redis:// server?" in failed(exchange, TimeoutError()).reason


def test_refused_server_is_disconnected() -> None:
    refusal = SchemaMismatch("namespace n", "99", "schema 1 or lower")
    pool = Pool(FixedHandshake(refusal))
    exchange = pool.begin()
    next(exchange)
    exchange.send(Name("c1"))
    handshake = exchange.send(None)
    assert isinstance(handshake, Talk)
    handshake.replies.append(b"hello yourself")
    with pytest.raises(ExchangeFailed) as raised:
        exchange.send(None)
    assert (raised.value.error, raised.value.final, raised.value.sent) == (refusal, True, False)
    assert pool.dropped == ["c1"]


def test_reason_for_closing_is_that_of_the_server() -> None:
    pool = Pool()
    exchange = pool.begin()
    next(exchange)
    exchange.send(Name("c1"))
    handshake = exchange.send(None)
    assert isinstance(handshake, Talk)
    handshake.replies.append(ServerError("ERR max number of clients reached"))
    failure = failed(exchange, Broken("Connection closed by server."))
    assert (failure.reason, failure.sent, failure.final) == ("it has reached its maxclients", False, False)
    assert pool.dropped == ["c1"]


def test_close_drops_busy_connections_after_their_exchange() -> None:
    pool = Pool()
    pool.idle(2)
    exchange, step, _ = pool.talking()
    pool.connections.close()
    assert len(pool.dropped) == 1
    assert finish(exchange, step) == [b"reply"]
    assert sorted(pool.dropped) == ["c1", "c2"]
    with pytest.raises(ExchangeFailed, match="closed") as raised:
        next(pool.begin())
    assert (raised.value.final, raised.value.local) == (True, True)
