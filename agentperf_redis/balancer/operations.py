"""The balancer's operations: they check their arguments before anything is sent, and return flows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from operator import is_
from typing import Literal, TypeVar, cast

from agentperf_redis import arguments
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import commands, history
from agentperf_redis.balancer.commands import Choice, Pool, Rates
from agentperf_redis.balancer.flows import acquiring, acquiring_many, blocks, instances, releasing, selecting
from agentperf_redis.balancer.flows.acquiring import DEFAULT_MAX_HOLD_S, DEFAULT_TTL_S, LeaseRequest
from agentperf_redis.balancer.flows.queue import Queues
from agentperf_redis.balancer.health_checks import Checking
from agentperf_redis.balancer.history import PoolSeriesRow
from agentperf_redis.balancer.lease import Lease
from agentperf_redis.balancer.lease_keeper import LeaseKeeper
from agentperf_redis.balancer.model import (
    MAX_TTL_S,
    MAX_WEIGHT,
    MIN_TTL_S,
    AgentInstance,
    AttachedLease,
    LoadBalancingStrategy,
    Outcome,
    PoolEvent,
    PoolLeases,
    PoolStatus,
    Repaired,
    checked_labels,
    checked_rest,
)
from agentperf_redis.balancer.registrations import Registered, Registrations
from agentperf_redis.balancer.server_clock import ServerClock, clock_of
from agentperf_redis.balancer.settings import PoolSettings
from agentperf_redis.command import Flow
from agentperf_redis.errors import BackendUnavailable, InvalidArgument, LeaseLost, NoCapacity
from agentperf_redis.windows import Timestamp, Window

T = TypeVar("T")


OnLost = Callable[[LeaseLost], None]

MAX_PRIORITY = 1_000_000
_CURSOR = re.compile(r"\d{1,20}-\d{1,20}")

NO_WAIT = 0.0
_DEFAULT_ARGUMENTS = (NO_WAIT, 0, (), None, DEFAULT_TTL_S, DEFAULT_MAX_HOLD_S, None, 0, ())
BETTER = "unhealthy,heartbeat_missed,down,ejected,half_open,warming,resting"
"""The flags that `mark_healthy` clears."""
MAX_EVENTS = 1000
_MIN_RATE, _MAX_RATE = 0.001, 1e9
_CHECK_TIMEOUT_S = 2.0
_AWAY_RETRY_S = 1.0
"""`retry_after` of NoCapacity while the server is unreachable."""

OnUnavailable = Literal["raise", "none"]


@dataclass(frozen=True, slots=True)
class Operations:
    """The operations of a balancer, shared by its blocking and asyncio APIs.

    Attributes:
        backend: the server and namespace.
        keeper: renews this process's leases on the backend.
        queues: this process's waiters on the backend.
        wanted: the strategy that pools must have; None accepts any strategy.
        settings: settings for the pools in which this balancer registers instances; None leaves them unchanged.
        on_unavailable: what calls do while the server is unreachable.
    """

    backend: Backend
    keeper: LeaseKeeper
    queues: Queues
    wanted: LoadBalancingStrategy | None
    settings: PoolSettings | None
    on_unavailable: OnUnavailable
    plain: LeaseRequest = field(init=False)
    """The lease request of a call with default arguments."""
    clock: ServerClock = field(init=False)
    registrations: Registrations = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "plain", LeaseRequest(Choice(self.wanted)))
        object.__setattr__(self, "clock", clock_of(self.backend))
        object.__setattr__(self, "registrations", self.keeper.registrations)

    def pool(self, agent_type: str) -> Pool:
        """Check the agent type and return its pool."""
        return Pool.of(self.backend.namespace, arguments.name("agent_type", agent_type))

    def request(
        self,
        wait: float,
        priority: int,
        require: Collection[str],
        affinity: str | None,
        ttl: float,
        max_hold: float,
        on_lost: OnLost | None,
        tokens: int,
        fallback: Collection[str],
    ) -> LeaseRequest:
        """Check the arguments of `acquire` and `lease` and return them as a request."""
        given = (wait, priority, require, affinity, ttl, max_hold, on_lost, tokens, fallback)
        if all(map(is_, given, _DEFAULT_ARGUMENTS)):  # the usual call, which needs no check
            return self.plain
        if on_lost is not None:
            arguments.callback("on_lost", on_lost, "a function that takes a LeaseLost, or None")
        return LeaseRequest(
            self.choice(require, affinity),
            arguments.seconds("wait", wait, minimum=0.0, endless=True),
            arguments.count("priority", priority, minimum=-MAX_PRIORITY, maximum=MAX_PRIORITY),
            arguments.seconds("ttl", ttl, minimum=MIN_TTL_S, maximum=MAX_TTL_S),
            arguments.seconds("max_hold", max_hold, endless=True),
            on_lost,
            arguments.count("tokens", tokens, minimum=0),
            tuple(Pool.of(self.backend.namespace, name) for name in arguments.names("fallback", fallback)),
        )

    def choice(self, require: Collection[str], affinity: str | None) -> Choice:
        """Check the labels and the affinity of a call. Return them with the balancer's strategy as a Choice."""
        labels = frozenset[str]() if type(require) is tuple and not require else checked_labels("require", require)
        return Choice(self.wanted, labels, None if affinity is None else arguments.cache_key("affinity", affinity))

    def register(
        self,
        instance: AgentInstance,
        heartbeat_ttl: float | None,
        requests_per_minute: float,
        tokens_per_minute: float,
        shards: int | None = None,
    ) -> Flow[LoadBalancingStrategy]:
        """See `LoadBalancer.register_instance`."""
        if not isinstance(instance, AgentInstance):
            raise InvalidArgument("instance", instance, "an AgentInstance")
        heartbeat_ttl_ms = 0 if heartbeat_ttl is None else _milliseconds("heartbeat_ttl", heartbeat_ttl)
        rates = Rates(_rate("requests_per_minute", requests_per_minute), _rate("tokens_per_minute", tokens_per_minute))
        wanted = Registered(instance, self.wanted, heartbeat_ttl_ms, rates, self.settings, 0)
        number = None if shards is None else _shards(shards)
        return instances.register(self.backend, self.registrations, wanted, number)

    def configure_pool(self, agent_type: str, shards: int) -> Flow[None]:
        """See `LoadBalancer.configure_pool`."""
        pool, number = self.pool(agent_type), _shards(shards)
        return instances.divide(self.backend, self.clock, self.registrations, pool, number, self.wanted, self.settings)

    def update(
        self,
        agent_type: str,
        instance_id: str,
        max_capacity: int | None,
        weight: float | None,
        labels: Collection[str] | None,
        rates: tuple[float | None, float | None],
    ) -> Flow[bool]:
        """See `LoadBalancer.update_instance`."""
        return instances.update(
            self.clock,
            self.registrations,
            self.pool(agent_type),
            arguments.name("instance_id", instance_id),
            max_capacity=None if max_capacity is None else arguments.count("max_capacity", max_capacity),
            weight=None if weight is None else arguments.amount("weight", weight, maximum=MAX_WEIGHT),
            labels=None if labels is None else checked_labels("labels", labels),
            requests_per_minute=None if rates[0] is None else _rate("requests_per_minute", rates[0]),
            tokens_per_minute=None if rates[1] is None else _rate("tokens_per_minute", rates[1]),
        )

    def configure(self, agent_type: str, settings: PoolSettings) -> Flow[None]:
        """See `LoadBalancer.configure`."""
        if not isinstance(settings, PoolSettings):
            raise InvalidArgument("settings", settings, "a PoolSettings")
        return instances.configure(self.backend, self.registrations, self.pool(agent_type), settings)

    def checking(
        self, agent_type: str, check: Callable[[AgentInstance], object], interval: float, timeout: float | None
    ) -> Checking:
        """See `LoadBalancer.run_checks`."""
        if not callable(check):
            raise InvalidArgument("check", check, "a function that takes an AgentInstance")
        if arguments.is_generator_function(check):
            raise InvalidArgument("check", check, "a function or coroutine function, not a generator function")
        seconds = arguments.seconds("interval", interval, minimum=MIN_TTL_S, maximum=MAX_TTL_S)
        if timeout is None:
            limit = min(_CHECK_TIMEOUT_S, seconds)
        else:
            limit = arguments.seconds("timeout", timeout, minimum=MIN_TTL_S / 10, maximum=seconds)
        return Checking(self.backend, self.clock, self.pool(agent_type), check, seconds, limit)

    def events(self, agent_type: str, after: str | None, limit: int) -> Flow[list[PoolEvent]]:
        """See `LoadBalancer.events`."""
        if after is not None and not _CURSOR.fullmatch(arguments.name("after", after)):
            raise InvalidArgument("after", after, "the cursor of an event, or None")
        number = arguments.count("limit", limit, maximum=MAX_EVENTS)
        return instances.events(self.registrations.layouts, self.pool(agent_type), after, number)

    def series(
        self, agent_type: str, window: Window, step: Window, as_of: Timestamp
    ) -> Flow[tuple[PoolSeriesRow, ...]]:
        """See `LoadBalancer.series`."""
        return history.series(self.registrations.layouts, self.pool(agent_type), window, step, as_of)

    def remove(self, agent_type: str, instance_id: str) -> Flow[bool]:
        """See `LoadBalancer.remove_instance`."""
        name = arguments.name("instance_id", instance_id)
        return instances.remove(self.backend, self.clock, self.registrations, self.pool(agent_type), name)

    def delete_pool(self, agent_type: str) -> Flow[bool]:
        """See `LoadBalancer.delete_pool`."""
        return instances.delete(self.backend, self.clock, self.registrations, self.pool(agent_type))

    def mark(self, agent_type: str, instance_id: str, *, on: str = "", off: str = "") -> Flow[bool]:
        """Set the flags in `on` and clear those in `off`. Both are comma-separated names of flags; see pool.lua."""
        name = arguments.name("instance_id", instance_id)
        return instances.mark(self.clock, self.registrations, self.pool(agent_type), name, on=on, off=off)

    def cool_down(self, agent_type: str, instance_id: str, seconds: float) -> Flow[bool]:
        """See `LoadBalancer.cool_down`."""
        name = arguments.name("instance_id", instance_id)
        rest = checked_rest("seconds", seconds)
        return instances.cool_down(self.clock, self.registrations.layouts, self.pool(agent_type), name, rest)

    def heartbeat(self, agent_type: str, instance_ids: tuple[str, ...], within: float | None) -> Flow[list[str]]:
        """See `LoadBalancer.heartbeat`."""
        names = arguments.names("instance_ids", instance_ids)
        heartbeat_ttl_ms = 0 if within is None else _milliseconds("within", within)
        return instances.heartbeat(self.registrations.layouts, self.pool(agent_type), names, heartbeat_ttl_ms)

    def select(self, agent_type: str, require: Collection[str], affinity: str | None) -> Flow[AgentInstance | None]:
        """See `LoadBalancer.select_instance`."""
        found = selecting.select(self.registrations.layouts, self.pool(agent_type), self.choice(require, affinity))
        return self._or_none(found, None)

    def acquire(self, agent_type: str, request: LeaseRequest) -> Flow[AgentInstance | None]:
        """See `LoadBalancer.acquire`."""
        return self._or_none(acquiring.acquire_instance(self.keeper, self.queues, self.pool(agent_type), request), None)

    def acquire_many(
        self, agent_type: str, count: int, request: LeaseRequest, all_or_none: bool
    ) -> Flow[list[AgentInstance]]:
        """See `LoadBalancer.acquire_many`."""
        number = arguments.count("count", count, maximum=commands.MANY)
        if arguments.flag("all_or_none", all_or_none) and request.wait > 0:
            raise InvalidArgument("wait", request.wait, "0 with all_or_none=True: units are not kept idle for a call")
        pool = self.pool(agent_type)
        some = acquiring_many.acquire_instances(self.keeper, self.queues, pool, request, number, all_or_none)
        return self._or_none(some, [])

    def enter(self, pool: Pool, request: LeaseRequest) -> Flow[Lease]:
        """Lease one unit for a `with` block, or raise NoCapacity."""
        entering = blocks.enter(self.keeper, self.queues, pool, request)
        return entering if self.on_unavailable == "raise" else _or_no_capacity(pool, entering)

    def _or_none(self, flow: Flow[T], default: T) -> Flow[T]:
        """Run a flow. If the server is unreachable, raise the error or return the default, as `on_unavailable` says."""
        return flow if self.on_unavailable == "raise" else _or_else(self.backend, flow, default)

    def release(
        self,
        instance: AgentInstance | AttachedLease | None,
        outcome: Outcome | str,
        response_time: float | None,
        tokens: int | None,
        retry_after: float | None,
    ) -> Flow[bool]:
        """See `LoadBalancer.release`."""
        if instance is None:
            return releasing.release_nothing()
        lease = self._lease_of("instance", instance)
        checked = arguments.choice("outcome", outcome, Outcome)
        took = None if response_time is None else arguments.seconds("response_time", response_time, minimum=0.0)
        if retry_after is not None:
            if checked is not Outcome.RATE_LIMITED:
                allowed = "None, unless outcome is 'rate_limited'; or call cool_down"
                raise InvalidArgument("retry_after", retry_after, allowed)
            lease.retry_after = retry_after
        if tokens is not None:
            lease.tokens_used = arguments.count("tokens", tokens, minimum=0)
        return self._or_none(releasing.release(self.keeper, lease, checked, took), False)

    def release_many(
        self, instances: Iterable[AgentInstance | AttachedLease], outcome: Outcome | str, response_time: float | None
    ) -> Flow[list[bool]]:
        """See `LoadBalancer.release_many`."""
        given: object = instances
        if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
            raise InvalidArgument("instances", given, "the instances that acquire_many returned, or their leases")
        held = [self._lease_of("instances", each) for each in instances]
        usual = arguments.choice("outcome", outcome, Outcome)
        took = None if response_time is None else arguments.seconds("response_time", response_time, minimum=0.0)
        ended = [(lease, usual if lease.outcome is None else Outcome(lease.outcome)) for lease in held]
        return self._or_none(releasing.release_many(self.keeper, ended, took), [False] * len(ended))

    def _lease_of(self, argument: str, value: object) -> Lease:
        """Return the argument if it is a lease, or else the lease that the instance carries."""
        lease = value.lease if isinstance(value, AgentInstance) else value
        if not isinstance(lease, Lease):
            raise InvalidArgument(argument, value, "an instance from acquire, which carries its lease; or a Lease")
        if not lease.kept_by(self.keeper):
            raise InvalidArgument(argument, value, "a lease from this balancer's server and namespace")
        return lease

    def leases(self, agent_type: str) -> Flow[PoolLeases]:
        """See `LoadBalancer.leases`."""
        return instances.leases(self.registrations.layouts, self.pool(agent_type))

    def end_lease(self, agent_type: str, token: str) -> Flow[bool]:
        """See `LoadBalancer.release_token`."""
        pool = self.pool(agent_type)
        if not arguments.name("token", token).startswith("@"):
            raise InvalidArgument("token", token, "the token of a lease, as `leases` shows it: @host:pid:...")
        return instances.end_lease(self.keeper, pool, token)

    def repair(self, agent_type: str, progress: Callable[[int, int], None] | None) -> Flow[Repaired]:
        """See `LoadBalancer.repair`."""
        if progress is not None:
            arguments.callback("progress", progress, "a function that takes two numbers, or None")
        return instances.repair(self.registrations.layouts, self.pool(agent_type), progress)

    def wait_until_idle(self, agent_type: str, instance_id: str, wait: float) -> Flow[bool]:
        """See `LoadBalancer.wait_until_idle`."""
        limit = arguments.seconds("wait", wait, minimum=0.0, endless=True)
        name, layouts = arguments.name("instance_id", instance_id), self.registrations.layouts
        return instances.wait_until_idle(layouts, self.pool(agent_type), name, limit)

    def status(self, agent_types: tuple[str, ...]) -> Flow[list[PoolStatus]]:
        """See `LoadBalancer.status`."""
        names = arguments.names("agent_types", agent_types) if agent_types else None
        return instances.status(self.backend, self.clock, self.registrations, names)

    def instances(self) -> Flow[dict[str, list[AgentInstance]]]:
        """See `LoadBalancer.instances`."""
        pools = yield from instances.status(self.backend, self.clock, self.registrations)
        return {pool.agent_type: [status.instance for status in pool.instances] for pool in pools}


def checked_settings(settings: object) -> PoolSettings | None:
    """Check the settings of a pool; None is allowed."""
    if settings is None or isinstance(settings, PoolSettings):
        return settings
    raise InvalidArgument("settings", settings, "a PoolSettings, or None")


def checked_policy(on_unavailable: object) -> OnUnavailable:
    """Check the policy for an unreachable server."""
    text = arguments.plain_text(on_unavailable) if isinstance(on_unavailable, str) else ""
    if text in ("raise", "none"):
        return cast("OnUnavailable", text)
    raise InvalidArgument("on_unavailable", on_unavailable, "'raise' or 'none'")


def _or_else(backend: Backend, flow: Flow[T], default: T) -> Flow[T]:
    try:
        return (yield from flow)
    except BackendUnavailable as away:
        backend.log_absence(away)
        return default


def _or_no_capacity(pool: Pool, entering: Flow[Lease]) -> Flow[Lease]:
    try:
        return (yield from entering)
    except BackendUnavailable as away:
        raise NoCapacity(pool.agent_type, f"the server is unreachable: {away}", _AWAY_RETRY_S) from away


def _rate(argument: str, value: float) -> float:
    """Check a rate limit per minute. The value math.inf means no limit."""
    allowed = f"a number from {_MIN_RATE:g} to {_MAX_RATE:g}, or math.inf"
    rate = arguments.number(argument, value, allowed)
    if rate != math.inf and not _MIN_RATE <= rate <= _MAX_RATE:
        raise InvalidArgument(argument, value, allowed)
    return rate


def _shards(value: int) -> int:
    """Check a number of shards."""
    return arguments.count("shards", value, maximum=commands.MAX_SHARDS)


def _milliseconds(argument: str, value: float) -> int:
    return math.ceil(arguments.seconds(argument, value, minimum=MIN_TTL_S) * 1000)
