"""The balancer's scripts as commands: what is sent, and what the replies mean."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from hashlib import blake2b, shake_128
from typing import NoReturn

from agentperf_redis import keys
from agentperf_redis.balancer.model import (
    AgentInstance,
    Facts,
    InstanceStatus,
    LeaseStatus,
    LoadBalancingStrategy,
    Outcome,
    WaiterStatus,
    snapshot,
)
from agentperf_redis.command import Arg, Command, Reply
from agentperf_redis.errors import CorruptState, InvalidArgument, SchemaMismatch, shown
from agentperf_redis.keys import PoolKeys, decoded, encoded
from agentperf_redis.script import Script

ACQUIRE = Script("balancer/acquire")
HEARTBEAT = Script("balancer/heartbeat")
LEASES = Script("balancer/leases")
REGISTER = Script("balancer/register")
RELEASE = Script("balancer/release")
REMOVE = Script("balancer/remove")
RENEW = Script("balancer/renew")
REPAIR = Script("balancer/repair")
SELECT = Script("balancer/select")
STATUS = Script("balancer/status")
UPDATE = Script("balancer/update")
WAIT = Script("balancer/wait")

SCHEMA = "1"
RING_POINTS = 32
"""Points of an instance on the ring; remove.lua counts on it."""
MANY = 500
"""Most names in one renew or heartbeat: `unpack` takes some 7,000 values, and a long script stops the server."""

_RECORD_FIELDS = 14
_REMOVED = re.compile(rb"(?:\S+ ){7}\w*r")
"""A record that is kept for its last leases only."""
_NO_LABELS: frozenset[str] = frozenset()

_OUTCOME_LETTERS = {
    Outcome.OK: "o",
    Outcome.ERROR: "e",
    Outcome.TIMEOUT: "t",
    Outcome.REJECTED: "j",
    Outcome.NEUTRAL: "n",
}


class Status(IntEnum):
    """First item of every reply, as pool.lua has them."""

    DONE = 1
    NOTHING = 0
    SPENT = -1
    OTHER_STRATEGY = -2
    OTHER_SCHEMA = -3
    CORRUPT = -4
    TOO_LATE = -6


@dataclass(frozen=True, slots=True)
class Pool:
    """One pool and where it is kept."""

    agent_type: str
    keys: PoolKeys

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(namespace: str, agent_type: str) -> Pool:
        """Return the pool of an agent type."""
        return Pool(agent_type, keys.pool(namespace, agent_type))


@dataclass(frozen=True, slots=True)
class Choice:
    """What a pick depends on.

    Attributes:
        strategy: what the pool must have; None takes its own.
        require: labels the instance must have all of.
        affinity: under CONSISTENT_HASH, what is to go to the same instance again.
    """

    strategy: LoadBalancingStrategy | None = None
    require: frozenset[str] = frozenset()
    affinity: str | None = None

    def args(self) -> tuple[Arg, ...]:
        """Return wanted, labels, point, random as the scripts take them."""
        number = random.getrandbits(52)
        if self.affinity is None:
            point = number % 2**48
        else:
            point = int.from_bytes(blake2b(self.affinity.encode(), digest_size=6).digest())
        wanted = "-" if self.strategy is None else self.strategy.value
        return (wanted, packed_labels(self.require), point, number)


ANY = Choice()


@dataclass(frozen=True, slots=True)
class Granted:
    """A lease was granted.

    Attributes:
        facts: the instance, just after.
        expiry_ms: end of the lease, ms of the server's clock.
        fence: its fencing number.
    """

    facts: Facts
    expiry_ms: int
    fence: int


@dataclass(frozen=True, slots=True)
class Refused:
    """No lease was granted.

    Attributes:
        retry_after: seconds until something is due in the pool, at most 1.
        registered: instances of the pool.
        waiting: callers in line.
    """

    retry_after: float
    registered: int
    waiting: int

    def reason(self, agent_type: str) -> str:
        """Return why, in words."""
        if self.registered == 0:
            return f"no instance of {agent_type!r} is registered"
        line = f", {self.waiting} waiting in line" if self.waiting else ""
        return f"all {self.registered} instances that could take it are full, unhealthy or draining{line}"


@dataclass(frozen=True, slots=True)
class Spent:
    """The token had its lease already: it ended, or another request holds its place."""

    why: str


@dataclass(frozen=True, slots=True)
class TooLate:
    """The request came after its limit and did nothing; the server's clock, ms."""

    now_ms: int


@dataclass(frozen=True, slots=True)
class Queued:
    """In line.

    Attributes:
        ahead: how many are before it.
        poll_after: seconds until something is due in the pool, at most 1.
        place: what keeps the place, should the server have taken it for dead.
    """

    ahead: int
    poll_after: float
    place: str


@dataclass(frozen=True, slots=True)
class LeasesPage:
    """One page of leases and of those who wait; see leases.lua."""

    leases: tuple[LeaseStatus, ...]
    waiters: tuple[WaiterStatus, ...]
    next_rank: int


@dataclass(frozen=True, slots=True)
class RepairedPage:
    """What one step of a repair did; see repair.lua."""

    wrong: int
    orphans: int
    registered: int
    next_rank: int


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a pool's instances; see status.lua."""

    strategy: LoadBalancingStrategy
    instances: tuple[InstanceStatus, ...]
    waiting: int
    overdue: int
    granted: int
    next_rank: int


def packed_labels(labels: frozenset[str]) -> str:
    """Return labels as the scripts take them: encoded, sorted, ``a,b``; ``-`` for none."""
    if not labels:
        return "-"
    return ",".join(sorted("%2D" if label == "-" else encoded(label) for label in labels))


def register(
    pool: Pool, instance: AgentInstance, strategy: LoadBalancingStrategy | None, silence_ms: int, until_ms: int = 0
) -> Command[tuple[LoadBalancingStrategy, int] | TooLate]:
    """Add or change an instance. Returns the pool's strategy, and when it was founded, us."""
    points = shake_128(instance.id.encode()).digest(6 * RING_POINTS)
    numbers = (int.from_bytes(points[at : at + 6]) for at in range(0, len(points), 6))
    args: tuple[Arg, ...] = (
        encoded(instance.id),
        "-" if strategy is None else strategy.value,
        instance.max_capacity,
        _decimal(instance.weight),
        packed_labels(instance.labels),
        "u" * (not instance.is_healthy) + "d" * instance.is_draining,
        round(instance.response_time_ms * 1000),
        silence_ms,
        " ".join(map(str, numbers)),
        until_ms,
    )

    def decode(reply: Reply) -> tuple[LoadBalancingStrategy, int] | TooLate:
        match _opened(pool, reply):
            case ((Status.DONE | Status.NOTHING), [bytes() as taken, int() as born]):
                return _strategy(pool, taken), born
            case Status.TOO_LATE, [int() as now_ms]:
                return TooLate(now_ms)
            case status, values:
                _refuse(pool, status, values, strategy)

    return Command(REGISTER, pool.keys.all, args, decode)


def look(pool: Pool, instance_ids: Sequence[str]) -> Command[tuple[int, list[bool]]]:
    """Look when a pool was founded, 0 when it is not there, and for each instance whether it is registered."""

    def decode(reply: Reply) -> tuple[int, list[bool]]:
        match reply:
            case [None | bytes() as born, *records] if len(records) == len(instance_ids):
                number = int(born) if born and born.isdigit() else 0
                return number, [record is not None and not _REMOVED.match(record) for record in records]
            case _:
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
    until_ms: int = 0,
) -> Command[int | TooLate | None]:
    """Change facts of an instance; None leaves them. Returns its load, or None when there is no such instance."""
    labels_arg = "-" if labels is None else packed_labels(labels) if labels else ""
    args: tuple[Arg, ...] = (
        encoded(instance_id),
        "-" if max_capacity is None else max_capacity,
        "-" if weight is None else _decimal(weight),
        labels_arg,
        on,
        off,
        until_ms,
    )

    def decode(reply: Reply) -> int | TooLate | None:
        match _opened(pool, reply):
            case Status.NOTHING, []:
                return None
            case Status.DONE, [int() as load]:
                return load
            case Status.TOO_LATE, [int() as now_ms]:
                return TooLate(now_ms)
            case status, values:
                _refuse(pool, status, values)

    return Command(UPDATE, pool.keys.core, args, decode)


def remove(pool: Pool, instance_id: str, until_ms: int = 0) -> Command[bool | TooLate]:
    """Take an instance out. Returns whether it was there."""

    def decode(reply: Reply) -> bool | TooLate:
        match _opened(pool, reply):
            case (Status.DONE | Status.NOTHING) as status, []:
                return status == Status.DONE
            case Status.TOO_LATE, [int() as now_ms]:
                return TooLate(now_ms)
            case status, values:
                _refuse(pool, status, values)

    return Command(REMOVE, pool.keys.all, (encoded(instance_id), until_ms), decode)


def heartbeat(pool: Pool, instance_ids: Iterable[str], silence_ms: int) -> Command[list[str]]:
    """Say that instances are alive. Returns those that are not registered."""

    def decode(reply: Reply) -> list[str]:
        match _opened(pool, reply):
            case Status.DONE, names:
                return [decoded(_text(pool, name)) for name in names]
            case status, values:
                _refuse(pool, status, values)

    return Command(HEARTBEAT, pool.keys.core, (silence_ms, *map(encoded, instance_ids)), decode)


def acquire(pool: Pool, token: str, ttl_ms: int, choice: Choice) -> Command[Granted | Refused | Spent]:
    """Pick an instance and lease one unit of it under a token."""
    chosen = choice.args()

    def decode(reply: Reply) -> Granted | Refused | Spent:
        match _opened(pool, reply):
            case Status.DONE, [bytes() as name, int() as expiry_ms, int() as fence, bytes() as record]:
                return Granted(facts_of(pool, name, record), expiry_ms, fence)
            case Status.NOTHING, [int() as retry_ms, int() as registered, int() as waiting]:
                return Refused(retry_ms / 1000, registered, waiting)
            case Status.SPENT, [bytes() as why]:
                return Spent(_text(pool, why))
            case status, values:
                _refuse(pool, status, values, choice.strategy)

    return Command(ACQUIRE, pool.keys.all, (token, ttl_ms, 0, *chosen), decode, resend_args=(token, ttl_ms, 1, *chosen))


def wait(
    pool: Pool, token: str, *, ttl_ms: int, live_ms: int, boost_ms: int, require: frozenset[str], place: str
) -> Command[Granted | Queued | Spent]:
    """Stand in line under a token, keep the place, or fetch what was handed over."""

    def decode(reply: Reply) -> Granted | Queued | Spent:
        match _opened(pool, reply):
            case Status.DONE, [bytes() as name, int() as expiry_ms, int() as fence, bytes() as record]:
                return Granted(facts_of(pool, name, record), expiry_ms, fence)
            case Status.NOTHING, [int() as ahead, int() as poll_ms, bytes() as place]:
                return Queued(ahead, poll_ms / 1000, _text(pool, place))
            case Status.SPENT, [bytes() as why]:
                return Spent(_text(pool, why))
            case status, values:
                _refuse(pool, status, values)

    return Command(WAIT, pool.keys.core, (token, ttl_ms, live_ms, boost_ms, packed_labels(require), place), decode)


def select(pool: Pool, choice: Choice) -> Command[AgentInstance | None]:
    """Look which instance a lease would be granted on now."""

    def decode(reply: Reply) -> AgentInstance | None:
        match _opened(pool, reply):
            case Status.NOTHING, []:
                return None
            case Status.DONE, [bytes() as name, bytes() as record]:
                return snapshot(facts_of(pool, name, record))
            case status, values:
                _refuse(pool, status, values, choice.strategy)

    return Command(SELECT, pool.keys.all, choice.args(), decode)


def release(
    pool: Pool,
    token: str,
    instance_id: str | None = None,
    *,
    outcome: Outcome = Outcome.NEUTRAL,
    response_time: float | None = None,
    bury_ms: int = 0,
) -> Command[bool]:
    """Give a lease back.

    Args:
        pool: its pool.
        token: its token.
        instance_id: its instance, when known: saves the server a look.
        outcome: how the work went.
        response_time: seconds it took, if measured.
        bury_ms: how long to refuse a copy of the acquire that may still be under way, 0 when there can be none.

    Returns:
        Whether this freed the unit.
    """
    response_us = -1 if response_time is None else round(response_time * 1e6)
    args: tuple[Arg, ...] = (
        token,
        "-" if instance_id is None else encoded(instance_id),
        _OUTCOME_LETTERS[outcome],
        response_us,
        bury_ms,
    )

    def decode(reply: Reply) -> bool:
        match _opened(pool, reply):
            case (Status.DONE | Status.NOTHING) as status, []:
                return status == Status.DONE
            case Status.SPENT, [bytes()]:
                return False
            case status, values:
                _refuse(pool, status, values)

    return Command(RELEASE, pool.keys.core, (*args, 0), decode, resend_args=(*args, 1))


def renew(pool: Pool, tokens: Iterable[str], ttl_ms: int) -> Command[frozenset[str]]:
    """Prolong leases, at most `MANY`. Returns the tokens that are lost."""

    def decode(reply: Reply) -> frozenset[str]:
        match _opened(pool, reply):
            case Status.DONE, lost:
                return frozenset(_text(pool, token) for token in lost)
            case status, values:
                _refuse(pool, status, values)

    return Command(RENEW, (pool.keys.due,), (ttl_ms, *tokens), decode)


def status(pool: Pool, first: int, count: int) -> Command[Page | None]:
    """Read one page of instances, from rank `first` on. None when there is no such pool."""

    def decode(reply: Reply) -> Page | None:
        match _opened(pool, reply):
            case Status.NOTHING, []:
                return None
            case (
                Status.DONE,
                [
                    bytes() as strategy,
                    int(),
                    int() as waiting,
                    int() as overdue,
                    int() as granted,
                    int() as rank,
                    *rest,
                ],
            ):
                pairs = zip(rest[::2], rest[1::2], strict=False)
                instances = tuple(instance_status(pool, name, record) for name, record in pairs)
                return Page(_strategy(pool, strategy), instances, waiting, overdue, granted, rank)
            case code, values:
                _refuse(pool, code, values)

    return Command(STATUS, (*pool.keys.core, pool.keys.ids), (first, count), decode)


def leases(pool: Pool, first: int, count: int) -> Command[LeasesPage | None]:
    """Read one page of leases and waiters. None when there is no such pool."""

    def decode(reply: Reply) -> LeasesPage | None:
        match _opened(pool, reply):
            case Status.NOTHING, []:
                return None
            case Status.DONE, [int() as now_ms, int() as next_rank, *rest]:
                found = [
                    _holder(pool, now_ms, *entry) for entry in zip(rest[::3], rest[1::3], rest[2::3], strict=False)
                ]
                return LeasesPage(
                    tuple(entry for entry in found if isinstance(entry, LeaseStatus)),
                    tuple(entry for entry in found if isinstance(entry, WaiterStatus)),
                    next_rank,
                )
            case code, values:
                _refuse(pool, code, values)

    return Command(LEASES, (pool.keys.state, pool.keys.due), (first, count), decode)


def repair(pool: Pool, first: int, count: int) -> Command[RepairedPage | None]:
    """Recompute the load of one page of instances. None when there is no such pool."""

    def decode(reply: Reply) -> RepairedPage | None:
        match _opened(pool, reply):
            case Status.NOTHING, []:
                return None
            case Status.DONE, [int() as next_rank, int() as wrong, int() as orphans, int() as registered]:
                return RepairedPage(wrong, orphans, registered, next_rank)
            case code, values:
                _refuse(pool, code, values)

    return Command(REPAIR, (*pool.keys.core, pool.keys.ids), (first, count), decode)


def _holder(pool: Pool, now_ms: int, token: Reply, record: Reply, due_ms: Reply) -> LeaseStatus | WaiterStatus | None:
    """Decode a lease, a grant not fetched yet or a place in line; None for what ended meanwhile."""
    name, ends = _text(pool, token), _text(pool, due_ms)
    process = name.removeprefix("@").rpartition(":")[0]
    try:
        left = (float(ends) - now_ms) / 1000
        match _text(pool, record).split(" "):
            case ["L" | "G" as kind, instance, fence, _]:
                return LeaseStatus(
                    token=name,
                    instance_id=decoded(instance),
                    process=process,
                    fence=int(fence),
                    held_for=max(0.0, now_ms / 1000 - int(fence) / 1e6),
                    expires_in=left,
                    fetched=kind == "L",
                )
            case ["W", place, _, labels]:
                waited = max(0.0, now_ms / 1000 - int(place) / 1e6)
                return WaiterStatus(name, process, waited, _labels(labels))
            case _:
                return None
    except ValueError:
        raise CorruptState(pool.keys.state, f"the lease record {shown(record)}") from None


def _labels(text: str) -> frozenset[str]:
    return _NO_LABELS if text == "-" else frozenset(map(decoded, text.split(",")))


def facts_of(pool: Pool, name: Reply, record: Reply) -> Facts:
    """Decode an instance record; its fields are in the legend of pool.lua."""
    try:
        fields = record.split(b" ")
        load, _lim, _seq, _fence, _peak, weight, labels, flags, cap, ewma_us = fields[:10]
        if len(fields) < _RECORD_FIELDS:
            raise ValueError(len(fields))
        return (
            decoded(name.decode()),
            pool.agent_type,
            int(load),
            int(cap),
            float(weight),
            b"u" not in flags and b"s" not in flags,
            int(ewma_us) / 1000,
            _NO_LABELS if labels == b"-" else _labels(labels.decode()),
            b"d" in flags,
        )
    except (AttributeError, TypeError, ValueError):
        raise CorruptState(pool.keys.state, f"the instance record {shown(record)}") from None


def instance_status(pool: Pool, name: Reply, record: Reply) -> InstanceStatus:
    """Decode an instance record with what was counted."""
    instance = snapshot(facts_of(pool, name, record))
    fields = record.split(b" ")
    try:
        fence, peak = map(int, fields[3:5])
        served, failed, fails = map(int, fields[11:_RECORD_FIELDS])
    except ValueError:
        raise CorruptState(pool.keys.state, f"the instance record {shown(record)}") from None
    return InstanceStatus(instance, peak, served, failed, fails, fence)


def _opened(pool: Pool, reply: Reply) -> tuple[int, list[Reply]]:
    """Part a reply into its status and the rest."""
    if isinstance(reply, int):
        return reply, []
    if isinstance(reply, list) and reply and isinstance(reply[0], int):
        return reply[0], reply[1:]
    raise CorruptState(pool.keys.state, f"an unexpected reply {shown(reply)}")


def _refuse(pool: Pool, status: int, values: list[Reply], wanted: LoadBalancingStrategy | None = None) -> NoReturn:
    """Raise what a status other than the good ones means."""
    said = values[0].decode(errors="replace") if values and isinstance(values[0], bytes) else ""
    if status == Status.OTHER_STRATEGY and wanted is not None:
        raise InvalidArgument(
            "strategy",
            wanted.value,
            f"{said!r}, by which pool {pool.agent_type!r} was registered, or None to take the pool's own; to change "
            "it, remove all its instances and register them with the new one",
        )
    if status == Status.OTHER_SCHEMA:
        raise SchemaMismatch(pool.keys.state, said.partition(" ")[0], SCHEMA)
    if status == Status.CORRUPT:
        raise CorruptState(pool.keys.state, f"something that was not written by us in the field {shown(said)}")
    raise CorruptState(pool.keys.state, f"an unexpected reply {status} {shown(values)}")


def _text(pool: Pool, value: Reply) -> str:
    if not isinstance(value, bytes):
        raise CorruptState(pool.keys.state, f"{shown(value)} where a text belongs")
    return value.decode(errors="replace")


def _strategy(pool: Pool, value: Reply) -> LoadBalancingStrategy:
    text = _text(pool, value)
    try:
        return LoadBalancingStrategy(text)
    except ValueError:
        raise CorruptState(pool.keys.state, f"the strategy {shown(text)}") from None


def _decimal(value: float) -> str:
    """Return a weight as the scripts and people read it: no exponent, no more digits than a score has."""
    text = f"{value:.9f}".rstrip("0").rstrip(".")
    return text if math.isfinite(value) else "0"
