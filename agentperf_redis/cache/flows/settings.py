"""Writes the settings of a cache: on its first use in each process, and again whenever the server has lost them."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Final

from agentperf_redis.cache import commands, entry_format
from agentperf_redis.cache.arguments import chunks
from agentperf_redis.cache.commands import inspection
from agentperf_redis.cache.model import Settings
from agentperf_redis.cache.process.shared_state import InvalidationScope, SharedState, log
from agentperf_redis.command import Batch, Flow
from agentperf_redis.errors import BackendFull, BackendUnavailable, CorruptState, SchemaMismatch, ScriptFailed

ATTEMPTS: Final = 4
"""Maximum attempts of an operation that fails because the server has lost the settings."""


def ready(shared: SharedState) -> Flow[None]:
    """Register the cache and write its settings, unless this process has done so already.

    If invalidations are pending after an outage, send them first, so that they precede any read or write.
    """
    if shared.used is not None:
        shared.used(shared)
    if shared.pending_invalidations:
        yield from _flush_pending(shared)
    if shared.pending_releases:
        yield from _release_pending(shared)
    if shared.deployed:
        return
    entered = False
    with suppress(BackendFull):  # an existing cache is already registered; for a new cache, `deploy` fails, too
        entered = yield from shared.backend.enter(shared.service, shared.name)
    sent_at = time.monotonic()
    reply = yield from commands.deploy(shared.keys, shared.settings, shared.given)
    if isinstance(reply, commands.OtherSchema):
        raise SchemaMismatch(f"cache {shared.name}", str(reply.schema), f"schema {commands.SCHEMA}")
    if not (reply.before or entered):  # the cache was dropped after this process had entered it
        yield from shared.backend.enter(shared.service, shared.name, again=True)
    if reply.before not in ("", reply.settings):
        texts = (_in_words(shared, text) for text in (reply.before, reply.settings))
        log.warning("cache %s: settings changed from %s to %s", shared.name, *texts)
    shared.settings = Settings.parse(reply.settings) or shared.settings
    if _lowered(Settings.parse(reply.before), shared.settings):
        yield from _shrink(shared)
    shared.set_clock(reply.now_ms, sent_at)
    shared.learn(reply.now_ms * entry_format.CLOCK_PER_S // 1000)
    shared.deployed = True


def before_read(shared: SharedState) -> Flow[None]:
    """Send what must precede a read: failed invalidations, and settings that a user chose, which may lower limits.

    If the server is full or the cache's state is damaged, the read goes on although the settings are not sent.
    """
    if not shared.unsent:
        return
    try:
        yield from ready(shared)
    except (BackendFull, CorruptState, ScriptFailed) as error:
        if shared.pending_invalidations:  # a read could return a value that was invalidated
            raise
        shared.warn("cache %s: the settings could not be stored: %s", shared.name, error)


def _in_words(shared: SharedState, text: str) -> str:
    settings = Settings.parse(text)
    return text if settings is None else settings.shown(shared.service)


def _flush_pending(shared: SharedState) -> Flow[None]:
    """Send the pending invalidations. If several processes send the same one, the only effect is an extra miss."""
    invalidations = list(shared.pending_invalidations)
    names = {kind: [name for scope, name in invalidations if scope is kind] for kind in InvalidationScope}
    if names[InvalidationScope.ALL]:
        yield from commands.clear(shared.keys, shared.origin)
    for chunk in chunks(names[InvalidationScope.TAG]):
        yield from commands.invalidate_tags(shared.keys, tuple(chunk), shared.origin)
    for chunk in chunks(names[InvalidationScope.KEY]):
        yield from commands.delete(shared.keys, chunk, shared.origin)  # a cache without settings has no entries
    shared.remove_pending(invalidations)
    log.warning("cache %s: sent %d invalidations that had failed before", shared.name, len(invalidations))


def _release_pending(shared: SharedState) -> Flow[None]:
    """Release the compute leases whose end could not be reported. A lease that has ended by its TTL is left out."""
    leases, now = dict(shared.pending_releases), time.monotonic()
    releases = tuple(
        commands.release(shared.keys, name, token, error=None, error_ms=0, origin=shared.origin)
        for (name, token), ends in leases.items()
        if ends > now
    )
    if releases:
        for result in (yield from Batch(releases).settled()):
            if isinstance(result, BackendUnavailable):
                raise result
    shared.remove_released(leases)  # a lease with any other error, such as a key of the wrong type, ends by its TTL


def _lowered(before: Settings | None, now: Settings) -> bool:
    if before is None:
        return False
    maximum = now.max_bytes and (not before.max_bytes or now.max_bytes < before.max_bytes)
    return bool(maximum) or any(capacity < had for capacity, had in zip(now.capacities, before.capacities, strict=True))


def _shrink(shared: SharedState) -> Flow[None]:
    """Shrink a cache to lowered limits. Each sweep moves and evicts at most 512 entries, to avoid blocking clients.

    If this process ends before the cache fits, each later put moves and evicts up to 512 entries.
    """
    where, settings, steps = shared.keys, shared.settings, 0
    while True:
        total, hot, warm = yield from Batch(
            (inspection.members(where.size, of_hash=True), *map(inspection.members, (where.hot, where.warm)))
        )
        _, count = yield from inspection.counters(where)
        capacities = settings.capacities
        within = total <= sum(capacities) and hot <= capacities[0] and warm <= capacities[1]
        # The number of sweeps is limited, because the cache may never fit `settings` if another process raises a limit
        # meanwhile.
        steps = steps or 3 + total // commands.MAX_EVICTIONS
        if (within and not 0 < settings.max_bytes < count["bytes"]) or steps == 1:
            return
        steps -= 1
        if isinstance((yield from commands.sweep(where, "0")), commands.NoSettings):
            return
