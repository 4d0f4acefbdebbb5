"""The settings of a cache: deployed and read."""

from __future__ import annotations

from dataclasses import dataclass

from agentperf_redis.cache.commands.replies import unexpected
from agentperf_redis.cache.model import ALL_GIVEN, Settings
from agentperf_redis.command import Command, NamedArgs, Reply
from agentperf_redis.keys import CacheKeys
from agentperf_redis.script import Script

SCHEMA = 1
"""Major version of a cache's data model, repeated in its meta, since scripts cannot look into the namespace's."""

_CONFIGURE = Script("cache/configure")


@dataclass(frozen=True, slots=True)
class Deployed:
    """The server's time, the settings that held before, if any, and those that hold now."""

    now_ms: int
    before: str
    settings: str


@dataclass(frozen=True, slots=True)
class NewerSchema:
    """The cache was written by a newer major version."""

    schema: int


def deploy(keys: CacheKeys, settings: Settings, given: str = ALL_GIVEN) -> Command[Deployed | NewerSchema]:
    """Write the settings of a cache; see `model.Settings.fields` for what is given."""

    def decode(reply: Reply) -> Deployed | NewerSchema:
        match reply:
            case [1, int(now_ms), bytes(before), bytes(now)]:
                return Deployed(now_ms, before.decode(errors="replace"), now.decode(errors="replace"))
            case [-1, int(schema)]:
                return NewerSchema(schema)
        raise unexpected(keys.meta, reply)

    args: NamedArgs = {"schema": SCHEMA, "settings": settings.text, "given": given}
    return Command(_CONFIGURE, (keys.meta, keys.new, keys.cold, keys.ghost), args, decode)


def stored_settings(keys: CacheKeys) -> Command[Settings | NewerSchema | None]:
    """Read the settings of a cache; None if it has none."""

    def decode(reply: Reply) -> Settings | NewerSchema | None:
        match reply:
            case [None, _]:
                return None
            case [bytes(text), bytes(schema)] if schema.isdigit():
                if int(schema) > SCHEMA:
                    return NewerSchema(int(schema))
                settings = Settings.parse(text.decode(errors="replace"))
                if settings is not None:
                    return settings
        raise unexpected(keys.meta, reply)

    return Command("HMGET", (keys.meta,), ("settings", "schema"), decode)
