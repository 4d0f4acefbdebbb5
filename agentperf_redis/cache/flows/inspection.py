"""Reads a cache as a whole: its statistics, its size, the names of its entries."""

from __future__ import annotations

from contextlib import suppress

from agentperf_redis import keys as key_names
from agentperf_redis.backend import Backend
from agentperf_redis.cache import entry_format, history
from agentperf_redis.cache.arguments import chunks
from agentperf_redis.cache.commands import inspection
from agentperf_redis.cache.flows.access_reports import flush_if_possible
from agentperf_redis.cache.flows.settings import before_read
from agentperf_redis.cache.model import KINDS, TIERS, CacheStats, Settings, TierStats
from agentperf_redis.cache.process.shared_state import SharedState
from agentperf_redis.command import Batch, Flow
from agentperf_redis.errors import Undecodable
from agentperf_redis.keys import CacheKeys
from agentperf_redis.windows import Timestamp, Window

_PAGE = 1000
"""Index members read in one command."""
_HEAD_BYTES = 2 * entry_format.MAX_KEY_BYTES
"""Bytes to read of an entry: enough for its header line and its key."""


def stats(shared: SharedState) -> Flow[CacheStats]:
    """Return the statistics of all processes together, including the latest reads of this process."""
    yield from flush_if_possible(shared)
    snapshot = yield from read_stats(shared.backend, shared.service, shared.name)
    return snapshot or _no_stats(shared)


def series(
    shared: SharedState, window: Window, step: Window, as_of: Timestamp
) -> Flow[tuple[history.CacheSeriesRow, ...]]:
    """Return the rows of the cache's history. The arguments are checked at the call, before the flow runs."""
    return _series(shared, history.series(shared.keys, window, step, as_of))


def _series(
    shared: SharedState, reading: Flow[tuple[history.CacheSeriesRow, ...]]
) -> Flow[tuple[history.CacheSeriesRow, ...]]:
    yield from before_read(shared)
    return (yield from reading)


def size(shared: SharedState) -> Flow[int]:
    """Return the number of entries."""
    yield from before_read(shared)
    count = yield from inspection.members(shared.keys.size, of_hash=True)
    return count


def oldest_first(shared: SharedState) -> Flow[list[str]]:
    """Return the keys of all entries in order of last access, the oldest first.

    If an entry does not hold its whole key, its stored name is returned instead.
    """
    yield from flush_if_possible(shared)
    names = yield from read_keys(shared.keys)
    return (yield from _whole_keys(shared, names))


def page(shared: SharedState, cursor: str, count: int) -> Flow[tuple[str, list[str]]]:
    """Return the next cursor, "0" at the end, and about `count` keys, in no order. Pages may overlap.

    Args:
        shared: the state of the cache in this process.
        cursor: "0", or the cursor that the previous page returned.
        count: the size of the page. A small cache is returned as a whole.
    """
    yield from before_read(shared)
    after, found = yield from inspection.sizes_page(shared.keys, cursor, count)
    return after, (yield from _whole_keys(shared, [name for name, _ in found]))


def _whole_keys(shared: SharedState, names: list[str]) -> Flow[list[str]]:
    """Replace stored names by the keys that their entries hold."""
    held: dict[str, str] = {}
    for chunk in chunks([name for name in names if key_names.is_shortened(name)]):
        heads = yield from Batch(tuple(inspection.beginning(shared.keys, name, _HEAD_BYTES) for name in chunk))
        for name, head in zip(chunk, heads, strict=True):
            with suppress(Undecodable):  # the entry is damaged, or gone
                held[name] = entry_format.held_key(entry_format.parse(head), name) or name
    return [held.get(name, name) for name in names]


def read_keys(where: CacheKeys, limit: int | None = None) -> Flow[list[str]]:
    """Return the stored names of at most `limit` entries, oldest access first."""
    scored: list[tuple[float, str]] = []
    for index in (where.cold, where.new, where.warm, where.hot):
        first = 0
        while limit is None or len(scored) < limit:
            page = yield from inspection.oldest_first(index, first, first + _PAGE - 1)
            scored += [(at, name) for name, at in page]
            first += len(page)
            if len(page) < _PAGE:
                break
    names = [name for _, name in sorted(scored)]
    return names if limit is None else names[:limit]


def read_stats(backend: Backend, service: str, name: str) -> Flow[CacheStats | None]:
    """Return the statistics of any cache of a namespace, or None if the cache has no settings."""
    where = key_names.cache(backend.namespace, service, name)
    text, count = yield from inspection.counters(where)
    settings = Settings.parse(text)
    if settings is None:
        return None
    size, hot, warm, cold, new = yield from Batch(
        (
            inspection.members(where.size, of_hash=True),
            *(inspection.members(index) for index in (where.hot, where.warm, where.cold, where.new)),
        )
    )
    hits = [count[tier.value] for tier in TIERS]
    misses = count["misses"]
    lookups = sum(hits) + misses
    tiers = []
    for capacity, entries, tier_hits in zip(settings.capacities, (hot, warm, cold + new), hits, strict=True):
        # a read counts as a lookup in hot, and then in each further tier up to the tier that holds the entry
        tiers.append(TierStats(entries, capacity, tier_hits, lookups - tier_hits))
        lookups -= tier_hits
    return CacheStats(
        name,
        KINDS[service],
        settings,
        tiers[0],
        tiers[1],
        tiers[2],
        hits=sum(hits),
        misses=misses,
        size=size,
        bytes=count["bytes"],
        evictions=count["evicted"],
        expirations=count["expired"],
        corrupt=count["corrupt"],
        seconds_saved=count["saved_ms"] / 1000,
    )


def read_all_stats(backend: Backend) -> Flow[list[CacheStats]]:
    """Return the statistics of every cache of a namespace, by service and name."""
    found = []
    for service in ("cache", "tiered"):
        for name in (yield from backend.entered(service)):
            snapshot = yield from read_stats(backend, service, name)
            if snapshot is not None:
                found.append(snapshot)
    return found


def _no_stats(shared: SharedState) -> CacheStats:
    name, kind, settings = shared.name, KINDS[shared.service], shared.settings
    hot, warm, cold = (TierStats(0, capacity, 0, 0) for capacity in settings.capacities)
    return CacheStats(name, kind, settings, hot, warm, cold, 0, 0, 0, 0, 0, 0, 0, 0.0)
