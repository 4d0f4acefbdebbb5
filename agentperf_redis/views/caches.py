"""The caches of a namespace, and one cache in depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any

from agentperf_redis import arguments, keys
from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.cache import history
from agentperf_redis.cache.flows.inspection import read_all_stats, read_stats
from agentperf_redis.cache.flows.ranking import EntryRankings, read_rankings
from agentperf_redis.cache.history import CacheSeriesRow
from agentperf_redis.cache.model import KINDS, TIERS, CacheStats, TierStats
from agentperf_redis.cache.operator import SERVICES, ExistingCache, keys_of
from agentperf_redis.command import Flow
from agentperf_redis.views.agents import seconds_of
from agentperf_redis.views.reading import Fault, Parts
from agentperf_redis.views.selection import Order, order_of, selected
from agentperf_redis.views.timeline import (
    CHART_STEPS,
    DEFAULT_WINDOW,
    MAX_HISTORIES,
    SPARKLINE_STEPS,
    check_window,
    steps_read,
)
from agentperf_redis.windows import Timestamp

MAX_SCANNED = 20_000
"""Maximum number of entries that are read to find the top ones. Reading this many takes about a second."""
TOP_ENTRIES = 10
ENTRIES_EVERY_S = 30.0
"""The top entries of a cache are read again only after this many seconds, because reading a large cache takes long."""


class CacheKind(Enum):
    """The kinds of caches. Two caches of different kinds may have the same name."""

    LRU = "lru"
    TIERED = "tiered"


class CacheSort(Enum):
    """The columns by which caches are sorted."""

    NAME = "name"
    KIND = "kind"
    ENTRIES = "entries"
    BYTES = "bytes"
    HITS = "hits"
    MISSES = "misses"
    HIT_RATE = "hit_rate"
    EVICTIONS = "evictions"
    SAVED = "saved"


@dataclass(frozen=True, slots=True)
class CacheRow:
    """One cache.

    Attributes:
        stats: its statistics since its first use, as `AgentPerf.caches` returns them.
        steps: the window step by step, oldest first. A step in which no process used the cache has no figures. In a
            view of many caches, only the first `MAX_HISTORIES` rows have steps.
    """

    stats: CacheStats
    steps: tuple[CacheSeriesRow, ...] = ()

    @property
    def name(self) -> str:
        """The cache."""
        return self.stats.name

    @property
    def kind(self) -> str:
        """Its kind: "lru" or "tiered"."""
        return self.stats.kind

    @property
    def reads(self) -> int:
        """Reads since the first use of the cache."""
        return self.stats.hits + self.stats.misses

    @property
    def hit_rate(self) -> float | None:
        """Share of the reads that were hits since the first use of the cache, 0 to 1; None without reads."""
        return self.stats.hit_rate if self.reads else None

    @property
    def fill(self) -> float:
        """Entries divided by the capacity, 0 to 1."""
        return self.stats.size / self.stats.max_size if self.stats.max_size else 0.0

    @property
    def recent_hits(self) -> int:
        """Hits in the window, as far as processes have sampled them."""
        return sum(step.hits or 0 for step in self.steps)

    @property
    def recent_misses(self) -> int:
        """Misses in the window, as far as processes have sampled them."""
        return sum(step.misses or 0 for step in self.steps)

    @property
    def recent_hit_rate(self) -> float | None:
        """Share of the reads in the window that were hits, 0 to 1; None without reads."""
        reads = self.recent_hits + self.recent_misses
        return self.recent_hits / reads if reads else None

    @property
    def sparkline(self) -> tuple[float | None, ...]:
        """Hit rate by step, 0 to 1; None without reads."""
        return tuple(step.hit_rate for step in self.steps)


@dataclass(frozen=True, slots=True)
class CachesView:
    """The caches of a namespace.

    Attributes:
        window: the requested window.
        as_of: its end, s since 1970; None for now. The statistics are always current.
        rows: the caches of this page, filtered and sorted.
        matching: number of caches that match the filter.
        known: number of all caches.
        order: the order of the rows.
        match: the filter.
        faults: parts that could not be read.
    """

    window: str | float
    as_of: float | None
    rows: tuple[CacheRow, ...]
    matching: int
    known: int
    order: Order[CacheSort]
    match: str
    faults: tuple[Fault, ...]


@dataclass(frozen=True, slots=True)
class TierRow:
    """A tier with capacity. An LRU cache has one such tier.

    Attributes:
        name: "hot", "warm" or "cold".
        default_ttl: default TTL, s; None for no expiry.
        stats: its statistics.
    """

    name: str
    default_ttl: float | None
    stats: TierStats


@dataclass(frozen=True, slots=True)
class CacheView:
    """One cache in depth.

    Attributes:
        name: the cache.
        kind: "lru" or "tiered".
        window: the requested window.
        as_of: its end, s since 1970; None for now.
        row: its current statistics, and its steps in the window.
        tiers: its tiers.
        last_used: the last recorded access to an entry that is still stored, in local time; None without entries.
        entries: the top entries and the tags; None if they were not read.
        faults: parts that could not be read.
    """

    name: str
    kind: str
    window: str | float
    as_of: float | None
    row: CacheRow
    tiers: tuple[TierRow, ...]
    last_used: datetime | None
    entries: EntryRankings | None
    faults: tuple[Fault, ...]


_VALUES: Mapping[CacheSort, Callable[[CacheRow], Any]] = {
    CacheSort.NAME: lambda row: row.name,
    CacheSort.KIND: lambda row: row.kind,
    CacheSort.ENTRIES: lambda row: row.stats.size,
    CacheSort.BYTES: lambda row: row.stats.bytes,
    CacheSort.HITS: lambda row: row.stats.hits,
    CacheSort.MISSES: lambda row: row.stats.misses,
    CacheSort.HIT_RATE: lambda row: row.hit_rate,
    CacheSort.EVICTIONS: lambda row: row.stats.evictions,
    CacheSort.SAVED: lambda row: row.stats.seconds_saved,
}
_SERVICE_OF = {kind: service for service, kind in KINDS.items()}


def caches(
    perf: AgentPerf,
    window: str | float = DEFAULT_WINDOW,
    *,
    as_of: Timestamp = None,
    sort: CacheSort | str = CacheSort.HITS,
    descending: bool | None = None,
    match: str = "",
    limit: int = 100,
    offset: int = 0,
) -> Flow[CachesView]:
    """Read the caches. The call itself checks the arguments, which are those of `agents.agents`."""
    check_window(window, as_of)
    order = order_of(sort, descending, CacheSort, upward=(CacheSort.NAME, CacheSort.KIND))
    selected((), _name, _VALUES, order, match, limit, offset)  # checks the arguments
    return _caches(perf, window, as_of, order, match, limit, offset)


def _name(row: CacheRow) -> str:
    return row.name


def _caches(
    perf: AgentPerf,
    window: str | float,
    as_of: Timestamp,
    order: Order[CacheSort],
    match: str,
    limit: int,
    offset: int,
) -> Flow[CachesView]:
    parts = Parts(caches=read_all_stats(perf.backend))
    yield from parts.read()
    every: list[CacheStats] = parts.get("caches", [])
    found = selected(map(CacheRow, every), _name, _VALUES, order, match, limit, offset)
    charts = Parts(
        **{
            f"history of {row.kind} cache {row.name}": _steps(perf, row.stats, window, as_of, SPARKLINE_STEPS)
            for row in found.rows[:MAX_HISTORIES]
        }
    )
    if found.rows:
        yield from charts.read()
    rows = tuple(CacheRow(row.stats, charts.get(f"history of {row.kind} cache {row.name}", ())) for row in found.rows)
    return CachesView(
        window, seconds_of(as_of), rows, found.matching, found.total, order, match, parts.faults + charts.faults
    )


def _shards(perf: AgentPerf, stats: CacheStats) -> tuple[keys.CacheKeys, ...]:
    its = stats.settings
    return keys.cache_shards(perf.backend.namespace, _SERVICE_OF[stats.kind], stats.name, its.shards, its.layout)


def _steps(
    perf: AgentPerf, stats: CacheStats, window: str | float, as_of: Timestamp, most: int
) -> Flow[tuple[CacheSeriesRow, ...]]:
    where = _shards(perf, stats)
    return steps_read(lambda step: history.series(where, window, step, as_of), (), window, as_of, most)


def cache(
    perf: AgentPerf,
    name: str,
    window: str | float = DEFAULT_WINDOW,
    *,
    as_of: Timestamp = None,
    kind: CacheKind | str | None = None,
    entries: bool = True,
) -> Flow[CacheView | None]:
    """Read one cache; None if it does not exist. The call itself checks the arguments.

    Args:
        perf: the client.
        name: the cache.
        window: length of the window.
        as_of: end of the window; None for now.
        kind: the kind of the cache. If it is None and caches of both kinds have the name, the LRU cache is read.
        entries: whether to read the top entries and the tags, which reads up to `MAX_SCANNED` entries.
    """
    arguments.name("name", name)
    check_window(window, as_of)
    chosen = None if kind is None else arguments.choice("kind", kind, CacheKind)
    services = SERVICES if chosen is None else (_SERVICE_OF[chosen.value],)
    return _cache(perf, name, services, window, as_of, entries=arguments.flag("entries", entries))


def _cache(
    perf: AgentPerf, name: str, services: tuple[str, ...], window: str | float, as_of: Timestamp, *, entries: bool
) -> Flow[CacheView | None]:
    for service in services:
        stats = yield from read_stats(perf.backend, service, name)
        if stats is not None:
            break
    else:
        return None
    existing = ExistingCache(perf.backend, service, name, stats.settings)
    parts = Parts(
        history=_steps(perf, stats, window, as_of, CHART_STEPS),
        last_use=existing.last_used(),
        **({"entries": _entries(perf, stats)} if entries else {}),
    )
    yield from parts.read()
    return CacheView(
        name,
        stats.kind,
        window,
        seconds_of(as_of),
        CacheRow(stats, parts.get("history", ())),
        tiers_of(stats),
        parts.get("last_use", None),
        parts.get("entries", None),
        parts.faults,
    )


def _entries(perf: AgentPerf, stats: CacheStats) -> Flow[EntryRankings]:
    return read_rankings(_shards(perf, stats), TOP_ENTRIES, MAX_SCANNED)


def entries(perf: AgentPerf, name: str, kind: CacheKind | str) -> Flow[EntryRankings]:
    """Read the top entries and the tags among up to `MAX_SCANNED` entries. The call itself checks the arguments.

    Args:
        perf: the client.
        name: the cache.
        kind: its kind.
    """
    arguments.name("name", name)
    return _entries_of(perf, _SERVICE_OF[arguments.choice("kind", kind, CacheKind).value], name)


def _entries_of(perf: AgentPerf, service: str, name: str) -> Flow[EntryRankings]:
    shards = yield from keys_of(perf.backend, service, name)
    return (yield from read_rankings(shards, TOP_ENTRIES, MAX_SCANNED))


def tiers_of(stats: CacheStats) -> tuple[TierRow, ...]:
    """Return the tiers that have capacity."""
    tiers = zip(TIERS, stats.settings.ttls_ms, (stats.hot, stats.warm, stats.cold), strict=True)
    return tuple(
        TierRow(tier.value, ttl_ms / 1000 if ttl_ms else None, counts)
        for tier, ttl_ms, counts in tiers
        if counts.max_size
    )


async def read_caches(
    perf: AgentPerf,
    window: str | float = DEFAULT_WINDOW,
    *,
    as_of: Timestamp = None,
    sort: CacheSort | str = CacheSort.HITS,
    descending: bool | None = None,
    match: str = "",
    limit: int = 100,
    offset: int = 0,
) -> CachesView:
    """See `caches`."""
    flow = caches(perf, window, as_of=as_of, sort=sort, descending=descending, match=match, limit=limit, offset=offset)
    return await perf.backend.arun(flow)


async def read_cache(
    perf: AgentPerf,
    name: str,
    window: str | float = DEFAULT_WINDOW,
    *,
    as_of: Timestamp = None,
    kind: CacheKind | str | None = None,
    entries: bool = True,
) -> CacheView | None:
    """See `cache`."""
    return await perf.backend.arun(cache(perf, name, window, as_of=as_of, kind=kind, entries=entries))


async def read_entries(perf: AgentPerf, name: str, kind: CacheKind | str) -> EntryRankings:
    """See `entries`."""
    return await perf.backend.arun(entries(perf, name, kind))
