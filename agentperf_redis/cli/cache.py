"""`agentperf cache ...`: show the caches of a namespace, invalidate entries, and drop a cache.

`cache drop` deletes the settings of its cache. No other command here changes settings; `cli.reshard` has one that does.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.table import Table

from agentperf_redis import arguments
from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.cache.arguments import stored_name
from agentperf_redis.cache.flows.ranking import EntryRanking, RankedEntry
from agentperf_redis.cache.model import KINDS, TIERS, CacheEntry, CacheStats, TierStats
from agentperf_redis.cache.operator import SERVICES, ExistingCache, Opaque, find, find_all
from agentperf_redis.cli.console import (
    Exit,
    NotFound,
    Target,
    WrongUsage,
    confirmed,
    counted,
    duration,
    err,
    new_table,
    not_found,
    out,
    print_json,
    printable,
    quoted,
    seconds_cell,
    unescaped,
)
from agentperf_redis.cli.options import Yes, group, on_server
from agentperf_redis.cli.times import age_text

app = group("Show caches, invalidate entries, change the number of shards, and drop a cache.")

_MIB = 2**20
_SHOWN_KEYS = 10
"""Maximum number of keys that an error shows."""


class CacheKind(StrEnum):
    """The two kinds of caches. Two caches of different kinds may have the same name."""

    LRU = "lru"
    TIERED = "tiered"


_A_KIND = {CacheKind.LRU.value: "an lru", CacheKind.TIERED.value: "a tiered"}

Name = Annotated[str, typer.Argument(help="Name of the cache.", metavar="CACHE")]
KindOption = Annotated[
    CacheKind | None,
    typer.Option("--kind", help="Kind of the cache, when two have the same name.", case_sensitive=False),
]


@app.command("list")
@on_server
def list_(
    target: Target,
) -> None:
    """List all caches of the namespace, with the last recorded access to an entry that is still stored."""
    with target.connect() as perf:
        existing = perf.backend.run(find_all(perf.backend))
        # Read the time of the last access first: `_stats` drops expired entries, together with their times of access.
        used = {each: perf.backend.run(each.last_used()) for each in existing}
        found = [(each, _stats(perf, each)) for each in existing]
    caches = [(cache, stats) for cache, stats in found if stats is not None]
    if target.as_json:
        print_json("cache list", {"caches": [_plain_listed(cache, stats, used[cache]) for cache, stats in caches]})
        return
    if not caches:
        target.nothing("No cache is in use.")
        return
    table = new_table(
        "caches",
        ["cache", "kind"],
        ["entries", "limit", "MiB", "limit", "hits", "misses", "hit rate", "evicted", "seconds saved"],
        ["last use"],
    )
    now = time.time()
    for cache, stats in caches:
        at = used[cache]
        table.add_row(
            cache.name,
            f"{KINDS[cache.service]}, {stats.settings.policy.value}" + _shards_text(stats),
            str(stats.size),
            str(stats.max_size),
            f"{stats.bytes / _MIB:.2f}",
            f"{stats.max_bytes / _MIB:.2f}" if stats.max_bytes else "",
            str(stats.hits),
            str(stats.misses),
            f"{stats.hit_rate:.1%}",
            str(stats.evictions),
            f"{stats.seconds_saved:.1f}",
            "" if at is None else age_text(now - at.timestamp()),
        )
    out.print(table)


@app.command()
@on_server
def stats(
    target: Target,
    name: Name,
    kind: KindOption = None,
) -> Exit | None:
    """Show one cache: its settings, its tiers, and the counters of all processes."""
    with on_cache(target, name, kind) as (perf, cache):
        found = _stats(perf, cache)
        if found is None:
            return gone(cache)
        if target.as_json:
            spread, moving = _spread(perf, cache), _plain_moving(perf, cache)
            print_json("cache stats", {**_plain_stats(cache, found), "spread": spread, "moving": moving})
            return None
        size = f"{found.size} of {counted(found.max_size, 'entry', 'entries')}, {found.bytes / _MIB:.2f} MiB"
        out.print(f"{cache.name} ({KINDS[cache.service]}, policy {found.settings.policy.value})")
        out.print(size + (f" of {found.max_bytes / _MIB:.2f}" if found.max_bytes else ""))
        misses, damaged = counted(found.misses, "miss", "misses"), counted(found.corrupt, "read")
        out.print(f"{counted(found.hits, 'hit')}, {misses}, hit rate {found.hit_rate:.1%}")
        out.print(f"{found.evictions} evicted, {found.expirations} expired, {damaged} of damaged entries")
        out.print(f"{found.seconds_saved:.1f} s of computing saved")
        table = new_table("tiers", ["tier"], ["entries", "limit", "default TTL s", "hits", "misses"])
        for tier, ttl_ms, each in _tiers(found):
            ttl = f"{ttl_ms / 1000:g}" if ttl_ms else "none"
            table.add_row(tier, str(each.size), str(each.max_size), ttl, str(each.hits), str(each.misses))
        out.print(table)
        moving = _plain_moving(perf, cache)
        if moving is not None:
            left = counted(moving["left"], "entry is", "entries are")
            change = f"from {counted(moving['from'], 'shard')} to {moving['to']}"
            out.print(f"The cache changes {change}; {left} not moved yet: `agentperf cache reshard` moves them")
        if found.settings.shards > 1:
            _print_spread(perf, cache)
        return None


@app.command()
@on_server
def keys(
    target: Target,
    name: Name,
    kind: KindOption = None,
    limit: Annotated[int, typer.Option("--limit", help="Maximum number of keys.", min=1, metavar="N")] = 1000,
) -> None:
    """Print the keys of a cache, one per line, the least recently used first.

    A key beyond 120 bytes is shown as its first 40 characters and a hash; `get` and `delete` accept that name.
    """
    with on_cache(target, name, kind) as (perf, cache):
        perf.backend.run(cache.sweep_expired())
        found = perf.backend.run(cache.keys(limit + 1))
        if target.as_json:
            print_json("cache keys", {**plain_name(cache), "keys": found[:limit], "complete": len(found) <= limit})
            return
        for key in found[:limit]:
            out.print(printable(key), soft_wrap=True)
        if len(found) > limit:
            err.print(f"There are more than {limit}; --limit shows more.")


@app.command()
@on_server
def top(
    target: Target,
    name: Name,
    kind: KindOption = None,
    by: Annotated[
        EntryRanking | None, typer.Option("--by", help="Show this ranking only.", case_sensitive=False)
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", help="Maximum number of entries per ranking.", min=1, metavar="N")
    ] = 10,
) -> None:
    """Show the largest, most read and most expensive entries of a cache. Scans every entry."""
    with on_cache(target, name, kind) as (perf, cache):
        found = perf.backend.run(cache.top(limit))
        rankings = list(EntryRanking) if by is None else [by]
        if target.as_json:
            plain = {each.value: [_plain_ranked_entry(entry) for entry in found[each]] for each in rankings}
            print_json("cache top", {**plain_name(cache), **plain})
            return
        titles = {
            EntryRanking.SIZE: "largest",
            EntryRanking.READS: "most read",
            EntryRanking.COST: "most expensive to compute",
        }
        for each in rankings:
            if not found[each]:
                err.print(f"{titles[each]}: none")
                continue
            table = new_table(titles[each], ["key"], ["KiB", "reads", "computed in s", "seconds saved"])
            for entry in found[each]:
                table.add_row(
                    printable(entry.name),
                    f"{entry.size_bytes / 1024:.1f}",
                    str(entry.reads),
                    seconds_cell(entry.compute_seconds) if entry.compute_seconds else "",
                    f"{entry.saved_seconds:.1f}" if entry.compute_seconds else "",
                )
            out.print(table)


@app.command()
@on_server
def get(
    target: Target,
    name: Name,
    key: Annotated[str, typer.Argument(help="Key of the entry.", metavar="KEY")],
    kind: KindOption = None,
) -> Exit | None:
    """Show an entry: its value and its metadata. This does not count as a read of the entry."""
    with on_cache(target, name, kind) as (perf, cache):
        entry = perf.backend.run(cache.entry(_meant(perf, cache, key)))
        if entry is None:
            return not_found(f"key {quoted(key)} in cache {quoted(cache.name)}")
        plain = {**_plain_entry(entry), "redis_key": _redis_key(cache, entry.key)}
        if target.as_json:
            print_json("cache get", {**plain_name(cache), **plain})
            return None
        opaque = isinstance(entry.value, Opaque)
        out.print(f"unreadable here: {entry.value.reason}" if opaque else printable(repr(entry.value)), soft_wrap=True)
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("stored at", printable(plain["redis_key"]))
        for field in ("created_at", "expires_at", "last_accessed", "access_count", "tier", "size_bytes"):
            if plain[field] is not None:
                table.add_row(field.replace("_", " "), str(plain[field]))
        if entry.tags:
            table.add_row("tags", ", ".join(sorted(entry.tags)))
        if entry.compute_seconds:
            table.add_row("computed in", duration(entry.compute_seconds))
        out.print(table)
        return None


@app.command()
@on_server
def delete(
    target: Target,
    name: Name,
    keys: Annotated[list[str], typer.Argument(help="Keys of entries.", metavar="KEY...")],
    kind: KindOption = None,
    yes: Yes = False,
) -> Exit | None:
    """Remove entries. A value whose computation has already begun is not stored either."""
    with on_cache(target, name, kind) as (perf, cache):
        refused = confirmed(f"Delete {counted(len(keys), 'key')} of cache {cache.name}?", yes=yes)
        if refused is not None:
            return refused
        removed = perf.backend.run(cache.delete_many([_meant(perf, cache, key) for key in keys]))
        if removed is None:
            return gone(cache)
        if target.as_json:
            print_json("cache delete", {**plain_name(cache), "asked": len(keys), "removed": removed})
        elif removed:
            out.print(f"Removed {counted(removed, 'key')} of {len(keys)} from cache {cache.name}.")
        if removed:
            return Exit.OK
        shown = quoted(*keys[:_SHOWN_KEYS]) + (", ..." if len(keys) > _SHOWN_KEYS else "")
        return not_found(f"{'key' if len(keys) == 1 else 'keys'} {shown} in cache {quoted(cache.name)}")


@app.command()
@on_server
def clear(
    target: Target,
    name: Name,
    kind: KindOption = None,
    yes: Yes = False,
) -> Exit | None:
    """Invalidate every key of a cache at once. Its settings and its counters stay."""
    with on_cache(target, name, kind) as (perf, cache):
        refused = confirmed(f"Make every key of cache {cache.name} a miss?", yes=yes)
        if refused is not None:
            return refused
        cleared = perf.backend.run(cache.clear())
        if target.as_json:
            print_json("cache clear", {**plain_name(cache), "entries": cleared})
        else:
            out.print(f"Cleared cache {cache.name}, which held {counted(cleared, 'entry', 'entries')}.")
        return None


@app.command()
@on_server
def drop(
    target: Target,
    name: Name,
    kind: KindOption = None,
    yes: Yes = False,
) -> Exit | None:
    """Delete a whole cache: entries, settings and counters. A program that still uses it creates it again.

    Exit 1 if programs keep storing entries meanwhile. Then the cache is only cleared.
    """
    with on_cache(target, name, kind) as (perf, cache):
        refused = confirmed(f"Delete cache {cache.name} with its settings and counters?", yes=yes)
        if refused is not None:
            return refused
        entries = perf.backend.run(cache.drop())
        if target.as_json:
            print_json("cache drop", {**plain_name(cache), "dropped": entries is not None, "entries": entries})
        elif entries is not None:
            out.print(f"Dropped cache {cache.name}, which held {counted(entries, 'entry', 'entries')}.")
        if entries is None:
            err.print(f"agentperf: cache {cache.name} was only cleared: programs keep storing entries", style="red")
            return Exit.FAILURE
        return None


@app.command("invalidate-tag")
@on_server
def invalidate_tag(
    target: Target,
    name: Name,
    tags: Annotated[list[str], typer.Argument(help="Tags that entries were stored with.", metavar="TAG...")],
    kind: KindOption = None,
    yes: Yes = False,
) -> Exit | None:
    """Invalidate every entry that was stored with one of the tags. This takes one step for any number of entries."""
    with on_cache(target, name, kind) as (perf, cache):
        invalidation = cache.invalidate_tags(tags)
        shown = ", ".join(sorted(set(tags)))
        refused = confirmed(f"Make every entry of cache {cache.name} with {printable(shown)} a miss?", yes=yes)
        if refused is not None:
            return refused
        perf.backend.run(invalidation)
        if target.as_json:
            print_json("cache invalidate-tag", {**plain_name(cache), "tags": sorted(set(tags))})
        else:
            out.print(f"Every entry of cache {cache.name} stored with {shown} until now is a miss.")
        return None


@contextlib.contextmanager
def on_cache(target: Target, name: str, kind: CacheKind | None) -> Iterator[tuple[AgentPerf, ExistingCache]]:
    """Yield the client, and the cache of this name.

    Raises:
        NotFound: there is no such cache.
        WrongUsage: both an LRU cache and a tiered cache have this name, and no kind was given.
    """
    arguments.name("CACHE", name)
    with target.connect() as perf:
        services = [service for service in SERVICES if kind is None or KINDS[service] == kind.value]
        others = [service for service in SERVICES if service not in services]
        caches = [cache for each in services if (cache := perf.backend.run(find(perf.backend, each, name))) is not None]
        if not caches:
            what = "cache" if kind is None else f"{kind.value} cache"
            there = [each for each in others if perf.backend.run(find(perf.backend, each, name)) is not None]
            raise NotFound(f"{what} {quoted(name)}" + (f"; there is {_A_KIND[KINDS[there[0]]]} one" if there else ""))
        if len(caches) > 1:
            raise WrongUsage(f"give --kind lru or --kind tiered: there is one of each kind named {quoted(name)}")
        yield perf, caches[0]


def _meant(perf: AgentPerf, cache: ExistingCache, text: str) -> str:
    """Return the key that a text on the command line means.

    The command `keys` prints keys escaped. So if the cache has no entry under the text itself, the text is unescaped.
    """
    key = unescaped(text)
    return key if key != text and perf.backend.run(cache.entry(text)) is None else text


def _stats(perf: AgentPerf, cache: ExistingCache) -> CacheStats | None:
    """Return the current statistics of a cache. Expired entries count as expirations, not as entries."""
    perf.backend.run(cache.sweep_expired())
    return perf.backend.run(cache.stats())


def _shards_text(stats: CacheStats) -> str:
    return f", {stats.settings.shards} shards" if stats.settings.shards > 1 else ""


def _redis_key(cache: ExistingCache, key: str) -> str:
    """Return the key under which the server stores an entry."""
    return cache.shard_of(stored_name(key)).entry(key)


def _spread(perf: AgentPerf, cache: ExistingCache) -> list[dict[str, Any]]:
    """Return the shards, entries and bytes of a cache on each node."""
    nodes: dict[str, dict[str, Any]] = {}
    for where, (entries, size) in zip(cache.shards, perf.backend.run(cache.sizes()), strict=True):
        node = perf.backend.node_of(where.meta)
        name = "unknown" if node is None else f"{node.host}:{node.port}"
        row = nodes.setdefault(name, {"node": name, "shards": 0, "entries": 0, "bytes": 0})
        for figure, count in (("shards", 1), ("entries", entries), ("bytes", size)):
            row[figure] += count
    return [nodes[name] for name in sorted(nodes)]


def _plain_moving(perf: AgentPerf, cache: ExistingCache) -> dict[str, int] | None:
    moving = perf.backend.run(cache.moving())
    return None if moving is None else {"from": moving.source, "to": moving.target, "left": moving.left}


def _print_spread(perf: AgentPerf, cache: ExistingCache) -> None:
    """Print where the shards lie, and how to find the shard of a key."""
    table = new_table("nodes", ["node"], ["shards", "entries", "MiB"])
    for row in _spread(perf, cache):
        table.add_row(row["node"], str(row["shards"]), str(row["entries"]), f"{row['bytes'] / _MIB:.2f}")
    out.print(table)
    shards = len(cache.shards)
    start, _, _ = cache.shards[0].tag.partition("#")
    change = f"~{cache.settings.layout}" if cache.settings.layout else ""
    where = f"Entries lie at {start}#<shard>/{shards}{change}.<number>}}:e:<key>; the shard is crc16(<key>) % {shards}"
    out.print(f"{where}, as CLUSTER KEYSLOT computes it. `agentperf cache get` prints the whole key.", soft_wrap=True)


def gone(cache: ExistingCache) -> Exit:
    """Report that a cache was removed while a command used it."""
    return not_found(f"cache {quoted(cache.name)}: it was just removed")


def _tiers(stats: CacheStats) -> list[tuple[str, int, TierStats]]:
    """Return the tiers that have capacity: name, default TTL in ms, counts. An LRUCache has one tier."""
    tiers = zip(TIERS, stats.settings.ttls_ms, (stats.hot, stats.warm, stats.cold), strict=True)
    return [(tier.value, ttl_ms, counts) for tier, ttl_ms, counts in tiers if counts.max_size]


def plain_name(cache: ExistingCache) -> dict[str, Any]:
    """Return the name and the kind of a cache, as JSON documents contain them."""
    return {"cache": cache.name, "cache_kind": KINDS[cache.service]}


def _plain_stats(cache: ExistingCache, stats: CacheStats) -> dict[str, Any]:
    return {
        **plain_name(cache),
        "policy": stats.settings.policy.value,
        "shards": stats.settings.shards,
        "entries": stats.size,
        "max_entries": stats.max_size,
        "bytes": stats.bytes,
        "max_bytes": stats.max_bytes,
        "hits": stats.hits,
        "misses": stats.misses,
        "hit_rate": stats.hit_rate,
        "evictions": stats.evictions,
        "expirations": stats.expirations,
        "corrupt": stats.corrupt,
        "seconds_saved": stats.seconds_saved,
        "tiers": {
            tier: {
                "entries": counts.size,
                "max_entries": counts.max_size,
                "default_ttl_s": ttl_ms / 1000 if ttl_ms else None,
                "hits": counts.hits,
                "misses": counts.misses,
            }
            for tier, ttl_ms, counts in _tiers(stats)
        },
    }


def _plain_listed(cache: ExistingCache, stats: CacheStats, used: datetime | None) -> dict[str, Any]:
    return {**_plain_stats(cache, stats), "last_used": None if used is None else used.isoformat()}


def _plain_entry(entry: CacheEntry) -> dict[str, Any]:
    return {
        "key": entry.key,
        **_plain_value(entry.value),
        "created_at": entry.created_at.isoformat(),
        "expires_at": entry.expires_at.isoformat() if entry.expires_at else None,
        "last_accessed": entry.last_accessed.isoformat() if entry.last_accessed else None,
        "access_count": entry.access_count,
        "tier": entry.tier.value,
        "tags": sorted(entry.tags),
        "size_bytes": entry.size_bytes,
        "compute_s": entry.compute_seconds,
        "entry_version": entry.version,
        "ttl_s": None if entry.ttl == math.inf else entry.ttl,
    }


def _plain_ranked_entry(entry: RankedEntry) -> dict[str, Any]:
    return {
        "key": entry.name,
        "size_bytes": entry.size_bytes,
        "access_count": entry.reads,
        "compute_s": entry.compute_seconds,
        "seconds_saved": entry.saved_seconds,
        "created_at": entry.created_at.isoformat(),
        "tags": sorted(entry.tags),
    }


def _plain_value(value: object) -> dict[str, Any]:
    """Return the value as it is if JSON can represent it without change, else its repr and its type."""
    if isinstance(value, Opaque):
        return {"value_unreadable": value.reason}
    try:
        if json.loads(json.dumps(value, allow_nan=False)) == value:
            return {"value": value}
    except (TypeError, ValueError):
        pass
    return {"value_repr": repr(value), "value_type": type(value).__name__}
