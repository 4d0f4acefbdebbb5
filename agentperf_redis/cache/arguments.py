"""Keys and tags as users give them, checked and turned into the names under which they are stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from agentperf_redis import arguments
from agentperf_redis import keys as key_names
from agentperf_redis.cache import commands
from agentperf_redis.errors import InvalidArgument


def stored_name(key: object) -> str:
    """Check a key given by a user and return the name under which its entry is stored."""
    return key_names.stored_name(arguments.cache_key("key", key))


def stored_tags(tags: object) -> tuple[str, ...]:
    """Check tags given by a user and return them without repetition, as stored."""
    if tags == ():
        return ()
    return tuple(dict.fromkeys(map(key_names.encoded, arguments.names("tags", tags))))


def distinct_keys(keys: object) -> list[str]:
    """Check several keys given by a user; one bare string is refused, since it would be taken apart into letters."""
    if isinstance(keys, (str, bytes)) or not isinstance(keys, Iterable):
        raise InvalidArgument("keys", keys, "a collection of keys, such as a list of strings")
    return list(dict.fromkeys(arguments.cache_key("keys", key) for key in keys))


def chunks(names: Sequence[str]) -> list[list[str]]:
    """Cut names into what one command takes."""
    return [list(names[start : start + commands.MAX_KEYS]) for start in range(0, len(names), commands.MAX_KEYS)]
