"""Commands for instances: registration, changes, removal and heartbeats."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import shake_128

from agentperf_redis.balancer.commands.pool import Pool
from agentperf_redis.balancer.commands.records import packed_labels
from agentperf_redis.balancer.commands.replies import Status, opened, refusal, strategy_of, text_of
from agentperf_redis.balancer.model import AgentInstance, LoadBalancingStrategy
from agentperf_redis.balancer.settings import DEFAULT_SETTINGS, PoolSettings
from agentperf_redis.command import Command, NamedArgs, Reply
from agentperf_redis.errors import CorruptState, shown
from agentperf_redis.keys import decoded, encoded
from agentperf_redis.script import Script

COOL_DOWN = Script("balancer/cool_down")
DELETE = Script("balancer/delete")
HEARTBEAT = Script("balancer/heartbeat")
REGISTER = Script("balancer/register")
REMOVE = Script("balancer/remove")
UPDATE = Script("balancer/update")

RING_POINTS = 32
"""Number of points of an instance on the hash ring. POINTS in remove.lua must be the same number."""

_MAX_DIGITS = 16
"""Maximum digits of a time in us."""
_REMOVED = re.compile(rb"(?:.* )?flags=(?:\S+,)?removed(?:[ ,]|$)")
"""Matches the record of a removed instance, which is kept until its last lease ends."""


@dataclass(frozen=True, slots=True)
class TooLate:
    """The request arrived after its time limit and changed nothing.

    Attributes:
        now_ms: the server's clock, ms.
    """

    now_ms: int


@dataclass(frozen=True, slots=True)
class Rates:
    """The rate limits of an instance; math.inf for no limit."""

    requests_per_minute: float = math.inf
    tokens_per_minute: float = math.inf


UNLIMITED = Rates()


@dataclass(frozen=True, slots=True)
class RegisterReply:
    """An instance was registered.

    Attributes:
        strategy: the strategy of the pool.
        born: creation time of the pool, us.
        replaced: the replaced settings of the pool, packed; "" when none were replaced.
        is_first: whether the pool had no instance before.
    """

    strategy: LoadBalancingStrategy
    born: int
    replaced: str
    is_first: bool = False


def register(
    pool: Pool,
    instance: AgentInstance,
    strategy: LoadBalancingStrategy | None,
    heartbeat_ttl_ms: int,
    until_ms: int = 0,
    *,
    rates: Rates = UNLIMITED,
    settings: PoolSettings | None = None,
) -> Command[RegisterReply | TooLate]:
    """Add or change an instance. Without `settings`, an existing pool keeps its settings; a new pool gets defaults."""
    points = shake_128(instance.id.encode()).digest(6 * RING_POINTS)
    numbers = (int.from_bytes(points[at : at + 6]) for at in range(0, len(points), 6))
    args: NamedArgs = {
        "id": encoded(instance.id),
        "wanted": "-" if strategy is None else strategy.value,
        "cap": instance.max_capacity,
        "weight": decimal(instance.weight),
        "labels": packed_labels(instance.labels),
        "on": ",".join(["unhealthy"] * (not instance.is_healthy) + ["draining"] * instance.is_draining),
        "ewma_us": round(instance.response_time_ms * 1000),
        "silence_ms": heartbeat_ttl_ms,
        "points": " ".join(map(str, numbers)),
        "rpm": packed_rate(rates.requests_per_minute),
        "tpm": packed_rate(rates.tokens_per_minute),
        "settings": (settings or DEFAULT_SETTINGS).packed(),
        "chosen": int(settings is not None),
        "until_ms": until_ms,
    }

    def decode(reply: Reply) -> RegisterReply | TooLate:
        match opened(pool, reply):
            case ((Status.DONE | Status.NOTHING), [bytes() as used, int() as born, bytes() as before, int() as first]):
                return RegisterReply(strategy_of(pool, used), born, text_of(pool, before), first == 1)
            case Status.TOO_LATE, [int() as now_ms]:
                return TooLate(now_ms)
            case status, values:
                raise refusal(pool, status, values, strategy)

    return Command(REGISTER, pool.keys.all, args, decode)


def find_registered(pool: Pool, instance_ids: Sequence[str]) -> Command[tuple[int, list[bool]]]:
    """Read whether instances are registered.

    Returns:
        The creation time of the pool in microseconds (0 if there is no pool), and a list with a bool for each instance:
        whether it is registered.
    """

    def decode(reply: Reply) -> tuple[int, list[bool]]:
        match reply:
            case [None | bytes() as born, *records] if len(records) == len(instance_ids):
                number = int(born) if born and born.isdigit() and len(born) <= _MAX_DIGITS else 0
                with contextlib.suppress(TypeError):
                    return number, [record is not None and not _REMOVED.match(record) for record in records]
        raise CorruptState(pool.keys.state, f"an unexpected reply {shown(reply)}")

    return Command("HMGET", (pool.keys.state,), ("#born", *map(encoded, instance_ids)), decode)


def update(
    pool: Pool,
    instance_id: str,
    *,
    max_capacity: int | None = None,
    weight: float | None = None,
    labels: frozenset[str] | None = None,
    on: str = "",
    off: str = "",
    requests_per_minute: float | None = None,
    tokens_per_minute: float | None = None,
    until_ms: int = 0,
) -> Command[int | TooLate | None]:
    """Change an instance. An argument that is None keeps the old value.

    Returns the load of the instance, or None when it is not registered.
    """
    args: NamedArgs = {
        "id": encoded(instance_id),
        "cap": "-" if max_capacity is None else max_capacity,
        "weight": "-" if weight is None else decimal(weight),
        "labels": "-" if labels is None else packed_labels(labels) if labels else "",
        "on": on,
        "off": off,
        "rpm": "-" if requests_per_minute is None else packed_rate(requests_per_minute),
        "tpm": "-" if tokens_per_minute is None else packed_rate(tokens_per_minute),
        "until_ms": until_ms,
    }

    def decode(reply: Reply) -> int | TooLate | None:
        match opened(pool, reply):
            case Status.NOTHING, []:
                return None
            case Status.DONE, [int() as load]:
                return load
            case Status.TOO_LATE, [int() as now_ms]:
                return TooLate(now_ms)
            case status, values:
                raise refusal(pool, status, values)

    return Command(UPDATE, pool.keys.core, args, decode)


def cool_down(pool: Pool, instance_id: str, rest_ms: int, why: str, until_ms: int = 0) -> Command[bool | TooLate]:
    """Let an instance rest. Returns whether the instance is registered.

    Args:
        pool: the pool of the instance.
        instance_id: the instance.
        rest_ms: length of the rest, ms.
        why: the reason that the event names, "rate_limited" or "cooled_down".
        until_ms: server time after which the request is refused, ms; 0: never.
    """

    def decode(reply: Reply) -> bool | TooLate:
        match opened(pool, reply):
            case (Status.DONE | Status.NOTHING) as status, []:
                return status == Status.DONE
            case Status.TOO_LATE, [int() as now_ms]:
                return TooLate(now_ms)
            case status, values:
                raise refusal(pool, status, values)

    args: NamedArgs = {"id": encoded(instance_id), "rest_ms": rest_ms, "why": why, "until_ms": until_ms}
    return Command(COOL_DOWN, pool.keys.core, args, decode)


@dataclass(frozen=True, slots=True)
class Removed:
    """An instance was removed.

    Attributes:
        is_empty: whether the pool now has neither instances, leases nor waiters.
    """

    is_empty: bool


def count_registered(pool: Pool) -> Command[int]:
    """Count the instances of a pool."""

    def decode(reply: Reply) -> int:
        if not isinstance(reply, int):
            raise CorruptState(pool.keys.ids, f"an unexpected reply {shown(reply)}")
        return reply

    return Command("ZCARD", (pool.keys.ids,), (), decode)


def remove(pool: Pool, instance_id: str, until_ms: int = 0) -> Command[Removed | TooLate | None]:
    """Remove an instance. Returns None if the instance was not registered."""

    def decode(reply: Reply) -> Removed | TooLate | None:
        match opened(pool, reply):
            case Status.NOTHING, []:
                return None
            case Status.DONE, [int() as empty]:
                return Removed(empty == 1)
            case Status.TOO_LATE, [int() as now_ms]:
                return TooLate(now_ms)
            case status, values:
                raise refusal(pool, status, values)

    return Command(REMOVE, pool.keys.all, {"id": encoded(instance_id), "until_ms": until_ms}, decode)


def delete(pool: Pool, until_ms: int = 0) -> Command[bool | TooLate]:
    """Delete a pool. Returns whether the pool existed."""

    def decode(reply: Reply) -> bool | TooLate:
        match opened(pool, reply):
            case (Status.DONE | Status.NOTHING) as status, []:
                return status == Status.DONE
            case Status.TOO_LATE, [int() as now_ms]:
                return TooLate(now_ms)
            case status, values:
                raise refusal(pool, status, values)

    return Command(DELETE, pool.keys.all, {"until_ms": until_ms}, decode)


def heartbeat(pool: Pool, instance_ids: Iterable[str], heartbeat_ttl_ms: int) -> Command[list[str]]:
    """Report that instances are alive.

    Args:
        pool: the pool of the instances.
        instance_ids: the instances, at most `MANY`.
        heartbeat_ttl_ms: time until the next heartbeat is due, ms; 0: each instance's registered heartbeat TTL.

    Returns:
        The instances that are not registered.
    """

    def decode(reply: Reply) -> list[str]:
        match opened(pool, reply):
            case Status.DONE, names:
                return [decoded(text_of(pool, name)) for name in names]
            case status, values:
                raise refusal(pool, status, values)

    args: NamedArgs = {"silence_ms": heartbeat_ttl_ms, "names...": tuple(map(encoded, instance_ids))}
    return Command(HEARTBEAT, pool.keys.core, args, decode)


def packed_rate(rate: float) -> str:
    """Return a rate limit in the format of the scripts: 0 for no limit."""
    return "0" if rate == math.inf else decimal(rate)


def decimal(value: float) -> str:
    """Return a number as a decimal without an exponent, rounded to nine places: scripts multiply weights by 10^9."""
    text = f"{value:.9f}".rstrip("0").rstrip(".")
    return text if math.isfinite(value) else "0"
