"""The balancer's public face: `LoadBalancer`, and the same with await as its `aio`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

from agentperf_redis import arguments
from agentperf_redis.backend import Backend, chosen_backend
from agentperf_redis.balancer.async_client import AsyncLoadBalancer
from agentperf_redis.balancer.flows.leases import DEFAULT_MAX_HOLD_S, DEFAULT_TTL_S
from agentperf_redis.balancer.flows.queue import queues_of
from agentperf_redis.balancer.health_checks import Checks
from agentperf_redis.balancer.lease_block import LeaseBlock
from agentperf_redis.balancer.lease_keeper import lease_keeper_of
from agentperf_redis.balancer.model import (
    AgentInstance,
    AttachedLease,
    LoadBalancingStrategy,
    Outcome,
    PoolEvent,
    PoolLeases,
    PoolStatus,
    Repaired,
    rendered,
)
from agentperf_redis.balancer.operations import (
    BETTER,
    NO_WAIT,
    OnLost,
    OnUnavailable,
    Operations,
    checked_policy,
    checked_settings,
)
from agentperf_redis.balancer.settings import PoolSettings


class LoadBalancer:
    """Shares instances of agents among all processes: picks one and leases one unit of its capacity, atomically.

    Makes no connection before the first call.

    Args:
        strategy: how pools pick. Fixed per pool by its first registration, LEAST_LOADED when None; another one for a
            pool that is there is InvalidArgument. None takes each pool's own.
        settings: how the pools it registers instances in judge them; those deployed last hold for all processes, and a
            change is logged. None: what a pool has, and the defaults of `PoolSettings` for a new one.
        on_unavailable: what `acquire`, `lease`, `select_instance` and `release` do when the server cannot be reached:
            "raise" BackendUnavailable, or answer "none": None, NoCapacity, None, False.
        backend: the server and namespace; None for the process-wide default.
    """

    def __init__(
        self,
        strategy: LoadBalancingStrategy | str | None = None,
        *,
        settings: PoolSettings | None = None,
        on_unavailable: OnUnavailable = "raise",
        backend: Backend | None = None,
    ) -> None:
        self._backend = chosen_backend(backend)
        self._operations = Operations(
            self._backend,
            lease_keeper_of(self._backend),
            queues_of(self._backend),
            self.check_strategy(strategy),
            checked_settings(settings),
            checked_policy(on_unavailable),
        )
        self._aio = AsyncLoadBalancer(self._operations)

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
        return self._operations.wanted or LoadBalancingStrategy.LEAST_LOADED

    @property
    def instances(self) -> dict[str, list[AgentInstance]]:
        """A snapshot of all instances by agent type. Reads the server; changing it changes nothing."""
        return self._backend.run(self._operations.instances())

    def register_instance(
        self,
        instance: AgentInstance,
        *,
        heartbeat_ttl: float | None = None,
        requests_per_minute: float = math.inf,
        tokens_per_minute: float = math.inf,
    ) -> None:
        """Add an instance to its pool, or change its capacity, weight, labels and rates if it is there.

        Its load, health and measurements stay. `is_healthy=False` marks it unhealthy; to undo that, `mark_healthy`.
        Likewise `is_draining=True` and `undrain`. While this process lives, it registers the instance again should the
        server lose it.

        Args:
            instance: what to register; its current_load is ignored, since load follows from leases.
            heartbeat_ttl: seconds after which it takes no work unless `heartbeat` is called; None: none are expected.
            requests_per_minute: leases it is granted, at most; the settings of the pool say how many may come at once.
            tokens_per_minute: tokens of those leases, likewise, as they are told to `acquire` and `release`.

        Raises:
            InvalidArgument: when the pool has another strategy than this balancer.
        """
        self._backend.run(self._operations.register(instance, heartbeat_ttl, requests_per_minute, tokens_per_minute))

    def update_instance(
        self,
        agent_type: str,
        instance_id: str,
        *,
        max_capacity: int | None = None,
        weight: float | None = None,
        labels: Collection[str] | None = None,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
    ) -> bool:
        """Change facts of an instance; what is None stays. Leases beyond a smaller capacity run out by themselves.

        Args:
            agent_type: its pool.
            instance_id: its name.
            max_capacity: leases it bears at once, at least 1. A limit that was learnt is forgotten.
            weight: its share under WEIGHTED, 0 to 10^6.
            labels: its capabilities, at most 16.
            requests_per_minute: see `register_instance`; math.inf for any number.
            tokens_per_minute: likewise.

        Returns:
            Whether it is registered.
        """
        rates = (requests_per_minute, tokens_per_minute)
        return self._backend.run(self._operations.update(agent_type, instance_id, max_capacity, weight, labels, rates))

    def remove_instance(self, agent_type: str, instance_id: str) -> bool:
        """Take an instance out of its pool: no new leases; those it has may still be renewed and released.

        Args:
            agent_type: its pool.
            instance_id: its name.

        Returns:
            Whether it was registered.
        """
        return self._backend.run(self._operations.remove(agent_type, instance_id))

    def mark_healthy(self, agent_type: str, instance_id: str) -> bool:
        """Let an instance take work again, whatever was held against it. Returns whether it is registered."""
        return self._backend.run(self._operations.mark(agent_type, instance_id, off=BETTER))

    def mark_unhealthy(self, agent_type: str, instance_id: str) -> bool:
        """Let an instance take no new work until it is marked healthy. Returns whether it is registered."""
        return self._backend.run(self._operations.mark(agent_type, instance_id, on="unhealthy"))

    def drain(self, agent_type: str, instance_id: str) -> bool:
        """Let an instance finish what it has and take nothing new. Returns whether it is registered."""
        return self._backend.run(self._operations.mark(agent_type, instance_id, on="draining"))

    def undrain(self, agent_type: str, instance_id: str) -> bool:
        """Undo `drain`. Returns whether it is registered."""
        return self._backend.run(self._operations.mark(agent_type, instance_id, off="draining"))

    def heartbeat(self, agent_type: str, *instance_ids: str, within: float | None = None) -> list[str]:
        """Say that instances are alive; those that were down for silence take work again.

        Args:
            agent_type: their pool.
            instance_ids: their names.
            within: seconds until the next heartbeat is due. None: what each was registered with, or 30.

        Returns:
            Those that are not registered, to be registered again.
        """
        return self._backend.run(self._operations.heartbeat(agent_type, instance_ids, within))

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
        return self._backend.run(self._operations.select(agent_type, require, affinity))

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
        tokens: int = 0,
        fallback: Collection[str] = (),
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
            tokens: that the work will take, as far as is known: counted against the instance's tokens a minute.
            fallback: other agent types, tried in this order for what is free when this one has no room: at once, and
                again when the time to wait is over. The same labels and affinity hold; the strategy is each pool's own.

        Returns:
            A snapshot of the instance, carrying its lease; None when none has room, or had within `wait`.

        Raises:
            InvalidArgument: when the pool has another strategy than this balancer.
        """
        request = self._operations.request(wait, priority, require, affinity, ttl, max_hold, on_lost, tokens, fallback)
        return self._backend.run(self._operations.acquire(agent_type, request))

    def release(
        self,
        instance: AgentInstance | AttachedLease | None,
        *,
        outcome: Outcome | str = Outcome.OK,
        response_time: float | None = None,
        tokens: int | None = None,
    ) -> bool:
        """Give a lease back and say how the work went.

        Args:
            instance: what `acquire` returned, None included, or its lease.
            outcome: "ok", "error", "timeout", "rejected", or "neutral" when it tells nothing about the instance.
            response_time: seconds the work took, if measured.
            tokens: that it really took; None for as many as `acquire` was told.

        Returns:
            True when this call freed it; False when it had been released, or had expired, before.

        Raises:
            InvalidArgument: for an instance that carries no lease, such as one from `select_instance`.
        """
        return self._backend.run(self._operations.release(instance, outcome, response_time, tokens))

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
        tokens: int = 0,
        fallback: Collection[str] = (),
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
            tokens: see `acquire`; set `lease.tokens_used` to what it really took.
            fallback: see `acquire`; `lease.agent_type` says which it is.

        Returns:
            A context manager that yields a `Lease`. Entering raises NoCapacity when none has room; leaving raises
            LeaseLost when the block went well but its lease was lost while it ran.
        """
        return LeaseBlock(
            self._operations,
            agent_type,
            self._operations.request(wait, priority, require, affinity, ttl, max_hold, on_lost, tokens, fallback),
        )

    def configure(self, agent_type: str, settings: PoolSettings) -> None:
        """Give a pool settings, which hold for all processes at once. What they replace is logged.

        Args:
            agent_type: the pool; it need not have instances yet.
            settings: how it is to judge its instances.
        """
        self._backend.run(self._operations.configure(agent_type, settings))

    def run_checks(
        self,
        agent_type: str,
        check: Callable[[AgentInstance], object],
        *,
        interval: float = 5.0,
        timeout: float | None = None,
    ) -> Checks:
        """Check the instances of a pool, each once an interval, on background threads, until stopped.

        Any number of processes may do this: they share the checks, and if one dies the others go on. How many in a row
        take an instance out, or bring it back, is in the settings of the pool. A child process has to start its own.

        Each check is handed out for one interval. One that is not finished when its process ends, or whose task is
        cancelled, is left out that once. An interval that was made shorter holds from the next check of an instance on,
        which is due when the longer one is over.

        Args:
            agent_type: the pool.
            check: called with an instance; that it raises, returns False or takes too long says it is not well. The
                first exception is logged, and then again the first after all checks here went through.
            interval: seconds from one check of an instance to its next. Five: three failed ones take 15 s, or less.
            timeout: seconds that one check may take, at most the interval. None: two, or the interval if that is less.

        Returns:
            What stops it: `checks.stop()`, or the end of a `with` block. So does closing the client.
        """
        return Checks(self._operations.checking(agent_type, check, interval, timeout))

    def events(self, agent_type: str, *, after: str | None = None, limit: int = 100) -> list[PoolEvent]:
        """Return what happened in a pool, in order; the server keeps the last thousand or so.

        Args:
            agent_type: the pool.
            after: the cursor of an event: only what came later, the first of it; None: the last.
            limit: how many at most.
        """
        return self._backend.run(self._operations.events(agent_type, after, limit))

    def get_status(self) -> dict[str, Any]:
        """Return for each agent type its instances, capacity and load, in the shape of the in-memory version."""
        return rendered(self.status())

    def status(self, *agent_types: str) -> list[PoolStatus]:
        """Return typed snapshots of pools, of which `get_status` is a rendering.

        Args:
            agent_types: which pools; none for all.
        """
        return self._backend.run(self._operations.status(agent_types))

    def leases(self, agent_type: str) -> PoolLeases:
        """Return who holds what in a pool, and who waits.

        Args:
            agent_type: the pool.

        Returns:
            Leases with their holders and ages, and the line, the next to be served first.
        """
        return self._backend.run(self._operations.leases(agent_type))

    def release_token(self, agent_type: str, token: str) -> bool:
        """End a lease of any process by its token, for operators; its holder learns that it is lost.

        Args:
            agent_type: the pool.
            token: as `leases` shows it.

        Returns:
            Whether it held capacity until now.
        """
        return self._backend.run(self._operations.free(agent_type, token))

    def repair(self, agent_type: str, *, progress: Callable[[int, int], None] | None = None) -> Repaired:
        """Recompute the load of all instances from their leases, and write indexes and sums anew.

        Nothing in normal operation needs it: it undoes what was changed by hand. The pool may stay in use.
        An ejection, a rate or a slow start that lost what would end it ends again. When a heartbeat is due nobody else
        knows: where that was lost, silence is noticed only once another heartbeat has come.

        Args:
            agent_type: the pool.
            progress: called with the instances done and their total, after each page of 500.

        Returns:
            What was found.
        """
        return self._backend.run(self._operations.repair(agent_type, progress))

    def wait_until_idle(self, agent_type: str, instance_id: str, *, wait: float = math.inf) -> bool:
        """Wait until an instance bears no lease, usually after `drain`.

        Args:
            agent_type: its pool.
            instance_id: its name.
            wait: seconds at most.

        Returns:
            True when it bears none, or is not there; False when time was up.
        """
        return self._backend.run(self._operations.wait_until_idle(agent_type, instance_id, wait))
