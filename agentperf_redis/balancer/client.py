"""The balancer's public face: `LoadBalancer`, and the same with await as its `aio`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any, NoReturn

from agentperf_redis import arguments
from agentperf_redis.backend import Backend, default_backend
from agentperf_redis.balancer import flows
from agentperf_redis.balancer.flows import DEFAULT_MAX_HOLD_S, DEFAULT_TTL_S, Wish
from agentperf_redis.balancer.keeper import keeper_of
from agentperf_redis.balancer.lease import Lease
from agentperf_redis.balancer.model import (
    AgentInstance,
    LeaseOnIt,
    LoadBalancingStrategy,
    Outcome,
    PoolLeases,
    PoolStatus,
    Repaired,
    rendered,
)
from agentperf_redis.balancer.requests import NO_WAIT, OnLost, Requests
from agentperf_redis.balancer.waiting import lines_of
from agentperf_redis.errors import InvalidArgument


class LoadBalancer:
    """Shares instances of agents among all processes: picks one and leases one unit of its capacity, atomically.

    Makes no connection before the first call.

    Args:
        strategy: how pools pick. Fixed per pool by its first registration, LEAST_LOADED when None; another one for a
            pool that is there is InvalidArgument. None takes each pool's own.
        backend: the server and namespace; None for the process-wide default.
    """

    def __init__(self, strategy: LoadBalancingStrategy | str | None = None, *, backend: Backend | None = None) -> None:
        self._backend = default_backend() if backend is None else backend
        wanted = self.check_strategy(strategy)
        self._requests = Requests(self._backend, keeper_of(self._backend), lines_of(self._backend), wanted)
        self._aio = AsyncLoadBalancer(self._requests)

    @staticmethod
    def check_strategy(strategy: object) -> LoadBalancingStrategy | None:
        """Check a strategy: a LoadBalancingStrategy, its value, or None for the pool's own."""
        return None if strategy is None else arguments.choice("strategy", strategy, LoadBalancingStrategy)

    def __repr__(self) -> str:
        return f"LoadBalancer({self.strategy}, backend={self._backend!r})"

    @property
    def aio(self) -> AsyncLoadBalancer:
        """The same balancer for asyncio: every call that does I/O is awaited."""
        return self._aio

    @property
    def strategy(self) -> LoadBalancingStrategy:
        """How pools pick that this balancer is the first to register."""
        return self._requests.wanted or LoadBalancingStrategy.LEAST_LOADED

    @property
    def instances(self) -> dict[str, list[AgentInstance]]:
        """A snapshot of all instances by agent type. Reads the server; changing it changes nothing."""
        return self._backend.run(self._requests.instances())

    def register_instance(self, instance: AgentInstance, *, heartbeat: float | None = None) -> None:
        """Add an instance to its pool, or change its capacity, weight and labels if it is there.

        Its load, health and measurements stay. `is_healthy=False` marks it unhealthy; to undo that, `mark_healthy`.
        Likewise `is_draining=True` and `undrain`. While this process lives, it registers the instance again should the
        server lose it.

        Args:
            instance: what to register; its current_load is ignored, since load follows from leases.
            heartbeat: seconds after which it counts as down unless `heartbeat` is called; None: none are expected.

        Raises:
            InvalidArgument: when the pool has another strategy than this balancer.
        """
        self._backend.run(self._requests.register(instance, heartbeat))

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
        return self._backend.run(self._requests.update(agent_type, instance_id, max_capacity, weight, labels))

    def remove_instance(self, agent_type: str, instance_id: str) -> bool:
        """Take an instance out of its pool: no new leases; those it has may still be renewed and released.

        Args:
            agent_type: its pool.
            instance_id: its name.

        Returns:
            Whether it was registered.
        """
        return self._backend.run(self._requests.remove(agent_type, instance_id))

    def mark_healthy(self, agent_type: str, instance_id: str) -> bool:
        """Let an instance take work again. Returns whether it is registered."""
        return self._backend.run(self._requests.mark(agent_type, instance_id, off="us"))

    def mark_unhealthy(self, agent_type: str, instance_id: str) -> bool:
        """Let an instance take no new work until it is marked healthy. Returns whether it is registered."""
        return self._backend.run(self._requests.mark(agent_type, instance_id, on="u"))

    def drain(self, agent_type: str, instance_id: str) -> bool:
        """Let an instance finish what it has and take nothing new. Returns whether it is registered."""
        return self._backend.run(self._requests.mark(agent_type, instance_id, on="d"))

    def undrain(self, agent_type: str, instance_id: str) -> bool:
        """Undo `drain`. Returns whether it is registered."""
        return self._backend.run(self._requests.mark(agent_type, instance_id, off="d"))

    def heartbeat(self, agent_type: str, *instance_ids: str, within: float = 30.0) -> list[str]:
        """Say that instances are alive; those that were down for silence take work again.

        Args:
            agent_type: their pool.
            instance_ids: their names.
            within: seconds until the next heartbeat is due.

        Returns:
            Those that are not registered, to be registered again.
        """
        return self._backend.run(self._requests.heartbeat(agent_type, instance_ids, within))

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
        return self._backend.run(self._requests.select(agent_type, require, affinity))

    def acquire(
        self,
        agent_type: str,
        *,
        wait: float = NO_WAIT,
        priority: int = 0,
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
            wait: seconds to stand in line when none has room, first come first served; math.inf without end.
            priority: seconds earlier than it came that this call counts as having come, for its place in line.
            require: labels the instance must have all of.
            affinity: under CONSISTENT_HASH, what is to go to the same instance each time, such as a session's name.
            ttl: seconds the lease lives without renewal, from 0.05.
            max_hold: seconds after which it is renewed no more; math.inf for no end.
            on_lost: called with a LeaseLost, on a background thread, if the lease ends before it is released.

        Returns:
            A snapshot of the instance, carrying its lease; None when none has room, or had within `wait`.

        Raises:
            InvalidArgument: when the pool has another strategy than this balancer.
        """
        wish = self._requests.wish(wait, priority, require, affinity, ttl, max_hold, on_lost)
        return self._backend.run(self._requests.acquire(agent_type, wish))

    def release(
        self,
        instance: AgentInstance | LeaseOnIt | None,
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
        return self._backend.run(self._requests.release(instance, outcome, response_time))

    def lease(
        self,
        agent_type: str,
        *,
        wait: float = NO_WAIT,
        priority: int = 0,
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
            wait: see `acquire`.
            priority: see `acquire`.
            require: labels the instance must have all of.
            affinity: see `acquire`.
            ttl: seconds the lease lives without renewal, from 0.05.
            max_hold: seconds after which it is renewed no more; math.inf for no end.
            on_lost: called with a LeaseLost, on a background thread, if the lease ends before the block.

        Returns:
            A context manager that yields a `Lease`. Entering raises NoCapacity when none has room; leaving raises
            LeaseLost when the block went well but its lease was lost while it ran.
        """
        return LeaseBlock(
            self._requests, agent_type, self._requests.wish(wait, priority, require, affinity, ttl, max_hold, on_lost)
        )

    def get_status(self) -> dict[str, Any]:
        """Return for each agent type its instances, capacity and load, in the shape of the in-memory version."""
        return rendered(self.status())

    def status(self, *agent_types: str) -> list[PoolStatus]:
        """Return typed snapshots of pools, of which `get_status` is a rendering.

        Args:
            agent_types: which pools; none for all.
        """
        return self._backend.run(self._requests.status(agent_types))

    def leases(self, agent_type: str) -> PoolLeases:
        """Return who holds what in a pool, and who waits.

        Args:
            agent_type: the pool.

        Returns:
            Leases with their holders and ages, and the line, the next to be served first.
        """
        return self._backend.run(self._requests.leases(agent_type))

    def release_token(self, agent_type: str, token: str) -> bool:
        """End a lease of any process by its token, for operators; its holder learns that it is lost.

        Args:
            agent_type: the pool.
            token: as `leases` shows it.

        Returns:
            Whether it held capacity until now.
        """
        return self._backend.run(self._requests.free(agent_type, token))

    def repair(self, agent_type: str, *, progress: Callable[[int, int], None] | None = None) -> Repaired:
        """Recompute the load of all instances from their leases, and write indexes and sums anew.

        Nothing in normal operation needs it: it undoes what was changed by hand. The pool may stay in use.

        Args:
            agent_type: the pool.
            progress: called with the instances done and their total, after each page of 500.

        Returns:
            What was found.
        """
        return self._backend.run(self._requests.repair(agent_type, progress))

    def wait_until_idle(self, agent_type: str, instance_id: str, *, wait: float = math.inf) -> bool:
        """Wait until an instance bears no lease, usually after `drain`.

        Args:
            agent_type: its pool.
            instance_id: its name.
            wait: seconds at most.

        Returns:
            True when it bears none, or is not there; False when time was up.
        """
        return self._backend.run(self._requests.wait_until_idle(agent_type, instance_id, wait))


class AsyncLoadBalancer:
    """`LoadBalancer` for asyncio; each call does what the call of that name does there."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._backend = requests.backend

    async def register_instance(self, instance: AgentInstance, *, heartbeat: float | None = None) -> None:
        """See `LoadBalancer.register_instance`."""
        await self._backend.arun(self._requests.register(instance, heartbeat))

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
        return await self._backend.arun(self._requests.update(agent_type, instance_id, max_capacity, weight, labels))

    async def remove_instance(self, agent_type: str, instance_id: str) -> bool:
        """See `LoadBalancer.remove_instance`."""
        return await self._backend.arun(self._requests.remove(agent_type, instance_id))

    async def mark_healthy(self, agent_type: str, instance_id: str) -> bool:
        """See `LoadBalancer.mark_healthy`."""
        return await self._backend.arun(self._requests.mark(agent_type, instance_id, off="us"))

    async def mark_unhealthy(self, agent_type: str, instance_id: str) -> bool:
        """See `LoadBalancer.mark_unhealthy`."""
        return await self._backend.arun(self._requests.mark(agent_type, instance_id, on="u"))

    async def drain(self, agent_type: str, instance_id: str) -> bool:
        """See `LoadBalancer.drain`."""
        return await self._backend.arun(self._requests.mark(agent_type, instance_id, on="d"))

    async def undrain(self, agent_type: str, instance_id: str) -> bool:
        """See `LoadBalancer.undrain`."""
        return await self._backend.arun(self._requests.mark(agent_type, instance_id, off="d"))

    async def heartbeat(self, agent_type: str, *instance_ids: str, within: float = 30.0) -> list[str]:
        """See `LoadBalancer.heartbeat`."""
        return await self._backend.arun(self._requests.heartbeat(agent_type, instance_ids, within))

    async def select_instance(
        self, agent_type: str, *, require: Collection[str] = (), affinity: str | None = None
    ) -> AgentInstance | None:
        """See `LoadBalancer.select_instance`."""
        return await self._backend.arun(self._requests.select(agent_type, require, affinity))

    async def acquire(
        self,
        agent_type: str,
        *,
        wait: float = NO_WAIT,
        priority: int = 0,
        require: Collection[str] = (),
        affinity: str | None = None,
        ttl: float = DEFAULT_TTL_S,
        max_hold: float = DEFAULT_MAX_HOLD_S,
        on_lost: OnLost | None = None,
    ) -> AgentInstance | None:
        """See `LoadBalancer.acquire`."""
        wish = self._requests.wish(wait, priority, require, affinity, ttl, max_hold, on_lost)
        return await self._backend.arun(self._requests.acquire(agent_type, wish))

    async def release(
        self,
        instance: AgentInstance | LeaseOnIt | None,
        *,
        outcome: Outcome | str = Outcome.OK,
        response_time: float | None = None,
    ) -> bool:
        """See `LoadBalancer.release`."""
        return await self._backend.arun(self._requests.release(instance, outcome, response_time))

    def lease(
        self,
        agent_type: str,
        *,
        wait: float = NO_WAIT,
        priority: int = 0,
        require: Collection[str] = (),
        affinity: str | None = None,
        ttl: float = DEFAULT_TTL_S,
        max_hold: float = DEFAULT_MAX_HOLD_S,
        on_lost: OnLost | None = None,
    ) -> AsyncLeaseBlock:
        """See `LoadBalancer.lease`; for `async with`."""
        return AsyncLeaseBlock(
            self._requests, agent_type, self._requests.wish(wait, priority, require, affinity, ttl, max_hold, on_lost)
        )

    async def get_status(self) -> dict[str, Any]:
        """See `LoadBalancer.get_status`."""
        return rendered(await self.status())

    async def status(self, *agent_types: str) -> list[PoolStatus]:
        """See `LoadBalancer.status`."""
        return await self._backend.arun(self._requests.status(agent_types))

    async def leases(self, agent_type: str) -> PoolLeases:
        """See `LoadBalancer.leases`."""
        return await self._backend.arun(self._requests.leases(agent_type))

    async def release_token(self, agent_type: str, token: str) -> bool:
        """See `LoadBalancer.release_token`."""
        return await self._backend.arun(self._requests.free(agent_type, token))

    async def repair(self, agent_type: str, *, progress: Callable[[int, int], None] | None = None) -> Repaired:
        """See `LoadBalancer.repair`."""
        return await self._backend.arun(self._requests.repair(agent_type, progress))

    async def wait_until_idle(self, agent_type: str, instance_id: str, *, wait: float = math.inf) -> bool:
        """See `LoadBalancer.wait_until_idle`."""
        return await self._backend.arun(self._requests.wait_until_idle(agent_type, instance_id, wait))


class LeaseBlock:
    """What `LoadBalancer.lease` returns: `with` it holds a lease. May be entered again, one block after the other."""

    def __init__(self, requests: Requests, agent_type: str, wish: Wish) -> None:
        self._backend = requests.backend
        self._keeper = requests.keeper
        self._lines = requests.lines
        self._pool = requests.pool(agent_type)
        self._wish = wish
        self._lease: Lease | None = None

    def __enter__(self) -> Lease:
        if self._lease is not None:
            raise InvalidArgument("lease", self._lease, "one block at a time; call lease() again for another")
        self._lease = self._backend.run(flows.enter(self._keeper, self._lines, self._pool, self._wish))
        return self._lease

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            self._backend.run(flows.leave(self._keeper, lease, error))

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a lease block has no {name!r}; enter it first: `with lb.lease(...) as lease`")

    async def __aenter__(self) -> NoReturn:
        raise TypeError("in a coroutine it is `async with lb.aio.lease(...)`")

    async def __aexit__(self, *_: object) -> None:
        """Never reached: there only so that entering can tell."""


class AsyncLeaseBlock:
    """`LeaseBlock` for `async with`."""

    def __init__(self, requests: Requests, agent_type: str, wish: Wish) -> None:
        self._backend = requests.backend
        self._keeper = requests.keeper
        self._lines = requests.lines
        self._pool = requests.pool(agent_type)
        self._wish = wish
        self._lease: Lease | None = None

    async def __aenter__(self) -> Lease:
        if self._lease is not None:
            raise InvalidArgument("lease", self._lease, "one block at a time; call lease() again for another")
        self._lease = await self._backend.arun(flows.enter(self._keeper, self._lines, self._pool, self._wish))
        return self._lease

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            await self._backend.arun(flows.leave(self._keeper, lease, error))

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a lease block has no {name!r}; enter it first: `async with lb.aio.lease(...) as lease`")

    def __enter__(self) -> NoReturn:
        raise TypeError("it is `async with lb.aio.lease(...)`; outside of coroutines, `with lb.lease(...)`")

    def __exit__(self, *_: object) -> None:
        """Never reached: there only so that entering can tell."""
