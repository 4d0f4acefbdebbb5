"""Plain read commands with which operators inspect a cache. The commands of user calls are in `entries`."""

from __future__ import annotations

from agentperf_redis.cache import entry_format
from agentperf_redis.cache.commands.replies import texts, unexpected
from agentperf_redis.command import Command, Reply, whole_number
from agentperf_redis.keys import CacheKeys

COUNTERS = ("bytes", "evicted", "expired", "hot", "warm", "cold", "misses", "saved_ms", "corrupt")


def counters(keys: CacheKeys) -> Command[tuple[str, dict[str, int]]]:
    """Read the settings, as text, and the counters."""

    def decode(reply: Reply) -> tuple[str, dict[str, int]]:
        try:
            settings, *numbers = reply
            return (settings or b"").decode(), {
                counter: whole_number(number) for counter, number in zip(COUNTERS, numbers, strict=True)
            }
        except (AttributeError, TypeError, ValueError):
            raise unexpected(keys.meta, reply) from None

    return Command("HMGET", (keys.meta,), ("settings", *COUNTERS), decode)


def members(key: str, *, of_hash: bool = False) -> Command[int]:
    """Count the members of an index."""

    def decode(reply: Reply) -> int:
        if not isinstance(reply, int):
            raise unexpected(key, reply)
        return reply

    return Command("HLEN" if of_hash else "ZCARD", (key,), (), decode)


def size_of(keys: CacheKeys, name: str) -> Command[tuple[int, int] | None]:
    """Return the hits and the bytes of an entry, or None if the entry is absent."""
    return Command("HGET", (keys.size,), (name,), lambda reply: None if reply is None else _size(keys.size, reply))


def sizes_page(keys: CacheKeys, cursor: str, count: int) -> Command[tuple[str, list[tuple[str, tuple[int, int]]]]]:
    """Read about `count` items of the size index. Return the next cursor (0 at the end) and the items found.

    Each item is the stored name of an entry, and its hits and bytes. Successive calls may return the same item twice.
    """

    def decode(reply: Reply) -> tuple[str, list[tuple[str, tuple[int, int]]]]:
        match reply:
            case [bytes(after), list(fields)] if len(fields) % 2 == 0:
                found = texts(fields)
                pairs = zip(found[::2], found[1::2], strict=True)
                return after.decode(errors="replace"), [
                    ((name or b"").decode(errors="replace"), _size(keys.size, text)) for name, text in pairs
                ]
        raise unexpected(keys.size, reply)

    return Command("HSCAN", (keys.size,), (cursor, "COUNT", count), decode)


def left_ms(keys: CacheKeys, name: str) -> Command[int]:
    """Return the ms until an entry expires: -1 for never, -2 if the entry is gone."""
    entry = keys.entry_prefix + name
    return Command("PTTL", (entry,), (), lambda reply: _whole(entry, reply))


def expiry_ms(keys: CacheKeys, name: str) -> Command[int]:
    """Return the expiry time of an entry, ms since 1970: -1 for never, -2 if the entry is gone."""
    entry = keys.entry_prefix + name
    return Command("PEXPIRETIME", (entry,), (), lambda reply: _whole(entry, reply))


def beginning(keys: CacheKeys, name: str, count: int) -> Command[bytes]:
    """Read the first `count` bytes of an entry. The result is empty if the entry is gone."""
    entry = keys.entry_prefix + name

    def decode(reply: Reply) -> bytes:
        if not isinstance(reply, bytes):
            raise unexpected(entry, reply)
        return reply

    return Command("GETRANGE", (entry,), (0, count - 1), decode)


def score(key: str, name: str) -> Command[float | None]:
    """Return the score of a member of an index, or None."""
    return Command("ZSCORE", (key,), (name,), lambda reply: _number(key, reply))


def oldest_first(key: str, first: int, last: int) -> Command[list[tuple[str, float]]]:
    """Return the members of an index from rank `first` to rank `last` with their scores, the lowest score first."""

    def decode(reply: Reply) -> list[tuple[str, float]]:
        found = texts(reply)
        try:
            return [
                ((name or b"").decode(errors="replace"), float(at or 0))
                for name, at in zip(found[::2], found[1::2], strict=True)
            ]
        except ValueError:
            raise unexpected(key, reply) from None

    return Command("ZRANGE", (key,), (first, last, "WITHSCORES"), decode)


def newest(key: str) -> Command[float | None]:
    """Return the highest score of an index, or None if the index is empty."""

    def decode(reply: Reply) -> float | None:
        found = texts(reply)
        return _number(key, found[1]) if len(found) == 2 else None  # noqa: PLR2004  a member and its score

    return Command("ZRANGE", (key,), (-1, -1, "WITHSCORES"), decode)


def _whole(key: str, reply: Reply) -> int:
    if not isinstance(reply, int):
        raise unexpected(key, reply)
    return reply


def _size(key: str, reply: Reply) -> tuple[int, int]:
    try:
        return entry_format.unpack_size(reply)
    except (AttributeError, TypeError, ValueError):
        raise unexpected(key, reply) from None


def _number(key: str, reply: Reply) -> float | None:
    try:
        number = None if reply is None else float(reply)
    except (TypeError, ValueError):
        raise unexpected(key, reply) from None
    if number is not None and not 0 <= number < _EXACT:
        raise unexpected(key, reply)
    return number


_EXACT = 2.0**57
"""Upper bound of valid numbers. Scores stay below it until the year 4800; see `entry_format.pack_score`."""
