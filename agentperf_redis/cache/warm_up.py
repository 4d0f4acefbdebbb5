"""Warm-up: computes many values before they are needed, a bounded number at a time.

To compute a value, a warm-up takes the same lease that a reader takes. So nothing is computed twice, even if several
processes warm the same keys at once or readers request these keys meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

from agentperf_redis import arguments
from agentperf_redis.backend import Backend
from agentperf_redis.cache.compute import Wanted, accepted, computing, copied, wanted
from agentperf_redis.cache.flows import CacheFlows
from agentperf_redis.cache.freshness import FreshnessOptions
from agentperf_redis.cache.maintenance import Maintenance
from agentperf_redis.command import Flow, Together
from agentperf_redis.errors import BackendUnavailable, InvalidArgument

DEFAULT_CONCURRENCY = 8
MAX_CONCURRENCY = 256


@dataclass(frozen=True, slots=True)
class WarmUpStatus:
    """The progress of a warm-up.

    Attributes:
        done: number of values finished so far. Each of them is available now, or could not be computed.
        total: number of values requested; None if it is not known beforehand, as for a generator.
        computed: number of values that this call has computed. The other values existed already, or another caller
            computed them.
        errors: exceptions of the function, by key.
    """

    done: int = 0
    total: int | None = None
    computed: int = 0
    errors: Mapping[str, Exception] = field(default_factory=dict)


OnProgress: TypeAlias = Callable[[WarmUpStatus], object]


class _Count:
    """The values still to compute and the progress so far. Progress is reported by one thread at a time."""

    def __init__(self, wanted: Iterator[Wanted[Any]], total: int | None, progress: OnProgress | None) -> None:
        self._wanted = wanted
        self._total = total
        self._progress = progress
        self._lock = threading.Lock()
        self._done = self._computed = 0
        self._errors: dict[str, Exception] = {}
        self.fatal: BaseException | None = None

    def next(self) -> tuple[Wanted[Any], list[bool]] | None:
        """Return the next value and a list; calling the value's function adds an item to the list. None at the end."""
        with self._lock:
            if self.fatal is not None:
                return None
            wanted = next(self._wanted, None)
        if wanted is None:
            return None
        computed: list[bool] = []

        def function() -> Any:
            computed.append(True)
            return wanted.function()

        return replace(wanted, function=function, source=wanted.source or wanted.function), computed

    def finished(self, key: str, computed: list[bool], error: Exception | None = None) -> None:
        with self._lock:
            self._done += 1
            if error is not None:
                self._errors[key] = error
            else:
                self._computed += bool(computed)
            if self._progress is not None:
                arguments.refuse_unfinished("progress", self._progress, self._progress(self.report()))

    def stop(self, error: BaseException) -> None:
        """Begin no further computations, and keep the error for the caller."""
        with self._lock:
            self.fatal = self.fatal or error

    def result(self) -> WarmUpStatus:
        """Return the final status, or raise the error that ended the warm-up early."""
        if self.fatal is not None:
            raise self.fatal
        return self.report()

    def report(self) -> WarmUpStatus:
        return WarmUpStatus(self._done, self._total, self._computed, dict(self._errors))


def warm(
    backend: Backend,
    flows: CacheFlows,
    maintenance: Maintenance,
    wanted: Iterator[Wanted[Any]],
    total: int | None,
    concurrency: int,
    progress: OnProgress | None,
) -> WarmUpStatus:
    """Compute the missing values, on `concurrency` threads.

    Args:
        backend: runs the flows.
        flows: the flows of the cache.
        maintenance: renews the leases during the computations.
        wanted: the requested values; the iterator is consumed as needed.
        total: number of values, if known.
        concurrency: maximum number of values computed at a time, already checked.
        progress: called after each value.

    Raises:
        BackendUnavailable: the server does not answer, so no value would be stored.
        Exception: the iterator or the progress callback has failed.
    """
    count = _Count(wanted, total, progress)
    backend.run(warming(count, flows, maintenance, concurrency, blocking=True))
    return count.result()


async def warm_async(
    backend: Backend,
    flows: CacheFlows,
    maintenance: Maintenance,
    wanted: Iterator[Wanted[Any]],
    total: int | None,
    concurrency: int,
    progress: OnProgress | None,
) -> WarmUpStatus:
    """Do the same as `warm`, in `concurrency` tasks."""
    count = _Count(wanted, total, progress)
    await backend.arun(warming(count, flows, maintenance, concurrency, blocking=False))
    return count.result()


def warming(
    count: _Count, flows: CacheFlows, maintenance: Maintenance, concurrency: int, *, blocking: bool
) -> Flow[None]:
    """Compute the missing values, `concurrency` at a time. An error that ends the warm-up early is kept in `count`."""
    raising = flows.raising()
    try:
        work = tuple(_working(count, raising, maintenance, blocking=blocking) for _ in range(concurrency))
        yield from Together(work, "agentperf-warm")
    except BaseException as error:  # on Ctrl-C too, start no further functions; running functions end in the background
        count.stop(error)
        if not isinstance(error, Exception):
            raise


def _working(count: _Count, flows: CacheFlows, maintenance: Maintenance, *, blocking: bool) -> Flow[None]:
    """Compute one value after another until none is left."""
    try:
        while (step := count.next()) is not None:
            each, computed = step
            try:
                copy = copied(flows, each)
                accepted(each, (yield from computing(flows, maintenance, each, copy, look=True, blocking=blocking)))
            except BackendUnavailable:
                raise
            except Exception as error:  # noqa: BLE001  any error of the user's function
                count.finished(each.key, computed, error)
            else:
                count.finished(each.key, computed)
    except BaseException as error:
        count.stop(error)
        raise


def each_wanted(
    items: Iterable[str],
    function: Callable[[str], Any],
    ttl: float | None,
    tags: Iterable[str],
    concurrency: int,
    progress: OnProgress | None,
    freshness: FreshnessOptions,
) -> tuple[Iterator[Wanted[Any]], int | None, int]:
    """Check the arguments of `warm_up`; return the values to compute, their number if known, and the concurrency."""
    keys, total, concurrency = checked(items, concurrency, progress)
    if not callable(function):
        raise InvalidArgument("function", function, "a function that computes the value of a key")
    pattern = wanted("", lambda: None, ttl, tags, freshness)
    each = (replace(pattern, key=_checked_key(key), function=partial(function, key)) for key in keys)
    return each, total, concurrency


def checked(items: object, concurrency: object, progress: object) -> tuple[Iterable[Any], int | None, int]:
    """Check a user's arguments; return the items, their number if known, and the concurrency."""
    if isinstance(items, (str, bytes)) or not isinstance(items, Iterable):
        raise InvalidArgument("items", items, "an iterable, such as a list")
    if progress is not None:
        arguments.callback("progress", progress, "a function that takes a WarmUpStatus, or None")
    total = len(items) if isinstance(items, Sized) else None
    return items, total, arguments.count("concurrency", concurrency, maximum=MAX_CONCURRENCY)


def _checked_key(key: object) -> str:
    return arguments.cache_key("items", key)
