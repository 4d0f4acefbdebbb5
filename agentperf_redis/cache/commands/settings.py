"""Commands that write and read the settings of a cache."""

from __future__ import annotations

from dataclasses import dataclass

from agentperf_redis.cache.commands.replies import unexpected
from agentperf_redis.cache.model import ALL_GIVEN, MIN_SHARD_ENTRIES, Settings
from agentperf_redis.command import Command, NamedArgs, Reply
from agentperf_redis.keys import CacheKeys
from agentperf_redis.script import Script

SCHEMA = 4
"""Major version of a cache's data model. Each cache stores it, since the scripts cannot read the namespace's version.

Version 2 renamed the keys gen and trash to `epochs` and `deferred`, and the word room in the settings to capacity.
Version 3 shortened the header of entries and dropped the index `exp`. Version 4 packs hits and bytes in `size` into one
number, as version 2 did.
"""
_MAX_DIGITS = 9

_CONFIGURE = Script("cache/configure")


@dataclass(frozen=True, slots=True)
class Deployed:
    """The server's time, the previous settings (empty if there were none), and the settings that apply from now on."""

    now_ms: int
    before: str
    settings: str


@dataclass(frozen=True, slots=True)
class OtherSchema:
    """The cache was written by another major version."""

    schema: int


@dataclass(frozen=True, slots=True)
class NotShared:
    """The settings were refused: the cache has another number of shards, or a limit is too small for its shards.

    Attributes:
        stored: the settings in effect, as text.
    """

    stored: str


@dataclass(frozen=True, slots=True)
class Moving:
    """The settings were refused: the entries move to another layout.

    The cache is changing its layout, or the shard belongs to an old layout.
    """


def deploy(
    keys: CacheKeys, settings: Settings, given: str = ALL_GIVEN
) -> Command[Deployed | OtherSchema | NotShared | Moving]:
    """Write the settings of a cache or of a shard; `given` is explained at `model.Settings.fields`."""

    def decode(reply: Reply) -> Deployed | OtherSchema | NotShared | Moving:
        match reply:
            case [1, int(now_ms), bytes(before), bytes(now)]:
                return Deployed(now_ms, before.decode(errors="replace"), now.decode(errors="replace"))
            case [-1, int(schema)]:
                return OtherSchema(schema)
            case [-2, bytes(stored)]:
                return NotShared(stored.decode(errors="replace"))
            case [-3, bytes()]:
                return Moving()
        raise unexpected(keys.meta, reply)

    args: NamedArgs = {"schema": SCHEMA, "settings": settings.text, "given": given, "share": MIN_SHARD_ENTRIES}
    return Command(_CONFIGURE, (keys.meta, keys.new, keys.cold, keys.ghost), args, decode)


def stored_settings(keys: CacheKeys) -> Command[Settings | OtherSchema | None]:
    """Read the settings of a cache; None if it has none."""

    def decode(reply: Reply) -> Settings | OtherSchema | None:
        match reply:
            case [None, _]:
                return None
            case [bytes(text), bytes(schema)] if schema.isdigit() and len(schema) <= _MAX_DIGITS:
                if int(schema) != SCHEMA:
                    return OtherSchema(int(schema))
                settings = Settings.parse(text.decode(errors="replace"))
                if settings is not None:
                    return settings
        raise unexpected(keys.meta, reply)

    return Command("HMGET", (keys.meta,), ("settings", "schema"), decode)
