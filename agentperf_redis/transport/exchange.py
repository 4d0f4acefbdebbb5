"""One exchange with a node: the choice of a connection, the handshake on a new connection, and errors.

`Connections.exchange` is a generator without I/O, like `delivery.deliver`. It yields steps to a driver: `Open` creates
a connection, `Connect` connects it, `Talk` sends and receives. So the blocking driver and the asyncio driver share the
code for idle connections, the handshake and errors. Only one exchange at a time uses a connection. If an exception
occurs before all replies are read, the connection is closed. So no reply can reach the wrong caller.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from agentperf_redis.command import Reply
from agentperf_redis.transport.connector import Connector
from agentperf_redis.transport.delivery import Exchange, ExchangeFailed, transient_reason
from agentperf_redis.transport.handshake import REPLIES, Handshake
from agentperf_redis.transport.resp import ServerError
from agentperf_redis.transport.topology import Node

C = TypeVar("C")

CLOSED = "this client is closed"
MAX_CONNECTIONS = 32
"""Maximum concurrent exchanges per driver and process. The default maxclients of 10,000 is enough for 300 processes."""
BUSY = f"all {MAX_CONNECTIONS} connections of this process were busy"


class Open(NamedTuple):
    """Create a connection to a node, and return it before it is connected."""

    node: Node


class Connect(NamedTuple, Generic[C]):
    """Connect a connection that `Open` created."""

    connection: C


@dataclass(slots=True)  # not frozen: a frozen object takes twice as long to create, and each exchange creates one
class Talk(Generic[C]):
    """Send `payload`, and append `count` replies to `replies` one by one.

    If the exchange fails, the replies that arrived before the failure are used.
    """

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
        """Open connections, idle or in use, to servers that passed the handshake.

        The references are weak. If an exception of a signal handler interrupts an exchange, no other reference to its
        connection is left, so the connection is garbage-collected and closed.
        """
        self.closed = False

    def exchange(self, request: Exchange) -> ExchangeFlow[C]:
        """Send bytes to a node and return the replies. The driver limits the concurrency and the time.

        Raises:
            ExchangeFailed: no connection could be made, the connection broke, or the time was up.
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
        """Take an idle connection to a node. Return None if there is none."""
        if self.closed:
            raise ExchangeFailed(CLOSED, sent=False, final=True, local=True)
        stack = self._idle.get(node)
        try:
            return stack.pop() if stack else None
        except IndexError:  # another thread took the last connection
            return None

    def keep(self, node: Node, connection: C) -> None:
        """Add a connection to the idle connections. All of its replies must have been read."""
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
        """Close the connections that an error affects. Return the failure, or None if it is not a connection error.

        Args:
            error: the error raised in the driver.
            request: the exchange.
            connection: the connection of the exchange; None if there was none yet.
            replies: the replies that arrived before the error.
            sent: whether the payload may have reached the server.
            fresh: whether the connection was opened for this exchange.
        """
        if connection is not None:
            self._drop(request.node, connection)
        failure = self._connector.failure(error, request.timeout_s, replies, sent=sent, fresh=fresh)
        if failure is not None and not fresh:  # the other idle connections of the node are probably dead too
            self._drop_idle(request.node)
        return failure

    def _connected(self, node: Node) -> Generator[Open | Connect[C] | Talk[C], Any, C]:
        """Return a new connection to a server that has passed the handshake, on this connection or on another one."""
        connection: C = yield Open(node)
        handshake_replies: list[Reply] = []
        try:
            yield Connect(connection)
            if self._handshake is not None and not (node.sentinel or self._ready.get(node)):
                yield Talk(connection, self._handshake.request(), REPLIES, handshake_replies)
                refusal = self._handshake.parse(handshake_replies)
                if refusal is not None:
                    raise ExchangeFailed(str(refusal), sent=False, final=True, error=refusal)
        except BaseException as error:
            self._close_one(connection)
            reason = _reason_for_closing(handshake_replies)
            if reason and isinstance(error, Exception):
                raise ExchangeFailed(reason, sent=False) from None
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
            with contextlib.suppress(IndexError):  # another thread took the last connection
                self._drop(node, stack.pop())


def _reason_for_closing(replies: list[Reply]) -> str | None:
    """Return why a server closed a connection during the handshake, if it gave a reason such as maxclients."""
    match replies:
        case [ServerError() as only]:
            return transient_reason(only.text)
    return None
