"""Each operation of a cache as a Command: its script, its keys and arguments, and what its reply means."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from agentperf_redis.cache.model import ALL_GIVEN, TIERS, Settings, Tier
from agentperf_redis.cache.outbox import MAX_READS, Report
from agentperf_redis.command import Arg, Command, Reply
from agentperf_redis.errors import CorruptState, shown
from agentperf_redis.keys import CacheKeys
from agentperf_redis.script import Script

SCHEMA = 1
"""Major version of a cache's data model, repeated in its meta, since scripts cannot look into the namespace's."""
MAX_EVICTIONS = 512
"""Entries that one script call moves or evicts at most; the scripts' own limit."""
MAX_KEYS = 256
"""Keys in one command."""
MAX_TAG_MARKS = 10_000
"""Tags whose last invalidation is kept (about 1 MB); beyond, see the script invalidate_tags."""

_BURY = Script("cache/bury")
_CLAIM = Script("cache/claim")
_CLEAR = Script("cache/clear")
_DELETE = Script("cache/delete")
_DEPLOY = Script("cache/deploy")
_GET_STRICT = Script("cache/get_strict")
_INVALIDATE_TAGS = Script("cache/invalidate_tags")
_PUT = Script("cache/put")
_RELEASE = Script("cache/release")
_RENEW = Script("cache/renew")
_SWEEP = Script("cache/sweep")
_TOUCH = Script("cache/touch")

Found: TypeAlias = tuple[bytes | None, bytes | None]
"""An entry and the cache's generation, as stored; None where there is none."""


class NoSettings:
    """The cache has no settings, because nobody has used it yet or the server lost its data: deploy them, try again."""


NO_SETTINGS = NoSettings()


class PutOutcome(Enum):
    """What became of a put; the values are the script's."""

    STORED = 1
    NO_SETTINGS = 0
    LEASE_LOST = -1
    TOO_LARGE = -2
    INVALIDATED = -3
    NO_ROOM = -4
    IN_DOUBT = -5
    LATE = -6


@dataclass(frozen=True, slots=True)
class PutReply:
    """What became of a put, with the version (or the server's time in ms, if it was late)."""

    outcome: PutOutcome
    version: int = 0


@dataclass(frozen=True, slots=True)
class StrictRead:
    """What a read that is noted at once has met.

    Attributes:
        found: the entry; with the generation only where the script could not read one of them.
        counted: it is a hit by the script's account.
        wrong_type: the entry's key is of a wrong type.
    """

    found: Found
    counted: bool = False
    wrong_type: bool = False


@dataclass(frozen=True, slots=True)
class Hit:
    """A claim met a value."""

    found: Found


@dataclass(frozen=True, slots=True)
class Lead:
    """The claimer computes; what is invalidated after `version` refuses its value.

    Attributes:
        version: the cache's clock.
        wrong_type: the key of the entry or of the lease was of a wrong type.
    """

    version: int
    wrong_type: bool = False


@dataclass(frozen=True, slots=True)
class Await:
    """Another computes, under the lease `token` which lasts `left_ms` unless it is renewed."""

    left_ms: int
    token: str


@dataclass(frozen=True, slots=True)
class Failed:
    """What the claimer waited for has failed: error type and message; both empty if the value cannot be stored."""

    error_type: str
    message: str


ClaimReply: TypeAlias = Hit | Lead | Await | Failed


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep has cleared away, and where to go on."""

    expired: int
    freed: int
    orphans: int
    evicted: int
    more: bool
    cursor: str


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


def read(keys: CacheKeys, name: str) -> Command[list[bytes | None]]:
    """Read an entry and the generation, in one round trip and without a write."""
    return Command("MGET", (keys.entry_prefix + name, keys.gen), (), texts)


def read_many(keys: CacheKeys, names: list[str]) -> Command[list[bytes | None]]:
    """Read at most MAX_KEYS entries and, last, the generation."""
    return Command("MGET", (*(keys.entry_prefix + name for name in names), keys.gen), (), texts)


def tag_marks(keys: CacheKeys, tags: tuple[str, ...]) -> Command[int]:
    """Return the newest version of an invalidation of any of the tags."""

    def decode(reply: Reply) -> int:
        try:
            return max(int(float(mark)) for mark in (*reply, 0) if mark is not None)
        except (OverflowError, TypeError, ValueError):
            raise unexpected(keys.tags, reply) from None

    return Command("ZMSCORE", (keys.tags,), tags, decode)


def generation(keys: CacheKeys) -> Command[bytes | None]:
    """Read the generation."""
    return Command("MGET", (keys.gen,), (), lambda reply: texts(reply)[0])


def read_strictly(keys: CacheKeys, name: str, *, miss: bool = True) -> Command[StrictRead | NoSettings]:
    """Read an entry and note the read, or the miss unless the caller does, in the same step."""

    def decode(reply: Reply) -> StrictRead | NoSettings:
        match reply:
            case [1, bytes(entry)]:
                return StrictRead((entry, None), counted=True)
            case [2]:
                return StrictRead((None, None))
            case [3, bytes(entry), bytes(gen)]:
                return StrictRead((entry, gen))
            case [4]:
                return StrictRead((None, None), wrong_type=True)
            case [0]:
                return NO_SETTINGS
        raise unexpected(keys.meta, reply)

    where = (*_index(keys), keys.entry_prefix + name, keys.gen, keys.tags)
    return Command(_GET_STRICT, where, (name, int(miss)), decode)


def put(
    keys: CacheKeys,
    name: str,
    payload: bytes,
    request: str,
    *,
    until_ms: int,
    seen: int,
    again: bool,
    ttl_ms: int | str,
    tier: Tier | None,
    token: str,
    origin: str,
    writer: str,
    report: Report,
    tags: tuple[str, ...],
) -> Command[PutReply]:
    """Store one value.

    Args:
        keys: of the cache.
        name: stored name of the key.
        payload: see `wire.payload`; begins with the request.
        request: random, the same for each delivery.
        until_ms: server time after which no copy of the request does anything.
        seen: the newest version this process knew before it sent the request for the first time.
        again: the request was sent before.
        ttl_ms: life; see `model.ttl_ms`; or one for each tier, ``hot/warm/cold``.
        tier: where to place it; None lets the policy.
        token: of the lease under which it was computed; empty for a plain put.
        origin: who writes.
        writer: who reports.
        report: reads to report on the way.
        tags: percent-encoded.
    """
    place = 0 if tier is None else TIERS.index(tier) + 1
    head: tuple[Arg, ...] = (name, payload, request, until_ms)
    tail: tuple[Arg, ...] = (
        *(ttl_ms, place, token, keys.bus, origin, writer),
        *(report.seq, report.misses, report.saved_ms, report.corrupt),
        *(len(tags), *tags, *_flat(report)),
    )
    beside = (keys.entry_prefix + name, keys.lease_prefix + name, keys.gen, keys.tags, keys.resent)
    repeated = (*head, str(seen), *tail)
    first = repeated if again else (*head, "", *tail)

    def decode(reply: Reply) -> PutReply:
        match reply:
            case [0 | -1 | -3 as status]:
                return PutReply(PutOutcome(status))
            case [1, int(version), int()] | [-2 | -4 | -5 | -6, int(version)]:
                return PutReply(PutOutcome(reply[0]), version)
        raise unexpected(keys.meta, reply)

    return Command(_PUT, (*_index(keys), *beside), first, decode, repeated)


def bury(keys: CacheKeys, requests: tuple[str, ...], until_ms: int) -> Command[None]:
    """Have copies of puts that were given up do nothing from now on; see `put` for the arguments."""

    def decode(reply: Reply) -> None:
        if reply != [1]:
            raise unexpected(keys.meta, reply)

    return Command(_BURY, (keys.meta, keys.resent), (until_ms, *requests), decode)


def touch(keys: CacheKeys, writer: str, report: Report) -> Command[int | None]:
    """Send a report on its own. Returns the server's time in ms; None if the cache has no settings: not taken in."""
    counters = (report.seq, report.misses, report.saved_ms, report.corrupt)

    def decode(reply: Reply) -> int | None:
        match reply:
            case [1, int(now_ms)]:
                return now_ms
            case [0]:
                return None
        raise unexpected(keys.meta, reply)

    return Command(_TOUCH, _index(keys), (writer, *counters, *_flat(report)), decode)


def delete(keys: CacheKeys, names: list[str], origin: str) -> Command[tuple[int, int] | NoSettings]:
    """Remove at most MAX_KEYS entries. Returns how many were there, and the version."""
    entries = (keys.entry_prefix + name for name in names)
    leases = (keys.lease_prefix + name for name in names)
    args: tuple[Arg, ...] = (keys.bus, origin, *names)

    def decode(reply: Reply) -> tuple[int, int] | NoSettings:
        match reply:
            case [1, int(removed), int(version)]:
                return removed, version
            case [0]:
                return NO_SETTINGS
        raise unexpected(keys.meta, reply)

    return Command(_DELETE, (*_index(keys), *entries, *leases), args, decode)


def clear(keys: CacheKeys, origin: str) -> Command[tuple[int, int]]:
    """Make every entry a miss. Returns how many there were, and the version."""

    def decode(reply: Reply) -> tuple[int, int]:
        match reply:
            case [1, int(forgotten), int(version)]:
                return forgotten, version
        raise unexpected(keys.meta, reply)

    return Command(_CLEAR, (*_index(keys), keys.gen, keys.tags), (keys.bus, origin), decode)


def invalidate_tags(keys: CacheKeys, tags: tuple[str, ...], origin: str) -> Command[int]:
    """Make every entry that has one of the tags a miss. Returns the version."""

    def decode(reply: Reply) -> int:
        match reply:
            case [1, int(version)]:
                return version
        raise unexpected(keys.meta, reply)

    args: tuple[Arg, ...] = (keys.bus, origin, MAX_TAG_MARKS, *tags)
    return Command(_INVALIDATE_TAGS, (keys.meta, keys.gen, keys.tags), args, decode)


def sweep(keys: CacheKeys, cursor: str) -> Command[Swept | NoSettings]:
    """Clear away a bounded number of what is expired, cleared, invalidated by tag, or dropped by the server."""

    def decode(reply: Reply) -> Swept | NoSettings:
        match reply:
            case [1, int(expired), int(freed), int(orphans), int(evicted), int(more), bytes(after)]:
                return Swept(expired, freed, orphans, evicted, bool(more), after.decode(errors="replace"))
            case [0]:
                return NO_SETTINGS
        raise unexpected(keys.meta, reply)

    return Command(_SWEEP, (*_index(keys), keys.gen, keys.tags), (MAX_KEYS, cursor), decode)


def claim(
    keys: CacheKeys,
    name: str,
    token: str,
    *,
    lease_ms: int,
    ignore: str,
    awaited: str = "",
    retry_ms: int | None = None,
) -> Command[ClaimReply]:
    """Ask to compute a missing value.

    Args:
        keys: of the cache.
        name: stored name of the key.
        token: random, of the lease if it is given.
        lease_ms: how long the lease lasts unless it is renewed.
        ignore: version of an entry found dead; empty for none.
        awaited: token of the lease that was waited for; empty for none.
        retry_ms: for who refreshes behind readers: how long after a failure nobody tries again; None for a reader.
    """
    lease = keys.lease_prefix + name

    def decode(reply: Reply) -> ClaimReply:
        match reply:
            case [1, bytes(entry), bytes(gen)]:
                return Hit((entry, gen or None))
            case [2, int(version), int(wrong_type)]:
                return Lead(version, bool(wrong_type))
            case [3, int(left_ms), bytes(held)]:
                return Await(left_ms, held.decode(errors="replace"))
            case [4, bytes(error)]:
                error_type, _, message = error.decode(errors="replace").partition(" ")
                return Failed(error_type, message)
        raise unexpected(lease, reply)

    where = (keys.entry_prefix + name, lease, keys.meta, keys.gen)
    return Command(_CLAIM, where, (token, lease_ms, ignore, awaited, "" if retry_ms is None else str(retry_ms)), decode)


def renew(keys: CacheKeys, name: str, token: str, lease_ms: int) -> Command[bool]:
    """Keep a lease. Returns whether it was still held."""
    lease = keys.lease_prefix + name
    return Command(_RENEW, (lease,), (token, lease_ms), lambda reply: _held(lease, reply))


def release(keys: CacheKeys, name: str, token: str, *, error: str | None, error_ms: int, origin: str) -> Command[bool]:
    """Give a lease back without a value; None is no error. Returns whether it was still held."""
    lease = keys.lease_prefix + name
    outcome = "given_up" if error is None else "failed"
    args = (token, outcome, error or " ", error_ms, keys.bus, origin, name)
    return Command(_RELEASE, (lease, keys.entry_prefix + name), args, lambda reply: _held(lease, reply))


def computing_failed(keys: CacheKeys, name: str) -> Command[bool]:
    """Return whether the last attempt to compute a key failed, as far as that is remembered."""
    lease = keys.lease_prefix + name
    return Command("HMGET", (lease,), ("failed",), lambda reply: texts(reply) != [None])


def deploy(keys: CacheKeys, settings: Settings, given: str = ALL_GIVEN) -> Command[Deployed | NewerSchema]:
    """Write the settings of a cache; see `model.Settings.fields` for what is given."""

    def decode(reply: Reply) -> Deployed | NewerSchema:
        match reply:
            case [1, int(now_ms), bytes(before), bytes(now)]:
                return Deployed(now_ms, before.decode(errors="replace"), now.decode(errors="replace"))
            case [-1, int(schema)]:
                return NewerSchema(schema)
        raise unexpected(keys.meta, reply)

    return Command(_DEPLOY, (keys.meta, keys.new, keys.cold, keys.ghost), (SCHEMA, settings.text, given), decode)


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


def _index(keys: CacheKeys) -> tuple[str, ...]:
    return (keys.meta, keys.size, keys.exp, keys.new, keys.hot, keys.warm, keys.cold, keys.ghost, keys.trash)


def _flat(report: Report) -> tuple[Arg, ...]:
    assert len(report.reads) <= MAX_READS  # noqa: S101  the scripts unpack them
    return tuple(part for pair in report.reads for part in pair)


def texts(reply: Reply) -> list[bytes | None]:
    """Return a reply that is a list of texts, some perhaps missing."""
    if not isinstance(reply, list) or not all(part is None or isinstance(part, bytes) for part in reply):
        raise unexpected("a cache", reply)
    return reply


def _held(lease: str, reply: Reply) -> bool:
    if reply not in ([1], [-1]):
        raise unexpected(lease, reply)
    return bool(reply == [1])


def unexpected(key: str, reply: Reply) -> CorruptState:
    """Return the error for a reply that no script of ours gives."""
    return CorruptState(key, f"what makes a script answer {shown(reply)}")
