"""Calling the function behind a missing value: the one place where users' code runs, so it is no flow."""

from __future__ import annotations

import asyncio
import inspect
import time
import warnings
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar, cast

from agentperf_redis.backend import Backend
from agentperf_redis.cache.chores import Chores
from agentperf_redis.cache.flows import CacheFlows, Served, stored_tags
from agentperf_redis.cache.model import ttl_ms

R = TypeVar("R")


def compute(
    backend: Backend,
    flows: CacheFlows,
    chores: Chores,
    key: str,
    function: Callable[[], R],
    ttl: float | None,
    tags: Iterable[str],
    *,
    look: bool = True,
    unstorable: Callable[[], None] | None = None,
) -> R:
    """Return the value of a key, computing it if it is this caller's turn.

    Args:
        backend: where flows run.
        flows: of the cache.
        chores: renews the lease meanwhile.
        key: of the value.
        function: computes it.
        ttl: life of the value, seconds.
        tags: names by which it can be invalidated.
        look: False computes although there is a value.
        unstorable: called if the value cannot be stored; by default a RuntimeWarning is given.
    """
    ttl_ms("ttl", ttl)
    tags = tuple(tags) if stored_tags(tags) else ()
    answer = backend.run(flows.answer_or_turn(key, look=look))
    if isinstance(answer, Served):
        return cast("R", answer.value)
    begun = time.perf_counter()
    chores.keep(answer)
    try:
        value = function()
    except Exception as error:
        chores.drop(answer)
        backend.run(flows.crash(answer, error))
        raise
    except BaseException:
        chores.drop(answer)
        backend.run(flows.give_up(answer))
        raise
    chores.drop(answer)
    if not backend.run(flows.land(answer, value, time.perf_counter() - begun, ttl, tags)):
        (unstorable or _warn)()
    return value


async def compute_async(
    backend: Backend,
    flows: CacheFlows,
    chores: Chores,
    key: str,
    function: Callable[[], R | Awaitable[R]],
    ttl: float | None,
    tags: Iterable[str],
    *,
    look: bool = True,
    unstorable: Callable[[], None] | None = None,
) -> R:
    """Do as `compute`; what the function returns is awaited if need be."""
    ttl_ms("ttl", ttl)
    tags = tuple(tags) if stored_tags(tags) else ()
    answer = await backend.arun(flows.answer_or_turn(key, look=look))
    if isinstance(answer, Served):
        return cast("R", answer.value)
    begun = time.perf_counter()
    chores.keep(answer)
    try:
        result = function()
        value = cast("R", await result if inspect.isawaitable(result) else result)
    except Exception as error:
        chores.drop(answer)
        await asyncio.shield(backend.arun(flows.crash(answer, error)))
        raise
    except BaseException:
        chores.drop(answer)
        await asyncio.shield(backend.arun(flows.give_up(answer)))  # a second cancellation must not keep others waiting
        raise
    chores.drop(answer)
    landing = flows.land(answer, value, time.perf_counter() - begun, ttl, tags)
    if not await asyncio.shield(backend.arun(landing)):
        (unstorable or _warn)()
    return value


def _warn() -> None:
    warnings.warn("the computed value cannot be stored and is returned uncached", RuntimeWarning, stacklevel=4)
