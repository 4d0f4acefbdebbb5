"""Finds the shard of a key. Before the first use, it learns the number of shards and writes the settings.

All flows reach the server through a shard. `shard_to_read` and `shard_to_write` return the shard of a key, and
`shards_to_read` and `ready` are for operations on whole caches. A cache with one shard is no special case, except that
one key holds both its settings and those of its shard.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Final

from agentperf_redis.cache import commands, entry_format
from agentperf_redis.cache.arguments import chunks
from agentperf_redis.cache.commands import inspection
from agentperf_redis.cache.commands.replies import NoSettings
from agentperf_redis.cache.flows.layouts import CLOSED_KEPT_MS, exchanged, pull
from agentperf_redis.cache.model import Settings
from agentperf_redis.cache.process.shard import InvalidationScope, Shard
from agentperf_redis.cache.process.shared_state import SharedState, log
from agentperf_redis.command import Batch, Flow
from agentperf_redis.errors import (
    AgentPerfError,
    BackendFull,
    BackendUnavailable,
    CorruptState,
    SchemaMismatch,
    ScriptFailed,
)

ATTEMPTS: Final = 4
"""Maximum attempts of an operation that fails because the server has lost the settings."""


def shard_to_write(shared: SharedState, name: str) -> Flow[Shard]:
    """Return the shard of a key, given by its stored name, after making it `ready`."""
    while True:
        shard = shared.shard(name)
        yield from ready(shard)
        if shard.old and not shard.retired:
            yield from pull_keys(shared, (name,))
        if not shard.retired:
            return shard


def pull_keys(shared: SharedState, names: Iterable[str]) -> Flow[None]:
    """Move entries of a cache from its previous layout to the present one. This may retire the shards.

    Args:
        shared: the cache.
        names: stored names of the keys.
    """
    if time.monotonic() - shared.layout_seen_at > _OLD_SEEN_S:
        yield from _learn_layout(shared)
    shards = shared.shards
    if shards[0].old:
        yield from pull(shared.settings, tuple(shard.keys for shard in shards), shards[0].old, names)


_OLD_SEEN_S: Final = 0.5
"""How often a process checks whether the previous layout is empty. Until it is, calls also look there for keys."""
_LAYOUT_SEEN_S: Final = CLOSED_KEPT_MS / 2000
"""How long a process may write or invalidate without reading the layout, s. It is half the time for which an old shard
stays marked as closed. Without the mark, an invalidation of an old shard would be acknowledged, but have no effect."""


def shard_to_read(shared: SharedState, name: str) -> Flow[Shard]:
    """Return the shard of a key, given by its stored name, after sending what must precede a read.

    The first read of a process learns the number of shards. Failed invalidations must precede a read. So must
    settings that a user chose, because they may lower limits. If the server is full or the cache's state is damaged,
    the read goes on without sending the settings.
    """
    shard = shared.shard(name)
    if shared.laid_out and not shard.unsent and not shard.old:
        return shard
    while True:
        yield from prepare(shard)
        if shard.old and not shard.retired:
            yield from pull_to_read(shared, (name,))
        if not shard.retired:
            return shard
        shard = shared.shard(name)


def pull_to_read(shared: SharedState, names: Iterable[str]) -> Flow[None]:
    """Move entries, as `pull_keys` does, before a read. If the server is full, unmoved entries count as missing."""
    try:
        yield from pull_keys(shared, names)
    except BackendFull as error:
        shared.warn("cache %s: entries cannot be moved to the new layout: %s", shared.name, error)


def follow(shard: Shard) -> Flow[bool]:
    """Learn the layout after a shard was found closed. Returns whether the cache has another layout.

    If it has none, its settings are damaged or gone, and the shard holds nothing that can be read.
    """
    yield from _learn_layout(shard.cache)
    return shard.retired


def shards_to_read(shared: SharedState) -> Flow[tuple[Shard, ...]]:
    """Return all shards, each prepared as `shard_to_read` does it.

    Always reads the layout, since the indexes of a shard do not show that it was closed.
    """
    while True:
        shards = shared.shards
        if shared.laid_out:  # read a known layout again: `prepare` below reads only an unknown layout
            yield from _learn_layout(shared)
        for shard in shards:
            yield from prepare(shard)
        if shards is shared.shards:
            return shards


def prepare(shard: Shard) -> Flow[None]:
    """Send what must precede a read of a shard; see `shard_to_read`. This may retire the shard."""
    shared = shard.cache
    if shard.unsent and not shard.retired:
        try:
            yield from ready(shard)
        except (BackendFull, CorruptState, ScriptFailed) as error:
            if shard.pending_invalidations:  # without these invalidations, a read could return an invalidated value
                raise
            shared.warn("cache %s: the settings could not be stored: %s", shared.name, error)
    if not shared.laid_out:
        yield from _learn_layout(shared)


def at_once(shared: SharedState) -> int:
    """Return the maximum number of keys for which one operation sends its commands in parallel."""
    return commands.MAX_KEYS * min(len(shared.shards), _MAX_SIDE_BY_SIDE)


_MAX_SIDE_BY_SIDE: Final = 16
"""Maximum number of shards to which an operation sends commands in parallel. It limits the replies held in memory."""


def grouped(shared: SharedState, names: Sequence[str]) -> list[tuple[Shard, list[str]]]:
    """Group stored names by shard. Each group has at most MAX_KEYS names, the limit of one command."""
    of: dict[Shard, list[str]] = {}
    for name in names:
        of.setdefault(shared.shard(name), []).append(name)
    return [(shard, chunk) for shard, its in of.items() for chunk in chunks(its)]


def ready(shard: Shard) -> Flow[None]:
    """Register the cache and write its settings and those of the shard, unless this process has done so already.

    If invalidations are pending after an outage, send them first, so that they precede any read or write. If the server
    has another number of shards than this process assumed, the shard is retired.
    """
    shared = shard.cache
    if shared.used is not None:
        shared.used(shared)
    if shared.laid_out and time.monotonic() - shared.layout_seen_at > _LAYOUT_SEEN_S:
        yield from _learn_layout(shared)
    for _ in range(ATTEMPTS):
        if shared.laid_out and not shard.retired:
            yield from _send_pending(shard)
        if not (shared.deployed and shared.laid_out):
            yield from _deploy(shared)
        if not (shard.deployed or shard.retired):
            yield from _deploy_shares((shard,))
        waiting = shard.pending_invalidations or shard.pending_releases
        if shard.retired or (shared.deployed and shard.deployed and not waiting):
            return
    if shard.pending_invalidations:
        raise CorruptState(shard.keys.meta, "settings that are lost again after each write")


def _send_pending(shard: Shard) -> Flow[None]:
    if shard.pending_invalidations:
        yield from _flush_pending(shard)
    if shard.pending_releases:
        yield from _release_pending(shard)


def _learn_layout(shared: SharedState) -> Flow[None]:
    """Read the number of shards. If the settings are damaged, keep the number that this process assumes."""
    try:
        stored = yield from exchanged(shared.backend, shared.service, shared.name)
    except (CorruptState, ScriptFailed) as error:
        shared.warn("cache %s: the settings could not be read: %s", shared.name, error)
        stored = None
    if stored is not None:
        shared.lay_out(stored)
    shared.laid_out, shared.layout_seen_at = True, time.monotonic()


def _deploy(shared: SharedState) -> Flow[None]:
    """Register the cache and write its settings. If this changes the settings, also write those of all shards."""
    entered = False
    with suppress(BackendFull):  # an existing cache is already registered; for a new cache, `deploy` also fails
        entered = yield from shared.backend.enter(shared.service, shared.name)
    for _ in range(ATTEMPTS):
        sent_at = time.monotonic()
        reply = yield from commands.deploy(shared.keys, shared.settings, shared.given)
        if isinstance(reply, commands.OtherSchema):
            raise SchemaMismatch(f"cache {shared.name}", str(reply.schema), f"schema {commands.SCHEMA}")
        if isinstance(reply, commands.Deployed):
            break
        if isinstance(reply, commands.Moving):
            yield from exchanged(shared.backend, shared.service, shared.name)
        else:
            shards = len(shared.shards)
            refusal = _refusal(shared, reply.stored)
            if len(shared.shards) == shards:
                raise refusal
    else:
        raise CorruptState(shared.keys.meta, "a layout that changes all the time")
    if not (reply.before or entered):  # the cache was dropped after this process had registered it
        yield from shared.backend.enter(shared.service, shared.name, again=True)
    if reply.before not in ("", reply.settings):
        texts = (_in_words(shared, text) for text in (reply.before, reply.settings))
        log.warning("cache %s: settings changed from %s to %s", shared.name, *texts)
    settings = Settings.parse(reply.settings) or shared.settings
    shared.lay_out(settings)
    shared.settings = settings.own
    shared.deployed = True
    if shared.shards[0].keys == shared.keys:
        yield from _note_deployed(shared.shards[0], reply, sent_at)
    elif reply.before != reply.settings:
        yield from _deploy_shares(shared.shards, tolerant=True)


def _deploy_shares(shards: Sequence[Shard], *, tolerant: bool = False) -> Flow[None]:
    """Write the settings of shards: their shares of the limits of the cache.

    Args:
        shards: shards of one cache that has several.
        tolerant: whether to go on if a shard cannot be reached. Its settings are then written before its next use.
    """
    shared = shards[0].cache
    settings = shared.settings
    for _ in range(ATTEMPTS):
        sent_at = time.monotonic()
        replies = yield from Batch(
            tuple(commands.deploy(shard.keys, settings.of_shard(shard.number)) for shard in shards)
        ).settled()
        for shard, reply in zip(shards, replies, strict=True):
            if isinstance(reply, AgentPerfError):
                if not tolerant:
                    raise reply
            elif isinstance(reply, commands.Deployed):
                yield from _note_deployed(shard, reply, sent_at)
        # Another process may have changed the settings meanwhile. The commands above may have overwritten this change
        # in a shard, so read the settings again.
        stored: Settings | commands.OtherSchema | None = None
        with suppress(BackendUnavailable):  # the settings may be on a node that is down
            stored = yield from commands.stored_settings(shared.keys)
        if not isinstance(stored, Settings):
            return
        if stored.target or (stored.shards, stored.layout) != (len(shared.shards), shared.layout):
            for shard in shards:
                shard.lose_settings()
            return
        if stored.own == settings:
            return
        settings = stored.own


def _note_deployed(shard: Shard, reply: commands.Deployed, sent_at: float) -> Flow[None]:
    settings = Settings.parse(reply.settings)
    if settings is not None and _lowered(Settings.parse(reply.before), settings):
        yield from _shrink(shard, settings)
    shard.set_clock(reply.now_ms, sent_at)
    shard.learn(reply.now_ms * entry_format.CLOCK_PER_S // 1000)
    shard.deployed = True


def _refusal(shared: SharedState, stored: str) -> CorruptState:
    """Raise InvalidArgument for settings that the server refused. If these are valid, return a CorruptState."""
    present = Settings.parse(stored)
    if present is not None:
        shared.lay_out(present)
        fields = zip(shared.given, shared.settings.fields, present.fields, strict=True)
        Settings.of([own if given == "1" else other for given, own, other in fields]).check_shards(shared.service)
    return CorruptState(shared.keys.meta, f"settings with which new ones do not fit: {stored}")


def _in_words(shared: SharedState, text: str) -> str:
    settings = Settings.parse(text)
    return text if settings is None else settings.shown(shared.service)


def _flush_pending(shard: Shard) -> Flow[None]:
    """Send the pending invalidations. If several processes send the same one, an extra miss is the only effect."""
    shared = shard.cache
    invalidations = list(shard.pending_invalidations)
    names = {kind: [name for scope, name in invalidations if scope is kind] for kind in InvalidationScope}
    if shard.old:
        yield from pull_keys(shared, names[InvalidationScope.KEY])
    refused = False
    if names[InvalidationScope.ALL]:
        refused = isinstance((yield from commands.clear(shard.keys, shared.origin)), NoSettings)
    for chunk in chunks(names[InvalidationScope.TAG]):
        reply = yield from commands.invalidate_tags(shard.keys, tuple(chunk), shared.origin)
        refused = refused or isinstance(reply, NoSettings)
    for chunk in chunks(names[InvalidationScope.KEY]):
        refused = isinstance((yield from commands.delete(shard.keys, chunk, shared.origin)), NoSettings) or refused
    if refused:  # the shard has no settings, or another layout: the next `ready` deploys the settings and retries
        shard.lose_settings()
    if refused or shard.retired:
        return
    shard.remove_pending(invalidations)
    log.warning("cache %s: sent %d invalidations that had failed before", shared.name, len(invalidations))


def _release_pending(shard: Shard) -> Flow[None]:
    """Release the compute leases whose end could not be reported. Leases that have expired are left out."""
    leases, now = dict(shard.pending_releases), time.monotonic()
    releases = tuple(
        commands.release(shard.keys, name, token, error=None, error_ms=0, origin=shard.cache.origin)
        for (name, token), ends in leases.items()
        if ends > now
    )
    if releases:
        for result in (yield from Batch(releases).settled()):
            if isinstance(result, BackendUnavailable):
                raise result
    # If a release failed with an error other than BackendUnavailable, such as a wrong type, the release is not
    # repeated. The lease then expires.
    shard.remove_released(leases)


def _lowered(before: Settings | None, now: Settings) -> bool:
    if before is None:
        return False
    maximum = now.max_bytes and (not before.max_bytes or now.max_bytes < before.max_bytes)
    return bool(maximum) or any(capacity < had for capacity, had in zip(now.capacities, before.capacities, strict=True))


def _shrink(shard: Shard, settings: Settings) -> Flow[None]:
    """Shrink a shard to lowered limits. Each sweep moves and evicts at most 512 entries, to avoid blocking clients.

    If this process ends before the shard fits, each later put moves and evicts up to 512 entries.
    """
    where, steps = shard.keys, 0
    while True:
        total, hot, warm = yield from Batch(
            (inspection.members(where.size, of_hash=True), *map(inspection.members, (where.hot, where.warm)))
        )
        _, count = yield from inspection.counters(where)
        capacities = settings.capacities
        within = total <= sum(capacities) and hot <= capacities[0] and warm <= capacities[1]
        # If another process raises a limit meanwhile, the shard may never fit `settings`. So the number of sweeps is
        # limited.
        steps = steps or 3 + total // commands.MAX_EVICTIONS
        if (within and not 0 < settings.max_bytes < count["bytes"]) or steps == 1:
            return
        steps -= 1
        if isinstance((yield from commands.sweep(where, "0")), commands.NoSettings):
            return
