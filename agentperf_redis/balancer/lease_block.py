"""`with lb.lease(...)` and `async with lb.aio.lease(...)`: a lease held for a block."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from types import TracebackType
from typing import NoReturn

from agentperf_redis.balancer.flows import blocks
from agentperf_redis.balancer.flows.acquiring import LeaseRequest
from agentperf_redis.balancer.lease import Lease
from agentperf_redis.balancer.operations import Operations
from agentperf_redis.command import running_loop
from agentperf_redis.errors import AgentPerfError, InvalidArgument


class LeaseBlock:
    """Returned by `LoadBalancer.lease`: holds a lease during a `with` block. Reusable, but not in nested blocks."""

    def __init__(self, operations: Operations, agent_type: str, request: LeaseRequest) -> None:
        self._backend = operations.backend
        self._operations = operations
        self._pool = operations.pool(agent_type)
        self._request = request
        self._lease: Lease | None = None

    def __enter__(self) -> Lease:
        if self._lease is not None:
            raise InvalidArgument("lease", self._lease, "one block at a time; call lease() again for another")
        self._lease = self._backend.run(self._operations.enter(self._pool, self._request))
        return self._lease

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            self._backend.run(blocks.leave(self._operations.keeper, lease, error))

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a lease block has no {name!r}; enter it first: `with lb.lease(...) as lease`")

    async def __aenter__(self) -> NoReturn:
        raise TypeError("in a coroutine use `async with lb.aio.lease(...)`")

    async def __aexit__(self, *_: object) -> None:
        """Never called. Without this method, `async with` would raise Python's own error, not that of `__aenter__`."""


class AsyncLeaseBlock:
    """`LeaseBlock` for `async with`."""

    def __init__(self, operations: Operations, agent_type: str, request: LeaseRequest) -> None:
        self._backend = operations.backend
        self._operations = operations
        self._pool = operations.pool(agent_type)
        self._request = request
        self._lease: Lease | None = None

    async def __aenter__(self) -> Lease:
        if self._lease is not None:
            raise InvalidArgument("lease", self._lease, "one block at a time; call lease() again for another")
        self._lease = await self._backend.arun(self._operations.enter(self._pool, self._request))
        self._backend.call_at_loop_end(self._lease, partial(self._cut_off, self._lease))
        return self._lease

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lease, self._lease = self._lease, None
        if isinstance(error, GeneratorExit):  # the coroutine is being destroyed, so nothing can be awaited
            if lease is not None:
                # Garbage collection may destroy the coroutine on a thread without a running loop.
                if running_loop() is not None:
                    self._backend.forget_loop_end(lease)
                self._operations.keeper.jobs.put(partial(self._cut_off, lease))
        elif lease is not None:
            self._backend.forget_loop_end(lease)
            await self._backend.arun(blocks.leave(self._operations.keeper, lease, error))

    def _cut_off(self, lease: Lease) -> None:
        """Release the lease: the event loop has ended within the block, so the block will never continue."""
        with contextlib.suppress(AgentPerfError):
            self._backend.run(blocks.leave(self._operations.keeper, lease, asyncio.CancelledError()))

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a lease block has no {name!r}; enter it first: `async with lb.aio.lease(...) as lease`")

    def __enter__(self) -> NoReturn:
        raise TypeError("use `async with lb.aio.lease(...)`; outside coroutines, `with lb.lease(...)`")

    def __exit__(self, *_: object) -> None:
        """Never called. Without this method, `with` would raise Python's own error, not that of `__enter__`."""
