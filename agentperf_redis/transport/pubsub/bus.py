"""The bus: hints and invalidations that scripts publish, brought to whoever subscribed.

Sharded channels (SPUBLISH) are used, which in a Cluster reach the one node that owns the channel's slot; there is one
connection, a line, for each such node, and one thread for all of them. A message may be lost with its line, so a
subscriber is told of every gap and must take messages as hints, or drop what it holds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from agentperf_redis.transport.connector import Connector
from agentperf_redis.transport.pubsub.listener import Listener
from agentperf_redis.transport.pubsub.subscriptions import Subscription
from agentperf_redis.transport.topology import Node


class Bus:
    """Brings published messages to listeners, on one daemon thread that starts with the first subscription.

    Args:
        connector: makes the connections.
        locate: returns the node that owns a channel as far as is known, or None; must not block.
        doubt: called when a node turned out not to own a channel any more.
        learn: finds out again which node owns what, and returns what went wrong or an empty text; may block for a
            while. None where there is one server and nothing to find out.
        on_trouble: called on the bus's thread when a connection was lost; the server that answers next may be another.
    """

    def __init__(
        self,
        connector: Connector,
        locate: Callable[[str], Node | None],
        doubt: Callable[[], None],
        learn: Callable[[], str] | None = None,
        on_trouble: Callable[[], None] = lambda: None,
    ) -> None:
        self._new_listener = partial(Listener, connector, locate, doubt, learn, on_trouble)
        self._lock = threading.Lock()
        self._listener: Listener | None = None
        self._closed = False
        self._inherited: list[object] = []

    def subscribe(self, channel: str, listener: Callable[[bytes], None], on_gap: Callable[[], None]) -> Subscription:
        """Have `listener` called with each message of a channel. Returns at once.

        Args:
            channel: a channel that scripts SPUBLISH to.
            listener: called on the bus's thread; must be quick.
            on_gap: called there, and only there, whenever messages may have been missed: when the subscription has
                come about, when the connection was lost, and when it is there again.
        """
        subscription = Subscription(channel, listener, on_gap, self._remove)
        with self._lock:
            if not self._closed:
                if self._listener is None:
                    self._listener = self._new_listener()
                    self._listener.start()
                self._listener.add(subscription)
        return subscription

    def confirmed_at(self, channel: str) -> float:
        """Return when the newest answered ping on the channel's connection was sent, by `time.monotonic`; 0.0 if none.

        All messages published before that moment have been brought to their listeners. Asking keeps the pings frequent.
        """
        listener = self._listener
        return 0.0 if listener is None else listener.confirmed_at(channel)

    def close(self) -> None:
        """End the thread and its connections, for good."""
        with self._lock:
            self._closed = True
            listener = self._listener
        if listener is not None:
            listener.stop()

    def after_fork(self) -> None:
        """In a forked child: begin with no subscription and no thread; whoever listens here subscribes again."""
        self._lock = threading.Lock()
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.abandon()
            self._inherited.append(listener)  # never finalized: what it refers to is the parent's

    def _remove(self, subscription: Subscription) -> None:
        with self._lock:
            if self._listener is not None:
                self._listener.remove(subscription)
