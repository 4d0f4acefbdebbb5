"""Local copies of some entries within this process: a hit costs no round trip.

Copies are kept coherent. The script that changes an entry publishes the change, and the bus delivers the message here.
Copies are used only while the bus is known to work: a ping sent on its connection within the last 250 ms was answered,
so everything published before that ping has arrived. After another process has changed a value, the old value may
therefore be returned for at most 250 ms. After this process has changed a value, the old value is never returned.

A fill stores a copy of an entry that was read from the server. It must not restore a value that was invalidated during
the read. Each fill takes a ticket before the read. The fill is refused if, after the ticket was taken, any tag or
any key of the same stripe was invalidated. A stripe is a group of keys whose hashes have the same remainder.

Eviction follows SIEVE (Zhang, Yang, Yue, Vigfusson, Rashmi, "SIEVE is Simpler than LRU", NSDI 2024). A hit sets a flag
on the copy and needs no lock. To evict a copy, a hand moves from the oldest copy towards the newest. It clears the
flags that are set, and removes the first copy whose flag is not set.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from typing import Any, TypeAlias

from agentperf_redis.cache.entry_format import Stored

TRUSTED_FOR_S = 0.25
"""Maximum age of the last proof that the bus works. A write of another process may go unnoticed for this long."""
MAX_COPY_TTL_S = 30.0
"""Maximum TTL of a copy. It limits the damage if an invalidation is missed."""

_STRIPES = 256
_UNCHANGEABLE = frozenset({type(None), bool, int, float, complex, str, bytes})

Ticket: TypeAlias = tuple[int, int]


class Copy:
    """The copy of one entry, linked into the list of copies from newest to oldest."""

    __slots__ = (
        "cost_ms",
        "data",
        "expires_ms",
        "fresh_until_ms",
        "frozen",
        "key",
        "listed",
        "name",
        "newer",
        "older",
        "reads",
        "reported",
        "tags",
        "until",
        "value",
        "version",
        "visited",
    )

    def __init__(self, key: str, name: str, stored: Stored, value: Any, until: float) -> None:
        self.key = key
        self.name = name
        self.version = stored.version
        self.tags = stored.tags
        self.cost_ms = stored.cost_ms
        self.expires_ms = stored.expires_ms
        self.fresh_until_ms = stored.fresh_until_ms
        self.data = stored.data
        self.until = until
        self.frozen = type(value) in _UNCHANGEABLE
        """Whether all callers may share the value; if not, each caller decodes its own value from the bytes."""
        self.value = value if self.frozen else None
        self.visited = False
        self.reads = self.reported = 0
        self.listed = False
        """Whether the copy is listed for the next report of reads."""
        self.newer: Copy | None = None
        self.older: Copy | None = None

    @property
    def size_bytes(self) -> int:
        """The bytes of the copy that count towards the limit."""
        return len(self.data) + len(self.key)


class LocalCopies:
    """The copies of one cache in this process.

    Args:
        max_entries: maximum number of copies.
        max_bytes: maximum bytes of all keys and values of the copies; None is no limit.
        proven_at: returns the time (`time.monotonic`) at which the newest answered ping of the bus was sent.
        announce: called with the stored name of a copy that is read for the first time since its reads were last
            reported.
    """

    def __init__(
        self,
        max_entries: int,
        max_bytes: int | None,
        proven_at: Callable[[], float],
        announce: Callable[[str], None],
    ) -> None:
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self._proven_at = proven_at
        self._announce = announce
        self.start_empty()

    def start_empty(self) -> None:
        """Start without copies. Also called in a forked child."""
        self._lock = threading.Lock()
        self._copies: dict[str, Copy] = {}
        self._long_names: dict[str, str] = {}
        self._newest: Copy | None = None
        self._oldest: Copy | None = None
        self._hand: Copy | None = None
        self._bytes = 0
        self._era = 0
        self._stripes = [0] * _STRIPES
        self._trusted_until = 0.0
        self._read: list[Copy] = []
        self._aside: dict[str, Copy] = {}
        self._aside_long_names: dict[str, str] = {}
        self._aside_at = self._aside_proven_at = 0.0

    def __len__(self) -> int:
        return len(self._copies)

    def find(self, key: str, *, counted: bool = True) -> Copy | None:
        """Return the copy of a key; None if there is no copy, or if it may not be used. Takes no lock.

        Args:
            key: the key.
            counted: whether to count a read. If False, the caller must call `count` when it uses the copy.
        """
        now = monotonic()
        try:
            # Check the bus before looking for the copy. In the reverse order, the bus could invalidate the copy
            # between the two steps.
            if now > self._trusted_until and not (key in self._copies and self._trust(now)):
                return None
            copy = self._copies[key]  # indexing is faster than `get` for a hit; a miss costs a round trip anyway
        except Exception:  # noqa: BLE001  usually a KeyError; the read from the server refuses an invalid key
            return None
        if now > copy.until:
            self.drop(copy.name)
            return None
        if counted:  # inlined, because a call of `count` would add a fifth to the cost of a hit
            copy.visited = True
            copy.reads += 1
            if not copy.listed:
                self._list(copy)
        return copy

    def count(self, copy: Copy) -> None:
        """Count a read of a copy for the next report. Takes no lock."""
        copy.visited = True
        copy.reads += 1
        if not copy.listed:
            self._list(copy)

    def _list(self, copy: Copy) -> None:
        copy.listed = True
        self._read.append(copy)
        self._announce(copy.name)

    def _trust(self, now: float) -> bool:
        """Return whether the bus was proven to work recently."""
        # Do not decrease `_trusted_until` here. After a loss of the bus, `_proven_at` returns 0, but the last proof
        # stays valid.
        self._trusted_until = max(self._trusted_until, self._proven_at() + TRUSTED_FOR_S)
        return now <= self._trusted_until

    def ticket(self, name: str) -> Ticket:
        """Return the ticket that `fill` checks. Call it before the entry is read from the server."""
        return self._era, self._stripes[hash(name) % _STRIPES]

    def fill(self, key: str, name: str, stored: Stored, value: Any, ttl_s: float, ticket: Ticket) -> None:
        """Store a copy of an entry read from the server, unless an invalidation has made its ticket obsolete."""
        ttl_s = min(ttl_s, MAX_COPY_TTL_S)
        if ttl_s <= 0:
            return
        copy = Copy(key, name, stored, value, monotonic() + ttl_s)
        if self.max_bytes is not None and copy.size_bytes > self.max_bytes:
            return
        with self._lock:
            if ticket != (self._era, self._stripes[hash(name) % _STRIPES]):
                return
            if self._aside:  # the server answers again, so the copies set aside are no longer needed
                self._aside = {}
            known = self._copies.get(key)
            if known is not None:
                self._remove(known)
            while self._copies and (
                len(self._copies) >= self.max_entries
                or (self.max_bytes is not None and self._bytes + copy.size_bytes > self.max_bytes)
            ):
                self._evict()
            copy.older = self._newest
            if self._newest is not None:
                self._newest.newer = copy
            self._newest = copy
            if self._oldest is None:
                self._oldest = copy
            self._copies[key] = copy
            if name != key:
                self._long_names[name] = key
            self._bytes += copy.size_bytes

    def drop(self, name: str, older_than: int | None = None) -> None:
        """Drop the copy of an entry, and refuse fills of this entry that are in progress.

        Args:
            name: stored name of the entry's key.
            older_than: a copy of at least this version is kept; None keeps no copy.
        """
        with self._lock:
            self._stripes[hash(name) % _STRIPES] += 1
            copy = self._copies.get(self._long_names.get(name, name))
            if copy is not None and copy.name == name and (older_than is None or copy.version < older_than):
                self._remove(copy)
            if self._aside:
                self._aside.pop(self._aside_long_names.get(name, name), None)

    def drop_tag(self, tag: str, older_than: int | None = None) -> None:
        """Drop the copies of all entries with a tag, and refuse all fills in progress."""
        with self._lock:
            self._era += 1
            for copy in list(self._copies.values()):
                if tag in copy.tags and (older_than is None or copy.version < older_than):
                    self._remove(copy)
            if self._aside:
                self._aside = {key: copy for key, copy in self._aside.items() if tag not in copy.tags}

    def serve_stale(self, key: str, max_age_s: float) -> Copy | None:
        """Return a copy while the server is unreachable. Nothing then shows whether the copy is still valid.

        Args:
            key: the key.
            max_age_s: maximum seconds since the copy was last known to be valid.
        """
        now = monotonic()
        with self._lock:
            copy, known_at = self._copies.get(key), self._proven_at()
            if copy is not None:  # after a loss of the bus, `_proven_at` is 0, but the last proof stays valid
                known_at = max(known_at, self._trusted_until - TRUSTED_FOR_S)
            elif known_at <= self._aside_at:
                # Use the set-aside copies only until the bus works again. After that, this process may have read newer
                # values.
                copy, known_at = self._aside.get(key), self._aside_proven_at
        return copy if copy is not None and now <= copy.until and now <= known_at + max_age_s else None

    def set_aside(self) -> None:
        """Stop using all copies, since changes may have been missed; only `serve_stale` may still return them."""
        with self._lock:
            if self._copies:
                self._aside, self._aside_long_names = self._copies, self._long_names
                self._aside_at, self._aside_proven_at = monotonic(), self._trusted_until - TRUSTED_FOR_S
            self._forget_all()

    def flush(self) -> None:
        """Drop everything and refuse all fills in progress."""
        with self._lock:
            self._aside = {}
            self._forget_all()

    def _forget_all(self) -> None:
        self._era += 1
        self._trusted_until = 0.0
        self._copies = {}
        self._long_names = {}
        self._newest = self._oldest = self._hand = None
        self._bytes = 0

    def drain(self) -> list[tuple[str, int, int]]:
        """Return the reads since the previous call. Each item has a stored name, a count, and the ms saved."""
        read, self._read = self._read, []
        reads = []
        for copy in read:
            copy.listed = False  # done before counting, so that a later read appends the copy to `_read` again
            count = copy.reads - copy.reported
            # `copy.reads` is never set to 0: a reset could lose a read that another thread counts at this moment
            copy.reported += count
            if count:
                reads.append((copy.name, count, count * copy.cost_ms))
        return reads

    def _evict(self) -> None:
        hand = self._hand or self._oldest
        while hand is not None and hand.visited:
            hand.visited = False
            hand = hand.newer or self._oldest
        if hand is not None:
            self._hand = hand.newer
            self._remove(hand)

    def _remove(self, copy: Copy) -> None:
        del self._copies[copy.key]
        if copy.name != copy.key:
            self._long_names.pop(copy.name, None)
        self._bytes -= copy.size_bytes
        if self._hand is copy:
            self._hand = copy.newer
        if copy.newer is None:
            self._newest = copy.older
        else:
            copy.newer.older = copy.older
        if copy.older is None:
            self._oldest = copy.newer
        else:
            copy.older.newer = copy.newer
        copy.newer = copy.older = None
