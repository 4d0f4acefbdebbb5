"""`LoadBalancer` for asyncio: the same calls, awaited."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

from agentperf_redis.balancer.flows.acquiring import DEFAULT_MAX_HOLD_S, DEFAULT_TTL_S
from agentperf_redis.balancer.health_checks import run_checks
from agentperf_redis.balancer.history import PoolSeriesRow
from agentperf_redis.balancer.lease_block import AsyncLeaseBlock
from agentperf_redis.balancer.model import (
    AgentInstance,
    AttachedLease,
    Outcome,
    PoolEvent,
    PoolLeases,
    PoolStatus,
    Repaired,
    rendered,
)
from agentperf_redis.balancer.operations import BETTER, NO_WAIT, OnLost, Operations
from agentperf_redis.balancer.settings import PoolSettings
from agentperf_redis.windows import Timestamp, Window


class AsyncLoadBalancer:
    """`LoadBalancer` for asyncio; each method does the same as the method of the same name in `LoadBalancer`."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._backend = operations.backend

    async def register_instance(
        self,
        instance: AgentInstance,
        *,
        heartbeat_ttl: float | None = None,
        requests_per_minute: float = math.inf,
        tokens_per_minute: float = math.inf,
        shards: int | None = None,
    ) -> None:
        """See `LoadBalancer.register_instance`."""
        await self._backend.arun(
            self._operations.register(instance, heartbeat_ttl, requests_per_minute, tokens_per_minute, shards)
        )

    async def update_instance(
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
        """See `LoadBalancer.update_instance`."""
        rates = (requests_per_minute, tokens_per_minute)
        return await self._backend.arun(
            self._operations.update(agent_type, instance_id, max_capacity, weight, labels, rates)
        )

    async def remove_instance(self, agent_type: str, instance_id: str) -> bool:
        """See `LoadBalancer.remove_instance`."""
        return await self._backend.arun(self._operations.remove(agent_type, instance_id))

    async def delete_pool(self, agent_type: str) -> bool:
        """See `LoadBalancer.delete_pool`."""
        return await self._backend.arun(self._operations.delete_pool(agent_type))

    async def mark_healthy(self, agent_type: str, instance_id: str) -> bool:
        """See `LoadBalancer.mark_healthy`."""
        return await self._backend.arun(self._operations.mark(agent_type, instance_id, off=BETTER))

    async def mark_unhealthy(self, agent_type: str, instance_id: str) -> bool:
        """See `LoadBalancer.mark_unhealthy`."""
        return await self._backend.arun(self._operations.mark(agent_type, instance_id, on="unhealthy"))

    async def drain(self, agent_type: str, instance_id: str) -> bool:
        """See `LoadBalancer.drain`."""
        return await self._backend.arun(self._operations.mark(agent_type, instance_id, on="draining"))

    async def undrain(self, agent_type: str, instance_id: str) -> bool:
        """See `LoadBalancer.undrain`."""
        return await self._backend.arun(self._operations.mark(agent_type, instance_id, off="draining"))

    async def cool_down(self, agent_type: str, instance_id: str, seconds: float) -> bool:
        """See `LoadBalancer.cool_down`."""
        return await self._backend.arun(self._operations.cool_down(agent_type, instance_id, seconds))

    async def heartbeat(self, agent_type: str, *instance_ids: str, within: float | None = None) -> list[str]:
        """See `LoadBalancer.heartbeat`."""
        return await self._backend.arun(self._operations.heartbeat(agent_type, instance_ids, within))

    async def select_instance(
        self, agent_type: str, *, require: Collection[str] = (), affinity: str | None = None
    ) -> AgentInstance | None:
        """See `LoadBalancer.select_instance`."""
        return await self._backend.arun(self._operations.select(agent_type, require, affinity))

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
        tokens: int = 0,
        fallback: Collection[str] = (),
    ) -> AgentInstance | None:
        """See `LoadBalancer.acquire`."""
        request = self._operations.request(wait, priority, require, affinity, ttl, max_hold, on_lost, tokens, fallback)
        return await self._backend.arun(self._operations.acquire(agent_type, request))

    async def release(
        self,
        instance: AgentInstance | AttachedLease | None,
        *,
        outcome: Outcome | str = Outcome.OK,
        response_time: float | None = None,
        tokens: int | None = None,
        retry_after: float | None = None,
    ) -> bool:
        """See `LoadBalancer.release`."""
        return await self._backend.arun(self._operations.release(instance, outcome, response_time, tokens, retry_after))

    async def acquire_many(
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
        """See `LoadBalancer.acquire_many`."""
        request = self._operations.request(wait, priority, require, affinity, ttl, max_hold, on_lost, tokens, fallback)
        return await self._backend.arun(self._operations.acquire_many(agent_type, count, request, all_or_none))

    async def release_many(
        self,
        instances: Iterable[AgentInstance | AttachedLease],
        *,
        outcome: Outcome | str = Outcome.OK,
        response_time: float | None = None,
    ) -> list[bool]:
        """See `LoadBalancer.release_many`."""
        return await self._backend.arun(self._operations.release_many(instances, outcome, response_time))

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
    ) -> AsyncLeaseBlock:
        """See `LoadBalancer.lease`; for `async with`."""
        return AsyncLeaseBlock(
            self._operations,
            agent_type,
            self._operations.request(wait, priority, require, affinity, ttl, max_hold, on_lost, tokens, fallback),
        )

    async def configure(self, agent_type: str, settings: PoolSettings) -> None:
        """See `LoadBalancer.configure`."""
        await self._backend.arun(self._operations.configure(agent_type, settings))

    async def configure_pool(self, agent_type: str, *, shards: int) -> None:
        """See `LoadBalancer.configure_pool`."""
        await self._backend.arun(self._operations.configure_pool(agent_type, shards))

    async def run_checks(
        self,
        agent_type: str,
        check: Callable[[AgentInstance], object],
        *,
        interval: float = 5.0,
        timeout: float | None = None,  # noqa: ASYNC109  the timeout of each check, not of this call
    ) -> None:
        """See `LoadBalancer.run_checks`; `check` may be a coroutine function. Runs until the task is cancelled."""
        await run_checks(self._operations.checking(agent_type, check, interval, timeout))

    async def events(self, agent_type: str, *, after: str | None = None, limit: int = 100) -> list[PoolEvent]:
        """See `LoadBalancer.events`."""
        return await self._backend.arun(self._operations.events(agent_type, after, limit))

    async def series(
        self, agent_type: str, *, window: Window = "1h", step: Window = "1m", as_of: Timestamp = None
    ) -> tuple[PoolSeriesRow, ...]:
        """See `LoadBalancer.series`."""
        return await self._backend.arun(self._operations.series(agent_type, window, step, as_of))

    async def get_status(self) -> dict[str, Any]:
        """See `LoadBalancer.get_status`."""
        return rendered(await self.status())

    async def status(self, *agent_types: str) -> list[PoolStatus]:
        """See `LoadBalancer.status`."""
        return await self._backend.arun(self._operations.status(agent_types))

    async def leases(self, agent_type: str) -> PoolLeases:
        """See `LoadBalancer.leases`."""
        return await self._backend.arun(self._operations.leases(agent_type))

    async def release_token(self, agent_type: str, token: str) -> bool:
        """See `LoadBalancer.release_token`."""
        return await self._backend.arun(self._operations.end_lease(agent_type, token))

    async def repair(self, agent_type: str, *, progress: Callable[[int, int], None] | None = None) -> Repaired:
        """See `LoadBalancer.repair`."""
        return await self._backend.arun(self._operations.repair(agent_type, progress))

    async def wait_until_idle(self, agent_type: str, instance_id: str, *, wait: float = math.inf) -> bool:
        """See `LoadBalancer.wait_until_idle`."""
        return await self._backend.arun(self._operations.wait_until_idle(agent_type, instance_id, wait))
