"""Commands for the scripts of locks and semaphores: they build the arguments and decode the replies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from agentperf_redis import keys
from agentperf_redis.command import Command, NamedArgs, Reply
from agentperf_redis.errors import CorruptState, shown
from agentperf_redis.keys import LockKeys
from agentperf_redis.script import Script

ACQUIRE = Script("locks/acquire")
EXTEND = Script("locks/extend")
LOOK = Script("locks/look")
RELEASE = Script("locks/release")

NO_TICKET = "-"
"""Sent by a request that has no position in the queue yet."""
_DONE, _NOTHING = 1, 0
_LATE = {"late": 1}
_AGAIN = {"again": 1}


@dataclass(frozen=True, slots=True)
class Place:
    """One lock or semaphore and its keys."""

    name: str
    keys: LockKeys

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(namespace: str, service: str, name: str) -> Place:
        """Return a lock or semaphore; service is "lock" or "semaphore"."""
        return Place(name, keys.lock(namespace, service, name))


@dataclass(frozen=True, slots=True)
class Taken:
    """A unit is held.

    Attributes:
        fence: fencing token of the lease.
        left: seconds until the lease expires.
    """

    fence: int
    left: float


@dataclass(frozen=True, slots=True)
class Refused:
    """No unit is free.

    Attributes:
        ahead: number of waiters before this request.
        retry_after: seconds until a lease may expire, at most 1.
        ticket: the position in the queue, or NO_TICKET.
    """

    ahead: int
    retry_after: float
    ticket: str


@dataclass(frozen=True, slots=True)
class Spent:
    """The token cannot be used again: its lease has ended, or its request was cancelled or refused."""

    why: str


@dataclass(frozen=True, slots=True)
class Seen:
    """The state of a lock or semaphore.

    Attributes:
        held: number of units held.
        waiting: number of waiters.
        left: seconds until the lease of the token expires; 0.0 if the token has no lease.
    """

    held: int
    waiting: int
    left: float


def acquire(
    place: Place, token: str, *, ttl: float, limit: int, live_ms: int = 0, ticket: str = NO_TICKET
) -> Command[Taken | Refused | Spent]:
    """Hold one unit, at most once per token.

    Args:
        place: the lock or semaphore.
        token: identifies the request.
        ttl: seconds until the lease expires.
        limit: max units held at once.
        live_ms: 0 if the request does not queue. Otherwise, the waiter loses its position after this many ms without a
            call.
        ticket: the position in the queue, if known.
    """

    def decode(reply: Reply) -> Taken | Refused | Spent:
        match reply:
            case [1, int() as fence, int() as left_ms]:
                return Taken(fence, left_ms / 1000)
            case [0, int() as ahead, int() as retry_ms, bytes() as position]:
                return Refused(ahead, retry_ms / 1000, position.decode(errors="replace"))
            case [-1, bytes() as why]:
                return Spent(why.decode(errors="replace"))
            case _:
                raise _unexpected(place, reply)

    args: NamedArgs = {
        "token": token,
        "ttl_ms": _ms(ttl),
        "limit": limit,
        "late": 0,
        "live_ms": live_ms,
        "ticket": ticket,
    }
    return Command(ACQUIRE, place.keys.all, args, decode, resend_args=_LATE)


def release(place: Place, token: str, *, tombstone_ms: int = 0) -> Command[bool]:
    """End a lease, or leave the queue. Returns whether this call freed a unit.

    Args:
        place: the lock or semaphore.
        token: the token of the lease.
        tombstone_ms: ms during which the server refuses a late copy of the acquire request; 0 when no copy can arrive.
    """

    def decode(reply: Reply) -> bool:
        if reply not in (_DONE, _NOTHING):
            raise _unexpected(place, reply)
        return bool(reply == _DONE)

    args: NamedArgs = {"token": token, "bury_ms": tombstone_ms, "again": 0}
    return Command(RELEASE, place.keys.all, args, decode, resend_args=_AGAIN)


def extend(place: Place, token: str, seconds: float, *, added: int = 0) -> Command[float | None]:
    """Renew a lease, or add time to it. Returns the seconds until it expires, or None if it is lost.

    Args:
        place: the lock or semaphore.
        token: the token of the lease.
        seconds: the new time until the lease expires, or the time to add to it; see `added`.
        added: 0 if `seconds` counts from now. Otherwise, `seconds` is added to the time that is left, and this is the
            number of the addition. The number is unique for the lease, so a second copy of the request adds nothing.
    """

    def decode(reply: Reply) -> float | None:
        match reply:
            case [1, int() as left_ms]:
                return left_ms / 1000
            case [0]:
                return None
            case _:
                raise _unexpected(place, reply)

    return Command(EXTEND, place.keys.all, {"token": token, "ttl_ms": _ms(seconds), "added": added}, decode)


def look(place: Place, token: str = NO_TICKET) -> Command[Seen]:
    """Count the held units and the waiters of a lock or semaphore, and read the time left in a token's lease."""

    def decode(reply: Reply) -> Seen:
        match reply:
            case [int() as held, int() as waiting, int() as left_ms]:
                return Seen(held, waiting, left_ms / 1000)
            case _:
                raise _unexpected(place, reply)

    return Command(LOOK, place.keys.all, {"token": token}, decode)


def _ms(seconds: float) -> int:
    return math.ceil(seconds * 1000)


def _unexpected(place: Place, reply: Reply) -> CorruptState:
    return CorruptState(place.keys.state, f"an unexpected reply {shown(reply)}")
