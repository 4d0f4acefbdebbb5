"""Calls at a steady load through a balancer, with instances that behave as a test says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from agentperf_redis.balancer import AgentInstance, LoadBalancer


@dataclass(frozen=True, slots=True)
class CallRecord:
    """What became of a call.

    Attributes:
        number: its place in the order of their beginning.
        instance: where it went; None when none had room.
        outcome: how it ended; "none" when none had room.
        seconds: it took, as the instance made it.
        waited: seconds for which its caller waited: for the lease, for the instance, and for giving the lease back.
    """

    number: int
    instance: str | None
    outcome: str
    seconds: float
    waited: float


MAX_AT_ONCE = 10

Behaviour = Callable[[int, AgentInstance], tuple[str, float]]
"""Says, of a call's number and its instance, how it ends and how many seconds it takes."""


async def steady(
    balancer: LoadBalancer, count: int, every: float, behave: Behaviour, before: Callable[[int], object]
) -> list[CallRecord]:
    """Begin a call every so many seconds, whatever became of those before; return all, in the order of their beginning.

    A machine that is held up begins them later, not all at once: no more than `MAX_AT_ONCE` are ever under way, which
    are two to three times as many as there are at that load. `before` is called with the number of each.
    """
    free = asyncio.Semaphore(MAX_AT_ONCE)

    async def one(number: int) -> CallRecord:
        try:
            return await made(number)
        finally:
            free.release()

    async def made(number: int) -> CallRecord:
        begin = time.monotonic()
        instance = await balancer.aio.acquire("planner")
        if instance is None:
            return CallRecord(number, None, "none", 0.0, 0.0)
        outcome, seconds = behave(number, instance)
        await asyncio.sleep(seconds)
        await balancer.aio.release(instance, outcome=outcome, response_time=seconds)
        return CallRecord(number, instance.id, outcome, seconds, time.monotonic() - begin)

    tasks = []
    for number in range(count):
        before(number)
        await asyncio.sleep(every)
        await free.acquire()
        tasks.append(asyncio.create_task(one(number)))
    return await asyncio.gather(*tasks)
