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
from agentperf_redis.cache.flows import CacheFlows
from agentperf_redis.cache.model import ttl_ms
from agentperf_redis.cache.names import stored_name, stored_tags
from agentperf_redis.cache.reading import MISSING
from agentperf_redis.cache.single_flight import SingleFlight
from agentperf_redis.cache.turns import Served, Turn
from agentperf_redis.command import Flow
from agentperf_redis.errors import AgentPerfError, BackendUnavailable

R = TypeVar("R")


def compute(
    backend: Backend,
    flows: CacheFlows,
    chores: Chores,
    key: str,
    function: Callable[[], R],
    ttl: float | None,
    tags: tuple[str, ...],
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
        ttl: life of the value, seconds; checked.
        tags: names by which it can be invalidated; checked.
        look: False computes although there is a value.
        unstorable: called if the value cannot be stored; by default a RuntimeWarning is given.
    """
    if look and flows.reader.local is not None:
        copied = flows.reader.copied(key)
        if copied is not MISSING:
            return cast("R", copied)
    flight = flows.single_flight
    try:
        answer = flight.turn_alone(key) if flight.rests else backend.run(flight.answer_or_turn(key, look=look))
    except BackendUnavailable as error:  # known before the flow began
        answer = flight.without_it(key, error)
    if isinstance(answer, Served):
        return cast("R", answer.value)
    begun = time.perf_counter()
    chores.keep(answer)
    try:
        value = function()
    except Exception as error:
        chores.drop(answer)
        _finish(backend, flight, answer, flight.crash(answer, error))
        raise
    except BaseException:
        chores.drop(answer)
        _finish(backend, flight, answer, flight.give_up(answer))
        raise
    try:
        storable, rest = flight.land(answer, value, time.perf_counter() - begun, ttl, tags)
        _finish(backend, flight, answer, rest)
    finally:
        chores.drop(answer)
        flight.let_go(answer)
    if not storable:
        (unstorable or _warn)()
    return value


async def compute_async(
    backend: Backend,
    flows: CacheFlows,
    chores: Chores,
    key: str,
    function: Callable[[], R | Awaitable[R]],
    ttl: float | None,
    tags: tuple[str, ...],
    *,
    look: bool = True,
    unstorable: Callable[[], None] | None = None,
) -> R:
    """Do as `compute`; what the function returns is awaited if need be."""
    if look and flows.reader.local is not None:
        copied = flows.reader.copied(key)
        if copied is not MISSING:
            return cast("R", copied)
    flight = flows.single_flight
    try:
        answer = flight.turn_alone(key) if flight.rests else await backend.arun(flight.answer_or_turn(key, look=look))
    except BackendUnavailable as error:
        answer = flight.without_it(key, error)
    if isinstance(answer, Served):
        return cast("R", answer.value)
    begun = time.perf_counter()
    chores.keep(answer)
    # shielded: neither the first cancellation nor a second one must keep others waiting
    try:
        result = function()
        value = cast("R", await result if inspect.isawaitable(result) else result)
    except Exception as error:
        chores.drop(answer)
        await asyncio.shield(_finish_async(backend, flight, answer, flight.crash(answer, error)))
        raise
    except BaseException:
        chores.drop(answer)
        await asyncio.shield(_finish_async(backend, flight, answer, flight.give_up(answer)))
        raise
    try:
        storable, rest = flight.land(answer, value, time.perf_counter() - begun, ttl, tags)
    except BaseException:
        chores.drop(answer)
        flight.let_go(answer)
        raise
    await asyncio.shield(_finish_async(backend, flight, answer, rest))
    chores.drop(answer)
    if not storable:
        (unstorable or _warn)()
    return value


def checked(key: str, ttl: float | None, tags: Iterable[str]) -> tuple[str, ...]:
    """Refuse bad arguments before the function is called; return the tags."""
    stored_name(key)
    ttl_ms("ttl", ttl)
    kept = tags if isinstance(tags, (str, bytes)) or not isinstance(tags, Iterable) else tuple(tags)
    stored_tags(kept)
    return cast("tuple[str, ...]", kept)


def _finish(backend: Backend, flight: SingleFlight, turn: Turn, rest: Flow[None]) -> None:
    """Tell the server how a turn ended. If it cannot be told, the lease ends by itself: the caller has his result."""
    if not turn.token:
        return
    try:
        backend.run(rest)
    except AgentPerfError as error:
        flight.binding.complain("cache %s: could not finish: %s", flight.binding.name, error)


async def _finish_async(backend: Backend, flight: SingleFlight, turn: Turn, rest: Flow[None]) -> None:
    if not turn.token:
        return
    try:
        await backend.arun(rest)
    except AgentPerfError as error:
        flight.binding.complain("cache %s: could not finish: %s", flight.binding.name, error)
    finally:
        flight.let_go(turn)


def _warn() -> None:
    warnings.warn("the computed value cannot be stored and is returned uncached", RuntimeWarning, stacklevel=4)
