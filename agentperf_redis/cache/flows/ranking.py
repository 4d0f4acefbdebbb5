"""Ranks the entries of a cache: the largest, the most read, the most expensive to compute."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from agentperf_redis import keys as key_names
from agentperf_redis.cache import commands, entry_format
from agentperf_redis.cache.commands import inspection
from agentperf_redis.command import Batch, Flow
from agentperf_redis.errors import CorruptState, Undecodable
from agentperf_redis.keys import CacheKeys

_PAGE = 1000
"""Entries read in one command: about a millisecond of the server's time."""
_HEAD_BYTES = 4096
"""Bytes read from the beginning of an entry: enough for its header line, even with many tags."""


class EntryRanking(Enum):
    """The property by which entries are ranked."""

    SIZE = "size"
    READS = "reads"
    COST = "cost"


@dataclass(frozen=True, slots=True)
class RankedEntry:
    """The facts about an entry that are known without reading its value.

    Attributes:
        name: its stored name, which is the key itself if the key has at most 120 bytes.
        size_bytes: bytes of its key and value as stored.
        reads: reads counted so far.
        compute_seconds: how long it took to compute the value; 0.0 if the value was put.
        created_at: when it was stored, by the server's clock.
        tags: names by which it can be invalidated.
    """

    name: str
    size_bytes: int
    reads: int
    compute_seconds: float
    created_at: datetime
    tags: frozenset[str]

    @property
    def saved_seconds(self) -> float:
        """Computing time saved by its reads, seconds."""
        return self.reads * self.compute_seconds

    def measure(self, by: EntryRanking) -> float:
        """Return the property that decides the entry's rank."""
        return {
            EntryRanking.SIZE: self.size_bytes,
            EntryRanking.READS: self.reads,
            EntryRanking.COST: self.compute_seconds,
        }[by]


@dataclass(frozen=True, slots=True)
class TagUse:
    """The entries with one tag.

    Attributes:
        tag: the tag.
        entries: number of entries.
        size_bytes: bytes of their keys and values as stored.
    """

    tag: str
    entries: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class EntryRankings:
    """The top entries of a cache, and its tags.

    Attributes:
        best: for each ranking, its entries, the highest first. Entries whose measure is 0 are left out.
        tags: the tags with the most entries, sorted by number of entries (highest first), then by name.
        scanned: number of entries read.
        complete: whether all entries of the cache were read.
    """

    best: dict[EntryRanking, list[RankedEntry]]
    tags: tuple[TagUse, ...]
    scanned: int
    complete: bool


def read_top(shards: Sequence[CacheKeys], limit: int) -> Flow[dict[EntryRanking, list[RankedEntry]]]:
    """Return at most `limit` entries for each ranking, the highest first. Entries whose measure is 0 are left out.

    Reads every entry, one page at a time. The duration grows with the size of the cache, but other clients are not
    blocked.
    """
    return (yield from _read(shards, limit, math.inf, with_tags=False)).best


def read_rankings(shards: Sequence[CacheKeys], limit: int, max_entries: int) -> Flow[EntryRankings]:
    """Rank as `read_top` does, and count the tags, but read at most about `max_entries` entries."""
    return (yield from _read(shards, limit, max_entries, with_tags=True))


def _read(shards: Sequence[CacheKeys], limit: int, max_entries: float, *, with_tags: bool) -> Flow[EntryRankings]:
    """Rank the entries, and count their tags if `with_tags` is True.

    To count tags, the names of all tagged entries are kept in memory, so callers bound the number of entries to read.
    If the cache has more than `max_entries` entries, about `max_entries` are read, an equal share from each shard.
    """
    best: dict[EntryRanking, dict[str, RankedEntry]] = {by: {} for by in EntryRanking}
    tags: dict[str, dict[str, int]] = {}  # tag -> entry name -> bytes, so that an entry found on two pages counts once
    scanned, complete = 0, True
    for done, where in enumerate(shards, start=1):
        invalidation_epoch = yield from _invalidation_epoch(where)
        cursor = "0"
        while True:
            cursor, page = yield from inspection.sizes_page(where, cursor, _PAGE)
            names = dict(page)
            heads = yield from Batch(tuple(inspection.beginning(where, name, _HEAD_BYTES) for name in names))
            found = zip(names, map(_opened, heads), strict=True)
            alive = yield from _alive(
                where, invalidation_epoch, {name: stored for name, stored in found if stored is not None}
            )
            ranked_entries = [_ranked_entry(name, names[name], stored) for name, stored in alive.items()]
            for by, leaders in best.items():
                candidates = {each.name: each for each in (*leaders.values(), *ranked_entries) if each.measure(by) > 0}
                best[by] = {
                    each.name: each
                    for each in heapq.nlargest(
                        limit, candidates.values(), key=lambda each: (each.measure(by), each.name)
                    )
                }
            for entry in ranked_entries if with_tags else ():
                for tag in entry.tags:
                    tags.setdefault(tag, {})[entry.name] = entry.size_bytes
            scanned += len(names)
            if cursor == "0" or scanned >= max_entries * done / len(shards):
                break
        complete = complete and cursor == "0"
    uses = [TagUse(tag, len(sizes), sum(sizes.values())) for tag, sizes in tags.items()]
    return EntryRankings(
        {by: list(leaders.values()) for by, leaders in best.items()},
        tuple(sorted(uses, key=lambda use: (-use.entries, use.tag))[:limit]),
        scanned,
        complete,
    )


def _invalidation_epoch(where: CacheKeys) -> Flow[entry_format.InvalidationEpoch]:
    gen = yield from commands.invalidation_epoch(where)
    try:
        return entry_format.NOTHING_INVALIDATED if gen is None else entry_format.parse_invalidation_epoch(gen)
    except Undecodable:
        raise CorruptState(where.epochs, "not three versions") from None


def _opened(head: bytes) -> entry_format.Stored | None:
    """Parse the beginning of an entry. Return None if the entry is gone or invalid."""
    try:
        return entry_format.parse(head)
    except Undecodable:
        return None


def _alive(
    where: CacheKeys, invalidation_epoch: entry_format.InvalidationEpoch, page: dict[str, entry_format.Stored]
) -> Flow[dict[str, entry_format.Stored]]:
    """Return the entries of a page that were neither cleared nor invalidated."""
    tagged = {
        name: stored for name, stored in page.items() if stored.tags and stored.version <= invalidation_epoch.tagged
    }
    marks: dict[str, int] = {}
    if tagged:
        newest = yield from Batch(tuple(commands.tag_marks(where, stored.tags) for stored in tagged.values()))
        marks = dict(zip(tagged, newest, strict=True))
    cleared_until = {
        name: max(invalidation_epoch.cleared_until, invalidation_epoch.tagged_cleared_until if stored.tags else 0)
        for name, stored in page.items()
    }
    return {
        name: stored for name, stored in page.items() if stored.version > max(cleared_until[name], marks.get(name, 0))
    }


def _ranked_entry(name: str, size: tuple[int, int], stored: entry_format.Stored) -> RankedEntry:
    reads, size_bytes = size
    tags = frozenset(map(key_names.decoded, stored.tags))
    return RankedEntry(name, size_bytes, reads, stored.cost_ms / 1000, entry_format.timestamp(stored.version), tags)
