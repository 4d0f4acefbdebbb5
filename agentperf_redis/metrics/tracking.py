"""`track_performance`: one decorator for functions, coroutines, generators and async generators, methods included.

A stream (generator) is recorded once, when it is exhausted, closed or failed; one that its consumer closes early has
done its work. Time runs from the first item asked for to the end. A cancelled task is an outcome of its own.

Each call is an open execution while it runs, so that `MetricsCollector.span` nests within it; for a stream that is the
time it works on an item, not the time its consumer takes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from time import perf_counter
from typing import Any, ParamSpec, TypeVar, cast

from agentperf_redis import arguments
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.metrics.client import MetricsCollector
from agentperf_redis.metrics.spans import not_recorded

P = ParamSpec("P")
R = TypeVar("R")


def track_performance(agent_name: str, collector: MetricsCollector) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that records every call of what it decorates.

    Args:
        agent_name: the agent to record under.
        collector: where to record.

    Returns:
        A decorator for functions, ``async def``, generators and async generators, also as methods, static or class's.
        What it returns is of the same kind, and passes on arguments, results, exceptions and what is sent.

    Raises:
        InvalidArgument: for a name that cannot be, and for what is no collector.
    """
    arguments.name("agent_name", agent_name)
    if not callable(getattr(collector, "track", None)):
        raise InvalidArgument("collector", collector, "a MetricsCollector, such as perf.metrics")

    def decorator(func: Callable[P, R]) -> Callable[P, R]:
        if isinstance(func, (staticmethod, classmethod)):
            return cast("Callable[P, R]", type(func)(decorator(func.__func__)))
        called = func if inspect.isroutine(func) or isinstance(func, functools.partial) else type(func).__call__
        return cast("Callable[P, R]", _wrapper_for(called)(func, agent_name, collector))

    return decorator


def _wrapper_for(called: Callable[..., Any]) -> Callable[[Any, str, MetricsCollector], Callable[..., Any]]:
    if inspect.isasyncgenfunction(called):
        return _async_stream
    if inspect.iscoroutinefunction(called):
        return _coroutine
    if inspect.isgeneratorfunction(called):
        return _stream
    return _function


def _function(func: Callable[..., Any], agent_name: str, collector: MetricsCollector) -> Callable[..., Any]:
    track = collector.track

    @functools.wraps(func)
    def tracked(*args: Any, **kwargs: Any) -> Any:
        with track(agent_name):
            return func(*args, **kwargs)

    return tracked


def _coroutine(
    func: Callable[..., Awaitable[Any]], agent_name: str, collector: MetricsCollector
) -> Callable[..., Awaitable[Any]]:
    track = collector.track

    @functools.wraps(func)
    async def tracked(*args: Any, **kwargs: Any) -> Any:
        with track(agent_name):
            return await func(*args, **kwargs)

    return tracked


class _Stream:
    """One run of a generator: an execution that is left at each item and entered again for the next."""

    __slots__ = ("_asked", "_first_s", "_items", "_made_s", "_note", "_span", "_start")

    def __init__(self, agent_name: str, collector: MetricsCollector) -> None:
        self._span = collector.track(agent_name)
        self._note = collector.record_stream
        self._items = 0
        self._first_s = 0.0
        self._made_s = 0.0
        self._span.__enter__()
        self._start = self._asked = perf_counter()

    def yields(self) -> None:
        """An item is there; its consumer goes on."""
        now = perf_counter()
        self._items += 1
        if self._items == 1:
            self._first_s = now - self._start
        else:
            self._made_s += now - self._asked
        self._span.suspend()

    def asked(self) -> None:
        """The consumer wants the next item."""
        self._span.resume()
        self._asked = perf_counter()

    def ended(self, error: BaseException | None = None) -> None:
        """It was exhausted or closed, or it raised."""
        failure = None if isinstance(error, GeneratorExit) else error
        self._span.__exit__(type(failure) if failure else None, failure, None)
        if self._items:
            between_s = self._made_s / (self._items - 1) if self._items > 1 else None
            try:
                self._note(self._span.agent_name, self._items, self._first_s, between_s)
            except Exception:  # noqa: BLE001  as in Span.__exit__
                not_recorded(self._span.agent_name)


def _stream(
    func: Callable[..., Generator[Any, Any, Any]], agent_name: str, collector: MetricsCollector
) -> Callable[..., Generator[Any, Any, Any]]:
    @functools.wraps(func)
    def tracked(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        stream = _Stream(agent_name, collector)
        try:
            inner = func(*args, **kwargs)
            # `yield from inner`, written out (PEP 380) to be there at each item.
            item = next(inner)
            while True:
                stream.yields()
                try:
                    sent = yield item
                except GeneratorExit:
                    stream.asked()
                    inner.close()
                    raise
                except BaseException as error:  # noqa: BLE001  thrown in by the consumer, for the inner one to handle
                    stream.asked()
                    item = inner.throw(error)
                else:
                    stream.asked()
                    item = inner.send(sent)
        except StopIteration as end:
            stream.ended()
            return end.value
        except BaseException as error:
            stream.ended(error)
            raise

    return tracked


def _async_stream(
    func: Callable[..., AsyncGenerator[Any, Any]], agent_name: str, collector: MetricsCollector
) -> Callable[..., AsyncGenerator[Any, Any]]:
    @functools.wraps(func)
    async def tracked(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        stream = _Stream(agent_name, collector)
        try:
            inner = func(*args, **kwargs)
            item = await anext(inner)
            while True:
                stream.yields()
                try:
                    sent = yield item
                except GeneratorExit:
                    stream.asked()
                    await inner.aclose()
                    raise
                except BaseException as error:  # noqa: BLE001  as above
                    stream.asked()
                    item = await inner.athrow(error)
                else:
                    stream.asked()
                    item = await inner.asend(sent)
        except StopAsyncIteration:
            stream.ended()
        except BaseException as error:
            stream.ended(error)
            raise

    return tracked
