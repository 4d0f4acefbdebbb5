"""The message bus. It delivers published messages (wake-ups, invalidations) to the listeners of this process.

Scripts publish the messages on sharded channels (SPUBLISH). In a Cluster, only the node that owns the slot of a channel
delivers the messages of this channel. There is one connection for each node with subscribed channels, and one thread
for all connections. When a connection breaks, messages may be lost, so the subscribers of its channels are notified of
a gap. A subscriber must either use messages only as hints to check the state, or drop its local copies after a gap.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from agentperf_redis.transport.connector import Connector
from agentperf_redis.transport.pubsub.subscriptions import Subscription
from agentperf_redis.transport.topology import Node

if TYPE_CHECKING:
    from agentperf_redis.transport.pubsub.listener import Listener


class Bus:
    """Delivers published messages to listeners on one daemon thread, which starts with the first subscription.

    Args:
        connector: creates the connections.
        locate: returns the node that owns a channel in the known layout, or None; must not block.
        doubt: called when a node no longer owns a channel.
        learn: refreshes the layout, and returns an error text, or an empty text on success. It may block for a while.
            Pass None if the layout is fixed.
        on_trouble: called on the thread of the bus when a connection is lost. The next connection may lead to another
            server.
    """

    def __init__(
        self,
        connector: Connector,
        locate: Callable[[str], Node | None],
        doubt: Callable[[], None],
        learn: Callable[[], str] | None = None,
        on_trouble: Callable[[], None] = lambda: None,
    ) -> None:
        self._collaborators = (connector, locate, doubt, learn, on_trouble)
        self._lock = threading.Lock()
        self._listener: Listener | None = None
        self._closed = False
        self._inherited: list[object] = []

    def subscribe(self, channel: str, listener: Callable[[bytes], None], on_gap: Callable[[], None]) -> Subscription:
        """Call `listener` with each message of a channel. Returns at once.

        Args:
            channel: a channel on which scripts publish messages (SPUBLISH).
            listener: called with each message on the thread of the bus; must be quick.
            on_gap: called on the thread of the bus whenever messages may have been missed. This is the case when the
                node confirms the subscription, when the connection is lost, and when it is restored.
        """
        # Import the listener only here, because many programs never subscribe. Each module that subscribes has already
        # imported the listener at its top, so this line loads nothing. Loading would be a risk: if the process forked
        # during the import, the child would wait for the module's import lock forever.
        from agentperf_redis.transport.pubsub.listener import Listener

        subscription = Subscription(channel, listener, on_gap, self._remove)
        with self._lock:
            if not self._closed:
                if self._listener is None:
                    self._listener = Listener(*self._collaborators)
                    self._listener.start()
                self._listener.add(subscription)
        return subscription

    def confirmed_at(self, channel: str) -> float:
        """Return a time of `time.monotonic`. All messages published on the channel before that time were delivered.

        The result is the send time of the newest answered ping on the connection of the channel, or 0.0 if there is
        none. While this method is called regularly, pings are frequent.
        """
        listener = self._listener
        return 0.0 if listener is None else listener.confirmed_at(channel)

    def close(self) -> None:
        """End the thread and close its connections permanently."""
        with self._lock:
            self._closed = True
            listener = self._listener
        if listener is not None:
            listener.stop()

    def after_fork(self) -> None:
        """In a forked child: start without subscriptions and without a thread. Listeners must subscribe again."""
        self._lock = threading.Lock()
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.abandon()
            self._inherited.append(listener)  # its finalizers must not run, because its resources belong to the parent

    def _remove(self, subscription: Subscription) -> None:
        with self._lock:
            if self._listener is not None:
                self._listener.remove(subscription)
