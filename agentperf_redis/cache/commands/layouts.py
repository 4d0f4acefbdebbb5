"""The commands that move a cache from one layout to another; `flows.layouts` explains how they work together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agentperf_redis.cache.commands.entries import index_keys
from agentperf_redis.cache.commands.replies import NO_SETTINGS, NoSettings, left_over, unexpected
from agentperf_redis.cache.model import Settings
from agentperf_redis.command import Arg, Command, NamedArgs, Reply
from agentperf_redis.keys import CacheKeys
from agentperf_redis.script import Script

_RELAYOUT = Script("cache/relayout")
_FENCE = Script("cache/fence")
_PREPARE = Script("cache/prepare")
_EXPECT = Script("cache/expect")
_EXPORT = Script("cache/export")
_ADOPT = Script("cache/adopt")
_FORGET = Script("cache/forget")
_THIN = Script("cache/thin")
_LOWER = Script("cache/lower")
_RETIRE = Script("cache/retire")

COUNTERS = ("evicted", "expired", "hot", "warm", "cold", "misses", "saved_ms", "corrupt")
"""The counters that `fence` returns and `prepare` takes, in this order."""
_MAX_MARKS = 10_000
"""Maximum number of keys of a shard that are being moved at one time."""
_MARKS_KEPT_MS = 60_000
_ABSENT = -2
"""The reply of PTTL for a key that does not exist."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The state of a shard that was closed.

    Attributes:
        clock: the shard's clock; no version in the shard is higher.
        entries: number of entries.
        bytes: total size of the entries.
        counters: the values of the counters, in the order of COUNTERS.
    """

    clock: int
    entries: int
    bytes: int
    counters: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Exported:
    """An entry of a closed shard, with all that another shard needs to adopt it."""

    entry: bytes
    hits: int
    tier: int
    score: bytes
    expiry_ms: int

    @property
    def parts(self) -> tuple[Arg, ...]:
        """The arguments of `adopt`."""
        return (self.entry, self.hits, self.tier, self.score, self.expiry_ms)


def relayout(keys: CacheKeys, step: str, shards: int, layout: int) -> Command[Settings | NoSettings]:
    """Take a step to another layout, if the step is still due. Returns the settings after the step.

    Args:
        keys: key names of the cache.
        step: begin, switch or settle; see relayout.lua.
        shards: number of shards of the new layout.
        layout: number of the old layout.
    """

    def decode(reply: Reply) -> Settings | NoSettings:
        match reply:
            case [1, bytes(text)]:
                settings = Settings.parse(text.decode(errors="replace"))
                if settings is not None:
                    return settings
            case [0]:
                return NO_SETTINGS
        raise unexpected(keys.meta, reply)

    return Command(_RELAYOUT, (keys.meta,), {"step": step, "shards": shards, "layout": layout}, decode)


def fence(keys: CacheKeys, origin: str) -> Command[Closed]:
    """Close a shard of an old layout. Scripts then refuse to use its entries, and reads notice that it is closed."""

    def decode(reply: Reply) -> Closed:
        match reply:
            case [1, int(clock), int(entries), int(size), *counters] if _are_counters(counters):
                return Closed(clock, entries, size, tuple(counters))
        raise unexpected(keys.meta, reply)

    return Command(_FENCE, (keys.meta, keys.size, keys.epochs), {"bus": keys.bus, "origin": origin}, decode)


def prepare(keys: CacheKeys, clock: int, kept: tuple[int, int], counters: tuple[int, ...]) -> Command[None]:
    """Prepare a shard of a new layout. `kept`: how many entries and bytes of its limits the old layout still uses."""
    args: NamedArgs = {"clock": clock, "entries": kept[0], "bytes": kept[1], "counters...": counters}
    return Command(_PREPARE, (keys.meta,), args, _done(keys))


def present(keys: CacheKeys, name: str) -> Command[bool]:
    """Return whether a shard has a value under a stored name, even an invalidated one."""
    entry = keys.entry_prefix + name

    def decode(reply: Reply) -> bool:
        if not isinstance(reply, int):
            raise unexpected(entry, reply)
        return reply != _ABSENT

    return Command("PTTL", (entry,), (), decode)


def frozen_epochs(keys: CacheKeys) -> Command[bytes | None]:
    """Read the invalidation epochs that apply to the entries of a closed shard."""

    def decode(reply: Reply) -> bytes | None:
        match reply:
            case [None]:
                return None
            case [bytes(epochs)]:
                return epochs
        raise unexpected(keys.meta, reply)

    return Command("HMGET", (keys.meta,), ("frozen",), decode)


def expect(keys: CacheKeys, names: Sequence[str]) -> Command[list[int] | NoSettings]:
    """Mark keys before their entries are read from the old layout. Returns the marks."""

    def decode(reply: Reply) -> list[int] | NoSettings:
        match reply:
            case [1, *marks] if len(marks) == len(names) and all(isinstance(mark, int) for mark in marks):
                return marks
            case [0]:
                return NO_SETTINGS
        raise unexpected(keys.meta, reply)

    args: NamedArgs = {"max": _MAX_MARKS, "keep_ms": _MARKS_KEPT_MS, "names...": tuple(names)}
    return Command(_EXPECT, (keys.meta, keys.marks), args, decode)


def export(keys: CacheKeys, names: Sequence[str]) -> Command[list[Exported | None]]:
    """Read entries of a closed shard. None replaces an entry that is absent, expired or invalidated."""

    def exported(item: Reply) -> Exported | None:
        match item:
            case 0:
                return None
            case [bytes(entry), int(hits), int(tier), bytes(score), int(expiry_ms)]:
                return Exported(entry, hits, tier, score, expiry_ms)
        raise unexpected(keys.meta, item)

    def decode(reply: Reply) -> list[Exported | None]:
        match reply:
            case [1, *items] if len(items) == len(names):
                return [exported(item) for item in items]
            case [0]:
                return [None] * len(names)
        raise unexpected(keys.meta, reply)

    entries = (keys.entry_prefix + name for name in names)
    return Command(_EXPORT, (*index_keys(keys), keys.tags, *entries), {"names...": tuple(names)}, decode)


def adopt(keys: CacheKeys, found: Sequence[tuple[str, int, Exported]]) -> Command[list[bool] | NoSettings]:
    """Store entries of the old layout, each with its name and mark.

    Returns:
        For each entry, whether it may be removed from the old layout. If not, mark the entry and read it again.
    """

    def decode(reply: Reply) -> list[bool] | NoSettings:
        match reply:
            case [1, *done] if len(done) == len(found) and all(each in (0, 1) for each in done):
                return [each == 1 for each in done]
            case [0]:
                return NO_SETTINGS
        raise unexpected(keys.meta, reply)

    parts = tuple(part for name, mark, each in found for part in (name, mark, *each.parts))
    where = (*index_keys(keys), keys.epochs, keys.tags, keys.marks, *(keys.entry_prefix + name for name, _, _ in found))
    return Command(_ADOPT, where, {"parts...": parts}, decode)


def forget(keys: CacheKeys, names: Sequence[str]) -> Command[tuple[int, int, int]]:
    """Remove entries from a closed shard. Returns how many entries, bytes and clears are left there."""

    def decode(reply: Reply) -> tuple[int, int, int]:
        match reply:
            case [1, int(entries), int(size), int(cleared)]:
                return entries, size, cleared
            case [0]:
                return 0, 0, 0
        raise unexpected(keys.meta, reply)

    entries = (keys.entry_prefix + name for name in names)
    return Command(_FORGET, (*index_keys(keys), *entries), {"names...": tuple(names)}, decode)


def thin(keys: CacheKeys, entries: int, size: int) -> Command[int]:
    """Evict up to 512 entries that exceed the given limits; `size` 0 is no limit. Returns the number evicted."""

    def decode(reply: Reply) -> int:
        match reply:
            case [1, int(evicted)]:
                return evicted
            case [0]:
                return 0
        raise unexpected(keys.meta, reply)

    return Command(_THIN, index_keys(keys), {"entries": entries, "bytes": size}, decode)


def lower(keys: CacheKeys, kept: tuple[int, int] | None) -> Command[None]:
    """Lower the part of a shard's limits that the old layout uses. `kept` is None if the old layout is empty."""
    entries, size = (-1, 0) if kept is None else kept
    return Command(_LOWER, (keys.meta, keys.marks), {"entries": entries, "bytes": size}, _done(keys))


def retire(keys: CacheKeys, keep_ms: int) -> Command[int]:
    """Delete what is left of an empty closed shard. Returns the number of entries and clears that prevent this."""
    where = (*index_keys(keys), keys.epochs, keys.tags, keys.history)
    return Command(_RETIRE, where, {"keep_ms": keep_ms}, left_over(keys.meta))


def _are_counters(numbers: list[Reply]) -> bool:
    return len(numbers) == len(COUNTERS) and all(isinstance(number, int) for number in numbers)


def _done(keys: CacheKeys) -> Callable[[Reply], None]:
    def decode(reply: Reply) -> None:
        if reply != [1]:
            raise unexpected(keys.meta, reply)

    return decode
