"""Settings of a cache, written by the first use in each process, and again whenever the server has lost them."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Final

from agentperf_redis.cache import commands, entry_format
from agentperf_redis.cache.arguments import chunks
from agentperf_redis.cache.commands import inspection
from agentperf_redis.cache.model import Settings
from agentperf_redis.cache.process.shared_state import Binding, Owed, log
from agentperf_redis.command import Batch, Flow
from agentperf_redis.errors import BackendFull, SchemaMismatch

ATTEMPTS: Final = 4
"""How often an operation starts again because the server had lost the settings meanwhile."""


def ready(binding: Binding) -> Flow[None]:
    """Before the first write of a process: note that the cache is in use, and write its settings.

    Before anything at all after an outage: send the invalidations that failed meanwhile.
    """
    if binding.owed:
        yield from _pay(binding)
    if binding.deployed:
        return
    with suppress(BackendFull):  # whoever made the cache has noted it; what is new cannot be deployed either
        yield from binding.backend.enter(binding.service, binding.name)
    asked_at = time.monotonic()
    reply = yield from commands.deploy(binding.keys, binding.settings, binding.given)
    if isinstance(reply, commands.OtherSchema):
        raise SchemaMismatch(f"cache {binding.name}", str(reply.schema), f"schema {commands.SCHEMA}")
    if reply.before not in ("", reply.settings):
        texts = (_in_words(binding, text) for text in (reply.before, reply.settings))
        log.warning("cache %s: settings changed from %s to %s", binding.name, *texts)
    binding.settings = Settings.parse(reply.settings) or binding.settings
    if _lowered(Settings.parse(reply.before), binding.settings):
        yield from _shrink(binding)
    binding.set_clock(reply.now_ms, asked_at)
    binding.learn(reply.now_ms * entry_format.CLOCK_PER_S // 1000)
    binding.deployed = True


def _in_words(binding: Binding, text: str) -> str:
    settings = Settings.parse(text)
    return text if settings is None else settings.shown(binding.service)


def _pay(binding: Binding) -> Flow[None]:
    """Tell the server what it was to forget. A miss is never wrong: others may do the same meanwhile."""
    debts = list(binding.owed)
    names = {kind: [name for owed, name in debts if owed is kind] for kind in Owed}
    if names[Owed.ALL]:
        yield from commands.clear(binding.keys, binding.origin)
    for chunk in chunks(names[Owed.TAG]):
        yield from commands.invalidate_tags(binding.keys, tuple(chunk), binding.origin)
    for chunk in chunks(names[Owed.KEY]):
        yield from commands.delete(binding.keys, chunk, binding.origin)  # nothing is there without settings
    binding.paid(debts)
    log.warning("cache %s: told the server of %d invalidations that had failed", binding.name, len(debts))


def _lowered(before: Settings | None, now: Settings) -> bool:
    if before is None:
        return False
    most = now.max_bytes and (not before.max_bytes or now.max_bytes < before.max_bytes)
    return bool(most) or any(room < had for room, had in zip(now.rooms, before.rooms, strict=True))


def _shrink(binding: Binding) -> Flow[None]:
    """Bring a cache within limits that were lowered: each sweep moves and evicts 512 entries, so none holds up others.

    Should this process end meanwhile, every put goes on by as many.
    """
    where, settings, steps = binding.keys, binding.settings, 0
    while True:
        total, hot, warm = yield from Batch(
            (inspection.members(where.size, of_hash=True), *map(inspection.members, (where.hot, where.warm)))
        )
        _, count = yield from inspection.counters(where)
        rooms = settings.rooms
        within = total <= sum(rooms) and hot <= rooms[0] and warm <= rooms[1]
        steps = steps or 3 + total // commands.MAX_EVICTIONS  # others may raise the limit meanwhile, and go on filling
        if (within and not 0 < settings.max_bytes < count["bytes"]) or steps == 1:
            return
        steps -= 1
        if isinstance((yield from commands.sweep(where, "0")), commands.NoSettings):
            return
