"""Access to a cache by its name alone. It is for operators, who know neither the cache's limits nor its users.

Nothing here writes settings: the settings that programs have deployed stay in effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any, Final, TypeVar

from agentperf_redis import keys as key_names
from agentperf_redis.backend import Backend
from agentperf_redis.cache import commands, entry_format
from agentperf_redis.cache.arguments import chunks, distinct_keys, stored_name, stored_tags
from agentperf_redis.cache.commands import inspection
from agentperf_redis.cache.commands.replies import NO_SETTINGS, NoSettings
from agentperf_redis.cache.commands.settings import OtherSchema
from agentperf_redis.cache.flows.inspection import read_keys, read_stats
from agentperf_redis.cache.flows.layouts import exchanged, pull
from agentperf_redis.cache.flows.ranking import EntryRanking, RankedEntry, read_top
from agentperf_redis.cache.flows.reads import Reader
from agentperf_redis.cache.flows.resharding import Progress
from agentperf_redis.cache.flows.settings import ATTEMPTS
from agentperf_redis.cache.model import NONE_GIVEN, CacheEntry, CacheStats, Settings
from agentperf_redis.cache.process.shard import Shard
from agentperf_redis.cache.process.shared_state import SharedState
from agentperf_redis.codec.codec import Codec
from agentperf_redis.command import Batch, Command, Flow
from agentperf_redis.errors import BackendFull, CorruptState, InvalidArgument, SchemaMismatch, ScriptFailed, Undecodable

T = TypeVar("T")

MAX_SWEEPS: Final = 64
"""Maximum number of sweeps of each shard before statistics are read. Each sweep examines some 256 entries."""
_DROP_ATTEMPTS: Final = 3
"""Maximum number of times that a drop clears the cache. More than one is needed if programs still use the cache."""
_EPOCHS_KEPT_MS: Final = 86_400_000
"""How long the epochs of a dropped cache are kept. Computations that began before the drop hardly last longer."""
SERVICES: Final = ("cache", "tiered")
"""The names of the two kinds of cache, LRUCache and TieredCache, in keys and in the list of resources."""


@dataclass(frozen=True, slots=True)
class Opaque:
    """Replaces a stored value that cannot be decoded here.

    Attributes:
        reason: why the value cannot be decoded. It is damaged, larger than the limit, or of a class unknown to this
            process.
    """

    reason: str


class _Lenient(Codec):
    """Returns `Opaque` where decoding fails, since an operator's process knows none of the users' classes."""

    __slots__ = ()

    def decode(self, data: bytes) -> Any:
        try:
            return super().decode(data)
        except Undecodable as error:
            return Opaque(error.reason)


@dataclass(frozen=True, slots=True)
class ExistingCache:
    """A cache that had settings when it was found. Its methods return flows.

    Attributes:
        backend: the server and namespace.
        service: one of SERVICES.
        name: name of the cache.
        settings: the settings in effect when the cache was found.
    """

    backend: Backend
    service: str
    name: str
    settings: Settings

    @property
    def shards(self) -> tuple[key_names.CacheKeys, ...]:
        """The keys of each shard."""
        where = (self.backend.namespace, self.service, self.name)
        return key_names.cache_shards(*where, self.settings.shards, self.settings.layout)

    @property
    def old_shards(self) -> tuple[key_names.CacheKeys, ...]:
        """The keys of each shard of the previous layout if it still holds entries."""
        where = (self.backend.namespace, self.service, self.name)
        source = self.settings.source
        return key_names.cache_shards(*where, source, self.settings.layout - 1) if source else ()

    def _renewed(self) -> Flow[ExistingCache]:
        """Return the cache as it is now. If its layout is being exchanged, wait for the switch, or make it."""
        settings = yield from exchanged(self.backend, self.service, self.name)
        return self if settings is None else replace(self, settings=settings)

    def moving(self) -> Flow[Progress | None]:
        """Return the progress of a change of the number of shards, or None if no change is in progress."""
        settings = self.settings
        if settings.target:
            return Progress(settings.shards, settings.target, sum(entries for entries, _ in (yield from self.sizes())))
        if not settings.source:
            return None
        entries = yield from Batch(tuple(inspection.members(each.size, of_hash=True) for each in self.old_shards))
        return Progress(settings.source, settings.shards, sum(entries))

    def shard_of(self, name: str) -> key_names.CacheKeys:
        """Return the keys of the shard that holds a key, given by its stored name."""
        return self.shards[key_names.cache_shard(name, self.settings.shards)]

    def sweep_expired(self) -> Flow[None]:
        """Remove expired entries before statistics are read: all of them, unless a shard has many entries.

        Runs at most MAX_SWEEPS sweeps of each shard, to spare other clients.

        Errors of a full or read-only server are ignored, so that the cache can still be inspected.
        """
        cursors = dict.fromkeys(self.shards, "0")
        with suppress(BackendFull, ScriptFailed, CorruptState):
            for _ in range(MAX_SWEEPS):
                steps = yield from _sweep(cursors)
                cursors = {where: step.cursor for where, step in steps.items() if step.cursor != "0"}
                if not cursors:
                    return

    def stats(self) -> Flow[CacheStats | None]:
        """Return the statistics of all processes together, or None if the cache is gone."""
        return read_stats(self.backend, self.service, self.name)

    def sizes(self) -> Flow[list[tuple[int, int]]]:
        """Return the entries and the bytes of each shard."""
        shards = self.shards
        counts = yield from Batch(tuple(map(inspection.counters, shards)))
        entries = yield from Batch(tuple(inspection.members(each.size, of_hash=True) for each in shards))
        return [(size, its["bytes"]) for size, (_, its) in zip(entries, counts, strict=True)]

    def keys(self, limit: int | None = None) -> Flow[list[str]]:
        """Return the stored names of at most `limit` entries, the least recently accessed first."""
        return read_keys((*self.old_shards, *self.shards), limit)

    def top(self, limit: int) -> Flow[dict[EntryRanking, list[RankedEntry]]]:
        """Return the top `limit` entries of each ranking; see `ranking.read_top`."""
        return read_top((*self.old_shards, *self.shards), limit)

    def entry(self, key: str) -> Flow[CacheEntry | None]:
        """Return the value (or `Opaque`) and the metadata of a key. This does not count as a read."""
        shared = self.backend.share(
            ("existing cache", self.service, self.name, self.settings.shards),
            lambda: SharedState(
                *(self.backend, self.service, self.name, self.settings.own, NONE_GIVEN, _nothing_to_report)
            ),
        )
        return Reader(shared, _Lenient()).entry(key)

    def delete_many(self, keys: Iterable[str]) -> Flow[int | None]:
        """Remove keys. If a value is being computed now, it will not be stored.

        Returns:
            The number of keys that had a value; None if the cache is gone.
        """
        names = list(dict.fromkeys(map(stored_name, distinct_keys(keys))))
        cache, removed, answered = self, 0, False
        for _ in range(ATTEMPTS):
            if cache.old_shards:
                yield from pull(cache.settings, cache.shards, cache.old_shards, names)
            of: dict[key_names.CacheKeys, list[str]] = {}
            for name in names:
                of.setdefault(cache.shard_of(name), []).append(name)
            chunked = [(where, chunk) for where, its in of.items() for chunk in chunks(its)]
            process, names = self.backend.process, []
            replies = yield from Batch(tuple(commands.delete(where, chunk, process) for where, chunk in chunked))
            for (_, chunk), reply in zip(chunked, replies, strict=True):
                if isinstance(reply, NoSettings):
                    names += chunk
                else:
                    answered = True
                    removed += reply[0]
            before, cache = cache, (yield from cache._renewed())
            if not names or cache.settings.layout == before.settings.layout:
                break
        return removed if answered else None

    def clear(self) -> Flow[int]:
        """Make every key a miss, in one step for each shard. Returns the number of entries before the call."""
        cleared = yield from self._everywhere(lambda where: commands.clear(where, self.backend.process))
        return sum(forgotten for forgotten, _ in cleared)

    def _everywhere(self, command: Callable[[key_names.CacheKeys], Command[T | NoSettings]]) -> Flow[list[T]]:
        """Run a command on all shards. If the layout changes meanwhile, run the command in the new layout."""
        cache = self
        while True:
            replies = yield from Batch(tuple(map(command, cache.shards)))
            before, cache = cache, (yield from cache._renewed()) if NO_SETTINGS in replies else cache
            if cache.settings.layout == before.settings.layout:
                return [reply for reply in replies if not isinstance(reply, NoSettings)]

    def drop(self) -> Flow[int | None]:
        """Delete the whole cache, settings and counters included. A program that still uses it creates it again.

        Returns:
            The number of removed entries. None if programs kept storing entries during the call: the cache was then
            only cleared.

        Raises:
            CorruptState: a key holds data that this library did not write. The cache may already have been cleared.
            InvalidArgument: a change of the cache's number of shards is in progress.
        """
        target = self.settings.target or (self.settings.source and self.settings.shards)
        if target:
            why = f"a cache whose change to {target} shards has ended: `agentperf cache reshard` ends it"
            raise InvalidArgument("CACHE", self.name, why)
        entries = 0
        for _ in range(_DROP_ATTEMPTS):
            entries += yield from self.clear()
            yield from self._free_cleared()
            left = yield from Batch(tuple(commands.drop(each, _EPOCHS_KEPT_MS) for each in self.shards))
            if not any(left):
                own = key_names.cache(self.backend.namespace, self.service, self.name)
                if own != self.shards[0]:  # the settings go last, as they hold the number of shards
                    yield from commands.drop(own, _EPOCHS_KEPT_MS)
                yield from self.backend.leave(self.service, self.name)
                return entries
        return None

    def _free_cleared(self) -> Flow[None]:
        """Free the values of cleared entries now. Each sweep frees up to 256."""
        cursors = dict.fromkeys(self.shards, "0")
        while cursors:
            steps = yield from _sweep(cursors)
            cursors = {where: step.cursor for where, step in steps.items() if step.more}

    def last_used(self) -> Flow[datetime | None]:
        """Return the time of the last recorded access to an entry that is still stored; None without entries.

        A read is recorded up to a second later, or up to 5 s later if the cache has many shards.
        """
        indexes = (index for each in self.shards for index in (each.hot, each.warm, each.cold, each.new))
        newest = yield from Batch(tuple(map(inspection.newest, indexes)))
        clocks = [entry_format.unpack_score(score)[0] for score in newest if isinstance(score, float)]
        return entry_format.timestamp(max(clocks)) if clocks else None

    def invalidate_tags(self, tags: Iterable[str]) -> Flow[None]:
        """Invalidate every entry that was stored with one of the tags, in one step for each shard."""
        for chunk in chunks(stored_tags(tags)):
            its, process = tuple(chunk), self.backend.process
            yield from self._everywhere(partial(commands.invalidate_tags, tags=its, origin=process))


def _sweep(cursors: dict[key_names.CacheKeys, str]) -> Flow[dict[key_names.CacheKeys, commands.Swept]]:
    """Sweep shards from their cursors. Return the result for each shard that has settings."""
    steps = yield from Batch(tuple(commands.sweep(where, cursor) for where, cursor in cursors.items()))
    return {where: step for where, step in zip(cursors, steps, strict=True) if not isinstance(step, NoSettings)}


def find(backend: Backend, service: str, name: str) -> Flow[ExistingCache | None]:
    """Return a cache; None if no program has used a cache of this name, or if the server lost it.

    Args:
        backend: the server and namespace.
        service: one of SERVICES.
        name: name of the cache.

    Raises:
        SchemaMismatch: the cache's data model has another major version.
    """
    settings = yield from commands.stored_settings(key_names.cache(backend.namespace, service, name))
    if isinstance(settings, OtherSchema):
        raise SchemaMismatch(f"cache {name}", str(settings.schema), f"schema {commands.SCHEMA}")
    return None if settings is None else ExistingCache(backend, service, name, settings)


def keys_of(backend: Backend, service: str, name: str) -> Flow[tuple[key_names.CacheKeys, ...]]:
    """Return the keys of each shard of a cache. A cache without settings counts as one shard."""
    settings = yield from commands.stored_settings(key_names.cache(backend.namespace, service, name))
    shards, layout = (settings.shards, settings.layout) if isinstance(settings, Settings) else (1, 0)
    return key_names.cache_shards(backend.namespace, service, name, shards, layout)


def find_all(backend: Backend) -> Flow[list[ExistingCache]]:
    """Return every cache of a namespace, grouped by service."""
    found = []
    for service in SERVICES:
        for name in (yield from backend.entered(service)):
            cache = yield from find(backend, service, name)
            if cache is not None:
                found.append(cache)
    return found


def _nothing_to_report(_: Shard) -> None:
    """Do nothing: inspecting an entry does not count as a read."""
