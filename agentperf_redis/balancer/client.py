"""The balancer's public API: `LoadBalancer`, and its asyncio counterpart as `aio`."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

from agentperf_redis import arguments
from agentperf_redis.backend import Backend, chosen_backend
from agentperf_redis.balancer.async_client import AsyncLoadBalancer
from agentperf_redis.balancer.flows.acquiring import DEFAULT_MAX_HOLD_S, DEFAULT_TTL_S
from agentperf_redis.balancer.flows.queue import queues_of
from agentperf_redis.balancer.health_checks import Checks
from agentperf_redis.balancer.history import PoolSeriesRow
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
from agentperf_redis.windows import Timestamp, Window


class LoadBalancer:
    """Shares agent instances among all processes: picks an instance and leases one unit of its capacity, atomically.

    Connects to the server on the first call.

    Args:
        strategy: how a pool picks an instance. The first registration in a pool sets the pool's strategy to this one.
            Calls on a pool with another strategy raise InvalidArgument. With None, a new pool gets LEAST_LOADED, and
            calls on any pool are accepted.
        settings: health settings for the pools in which this balancer registers instances. If processes pass different
            settings, the settings that were sent last apply to all processes. A change is logged. None keeps the
            settings of an existing pool; a new pool gets the defaults of `PoolSettings`.
        on_unavailable: what calls do while the server is unreachable. "raise": they raise BackendUnavailable. "none":
            `acquire` and `select_instance` return None, `lease` raises NoCapacity, `release` returns False, and all
            other calls raise BackendUnavailable.
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
        """Check a strategy: a LoadBalancingStrategy, its value, or None for any strategy."""
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
        """A snapshot of all instances by agent type. Each access reads the server; changing the dict has no effect."""
        return self._backend.run(self._operations.instances())

    def register_instance(
        self,
        instance: AgentInstance,
        *,
        heartbeat_ttl: float | None = None,
        requests_per_minute: float = math.inf,
        tokens_per_minute: float = math.inf,
        shards: int | None = None,
    ) -> None:
        """Add an instance to its pool, or change the capacity, weight, labels and rate limits of a registered one.

        A registered instance keeps its load, health and measurements. `is_healthy=False` marks the instance unhealthy
        (undo with `mark_healthy`); `is_draining=True` drains it (undo with `undrain`). As long as this process lives,
        it registers the instance again whenever the server has lost the instance.

        Args:
            instance: the instance; its current_load is ignored, because the server computes the load from leases.
            heartbeat_ttl: the instance takes no work after this many seconds without a `heartbeat`; None: no heartbeat
                is expected.
            requests_per_minute: max leases per minute; the pool's `rate_burst` limits how many are granted at once.
            tokens_per_minute: max tokens per minute. The argument `tokens` of `acquire` and `release` is the number of
                tokens of one lease.
            shards: the number of shards of the pool; see `configure_pool`. With None, an existing pool keeps its number
                of shards, and a new pool gets one shard.

        Raises:
            InvalidArgument: when the pool has another strategy than this balancer, or another number of shards than
                `shards`.
        """
        self._backend.run(
            self._operations.register(instance, heartbeat_ttl, requests_per_minute, tokens_per_minute, shards)
        )

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
        """Change an instance. An argument that is None keeps the old value.

        If the new capacity is lower than the load, the existing leases stay valid.

        Args:
            agent_type: the pool of the instance.
            instance_id: the name of the instance.
            max_capacity: max concurrent leases, at least 1. Resets the adaptive concurrency limit.
            weight: relative share of the picks under WEIGHTED, 0 to 10^6.
            labels: capabilities of the instance, at most 16 names.
            requests_per_minute: see `register_instance`; math.inf for no limit.
            tokens_per_minute: see `register_instance`; math.inf for no limit.

        Returns:
            Whether the instance is registered.
        """
        rates = (requests_per_minute, tokens_per_minute)
        return self._backend.run(self._operations.update(agent_type, instance_id, max_capacity, weight, labels, rates))

    def remove_instance(self, agent_type: str, instance_id: str) -> bool:
        """Remove an instance from its pool: it gets no new leases. Its leases may still be renewed and released.

        A process that registered the instance registers it again in one case only: the process could not reach the
        server for more than a minute, and meanwhile another process removed the last instance of the pool.

        Args:
            agent_type: the pool of the instance.
            instance_id: the name of the instance.

        Returns:
            Whether the instance was registered.
        """
        return self._backend.run(self._operations.remove(agent_type, instance_id))

    def delete_pool(self, agent_type: str) -> bool:
        """Delete a pool at once: its instances, leases, queue, settings, events and history.

        The processes that registered the instances do not register them again, if they reach the server within a
        minute. Holders of leases get LeaseLost at their next renewal. Waiters stay in the queue until their `wait` is
        over, because other instances may be registered meanwhile.

        There is no need to delete a pool that is no longer used. Its keys disappear a minute after its last instance
        was removed and its last lease and waiter ended. Settings made with `configure` are kept for a day.

        Args:
            agent_type: the pool.

        Returns:
            Whether the pool existed.
        """
        return self._backend.run(self._operations.delete_pool(agent_type))

    def mark_healthy(self, agent_type: str, instance_id: str) -> bool:
        """Let an instance take work again.

        This undoes `mark_unhealthy`, and ends an ejection, a rest and a slow start. It also clears failed checks and a
        missed heartbeat.

        Returns:
            Whether the instance is registered.
        """
        return self._backend.run(self._operations.mark(agent_type, instance_id, off=BETTER))

    def mark_unhealthy(self, agent_type: str, instance_id: str) -> bool:
        """Stop new work on an instance until it is marked healthy. Returns whether the instance is registered."""
        return self._backend.run(self._operations.mark(agent_type, instance_id, on="unhealthy"))

    def drain(self, agent_type: str, instance_id: str) -> bool:
        """Give an instance no new leases; its present leases may finish. Returns whether the instance is registered."""
        return self._backend.run(self._operations.mark(agent_type, instance_id, on="draining"))

    def undrain(self, agent_type: str, instance_id: str) -> bool:
        """Undo `drain`. Returns whether the instance is registered."""
        return self._backend.run(self._operations.mark(agent_type, instance_id, off="draining"))

    def cool_down(self, agent_type: str, instance_id: str, seconds: float) -> bool:
        """Let an instance rest: for this number of seconds, no process leases it.

        `release(outcome="rate_limited", retry_after=...)` does the same. Existing leases stay valid. If a rest overlaps
        another rest, the later end applies. A rest is not a failure, so it counts towards neither ejection nor panic.
        A resting instance gets no active checks. If all instances rest, `NoCapacity.retry_after` is the time until the
        first rest ends.

        Args:
            agent_type: the pool of the instance.
            instance_id: the name of the instance.
            seconds: length of the rest, 0.001 to 86,400.

        Returns:
            Whether the instance is registered.
        """
        return self._backend.run(self._operations.cool_down(agent_type, instance_id, seconds))

    def heartbeat(self, agent_type: str, *instance_ids: str, within: float | None = None) -> list[str]:
        """Report that instances are alive. An instance that missed its heartbeat takes work again.

        Args:
            agent_type: the pool of the instances.
            instance_ids: the names of the instances.
            within: seconds until the next heartbeat is due. None: the `heartbeat_ttl` of each instance, or 30 if it was
                registered without one.

        Returns:
            The names of the instances that are not registered; the caller should register them again.
        """
        return self._backend.run(self._operations.heartbeat(agent_type, instance_ids, within))

    def select_instance(
        self, agent_type: str, *, require: Collection[str] = (), affinity: str | None = None
    ) -> AgentInstance | None:
        """Return the instance that `acquire` would pick now, without leasing it.

        The instance may be full a moment later.

        Args:
            agent_type: the pool.
            require: labels; the instance must have all of them.
            affinity: see `acquire`.

        Returns:
            A snapshot of the instance, or None when no instance has free capacity.
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

        A background thread renews the lease while the returned object is referenced. If this process dies, the capacity
        becomes free after at most `ttl`.

        Args:
            agent_type: the pool.
            wait: max seconds in the queue when no instance has free capacity; math.inf for no limit. The queue is
                first in, first out. In a pool with several shards, each shard has its own queue; see `configure_pool`.
            priority: moves this call ahead in the queue, as if it had arrived this many seconds earlier.
            require: labels; the instance must have all of them.
            affinity: under CONSISTENT_HASH, calls with the same value, such as the name of a session, go to the same
                instance.
            ttl: seconds, at least 0.05, after which the lease expires unless it is renewed.
            max_hold: seconds after which the lease is no longer renewed; math.inf for no limit.
            on_lost: called with a LeaseLost, on a background thread, if the lease ends before it is released.
            tokens: expected tokens of the work, counted against the instance's tokens per minute.
            fallback: other agent types, tried in this order when this pool has no free capacity. They are tried once
                before the wait in the queue, and again when `wait` is over. `require` and `affinity` also apply to
                these pools. Each pool uses its own strategy.

        Returns:
            A snapshot of the instance, which carries the lease; or None when no capacity became free within `wait`.

        Raises:
            InvalidArgument: when the strategy of the pool differs from that of this balancer.
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
        retry_after: float | None = None,
    ) -> bool:
        """Release a lease and report the outcome of the work.

        Args:
            instance: the return value of `acquire`, which may be None; or the lease.
            outcome: "ok", "error", "timeout", "rejected", "rate_limited", or "neutral" when the result says nothing
                about the instance. After "rate_limited", the instance rests, as after `cool_down`.
            response_time: seconds that the work took, if measured.
            tokens: number of tokens that the work used; None for the number passed to `acquire`.
            retry_after: seconds that the instance rests after the outcome "rate_limited", 0 to 86,400. The answer of
                the instance often names this number. None for five seconds.

        Returns:
            True when this call freed the unit; False when `instance` is None, or when the lease had already ended.

        Raises:
            InvalidArgument: for an instance that carries no lease, such as one from `select_instance`.
        """
        return self._backend.run(self._operations.release(instance, outcome, response_time, tokens, retry_after))

    def acquire_many(
        self,
        agent_type: str,
        count: int,
        *,
        all_or_none: bool = False,
        wait: float = NO_WAIT,
        priority: int = 0,
        require: Collection[str] = (),
        affinity: str | None = None,
        ttl: float = DEFAULT_TTL_S,
        max_hold: float = DEFAULT_MAX_HOLD_S,
        on_lost: OnLost | None = None,
        tokens: int = 0,
        fallback: Collection[str] = (),
    ) -> list[AgentInstance]:
        """Lease up to `count` units of a pool in one round trip. End the leases with `release_many`, or one by one.

        As with `acquire`, the strategy picks an instance for each lease, and each lease is renewed and has a fencing
        token. In a pool with one shard, the server grants all leases in one step. A pool with several shards usually
        needs one step and one round trip for each shard that grants leases. In such a pool, a call with `all_or_none`
        releases its leases if it gets too few.

        Args:
            agent_type: the pool.
            count: the number of leases, 1 to 500.
            all_or_none: whether the call gets either `count` leases of one pool or none. If False, it gets up to
                `count` leases, as many as units are free.
            wait: max seconds in the queue when no unit is free; math.inf for no limit. As soon as the call gets its
                first unit, it returns this unit and the other units that are free at that time. With `all_or_none`, the
                call cannot wait, because free units would have to be kept idle until there are enough.
            priority: see `acquire`.
            require: labels; each instance must have all of them.
            affinity: see `acquire`; the same for all leases.
            ttl: see `acquire`.
            max_hold: see `acquire`.
            on_lost: see `acquire`; called for each lease that is lost.
            tokens: expected tokens of the work on one lease.
            fallback: other agent types, tried in this order for the leases that are missing. With `all_or_none`, all
                leases are of the first pool that has enough free units.

        Returns:
            A snapshot for each lease, which carries the lease; empty when no capacity became free within `wait`. An
            instance may occur several times.

        Raises:
            InvalidArgument: when the strategy of the pool differs from that of this balancer.
        """
        request = self._operations.request(wait, priority, require, affinity, ttl, max_hold, on_lost, tokens, fallback)
        return self._backend.run(self._operations.acquire_many(agent_type, count, request, all_or_none))

    def release_many(
        self,
        instances: Iterable[AgentInstance | AttachedLease],
        *,
        outcome: Outcome | str = Outcome.OK,
        response_time: float | None = None,
    ) -> list[bool]:
        """Release leases in one round trip, and report the outcome of their work.

        Args:
            instances: the return value of `acquire_many`, or instances from `acquire`, or leases.
            outcome: see `release`. A lease whose `outcome` was set reports that outcome instead. After "rate_limited",
                the instance rests for the `retry_after` of the lease.
            response_time: seconds that the work on each lease took, if measured.

        Returns:
            For each lease: whether this call freed the unit, see `release`.

        Raises:
            BackendUnavailable: when a lease could not be released. The call has tried to release all leases. Failed
                releases are retried in the background.
        """
        return self._backend.run(self._operations.release_many(instances, outcome, response_time))

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

        If an exception leaves the block, its type decides the outcome: "timeout" for a TimeoutError, "neutral" for a
        cancellation or KeyboardInterrupt, "error" for other exceptions. Set `lease.outcome` to report another outcome.
        For the outcome "rate_limited", also set `lease.retry_after`.

        Args:
            agent_type: the pool.
            wait: see `acquire`.
            priority: see `acquire`.
            require: labels; the instance must have all of them.
            affinity: see `acquire`.
            ttl: seconds, at least 0.05, after which the lease expires unless it is renewed.
            max_hold: seconds after which the lease is no longer renewed; math.inf for no limit.
            on_lost: called with a LeaseLost, on a background thread, if the lease ends before the block ends.
            tokens: see `acquire`; set `lease.tokens_used` to the number of tokens that the work used.
            fallback: see `acquire`; `lease.agent_type` is the pool of the lease.

        Returns:
            A context manager that yields a `Lease`. Entering raises NoCapacity when no instance has free capacity.
            Leaving raises LeaseLost when the block succeeded but the lease was lost while the block ran.
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
            settings: the new settings of the pool.
        """
        self._backend.run(self._operations.configure(agent_type, settings))

    def configure_pool(self, agent_type: str, *, shards: int) -> None:
        """Divide a pool into shards, before its first instance is registered.

        All keys of a pool with one shard lie on one node of a Cluster. One node serves some 15,000 pairs of acquire and
        release per second. With several shards, the instances are spread over several nodes; each instance lies in one
        shard. A call prefers a shard with a large share of free capacity, as last reported to this process. The call
        tries all shards before it waits or gives up.

        No instance is ever leased beyond its capacity, as with one shard. Other promises hold only within a shard: the
        strategy picks among the instances of one shard, and the queue of each shard is first in, first out. A waiter
        has a place in the queue of one shard. It moves to another shard when that shard has free capacity. Panic, slow
        start and the limit on ejected instances apply to each shard separately, so a shard should have ten instances or
        more.

        Args:
            agent_type: the pool.
            shards: the number of shards, 1 to 256. Two to four times the number of nodes is a good choice.

        Raises:
            InvalidArgument: when the pool has another number of shards, or another strategy. The number can be changed
                after `delete_pool`, or when all instances have been removed.
        """
        self._backend.run(self._operations.configure_pool(agent_type, shards))

    def run_checks(
        self,
        agent_type: str,
        check: Callable[[AgentInstance], object],
        *,
        interval: float = 5.0,
        timeout: float | None = None,
    ) -> Checks:
        """Check each instance of a pool once per interval, on background threads, until the checks are stopped.

        Any number of processes may run checks: they share the work, and if one process dies, the others continue. The
        pool's settings say how many failed checks in a row disable an instance, and how many passed checks in a row
        enable it again. A child process must start its own checks.

        A process claims each check for one interval. If the process ends or the task is cancelled before the check is
        finished, the instance misses this check. If the interval is shortened, the next check of each instance is still
        due at the time set by the old interval. The new interval applies from then on.

        Args:
            agent_type: the pool.
            check: called with an instance; the check fails when the function raises, returns False or exceeds
                `timeout`. The first exception is logged as a warning. Further exceptions are logged at DEBUG level
                until the most recent check of each instance has raised no exception.
            interval: seconds from one check of an instance to the next. The default is 5 s. With this interval, the
                three failures in a row that the default `unhealthy_threshold` requires take at most 15 s.
            timeout: max seconds of one check, at most the interval. None: 2 s, or the interval if it is shorter.

        Returns:
            The running checks. They end with `checks.stop()`, at the end of a `with` block, or when the client closes.
        """
        return Checks(self._operations.checking(agent_type, check, interval, timeout))

    def events(self, agent_type: str, *, after: str | None = None, limit: int = 100) -> list[PoolEvent]:
        """Return the events of a pool, oldest first; the server keeps about the last thousand.

        Args:
            agent_type: the pool.
            after: the cursor of an event; the call returns the first `limit` events after that event. With None, it
                returns the last `limit` events.
            limit: max number of events.

        The events of a pool with several shards are ordered by the clocks of the shards' servers. A call with the
        argument `after` may miss an event if these clocks differ. It may also miss an event if two shards have events
        in the same millisecond, and one of these events is recorded after the call. If the first `limit` events all
        have the same cursor, the call returns all events with this cursor.
        """
        return self._backend.run(self._operations.events(agent_type, after, limit))

    def series(
        self, agent_type: str, *, window: Window = "1h", step: Window = "1m", as_of: Timestamp = None
    ) -> tuple[PoolSeriesRow, ...]:
        """Return the history of a pool: one row for each step, oldest first.

        While processes lease from the pool, one of them samples it every ten seconds. Slices of 10 s are kept for 15
        minutes, slices of 1 min for 3 hours, and slices of 1 h for 8 days.

        Args:
            agent_type: the pool.
            window: length of the window, in seconds or as ``"5m"``, ``"1h"``, ``"3d"``.
            step: length of a step, in the same form: a multiple of ten seconds, at most the window, and at least
                1/2000 of the window. Steps begin at multiples of their length since 1970 (UTC).
            as_of: end of the window: a datetime (local time if it has no zone), or seconds since 1970; None for now.

        Raises:
            InvalidArgument: for an invalid argument, and if slices as narrow as the step are not kept for the whole
                window.
        """
        return self._backend.run(self._operations.series(agent_type, window, step, as_of))

    def get_status(self) -> dict[str, Any]:
        """Return the instances, capacity and load of each agent type, as dicts like those of the in-memory version."""
        return rendered(self.status())

    def status(self, *agent_types: str) -> list[PoolStatus]:
        """Return typed snapshots of pools; `get_status` renders them as dicts.

        Args:
            agent_types: the pools; without arguments, all pools.
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
        """For operators: end the lease with this token in any process. Its holder gets LeaseLost at the next renewal.

        Args:
            agent_type: the pool.
            token: the token of the lease, as `leases` shows it.

        Returns:
            Whether the lease held capacity until this call.
        """
        return self._backend.run(self._operations.end_lease(agent_type, token))

    def repair(self, agent_type: str, *, progress: Callable[[int, int], None] | None = None) -> Repaired:
        """Recompute the loads of all instances from their leases, and rewrite the pool's indexes and sums.

        Normal operation never needs a repair. A repair corrects the effects of manual changes to the keys. The pool may
        stay in use meanwhile. Lost timers of ejections, rate limits and slow starts are set again. A lost heartbeat
        timer cannot be recomputed: until the next `heartbeat` of the instance, a missed heartbeat is not detected.

        Args:
            agent_type: the pool.
            progress: called after each page of 500 instances, with the number of instances done and the number of all
                instances.

        Returns:
            The numbers of instances checked, of wrong loads, and of orphans deleted; `Repaired` explains them.
        """
        return self._backend.run(self._operations.repair(agent_type, progress))

    def wait_until_idle(self, agent_type: str, instance_id: str, *, wait: float = math.inf) -> bool:
        """Wait until an instance has no leases, usually after `drain`.

        Args:
            agent_type: the pool of the instance.
            instance_id: the name of the instance.
            wait: max seconds to wait; math.inf for no limit.

        Returns:
            True when the instance has no leases or is not registered; False when `wait` is over first.
        """
        return self._backend.run(self._operations.wait_until_idle(agent_type, instance_id, wait))
