"""One exchange: its connection, the handshake on a new connection, and the connections that an error closes.

`Connections.exchange` is a generator without I/O, like `delivery.deliver`. It yields steps for a driver (`Open` a
connection, `Connect` it, `Talk` on it). So the blocking and the asyncio driver share the idle connections, the
handshake and the interpretation of errors. One exchange at a time uses a connection. Any exception before all replies
are read drops the connection, so that no reply can reach the wrong caller.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from agentperf_redis.command import Reply
from agentperf_redis.transport.connector import Connector
from agentperf_redis.transport.delivery import Exchange, ExchangeFailed
from agentperf_redis.transport.handshake import REPLIES, Handshake
from agentperf_redis.transport.topology import Node

C = TypeVar("C")

CLOSED = "this client is closed"
MAX_CONNECTIONS = 32
"""Concurrent exchanges per driver and process. The default maxclients of 10,000 then allows 300 processes."""
BUSY = f"all {MAX_CONNECTIONS} connections of this process were busy"


@dataclass(frozen=True, slots=True)
class Open:
    """Create a connection to a node, and return it, not yet connected."""

    node: Node


@dataclass(frozen=True, slots=True)
class Connect(Generic[C]):
    """Connect a connection."""

    connection: C


@dataclass(slots=True)  # not frozen: that would double the cost, and each exchange creates one
class Talk(Generic[C]):
    """Send `payload` and append `count` replies to `replies` one by one: replies before a failure count."""

    connection: C
    payload: bytes
    count: int
    replies: list[Reply]


ExchangeFlow: TypeAlias = Generator[Open | Connect[C] | Talk[C], C | None, list[Reply]]


class Connections(Generic[C]):
    """The connections of one driver. Safe to share between threads.

    Args:
        connector: interprets errors.
        handshake: sent first on a new connection; None sends nothing.
        drop: closes a connection at once.

    Attributes:
        closed: whether exchanges are refused.
    """

    def __init__(self, connector: Connector, handshake: Handshake | None, drop: Callable[[C], None]) -> None:
        self._connector = connector
        self._handshake = handshake
        self._close_one = drop
        self._idle: dict[Node, deque[C]] = {}
        self._ready: dict[Node, set[weakref.ref[C]]] = {}
        """Open connections, idle or in use, whose server has passed the handshake.

        The references are weak. If an exception of a signal handler takes a connection from its exchange, nothing else
        refers to it, so it is closed.
        """
        self.closed = False

    def exchange(self, request: Exchange) -> ExchangeFlow[C]:
        """Send bytes to a node and return its replies. The driver limits the concurrency and the time.

        Raises:
            ExchangeFailed: no connection could be made, it broke, or the time was up.
        """
        replies: list[Reply] = []
        connection = self.idle(request.node)
        fresh, sent = connection is None, False
        try:
            if connection is None:
                connection = yield from self._connected(request.node)
            sent = True
            yield Talk(connection, request.payload, request.count, replies)
        except BaseException as error:
            failure = self.failure(error, request, connection, replies, sent=sent, fresh=fresh)
            if failure is None:
                raise
            raise failure from None
        self.keep(request.node, connection)
        return replies

    def idle(self, node: Node) -> C | None:
        """Take an idle connection, if any."""
        if self.closed:
            raise ExchangeFailed(CLOSED, sent=False, final=True, local=True)
        stack = self._idle.get(node)
        try:
            return stack.pop() if stack else None
        except IndexError:  # another thread took the last one
            return None

    def keep(self, node: Node, connection: C) -> None:
        """Return a connection, whose replies were all read, to the idle connections."""
        if self.closed:
            self._drop(node, connection)
            return
        stack = self._idle.get(node)
        if stack is None:
            stack = self._idle.setdefault(node, deque())
        stack.append(connection)

    def failure(
        self,
        error: BaseException,
        request: Exchange,
        connection: C | None,
        replies: list[Reply],
        *,
        sent: bool = True,
        fresh: bool = False,
    ) -> ExchangeFailed | None:
        """Drop the connections that an error broke. Return the failure, or None if it is not a connection error.

        Args:
            error: the error raised in the driver.
            request: the exchange.
            connection: its connection; None if there was none yet.
            replies: the replies that arrived before the error.
            sent: whether the payload may have reached the server.
            fresh: whether the connection was opened for this exchange.
        """
        if connection is not None:
            self._drop(request.node, connection)
        failure = self._connector.failure(error, request.timeout_s, replies, sent=sent, fresh=fresh)
        if failure is not None and not fresh:  # the idle ones lead to the same dead server
            self._drop_idle(request.node)
        return failure

    def _connected(self, node: Node) -> Generator[Open | Connect[C] | Talk[C], Any, C]:
        """Return a new connection whose server has passed the handshake."""
        connection: C = yield Open(node)
        try:
            yield Connect(connection)
            if self._handshake is not None and not (node.sentinel or self._ready.get(node)):
                handshake_replies: list[Reply] = []
                yield Talk(connection, self._handshake.request(), REPLIES, handshake_replies)
                refusal = self._handshake.parse(handshake_replies)
                if refusal is not None:
                    raise ExchangeFailed(str(refusal), sent=False, final=True, error=refusal)
        except BaseException:
            self._close_one(connection)
            raise
        ready = self._ready.setdefault(node, set())
        ready.add(weakref.ref(connection, ready.discard))
        return connection

    def close(self) -> None:
        """Close idle connections; connections in use close when their exchange ends."""
        self.closed = True
        for node in list(self._idle):
            self._drop_idle(node)

    def _drop(self, node: Node, connection: C) -> None:
        self._ready.get(node, set()).discard(weakref.ref(connection))
        self._close_one(connection)

    def _drop_idle(self, node: Node) -> None:
        stack = self._idle.get(node)
        while stack:
            with contextlib.suppress(IndexError):  # another thread took the last one
                self._drop(node, stack.pop())
