"""Validates users' keys and tags, and returns the names under which the server stores them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from agentperf_redis import arguments
from agentperf_redis import keys as key_names
from agentperf_redis.cache import commands
from agentperf_redis.errors import InvalidArgument


def stored_name(key: object) -> str:
    """Check a user's key and return the name under which its entry is stored."""
    return key_names.stored_name(arguments.cache_key("key", key))


def stored_tags(tags: object) -> tuple[str, ...]:
    """Check a user's tags and return them without duplicates, as stored."""
    if type(tags) is tuple and not tags:
        return ()
    return tuple(dict.fromkeys(map(key_names.encoded, arguments.names("tags", tags))))


def distinct_keys(keys: object) -> list[str]:
    """Check a user's collection of keys and return its keys without duplicates.

    A bare string is refused, since iterating over it would yield its letters.
    """
    if isinstance(keys, (str, bytes)) or not isinstance(keys, Iterable):
        raise InvalidArgument("keys", keys, "a collection of keys, such as a list of strings")
    return list(dict.fromkeys(arguments.cache_key("keys", key) for key in keys))


def chunks(names: Sequence[str]) -> list[list[str]]:
    """Split names into chunks of at most MAX_KEYS, the limit of one command."""
    return [list(names[start : start + commands.MAX_KEYS]) for start in range(0, len(names), commands.MAX_KEYS)]
