"""How one exchange goes: which connection carries it, what is said first on a new one, what an error does to which.

`Connections.exchange` is a generator without I/O, as `delivery.deliver` is. It yields what a driver has to do (`Open` a
connection, `Connect` it, `Talk` on it), so that the blocking and the asyncio driver share the idle connections, the
greeting and the reading of errors. A connection is held by one exchange at a time, and dropped on any exception before
its replies were fully read, so that no reply can reach the wrong caller.
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

CLOSED = "this client was closed"
MAX_CONNECTIONS = 32
"""Exchanges under way at once per driver and process; the usual maxclients of 10,000 then serves 300 processes."""
BUSY = f"all {MAX_CONNECTIONS} connections of this process were busy"


@dataclass(frozen=True, slots=True)
class Open:
    """Make a connection to a node, and return it; it is not connected yet."""

    node: Node


@dataclass(frozen=True, slots=True)
class Connect(Generic[C]):
    """Connect a connection."""

    connection: C


@dataclass(slots=True)  # not frozen: one is made for each exchange, and that doubles what it takes
class Talk(Generic[C]):
    """Send `payload`, and put as many replies as there are into `replies` one by one: those before a failure count."""

    connection: C
    payload: bytes
    count: int
    replies: list[Reply]


ExchangeFlow: TypeAlias = Generator[Open | Connect[C] | Talk[C], C | None, list[Reply]]


class Connections(Generic[C]):
    """The connections of one driver. Safe to share between threads.

    Args:
        connector: knows what an error means.
        handshake: what is said first on a connection; None says nothing.
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
        """Connections that are up, idle or in use, and whose server was looked at.

        Weakly, so that one that a signal handler's exception took from its exchange is closed: nothing else has it.
        """
        self.closed = False

    def exchange(self, asked: Exchange) -> ExchangeFlow[C]:
        """Send bytes to a node and return its replies. The driver has a place for it, and keeps the time.

        Raises:
            ExchangeFailed: there is no connection to be had, it broke, or it was too late.
        """
        replies: list[Reply] = []
        connection = self.idle(asked.node)
        fresh, sent = connection is None, False
        try:
            if connection is None:
                connection = yield from self._connected(asked.node)
            sent = True
            yield Talk(connection, asked.payload, asked.count, replies)
        except BaseException as error:
            failure = self.failure(error, asked, connection, replies, sent=sent, fresh=fresh)
            if failure is None:
                raise
            raise failure from None
        self.keep(asked.node, connection)
        return replies

    def idle(self, node: Node) -> C | None:
        """Take an idle connection, if there is one."""
        if self.closed:
            raise ExchangeFailed(CLOSED, sent=False, final=True, local=True)
        stack = self._idle.get(node)
        try:
            return stack.pop() if stack else None
        except IndexError:  # another thread took the last one
            return None

    def keep(self, node: Node, connection: C) -> None:
        """Have a connection, whose replies were all read, for the next exchange."""
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
        asked: Exchange,
        connection: C | None,
        replies: list[Reply],
        *,
        sent: bool = True,
        fresh: bool = False,
    ) -> ExchangeFailed | None:
        """Drop what an error has ended; return what it means, or None if it is no trouble of the connection.

        Args:
            error: what the driver met.
            asked: the exchange.
            connection: what carried it; None if there was none yet.
            replies: those that had arrived before.
            sent: whether the payload may have reached the server.
            fresh: whether the connection was made for this exchange.
        """
        if connection is not None:
            self._drop(asked.node, connection)
        failure = self._connector.failure(error, asked.timeout_s, replies, sent=sent, fresh=fresh)
        if failure is not None and not fresh:  # the others were opened to the same server before; they are as dead
            self._drop_idle(asked.node)
        return failure

    def _connected(self, node: Node) -> Generator[Open | Connect[C] | Talk[C], Any, C]:
        """Return a new connection on which the server was looked at."""
        connection: C = yield Open(node)
        try:
            yield Connect(connection)
            if self._handshake is not None and not (node.sentinel or self._ready.get(node)):
                heard: list[Reply] = []
                yield Talk(connection, self._handshake.request(), REPLIES, heard)
                refusal = self._handshake.parse(heard)
                if refusal is not None:
                    raise ExchangeFailed(str(refusal), sent=False, final=True, error=refusal)
        except BaseException:
            self._close_one(connection)
            raise
        ready = self._ready.setdefault(node, set())
        ready.add(weakref.ref(connection, ready.discard))
        return connection

    def close(self) -> None:
        """Close idle connections; those in use close as their exchange ends."""
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
