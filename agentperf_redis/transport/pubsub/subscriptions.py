"""The subscriptions of the message bus, by channel."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

_log = logging.getLogger("agentperf_redis")


class Subscription:
    """The result of `Bus.subscribe`. After `close`, the listener gets no more messages."""

    __slots__ = ("_remove", "channel", "listener", "notified", "on_gap")

    def __init__(
        self,
        channel: str,
        listener: Callable[[bytes], None],
        on_gap: Callable[[], None],
        remove: Callable[[Subscription], None],
    ) -> None:
        self.channel = channel
        self.listener = listener
        self.on_gap = on_gap
        self.notified = False
        """Whether the listener was notified that the subscription is confirmed. Used on the thread of the bus only."""
        self._remove = remove

    def close(self) -> None:
        """End the subscription. A message that is being delivered now may still arrive."""
        self._remove(self)


class Subscribers:
    """All subscriptions of a process. Callers add and remove subscriptions; the thread of the bus delivers to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: dict[str, list[Subscription]] = {}
        self._changed: set[str] = set()

    def add(self, subscription: Subscription) -> None:
        """Add a subscription."""
        with self._lock:
            self._of.setdefault(subscription.channel, []).append(subscription)
            self._changed.add(subscription.channel)

    def remove(self, subscription: Subscription) -> None:
        """Remove a subscription."""
        with self._lock:
            left = self._of.get(subscription.channel, [])
            if subscription in left:
                left.remove(subscription)
                if not left:
                    del self._of[subscription.channel]
                    self._changed.add(subscription.channel)

    def has(self, channel: str) -> bool:
        """Whether the channel has a subscription."""
        return channel in self._of

    def take_changed(self) -> set[str]:
        """Return the channels that, since the previous call, got a subscription or lost all their subscriptions."""
        with self._lock:
            changed, self._changed = self._changed, set()
        return changed

    def deliver(self, channel: str, message: bytes) -> None:
        """Call the listeners of a channel with a message."""
        for subscription in self._at(channel):
            guarded(subscription.listener, message)

    def notify_gap(self, channel: str, *, only_new: bool = False) -> None:
        """Report a possible gap to a channel's subscriptions; with `only_new`, only to those not yet notified."""
        for subscription in self._at(channel):
            if not (only_new and subscription.notified):
                subscription.notified = True
                guarded(subscription.on_gap)

    def _at(self, channel: str) -> list[Subscription]:
        with self._lock:
            return list(self._of.get(channel, ()))


def guarded(callback: Callable[..., None], *args: object) -> None:
    """Call a callback and log any exception, because an exception must not stop the messages of other listeners."""
    try:
        callback(*args)
    except Exception:  # noqa: BLE001  the callback may raise anything
        _log.exception("bus: the callback %r failed", callback)
