"""A copy of some entries within this process: a hit costs no round trip.

It is coherent: whoever changes an entry publishes that from the script that does it, and the bus brings the word here.
The copy answers only while the bus is known to work: a ping that was sent on its connection within the last 250 ms has
been answered, and so everything published before that ping has arrived. What another process has changed is therefore
never served for longer than that. What this process has changed is never served at all.

A fill must not bring back what was invalidated while it was under way. Each takes a ticket before it reads from the
server, and is refused if anything was invalidated since that shares its stripe.

Who leaves when it is full is decided by SIEVE (Zhang, Yang, Yue, Vigfusson, Rashmi, "SIEVE is Simpler than LRU", NSDI
2024): a hit sets a flag and needs no lock; a hand moves from the oldest entry to the newest, takes the flag from those
that have it, and removes the first that has none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from typing import Any, TypeAlias

from agentperf_redis.cache.entry_format import Stored

TRUSTED_FOR_S = 0.25
"""How old the last proof that the bus works may be, and so how long another process's write may go unnoticed."""
MAX_COPY_TTL_S = 30.0
"""No copy lives longer: a bound, should all else fail."""

_STRIPES = 256
_UNCHANGEABLE = frozenset({type(None), bool, int, float, complex, str, bytes})

Ticket: TypeAlias = tuple[int, int]


class Copy:
    """One entry, in the ring of entries from newest to oldest."""

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
        """Whether everyone may have the same object; else each gets one of his own, made from the bytes."""
        self.value = value if self.frozen else None
        self.visited = False
        self.reads = self.reported = 0
        self.listed = False
        """Whether it is among those whose reads are to be reported."""
        self.newer: Copy | None = None
        self.older: Copy | None = None

    @property
    def size_bytes(self) -> int:
        """What it counts against the limit in bytes."""
        return len(self.data) + len(self.key)


class LocalCopies:
    """The copies of one cache in this process.

    Args:
        max_entries: how many.
        max_bytes: of all their keys and values; None is no limit.
        proven_at: returns when the newest answered ping of the bus was sent, by `time.monotonic`.
        announce: called when there are reads to report that were not announced.
    """

    def __init__(
        self,
        max_entries: int,
        max_bytes: int | None,
        proven_at: Callable[[], float],
        announce: Callable[[], None],
    ) -> None:
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self._proven_at = proven_at
        self._announce = announce
        self.start_empty()

    def start_empty(self) -> None:
        """Begin anew: also what a forked child does."""
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
        """Return the copy of a key, if there is one and it may be served. Takes no lock.

        Args:
            key: the key.
            counted: whether it counts as read; else `count` is called once it is known to be served.
        """
        now = monotonic()
        try:
            # Trust comes first: what was looked up before the bus was proven may be a copy that it has just dropped.
            if now > self._trusted_until and not (key in self._copies and self._trust(now)):
                return None
            copy = self._copies[key]  # a hit is faster by it than by `get`, and a miss will take a round trip
        except (KeyError, TypeError):  # of no key at all whoever reads from the server says so
            return None
        if now > copy.until:
            self.drop(copy.name)
            return None
        if counted:
            self.count(copy)
        return copy

    def count(self, copy: Copy) -> None:
        """Count a read of a copy that is served, to be reported. Takes no lock."""
        copy.visited = True
        copy.reads += 1
        if not copy.listed:
            copy.listed = True
            self._read.append(copy)
            self._announce()

    def _trust(self, now: float) -> bool:
        """Return whether the bus has been proven to work lately."""
        # never back: a bus that has just been lost proves nothing, but what it proved stands; see `serve_stale`
        self._trusted_until = max(self._trusted_until, self._proven_at() + TRUSTED_FOR_S)
        return now <= self._trusted_until

    def ticket(self, name: str) -> Ticket:
        """Return what `fill` wants to see, before the entry is read from the server."""
        return self._era, self._stripes[hash(name) % _STRIPES]

    def fill(self, key: str, name: str, stored: Stored, value: Any, ttl_s: float, ticket: Ticket) -> None:
        """Keep a copy of what was read from the server, unless something was invalidated since its ticket."""
        ttl_s = min(ttl_s, MAX_COPY_TTL_S)
        if ttl_s <= 0:
            return
        copy = Copy(key, name, stored, value, monotonic() + ttl_s)
        if self.max_bytes is not None and copy.size_bytes > self.max_bytes:
            return
        with self._lock:
            if ticket != (self._era, self._stripes[hash(name) % _STRIPES]):
                return
            if self._aside:  # the server answers
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
        """Forget an entry, and refuse fills of it that are under way.

        Args:
            name: stored name of its key.
            older_than: keep it if its version is at least that.
        """
        with self._lock:
            self._stripes[hash(name) % _STRIPES] += 1
            copy = self._copies.get(self._long_names.get(name, name))
            if copy is not None and copy.name == name and (older_than is None or copy.version < older_than):
                self._remove(copy)
            if self._aside:
                self._aside.pop(self._aside_long_names.get(name, name), None)

    def drop_tag(self, tag: str, older_than: int | None = None) -> None:
        """Forget all entries that carry a tag, and refuse all fills that are under way."""
        with self._lock:
            self._era += 1
            for copy in list(self._copies.values()):
                if tag in copy.tags and (older_than is None or copy.version < older_than):
                    self._remove(copy)
            if self._aside:
                self._aside = {key: copy for key, copy in self._aside.items() if tag not in copy.tags}

    def serve_stale(self, key: str, max_age_s: float) -> Copy | None:
        """Return a copy of which nobody can say that it is still right, because the server is away.

        Args:
            key: the key.
            max_age_s: how long ago it must have been known to be right at most.
        """
        now = monotonic()
        with self._lock:
            copy, known_at = self._copies.get(key), self._proven_at()
            if copy is not None:  # a bus that has just been lost proves nothing, and has yet to say so
                known_at = max(known_at, self._trusted_until - TRUSTED_FOR_S)
            elif known_at <= self._aside_at:  # else the server was heard of, and of them it was not
                copy, known_at = self._aside.get(key), self._aside_proven_at
        return copy if copy is not None and now <= copy.until and now <= known_at + max_age_s else None

    def set_aside(self) -> None:
        """Serve none of the copies any more, since changes may have been missed; but `serve_stale` may."""
        with self._lock:
            if self._copies:
                self._aside, self._aside_long_names = self._copies, self._long_names
                self._aside_at, self._aside_proven_at = monotonic(), self._trusted_until - TRUSTED_FOR_S
            self._forget_all()

    def flush(self) -> None:
        """Forget everything, and refuse all fills that are under way."""
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
        """Return what was read since: stored name, count, computing time saved in ms."""
        read, self._read = self._read, []
        reads = []
        for copy in read:
            copy.listed = False  # first: a read counted from here on lists the copy again
            count = copy.reads - copy.reported
            copy.reported += (
                count  # `reads` only grows: setting it to 0 here could undo, or repeat, a read being counted
            )
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
