"""Reads of a cache. A hit in any tier costs one plain command; a hit in a local copy costs no command."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any, Final

from agentperf_redis import keys as key_names
from agentperf_redis.arguments import plain_text
from agentperf_redis.cache import commands, entry_format
from agentperf_redis.cache.arguments import distinct_keys, stored_name
from agentperf_redis.cache.commands import inspection
from agentperf_redis.cache.commands.replies import Found, NoSettings
from agentperf_redis.cache.flows.access_reports import flush, flush_if_possible
from agentperf_redis.cache.flows.settings import (
    ATTEMPTS,
    at_once,
    follow,
    grouped,
    prepare,
    pull_to_read,
    ready,
    shard_to_read,
    shard_to_write,
)
from agentperf_redis.cache.model import CacheEntry, Tier
from agentperf_redis.cache.process.local_copies import MAX_COPY_TTL_S, Copy, LocalCopies, Ticket
from agentperf_redis.cache.process.shard import Shard
from agentperf_redis.cache.process.shared_state import SharedState
from agentperf_redis.codec.codec import Codec
from agentperf_redis.command import Batch, Flow
from agentperf_redis.errors import BackendFull, CorruptState, Undecodable, shown


class _Missing:
    pass


MISSING: Final = _Missing()
_NEVER_MS: Final = -1
"""The reply of the command PTTL for a key that does not expire."""


def _local_expiry(sent_at: float, left_ms: int) -> float | None:
    """Return when a local copy expires, by `time.monotonic`; None for never.

    The copy never outlives its entry, since the server has measured `left_ms` after the request was sent.

    Args:
        sent_at: when the request was sent.
        left_ms: the reply of the command PTTL.
    """
    return None if left_ms == _NEVER_MS else sent_at + left_ms / 1000


class Reader:
    """Reads of one cache object.

    Args:
        shared: the state shared with other objects of the same cache.
        codec: encodes and decodes values.
        strict: whether to record each read at once.
        local: local copies of this process; None if the object uses none.
    """

    def __init__(
        self,
        shared: SharedState,
        codec: Codec,
        *,
        strict: bool = False,
        local: LocalCopies | None = None,
    ) -> None:
        self.shared = shared
        self.codec = codec
        self.strict = strict
        self.local = local

    def get(self, key: str, default: Any) -> Flow[Any]:
        """Return the value of a key, or the default."""
        value, _ = yield from self.look_up(stored_name(key), key)
        return default if value is MISSING else value

    def copied(self, key: str) -> Any:
        """Return the value of a key from its local copy, or MISSING. Does no I/O."""
        copy = None if self.local is None else self.local.find(key)
        if copy is None:
            return MISSING
        return copy.value if copy.frozen else self.unpacked(copy)

    def ageless_copy(self, key: str) -> Any:
        """Return the value of a local copy that stays fresh until it expires, or MISSING. Does no I/O."""
        copy = None if self.local is None else self.local.find(key)
        if copy is None or copy.fresh_until_ms:
            return MISSING
        return copy.value if copy.frozen else self.unpacked(copy)

    def unpacked(self, copy: Copy) -> Any:
        """Decode a new value from the bytes of a local copy. Return MISSING if the value's class is unknown."""
        try:
            return self.codec.decode(copy.data)
        except Undecodable:  # another client of this cache, with other storable classes, made the copy
            return MISSING

    def get_many(self, keys: Iterable[str], *, fresh: bool = False) -> Flow[dict[str, Any]]:
        """Return a dict of the keys that have a value, with their values."""
        values: dict[str, Any] = {}
        names: dict[str, list[str]] = {}
        for key in distinct_keys(keys):
            value = MISSING if fresh else self.copied(key)
            if value is MISSING:
                # a key and its shortened form have the same stored name
                names.setdefault(stored_name(key), []).append(key)
            else:
                values[key] = value
        left = list(names)
        while left:
            groups, left = yield from self._groups(left)
            tickets = {name: self._ticket(name) for _, chunk in groups for name in chunk}
            replies, expiries = yield from self._read_groups(groups)
            for (shard, chunk), (*entries, gen) in zip(groups, replies, strict=True):
                if gen == entry_format.CLOSED and (yield from follow(shard)):
                    left += chunk
                    continue
                for name, entry in zip(chunk, entries, strict=True):
                    value, stored = yield from self.value(shard, name, (entry, gen), counted=True)
                    if value is not MISSING:
                        values |= dict.fromkeys(names[name], value)
                    self._fill_local(names[name][0], name, stored, value, tickets[name], expiries.get(name))
                if shard.access_buffer.is_full:
                    yield from flush_if_possible(flush(shard), self.shared)
        return values

    def entry(self, key: str) -> Flow[CacheEntry | None]:
        """Return the value and the metadata of a key, or None if it has no value. This does not count as a read."""
        name = stored_name(key)
        while True:
            shard = yield from shard_to_read(self.shared, name)
            yield from flush_if_possible(flush(shard), self.shared)
            where = shard.keys
            entry, gen = yield from commands.read(where, name)
            if gen != entry_format.CLOSED or not (yield from follow(shard)):
                break
        value, stored = yield from self.value(shard, name, (entry, gen), counted=False)
        if value is MISSING or stored is None:
            return None
        places = ((Tier.HOT, where.hot), (Tier.WARM, where.warm), (Tier.COLD, where.cold), (Tier.COLD, where.new))
        facts: Batch[Any] = Batch(
            (
                inspection.size_of(where, name),
                inspection.left_ms(where, name),
                inspection.expiry_ms(where, name),
                *(inspection.score(index, name) for _, index in places),
            )
        )
        size, left_ms, expiry_ms, *scores = yield from facts
        reads, size_bytes = size or (0, 0)
        tier, last_read = next(
            ((tier, at) for (tier, _), at in zip(places, scores, strict=True) if at is not None), (Tier.COLD, None)
        )
        accessed = None if last_read is None else entry_format.unpack_score(last_read)[0]
        return CacheEntry(
            key=entry_format.held_key(stored, name) or key,
            value=value,
            created_at=entry_format.timestamp(stored.version),
            expires_at=None if expiry_ms < 0 else entry_format.timestamp(expiry_ms * entry_format.CLOCK_PER_S // 1000),
            access_count=reads,
            last_accessed=entry_format.timestamp(accessed) if reads and accessed is not None else None,
            tier=tier,
            tags=frozenset(map(key_names.decoded, stored.tags)),
            size_bytes=size_bytes,
            compute_seconds=stored.cost_ms / 1000,
            version=stored.version,
            ttl=math.inf if left_ms == _NEVER_MS else max(0.0, left_ms / 1000),
        )

    def ttl(self, key: str) -> Flow[float | None]:
        """Return the seconds until a value expires: `math.inf` for never, None if there is no value."""
        name = stored_name(key)
        while True:
            shard = yield from shard_to_read(self.shared, name)
            left_ms = yield from commands.time_to_live(shard.keys, name)
            if left_ms is not None:
                break
            gen = yield from commands.invalidation_epoch(shard.keys)
            if gen != entry_format.CLOSED or not (yield from follow(shard)):
                return None
        return math.inf if left_ms == _NEVER_MS else left_ms / 1000

    def look_up(
        self, name: str, key: str, *, miss: bool = True, hit: bool = True
    ) -> Flow[tuple[Any, entry_format.Stored | None]]:
        """Read a value and its entry. If `miss` or `hit` is False, the caller records the miss or the hit."""
        if self.strict and hit:
            return (yield from self._look_up_strictly(name, miss=miss))
        shared, ticket = self.shared, None
        while True:
            shard = shared.shard(name)
            if self.local is not None or shard.unsent or not shared.laid_out or shard.old:
                shard = yield from self._prepared(name)
                ticket = self._ticket(name)
            if ticket is None:
                entry, gen = yield commands.read(shard.keys, name)
                expiry = None
            else:
                sent_at = time.monotonic()
                both: Batch[Any] = Batch((commands.read(shard.keys, name), inspection.left_ms(shard.keys, name)))
                (entry, gen), left_ms = yield from both
                expiry = _local_expiry(sent_at, left_ms)
            if gen != entry_format.CLOSED or not (yield from follow(shard)):
                break
        # The code of `value` is inlined here: this saves one generator for every hit.
        stored, doubtful = self._opened(shard, name, entry, gen, counted=True)
        if stored is not None and doubtful:
            stored = yield from self._not_invalidated_by_tags(shard, stored)
        value = self._decoded(shard, name, stored, miss=miss, hit=hit)
        if ticket is not None:
            self._fill_local(key, name, stored, value, ticket, expiry)
        if shard.access_buffer.is_full:
            yield from flush_if_possible(flush(shard), shared)
        return value, stored

    def _prepared(self, name: str) -> Flow[Shard]:
        """Return the shard of a key, ready for a read.

        If the object uses local copies, subscribe to changes, and get the server's time in order to compute when the
        copies expire. Otherwise, send only what `shard_to_read` sends.
        """
        if self.local is None:
            return (yield from shard_to_read(self.shared, name))
        shard = yield from shard_to_write(self.shared, name)
        self.shared.listen()
        return shard

    def _groups(self, names: list[str]) -> Flow[tuple[list[tuple[Shard, list[str]]], list[str]]]:
        """Prepare the shards of the first names. Return these names by shard, and the names that are left."""
        while True:
            yield from self._prepared(names[0])  # learns the number of shards
            shards, count = self.shared.shards, at_once(self.shared)
            groups = grouped(self.shared, names[:count])
            for shard in dict.fromkeys(shard for shard, _ in groups):
                yield from prepare(shard) if self.local is None else ready(shard)
            if shards[0].old:
                yield from pull_to_read(self.shared, names[:count])
            if shards is self.shared.shards:
                return groups, names[count:]

    def _read_groups(
        self, groups: list[tuple[Shard, list[str]]]
    ) -> Flow[tuple[list[list[bytes | None]], dict[str, float | None]]]:
        """Read entries. Return the replies, and the expiry times of local copies; see `_local_expiry`."""
        reads = tuple(commands.read_many(shard.keys, chunk) for shard, chunk in groups)
        if self.local is None:
            return (yield from Batch(reads)), {}
        names = [(shard, name) for shard, chunk in groups for name in chunk]
        sent_at = time.monotonic()
        all_of_them: Batch[Any] = Batch((*reads, *(inspection.left_ms(shard.keys, name) for shard, name in names)))
        replies = yield from all_of_them
        left = zip(names, replies[len(reads) :], strict=True)
        return replies[: len(reads)], {name: _local_expiry(sent_at, left_ms) for (_, name), left_ms in left}

    def _ticket(self, name: str) -> Ticket | None:
        return None if self.local is None else self.local.ticket(name)

    def _fill_local(
        self,
        key: str,
        name: str,
        stored: entry_format.Stored | None,
        value: Any,
        ticket: Ticket | None,
        expiry: float | None,
    ) -> None:
        """Make a local copy of an entry; `expiry` is explained at `_local_expiry`."""
        if self.local is None or ticket is None or stored is None or value is MISSING:
            return
        key = plain_text(key)
        # A long key is stored under its shortened name. A caller may also use the shortened name as a key. An
        # invalidation by stored name drops only one copy, so only the long key may have a copy.
        if key == name and key_names.is_shortened(name):
            return
        ttl_s = MAX_COPY_TTL_S if expiry is None else expiry - time.monotonic()
        self.local.fill(key, name, stored, value, ttl_s, ticket)

    def _look_up_strictly(self, name: str, *, miss: bool) -> Flow[tuple[Any, entry_format.Stored | None]]:
        """Do what `look_up` does, in a strict cache: a script reads the entry, records the read and checks tags."""
        try:
            shard, read = yield from self._read_strictly(name, miss=miss)
        except BackendFull as error:  # a full server cannot record the read, but still returns the value
            self.shared.warn("cache %s: reads cannot be recorded: %s", self.shared.name, error)
            shard = yield from shard_to_read(self.shared, name)
            entry, gen = yield from commands.read(shard.keys, name)
            if gen == entry_format.CLOSED and (yield from follow(shard)):
                return (yield from self._look_up_strictly(name, miss=miss))
            return (yield from self.value(shard, name, (entry, gen), counted=False))
        if read.wrong_type:
            self.warn_of_wrong_type(name)
        value, stored = yield from self.value(shard, name, read.found, counted=False)
        if read.counted and value is MISSING:  # the script cannot decode values, so it has counted a hit
            shard.access_buffer.found_corrupt()
        return value, stored

    def _read_strictly(self, name: str, *, miss: bool) -> Flow[tuple[Shard, commands.StrictRead]]:
        for _ in range(ATTEMPTS):
            shard = yield from shard_to_write(self.shared, name)
            read = yield from commands.read_strictly(shard.keys, name, miss=miss)
            if not isinstance(read, NoSettings):
                return shard, read
            shard.lose_settings()
        raise CorruptState(shard.keys.meta, "settings that are lost again after each write")

    def value(
        self, shard: Shard, name: str, found: Found, *, counted: bool
    ) -> Flow[tuple[Any, entry_format.Stored | None]]:
        """Return the decoded value of an entry (or MISSING), and the entry.

        Args:
            shard: the shard of the key.
            name: stored name of the key.
            found: the entry and the invalidation epochs.
            counted: whether to record the hit or the miss.
        """
        stored, doubtful = self._opened(shard, name, *found, counted=counted)
        if stored is not None and doubtful:
            stored = yield from self._not_invalidated_by_tags(shard, stored)
        return self._decoded(shard, name, stored, counted=counted), stored

    def _opened(
        self, shard: Shard, name: str, entry: bytes | None, gen: bytes | None, *, counted: bool
    ) -> tuple[entry_format.Stored | None, bool]:
        """Parse an entry. Returns the entry (None if it is cleared or invalid), and whether to check its tags."""
        if entry is None:
            return None, False
        try:
            stored = entry_format.parse(entry)
            # The parsed epochs are kept, since they seldom change. For thread safety, replace `known_epoch` as a whole.
            known = shard.known_epoch
            if gen != known[0]:
                known = (
                    gen,
                    entry_format.NOTHING_INVALIDATED if gen is None else entry_format.parse_invalidation_epoch(gen),
                )
                shard.known_epoch = known
        except Undecodable as error:
            self._warn_of(shard, name, error, counted=counted)
            return None, False
        version, invalidation_epoch = stored.version, known[1]
        if version <= invalidation_epoch.cleared_until or (
            stored.tags and version <= invalidation_epoch.tagged_cleared_until
        ):
            return None, False
        return stored, bool(stored.tags) and version <= invalidation_epoch.tagged

    def _not_invalidated_by_tags(self, shard: Shard, stored: entry_format.Stored) -> Flow[entry_format.Stored | None]:
        """Return an entry, or None if one of its tags was invalidated since it was written."""
        # Read the epochs again, after the marks of the tags. Since the previous read of the epochs, a mark may have
        # been merged into `tagged_cleared_until` and removed from the index of marks.
        where = shard.keys
        both: Batch[Any] = Batch((commands.tag_marks(where, stored.tags), commands.invalidation_epoch(where)))
        newest, gen = yield from both
        if gen == entry_format.CLOSED:  # the shard was closed after the entry had been read
            gen = yield from commands.frozen_epochs(where)
        try:
            known = entry_format.NOTHING_INVALIDATED if gen is None else entry_format.parse_invalidation_epoch(gen)
        except Undecodable:
            raise CorruptState(where.epochs, "not three versions") from None
        return stored if stored.version > max(newest, known.cleared_until, known.tagged_cleared_until) else None

    def _decoded(
        self,
        shard: Shard,
        name: str,
        stored: entry_format.Stored | None,
        *,
        counted: bool = True,
        miss: bool = True,
        hit: bool = True,
    ) -> Any:
        """Return the decoded value of an entry, or MISSING, and record the hit or the miss."""
        if stored is not None:
            try:
                value = self.codec.decode(stored.data)
            except Undecodable as error:
                self._warn_of(shard, name, error, counted=counted)
            else:
                if counted and hit:
                    shard.access_buffer.read(name, stored.cost_ms)
                return value
        if counted and miss:
            shard.access_buffer.missed()
        return MISSING

    def warn_of_wrong_type(self, name: str) -> None:
        """Log that the Redis key of an entry or of its lease has a wrong type."""
        name, cache = shown(name), self.shared.name
        self.shared.warn("cache %s: entry %s counts as missing: one of its keys has a wrong type", cache, name)

    def _warn_of(self, shard: Shard, name: str, error: Undecodable, *, counted: bool) -> None:
        self.shared.warn("cache %s: entry %s counts as missing: %s", self.shared.name, shown(name), error)
        if counted:
            shard.access_buffer.found_corrupt()
