"""Computes missing values: of all callers that need a value, one calls the function, and the others get its result."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, MethodType
from typing import Any, Generic, TypeVar, cast

from agentperf_redis import arguments
from agentperf_redis.backend import Backend
from agentperf_redis.cache.arguments import stored_name, stored_tags
from agentperf_redis.cache.flows import CacheFlows
from agentperf_redis.cache.flows.reads import MISSING
from agentperf_redis.cache.flows.single_flight import SingleFlight
from agentperf_redis.cache.freshness import UNTIL_EXPIRY, Age, Freshness
from agentperf_redis.cache.maintenance import Maintenance
from agentperf_redis.cache.model import ttl_ms
from agentperf_redis.cache.process.compute_lease import Answer, ComputeLease, Served
from agentperf_redis.cache.process.flights import Crashed, enter, leave
from agentperf_redis.cache.process.refresher import Refresher
from agentperf_redis.codec.value_path import PLACE, path_of
from agentperf_redis.command import Call, Flow, Shielded
from agentperf_redis.errors import AgentPerfError, InvalidArgument, shown

BLOCKING = (
    "a blocking function here; if it returns an awaitable, use the same method under .aio, or declare a decorated "
    "function with async def"
)
"""Text for errors: the functions that a blocking computation accepts."""
UNSTORABLE = "returned a value that cannot be stored, so its values are returned uncached"
_MAX_WARNED = 1024
_warned: dict[object, object] = {}
"""The functions whose values could not be stored, by their code, file and line. Each caused one warning."""

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


@dataclass(slots=True)  # not frozen: each call creates an object, and creating a frozen one takes twice as long
class Wanted(Generic[R_co]):
    """A requested value and the means to compute it.

    Attributes:
        key: key of the value; already checked.
        function: computes the value; asyncio callers await the result if it is awaitable.
        ttl: TTL of the value, seconds; already checked.
        tags: names by which the value can be invalidated; already checked.
        freshness: when the value is refreshed.
        source: the user's function, if `function` wraps it; None if `function` is the user's own.
        unstorable: called with the reason if the value cannot be stored. By default a RuntimeWarning is issued, once
            for each function.
    """

    key: str
    function: Callable[[], R_co | Awaitable[R_co]]
    ttl: float | None = None
    tags: tuple[str, ...] = ()
    freshness: Freshness = UNTIL_EXPIRY
    source: Callable[..., object] | None = None
    unstorable: Callable[[str], None] | None = None


def compute(
    backend: Backend, flows: CacheFlows, maintenance: Maintenance, wanted: Wanted[R], *, look: bool = True
) -> R:
    """Return a value; compute it if this caller gets the compute lease.

    Args:
        backend: runs the flows.
        flows: the flows of the cache.
        maintenance: renews the lease during the computation.
        wanted: the requested value.
        look: False computes the value even if one is stored.
    """
    copy = copied(flows, wanted) if look else None  # this look-up costs less than starting a flow
    if copy is not None and not copy.stale:
        return cast("R", copy.value)
    return accepted(wanted, backend.run(computing(flows, maintenance, wanted, copy, look=look, blocking=True)))


async def compute_async(
    backend: Backend, flows: CacheFlows, maintenance: Maintenance, wanted: Wanted[R], *, look: bool = True
) -> R:
    """Do the same as `compute`, on the running loop. If the function returns an awaitable, await it."""
    copy = copied(flows, wanted) if look else None
    if copy is not None and not copy.stale:
        return cast("R", copy.value)
    return accepted(wanted, await backend.arun(computing(flows, maintenance, wanted, copy, look=look, blocking=False)))


def accepted(wanted: Wanted[R], answer: Served | Crashed) -> R:
    """Return the value, or raise the function's error. Issues a warning if the value could not be stored."""
    if isinstance(answer, Crashed):
        raise answer.error
    if answer.refused is not None:
        reason = _in_words(answer.value, answer.refused)
        if wanted.unstorable is not None:
            wanted.unstorable(reason)
        else:
            _warn_once(wanted.source or wanted.function, reason)
    return cast("R", answer.value)


def computing(
    flows: CacheFlows, maintenance: Maintenance, wanted: Wanted[Any], copy: Served | None, *, look: bool, blocking: bool
) -> Flow[Served | Crashed]:
    """Return a value, or the error of its function. Compute the value if this caller gets the compute lease.

    An error of the function is returned, not raised: a flow is a generator, and a StopIteration cannot propagate out of
    a generator.

    Args:
        flows: the flows of the cache.
        maintenance: renews the lease during the computation.
        wanted: the requested value.
        copy: the result of `copied`.
        look: False computes the value even if one is stored.
        blocking: True if the caller is a thread, False if it is an asyncio task.
    """
    single_flight = flows.single_flight
    answer: Answer | Crashed | None = copy
    if answer is None:
        answer = yield from single_flight.value_or_lease(wanted.key, wanted.freshness, look=look, blocking=blocking)
    if isinstance(answer, ComputeLease):
        return (yield from _compute_under_lease(single_flight, maintenance, wanted, answer, blocking=blocking))
    if isinstance(answer, Served) and answer.stale:
        return (yield from _refreshed(flows, maintenance, wanted, answer, blocking=blocking))
    return answer


def _refreshed(
    flows: CacheFlows, maintenance: Maintenance, wanted: Wanted[Any], stale: Served, *, blocking: bool
) -> Flow[Served]:
    """Return a stale value, and begin to refresh it in the background.

    If the end of an event loop has cut off the previous refresh, an asyncio caller refreshes the value itself and
    returns the new value. A refresh in the background could be cut off again, because the caller's own loop may also
    end early.
    """
    backend, subject = flows.shared.backend, (flows.shared.keys.tag, wanted.key)
    refresher = backend.share("cache refreshes", lambda: Refresher(backend))
    flow = refreshing(flows, maintenance, wanted, stale.stale, blocking=blocking)
    if blocking:
        refresher.submit(subject, lambda: backend.run(flow))
    elif not refresher.enter(subject):
        refresher.spawn(subject, lambda: backend.arun(flow))
    else:
        cut_off = True
        try:
            new = yield from flow
            # If `new` is None, this task did not get the lease. The refresh that was cut off may still have the lease.
            # So the key stays marked as cut off.
            cut_off = new is None
            if isinstance(new, Served):
                return Served(new.value)  # `refreshing` has warned if the value cannot be stored
        finally:
            refresher.leave(subject, cut_off=cut_off)
    return stale


def refreshing(
    flows: CacheFlows, maintenance: Maintenance, wanted: Wanted[Any], stale: int, *, blocking: bool
) -> Flow[Served | Crashed | None]:
    """Refresh a value if this process gets the lease. If the refresh fails, a warning is logged; readers see no error.

    Returns the new value, or the error of the refresh, or None if this process did not get the lease.
    """
    try:
        compute_lease = yield from flows.single_flight.refresh_lease(wanted.key, stale, wanted.freshness)
        if compute_lease is None:
            return None
        new = yield from _compute_under_lease(
            flows.single_flight, maintenance, wanted, compute_lease, blocking=blocking
        )
        accepted(wanted, new)
        return new
    except Exception as error:  # noqa: BLE001  any error of the user's function
        flows.shared.warn(
            "cache %s: %s could not be refreshed, its old value is still returned: %s: %s",
            *(flows.shared.name, shown(wanted.key), type(error).__name__, error),
        )
        return Crashed(error)


def _compute_under_lease(
    single_flight: SingleFlight,
    maintenance: Maintenance,
    wanted: Wanted[Any],
    compute_lease: ComputeLease,
    *,
    blocking: bool,
) -> Flow[Served | Crashed]:
    """Call the function, report its result to all waiters and to the server, and return it.

    The report is a shielded flow: it runs to its end even if the caller is cancelled several times. Waiters are
    therefore always released: they get the result, or compute the value themselves. A computed value is stored even if
    no local caller waits for it any more. Only a flow that is closed (`GeneratorExit`) sends no report.
    """
    begun = time.perf_counter()
    try:
        maintenance.keep(compute_lease)
        enclosing = enter(compute_lease.flight)
        try:
            value = yield Call(wanted.function)
        finally:
            leave(enclosing)
        if blocking:
            arguments.refuse_awaitable("function", wanted.source or wanted.function, value, BLOCKING)
    except Exception as error:  # noqa: BLE001  the error is returned to the caller
        maintenance.drop(compute_lease)
        yield from Shielded(_end(single_flight, maintenance, compute_lease, single_flight.crash(compute_lease, error)))
        return Crashed(error)
    except BaseException as error:
        maintenance.drop(compute_lease)
        rest = single_flight.give_up(compute_lease)
        if not isinstance(error, GeneratorExit):
            yield from Shielded(_end(single_flight, maintenance, compute_lease, rest))
        raise
    try:
        took_s = time.perf_counter() - begun
        refused, rest = single_flight.finish(compute_lease, value, took_s, wanted.ttl, wanted.tags, wanted.freshness)
    except BaseException as error:
        maintenance.drop(compute_lease)
        single_flight.release_waiters(compute_lease)
        if isinstance(error, Exception):
            return Crashed(error)
        raise
    yield from Shielded(_end(single_flight, maintenance, compute_lease, rest))
    return Served(value, refused=refused)


def _end(
    single_flight: SingleFlight, maintenance: Maintenance, compute_lease: ComputeLease, rest: Flow[None]
) -> Flow[None]:
    """Report the end of a computation to the server. Then stop renewing its lease, and release its waiters.

    If the report fails, the lease is released later, and the caller still gets its result.
    """
    try:
        if compute_lease.token:
            yield from rest
    except AgentPerfError as error:
        shared = single_flight.shared
        shared.warn("cache %s: the end of a computation could not be reported: %s", shared.name, error)
        shared.shard(compute_lease.name).release_later(compute_lease.name, compute_lease.token, compute_lease.lease_ms)
    finally:
        maintenance.drop(compute_lease)
        single_flight.release_waiters(compute_lease)


def copied(flows: CacheFlows, wanted: Wanted[Any]) -> Served | None:
    """Return the value if a local copy has it, else None. Does no I/O."""
    local = flows.reader.local
    if local is None:
        return None
    copy = local.find(wanted.key, counted=False)
    if copy is None:
        return None
    value, stale = copy.value if copy.frozen else flows.reader.unpacked(copy), 0
    if copy.fresh_until_ms or wanted.freshness.early:
        age = wanted.freshness.age(copy, flows.shared.shard(copy.name).server_ms())
        if age is Age.OLD:  # only the server knows whether the latest computation failed
            return None
        stale = copy.version if age is Age.DUE else 0
    if value is MISSING:
        return None
    local.count(copy)
    return Served(value, stale=stale)


def wanted(
    key: str,
    function: Callable[[], R | Awaitable[R]],
    ttl: float | None,
    tags: Iterable[str],
    options: Mapping[str, Any],
) -> Wanted[R]:
    """Check a user's arguments and return them as a `Wanted`; `options` are `FreshnessOptions`."""
    stored_name(key)
    if not callable(function):
        raise InvalidArgument("function", function, "a function without arguments that computes the value")
    ttl_ms("ttl", ttl)
    kept = tags if isinstance(tags, (str, bytes)) or not isinstance(tags, Iterable) else tuple(tags)
    stored_tags(kept)
    return Wanted(key, function, ttl, cast("tuple[str, ...]", kept), Freshness.of(options, ttl))


def _in_words(value: object, refused: InvalidArgument) -> str:
    """Say which part of a computed value cannot be stored, and why."""
    kind = type(refused.value)
    allowed = refused.allowed.partition(PLACE)[0]
    return f"{path_of(refused.value, value)} is a {kind.__module__}.{kind.__qualname__}; allowed: {allowed}"


def _warn_once(function: object, reason: str) -> None:
    """Warn that the values of a function cannot be stored. Functions made from the same code cause only one warning."""
    while isinstance(function, (functools.partial, MethodType)):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    code = getattr(function, "__code__", None)
    named = function if isinstance(function, (type, BuiltinFunctionType)) else type(function)
    if len(_warned) >= _MAX_WARNED:
        _warned.clear()
    mine = object()
    if _warned.setdefault(named if code is None else (code.co_filename, code), mine) is not mine:
        return
    name = getattr(function, "__qualname__", type(function).__qualname__)
    warnings.warn(f"{name} {UNSTORABLE}: {reason}", RuntimeWarning, stacklevel=5)
