"""What callers ask of the balancer, checked: arguments are refused here, before anything is sent, and become flows."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from operator import is_

from agentperf_redis import arguments
from agentperf_redis.backend import Backend
from agentperf_redis.balancer import commands, flows
from agentperf_redis.balancer.commands import Choice, Pool
from agentperf_redis.balancer.flows import DEFAULT_MAX_HOLD_S, DEFAULT_TTL_S, Wish
from agentperf_redis.balancer.keeper import Keeper
from agentperf_redis.balancer.lease import Lease
from agentperf_redis.balancer.model import (
    MAX_WEIGHT,
    AgentInstance,
    LeaseOnIt,
    LoadBalancingStrategy,
    Outcome,
    PoolLeases,
    PoolStatus,
    Repaired,
    checked_labels,
)
from agentperf_redis.balancer.waiting import Lines
from agentperf_redis.command import Flow
from agentperf_redis.errors import InvalidArgument, LeaseLost

OnLost = Callable[[LeaseLost], None]

_LEAST_TTL_S = 0.05
_LONGEST_TTL_S = 86_400.0
MAX_PRIORITY = 1_000_000

NO_WAIT = 0.0
_UNASKED = (NO_WAIT, 0, (), None, DEFAULT_TTL_S, DEFAULT_MAX_HOLD_S, None)


@dataclass(frozen=True, slots=True)
class Requests:
    """What the two faces of one balancer have in common.

    Attributes:
        backend: the server and namespace.
        keeper: of this process's leases there.
        lines: in which this process stands there.
        wanted: the strategy pools must have; None takes each pool's own.
    """

    backend: Backend
    keeper: Keeper
    lines: Lines
    wanted: LoadBalancingStrategy | None
    plain: Wish = field(init=False)
    """What a caller wishes who asks for nothing special."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "plain", Wish(Choice(self.wanted)))

    def pool(self, agent_type: str) -> Pool:
        """Return a pool, its name checked."""
        return Pool.of(self.backend.namespace, arguments.name("agent_type", agent_type))

    def wish(
        self,
        wait: float,
        priority: int,
        require: Collection[str],
        affinity: str | None,
        ttl: float,
        max_hold: float,
        on_lost: OnLost | None,
    ) -> Wish:
        """Return what `acquire` and `lease` were asked for."""
        asked = (wait, priority, require, affinity, ttl, max_hold, on_lost)
        if all(map(is_, asked, _UNASKED)):  # most callers ask for nothing special, which needs no check
            return self.plain
        if on_lost is not None and not callable(on_lost):
            raise InvalidArgument("on_lost", on_lost, "a function that takes a LeaseLost, or None")
        return Wish(
            self.choice(require, affinity),
            arguments.seconds("wait", wait, least=0.0, endless=True),
            arguments.count("priority", priority, least=-MAX_PRIORITY, most=MAX_PRIORITY),
            arguments.seconds("ttl", ttl, least=_LEAST_TTL_S, most=_LONGEST_TTL_S),
            arguments.seconds("max_hold", max_hold, endless=True),
            on_lost,
        )

    def choice(self, require: Collection[str], affinity: str | None) -> Choice:
        """Return what a pick depends on."""
        labels = checked_labels("require", require) if require != () else frozenset()
        return Choice(self.wanted, labels, None if affinity is None else arguments.cache_key("affinity", affinity))

    def register(self, instance: AgentInstance, heartbeat: float | None) -> Flow[LoadBalancingStrategy]:
        """See `LoadBalancer.register_instance`."""
        if not isinstance(instance, AgentInstance):
            raise InvalidArgument("instance", instance, "an AgentInstance")
        silence_ms = 0 if heartbeat is None else _milliseconds("heartbeat", heartbeat)
        return flows.register(self.backend, self.keeper, instance, self.wanted, silence_ms)

    def update(
        self,
        agent_type: str,
        instance_id: str,
        max_capacity: int | None,
        weight: float | None,
        labels: Collection[str] | None,
    ) -> Flow[bool]:
        """See `LoadBalancer.update_instance`."""
        return flows.update(
            self.keeper,
            self.pool(agent_type),
            arguments.name("instance_id", instance_id),
            max_capacity=None if max_capacity is None else arguments.count("max_capacity", max_capacity),
            weight=None if weight is None else arguments.amount("weight", weight, most=MAX_WEIGHT),
            labels=None if labels is None else checked_labels("labels", labels),
        )

    def remove(self, agent_type: str, instance_id: str) -> Flow[bool]:
        """See `LoadBalancer.remove_instance`."""
        return flows.remove(self.keeper, self.pool(agent_type), arguments.name("instance_id", instance_id))

    def mark(self, agent_type: str, instance_id: str, *, on: str = "", off: str = "") -> Flow[bool]:
        """Set or clear flags of an instance: the letters of pool.lua."""
        return flows.mark(
            self.keeper, self.pool(agent_type), arguments.name("instance_id", instance_id), on=on, off=off
        )

    def heartbeat(self, agent_type: str, instance_ids: tuple[str, ...], within: float) -> Flow[list[str]]:
        """See `LoadBalancer.heartbeat`."""
        names = arguments.names("instance_ids", instance_ids)
        return flows.heartbeat(self.pool(agent_type), names, _milliseconds("within", within))

    def select(self, agent_type: str, require: Collection[str], affinity: str | None) -> Flow[AgentInstance | None]:
        """See `LoadBalancer.select_instance`."""
        return iter(commands.select(self.pool(agent_type), self.choice(require, affinity)))

    def acquire(self, agent_type: str, wish: Wish) -> Flow[AgentInstance | None]:
        """See `LoadBalancer.acquire`."""
        return flows.acquire_instance(self.keeper, self.lines, self.pool(agent_type), wish)

    def release(
        self, instance: AgentInstance | LeaseOnIt | None, outcome: Outcome | str, response_time: float | None
    ) -> Flow[bool]:
        """See `LoadBalancer.release`."""
        if instance is None:
            return flows.release_nothing()
        lease = instance.lease if isinstance(instance, AgentInstance) else instance
        if not isinstance(lease, Lease):
            raise InvalidArgument("instance", instance, "an instance from acquire, which carries its lease, or a Lease")
        if not lease.kept_by(self.keeper):
            raise InvalidArgument("instance", instance, "a lease from this balancer's server and namespace")
        checked = arguments.choice("outcome", outcome, Outcome)
        took = None if response_time is None else arguments.seconds("response_time", response_time, least=0.0)
        return flows.release(self.keeper, lease, checked, took)

    def leases(self, agent_type: str) -> Flow[PoolLeases]:
        """See `LoadBalancer.leases`."""
        return flows.leases(self.pool(agent_type))

    def free(self, agent_type: str, token: str) -> Flow[bool]:
        """See `LoadBalancer.release_token`."""
        pool = self.pool(agent_type)
        if not arguments.name("token", token).startswith("@"):
            raise InvalidArgument("token", token, "the token of a lease, as `leases` shows it: @host:pid:...")
        return flows.free(self.keeper, pool, token)

    def repair(self, agent_type: str, progress: Callable[[int, int], None] | None) -> Flow[Repaired]:
        """See `LoadBalancer.repair`."""
        if progress is not None and not callable(progress):
            raise InvalidArgument("progress", progress, "a function that takes two numbers, or None")
        return flows.repair(self.pool(agent_type), progress)

    def wait_until_idle(self, agent_type: str, instance_id: str, wait: float) -> Flow[bool]:
        """See `LoadBalancer.wait_until_idle`."""
        limit = arguments.seconds("wait", wait, least=0.0, endless=True)
        return flows.wait_until_idle(self.pool(agent_type), arguments.name("instance_id", instance_id), limit)

    def status(self, agent_types: tuple[str, ...]) -> Flow[list[PoolStatus]]:
        """See `LoadBalancer.status`."""
        return flows.status(
            self.backend, self.keeper, arguments.names("agent_types", agent_types) if agent_types else None
        )

    def instances(self) -> Flow[dict[str, list[AgentInstance]]]:
        """See `LoadBalancer.instances`."""
        pools = yield from flows.status(self.backend, self.keeper)
        return {pool.agent_type: [status.instance for status in pool.instances] for pool in pools}


def _milliseconds(argument: str, value: float) -> int:
    return math.ceil(arguments.seconds(argument, value, least=_LEAST_TTL_S) * 1000)
