"""A bus connection: the link to one node, over which the messages of its channels arrive."""

from __future__ import annotations

import contextlib
import socket
import time
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from redis.connection import Connection
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from agentperf_redis.errors import AgentPerfError, shown
from agentperf_redis.random_numbers import uniform
from agentperf_redis.transport.connector import Connector, broken, refused
from agentperf_redis.transport.delivery import ExchangeFailed
from agentperf_redis.transport.resp import pack
from agentperf_redis.transport.topology import Node

LOST_AFTER_S = 1.5
"""If a ping is not answered for this long, the connection is considered lost."""

_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.02, 1.0
_REFUSED_BACKOFF_S = 10.0
"""Backoff after a refusal whose cause only an operator can remove: an ACL, a password, a certificate."""
_MAX_UNANSWERED = 128
"""Maximum requests in flight on a connection. This many fit into the socket buffer, so sending never blocks."""
_MAX_AT_ONCE = 512
"""Maximum replies read from one connection before the other connections are read."""


class BusReply(NamedTuple):
    """A reply or a message from a node.

    Attributes:
        kind: "smessage", "ssubscribe", "sunsubscribe" or "refused".
        channel: the channel.
        payload: the message, or the text of the refusal.
        request: the kind of the refused request; otherwise empty.
    """

    kind: str
    channel: str
    payload: bytes = b""
    request: str = ""


class BusConnection:
    """The link to one node: open, being opened, or waiting after a failure. Used on the thread of the bus only.

    Attributes:
        node: the node.
        dialling: whether another thread is making a connection (`dial`).
        failures: consecutive failures.
        retry_at: earliest time of the next connection attempt, by `time.monotonic`.
        channels: the channels of this node, in any state.
        confirmed: send time of the newest answered ping, by `time.monotonic`; 0.0 if none was answered.
    """

    def __init__(self, node: Node) -> None:
        self.node = node
        self.dialling = False
        self.failures = 0
        self.retry_at = 0.0
        self.channels: set[str] = set()
        self.confirmed = 0.0
        self._connection: Connection | None = None
        self._fresh: Connection | None = None
        self._proven_at = 0.0
        self._unanswered: deque[tuple[str, str]] = deque()
        """Kind and channel of each request without a reply yet. Messages may arrive between the replies."""
        self._ping_sent = 0.0
        self._ping_open = self._ping_soon = False

    def __str__(self) -> str:
        return f"{self.node.host}:{self.node.port}" if self.node.port else self.node.host or "the embedded server"

    @property
    def is_open(self) -> bool:
        """Whether the node is connected."""
        return self._connection is not None

    @property
    def has_capacity(self) -> bool:
        """Whether another request may be sent now. Each reply makes room for one request."""
        return self._connection is not None and len(self._unanswered) < _MAX_UNANSWERED

    @property
    def socket(self) -> socket.socket | None:
        """The socket to watch for incoming data."""
        return None if self._connection is None else self._connection._sock  # noqa: SLF001  not public in redis-py

    def dial(self, connector: Connector) -> None:
        """Make a connection, which `open` then uses. May block for seconds, so it is called on another thread.

        Raises:
            ExchangeFailed: no connection could be made.
        """
        try:
            fresh = connector.connection(self.node)
        except AgentPerfError as error:  # the embedded server could not be started
            raise ExchangeFailed(str(error), sent=False, final=True) from None
        try:
            fresh.connect()
        except (RedisError, OSError) as error:
            fresh.disconnect()
            raise connector.unconnected(error) from None
        self._fresh = fresh

    def open(self) -> None:
        """Start to use the connection that `dial` made."""
        self._connection, self._fresh = self._fresh, None
        self._unanswered.clear()
        self._proven_at = self.confirmed = 0.0
        self._ping_open, self._ping_soon = False, True

    def close(self) -> bool:
        """Close the connection. Return whether it was open."""
        was_open = self.is_open
        for connection in (self._connection, self._fresh):
            if connection is not None:
                with contextlib.suppress(RedisError, OSError):
                    connection.disconnect()
        self._connection = self._fresh = None
        return was_open

    def prove(self) -> bool:
        """Record that a channel is subscribed. Return whether it is the first channel on this connection."""
        first = not self._proven_at
        self._proven_at = self._proven_at or time.monotonic()
        self._ping_soon = True
        return first

    def back_off(self, *, final: bool) -> None:
        """Back off after a failure. The pause grows with each consecutive failure, up to a maximum.

        The count of failures is reset only if the connection had a subscribed channel for longer than `_MAX_BACKOFF_S`.
        A connect alone does not reset it. If it did, this process would flood a server that accepts connections and
        soon drops them.
        """
        now = time.monotonic()
        lasted = self._proven_at and now - self._proven_at > _MAX_BACKOFF_S
        self.failures = 1 if lasted else self.failures + 1
        self.retry_at = now + backoff_s(self.failures, final=final)

    def request(self, kind: str, channel: str = "") -> None:
        """Send a request.

        Raises:
            ExchangeFailed: the connection broke.
        """
        if self._connection is None:
            raise ExchangeFailed("not connected", sent=False)
        self._unanswered.append((kind, channel))
        try:
            self._connection.send_packed_command((pack((kind, channel) if channel else (kind,)),), check_health=False)
        except (RedisError, OSError) as error:
            raise broken(error, (), fresh=False) from None

    def ping(self, every_s: float) -> float:
        """Send a ping if one is due. Return when to call this method next, as a time of `time.monotonic`.

        Raises:
            ExchangeFailed: the previous ping was not answered in time, or the connection broke.
        """
        now = time.monotonic()
        if not self._ping_open:
            due = now if self._ping_soon else self._ping_sent + every_s
            if now < due:
                return due
            self._ping_sent, self._ping_open, self._ping_soon = now, True, False
            self.request("ping")
        elif now > self._ping_sent + LOST_AFTER_S:
            raise ExchangeFailed(f"a ping was not answered for {LOST_AFTER_S:g} s", sent=True)
        return self._ping_sent + LOST_AFTER_S

    def read(self) -> Iterator[BusReply | None]:
        """Yield the replies that have arrived, without waiting. A None at the end means that more may have arrived.

        Raises:
            ExchangeFailed: the connection broke.
        """
        for _ in range(_MAX_AT_ONCE):
            connection = self._connection
            try:
                if connection is None:
                    return
                reply = connection.read_response(disable_decoding=True, timeout=0, disconnect_on_error=False)
            except RedisTimeoutError:  # nothing arrived, or only a part of a reply, or a TLS record without data
                return
            except ResponseError as error:
                request, channel = self._unanswered.popleft() if self._unanswered else ("", "")
                if not channel:
                    raise refused(error) from None
                yield BusReply("refused", channel, str(error).encode(), request)
                continue
            except (RedisError, OSError, TypeError) as error:  # a TypeError has the same cause as in `connector.read`
                raise broken(error, (), fresh=False) from None
            # Without a subscription, a connection is not in subscriber mode, and the reply to a ping is a plain PONG.
            try:
                first, name, payload = (*(reply if isinstance(reply, list) else (reply.lower(), b"")), b"")[:3]
                kind, channel = first.decode(), name.decode()
            except (AttributeError, ValueError):
                raise ExchangeFailed(f"an unexpected message {shown(reply)}", sent=True) from None
            if kind == "pong":
                self._ping_open, self.confirmed = False, self._ping_sent
                kind = "ping"
            if self._unanswered and self._unanswered[0] == (kind, channel):
                self._unanswered.popleft()
            if kind != "ping":
                yield BusReply(kind, channel, payload if kind == "smessage" and isinstance(payload, bytes) else b"")
        yield None


def backoff_s(failures: int, *, final: bool = False) -> float:
    """Return the backoff in seconds after a number of consecutive failures.

    It is random, so that many clients do not retry at the same time.
    """
    maximum = _REFUSED_BACKOFF_S if final else min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** min(failures - 1, 16))
    return uniform(maximum / 2, maximum)
