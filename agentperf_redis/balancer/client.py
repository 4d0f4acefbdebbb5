"""The balancer's public face: `LoadBalancer`, and the same with await as its `aio`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import cached_property
from types import TracebackType
from typing import Any

from agentperf_redis import arguments
from agentperf_redis.backend import Backend, default_backend
from agentperf_redis.balancer import commands, flows
from agentperf_redis.balancer.commands import Choice, Pool
from agentperf_redis.balancer.flows import DEFAULT_MAX_HOLD_S, DEFAULT_TTL_S, Wish
from agentperf_redis.balancer.keeper import keeper_of
from agentperf_redis.balancer.lease import Lease
from agentperf_redis.balancer.model import (
    MAX_WEIGHT,
    AgentInstance,
    LoadBalancingStrategy,
    Outcome,
    PoolStatus,
    checked_labels,
    rendered,
)
from agentperf_redis.command import Flow
from agentperf_redis.errors import InvalidArgument, LeaseLost

OnLost = Callable[[LeaseLost], None]

_LEAST_TTL_S = 0.05
_LONGEST_TTL_S = 86_400.0


class LoadBalancer:
    """Shares instances of agents among all processes: picks one and leases one unit of its capacity, atomically.

    Makes no connection before the first call.

    Args:
        strategy: how pools pick. Fixed per pool by its first registration, LEAST_LOADED when None; another one for a
            pool that is there is InvalidArgument. None takes each pool's own.
        backend: the server and namespace; None for the process-wide default.
    """

    def __init__(self, strategy: LoadBalancingStrategy | str | None = None, *, backend: Backend | None = None) -> None:
        self._wanted = self.check_strategy(strategy)
        self._backend = default_backend() if backend is None else backend
        self._keeper = keeper_of(self._backend)

    @staticmethod
    def check_strategy(strategy: object) -> LoadBalancingStrategy | None:
        """Check a strategy: a LoadBalancingStrategy, its value, or None for the pool's own."""
        return None if strategy is None else arguments.choice("strategy", strategy, LoadBalancingStrategy)

    def __repr__(self) -> str:
        return f"LoadBalancer({self.strategy}, backend={self._backend!r})"

    @cached_property
    def aio(self) -> AsyncLoadBalancer:
        """The same balancer for asyncio: every call that does I/O is awaited."""
        return AsyncLoadBalancer(self)

    @property
    def strategy(self) -> LoadBalancingStrategy:
        """How pools pick that this balancer is the first to register."""
        return LoadBalancingStrategy.LEAST_LOADED if self._wanted is None else self._wanted

    @property
    def instances(self) -> dict[str, list[AgentInstance]]:
        """A snapshot of all instances by agent type. Reads the server; changing it changes nothing."""
        return self._backend.run(self._instances())

    def register_instance(self, instance: AgentInstance, *, heartbeat: float | None = None) -> None:
        """Add an instance to its pool, or change its capacity, weight and labels if it is there.

        Its load, health and measurements stay. `is_healthy=False` marks it unhealthy; to undo that, `mark_healthy`.

        Args:
            instance: what to register; its current_load is ignored, since load follows from leases.
            heartbeat: seconds after which it counts as down unless `heartbeat` is called; None: none are expected.

        Raises:
            InvalidArgument: when the pool has another strategy than this balancer.
        """
        self._backend.run(self._register(instance, heartbeat))

    def update_instance(
        self,
        agent_type: str,
        instance_id: str,
        *,
        max_capacity: int | None = None,
        weight: float | None = None,
        labels: Collection[str] | None = None,
    ) -> bool:
        """Change facts of an instance; what is None stays. Leases beyond a smaller capacity run out by themselves.

        Args:
            agent_type: its pool.
            instance_id: its name.
            max_capacity: leases it bears at once, at least 1.
            weight: its share under WEIGHTED, 0 to 10^6.
            labels: its capabilities, at most 16.

        Returns:
            Whether it is registered.
        """
        return self._backend.run(self._update(agent_type, instance_id, max_capacity, weight, labels))

    def remove_instance(self, agent_type: str, instance_id: str) -> bool:
        """Take an instance out of its pool: no new leases; those it has may still be renewed and released.

        Args:
            agent_type: its pool.
            instance_id: its name.

        Returns:
            Whether it was registered.
        """
        return self._backend.run(self._remove(agent_type, instance_id))

    def mark_healthy(self, agent_type: str, instance_id: str) -> bool:
        """Let an instance take work again. Returns whether it is registered."""
        return self._backend.run(self._mark(agent_type, instance_id, off="us"))

    def mark_unhealthy(self, agent_type: str, instance_id: str) -> bool:
        """Let an instance take no new work until it is marked healthy. Returns whether it is registered."""
        return self._backend.run(self._mark(agent_type, instance_id, on="u"))

    def drain(self, agent_type: str, instance_id: str) -> bool:
        """Let an instance finish what it has and take nothing new. Returns whether it is registered."""
        return self._backend.run(self._mark(agent_type, instance_id, on="d"))

    def undrain(self, agent_type: str, instance_id: str) -> bool:
        """Undo `drain`. Returns whether it is registered."""
        return self._backend.run(self._mark(agent_type, instance_id, off="d"))

    def heartbeat(self, agent_type: str, *instance_ids: str, within: float = 30.0) -> list[str]:
        """Say that instances are alive; those that were down for silence take work again.

        Args:
            agent_type: their pool.
            instance_ids: their names.
            within: seconds until the next heartbeat is due.

        Returns:
            Those that are not registered, to be registered again.
        """
        return self._backend.run(self._heartbeat(agent_type, instance_ids, within))

    def select_instance(
        self, agent_type: str, *, require: Collection[str] = (), affinity: str | None = None
    ) -> AgentInstance | None:
        """Look which instance `acquire` would pick now, without taking it; the next moment it may be full.

        Args:
            agent_type: the pool.
            require: labels it must have all of.
            affinity: see `acquire`.

        Returns:
            A snapshot, or None when none has room.
        """
        return self._backend.run(self._select(agent_type, require, affinity))

    def acquire(
        self,
        agent_type: str,
        *,
        require: Collection[str] = (),
        affinity: str | None = None,
        ttl: float = DEFAULT_TTL_S,
        max_hold: float = DEFAULT_MAX_HOLD_S,
        on_lost: OnLost | None = None,
    ) -> AgentInstance | None:
        """Pick an instance and lease one unit of its capacity. Give it back with `release`.

        The lease is renewed in the background while the returned object lives. If this process dies, the capacity
        comes back after at most `ttl`.

        Args:
            agent_type: the pool.
            require: labels the instance must have all of.
            affinity: under CONSISTENT_HASH, what is to go to the same instance each time, such as a session's name.
            ttl: seconds the lease lives without renewal, from 0.05.
            max_hold: seconds after which it is renewed no more; math.inf for no end.
            on_lost: called with a LeaseLost, on a background thread, if the lease ends before it is released.

        Returns:
            A snapshot of the instance, carrying its lease; None when none has room.

        Raises:
            InvalidArgument: when the pool has another strategy than this balancer.
        """
        wish = self._wish(require, affinity, ttl, max_hold, on_lost)
        return self._backend.run(flows.acquire_instance(self._keeper, self._pool(agent_type), wish))

    def release(
        self,
        instance: AgentInstance | Lease | None,
        *,
        outcome: Outcome | str = Outcome.OK,
        response_time: float | None = None,
    ) -> bool:
        """Give a lease back and say how the work went.

        Args:
            instance: what `acquire` returned, None included, or its lease.
            outcome: "ok", "error", "timeout", "rejected", or "neutral" when it tells nothing about the instance.
            response_time: seconds the work took, if measured.

        Returns:
            True when this call freed it; False when it had been released, or had expired, before.

        Raises:
            InvalidArgument: for an instance that carries no lease, such as one from `select_instance`.
        """
        return self._backend.run(self._release(instance, outcome, response_time))

    def lease(
        self,
        agent_type: str,
        *,
        require: Collection[str] = (),
        affinity: str | None = None,
        ttl: float = DEFAULT_TTL_S,
        max_hold: float = DEFAULT_MAX_HOLD_S,
        on_lost: OnLost | None = None,
    ) -> LeaseBlock:
        """Hold a lease for a `with` block, which measures the response time and reports how it ended.

        An exception that leaves the block is an error, a TimeoutError a timeout; `lease.outcome` says more.

        Args:
            agent_type: the pool.
            require: labels the instance must have all of.
            affinity: see `acquire`.
            ttl: seconds the lease lives without renewal, from 0.05.
            max_hold: seconds after which it is renewed no more; math.inf for no end.
            on_lost: called with a LeaseLost, on a background thread, if the lease ends before the block.

        Returns:
            A context manager that yields a `Lease`. Entering raises NoCapacity when none has room; leaving raises
            LeaseLost when the block went well but its lease was lost while it ran.
        """
        return LeaseBlock(self, agent_type, self._wish(require, affinity, ttl, max_hold, on_lost))

    def get_status(self) -> dict[str, Any]:
        """Return for each agent type its instances, capacity and load, in the shape of the in-memory version."""
        return rendered(self.status())

    def status(self, *agent_types: str) -> list[PoolStatus]:
        """Return typed snapshots of pools, of which `get_status` is a rendering.

        Args:
            agent_types: which pools; none for all.
        """
        return self._backend.run(self._status(agent_types))

    # What both faces do, as flows: arguments are checked before anything is sent.

    def _pool(self, agent_type: str) -> Pool:
        return Pool.of(self._backend.namespace, arguments.name("agent_type", agent_type))

    def _wish(
        self,
        require: Collection[str],
        affinity: str | None,
        ttl: float,
        max_hold: float,
        on_lost: OnLost | None,
    ) -> Wish:
        if on_lost is not None and not callable(on_lost):
            raise InvalidArgument("on_lost", on_lost, "a function that takes a LeaseLost, or None")
        return Wish(
            self._choice(require, affinity),
            arguments.seconds("ttl", ttl, least=_LEAST_TTL_S, most=_LONGEST_TTL_S),
            arguments.seconds("max_hold", max_hold, endless=True),
            on_lost,
        )

    def _choice(self, require: Collection[str], affinity: str | None) -> Choice:
        labels = checked_labels("require", require) if require != () else frozenset()
        return Choice(self._wanted, labels, None if affinity is None else arguments.cache_key("affinity", affinity))

    def _register(self, instance: AgentInstance, heartbeat: float | None) -> Flow[LoadBalancingStrategy]:
        if not isinstance(instance, AgentInstance):
            raise InvalidArgument("instance", instance, "an AgentInstance")
        silence_ms = 0 if heartbeat is None else _milliseconds("heartbeat", heartbeat)
        return flows.register(self._backend, self._keeper, instance, self._wanted, silence_ms)

    def _update(
        self,
        agent_type: str,
        instance_id: str,
        max_capacity: int | None,
        weight: float | None,
        labels: Collection[str] | None,
    ) -> Flow[bool]:
        return flows.update(
            self._keeper,
            self._pool(agent_type),
            arguments.name("instance_id", instance_id),
            None if max_capacity is None else arguments.count("max_capacity", max_capacity),
            None if weight is None else arguments.amount("weight", weight, most=MAX_WEIGHT),
            None if labels is None else checked_labels("labels", labels),
        )

    def _remove(self, agent_type: str, instance_id: str) -> Flow[bool]:
        return flows.remove(self._keeper, self._pool(agent_type), arguments.name("instance_id", instance_id))

    def _mark(self, agent_type: str, instance_id: str, *, on: str = "", off: str = "") -> Flow[bool]:
        return flows.mark(self._pool(agent_type), arguments.name("instance_id", instance_id), on=on, off=off)

    def _heartbeat(self, agent_type: str, instance_ids: tuple[str, ...], within: float) -> Flow[list[str]]:
        names = arguments.names("instance_ids", instance_ids)
        return flows.heartbeat(self._pool(agent_type), names, _milliseconds("within", within))

    def _select(self, agent_type: str, require: Collection[str], affinity: str | None) -> Flow[AgentInstance | None]:
        return iter(commands.select(self._pool(agent_type), self._choice(require, affinity)))

    def _release(
        self, instance: AgentInstance | Lease | None, outcome: Outcome | str, response_time: float | None
    ) -> Flow[bool]:
        if instance is None:
            return flows.release_nothing()
        lease = instance.lease if isinstance(instance, AgentInstance) else instance
        if not isinstance(lease, Lease):
            raise InvalidArgument("instance", instance, "an instance from acquire, which carries its lease, or a Lease")
        if not lease.kept_by(self._keeper):
            raise InvalidArgument("instance", instance, "a lease from this balancer's server and namespace")
        checked = arguments.choice("outcome", outcome, Outcome)
        took = None if response_time is None else arguments.seconds("response_time", response_time, least=0.0)
        return flows.release(self._keeper, lease, checked, took)

    def _status(self, agent_types: tuple[str, ...]) -> Flow[list[PoolStatus]]:
        return flows.status(self._backend, arguments.names("agent_types", agent_types) if agent_types else None)

    def _instances(self) -> Flow[dict[str, list[AgentInstance]]]:
        pools = yield from flows.status(self._backend)
        return {pool.agent_type: [status.instance for status in pool.instances] for pool in pools}


class AsyncLoadBalancer:
    """`LoadBalancer` for asyncio; each call does what the call of that name does there."""

    def __init__(self, balancer: LoadBalancer) -> None:
        self._balancer = balancer
        self._backend = balancer._backend  # noqa: SLF001  one thing with two faces

    async def instances(self) -> dict[str, list[AgentInstance]]:
        """See `LoadBalancer.instances`."""
        return await self._backend.arun(self._balancer._instances())

    async def register_instance(self, instance: AgentInstance, *, heartbeat: float | None = None) -> None:
        """See `LoadBalancer.register_instance`."""
        await self._backend.arun(self._balancer._register(instance, heartbeat))

    async def update_instance(
        self,
        agent_type: str,
        instance_id: str,
        *,
        max_capacity: int | None = None,
        weight: float | None = None,
        labels: Collection[str] | None = None,
    ) -> bool:
        """See `LoadBalancer.update_instance`."""
        return await self._backend.arun(self._balancer._update(agent_type, instance_id, max_capacity, weight, labels))

    async def remove_instance(self, agent_type: str, instance_id: str) -> bool:
        """See `LoadBalancer.remove_instance`."""
        return await self._backend.arun(self._balancer._remove(agent_type, instance_id))

    async def mark_healthy(self, agent_type: str, instance_id: str) -> bool:
        """See `LoadBalancer.mark_healthy`."""
        return await self._backend.arun(self._balancer._mark(agent_type, instance_id, off="us"))

    async def mark_unhealthy(self, agent_type: str, instance_id: str) -> bool:
        """See `LoadBalancer.mark_unhealthy`."""
        return await self._backend.arun(self._balancer._mark(agent_type, instance_id, on="u"))

    async def drain(self, agent_type: str, instance_id: str) -> bool:
        """See `LoadBalancer.drain`."""
        return await self._backend.arun(self._balancer._mark(agent_type, instance_id, on="d"))

    async def undrain(self, agent_type: str, instance_id: str) -> bool:
        """See `LoadBalancer.undrain`."""
        return await self._backend.arun(self._balancer._mark(agent_type, instance_id, off="d"))

    async def heartbeat(self, agent_type: str, *instance_ids: str, within: float = 30.0) -> list[str]:
        """See `LoadBalancer.heartbeat`."""
        return await self._backend.arun(self._balancer._heartbeat(agent_type, instance_ids, within))

    async def select_instance(
        self, agent_type: str, *, require: Collection[str] = (), affinity: str | None = None
    ) -> AgentInstance | None:
        """See `LoadBalancer.select_instance`."""
        return await self._backend.arun(self._balancer._select(agent_type, require, affinity))

    async def acquire(
        self,
        agent_type: str,
        *,
        require: Collection[str] = (),
        affinity: str | None = None,
        ttl: float = DEFAULT_TTL_S,
        max_hold: float = DEFAULT_MAX_HOLD_S,
        on_lost: OnLost | None = None,
    ) -> AgentInstance | None:
        """See `LoadBalancer.acquire`."""
        wish = self._balancer._wish(require, affinity, ttl, max_hold, on_lost)
        pool = self._balancer._pool(agent_type)
        return await self._backend.arun(flows.acquire_instance(self._balancer._keeper, pool, wish))

    async def release(
        self,
        instance: AgentInstance | Lease | None,
        *,
        outcome: Outcome | str = Outcome.OK,
        response_time: float | None = None,
    ) -> bool:
        """See `LoadBalancer.release`."""
        return await self._backend.arun(self._balancer._release(instance, outcome, response_time))

    def lease(
        self,
        agent_type: str,
        *,
        require: Collection[str] = (),
        affinity: str | None = None,
        ttl: float = DEFAULT_TTL_S,
        max_hold: float = DEFAULT_MAX_HOLD_S,
        on_lost: OnLost | None = None,
    ) -> AsyncLeaseBlock:
        """See `LoadBalancer.lease`; for `async with`."""
        wish = self._balancer._wish(require, affinity, ttl, max_hold, on_lost)
        return AsyncLeaseBlock(self._balancer, agent_type, wish)

    async def get_status(self) -> dict[str, Any]:
        """See `LoadBalancer.get_status`."""
        return rendered(await self.status())

    async def status(self, *agent_types: str) -> list[PoolStatus]:
        """See `LoadBalancer.status`."""
        return await self._backend.arun(self._balancer._status(agent_types))


class LeaseBlock:
    """What `LoadBalancer.lease` returns: `with` it holds a lease. May be entered again, one block after the other."""

    def __init__(self, balancer: LoadBalancer, agent_type: str, wish: Wish) -> None:
        self._backend = balancer._backend
        self._keeper = balancer._keeper
        self._pool = balancer._pool(agent_type)
        self._wish = wish
        self._lease: Lease | None = None

    def __enter__(self) -> Lease:
        if self._lease is not None:
            raise InvalidArgument("lease", self._lease, "one block at a time; call lease() again for another")
        self._lease = self._backend.run(flows.enter(self._keeper, self._pool, self._wish))
        return self._lease

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            self._backend.run(flows.leave(self._keeper, lease, error))


class AsyncLeaseBlock:
    """`LeaseBlock` for `async with`."""

    def __init__(self, balancer: LoadBalancer, agent_type: str, wish: Wish) -> None:
        self._backend = balancer._backend
        self._keeper = balancer._keeper
        self._pool = balancer._pool(agent_type)
        self._wish = wish
        self._lease: Lease | None = None

    async def __aenter__(self) -> Lease:
        if self._lease is not None:
            raise InvalidArgument("lease", self._lease, "one block at a time; call lease() again for another")
        self._lease = await self._backend.arun(flows.enter(self._keeper, self._pool, self._wish))
        return self._lease

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            await self._backend.arun(flows.leave(self._keeper, lease, error))


def _milliseconds(argument: str, value: float) -> int:
    return math.ceil(arguments.seconds(argument, value, least=_LEAST_TTL_S) * 1000)
