"""The stored form of an entry: a header, then the value's bytes. `lua/cache/includes/header.lua` is the counterpart.

    %)xQ1b:K.Yk3vPm...                                  an entry that was put, and has no tags
    %)xQ1b:K+Yk3vP1784635500123 1250 60000 news,team%201 0 m...    any other entry

The version is the cache's clock at the time of the write, in units of 10 us since 1970. It has 8 digits to the base of
90, where "%" is the digit 0. A dot or a plus sign follows, and then the first 5 characters of the request id. Of 10^9
repeated requests that meet an entry of another request, one takes this entry for its own. These parts have fixed sizes
and together take 14 bytes. A value of 1,000 bytes then still fits into the 1,024 bytes that the allocator gives it.

If the sign is a plus sign, these fields follow, with blanks between them: expiry, ms since 1970; cost, the computing
time in ms; fresh, the time after the write for which the value is fresh, in ms (0 means until it expires); tags; the
size of the key in bytes. The key itself comes last. It is left out, with size 0, if it is the same text as the stored
name of the entry, or if it is too long. `put.lua` writes version and expiry; the client writes the rest. Stored bytes
are not trusted: every field is validated.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import NamedTuple

from agentperf_redis.arguments import plain_text
from agentperf_redis.errors import Undecodable
from agentperf_redis.keys import stored_name

CLOCK_PER_S = 100_000
"""Ticks of a cache's clock in a second."""
_FREQUENCIES = 16
"""A score is the clock of the last access * _FREQUENCIES + the frequency."""

LAST_MS = 253_402_300_799_000
"""The end of the year 9999, ms: the last time that Python's datetime can express."""
MAX_KEY_BYTES = 4096
"""Maximum size of a key that is stored in its entry, bytes. Without a limit, a read of a small value could transfer a
very long key."""
_BASE, _ZERO = 90, 37
_DIGITS = bytes(range(_ZERO, _ZERO + _BASE))
_OFFSET = sum(_ZERO * _BASE**power for power in range(8))
_REQUEST = re.compile(rb"[\w-]{5}", re.ASCII)
_VERSION_BYTES, _FIXED_BYTES = 8, 14
_PLAIN, _FULL = b".", b"+"
_FACTS = 5
"""Number of fields in the header of an entry with a plus sign. A blank ends each field. The last is the key's size."""
_MAX_DIGITS = 16
"""Maximum digits of a number. A double is exact up to 2^53, which has 16 digits."""
MAX_VERSION = 90**8 - 1
"""Maximum version of an entry. Versions are times in ticks of the cache's clock; this one is in the year 3334."""
_SIZE_DIGITS = 10  # enough: by default, a server stores at most 512 MB in a value
_SIZE = re.compile(r"(?:([0-9]{1,16})(?=[0-9]{10}$))?([0-9]{1,10})")


class Stored(NamedTuple):
    """An entry as read from the server, with its value still encoded.

    The class is a tuple, since building a dataclass takes three times as long.

    Attributes:
        version: the cache's clock when the entry was written.
        expires_ms: when the entry expires, ms since 1970. 0 means never, or a header with a dot: it contains no expiry,
            but the command PEXPIRETIME returns it.
        cost_ms: how long it took to compute the value, ms; 0 if the value was put.
        fresh_until_ms: when the value is due for a refresh, ms since 1970; 0 if it stays fresh until the entry expires.
        tags: the tags, percent-encoded.
        data: the encoded value.
        key: the key, encoded as UTF-8; empty if the entry does not hold its key.
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


def new_request() -> str:
    """Return a new random request id."""
    return secrets.token_urlsafe(9)


def payload(
    request: str, cost_ms: int, fresh_ms: int, tags: tuple[str, ...], data: bytes, key: str = "", name: str = ""
) -> bytes:
    """Return the client's part of an entry.

    Args:
        request: the request id.
        cost_ms: computing time, ms.
        fresh_ms: time for which the value is fresh, ms; 0 means until it expires.
        tags: the tags, percent-encoded.
        data: the encoded value.
        key: the key.
        name: stored name of the key. If it differs from the key, the entry holds the key, unless that is too long.
    """
    held = b"" if plain_text(key) == name else plain_text(key).encode()
    if len(held) > MAX_KEY_BYTES:
        held = b""
    if not (cost_ms or fresh_ms or tags or held):
        return f".{request[:5]}".encode() + data
    return f"+{request[:5]}{cost_ms} {fresh_ms} {','.join(tags)} {len(held)} ".encode() + held + data


def parse(entry: bytes) -> Stored:
    """Read an entry.

    Raises:
        Undecodable: the bytes are not a valid entry.
    """
    written, form = version_of(entry), entry[_VERSION_BYTES : _VERSION_BYTES + 1]
    if written is None or not _REQUEST.match(entry, _VERSION_BYTES + 1):
        raise Undecodable("an entry without its header")
    if form == _PLAIN:
        return Stored(written, 0, 0, 0, (), entry[_FIXED_BYTES:])
    try:
        expires, cost, fresh, tags, size, data = entry[_FIXED_BYTES:].split(b" ", _FACTS)
        # int() would also accept signs, blanks and underscores.
        if form != _FULL or not (expires + cost + fresh + size).isdigit():
            raise Undecodable("an entry whose header holds other text than whole numbers")
        if len(cost) > _MAX_DIGITS or len(fresh) > _MAX_DIGITS:
            raise Undecodable("an entry whose numbers are too long")
        until, held = int(expires), int(size)
        if until > LAST_MS:
            raise Undecodable("an entry with an impossible time")
        if held > MAX_KEY_BYTES:
            raise Undecodable("an entry with a key of an impossible size")
        stale_at = 0 if fresh == b"0" else written * 1000 // CLOCK_PER_S + int(fresh)
        names = tuple(tags.decode().split(",")) if tags else ()
        return Stored(written, until, int(cost), stale_at, names, data[held:], data[:held])
    except ValueError:  # also raised if a tag is not UTF-8
        raise Undecodable("an entry without its header") from None


def version_of(entry: bytes) -> int | None:
    """Return the version at the beginning of an entry; None if there is none."""
    head = entry[:_VERSION_BYTES]
    if len(head) < _VERSION_BYTES or head.translate(None, _DIGITS):
        return None
    a, b, c, d, e, f, g, h = head
    version: int = ((((((a * 90 + b) * 90 + c) * 90 + d) * 90 + e) * 90 + f) * 90 + g) * 90 + h - _OFFSET
    return version


def version_digits(version: int) -> bytes:
    """Return the 8 digits with which an entry of this version begins."""
    return bytes(_ZERO + version // _BASE**power % _BASE for power in range(_VERSION_BYTES - 1, -1, -1))


def held_key(stored: Stored, name: str) -> str | None:
    """Return the key that an entry holds; None if it holds none, or if the key's stored name is not `name`."""
    try:
        key = stored.key.decode()
    except UnicodeDecodeError:
        return None
    return key if key and stored_name(key) == name else None


def version_text(entry: bytes | None) -> str:
    """Return the digits of the version at the beginning of an entry. The text is empty if there is no version."""
    return "" if entry is None or version_of(entry) is None else entry[:_VERSION_BYTES].decode()


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


def pack_size(hits: int, size_bytes: int) -> str:
    """Return the text that the size index holds for an entry; the counterpart of pack_size in index.lua."""
    return f"{hits}{size_bytes:0{_SIZE_DIGITS}}" if hits else str(size_bytes)


def unpack_size(packed: str | bytes) -> tuple[int, int]:
    """Return hits and bytes from a text in the size index; the counterpart of unpack_size in index.lua.

    Raises:
        ValueError: the text does not have the form that `pack_size` returns.
    """
    found = _SIZE.fullmatch(packed.decode(errors="replace") if isinstance(packed, bytes) else packed)
    if found is None:
        raise ValueError(packed)
    return int(found[1] or 0), int(found[2])


def pack_score(clock: int, frequency: int) -> int:
    """Return the score of an entry in its tier; the counterpart of pack_score in index.lua."""
    return clock * _FREQUENCIES + frequency


def unpack_score(score: float) -> tuple[int, int]:
    """Return clock and frequency of a score in a tier; the counterpart of unpack_score in index.lua."""
    return divmod(int(score), _FREQUENCIES)
