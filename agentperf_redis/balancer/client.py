"""The balancer's public API: `LoadBalancer`, and its asyncio counterpart as `aio`."""

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
    """Shares agent instances among all processes: picks an instance and leases one unit of its capacity, atomically.

    Connects on the first call, not before.

    Args:
        strategy: how pools pick. The first registration fixes it for the pool: LEAST_LOADED when this is None. A
            different one for an existing pool raises InvalidArgument; None accepts each pool's own.
        settings: health settings for the pools in which this balancer registers instances. The settings deployed last
            apply to all processes; a change is logged. None keeps a pool's settings; a new pool gets the defaults of
            `PoolSettings`.
        on_unavailable: how `acquire`, `lease`, `select_instance` and `release` behave while the server is unreachable.
            "raise": BackendUnavailable. "none": None, NoCapacity, None and False, in that order.
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
        """The asyncio counterpart of this balancer: every call that does I/O is awaited."""
        return self._aio

    @property
    def strategy(self) -> LoadBalancingStrategy:
        """The strategy of the pools that this balancer creates."""
        return self._operations.wanted or LoadBalancingStrategy.LEAST_LOADED

    @property
    def instances(self) -> dict[str, list[AgentInstance]]:
        """A snapshot of all instances by agent type. Reads the server; changing the dict has no effect."""
        return self._backend.run(self._operations.instances())

    def register_instance(
        self,
        instance: AgentInstance,
        *,
        heartbeat_ttl: float | None = None,
        requests_per_minute: float = math.inf,
        tokens_per_minute: float = math.inf,
    ) -> None:
        """Add an instance to its pool, or change its capacity, weight, labels and rates if it is registered already.

        Its load, health and measurements stay. `is_healthy=False` marks it unhealthy, which `mark_healthy` undoes.
        `is_draining=True` drains it, which `undrain` undoes. While this process lives, it registers the instance again
        if the server loses it.

        Args:
            instance: the instance; its current_load is ignored, since load follows from leases.
            heartbeat_ttl: seconds without a `heartbeat` after which it takes no work; None: no heartbeat is expected.
            requests_per_minute: max leases a minute; the pool's `rate_burst` limits how many are granted at once.
            tokens_per_minute: max tokens a minute, as counted by the `tokens` of `acquire` and `release`.

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
        """Change an instance; arguments that are None stay. Leases beyond a smaller capacity end normally.

        Args:
            agent_type: its pool.
            instance_id: its name.
            max_capacity: max concurrent leases, at least 1. Resets the adaptive concurrency limit.
            weight: its share under WEIGHTED, 0 to 10^6.
            labels: its capabilities, at most 16.
            requests_per_minute: see `register_instance`; math.inf for no limit.
            tokens_per_minute: see `register_instance`; math.inf for no limit.

        Returns:
            Whether it is registered.
        """
        rates = (requests_per_minute, tokens_per_minute)
        return self._backend.run(self._operations.update(agent_type, instance_id, max_capacity, weight, labels, rates))

    def remove_instance(self, agent_type: str, instance_id: str) -> bool:
        """Remove an instance from its pool: it gets no new leases. Its leases may still be renewed and released.

        Args:
            agent_type: its pool.
            instance_id: its name.

        Returns:
            Whether it was registered.
        """
        return self._backend.run(self._operations.remove(agent_type, instance_id))

    def mark_healthy(self, agent_type: str, instance_id: str) -> bool:
        """Make an instance take work again, and clear its ejection and failed checks. Returns if it is registered."""
        return self._backend.run(self._operations.mark(agent_type, instance_id, off=BETTER))

    def mark_unhealthy(self, agent_type: str, instance_id: str) -> bool:
        """Give an instance no new work until it is marked healthy. Returns whether it is registered."""
        return self._backend.run(self._operations.mark(agent_type, instance_id, on="unhealthy"))

    def drain(self, agent_type: str, instance_id: str) -> bool:
        """Let an instance finish its leases and give it no new ones. Returns whether it is registered."""
        return self._backend.run(self._operations.mark(agent_type, instance_id, on="draining"))

    def undrain(self, agent_type: str, instance_id: str) -> bool:
        """Undo `drain`. Returns whether it is registered."""
        return self._backend.run(self._operations.mark(agent_type, instance_id, off="draining"))

    def heartbeat(self, agent_type: str, *instance_ids: str, within: float | None = None) -> list[str]:
        """Report that instances are alive. An instance that missed its heartbeat takes work again.

        Args:
            agent_type: their pool.
            instance_ids: their names.
            within: seconds until the next heartbeat is due. None: the `heartbeat_ttl` of each, or 30.

        Returns:
            Instances that are not registered; the caller should register them again.
        """
        return self._backend.run(self._operations.heartbeat(agent_type, instance_ids, within))

    def select_instance(
        self, agent_type: str, *, require: Collection[str] = (), affinity: str | None = None
    ) -> AgentInstance | None:
        """Return the instance that `acquire` would pick now, without leasing it. It may be full a moment later.

        Args:
            agent_type: the pool.
            require: the instance must have all of these labels.
            affinity: see `acquire`.

        Returns:
            A snapshot, or None when no instance has free capacity.
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
        """Pick an instance and lease one unit of its capacity. End the lease with `release`.

        The lease is renewed in the background while the returned object lives. If this process dies, the capacity
        becomes free after at most `ttl`.

        Args:
            agent_type: the pool.
            wait: max seconds in the queue when no instance has free capacity; the queue is first in, first out.
                math.inf for no limit.
            priority: moves this call ahead in the queue, as if it had arrived this many seconds earlier.
            require: the instance must have all of these labels.
            affinity: calls with the same value go to the same instance under CONSISTENT_HASH; a session's name, say.
            ttl: seconds after which the lease expires without renewal, at least 0.05.
            max_hold: seconds after which the lease is not renewed again; math.inf for no limit.
            on_lost: called with a LeaseLost, on a background thread, if the lease ends before it is released.
            tokens: expected tokens of the work, counted against the instance's tokens a minute.
            fallback: other agent types to try, in this order, for free capacity when this pool has none: at once, and
                again when `wait` is over. Labels and affinity apply there too; each pool uses its own strategy.

        Returns:
            A snapshot of the instance, carrying its lease; None when no capacity was free, or became free in `wait`.

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
        """Release a lease and report the outcome of the work.

        Args:
            instance: the return value of `acquire`, None included, or its lease.
            outcome: "ok", "error", "timeout", "rejected", or "neutral" when it says nothing about the instance.
            response_time: seconds the work took, if measured.
            tokens: tokens the work used; None for the number given to `acquire`.

        Returns:
            True when this call freed the unit; False when the lease had been released or had expired before.

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
        """Hold a lease for a `with` block, measure the response time and report the outcome.

        An exception that leaves the block is an error, a TimeoutError a timeout; `lease.outcome` overrides that.

        Args:
            agent_type: the pool.
            wait: see `acquire`.
            priority: see `acquire`.
            require: the instance must have all of these labels.
            affinity: see `acquire`.
            ttl: seconds after which the lease expires without renewal, at least 0.05.
            max_hold: seconds after which the lease is not renewed again; math.inf for no limit.
            on_lost: called with a LeaseLost, on a background thread, if the lease ends before the block.
            tokens: see `acquire`; set `lease.tokens_used` to the number that was used.
            fallback: see `acquire`; `lease.agent_type` is the pool of the lease.

        Returns:
            A context manager that yields a `Lease`. Entering raises NoCapacity when no instance has free capacity.
            Leaving raises LeaseLost when the block succeeded but its lease was lost while it ran.
        """
        return LeaseBlock(
            self._operations,
            agent_type,
            self._operations.request(wait, priority, require, affinity, ttl, max_hold, on_lost, tokens, fallback),
        )

    def configure(self, agent_type: str, settings: PoolSettings) -> None:
        """Set the settings of a pool, for all processes at once. Changed settings are logged.

        Args:
            agent_type: the pool; it need not have instances yet.
            settings: its new settings.
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

        Any number of processes may run checks: they share the work, and if one dies the others continue. The pool's
        settings say how many results in a row disable or enable an instance. A child process must start its own checks.

        A process claims each check for one interval. A check that is unfinished when its process ends, or whose task is
        cancelled, is skipped once. A shorter interval applies to an instance from its next check on, which is still due
        by the longer one.

        Args:
            agent_type: the pool.
            check: called with an instance; the check fails when it raises, returns False or exceeds `timeout`. The
                first exception is logged, and again the first one after a time in which no check raised.
            interval: seconds from one check of an instance to the next. Five: three failures take at most 15 s.
            timeout: max seconds of one check, at most the interval. None: two, or the interval if that is shorter.

        Returns:
            The running checks. `checks.stop()`, the end of a `with` block and closing the client stop them.
        """
        return Checks(self._operations.checking(agent_type, check, interval, timeout))

    def events(self, agent_type: str, *, after: str | None = None, limit: int = 100) -> list[PoolEvent]:
        """Return the events of a pool, oldest first; the server keeps about the last thousand.

        Args:
            agent_type: the pool.
            after: the cursor of an event: returns the first `limit` events after it. None: the last `limit` events.
            limit: max number of events.
        """
        return self._backend.run(self._operations.events(agent_type, after, limit))

    def get_status(self) -> dict[str, Any]:
        """Return the instances, capacity and load of each agent type, in the format of the in-memory version."""
        return rendered(self.status())

    def status(self, *agent_types: str) -> list[PoolStatus]:
        """Return typed snapshots of pools; `get_status` renders them as dicts.

        Args:
            agent_types: the pools; none for all.
        """
        return self._backend.run(self._operations.status(agent_types))

    def leases(self, agent_type: str) -> PoolLeases:
        """Return the leases and the queue of a pool.

        Args:
            agent_type: the pool.

        Returns:
            Leases with their holders and ages, and the waiters in queue order.
        """
        return self._backend.run(self._operations.leases(agent_type))

    def release_token(self, agent_type: str, token: str) -> bool:
        """End a lease of any process by its token, for operators. Its holder gets LeaseLost at the next renewal.

        Args:
            agent_type: the pool.
            token: as `leases` shows it.

        Returns:
            Whether it held capacity until now.
        """
        return self._backend.run(self._operations.end_lease(agent_type, token))

    def repair(self, agent_type: str, *, progress: Callable[[int, int], None] | None = None) -> Repaired:
        """Recompute the load of all instances from their leases, and rewrite indexes and sums.

        Normal operation never needs it: it repairs manual changes of the keys. The pool may stay in use.
        Lost timers of ejections, rates and slow starts are set again. A lost heartbeat timer cannot be recomputed: a
        missed heartbeat is detected only after the next heartbeat has arrived.

        Args:
            agent_type: the pool.
            progress: called with the number of instances done and their total, after each page of 500.

        Returns:
            The counts of instances and errors found.
        """
        return self._backend.run(self._operations.repair(agent_type, progress))

    def wait_until_idle(self, agent_type: str, instance_id: str, *, wait: float = math.inf) -> bool:
        """Wait until an instance has no leases, usually after `drain`.

        Args:
            agent_type: its pool.
            instance_id: its name.
            wait: max seconds to wait; math.inf for no limit.

        Returns:
            True when it has none or is not registered; False when `wait` was over first.
        """
        return self._backend.run(self._operations.wait_until_idle(agent_type, instance_id, wait))
