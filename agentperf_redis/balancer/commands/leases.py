"""Commands that acquire, wait for, renew and release leases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from agentperf_redis import random_numbers
from agentperf_redis.balancer.commands.pool import Pool
from agentperf_redis.balancer.commands.records import facts_of, packed_labels
from agentperf_redis.balancer.commands.replies import PoolIsDivided, Status, opened, refusal, text_of
from agentperf_redis.balancer.model import AgentInstance, Facts, LoadBalancingStrategy, Outcome, snapshot
from agentperf_redis.command import Arg, Command, NamedArgs, Reply
from agentperf_redis.errors import CorruptState, shown
from agentperf_redis.keys import encoded
from agentperf_redis.script import Script

ACQUIRE = Script("balancer/acquire")
ACQUIRE_MANY = Script("balancer/acquire_many")
EXTEND = Script("balancer/extend")
RELEASE = Script("balancer/release")
RENEW = Script("balancer/renew")
SELECT = Script("balancer/select")
WAIT = Script("balancer/wait")

_OUTCOME_LETTERS = {
    Outcome.OK: "o",
    Outcome.ERROR: "e",
    Outcome.TIMEOUT: "t",
    Outcome.REJECTED: "j",
    Outcome.RATE_LIMITED: "l",
    Outcome.NEUTRAL: "n",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """The parameters of a pick.

    Attributes:
        strategy: the strategy that the pool must have; None accepts any strategy.
        require: labels; the instance must have all of them.
        affinity: under CONSISTENT_HASH, requests with the same value go to the same instance.
    """

    strategy: LoadBalancingStrategy | None = None
    require: frozenset[str] = frozenset()
    affinity: str | None = None

    def args(self) -> dict[str, Arg]:
        """Return the choice as arguments for the scripts, with a new random number."""
        number = random_numbers.bits(52)
        point = number % 2**48 if self.affinity is None else _point(self.affinity)
        wanted = "-" if self.strategy is None else self.strategy.value
        return {"wanted": wanted, "labels": packed_labels(self.require), "point": point, "random": number}


def _point(affinity: str) -> int:
    """Return the position of an affinity on the ring, 0 to 2^48 - 1."""
    return int.from_bytes(blake2b(affinity.encode(), digest_size=6).digest())


ANY = Choice()
_PARTS = 5
"""Number of values for each lease in the reply of acquire_many."""
_LATE = {"late": 1}
_AGAIN = {"again": 1}


@dataclass(frozen=True, slots=True)
class Granted:
    """A lease was granted.

    Attributes:
        facts: the fields of the instance right after the grant.
        expiry_ms: end of the lease by the server's clock, ms.
        fence: fencing token of the lease.
        load: sum of the loads of all instances of the shard.
        cap: sum of the capacities of those instances of the shard that take work.
    """

    facts: Facts
    expiry_ms: int
    fence: int
    load: int = 0
    cap: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """No lease was granted.

    Attributes:
        retry_after: seconds until a timer, such as the expiry of a lease, may free capacity; at most 1. If all
            instances are unhealthy, resting or rate-limited: seconds until the first of them comes back, if known.
        registered: number of instances of the pool.
        waiting: number of callers in the queue.
        out_of_rotation: number of instances that are draining, have missed their heartbeat or are marked unhealthy.
        unhealthy: number of instances that are ejected, half-open or failing checks.
        rate_limited: number of instances that rest or whose rate limits are used up.
    """

    retry_after: float
    registered: int
    waiting: int
    out_of_rotation: int = 0
    unhealthy: int = 0
    rate_limited: int = 0

    @staticmethod
    def of_all(refusals: Iterable[Refused]) -> Refused:
        """Combine the refusals of all shards of a pool into one refusal."""
        found = list(refusals)
        return Refused(
            min(each.retry_after for each in found),
            sum(each.registered for each in found),
            sum(each.waiting for each in found),
            sum(each.out_of_rotation for each in found),
            sum(each.unhealthy for each in found),
            sum(each.rate_limited for each in found),
        )

    @property
    def crowd(self) -> float:
        """Number of queued callers per instance in rotation."""
        return self.waiting / max(0.5, self.registered - self.out_of_rotation)

    def reason(self, agent_type: str) -> str:
        """Return the reason of the refusal as text."""
        if self.registered == 0:
            return f"no instance of {agent_type!r} is registered"
        full = max(0, self.registered - self.out_of_rotation - self.unhealthy - self.rate_limited)
        counts = {
            "full": full,
            "resting or rate-limited": self.rate_limited,
            "unhealthy (ejected or failing checks)": self.unhealthy,
            "out of rotation (draining, marked unhealthy or heartbeat missed)": self.out_of_rotation,
        }
        causes = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        queue = f"; {self.waiting} waiting in the queue" if self.waiting else ""
        return f"of {self.registered} {'instance' if self.registered == 1 else 'instances'}, {causes}{queue}"


@dataclass(frozen=True, slots=True)
class Spent:
    """The token cannot be used again: its lease has ended, or another request waits with the same token."""

    why: str


@dataclass(frozen=True, slots=True)
class Queued:
    """The request is in the queue.

    Attributes:
        ahead: number of waiters before this one.
        retry_after: seconds until a timer, such as the expiry of a lease, may free capacity; at most 1.
        position: the waiter's ticket. A waiter that sends its ticket keeps its position. This is true even if the
            server has removed the waiter because its polls came too late.
        back_after: seconds until the first instance comes back, if all instances are unhealthy, resting or rate-limited
            and this time is known. Otherwise 0.0.
    """

    ahead: int
    retry_after: float
    position: str
    back_after: float = 0.0


def acquire(pool: Pool, token: str, ttl_ms: int, choice: Choice, tokens: int = 0) -> Command[Granted | Refused | Spent]:
    """Pick an instance and lease one unit of its capacity, at most once per token."""

    def decode(reply: Reply) -> Granted | Refused | Spent:
        match opened(pool, reply):
            case Status.DONE, [bytes() as name, int(expiry_ms), int(fence), bytes() as record, int(load), int(cap)]:
                return Granted(facts_of(pool, name, record), expiry_ms, fence, load, cap)
            case status, values:
                return _not_granted(pool, status, values, choice)

    args = {"token": token, "ttl_ms": ttl_ms, "late": 0, **choice.args(), "tokens": tokens}
    return Command(ACQUIRE, pool.keys.all, args, decode, resend_args=_LATE)


def acquire_many(
    pool: Pool, tokens: Sequence[str], ttl_ms: int, choice: Choice, need: int = 0, *, whole: bool = False
) -> Command[dict[str, Granted] | Refused | Spent]:
    """Lease at most `MANY` units, at most one for each token.

    Args:
        pool: the pool.
        tokens: the tokens of the leases.
        ttl_ms: TTL of the leases, ms.
        choice: which instances may be picked, and how.
        need: expected tokens of the work on one lease, counted against the instance's tokens per minute.
        whole: whether to lease all units or none. If False, as many units are leased as are free.

    Returns:
        The leases by token; there is at least one.
    """

    def decode(reply: Reply) -> dict[str, Granted] | Refused | Spent:
        match opened(pool, reply):
            case Status.DONE, [int(load), int(cap), _, *rest] if len(rest) % _PARTS == _PARTS - 1:
                parts = reply[3:]
                found = (parts[at : at + _PARTS] for at in range(0, len(parts), _PARTS))
                return dict(_granted(pool, load, cap, *each) for each in found)
            case status, values:
                return _not_granted(pool, status, values, choice)

    args: NamedArgs = {
        "ttl_ms": ttl_ms,
        "late": 0,
        "wanted": "-" if choice.strategy is None else choice.strategy.value,
        "labels": packed_labels(choice.require),
        "point": "-" if choice.affinity is None else _point(choice.affinity),
        "randoms": " ".join(str(random_numbers.bits(52)) for _ in tokens),
        "tokens": need,
        "whole": int(whole),
        "leases...": tuple(tokens),
    }
    return Command(ACQUIRE_MANY, pool.keys.all, args, decode, resend_args=_LATE)


def _granted(
    pool: Pool, load: int, cap: int, token: Reply, name: Reply, expiry_ms: Reply, fence: Reply, record: Reply
) -> tuple[str, Granted]:
    if not isinstance(expiry_ms, int) or not isinstance(fence, int):
        raise CorruptState(pool.keys.state, f"the lease {shown((token, expiry_ms, fence))}")
    return text_of(pool, token), Granted(facts_of(pool, name, record), expiry_ms, fence, load, cap)


def _not_granted(pool: Pool, status: int, values: list[Reply], choice: Choice) -> Refused | Spent:
    """Decode the reply to a request for leases that got none."""
    match status, values:
        case Status.NOTHING, [
            int() as retry_ms,
            int() as registered,
            int() as waiting,
            int() as out_of_rotation,
            int() as unhealthy,
            int() as rate_limited,
        ]:
            return Refused(retry_ms / 1000, registered, waiting, out_of_rotation, unhealthy, rate_limited)
        case Status.SPENT, [bytes() as why]:
            return Spent(text_of(pool, why))
        case _:
            raise refusal(pool, status, values, choice.strategy)


def wait(
    pool: Pool,
    token: str,
    *,
    ttl_ms: int,
    live_ms: int,
    boost_ms: int,
    require: frozenset[str],
    position: str,
    tokens: int = 0,
) -> Command[Granted | Queued | Spent]:
    """Join the queue with a token, stay in the queue, or fetch the grant."""

    def decode(reply: Reply) -> Granted | Queued | Spent:
        match opened(pool, reply):
            case Status.DONE, [bytes() as name, int(expiry_ms), int(fence), bytes() as record, int(load), int(cap)]:
                return Granted(facts_of(pool, name, record), expiry_ms, fence, load, cap)
            case Status.NOTHING, [int() as ahead, int() as retry_ms, bytes() as position, int() as back_ms]:
                return Queued(ahead, retry_ms / 1000, text_of(pool, position), back_ms / 1000)
            case Status.SPENT, [bytes() as why]:
                return Spent(text_of(pool, why))
            case status, values:
                raise refusal(pool, status, values)

    args: NamedArgs = {
        "token": token,
        "ttl_ms": ttl_ms,
        "live_ms": live_ms,
        "boost_ms": boost_ms,
        "labels": packed_labels(require),
        "ticket": position,
        "tokens": tokens,
    }
    return Command(WAIT, pool.keys.core, args, decode)


def select(pool: Pool, choice: Choice) -> Command[AgentInstance | None]:
    """Return the instance that `acquire` would pick now, without leasing it."""

    def decode(reply: Reply) -> AgentInstance | None:
        match opened(pool, reply):
            case Status.NOTHING, []:
                return None
            case Status.DONE, [bytes() as name, bytes() as record]:
                return snapshot(facts_of(pool, name, record))
            case status, values:
                raise refusal(pool, status, values, choice.strategy)

    return Command(SELECT, pool.keys.all, {**choice.args()}, decode)


def release(
    pool: Pool,
    token: str,
    instance_id: str | None = None,
    *,
    outcome: Outcome = Outcome.NEUTRAL,
    response_time: float | None = None,
    tombstone_ms: int = 0,
    tokens: int = 0,
    rest_ms: int = 0,
    by_hand: bool = False,
) -> Command[bool]:
    """Release a lease.

    Args:
        pool: the pool.
        token: the token of the lease.
        instance_id: the leased instance, if known. Passing it saves the server a lookup.
        outcome: the result of the work.
        response_time: seconds that the work took, if measured.
        tombstone_ms: ms during which the server refuses a late copy of the acquire request; 0 when no copy can arrive.
        tokens: tokens used minus tokens counted at the grant; negative if fewer were used.
        rest_ms: time for which the instance gets no work after the outcome RATE_LIMITED, ms.
        by_hand: whether an operator ends the lease of another process. This adds an event and records no outcome.

    Returns:
        Whether this call freed the unit. If the pool was deleted and then divided, the lease was lost with the deleted
        pool. The result is then False; with `by_hand`, the command raises PoolIsDivided instead.
    """
    # A rate-limited call ends fast. Its duration says nothing about the response time of the instance.
    if outcome is Outcome.RATE_LIMITED:
        response_time = None
    response_us = -1 if response_time is None else round(response_time * 1e6)
    args: NamedArgs = {
        "token": token,
        "id": "-" if instance_id is None else encoded(instance_id),
        "outcome": "f" if by_hand else _OUTCOME_LETTERS[outcome],
        "response_us": response_us,
        "bury_ms": tombstone_ms,
        "again": 0,
        "tokens": tokens,
        "rest_ms": rest_ms,
    }

    def decode(reply: Reply) -> bool:
        match opened(pool, reply):
            case (Status.DONE | Status.NOTHING) as status, []:
                return status == Status.DONE
            case Status.SPENT, [bytes()]:
                return False
            case status, values:
                return _lost(pool, status, values, by_hand)

    return Command(RELEASE, pool.keys.core, args, decode, resend_args=_AGAIN)


def _lost(pool: Pool, status: int, values: list[Reply], by_hand: bool = False) -> bool:
    """Return False if the refusal means that the lease was lost with its pool. Otherwise, raise the refusal's error."""
    error = refusal(pool, status, values)
    if isinstance(error, PoolIsDivided) and not by_hand:
        return False
    raise error


def extend(pool: Pool, token: str, ttl_ms: int) -> Command[bool]:
    """Give a lease another TTL, which begins now. Returns False if the lease is lost."""

    def decode(reply: Reply) -> bool:
        match opened(pool, reply):
            case (Status.DONE | Status.NOTHING) as status, []:
                return status == Status.DONE
            case status, values:
                return _lost(pool, status, values)

    return Command(EXTEND, (pool.keys.state, pool.keys.due), {"token": token, "ttl_ms": ttl_ms}, decode)


def renew(pool: Pool, tokens: Iterable[str], ttl_ms: int) -> Command[frozenset[str]]:
    """Renew at most `MANY` leases. Returns the tokens of the leases that are lost."""

    def decode(reply: Reply) -> frozenset[str]:
        match opened(pool, reply):
            case Status.DONE, lost:
                return frozenset(text_of(pool, token) for token in lost)
            case status, values:
                raise refusal(pool, status, values)

    return Command(RENEW, (pool.keys.due,), {"ttl_ms": ttl_ms, "tokens...": tuple(tokens)}, decode)
