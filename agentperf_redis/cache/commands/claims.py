"""Commands that claim, renew and release the compute lease. A missing value is computed under this lease."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from agentperf_redis.cache.commands.replies import NO_SETTINGS, Found, NoSettings, texts, unexpected
from agentperf_redis.command import Command, NamedArgs, Reply
from agentperf_redis.keys import CacheKeys
from agentperf_redis.script import Script

_CLAIM = Script("cache/claim")
_RELEASE = Script("cache/release_claim")
_RENEW = Script("cache/renew_claim")


@dataclass(frozen=True, slots=True)
class Hit:
    """A claim found a value."""

    found: Found


@dataclass(frozen=True, slots=True)
class Lead:
    """The caller got the lease and computes the value. The put is refused if the value is invalidated after `version`.

    Attributes:
        version: the cache's clock when the lease was granted.
        wrong_type: whether the Redis key of the entry or of the lease had a wrong type.
    """

    version: int
    wrong_type: bool = False


@dataclass(frozen=True, slots=True)
class Await:
    """Another caller computes the value. Its lease has this token, and expires in `left_ms` unless it is renewed."""

    left_ms: int
    token: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The awaited computation failed. Both texts are empty if the computed value cannot be stored."""

    error_type: str
    message: str


ClaimReply: TypeAlias = Hit | Lead | Await | Failed | NoSettings


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
    """Claim the compute lease on a missing value.

    Args:
        keys: key names of the cache.
        name: stored name of the key.
        token: random; identifies the lease if it is granted.
        lease_ms: TTL of the lease unless it is renewed.
        ignore: `entry_format.version_text` of an entry that the caller has found invalid. The script treats this
            entry as missing. Empty for none.
        awaited: token of the lease that the caller has waited for; empty for none.
        retry_ms: for a background refresh: time after a failed computation before the value is computed again, ms.
            None for a reader.
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
            case [0]:
                return NO_SETTINGS
        raise unexpected(lease, reply)

    where = (keys.entry_prefix + name, lease, keys.meta, keys.epochs)
    args: NamedArgs = {
        "token": token,
        "lease_ms": lease_ms,
        "ignore": ignore,
        "awaited": awaited,
        "retry_ms": "" if retry_ms is None else str(retry_ms),
    }
    return Command(_CLAIM, where, args, decode)


def renew(keys: CacheKeys, name: str, token: str, lease_ms: int) -> Command[bool]:
    """Renew a lease. Returns whether the lease was still held."""
    lease = keys.lease_prefix + name
    return Command(_RENEW, (lease,), {"token": token, "lease_ms": lease_ms}, lambda reply: _held(lease, reply))


def release(
    keys: CacheKeys, name: str, token: str, *, error: str | None, error_ms: int, origin: str, tagged: bool = False
) -> Command[bool]:
    """Release a lease without storing a value. `error` is None if the computation was given up.

    Returns:
        Whether the lease was still held and the key was not invalidated since the claim. If `tagged` is True, the
        invalidation of any tag counts as an invalidation of the key.
    """
    lease = keys.lease_prefix + name
    args: NamedArgs = {
        "token": token,
        "outcome": "given_up" if error is None else "failed",
        "error": error or " ",
        "error_ms": error_ms,
        "bus": keys.bus,
        "origin": origin,
        "key": name,
        "tagged": int(tagged),
    }

    def decode(reply: Reply) -> bool:
        if reply not in ([1], [2], [-1]):
            raise unexpected(lease, reply)
        return bool(reply == [1])

    return Command(_RELEASE, (lease, keys.entry_prefix + name, keys.epochs), args, decode)


def computing_failed(keys: CacheKeys, name: str) -> Command[bool]:
    """Return whether the server has recorded that the most recent computation of a key's value failed."""
    lease = keys.lease_prefix + name
    return Command("HMGET", (lease,), ("failed",), lambda reply: texts(reply) != [None])


def _held(lease: str, reply: Reply) -> bool:
    if reply not in ([1], [-1]):
        raise unexpected(lease, reply)
    return bool(reply == [1])
