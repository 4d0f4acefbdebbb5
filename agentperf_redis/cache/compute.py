"""Calling the function behind a missing value: the one place where users' code runs, so it is no flow."""

from __future__ import annotations

import asyncio
import inspect
import time
import warnings
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from agentperf_redis.backend import Backend
from agentperf_redis.cache.arguments import stored_name, stored_tags
from agentperf_redis.cache.flows import CacheFlows
from agentperf_redis.cache.flows.reads import MISSING
from agentperf_redis.cache.flows.single_flight import SingleFlight
from agentperf_redis.cache.freshness import UNTIL_EXPIRY, Age, Freshness
from agentperf_redis.cache.maintenance import Chores
from agentperf_redis.cache.model import WithoutServer, ttl_ms
from agentperf_redis.cache.process.compute_lease import Turn
from agentperf_redis.cache.process.flights import enter, leave
from agentperf_redis.cache.process.refresher import Refresher, Subject
from agentperf_redis.command import Flow
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, InvalidArgument, shown

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


@dataclass(slots=True)  # not frozen: one is made for each call, and that doubles what it takes
class Wanted(Generic[R_co]):
    """A value that somebody wants, and how it comes about.

    Attributes:
        key: of the value; checked.
        function: computes it; what it returns is awaited by asyncio callers if need be.
        ttl: life of the value, seconds; checked.
        tags: names by which it can be invalidated; checked.
        freshness: when it is computed anew.
        unstorable: called if the value cannot be stored; by default a RuntimeWarning is given.
    """

    key: str
    function: Callable[[], R_co | Awaitable[R_co]]
    ttl: float | None = None
    tags: tuple[str, ...] = ()
    freshness: Freshness = UNTIL_EXPIRY
    unstorable: Callable[[], None] | None = None


def compute(backend: Backend, flows: CacheFlows, chores: Chores, wanted: Wanted[R], *, look: bool = True) -> R:
    """Return a value, computing it if it is this caller's turn.

    Args:
        backend: where flows run.
        flows: of the cache.
        chores: renews the lease meanwhile.
        wanted: the value.
        look: False computes although there is a value.
    """
    flight = flows.single_flight
    value, stale = _copied(flows, wanted) if look and flows.reader.local is not None else (MISSING, 0)
    if value is MISSING:
        try:
            answer = backend.run(flight.answer_or_turn(wanted.key, wanted.freshness, look=look, blocking=True))
        except BackendUnavailable:
            if flight.on_unavailable is WithoutServer.RAISE or not backend.closed:
                raise
            answer = flight.turn_alone(wanted.key)  # the flow did not begin
        if isinstance(answer, Turn):
            return _carry_out(backend, flows, chores, wanted, answer)
        value, stale = answer.value, answer.stale
    if stale:
        _refresher(backend).submit(_subject(flows, wanted), lambda: _refresh(backend, flows, chores, wanted, stale))
    return cast("R", value)


async def compute_async(
    backend: Backend, flows: CacheFlows, chores: Chores, wanted: Wanted[R], *, look: bool = True
) -> R:
    """Do as `compute`; what the function returns is awaited if need be."""
    flight = flows.single_flight
    value, stale = _copied(flows, wanted) if look and flows.reader.local is not None else (MISSING, 0)
    if value is MISSING:
        try:
            answer = await backend.arun(flight.answer_or_turn(wanted.key, wanted.freshness, look=look))
        except BackendUnavailable:
            if flight.on_unavailable is WithoutServer.RAISE or not backend.closed:
                raise
            answer = flight.turn_alone(wanted.key)
        if isinstance(answer, Turn):
            return await _carry_out_async(backend, flows, chores, wanted, answer)
        value, stale = answer.value, answer.stale
    if stale:
        _refresher(backend).spawn(
            _subject(flows, wanted), lambda: _refresh_async(backend, flows, chores, wanted, stale)
        )
    return cast("R", value)


def _copied(flows: CacheFlows, wanted: Wanted[Any]) -> tuple[Any, int]:
    """Return the value of the copy within this process, or MISSING, and its version if it is due. No I/O."""
    local = flows.reader.local
    copy = None if local is None else local.find(wanted.key, counted=False)
    if local is None or copy is None:
        return MISSING, 0
    value = copy.value if copy.frozen else flows.reader.unpacked(copy)
    due = 0
    if copy.fresh_until_ms or wanted.freshness.early:
        age = wanted.freshness.age(copy, flows.binding.server_ms())
        if age is Age.OLD:  # of the failures that make it useless only the server knows
            return MISSING, 0
        due = copy.version if age is Age.DUE else 0
    if value is not MISSING:
        local.count(copy)
    return value, due


def _carry_out(backend: Backend, flows: CacheFlows, chores: Chores, wanted: Wanted[R], turn: Turn) -> R:
    """Call the function, tell all who wait and the server what it brought, and return it."""
    flight = flows.single_flight
    begun = time.perf_counter()
    chores.keep(turn)
    around = enter(turn.flight)
    try:
        value = cast("R", wanted.function())
    except Exception as error:
        chores.drop(turn)
        _finish(backend, flight, turn, flight.crash(turn, error))
        raise
    except BaseException:
        chores.drop(turn)
        _finish(backend, flight, turn, flight.give_up(turn))
        raise
    finally:
        leave(around)
    try:
        took_s = time.perf_counter() - begun
        storable, rest = flight.land(turn, value, took_s, wanted.ttl, wanted.tags, wanted.freshness)
        _finish(backend, flight, turn, rest)
    finally:
        chores.drop(turn)
        flight.let_go(turn)
    if not storable:
        if inspect.iscoroutine(value) and wanted.unstorable is None:
            value.close()
            allowed = "a blocking function; what returns a coroutine is awaited by the same method under .aio"
            raise InvalidArgument("function", wanted.function, allowed)
        (wanted.unstorable or _warn)()
    return value


async def _carry_out_async(backend: Backend, flows: CacheFlows, chores: Chores, wanted: Wanted[R], turn: Turn) -> R:
    flight = flows.single_flight
    begun = time.perf_counter()
    chores.keep(turn)
    around = enter(turn.flight)
    # shielded: neither the first cancellation nor a second one must keep others waiting
    try:
        result = wanted.function()
        value = cast("R", await result if inspect.isawaitable(result) else result)
    except Exception as error:
        chores.drop(turn)
        await asyncio.shield(_finish_async(backend, flight, turn, flight.crash(turn, error)))
        raise
    except BaseException:
        chores.drop(turn)
        await asyncio.shield(_finish_async(backend, flight, turn, flight.give_up(turn)))
        raise
    finally:
        leave(around)
    try:
        took_s = time.perf_counter() - begun
        storable, rest = flight.land(turn, value, took_s, wanted.ttl, wanted.tags, wanted.freshness)
    except BaseException:
        chores.drop(turn)
        flight.let_go(turn)
        raise
    await asyncio.shield(_finish_async(backend, flight, turn, rest))
    chores.drop(turn)
    if not storable:
        (wanted.unstorable or _warn)()
    return value


def _refresher(backend: Backend) -> Refresher:
    return backend.share("cache refreshes", lambda: Refresher(backend))


def _subject(flows: CacheFlows, wanted: Wanted[Any]) -> Subject:
    return flows.binding.keys.tag, wanted.key


def _refresh(backend: Backend, flows: CacheFlows, chores: Chores, wanted: Wanted[Any], stale: int) -> None:
    """Compute a value anew, if that falls to this process. Readers are served the old one and hear of no errors."""
    try:
        turn = backend.run(flows.single_flight.turn_to_refresh(wanted.key, stale, wanted.freshness))
        if turn is not None:
            _carry_out(backend, flows, chores, wanted, turn)
    except Exception as error:  # noqa: BLE001  whatever the user's function raises
        _complain(flows, wanted, error)


async def _refresh_async(backend: Backend, flows: CacheFlows, chores: Chores, wanted: Wanted[Any], stale: int) -> None:
    try:
        turn = await backend.arun(flows.single_flight.turn_to_refresh(wanted.key, stale, wanted.freshness))
        if turn is not None:
            await _carry_out_async(backend, flows, chores, wanted, turn)
    except Exception as error:  # noqa: BLE001  as above
        _complain(flows, wanted, error)


def _complain(flows: CacheFlows, wanted: Wanted[Any], error: Exception) -> None:
    flows.binding.complain(
        "cache %s: %s could not be computed anew, the value it had is served: %s: %s",
        *(flows.binding.name, shown(wanted.key), type(error).__name__, error),
    )


def wanted(
    key: str,
    function: Callable[[], R | Awaitable[R]],
    ttl: float | None,
    tags: Iterable[str],
    options: Mapping[str, Any],
) -> Wanted[R]:
    """Refuse bad arguments before the function is called; `options` are `FreshnessOptions`."""
    stored_name(key)
    if not callable(function):
        raise InvalidArgument("function", function, "a function without arguments that computes the value")
    ttl_ms("ttl", ttl)
    kept = tags if isinstance(tags, (str, bytes)) or not isinstance(tags, Iterable) else tuple(tags)
    stored_tags(kept)
    return Wanted(key, function, ttl, cast("tuple[str, ...]", kept), Freshness.of(options, ttl))


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
