"""The thread of the message bus. Only this thread changes the state of channels and connections.

Callers record subscriptions and wake the thread. The wanted state of a channel is subscribed or not subscribed.
Whenever data arrives or a timer is due, the thread moves each channel that is not in its wanted state one step towards
that state. Connects and layout requests may block, so they run on separate short-lived threads. A node that does not
answer must not delay the messages of other nodes.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import selectors
import socket
import threading
import time
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from agentperf_redis.background import starter
from agentperf_redis.last_resort import OUTAGE
from agentperf_redis.transport.connector import Connector
from agentperf_redis.transport.delivery import ExchangeFailed
from agentperf_redis.transport.pubsub.connection import LOST_AFTER_S, BusConnection, BusReply, backoff_s
from agentperf_redis.transport.pubsub.subscriptions import Subscribers, Subscription, guarded
from agentperf_redis.transport.topology import Node

_log = logging.getLogger("agentperf_redis")

PING_EVERY_S = 0.1
"""Ping interval while `Bus.confirmed_at` is called often. A ping confirms that a connection still delivers messages."""
_IDLE_PING_EVERY_S = 2.0
"""Ping interval while `Bus.confirmed_at` is not called."""
_QUERIED_RECENTLY_S = 5.0
_FAULT_BACKOFF_S = 1.0
_FOR_GOOD = ("NOPERM", "NOAUTH", "DENIED", "ERR unknown")
"""Beginnings of permanent error replies. After such a reply, a retry would not help."""
_REFUSED, _LAYOUT = "refused channels", "the layout of the Cluster"


class _State(enum.Enum):
    """The subscription state of a channel."""

    MISSING = enum.auto()
    REQUESTED = enum.auto()
    LIVE = enum.auto()
    LEAVING = enum.auto()


@dataclass(slots=True, eq=False)
class _Channel:
    """A channel that has subscribers, or that has lost them and is still subscribed on its node."""

    name: str
    state: _State = _State.MISSING
    connection: BusConnection | None = None
    """The connection to the node that owns the channel, according to the layout at the last check."""
    refusals: int = 0
    retry_at: float = 0.0


class Listener:
    """The message bus thread of one process, with its state. Arguments as for `Bus`."""

    def __init__(
        self,
        connector: Connector,
        locate: Callable[[str], Node | None],
        doubt: Callable[[], None],
        learn: Callable[[], str] | None,
        on_trouble: Callable[[], None],
    ) -> None:
        self._connector = connector
        self._locate = locate
        self._doubt = doubt
        self._learn = learn
        self._on_trouble = on_trouble
        self._thread = threading.Thread(target=self._listen, name="agentperf-bus", daemon=True)
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._subscribers = Subscribers()
        self._lock = threading.Lock()
        self._arrivals: deque[Callable[[], None]] = deque()
        self._stopping = self._ended = False
        self._queried_at = 0.0
        # Only the thread of the bus changes the attributes below.
        self._channels: dict[str, _Channel] = {}
        self._unsettled: set[str] = set()
        """Channels that are not yet in their wanted state."""
        self._connections: dict[Node, BusConnection] = {}
        self._layout_wanted = self._layout_requested = False
        self._layout_requests = 0
        self._layout_retry_at = 0.0
        self._faults: dict[str, set[str]] = {}
        self._due = 0.0
        """Time of the next iteration of the thread if no data arrives."""

    # The methods below may be called on any thread.

    def start(self) -> None:
        """Start the thread."""
        start_new_thread(starter(self._thread, self._listen), ())

    def add(self, subscription: Subscription) -> None:
        """Deliver the messages of a channel to a subscription."""
        self._subscribers.add(subscription)
        self._wake()

    def remove(self, subscription: Subscription) -> None:
        """Stop delivering to a subscription."""
        self._subscribers.remove(subscription)
        self._wake()

    def confirmed_at(self, name: str) -> float:
        """See `Bus.confirmed_at`. Takes no lock."""
        now = time.monotonic()
        idle, self._queried_at = now - self._queried_at > _QUERIED_RECENTLY_S, now
        if idle:
            # From now on, the thread must ping more often. Without a wake-up, it might sleep until the next idle ping.
            self._wake()
        channel = self._channels.get(name)
        connection = None if channel is None or channel.state is not _State.LIVE else channel.connection
        return 0.0 if connection is None else connection.confirmed

    def stop(self) -> None:
        """End the thread and its connections."""
        self._stopping = True
        self._wake()
        if self._thread is not threading.current_thread() and self._thread.is_alive():
            self._thread.join(timeout=2 * LOST_AFTER_S)

    def abandon(self) -> None:
        """In a forked child: close the inherited descriptors. The connections of the parent stay open."""
        sockets = [self._wake_read, self._wake_write, *(connection.socket for connection in self._connections.values())]
        for each in sockets:
            if each is not None:
                with contextlib.suppress(OSError):
                    each.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # the socket is full (a wake-up is pending) or closed (the thread has ended)
            self._wake_write.send(b"!")

    # The methods below run on separate threads, because `_dial` and `_request_layout` block.

    def _dial(self, connection: BusConnection) -> None:
        failed = None
        try:
            connection.dial(self._connector)
        except ExchangeFailed as error:
            failed = error
        except Exception as error:  # noqa: BLE001  `_dialled` must run in any case, to reset `dialling`
            failed = ExchangeFailed(repr(error), sent=False)
        if not self._post(partial(self._dialled, connection, failed)):
            connection.close()

    def _request_layout(self, learn: Callable[[], str]) -> None:
        try:
            fault = learn()
        except Exception as error:  # noqa: BLE001  `_learned` must run in any case, to reset `_layout_requested`
            fault = repr(error)
        self._post(partial(self._learned, fault))

    def _post(self, arrival: Callable[[], None]) -> bool:
        """Run a callback on the thread. Return False if the thread has ended."""
        with self._lock:
            if self._ended:
                return False
            self._arrivals.append(arrival)
        self._wake()
        return True

    # Everything below runs on the thread of the bus.

    def _listen(self) -> None:
        while not self._stopping:
            try:
                self._round()
            except BaseException:  # noqa: BLE001  the thread must not end: messages would be lost unnoticed
                _log.exception("bus: an internal fault; reconnecting")
                with contextlib.suppress(Exception):
                    for connection in list(self._connections.values()):
                        self._fail(connection, "reconnecting after an internal fault")
                time.sleep(_FAULT_BACKOFF_S)
        with self._lock:
            self._ended = True
        for connection in self._connections.values():
            connection.close()
        self._wake_write.close()
        self._wake_read.close()

    def _round(self) -> None:
        self._await_something()
        now = time.monotonic()
        self._due = now + _IDLE_PING_EVERY_S
        while self._arrivals:
            self._arrivals.popleft()()
        self._each_open_connection(self._read)
        self._unsettled |= self._subscribers.take_changed()
        for name in list(self._unsettled):
            self._settle(name, now)
        if self._layout_wanted:
            self._find_layout(now)
        self._each_open_connection(self._ping)
        for connection in [
            connection for connection in self._connections.values() if not (connection.channels or connection.dialling)
        ]:
            del self._connections[connection.node]
            connection.close()
            self._log_recovery(f"the connection to {connection}", "", "is no longer needed")

    def _await_something(self) -> None:
        with selectors.PollSelector() as selector:  # unlike epoll, poll has no descriptor that a fork would leak
            selector.register(self._wake_read, selectors.EVENT_READ)
            for connection in self._connections.values():
                if connection.socket is not None:
                    selector.register(connection.socket, selectors.EVENT_READ)
            selector.select(max(0.0, self._due - time.monotonic()))
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(4096)

    def _each_open_connection(self, work: Callable[[BusConnection], None]) -> None:
        for connection in list(self._connections.values()):
            if connection.is_open:
                try:
                    work(connection)
                except ExchangeFailed as failed:
                    self._fail(connection, failed.reason, final=failed.final)
                except Exception as error:  # noqa: BLE001  the other connections must continue
                    _log.exception("bus: a fault on the connection to %s", connection)
                    self._fail(connection, repr(error))

    # Channels

    def _settle(self, name: str, now: float) -> None:
        """Move a channel one step towards its wanted state, subscribed or not subscribed."""
        channel = self._channels.get(name)
        if channel is None:
            channel = self._channels[name] = _Channel(name)
        wanted = self._subscribers.has(name)
        if channel.state is _State.LIVE and wanted:
            self._unsettled.discard(name)
            self._subscribers.notify_gap(name, only_new=True)
        elif channel.state is _State.LIVE:
            self._request(channel, "sunsubscribe", _State.LEAVING)
        elif channel.state is _State.MISSING and wanted:
            self._subscribe(channel, now)
        elif channel.state is _State.MISSING:
            self._assign(channel, None)
            self._unsettled.discard(name)
            del self._channels[name]
            self._log_recovery(_REFUSED, name, "are no longer subscribed")

    def _subscribe(self, channel: _Channel, now: float) -> None:
        if now < channel.retry_at:
            self._due = min(self._due, channel.retry_at)
            return
        node = self._locate(channel.name)
        if node is None:
            self._layout_wanted = True
            return
        connection = self._connections.get(node)
        if connection is None:
            connection = self._connections[node] = BusConnection(node)
        self._assign(channel, connection)
        if connection.is_open:
            self._request(channel, "ssubscribe", _State.REQUESTED)
        elif not connection.dialling:
            if now < connection.retry_at:
                self._due = min(self._due, connection.retry_at)
            else:
                self._start(partial(self._dial, connection))
                connection.dialling = True

    def _assign(self, channel: _Channel, connection: BusConnection | None) -> None:
        if channel.connection is not connection:
            if channel.connection is not None:
                channel.connection.channels.discard(channel.name)
            if connection is not None:
                connection.channels.add(channel.name)
            channel.connection = connection

    def _request(self, channel: _Channel, kind: str, then: _State) -> None:
        connection = channel.connection
        if connection is None or not connection.has_capacity:
            return  # if the connection is full, its next reply makes room for this request and wakes the thread
        try:
            connection.request(kind, channel.name)
            channel.state = then
        except ExchangeFailed as failed:
            self._fail(connection, failed.reason)

    def _lose(self, channel: _Channel) -> None:
        was, channel.state = channel.state, _State.MISSING
        self._unsettled.add(channel.name)
        if was is _State.LIVE:
            self._subscribers.notify_gap(channel.name)

    # Connections

    def _start(self, work: Callable[[], None]) -> None:
        threading.Thread(target=work, name="agentperf-bus-aside", daemon=True).start()

    def _dialled(self, connection: BusConnection, failed: ExchangeFailed | None) -> None:
        connection.dialling = False
        if failed is None:
            connection.open()
        else:
            self._fail(connection, failed.reason, final=failed.final)

    def _fail(self, connection: BusConnection, reason: str, *, final: bool = False) -> None:
        """Handle a connection that broke or could not be made."""
        broke = connection.close()
        connection.back_off(final=final)
        self._due = min(self._due, connection.retry_at)
        self._layout_wanted = True  # another node may have taken over
        self._log_fault(f"the connection to {connection}", "", reason)
        for name in list(connection.channels):
            self._lose(self._channels[name])
        if broke:
            guarded(self._on_trouble)

    def _find_layout(self, now: float) -> None:
        if self._learn is None or not self._unsettled:
            self._layout_wanted = False
        elif not self._layout_requested:
            if now < self._layout_retry_at:
                self._due = min(self._due, self._layout_retry_at)
            else:
                self._start(partial(self._request_layout, self._learn))
                self._layout_wanted, self._layout_requested = False, True

    def _learned(self, fault: str) -> None:
        self._layout_requested = False
        self._layout_requests += 1  # `_handle_reply` resets this when a subscription shows that the layout is right
        self._layout_retry_at = time.monotonic() + backoff_s(self._layout_requests)
        if fault:
            self._layout_wanted = True
            self._log_fault(_LAYOUT, "", fault)
        else:
            self._log_recovery(_LAYOUT, "", "is known again")

    def _ping(self, connection: BusConnection) -> None:
        queried = time.monotonic() - self._queried_at < _QUERIED_RECENTLY_S
        self._due = min(self._due, connection.ping(PING_EVERY_S if queried else _IDLE_PING_EVERY_S))

    # Replies

    def _read(self, connection: BusConnection) -> None:
        for reply in connection.read():
            if reply is None:
                self._due = 0.0
            elif reply.kind == "smessage":
                self._subscribers.deliver(reply.channel, reply.payload)
            else:
                channel = self._channels.get(reply.channel)
                if channel is not None and channel.connection is connection:
                    self._handle_reply(channel, connection, reply)

    def _handle_reply(self, channel: _Channel, connection: BusConnection, reply: BusReply) -> None:
        if reply.kind == "ssubscribe":
            if connection.prove():
                self._layout_requests = 0
                self._log_recovery(f"the connection to {connection}", "", "is back")
            channel.refusals, channel.retry_at = 0, 0.0
            self._log_recovery(_REFUSED, channel.name, "are subscribed now")
            self._unsettled.add(channel.name)  # if all subscribers have left meanwhile, `_settle` unsubscribes
            self._subscribers.notify_gap(channel.name)
            channel.state = _State.LIVE
            return
        moved = reply.kind == "sunsubscribe" and channel.state is not _State.LEAVING
        if reply.request == "ssubscribe":
            text = reply.payload.decode(errors="replace")
            moved = text.startswith("MOVED")
            channel.refusals += 1
            channel.retry_at = time.monotonic() + backoff_s(channel.refusals, final=text.startswith(_FOR_GOOD))
            if not moved:
                self._log_fault(_REFUSED, channel.name, text)
        if moved:
            self._doubt()
            self._layout_wanted = True
        self._lose(channel)

    # Logging

    def _log_fault(self, subject: str, item: str, reason: str) -> None:
        """Log a fault when it begins. While the fault lasts, further calls log nothing."""
        if subject not in self._faults:
            _log.warning(
                "bus: %s: %s; until this fault ends, messages are missed and local copies are off",
                subject,
                reason,
                extra=OUTAGE,
            )
        self._faults.setdefault(subject, set()).add(item)

    def _log_recovery(self, subject: str, item: str, ending: str) -> None:
        """Log the end of a fault."""
        entered = self._faults.get(subject)
        if entered is not None:
            entered.discard(item)
            if not entered:
                del self._faults[subject]
                _log.warning("bus: %s %s", subject, ending)
