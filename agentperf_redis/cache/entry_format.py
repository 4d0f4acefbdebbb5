"""The stored form of an entry: a header line, then the value's bytes.

    178463520012345 1784635500123 Yk3vPq0w 1250 60000 news,team%201 m...
    version         expiry, ms    request  cost fresh tags          value

The version is the cache's clock at the time of the write, in units of 10 us since 1970. `put.lua` writes version
and expiry; the client writes the rest. Cost is the computing time in ms. Fresh is the time after the write for which
the value is fresh, in ms; 0 means until it expires. Stored bytes are not trusted: every field is validated.

If the stored name of an entry does not contain the whole key, the entry also holds the key. The request id then ends
with a tilde and the size of the key in bytes, and the key precedes the value:

    178463520012345 1784635500123 Yk3vPq0w~312 1250 60000 news Summarize the text ... m...
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import NamedTuple

from agentperf_redis.arguments import plain_text
from agentperf_redis.errors import Undecodable
from agentperf_redis.keys import stored_name

CLOCK_PER_S = 100_000
"""Ticks of a cache's clock in a second."""
_HIT = 10**10
"""In the size index, an entry's number is reads * _HIT + bytes."""
_FREQUENCIES = 16
"""A score is the clock of the last access * _FREQUENCIES + the frequency."""

LAST_MS = 253_402_300_799_000
"""The end of the year 9999, ms: the last time that Python's datetime can express."""
MAX_KEY_BYTES = 4096
"""Maximum size of a key that its entry holds. Without a limit, reads of small values could transfer very long keys."""
_PARTS = 7
_KEY_MARK = "~"
"""Not in the alphabet of request ids."""
_KEY_MARK_BYTES = _KEY_MARK.encode()
_MAX_DIGITS = 16
"""Maximum digits of a number. A double is exact up to 2^53, which has 16 digits."""
MAX_VERSION = 2**53
"""Maximum clock reading; it lies in the year 4824."""


class Stored(NamedTuple):
    """An entry as read from the server, with its value still encoded.

    The class is a tuple, since building a dataclass takes three times as long.

    Attributes:
        version: the cache's clock when the entry was written.
        expires_ms: when the entry expires, ms since 1970; 0 for never.
        cost_ms: how long it took to compute the value, ms; 0 if the value was put.
        fresh_until_ms: when the value is due for a refresh, ms since 1970; 0 if it stays fresh until the entry expires.
        tags: percent-encoded.
        data: the encoded value.
        key: the key, encoded as UTF-8; empty if the entry does not hold it.
    """

    version: int
    expires_ms: int
    cost_ms: int
    fresh_until_ms: int
    tags: tuple[str, ...]
    data: bytes
    key: bytes = b""


@dataclass(frozen=True, slots=True)
class InvalidationEpoch:
    """The record of past clears and tag invalidations, as versions.

    Attributes:
        cleared_until: entries up to this version are invalid.
        tagged: entries above this version are certainly not invalidated by any tag.
        tagged_cleared_until: entries up to this version are invalid if they have any tag.
    """

    cleared_until: int = 0
    tagged: int = 0
    tagged_cleared_until: int = 0


NOTHING_INVALIDATED = InvalidationEpoch()
CLOSED = b" ".join([b"8999999999999999"] * 3)
"""The epochs of a closed shard, whose entries move to another layout; see fence.lua. They invalidate everything."""


def new_request(key: str, name: str) -> str:
    """Return a new random request id for a put of `key`; `name` is the stored name of the key."""
    request = secrets.token_urlsafe(9)
    if plain_text(key) == name:
        return request
    size = len(key.encode())
    return f"{request}{_KEY_MARK}{size}" if size <= MAX_KEY_BYTES else request


def payload(request: str, cost_ms: int, fresh_ms: int, tags: tuple[str, ...], data: bytes, key: str = "") -> bytes:
    """Return the client's part of an entry. Tags are percent-encoded; a `fresh_ms` of 0 means until it expires."""
    held = plain_text(key) if _KEY_MARK in request else ""
    return f"{request} {cost_ms} {fresh_ms} {','.join(tags)} {held}".encode() + data


def parse(entry: bytes) -> Stored:
    """Read an entry.

    Raises:
        Undecodable: the bytes are not a valid entry.
    """
    try:
        version, expires, request, cost, fresh, tags, data = entry.split(b" ", _PARTS - 1)
        # int() would also accept signs, blanks and underscores.
        if not (version + expires + cost + fresh).isdigit():
            raise Undecodable("an entry whose header holds other text than whole numbers")
        if len(cost) > _MAX_DIGITS or len(fresh) > _MAX_DIGITS:
            raise Undecodable("an entry whose numbers are too long")
        written, until = int(version), int(expires)
        if written > MAX_VERSION or until > LAST_MS:
            raise Undecodable("an entry with an impossible time")
        stale_at = 0 if fresh == b"0" else written * 1000 // CLOCK_PER_S + int(fresh)
        names = tuple(tags.decode().split(",")) if tags else ()
        if _KEY_MARK_BYTES in request:
            size = int(request.rpartition(_KEY_MARK_BYTES)[2])
            if not 0 <= size <= MAX_KEY_BYTES:
                raise Undecodable("an entry with a key of an impossible size")
            return Stored(written, until, int(cost), stale_at, names, data[size:], data[:size])
        return Stored(written, until, int(cost), stale_at, names, data)
    except ValueError:  # also raised if a tag is not UTF-8
        raise Undecodable("an entry without its header line") from None


def held_key(stored: Stored, name: str) -> str | None:
    """Return the key that an entry holds; None if it holds none, or if the key's stored name is not `name`."""
    try:
        key = stored.key.decode()
    except UnicodeDecodeError:
        return None
    return key if key and stored_name(key) == name else None


def version_text(entry: bytes | None) -> str:
    """Return the version at the beginning of an entry, as text. The text is empty if there is no version."""
    head = (entry or b"").split(b" ", 1)[0]
    return head.decode() if head.isdigit() else ""


def parse_invalidation_epoch(gen: bytes) -> InvalidationEpoch:
    """Read the record of past invalidations.

    Raises:
        Undecodable: the bytes are not a valid record.
    """
    versions = gen.split(b" ")
    if len(versions) != len(fields(InvalidationEpoch)) or not all(
        version.isdigit() and len(version) <= _MAX_DIGITS for version in versions
    ):
        raise Undecodable("an invalidation epoch that is not three versions")
    return InvalidationEpoch(*map(int, versions))


def timestamp(clock: int) -> datetime:
    """Convert a reading of the cache's clock to a time in UTC."""
    return datetime.fromtimestamp(clock / CLOCK_PER_S, UTC)


def pack_size(hits: int, size_bytes: int) -> int:
    """Return the number that the size index holds for an entry; the counterpart of pack_size in index.lua."""
    return hits * _HIT + size_bytes


def unpack_size(packed: float) -> tuple[int, int]:
    """Return hits and bytes from a number in the size index; the counterpart of unpack_size in index.lua."""
    return divmod(int(packed), _HIT)


def pack_score(clock: int, frequency: int) -> int:
    """Return the score of an entry in its tier; the counterpart of pack_score in index.lua."""
    return clock * _FREQUENCIES + frequency


def unpack_score(score: float) -> tuple[int, int]:
    """Return clock and frequency of a score in a tier; the counterpart of unpack_score in index.lua."""
    return divmod(int(score), _FREQUENCIES)
