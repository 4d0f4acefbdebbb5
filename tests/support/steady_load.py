"""Calls at a steady load through a balancer, to instances with a behaviour chosen by the test."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from agentperf_redis.balancer import AgentInstance, LoadBalancer


@dataclass(frozen=True, slots=True)
class CallRecord:
    """The result of a call.

    Attributes:
        number: its position in the order of their start.
        instance: the chosen instance; None when none had capacity.
        outcome: its outcome; "none" when none had capacity.
        seconds: its duration on the instance.
        waited: seconds for which its caller waited: for the lease, the instance, and the release.
        begin: when it began, s by `time.monotonic`.
    """

    number: int
    instance: str | None
    outcome: str
    seconds: float
    waited: float
    begin: float


MAX_AT_ONCE = 10

Behaviour = Callable[[int, AgentInstance], tuple[str, float]]
"""Returns the outcome and the duration in s for a call's number and its instance."""


async def steady(
    balancer: LoadBalancer, count: int, every: float, behave: Behaviour, before: Callable[[int], object]
) -> list[CallRecord]:
    """Start a call every `every` seconds, whatever the state of earlier ones; return all in the order of their start.

    After a stall of the machine, calls start later, not all at once: at most `MAX_AT_ONCE` are in flight, two to three
    times as many as this load needs. `before` is called with the number of each.
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
            return CallRecord(number, None, "none", 0.0, 0.0, begin)
        outcome, seconds = behave(number, instance)
        await asyncio.sleep(seconds)
        await balancer.aio.release(instance, outcome=outcome, response_time=seconds)
        return CallRecord(number, instance.id, outcome, seconds, time.monotonic() - begin, begin)

    tasks = []
    for number in range(count):
        before(number)
        await asyncio.sleep(every)
        await free.acquire()
        tasks.append(asyncio.create_task(one(number)))
    return await asyncio.gather(*tasks)
