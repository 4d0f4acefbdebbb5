"""One exchange, driven with `send()`: which connection carries it, and what an error does to which."""

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
from agentperf_redis.transport.topology import Node

NODE = Node("server", 6379)
PAYLOAD = b"payload"
LATE = (TimeoutError(), RedisTimeoutError("Timeout reading from socket"))


class Name(str):  # noqa: SLOT000  unlike a str, it can be referred to weakly
    """Stands for a connection."""


class Polite(Handshake):
    """Greets, and judges as it is told."""

    def __init__(self, refusal: AgentPerfError | None = None) -> None:
        self.refusal = refusal

    def request(self) -> bytes:
        return b"hello"

    def parse(self, replies: Any) -> AgentPerfError | None:
        assert replies == [b"hello yourself"]
        return self.refusal


class Pool:
    """The connections of a driver, which are names, and what was done to them."""

    def __init__(self, handshake: Handshake | None = None, url: str = "redis://server") -> None:
        self.dropped: list[Name] = []
        connector = Connector(parse_url(url))
        self.connections = Connections[Name](connector, handshake or Polite(), self.dropped.append)
        self.made = 0

    def begin(self, node: Node = NODE) -> ExchangeFlow[Name]:
        return self.connections.exchange(Exchange(node, PAYLOAD, 1, 2.5))

    def talking(self, node: Node = NODE) -> tuple[ExchangeFlow[Name], Talk[Name], bool]:
        """Begin an exchange and get as far as its payload; return whether a new connection was greeted for it."""
        exchange = self.begin(node)
        step, greeted = next(exchange), False
        if step == Open(node):
            self.made += 1
            step = exchange.send(Name(f"c{self.made}"))
            assert step == Connect(Name(f"c{self.made}"))
            step = exchange.send(None)
            assert isinstance(step, Talk)
            if step.payload == b"hello":
                greeted = True
                step.replies.append(b"hello yourself")
                step = exchange.send(None)
        assert isinstance(step, Talk)
        assert (step.payload, step.count, step.replies) == (PAYLOAD, 1, [])
        return exchange, step, greeted

    def idle(self, count: int) -> None:
        """Have so many idle connections, c1 first."""
        under_way = [self.talking() for _ in range(count)]
        for exchange, step, _ in reversed(under_way):
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


def test_a_connection_is_greeted_and_used_again() -> None:
    pool = Pool()
    exchange, step, greeted = pool.talking()
    assert (step.connection, greeted) == ("c1", True)
    assert finish(exchange, step) == [b"reply"]

    exchange, step, greeted = pool.talking()
    assert (step.connection, greeted) == ("c1", False)
    second, beside, greeted = pool.talking()
    assert (beside.connection, greeted) == ("c2", False), "its server was looked at"
    finish(exchange, step)
    finish(second, beside)
    assert pool.dropped == []


def test_a_sentinel_is_not_greeted_and_each_node_is() -> None:
    pool = Pool()
    assert pool.talking()[2]
    assert pool.talking(Node("other", 6379))[2]
    assert not pool.talking(Node("sentinel", 26379, sentinel=True))[2]


def test_once_all_connections_broke_the_next_is_greeted() -> None:
    pool = Pool()
    pool.idle(2)
    exchange, _, _ = pool.talking()
    failed(exchange, Broken("gone"))
    assert pool.talking()[2]


@pytest.mark.parametrize(
    "error", [Broken("gone"), ConnectionResetError(), *LATE], ids=lambda error: type(error).__name__
)
def test_one_that_had_been_idle_takes_the_idle_ones_along(error: Exception) -> None:
    pool = Pool()
    pool.idle(3)
    exchange, step, _ = pool.talking()

    failure = failed(exchange, error)

    assert pool.dropped[0] == step.connection
    assert sorted(pool.dropped) == ["c1", "c2", "c3"]
    late = error in LATE
    assert (failure.sent, failure.silent, failure.stale) == (True, late, not late)


def test_a_new_one_that_breaks_is_dropped_alone() -> None:
    pool = Pool()
    first, _, _ = pool.talking()
    second, step, _ = pool.talking()
    finish(second, step)

    failure = failed(first, Broken("gone"))

    assert pool.dropped == ["c1"]
    assert (failure.sent, failure.stale) == (True, False)
    assert pool.talking()[1].connection == "c2"


def test_replies_before_a_failure_count() -> None:
    pool = Pool()
    pool.idle(1)
    exchange, step, _ = pool.talking()
    step.replies.append(b"first")
    failure = failed(exchange, Broken("gone"))
    assert (failure.replies, failure.stale) == ([b"first"], False)


@pytest.mark.parametrize("error", [asyncio.CancelledError(), KeyboardInterrupt(), ZeroDivisionError()])
def test_an_interruption_drops_its_connection_and_no_other(error: BaseException) -> None:
    pool = Pool()
    pool.idle(2)
    exchange, step, _ = pool.talking()
    with pytest.raises(type(error)) as raised:
        exchange.throw(error)
    assert raised.value is error
    assert pool.dropped == [step.connection]


def test_a_collected_exchange_drops_its_connection() -> None:
    pool = Pool()
    exchange, _, _ = pool.talking()
    exchange.close()
    assert pool.dropped == ["c1"]


@pytest.mark.parametrize("at", ["open", "connect", "greet"])
def test_nothing_was_sent_before_the_greeting_is_answered(at: str) -> None:
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
    ("error", "final", "says"),
    [
        (ResponseError("WRONGPASS no"), True, "look at user name"),
        (ResponseError("LOADING it"), False, "LOADING"),
        (BackendUnavailable("here", "not_applied", "no server program"), True, "no server program"),
        (TimeoutError(), False, "no answer for 2.5 s; "),
    ],
    ids=["refused", "passing", "embedded", "late"],
)
def test_what_connecting_meets_is_told(error: Exception, final: bool, says: str) -> None:
    pool = Pool()
    exchange = pool.begin()
    next(exchange)
    exchange.send(Name("c1"))
    failure = failed(exchange, error)
    assert (failure.sent, failure.final) == (False, final)
    assert says in failure.reason


def test_a_late_tls_handshake_says_what_may_be_wrong() -> None:
    pool = Pool(url="rediss://server")
    exchange = pool.begin()
    next(exchange)
    exchange.send(Name("c1"))
    assert "is it a plain redis:// server?" in failed(exchange, TimeoutError()).reason


def test_a_server_that_must_not_be_used_is_left() -> None:
    refusal = SchemaMismatch("namespace n", "99", "schema 1 or lower")
    pool = Pool(Polite(refusal))
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


def test_closing_drops_idle_ones_now_and_busy_ones_later() -> None:
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
