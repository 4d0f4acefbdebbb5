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
        number: its position in the order in which the calls started.
        instance: the chosen instance; None if no instance had capacity.
        outcome: the outcome of the call; "none" if no instance had capacity.
        seconds: duration of the call on the instance.
        waited: seconds for which the caller waited in total: for the lease, the instance and the release.
        begin: the start of the call, in s of `time.monotonic`.
    """

    number: int
    instance: str | None
    outcome: str
    seconds: float
    waited: float
    begin: float


MAX_AT_ONCE = 10

Behaviour = Callable[[int, AgentInstance], tuple[str, float]]
"""A function that gets the number and the instance of a call, and returns the call's outcome and duration, s."""


async def steady(
    balancer: LoadBalancer, count: int, every: float, behave: Behaviour, before: Callable[[int], object]
) -> list[CallRecord]:
    """Start a call every `every` seconds, and return all calls in the order of their start.

    A call does not wait for earlier calls, but at most `MAX_AT_ONCE` calls are in flight. This limit is two to three
    times as high as the load needs. Because of the limit, calls delayed by a stall of the machine do not
    all start at once. `before` is called with the number of each call before the call starts.
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
