"""This process's view of a shard, which is the part of a cache that lies in one slot. Most caches have one shard."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

from agentperf_redis.cache.entry_format import NOTHING_INVALIDATED, InvalidationEpoch
from agentperf_redis.cache.process.access_buffer import AccessBuffer
from agentperf_redis.keys import CacheKeys

if TYPE_CHECKING:
    from agentperf_redis.cache.process.shared_state import SharedState

MAX_PENDING_INVALIDATIONS = 10_000
"""Maximum keys and tags kept while the server is unreachable. Beyond that, recovery clears the whole shard."""
MAX_PENDING_RELEASES = 1000
"""Maximum number of compute leases that are released after an outage. Any further lease ends when its TTL is over."""


class InvalidationScope(Enum):
    """The scope of an invalidation that could not be sent."""

    KEY = "a key, by its stored name"
    TAG = "a tag, percent-encoded"
    ALL = "everything"


PendingInvalidation: TypeAlias = tuple[InvalidationScope, str]


class Shard:
    """One shard of a cache in this process.

    Args:
        cache: the cache.
        number: number of the shard, from 0.
        keys: key names of the shard.
        filled: called when there is something to report.

    Attributes:
        retired: whether the cache now has another layout, so that this shard must no longer be used.
    """

    def __init__(self, cache: SharedState, number: int, keys: CacheKeys, filled: Callable[[Shard], None]) -> None:
        backend = cache.backend
        self.cache = cache
        self.number = number
        self.keys = keys
        self.retired = False
        self.old: tuple[CacheKeys, ...] = ()
        """The shards of the previous layout while they may hold entries; see `flows.layouts`."""
        self.deployed = False
        """Whether this process has sent the shard its settings."""
        self.seen = 0
        """The newest version that this process has seen in a reply."""
        self.known_epoch: tuple[bytes | None, InvalidationEpoch] = (None, NOTHING_INVALIDATED)
        """The latest invalidation epochs read: the stored bytes and the parsed form. They seldom change."""
        self._filled = filled
        self.access_buffer = AccessBuffer(lambda: backend.process, lambda: filled(self))
        self._server_ahead_ms = 0.0
        self.start_empty()

    def start_empty(self) -> None:
        """Start with nothing to send. Also called in a forked child, since the parent sends its own pending items."""
        self._lock = threading.Lock()
        self.pending_invalidations: dict[PendingInvalidation, None] = {}
        """Invalidations that could not be sent, in order. They are sent before the next read or write."""
        self.pending_releases: dict[tuple[str, str], float] = {}
        """Compute leases whose end could not be reported: (stored name, token) -> expiry, by `time.monotonic`.

        The server may still hold these leases when it answers again. They are released before the next read or write,
        so that no caller waits for their expiry.
        """

    def after_fork(self) -> None:
        """In the child: start with empty buffers; the parent keeps the contents of the old ones."""
        self.start_empty()
        self.access_buffer.start_empty()

    @property
    def unsent(self) -> bool:
        """Whether the next call must send something first.

        This may be failed invalidations, leases to release, or settings that a user chose.
        """
        pending = self.pending_invalidations or self.pending_releases
        return bool(pending) or (not (self.deployed and self.cache.deployed) and "1" in self.cache.given)

    def learn(self, version: int) -> None:
        """Record a version from a reply."""
        self.seen = max(self.seen, version)

    def lose_settings(self) -> None:
        """Record that a script refused: the server has no settings of this shard, or the layout has changed."""
        self.deployed = self.cache.deployed = False

    def add_pending(self, invalidations: Iterable[PendingInvalidation]) -> None:
        """Record failed invalidations. Although their callers got an error, no reader may get the values concerned."""
        added = dict.fromkeys(invalidations)
        with self._lock:
            retired = self.retired
            self.pending_invalidations.update(added)
            if len(self.pending_invalidations) > MAX_PENDING_INVALIDATIONS:
                self.pending_invalidations = {(InvalidationScope.ALL, ""): None}
        if retired:
            self.cache.add_pending(added)
        self._filled(self)  # the maintenance thread sends the invalidations soon, even without further reads

    def retire(self) -> list[PendingInvalidation]:
        """Record that the cache has another layout. Returns the invalidations that were not sent."""
        with self._lock:
            self.retired = True
            return list(self.pending_invalidations)

    def remove_pending(self, invalidations: Iterable[PendingInvalidation]) -> None:
        """Record that invalidations were sent."""
        with self._lock:
            for invalidation in invalidations:
                self.pending_invalidations.pop(invalidation, None)

    def release_later(self, name: str, token: str, lease_ms: int) -> None:
        """Release a compute lease as soon as the server answers. The lease may outlive the computation.

        Args:
            name: stored name of the key.
            token: token of the lease.
            lease_ms: TTL of the lease, ms.
        """
        with self._lock:
            if len(self.pending_releases) < MAX_PENDING_RELEASES:
                self.pending_releases[name, token] = time.monotonic() + lease_ms / 1000
        self._filled(self)

    def remove_released(self, leases: Iterable[tuple[str, str]]) -> None:
        """Record that leases were released, or have ended."""
        with self._lock:
            for lease in leases:
                self.pending_releases.pop(lease, None)

    def send_soon(self) -> None:
        """Send pending invalidations and releases in the background, if there are any."""
        if self.pending_invalidations or self.pending_releases:
            self._filled(self)

    def set_clock(self, server_ms: float, sent_at: float) -> None:
        """Record the server's time; `sent_at` is `time.monotonic()` before the request was sent."""
        self._server_ahead_ms = server_ms - sent_at * 1000

    def server_ms(self) -> int:
        """Return an upper bound of the server's time.

        The bound is not exact, since `set_clock` counts from `sent_at`, and the server read its clock after that.
        """
        return int(self._server_ahead_ms + time.monotonic() * 1000) + 1

    def until_ms(self) -> int:
        """Return the server time after which a request that is sent now must have no effect."""
        return self.server_ms() + math.ceil(self.cache.backend.deadline * 1000)
