"""The one listener thread of a process: hints and invalidations that scripts publish, brought to whoever subscribed.

Sharded channels (SPUBLISH) are used, which in a Cluster reach the one node that owns the channel's slot; there is one
connection for each such node. A message may be lost with its connection, so a subscriber is told of every gap and must
take messages as hints, or drop what it holds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import selectors
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from redis.connection import Connection
from redis.exceptions import RedisError

from agentperf_redis.connector import Connector
from agentperf_redis.errors import AgentPerfError
from agentperf_redis.resp import pack
from agentperf_redis.topology import Node

_log = logging.getLogger("agentperf_redis")

PING_EVERY_S = 0.1
"""How often the connection is asked whether it still brings messages. See `Bus.confirmed_at`."""
_IDLE_PING_EVERY_S = 2.0
"""The same while nobody asks."""
_ASKED_RECENTLY_S = 5.0
_LOST_AFTER_S = 1.5
"""A ping unanswered for so long means that the connection is lost."""
_LONGEST_REST_S = 1.0


class Subscription:
    """What `Bus.subscribe` returns: closing it ends the messages."""

    __slots__ = ("_bus", "channel", "listener", "on_gap")

    def __init__(self, bus: Bus, channel: str, listener: Callable[[bytes], None], on_gap: Callable[[], None]) -> None:
        self._bus = bus
        self.channel = channel
        self.listener = listener
        self.on_gap = on_gap

    def close(self) -> None:
        """End it. A message that is being brought at this moment may still arrive."""
        self._bus._remove(self)  # noqa: SLF001  one thing in two classes


@dataclass(slots=True)
class _Line:
    """The connection to one node."""

    connection: Connection
    channels: set[str] = field(default_factory=set)
    """Asked for; confirmed ones have their on_gap called."""
    ping_sent: float = 0.0
    ping_open: bool = False


class Bus:
    """Brings published messages to listeners, on one daemon thread that starts with the first subscription.

    Args:
        connector: makes the connections.
        locate: returns the node that owns a channel, or None; may block, may raise an AgentPerfError.
        forget: called when a node turned out not to own a channel any more.
    """

    def __init__(self, connector: Connector, locate: Callable[[str], Node | None], forget: Callable[[], None]) -> None:
        self._connector = connector
        self._locate = locate
        self._forget = forget
        self._subscriptions: dict[str, list[Subscription]] = {}
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wake_read, self._wake_write = -1, -1
        self._confirmed: dict[str, float] = {}
        self._asked_at = 0.0
        self._closed = False
        self._inherited: list[object] = []

    def subscribe(self, channel: str, listener: Callable[[bytes], None], on_gap: Callable[[], None]) -> Subscription:
        """Have `listener` called with each message of a channel. Returns at once.

        Args:
            channel: a channel that scripts SPUBLISH to.
            listener: called on the bus's thread; must be quick.
            on_gap: called there whenever messages may have been missed: when the subscription has come about, when the
                connection was lost, and when it is there again.
        """
        subscription = Subscription(self, channel, listener, on_gap)
        with self._lock:
            self._subscriptions.setdefault(channel, []).append(subscription)
            known = len(self._subscriptions[channel]) > 1 and channel in self._confirmed
            self._run_thread()
        self._wake()
        if known:
            on_gap()
        return subscription

    def confirmed_at(self, channel: str) -> float:
        """Return when the newest answered ping on the channel's connection was sent, by `time.monotonic`; 0.0 if none.

        All messages published before that moment have been brought to their listeners. Asking keeps the pings frequent.
        """
        now = time.monotonic()
        idle, self._asked_at = now - self._asked_at > _ASKED_RECENTLY_S, now
        if idle:
            self._wake()  # the thread sleeps until the next idle ping
        return self._confirmed.get(channel, 0.0)

    def close(self) -> None:
        """End the thread and its connections."""
        with self._lock:
            self._closed = True
            thread = self._thread
        self._wake()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=2 * _LOST_AFTER_S)

    def after_fork(self) -> None:
        """In a forked child: the thread is gone; connections belong to the parent and stay referenced, untouched."""
        inherited = [*self._inherited, self._thread]
        subscriptions = bool(self._subscriptions)
        self._reset()
        self._inherited = inherited
        if subscriptions:
            with self._lock:
                self._run_thread()

    def _remove(self, subscription: Subscription) -> None:
        with self._lock:
            left = self._subscriptions.get(subscription.channel, [])
            if subscription in left:
                left.remove(subscription)
            if not left:
                self._subscriptions.pop(subscription.channel, None)
                self._confirmed.pop(subscription.channel, None)
        self._wake()

    def _run_thread(self) -> None:
        if self._thread is None and not self._closed:
            self._wake_read, self._wake_write = os.pipe()
            os.set_blocking(self._wake_write, False)
            self._thread = threading.Thread(target=self._listen, name="agentperf-bus", daemon=True)
            self._thread.start()

    def _wake(self) -> None:
        with self._lock:
            if self._wake_write >= 0:
                with contextlib.suppress(BlockingIOError):
                    os.write(self._wake_write, b"!")

    # Everything below runs on the bus's thread.

    def _listen(self) -> None:
        lines: dict[Node, _Line] = {}
        rest, wake_read = 0.0, self._wake_read
        try:
            while not self._closed:
                trouble = self._arrange(lines)
                if trouble:
                    if not rest:
                        _log.warning("bus: lost (%s); local copies are off until it is back", trouble)
                    rest = min(_LONGEST_REST_S, 2 * rest or 0.02)
                elif rest:
                    rest = 0.0
                    _log.warning("bus: back")
                self._await_something(lines, wake_read, random.uniform(rest / 2, rest) if rest else None)
                for node in list(lines):
                    try:
                        self._read(lines[node])
                        self._ping(lines[node])
                    except (RedisError, OSError):
                        self._drop(lines, node)
        finally:
            for line in lines.values():
                line.connection.disconnect()
            with self._lock:
                os.close(self._wake_read)
                os.close(self._wake_write)
                self._wake_read = self._wake_write = -1

    def _arrange(self, lines: dict[Node, _Line]) -> str:
        """Have each wanted channel subscribed where it belongs. Returns what kept it from that, or an empty text."""
        with self._lock:
            wanted = set(self._subscriptions)
        for node, line in list(lines.items()):
            gone = line.channels - wanted
            if gone:
                try:
                    for channel in gone:
                        line.connection.send_packed_command((pack(("SUNSUBSCRIBE", channel)),), check_health=False)
                    line.channels -= gone
                except (RedisError, OSError):
                    self._drop(lines, node)
        missing = wanted.difference(*(line.channels for line in lines.values()))
        for channel in missing:
            try:
                node_or_none = self._locate(channel)
            except AgentPerfError as error:
                return str(error)
            if node_or_none is None:
                return "the layout of the Cluster is unknown"
            node = node_or_none
            try:
                line_or_none = lines.get(node)
                if line_or_none is None:
                    connection = self._connector.connection(node)
                    connection.connect()
                    line_or_none = lines[node] = _Line(connection)
                line_or_none.connection.send_packed_command((pack(("SSUBSCRIBE", channel)),), check_health=False)
                line_or_none.channels.add(channel)
            except (RedisError, OSError, AgentPerfError) as error:
                self._drop(lines, node)
                return str(error)
        return ""

    def _await_something(self, lines: dict[Node, _Line], wake_read: int, rest: float | None) -> None:
        patience = self._ping_every() if lines else _IDLE_PING_EVERY_S
        with selectors.DefaultSelector() as selector:
            selector.register(wake_read, selectors.EVENT_READ)
            for line in lines.values():
                sock = line.connection._sock  # noqa: SLF001  redis-py hands out no file descriptor
                if sock is not None:
                    selector.register(sock, selectors.EVENT_READ)
            for key, _ in selector.select(patience if rest is None else rest):
                if key.fd == wake_read:
                    os.read(wake_read, 4096)

    def _ping_every(self) -> float:
        asked = time.monotonic() - self._asked_at < _ASKED_RECENTLY_S
        return PING_EVERY_S if asked else _IDLE_PING_EVERY_S

    def _read(self, line: _Line) -> None:
        connection = line.connection
        while connection.can_read(timeout=0):
            kind, name, payload = (*connection.read_response(disable_decoding=True, timeout=_LOST_AFTER_S), None)[:3]
            if kind == b"pong":
                line.ping_open = False
                for channel in line.channels & set(self._confirmed):
                    self._confirmed[channel] = line.ping_sent
                continue
            channel = name.decode()
            if kind == b"smessage":
                self._tell(channel, payload or b"")
            elif kind == b"ssubscribe":
                self._confirmed[channel] = 0.0
                line.ping_sent = 0.0  # ask at once
                self._tell(channel, None)
            elif kind == b"sunsubscribe" and channel in line.channels:  # its slot has moved
                line.channels.discard(channel)
                self._lose(channel)
                self._forget()

    def _ping(self, line: _Line) -> None:
        now = time.monotonic()
        if line.ping_open:
            if now - line.ping_sent > _LOST_AFTER_S:
                raise OSError("the bus's ping was not answered")
        elif now - line.ping_sent >= self._ping_every():
            line.ping_sent, line.ping_open = now, True
            line.connection.send_packed_command((pack(("PING",)),), check_health=False)

    def _drop(self, lines: dict[Node, _Line], node: Node) -> None:
        self._forget()
        line = lines.pop(node, None)
        if line is not None:
            line.connection.disconnect()
            for channel in line.channels:
                self._lose(channel)

    def _lose(self, channel: str) -> None:
        self._confirmed.pop(channel, None)
        self._tell(channel, None)

    def _tell(self, channel: str, message: bytes | None) -> None:
        """Bring a message, or with None the news of a gap."""
        with self._lock:
            subscriptions = list(self._subscriptions.get(channel, ()))
        for subscription in subscriptions:
            try:
                if message is None:
                    subscription.on_gap()
                else:
                    subscription.listener(message)
            except Exception:  # noqa: BLE001  a listener's fault must not end the others' messages
                _log.exception("bus: a listener of %s failed", channel)
