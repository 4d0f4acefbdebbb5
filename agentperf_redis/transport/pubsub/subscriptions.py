"""Who wants to hear which channel of the bus."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

_log = logging.getLogger("agentperf_redis")


class Subscription:
    """What `Bus.subscribe` returns: closing it ends the messages."""

    __slots__ = ("_remove", "channel", "listener", "on_gap", "told")

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
        self.told = False
        """Whether it knows that it has come about. Belongs to the bus's thread."""
        self._remove = remove

    def close(self) -> None:
        """End it. A message that is being brought at this moment may still arrive."""
        self._remove(self)


class Subscribers:
    """All subscriptions of a process. Callers add and remove; the bus's thread looks, and tells."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: dict[str, list[Subscription]] = {}
        self._changed: set[str] = set()

    def add(self, subscription: Subscription) -> None:
        """Let it hear its channel."""
        with self._lock:
            self._of.setdefault(subscription.channel, []).append(subscription)
            self._changed.add(subscription.channel)

    def remove(self, subscription: Subscription) -> None:
        """Let it hear no more."""
        with self._lock:
            left = self._of.get(subscription.channel, [])
            if subscription in left:
                left.remove(subscription)
                if not left:
                    del self._of[subscription.channel]
                    self._changed.add(subscription.channel)

    def want(self, channel: str) -> bool:
        """Whether anybody wants the channel."""
        return channel in self._of

    def take_changed(self) -> set[str]:
        """Return the channels to look at: somebody came, or the last one went, since this was last asked."""
        with self._lock:
            changed, self._changed = self._changed, set()
        return changed

    def tell(self, channel: str, message: bytes) -> None:
        """Bring a message."""
        for subscription in self._at(channel):
            guarded(subscription.listener, message)

    def tell_gap(self, channel: str, *, only_untold: bool = False) -> None:
        """Say that messages may have been missed; with `only_untold`, to those who have not heard that before."""
        for subscription in self._at(channel):
            if not (only_untold and subscription.told):
                subscription.told = True
                guarded(subscription.on_gap)

    def _at(self, channel: str) -> list[Subscription]:
        with self._lock:
            return list(self._of.get(channel, ()))


def guarded(callback: Callable[..., None], *args: object) -> None:
    """Call; a fault is logged: one listener's must not end the others' messages."""
    try:
        callback(*args)
    except Exception:  # noqa: BLE001  whatever it is
        _log.exception("bus: %r failed", callback)
