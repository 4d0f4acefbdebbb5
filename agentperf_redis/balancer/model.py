"""The balancer's data model: strategies, instances, outcomes of leases, and snapshots of pools. No I/O."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import FrozenInstanceError, dataclass, field, fields
from enum import Enum
from typing import Any, NoReturn, Protocol, TypeAlias

from agentperf_redis import arguments
from agentperf_redis.balancer.settings import PoolSettings
from agentperf_redis.errors import LeaseLost

MAX_WEIGHT = 1e6
"""A score is weight * 10^9 and must stay below 2^53."""
MAX_LABELS = 16
"""Each label of an instance adds an index to write on each pick."""

_CHANGED_THROUGH = {
    "max_capacity": "lb.update_instance(agent_type, id, max_capacity=...)",
    "weight": "lb.update_instance(agent_type, id, weight=...)",
    "labels": "lb.update_instance(agent_type, id, labels=...)",
    "is_healthy": "lb.mark_healthy(agent_type, id) or lb.mark_unhealthy(agent_type, id)",
    "is_draining": "lb.drain(agent_type, id) or lb.undrain(agent_type, id)",
    "current_load": "lb.acquire(agent_type) and lb.release(instance)",
    "response_time_ms": "lb.release(instance, response_time=seconds)",
}


class LoadBalancingStrategy(Enum):
    """How a pool picks among its instances with free capacity. The first registration fixes it for the pool.

    To add a strategy: a member here; a row of `rules` in `lua/balancer/includes/strategies.lua`, and code for a value
    in that row that no other strategy has (a score in pool.lua, a pick in pick.lua, an order for waiters in
    maintenance.lua, a response in release.lua); a line in the README's table of strategies; and its distribution in
    `tests/integration/test_balancer_distribution.py`. All other tests run for every member.
    """

    ROUND_ROBIN = "round_robin"
    """The instance whose last pick was longest ago."""
    LEAST_LOADED = "least_loaded"
    """The lowest load relative to capacity; among equals, the instance whose last pick was longest ago."""
    WEIGHTED = "weighted"
    """At random, in proportion to weight times free share of capacity."""
    RANDOM = "random"
    """At random, all equally likely."""
    POWER_OF_TWO = "power_of_two"
    """The less loaded of two random instances."""
    PEAK_EWMA = "peak_ewma"
    """Of two random instances, the one with the lower product of latency and pending work."""
    CONSISTENT_HASH = "consistent_hash"
    """By affinity on a ring, while the instance has at most 1.25 times its share of the load."""


class Outcome(Enum):
    """The result of the work on a lease."""

    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    REJECTED = "rejected"
    """The instance refused the work, for example because of its own rate limit."""
    NEUTRAL = "neutral"
    """Says nothing about the instance: a cancellation, a fault of the caller."""


class InstanceState(Enum):
    """Whether an instance takes work, and if not, why. When several apply, the first one after UP is reported.

    Apart from UP, the values are flags of the instance's record; see pool.lua.
    """

    UP = "up"
    """It takes work."""
    DRAINING = "draining"
    """Marked by hand: it finishes its leases and takes no new ones."""
    UNHEALTHY = "unhealthy"
    """Marked by hand."""
    HEARTBEAT_MISSED = "heartbeat_missed"
    """Its heartbeat did not arrive in time."""
    DOWN = "down"
    """It fails its active checks."""
    EJECTED = "ejected"
    """Because of its outcomes, for a limited time."""
    HALF_OPEN = "half_open"
    """After an ejection, it takes one lease at a time until one succeeds."""
    RATE_LIMITED = "rate_limited"
    """Its requests or tokens a minute are used up for now."""
    WARMING = "warming"
    """New or returned: its capacity is growing."""


class AttachedLease(Protocol):
    """The interface of `Lease`, which an instance carries. Declared here because the two refer to each other."""

    agent_type: str
    token: str
    fence: int
    ttl: float
    tokens: int
    tokens_used: int | None

    @property
    def instance(self) -> AgentInstance:
        """The instance as it was when the lease was granted, carrying this lease."""

    @property
    def outcome(self) -> Outcome | str | None:
        """The result of the work."""

    @outcome.setter
    def outcome(self, value: Outcome | str | None) -> None: ...

    @property
    def instance_id(self) -> str:
        """Name of the instance."""

    @property
    def held(self) -> bool:
        """Whether it is neither released nor lost, as far as this process knows."""

    @property
    def lost(self) -> LeaseLost | None:
        """Why it is lost, or None."""

    @property
    def remaining(self) -> float:
        """Seconds for which it is valid without another renewal; 0.0 when it has ended."""

    def check(self) -> None:
        """Raise LeaseLost unless it is still held."""


@dataclass(frozen=True, slots=True)
class _Fields:
    id: str
    agent_type: str
    current_load: int = 0
    max_capacity: int = 10
    weight: float = 1.0
    is_healthy: bool = True
    response_time_ms: float = 0.0
    labels: frozenset[str] = field(default=frozenset(), kw_only=True)
    is_draining: bool = field(default=False, kw_only=True)
    lease: AttachedLease | None = field(default=None, kw_only=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        arguments.name("id", self.id)
        arguments.name("agent_type", self.agent_type)
        arguments.count("current_load", self.current_load, minimum=0)
        arguments.count("max_capacity", self.max_capacity)
        object.__setattr__(self, "weight", arguments.amount("weight", self.weight, maximum=MAX_WEIGHT))
        arguments.flag("is_healthy", self.is_healthy)
        arguments.amount("response_time_ms", self.response_time_ms)
        arguments.flag("is_draining", self.is_draining)
        object.__setattr__(self, "labels", checked_labels("labels", self.labels))


class AgentInstance(_Fields):
    """One instance of an agent: its registered fields and its measurements at one time. An immutable snapshot.

    Args:
        id: its name, unique among its agent type.
        agent_type: the pool it belongs to.
        current_load: leases on it at the time of the snapshot. Ignored when registering: load follows from leases.
        max_capacity: max concurrent leases, at least 1.
        weight: its share under WEIGHTED, 0 to 10^6.
        is_healthy: whether it takes work.
        response_time_ms: smoothed response time, ms.
        labels: capabilities, at most 16 names.
        is_draining: whether it only finishes its current work.
        lease: the lease from `acquire`; None in all other snapshots.
    """

    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> NoReturn:
        if name not in _Fields.__slots__:
            raise AttributeError(f"an AgentInstance has no field {name!r}")
        how = _CHANGED_THROUGH.get(name, "lb.register_instance(...)")
        raise FrozenInstanceError(f"an AgentInstance is a snapshot; to change {name} for all processes use {how}")

    @property
    def load_percentage(self) -> float:
        """Load in percent of capacity."""
        return (self.current_load / self.max_capacity) * 100 if self.max_capacity > 0 else 0

    @property
    def available_capacity(self) -> int:
        """Leases it could still take."""
        return max(0, self.max_capacity - self.current_load)


_Fields.__init__.__qualname__ = "AgentInstance.__init__"  # the name in Python's errors for missing arguments
_SET_FIELDS = tuple(getattr(_Fields, each.name).__set__ for each in fields(_Fields))


Facts: TypeAlias = tuple[str, str, int, int, float, bool, float, frozenset[str], bool]
"""The fields of an instance in their order, except its lease."""


def snapshot(facts: Facts, lease: AttachedLease | None = None) -> AgentInstance:
    """Return an instance from its fields, unchecked: they come from the server, on every acquire."""
    instance = object.__new__(AgentInstance)
    for set_field, value in zip(_SET_FIELDS, (*facts, lease), strict=True):
        set_field(instance, value)
    return instance


def checked_labels(argument: str, value: object) -> frozenset[str]:
    """Check labels: a collection of at most 16 names."""
    labels = frozenset(arguments.names(argument, value))
    arguments.count(f"number of {argument}", len(labels), minimum=0, maximum=MAX_LABELS)
    return labels


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """An instance and its counters since it was registered.

    Attributes:
        instance: its snapshot.
        peak_load: its highest load so far, as recorded by the script that grants leases.
        served: leases released with the outcome ok.
        failed: leases released with a bad outcome.
        failed_in_a_row: bad outcomes since the last good one, slow ones included.
        fence: its last fencing token.
        state: whether it takes work, and if not, why.
        limit: max leases at this time: below its capacity while it is limited, 0 while it takes no work.
        ejections: number of ejections in a row.
        ejected_for: seconds until its ejection ends, 0.0 when it is not ejected.
        requests_per_minute: its limit; math.inf for none.
        tokens_per_minute: its limit; math.inf for none.
    """

    instance: AgentInstance
    peak_load: int
    served: int
    failed: int
    failed_in_a_row: int
    fence: int
    state: InstanceState = InstanceState.UP
    limit: int = 0
    ejections: int = 0
    ejected_for: float = 0.0
    requests_per_minute: float = math.inf
    tokens_per_minute: float = math.inf


@dataclass(frozen=True, slots=True)
class LeaseStatus:
    """A snapshot of a lease.

    Attributes:
        token: its token.
        instance_id: its instance.
        process: its holder, "host:pid:random".
        fence: its fencing token.
        held_for: seconds since it was granted, by the server's clock.
        expires_in: seconds until it expires without renewal; negative when it has expired and is not deleted yet.
        fetched: False while a waiter has not fetched its grant yet.
    """

    token: str
    instance_id: str
    process: str
    fence: int
    held_for: float
    expires_in: float
    fetched: bool


@dataclass(frozen=True, slots=True)
class WaiterStatus:
    """A snapshot of a waiter in the queue.

    Attributes:
        token: its token.
        process: its process, "host:pid:random".
        waited: seconds in the queue, plus the seconds of its priority.
        require: labels the instance must have.
    """

    token: str
    process: str
    waited: float
    require: frozenset[str]


@dataclass(frozen=True, slots=True)
class PoolLeases:
    """Leases and waiters of a pool.

    Attributes:
        agent_type: the pool.
        leases: in order of expiry.
        waiters: in queue order.
    """

    agent_type: str
    leases: tuple[LeaseStatus, ...]
    waiters: tuple[WaiterStatus, ...]


class EventKind(Enum):
    """The kind of an event in a pool."""

    REGISTERED = "registered"
    REMOVED = "removed"
    DRAINING = "draining"
    UNDRAINED = "undrained"
    UNHEALTHY = "unhealthy"
    """Marked by hand."""
    HEALTHY = "healthy"
    """Marked by hand, which also ends an ejection, a half-open state and the effect of failed checks."""
    HEARTBEAT_MISSED = "heartbeat_missed"
    """A heartbeat did not arrive in time."""
    HEARTBEAT_RESUMED = "heartbeat_resumed"
    """A heartbeat arrived again."""
    DOWN = "down"
    """Active checks failed."""
    UP = "up"
    """Active checks passed again."""
    EJECTED = "ejected"
    """Because of its outcomes."""
    HALF_OPEN = "half_open"
    """The ejection is over; one lease at a time is granted."""
    RECOVERED = "recovered"
    """The probe succeeded."""
    WARM = "warm"
    """It has its full capacity."""
    PANIC = "panic"
    """So many instances are unhealthy that these get work too."""
    CALM = "calm"
    """The panic is over: unhealthy instances get no work."""
    EXPIRED = "expired"
    """A lease ended that was neither renewed nor released, or a grant that was not fetched."""
    RELEASED = "released"
    """An operator ended a lease of another process."""


@dataclass(frozen=True, slots=True)
class PoolEvent:
    """An event in a pool.

    Attributes:
        agent_type: the pool.
        kind: its kind.
        instance_id: its instance; None when it concerns the whole pool.
        at: its time, seconds since the epoch, by the server's clock.
        cursor: its identifier: `events(..., after=cursor)` returns later events.
        details: further values by name; times in ms.
    """

    agent_type: str
    kind: EventKind
    instance_id: str | None
    at: float
    cursor: str
    details: dict[str, str]


@dataclass(frozen=True, slots=True)
class Repaired:
    """The result of a repair.

    Attributes:
        instances: instances repaired or found correct.
        wrong: instances whose load was not the number of their leases.
        orphans: leases and queue entries deleted because nothing would ever have ended them.
    """

    instances: int
    wrong: int
    orphans: int


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """A snapshot of a pool.

    Attributes:
        agent_type: its name.
        strategy: how it picks.
        instances: in the order of their registration.
        waiting: callers in the queue.
        granted: leases granted so far.
        overdue: leases that have expired but are not ended yet, among the first 5000 due entries.
        panic_for: seconds since the start of the panic; None when there is none.
        settings: its settings; None when the pool lost them.
    """

    agent_type: str
    strategy: LoadBalancingStrategy
    instances: tuple[InstanceStatus, ...]
    waiting: int
    granted: int
    overdue: int
    panic_for: float | None = None
    settings: PoolSettings | None = None

    @property
    def healthy(self) -> int:
        """Instances that are healthy."""
        return sum(1 for status in self.instances if status.instance.is_healthy)

    @property
    def total_capacity(self) -> int:
        """Sum of the capacities."""
        return sum(status.instance.max_capacity for status in self.instances)

    @property
    def current_load(self) -> int:
        """Leases on all instances."""
        return sum(status.instance.current_load for status in self.instances)

    def render(self) -> dict[str, Any]:
        """Return the pool in the format of `LoadBalancer.get_status`."""
        capacity, load = self.total_capacity, self.current_load
        return {
            "instances": len(self.instances),
            "healthy": self.healthy,
            "total_capacity": capacity,
            "current_load": load,
            "load_percentage": f"{(load / capacity * 100):.1f}%" if capacity > 0 else "0%",
            "instances_detail": [_detail(status.instance) for status in self.instances],
        }


def _detail(instance: AgentInstance) -> dict[str, Any]:
    return {
        "id": instance.id,
        "load": f"{instance.current_load}/{instance.max_capacity}",
        "load_pct": f"{instance.load_percentage:.1f}%",
        "healthy": instance.is_healthy,
    }


def rendered(pools: Iterable[PoolStatus]) -> dict[str, Any]:
    """Return pools in the format of `LoadBalancer.get_status`."""
    return {pool.agent_type: pool.render() for pool in pools}
