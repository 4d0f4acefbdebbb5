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
"""Max weight of an instance. Under WEIGHTED, its score is at most weight * 10^9, which must stay below 2^53."""
MAX_LABELS = 16
"""Max labels of an instance. There is one index per label, and every pick of the instance must update all of them."""
MIN_TTL_S, MAX_TTL_S = 0.05, 86_400.0
"""Min and max TTL of a lease, s. MAX_TTL_MS in maintenance.lua is the same maximum."""
MAX_REST_S = 86_400.0
"""Max rest of an instance after a rate limit, s. The longest period for which providers limit requests is a day."""

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
    """How a pool picks among its instances with free capacity. The first registration fixes the strategy of a pool.

    To add a strategy:

    - Add a member here.
    - Add a row to `rules` in `lua/balancer/includes/strategies.lua`. If the row has a new value, add the code for it: a
      score in pool.lua, a pick in pick.lua, an order for waiters in maintenance.lua, a response in smoothing.lua.
    - Add a line to the README's table of strategies.
    - Test the distribution of its picks in `tests/integration/balancer/test_distribution.py`. All other tests run for
      every member.
    """

    ROUND_ROBIN = "round_robin"
    """The instance whose last pick was longest ago."""
    LEAST_LOADED = "least_loaded"
    """The instance with the lowest load relative to capacity; among equals, the one picked longest ago."""
    WEIGHTED = "weighted"
    """At random, in proportion to weight times free share of capacity."""
    RANDOM = "random"
    """At random, all equally likely."""
    POWER_OF_TWO = "power_of_two"
    """The less loaded of two random instances."""
    PEAK_EWMA = "peak_ewma"
    """Of two random instances, the one with the lower product of latency and pending work."""
    CONSISTENT_HASH = "consistent_hash"
    """The first instance, clockwise from the affinity on a hash ring, whose load is at most 1.25 times its share."""


class Outcome(Enum):
    """The result of the work on a lease."""

    OK = "ok"
    ERROR = "error"
    TIMEOUT = "timeout"
    REJECTED = "rejected"
    """The instance refused the work."""
    RATE_LIMITED = "rate_limited"
    """The instance refused the work because of its own rate limit (HTTP status 429). The instance rests: it gets no
    work until the time that it named is over. The outcome counts as failed in the statistics, but not as a bad outcome
    in a row. It ejects nothing, and changes neither an adaptive limit nor the response time."""
    NEUTRAL = "neutral"
    """The result says nothing about the instance: the work was cancelled, or the caller was at fault."""


class InstanceState(Enum):
    """Whether an instance takes work, and if not, why.

    An instance is UP when no other state applies. When several other states apply, the one that comes first below is
    reported. Apart from UP, the values are flags of the instance's record, see pool.lua.
    """

    UP = "up"
    """The instance takes work."""
    DRAINING = "draining"
    """Marked by hand: it finishes its leases and takes no new ones."""
    UNHEALTHY = "unhealthy"
    """Marked by hand."""
    HEARTBEAT_MISSED = "heartbeat_missed"
    """Its heartbeat did not arrive in time."""
    DOWN = "down"
    """It fails its active checks."""
    EJECTED = "ejected"
    """Its outcomes were bad; it takes no work for a limited time."""
    RESTING = "resting"
    """It refused work because of its own rate limit, or was cooled down: it takes no work for a limited time."""
    HALF_OPEN = "half_open"
    """An ejection has ended: the instance takes one lease at a time, until the work on one of them succeeds."""
    RATE_LIMITED = "rate_limited"
    """Its limit of requests or tokens per minute is used up for now."""
    WARMING = "warming"
    """It is new or has recovered: its usable capacity still grows (slow start)."""


class AttachedLease(Protocol):
    """The interface of `Lease`. Declared here because `AgentInstance` and `Lease` refer to each other."""

    agent_type: str
    token: str
    fence: int
    ttl: float
    tokens: int
    tokens_used: int | None
    retry_after: float | None

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
        """Whether the lease is neither released nor lost, as far as this process knows."""

    @property
    def lost(self) -> LeaseLost | None:
        """The error that says why the lease is lost, or None."""

    @property
    def remaining(self) -> float:
        """Seconds for which the lease is valid without another renewal; 0.0 when it has ended."""

    def check(self) -> None:
        """Raise LeaseLost if this process knows that the lease is lost."""

    def extend(self, ttl: float) -> None:
        """Give the lease another TTL, which begins now."""

    async def aextend(self, ttl: float) -> None:
        """Like `extend`, without blocking the event loop."""


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
    """An immutable snapshot of one instance of an agent: its registered fields, and its measurements at one time.

    Args:
        id: the instance's name, unique within its agent type.
        agent_type: the pool of the instance.
        current_load: number of leases at the time of the snapshot. Ignored by `register_instance`, because the server
            computes the load from leases.
        max_capacity: max concurrent leases, at least 1.
        weight: relative share of the picks under WEIGHTED, 0 to 10^6.
        is_healthy: whether the instance takes work.
        response_time_ms: smoothed response time, ms.
        labels: capabilities of the instance, at most 16 names.
        is_draining: whether the instance finishes its leases and takes no new ones.
        lease: the lease that `acquire` granted; copies of the instance also carry it (see `Lease`). None in other
            snapshots.
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
        """Number of leases that the instance could still take."""
        return max(0, self.max_capacity - self.current_load)


_Fields.__init__.__qualname__ = "AgentInstance.__init__"  # Python's errors for missing arguments show this name
_SET_FIELDS = tuple(getattr(_Fields, each.name).__set__ for each in fields(_Fields))


Facts: TypeAlias = tuple[str, str, int, int, float, bool, float, frozenset[str], bool]
"""All fields of an AgentInstance except `lease`, in the order of its arguments."""


def snapshot(facts: Facts, lease: AttachedLease | None = None) -> AgentInstance:
    """Return an instance with these fields. Skips the checks for speed: every acquire calls this with server data."""
    instance = object.__new__(AgentInstance)
    for set_field, value in zip(_SET_FIELDS, (*facts, lease), strict=True):
        set_field(instance, value)
    return instance


def checked_labels(argument: str, value: object) -> frozenset[str]:
    """Check that labels are a collection of at most 16 names, and return them."""
    labels = frozenset(arguments.names(argument, value))
    arguments.count(f"number of {argument}", len(labels), minimum=0, maximum=MAX_LABELS)
    return labels


def checked_rest(argument: str, value: object, *, minimum: float = 0.001) -> float:
    """Check the length of a rest of an instance, s."""
    return arguments.seconds(argument, value, minimum=minimum, maximum=MAX_REST_S)


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """The status of an instance, and its counters since its registration.

    Attributes:
        instance: snapshot of the instance.
        peak_load: highest load so far, as recorded by the scripts that grant leases.
        served: number of leases released with the outcome ok.
        failed: number of leases released with a bad outcome, or with the outcome rate_limited.
        failed_in_a_row: number of bad outcomes since the last good outcome. Slow outcomes count as bad.
        fence: the last fencing token of the instance.
        state: whether the instance takes work, and if not, why.
        limit: max leases at present. It may be lower than max_capacity, and is 0 while the instance takes no work.
        ejections: number of ejections in a row.
        ejected_for: seconds until the ejection ends, 0.0 when the instance is not ejected.
        resting_for: seconds until the rest ends, 0.0 when the instance does not rest.
        requests_per_minute: max requests per minute; math.inf for no limit.
        tokens_per_minute: max tokens per minute; math.inf for no limit.
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
    resting_for: float = field(default=0.0, kw_only=True)
    requests_per_minute: float = math.inf
    tokens_per_minute: float = math.inf


@dataclass(frozen=True, slots=True)
class LeaseStatus:
    """A snapshot of a lease.

    Attributes:
        token: identifies the lease on the server.
        instance_id: the leased instance.
        process: the process that holds the lease, "host:pid:random".
        fence: fencing token of the lease.
        held_for: seconds since the lease was granted, by the server's clock.
        expires_in: seconds until the lease expires unless it is renewed; negative when it has expired but is not
            deleted yet.
        fetched: False while the lease is a grant that its waiter has not fetched yet.
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
        token: identifies the waiter on the server.
        process: the process of the waiter, "host:pid:random".
        waited: seconds in the queue, plus the waiter's priority in seconds.
        require: labels that the waiter requires of an instance.
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
    """Marked by hand. This also ends an ejection or half-open state, and clears failed checks."""
    HEARTBEAT_MISSED = "heartbeat_missed"
    """A heartbeat did not arrive in time."""
    HEARTBEAT_RESUMED = "heartbeat_resumed"
    """A heartbeat arrived again."""
    DOWN = "down"
    """Active checks failed."""
    UP = "up"
    """Active checks passed again."""
    EJECTED = "ejected"
    """The instance was ejected because of its outcomes."""
    HALF_OPEN = "half_open"
    """The ejection is over; the instance gets one lease at a time."""
    RESTING = "resting"
    """The instance refused work because of its own rate limit, or was cooled down. If its rest is prolonged, there is
    no further event."""
    RESTED = "rested"
    """The rest is over."""
    RECOVERED = "recovered"
    """A probe after an ejection succeeded."""
    WARM = "warm"
    """The slow start is over; the instance has its full capacity."""
    PANIC = "panic"
    """Too many instances are unhealthy, so unhealthy instances get work too."""
    CALM = "calm"
    """The panic is over: unhealthy instances get no work."""
    EXPIRED = "expired"
    """A lease expired because it was neither renewed nor released, or a grant expired because no waiter fetched it."""
    RELEASED = "released"
    """An operator ended a lease of another process."""


@dataclass(frozen=True, slots=True)
class PoolEvent:
    """An event in a pool.

    Attributes:
        agent_type: the pool.
        kind: the kind of event.
        instance_id: the instance concerned; None when the event concerns the whole pool.
        at: time of the event, seconds since the epoch, by the server's clock.
        cursor: identifies the event; `events(..., after=cursor)` returns later events.
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
        instances: number of instances checked.
        wrong: number of instances whose load differed from the number of their leases.
        orphans: number of leases and queue entries deleted because they had no timer and would never have ended.
    """

    instances: int
    wrong: int
    orphans: int


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """A snapshot of a pool.

    Attributes:
        agent_type: the name of the pool.
        strategy: how the pool picks an instance.
        instances: the instances, shard by shard; within a shard, in the order of their registration.
        waiting: number of callers in the queue.
        granted: number of leases granted so far.
        overdue: number of expired leases that no script has ended yet. Only the first 5000 due timers are counted.
        panic_for: seconds since the start of the panic; None when there is no panic.
        settings: the settings of the pool; None if they are missing on the server.
        shards: number of shards of the pool.
    """

    agent_type: str
    strategy: LoadBalancingStrategy
    instances: tuple[InstanceStatus, ...]
    waiting: int
    granted: int
    overdue: int
    panic_for: float | None = None
    settings: PoolSettings | None = None
    shards: int = 1

    @property
    def healthy(self) -> int:
        """Number of healthy instances."""
        return sum(1 for status in self.instances if status.instance.is_healthy)

    @property
    def total_capacity(self) -> int:
        """Sum of the capacities of all instances."""
        return sum(status.instance.max_capacity for status in self.instances)

    @property
    def current_load(self) -> int:
        """Number of leases on all instances."""
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
