"""Reads a cache as a whole: its statistics, its size, the names of its entries."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Final, TypeAlias

from agentperf_redis import keys as key_names
from agentperf_redis.backend import Backend
from agentperf_redis.cache import entry_format, history
from agentperf_redis.cache.arguments import chunks
from agentperf_redis.cache.commands import inspection
from agentperf_redis.cache.flows.access_reports import flush_all, flush_if_possible
from agentperf_redis.cache.flows.settings import shards_to_read
from agentperf_redis.cache.model import KINDS, TIERS, CacheStats, Settings, TierStats
from agentperf_redis.cache.process.shared_state import SharedState
from agentperf_redis.command import Batch, Flow
from agentperf_redis.errors import Undecodable
from agentperf_redis.keys import CacheKeys
from agentperf_redis.windows import Timestamp, Window, asked_steps

Cursor: TypeAlias = tuple[int, int, str]
"""A position in the scan of a cache: number of the layout, number of the shard, and cursor in the index of the shard.

If the layout has changed since the previous page, the scan begins again, since entries may lie in any shard.

Entries move from the previous layout to the present one. So the scan reads the shards of the previous layout first, and
gives them negative numbers. Otherwise it could miss an entry that moves.
"""
FIRST_PAGE: Final[Cursor] = (-1, 0, "0")
_PAGE = 1000
"""Index members read in one command."""
_HEAD_BYTES = 2 * entry_format.MAX_KEY_BYTES
"""Bytes to read of an entry: enough for its header line and its key."""


def stats(shared: SharedState) -> Flow[CacheStats]:
    """Return the statistics of all processes together, including the latest reads of this process."""
    yield from flush_if_possible(flush_all(shared), shared)
    snapshot = yield from read_stats(shared.backend, shared.service, shared.name)
    return snapshot or _no_stats(shared)


def series(
    shared: SharedState, window: Window, step: Window, as_of: Timestamp
) -> Flow[tuple[history.CacheSeriesRow, ...]]:
    """Return the rows of the cache's history. The arguments are checked at the call, before the flow runs."""
    asked_steps(window, step, as_of)
    return _series(shared, window, step, as_of)


def _series(
    shared: SharedState, window: Window, step: Window, as_of: Timestamp
) -> Flow[tuple[history.CacheSeriesRow, ...]]:
    where = yield from _keys_to_read(shared)
    return (yield from history.series(where, window, step, as_of))


def _keys_to_read(shared: SharedState) -> Flow[tuple[CacheKeys, ...]]:
    shards = yield from shards_to_read(shared)
    return tuple(shard.keys for shard in shards)


def size(shared: SharedState) -> Flow[int]:
    """Return the number of entries."""
    where = (*(yield from _keys_to_read(shared)), *shared.shards[0].old)
    return sum((yield from Batch(tuple(inspection.members(each.size, of_hash=True) for each in where))))


def oldest_first(shared: SharedState) -> Flow[list[str]]:
    """Return the keys of all entries in order of last access, the oldest first.

    If an entry does not hold its whole key, its stored name is returned instead.
    """
    yield from flush_if_possible(flush_all(shared), shared)
    where = (*(yield from _keys_to_read(shared)), *shared.shards[0].old)
    names = yield from read_keys(where)
    return (yield from _whole_keys(shared, names))


def page(shared: SharedState, cursor: Cursor, count: int) -> Flow[tuple[Cursor | None, list[str]]]:
    """Return the next cursor, None at the end, and about `count` keys, in no order. Pages may overlap.

    Args:
        shared: the state of the cache in this process.
        cursor: FIRST_PAGE, or the cursor that the previous page returned.
        count: the size of the page. A small cache is returned as a whole.
    """
    where = yield from _keys_to_read(shared)
    layout, shard, position = cursor
    old = shared.shards[0].old
    if layout != shared.layout or shard < -len(old):  # begin again: the layout changed, or the old shards are gone
        layout, shard, position = shared.layout, -len(old), "0"
    its = old[shard] if shard < 0 else where[shard]
    position, found = yield from inspection.sizes_page(its, position, count)
    after = (layout, shard, position) if position != "0" else (layout, shard + 1, "0")
    names = yield from _whole_keys(shared, [name for name, _ in found])
    return (None if after[1] == len(where) else after), names


def _whole_keys(shared: SharedState, names: list[str]) -> Flow[list[str]]:
    """Replace stored names by the keys that their entries hold."""
    held: dict[str, str] = {}
    for chunk in chunks([name for name in names if key_names.is_shortened(name)]):
        heads = yield from Batch(
            tuple(inspection.beginning(shared.shard(name).keys, name, _HEAD_BYTES) for name in chunk)
        )
        for name, head in zip(chunk, heads, strict=True):
            with suppress(Undecodable):  # the entry is damaged, or gone
                held[name] = entry_format.held_key(entry_format.parse(head), name) or name
    return [held.get(name, name) for name in names]


def read_keys(shards: Sequence[CacheKeys], limit: int | None = None) -> Flow[list[str]]:
    """Return the stored names of at most `limit` entries of a cache, oldest access first."""
    scored: list[tuple[float, str]] = []
    for where in shards:
        scored += yield from _oldest(where, limit)
    names = list(dict.fromkeys(name for _, name in sorted(scored)))  # an entry that moves meanwhile may be found twice
    return names if limit is None else names[:limit]


def _oldest(where: CacheKeys, limit: int | None) -> Flow[list[tuple[float, str]]]:
    """Return the scores and the stored names of at most about `limit` entries of a shard."""
    scored: list[tuple[float, str]] = []
    for index in (where.cold, where.new, where.warm, where.hot):
        first = 0
        while limit is None or len(scored) < limit:
            page = yield from inspection.oldest_first(index, first, first + _PAGE - 1)
            scored += [(at, name) for name, at in page]
            first += len(page)
            if len(page) < _PAGE:
                break
    return scored


def read_stats(backend: Backend, service: str, name: str) -> Flow[CacheStats | None]:
    """Return the statistics of any cache of a namespace, or None if the cache has no settings."""
    text, count = yield from inspection.counters(key_names.cache(backend.namespace, service, name))
    settings = Settings.parse(text)
    if settings is None:
        return None
    where, layout = (backend.namespace, service, name), settings.layout
    shards = key_names.cache_shards(*where, settings.shards, layout)
    old = key_names.cache_shards(*where, settings.source, layout - 1) if settings.source else ()
    if len(shards) > 1 or layout:
        counts = yield from Batch(tuple(map(inspection.counters, shards)))
        count = {counter: sum(its[counter] for _, its in counts) for counter in count}
        count["bytes"] += sum(its["bytes"] for _, its in (yield from Batch(tuple(map(inspection.counters, old)))))
    indexes = [(each.size, each.hot, each.warm, each.cold, each.new) for each in (*shards, *old)]
    members = yield from Batch(
        tuple(inspection.members(index, of_hash=not at) for its in indexes for at, index in enumerate(its))
    )
    size, hot, warm, cold, new = (sum(members[at::5]) for at in range(5))
    hits = [count[tier.value] for tier in TIERS]
    misses = count["misses"]
    lookups = sum(hits) + misses
    tiers = []
    for capacity, entries, tier_hits in zip(settings.capacities, (hot, warm, cold + new), hits, strict=True):
        # The statistics treat each read as a search through the tiers hot, warm and cold, in this order. A hit ends the
        # search. Each searched tier gets one lookup.
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
    """Return the statistics of every cache of a namespace, grouped by service."""
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
