"""The commands for the entries of a cache: the script or plain command, arguments and reply of each operation."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import partial

from agentperf_redis.cache.commands.replies import NO_SETTINGS, Found, NoSettings, left_over, texts, unexpected
from agentperf_redis.cache.model import TIERS, Tier
from agentperf_redis.cache.process.access_buffer import MAX_READS, AccessReport
from agentperf_redis.command import Arg, Command, NamedArgs, Reply
from agentperf_redis.keys import CacheKeys
from agentperf_redis.script import Script

MAX_EVICTIONS = 512
"""Limit for the entries that one script call moves or evicts; set in index.lua."""
MAX_KEYS = 256
"""Limit for the keys in one command."""
MAX_TAG_MARKS = 10_000
"""Maximum number of tags whose last invalidation is kept (about 1 MB). For more tags, see invalidate_tags.lua."""
_CANCEL_PUTS = Script("cache/cancel_puts")
_CLEAR = Script("cache/clear")
_DELETE = Script("cache/delete")
_DROP = Script("cache/drop")
_GET_STRICT = Script("cache/get_strict")
_INVALIDATE_TAGS = Script("cache/invalidate_tags")
_POP = Script("cache/pop")
_PUT = Script("cache/put")
_REPORT_READS = Script("cache/report_reads")
_SWEEP = Script("cache/sweep")
_TTL = Script("cache/ttl")


class PutResult(Enum):
    """The result of a put. The numbers are the status numbers that put.lua returns."""

    STORED = 1
    NO_SETTINGS = 0
    LEASE_LOST = -1
    TOO_LARGE = -2
    INVALIDATED = -3
    NO_CAPACITY = -4
    IN_DOUBT = -5
    LATE = -6
    CONDITION_FAILED = -7
    NO_INTEGER = -8
    OUT_OF_RANGE = -9


class Mode:
    """The modes of put.lua: each is a condition for storing a value, or a way to make it from the stored value."""

    ALWAYS = ""
    ADD = "add"
    REPLACE = "replace"
    TOUCH = "touch"

    @staticmethod
    def at_version(version: int) -> str:
        """Store only if the stored value has this version; 0 means that there must be no value."""
        return f"if:{version}"

    @staticmethod
    def increment(by: int, *, create: bool = True) -> str:
        """Add to the stored number. If there is none, store the given value if `create` is True."""
        return f"incr:{by}" if create else f"incrxx:{by}"


@dataclass(frozen=True, slots=True)
class PutReply:
    """The result of a put.

    Attributes:
        outcome: the result.
        version: the version of the put. If the put was late, the server's time in ms instead.
        number: the new value of a number that was increased.
        repeated: for a put refused because the shard has no settings: whether an earlier copy may have been executed.
    """

    outcome: PutResult
    version: int = 0
    number: int = 0
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class StrictRead:
    """The result of a read that is recorded at once.

    Attributes:
        found: the entry and the invalidation epochs. The script returns the epochs only if it could not decode the
            epochs or the entry.
        counted: whether the script counted a hit.
        wrong_type: whether the entry's key has a wrong type.
    """

    found: Found
    counted: bool = False
    wrong_type: bool = False


@dataclass(frozen=True, slots=True)
class Swept:
    """The numbers of entries and values that one step of a sweep removed, and the cursor for the next step."""

    expired: int
    freed: int
    orphans: int
    evicted: int
    more: bool
    cursor: str


def read(keys: CacheKeys, name: str) -> Command[list[bytes | None]]:
    """Read an entry and the invalidation epochs, in one round trip and without a write."""
    return Command("MGET", (keys.entry_prefix + name, keys.epochs), (), partial(texts, count=2))


def read_many(keys: CacheKeys, names: list[str]) -> Command[list[bytes | None]]:
    """Read at most MAX_KEYS entries and the invalidation epochs. The epochs are last in the reply."""
    return Command(
        "MGET", (*(keys.entry_prefix + name for name in names), keys.epochs), (), partial(texts, count=len(names) + 1)
    )


def tag_marks(keys: CacheKeys, tags: tuple[str, ...]) -> Command[int]:
    """Return the version of the newest invalidation of any of the tags."""

    def decode(reply: Reply) -> int:
        try:
            return max(int(float(mark)) for mark in (*reply, 0) if mark is not None)
        except (OverflowError, TypeError, ValueError):
            raise unexpected(keys.tags, reply) from None

    return Command("ZMSCORE", (keys.tags,), tags, decode)


def invalidation_epoch(keys: CacheKeys) -> Command[bytes | None]:
    """Read the invalidation epochs."""
    return Command("MGET", (keys.epochs,), (), lambda reply: texts(reply, count=1)[0])


def read_strictly(keys: CacheKeys, name: str, *, miss: bool = True) -> Command[StrictRead | NoSettings]:
    """Read an entry, and record a hit in the same step. If `miss` is True, a miss is also recorded."""

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

    where = (*index_keys(keys), keys.entry_prefix + name, keys.epochs, keys.tags)
    return Command(_GET_STRICT, where, {"key": name, "misses": int(miss)}, decode)


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
    report: AccessReport,
    tags: tuple[str, ...],
    mode: str = Mode.ALWAYS,
) -> Command[PutReply]:
    """Store one value.

    Args:
        keys: key names of the cache.
        name: stored name of the key.
        payload: see `entry_format.payload`.
        request: random id of the put, the same each time the put is sent.
        until_ms: server time after which no copy of the request has any effect.
        seen: the newest version that this process knew before it first sent the request.
        again: whether the request was sent before.
        ttl_ms: the TTL as `model.ttl_ms` returns it, or one TTL for each tier: ``hot/warm/cold``.
        tier: the tier of the entry; None lets the policy choose.
        token: token of the compute lease under which the value was computed; empty for a plain put.
        origin: the writing process.
        writer: the reporting process.
        report: buffered reads to report with the put.
        tags: the tags, percent-encoded.
        mode: see `Mode`. In all modes except `ALWAYS`, `token` is empty.
    """
    beside = (keys.entry_prefix + name, keys.lease_prefix + name, keys.epochs, keys.tags, keys.resent)
    args: NamedArgs = {
        "key": name,
        "payload": payload,
        "id": request,
        "until_ms": until_ms,
        "seen": str(seen) if again else "",
        "ttl_ms": ttl_ms,
        "tier": 0 if tier is None else TIERS.index(tier) + 1,
        "token": token,
        "mode": mode,
        "bus": keys.bus,
        "origin": origin,
        "writer": writer,
        "seq": report.seq,
        "misses": report.misses,
        "saved_ms": report.saved_ms,
        "corrupt": report.corrupt,
        "tag_count": len(tags),
        "tags...": tags,
        "reads...": _flat(report),
    }

    def decode(reply: Reply) -> PutReply:
        match reply:
            case [0 | -1 | -3 as status]:
                return PutReply(PutResult(status))
            case [0, 1]:
                return PutReply(PutResult.NO_SETTINGS, repeated=True)
            case [1, int(version), int()] | [-2 | -4 | -5 | -6, int(version)]:
                return PutReply(PutResult(reply[0]), version)
            case [2, int(version), int(number)]:
                return PutReply(PutResult.STORED, version, number)
            case [-2 | -7 | -8 | -9 as status, 0, 0]:
                return PutReply(PutResult(status))
        raise unexpected(keys.meta, reply)

    return Command(_PUT, (*index_keys(keys), *beside), args, decode, {"seen": str(seen)})


@dataclass(frozen=True, slots=True)
class PopReply:
    """The result of a pop.

    Attributes:
        outcome: STORED if the entry was removed, CONDITION_FAILED if there was none, or IN_DOUBT, LATE or NO_SETTINGS.
        version: the cache's clock. If the request was late, the server's time in ms instead.
        entry: the removed entry.
    """

    outcome: PutResult
    version: int = 0
    entry: bytes = b""


def pop(
    keys: CacheKeys, name: str, request: str, *, until_ms: int, again: bool, seen: int, origin: str
) -> Command[PopReply]:
    """Remove one entry and return it. `put` explains the arguments."""
    beside = (keys.entry_prefix + name, keys.lease_prefix + name, keys.epochs, keys.tags, keys.resent)
    args: NamedArgs = {
        "key": name,
        "until_ms": until_ms,
        "id": request,
        "seen": str(seen) if again else "",
        "bus": keys.bus,
        "origin": origin,
    }

    def decode(reply: Reply) -> PopReply:
        match reply:
            case [1, bytes(entry), int(version)]:
                return PopReply(PutResult.STORED, version, entry)
            case [2]:
                return PopReply(PutResult.CONDITION_FAILED)
            case [0]:
                return PopReply(PutResult.NO_SETTINGS)
            case [-5 | -6 as status, int(version)]:
                return PopReply(PutResult(status), version)
        raise unexpected(keys.meta, reply)

    return Command(_POP, (*index_keys(keys), *beside, keys.reply_prefix + request), args, decode, {"seen": str(seen)})


def time_to_live(keys: CacheKeys, name: str) -> Command[int | None]:
    """Return the ms until a value expires: -1 for never, None if there is no value."""
    entry = keys.entry_prefix + name

    def decode(reply: Reply) -> int | None:
        match reply:
            case [0]:
                return None
            case [1, int(left_ms)]:
                return left_ms
        raise unexpected(entry, reply)

    return Command(_TTL, (entry, keys.epochs, keys.tags), {}, decode)


def cancel_puts(keys: CacheKeys, requests: tuple[str, ...], until_ms: int) -> Command[None]:
    """Cancel puts or pops: copies of these requests that arrive later do nothing. `put` explains the arguments."""

    def decode(reply: Reply) -> None:
        if reply != [1]:
            raise unexpected(keys.meta, reply)

    return Command(_CANCEL_PUTS, (keys.meta, keys.resent), {"until_ms": until_ms, "ids...": requests}, decode)


def report_reads(keys: CacheKeys, writer: str, report: AccessReport) -> Command[int | None]:
    """Report reads. Returns the server's time in ms, or None if nothing was recorded because there are no settings."""
    args: NamedArgs = {
        "writer": writer,
        "seq": report.seq,
        "misses": report.misses,
        "saved_ms": report.saved_ms,
        "corrupt": report.corrupt,
        "reads...": _flat(report),
    }

    def decode(reply: Reply) -> int | None:
        match reply:
            case [1, int(now_ms)]:
                return now_ms
            case [0]:
                return None
        raise unexpected(keys.meta, reply)

    return Command(_REPORT_READS, index_keys(keys), args, decode)


def delete(keys: CacheKeys, names: list[str], origin: str) -> Command[tuple[int, int] | NoSettings]:
    """Remove at most MAX_KEYS entries. Returns the number of entries that existed, and the version of the deletion."""
    entries = (keys.entry_prefix + name for name in names)
    leases = (keys.lease_prefix + name for name in names)
    args: NamedArgs = {"bus": keys.bus, "origin": origin, "names...": tuple(names)}

    def decode(reply: Reply) -> tuple[int, int] | NoSettings:
        match reply:
            case [1, int(removed), int(version)]:
                return removed, version
            case [0]:
                return NO_SETTINGS
        raise unexpected(keys.meta, reply)

    return Command(_DELETE, (*index_keys(keys), *entries, *leases), args, decode)


def clear(keys: CacheKeys, origin: str) -> Command[tuple[int, int] | NoSettings]:
    """Make every entry a miss. Returns the number of entries, and the version of the clear."""

    def decode(reply: Reply) -> tuple[int, int] | NoSettings:
        match reply:
            case [1, int(forgotten), int(version)]:
                return forgotten, version
            case [0]:
                return NO_SETTINGS
        raise unexpected(keys.meta, reply)

    return Command(_CLEAR, (*index_keys(keys), keys.epochs, keys.tags), {"bus": keys.bus, "origin": origin}, decode)


def drop(keys: CacheKeys, keep_ms: int) -> Command[int]:
    """Delete a cleared cache, settings included, unless the cache is still in use.

    Returns 0 if the cache was deleted. If the cache is in use, returns how many entries, cleared values and puts in
    doubt are left.
    """
    indexes = (keys.size, keys.new, keys.hot, keys.warm, keys.cold, keys.ghost)
    where = (keys.meta, *indexes, keys.deferred, keys.epochs, keys.tags, keys.resent, keys.history)
    return Command(_DROP, where, {"keep_ms": keep_ms}, left_over(keys.meta))


def invalidate_tags(keys: CacheKeys, tags: tuple[str, ...], origin: str) -> Command[int | NoSettings]:
    """Invalidate every entry that has one of the tags. Returns the version of the invalidation."""

    def decode(reply: Reply) -> int | NoSettings:
        match reply:
            case [1, int(version)]:
                return version
            case [0]:
                return NO_SETTINGS
        raise unexpected(keys.meta, reply)

    args: NamedArgs = {"bus": keys.bus, "origin": origin, "max_marks": MAX_TAG_MARKS, "tags...": tags}
    return Command(_INVALIDATE_TAGS, (keys.meta, keys.epochs, keys.tags), args, decode)


def sweep(keys: CacheKeys, cursor: str) -> Command[Swept | NoSettings]:
    """Remove a bounded number of entries that are expired, cleared, invalidated by tag, or dropped by the server."""

    def decode(reply: Reply) -> Swept | NoSettings:
        match reply:
            case [1, int(expired), int(freed), int(orphans), int(evicted), int(more), bytes(after)]:
                return Swept(expired, freed, orphans, evicted, bool(more), after.decode(errors="replace"))
            case [0]:
                return NO_SETTINGS
        raise unexpected(keys.meta, reply)

    return Command(_SWEEP, (*index_keys(keys), keys.epochs, keys.tags), {"n": MAX_KEYS, "cursor": cursor}, decode)


def index_keys(keys: CacheKeys) -> tuple[str, ...]:
    """Return the keys of the indexes, in the order of the scripts."""
    return (keys.meta, keys.size, keys.new, keys.hot, keys.warm, keys.cold, keys.ghost, keys.deferred)


def _flat(report: AccessReport) -> tuple[Arg, ...]:
    assert len(report.reads) <= MAX_READS  # noqa: S101  the scripts unpack all reads at once
    return tuple(part for pair in report.reads for part in pair)
