"""Commands for the health of a pool: its settings, active checks and events."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from agentperf_redis.balancer.commands.instances import TooLate
from agentperf_redis.balancer.commands.pool import Pool
from agentperf_redis.balancer.commands.records import facts_of
from agentperf_redis.balancer.commands.replies import Status, opened, refusal, text_of
from agentperf_redis.balancer.model import AgentInstance, EventKind, PoolEvent, snapshot
from agentperf_redis.balancer.settings import PoolSettings
from agentperf_redis.command import Command, NamedArgs, Reply
from agentperf_redis.errors import CorruptState, shown
from agentperf_redis.keys import decoded, encoded
from agentperf_redis.script import Script

CONFIGURE = Script("balancer/configure")
CLAIM_CHECKS = Script("balancer/claim_checks")
REPORT_CHECKS = Script("balancer/report_checks")


@dataclass(frozen=True, slots=True)
class Configured:
    """The settings were applied to one page of instances; configure.lua describes the fields."""

    next_rank: int
    replaced: str


@dataclass(frozen=True, slots=True)
class Claimed:
    """The result of claiming active checks.

    Attributes:
        at_ms: time of the claim by the server's clock, ms. `report_checks` needs it.
        next_after: seconds until the next check is due.
        instances: the instances to check.
    """

    at_ms: int
    next_after: float
    instances: tuple[AgentInstance, ...]


def configure(
    pool: Pool, settings: PoolSettings, first: int, count: int, until_ms: int = 0
) -> Command[Configured | TooLate]:
    """Set the settings of a pool, and apply them to one page of its instances."""

    def decode(reply: Reply) -> Configured | TooLate:
        match opened(pool, reply):
            case Status.DONE, [int() as next_rank, bytes() as before]:
                return Configured(next_rank, text_of(pool, before))
            case Status.TOO_LATE, [int() as now_ms]:
                return TooLate(now_ms)
            case status, values:
                raise refusal(pool, status, values)

    args: NamedArgs = {"settings": settings.packed(), "first": first, "count": count, "until_ms": until_ms}
    return Command(CONFIGURE, (*pool.keys.core, pool.keys.ids), args, decode)


def claim_checks(pool: Pool, interval_ms: int, count: int) -> Command[Claimed]:
    """Claim active checks that are due."""

    def decode(reply: Reply) -> Claimed:
        match opened(pool, reply):
            case Status.DONE, [int() as at_ms, int() as next_ms, *rest]:
                # For an instance without a record, the reply contains an empty text. Leave out such instances.
                found = [pair for pair in zip(rest[::2], rest[1::2], strict=False) if pair[1] != b""]
                return Claimed(at_ms, next_ms / 1000, tuple(snapshot(facts_of(pool, *pair)) for pair in found))
            case status, values:
                raise refusal(pool, status, values)

    where = pool.keys
    args = {"interval_ms": interval_ms, "count": count}
    return Command(CLAIM_CHECKS, (where.state, where.ids, where.checks), args, decode)


def report_checks(
    pool: Pool, claimed_ms: int, results: Iterable[tuple[str, bool]], until_ms: int = 0
) -> Command[list[str] | TooLate]:
    """Report at most `MANY` results of active checks. Returns the instances that are not registered."""

    def decode(reply: Reply) -> list[str] | TooLate:
        match opened(pool, reply):
            case Status.TOO_LATE, [int() as now_ms]:
                return TooLate(now_ms)
            case Status.DONE, names:
                return [decoded(text_of(pool, name)) for name in names]
            case status, values:
                raise refusal(pool, status, values)

    words = tuple(("+" if good else "-") + encoded(name) for name, good in results)
    args: NamedArgs = {"claimed_ms": claimed_ms, "until_ms": until_ms, "results...": words}
    return Command(REPORT_CHECKS, pool.keys.core, args, decode)


def events(pool: Pool, after: str | None, count: int) -> Command[list[PoolEvent]]:
    """Read events of a pool, oldest first.

    Returns the first `count` events after the cursor `after`, or the last `count` events if `after` is None.
    """

    def decode(reply: Reply) -> list[PoolEvent]:
        if not isinstance(reply, list):
            raise CorruptState(pool.keys.events, f"an unexpected reply {shown(reply)}")
        found = [event for entry in reply for event in _event(pool, entry)]
        return found[::-1] if after is None else found

    if after is None:
        return Command("XREVRANGE", (pool.keys.events,), ("+", "-", "COUNT", count), decode)
    return Command("XRANGE", (pool.keys.events,), (f"({after}", "+", "COUNT", count), decode)


def _event(pool: Pool, entry: Reply) -> Iterator[PoolEvent]:
    """Decode an entry of the stream. Yields nothing if this version of the library does not know the kind of event."""
    match entry:
        case [bytes() as name, [*fields]] if len(fields) % 2 == 0:
            details = {
                text_of(pool, key): text_of(pool, value) for key, value in zip(fields[::2], fields[1::2], strict=True)
            }
            kind, instance = details.pop("kind", ""), details.pop("id", "-")
            at_ms = name.partition(b"-")[0]
            if kind in _KINDS and _EVENT_ID.fullmatch(name):
                yield PoolEvent(
                    pool.agent_type,
                    EventKind(kind),
                    None if instance == "-" else decoded(instance),
                    int(at_ms) / 1000,
                    name.decode(),
                    details,
                )
        case _:
            raise CorruptState(pool.keys.events, f"an unexpected entry {shown(entry)}")


_EVENT_ID = re.compile(rb"[0-9]{1,16}-[0-9]{1,20}")
_KINDS = {kind.value for kind in EventKind}
