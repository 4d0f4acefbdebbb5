"""`track_performance`: one decorator for functions, coroutines, generators and async generators, methods included.

A stream (generator) is recorded once, when it is exhausted, closed or failed; one that its consumer closes early has
done its work. Time runs from the first item asked for to the end. A cancelled task is an outcome of its own.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from time import perf_counter
from typing import Any, ParamSpec, TypeVar, cast

from agentperf_redis import arguments
from agentperf_redis.metrics.client import MetricsCollector

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
        InvalidArgument: for a name that cannot be.
    """
    arguments.name("agent_name", agent_name)

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


def note_failure(collector: MetricsCollector, agent_name: str, seconds: float, error: BaseException) -> None:
    """Record an execution that ended with an exception."""
    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        collector.record_cancellation(agent_name, seconds)
    else:
        collector.record_execution(agent_name, seconds, success=False, error_type=error_name(error))


def error_name(error: BaseException) -> str:
    """Return the name of an exception's class, short enough to be recorded."""
    return type(error).__name__[: arguments.MAX_NAME_CHARACTERS]


def _function(func: Callable[..., Any], agent_name: str, collector: MetricsCollector) -> Callable[..., Any]:
    record = collector.record_execution

    @functools.wraps(func)
    def tracked(*args: Any, **kwargs: Any) -> Any:
        start = perf_counter()
        try:
            result = func(*args, **kwargs)
        except BaseException as error:
            note_failure(collector, agent_name, perf_counter() - start, error)
            raise
        record(agent_name, perf_counter() - start, True)
        return result

    return tracked


def _coroutine(
    func: Callable[..., Awaitable[Any]], agent_name: str, collector: MetricsCollector
) -> Callable[..., Awaitable[Any]]:
    record = collector.record_execution

    @functools.wraps(func)
    async def tracked(*args: Any, **kwargs: Any) -> Any:
        start = perf_counter()
        try:
            result = await func(*args, **kwargs)
        except BaseException as error:
            note_failure(collector, agent_name, perf_counter() - start, error)
            raise
        record(agent_name, perf_counter() - start, True)
        return result

    return tracked


class _Stream:
    """Times one run of a generator."""

    __slots__ = ("_agent_name", "_collector", "_start")

    def __init__(self, agent_name: str, collector: MetricsCollector) -> None:
        self._agent_name = agent_name
        self._collector = collector
        self._start = perf_counter()

    def ended(self) -> None:
        """It was exhausted, or closed by its consumer."""
        self._collector.record_execution(self._agent_name, perf_counter() - self._start, success=True)

    def failed(self, error: BaseException) -> None:
        """It raised."""
        note_failure(self._collector, self._agent_name, perf_counter() - self._start, error)


def _stream(
    func: Callable[..., Generator[Any, Any, Any]], agent_name: str, collector: MetricsCollector
) -> Callable[..., Generator[Any, Any, Any]]:
    @functools.wraps(func)
    def tracked(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        stream = _Stream(agent_name, collector)
        try:
            result = yield from func(*args, **kwargs)
        except GeneratorExit:
            stream.ended()
            raise
        except BaseException as error:
            stream.failed(error)
            raise
        stream.ended()
        return result

    return tracked


def _async_stream(
    func: Callable[..., AsyncGenerator[Any, Any]], agent_name: str, collector: MetricsCollector
) -> Callable[..., AsyncGenerator[Any, Any]]:
    @functools.wraps(func)
    async def tracked(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        stream = _Stream(agent_name, collector)
        inner = func(*args, **kwargs)
        try:
            # What `yield from` does for generators (PEP 380), for which async generators have no word.
            item = await anext(inner)
            while True:
                try:
                    sent = yield item
                except GeneratorExit:
                    await inner.aclose()
                    raise
                except BaseException as error:  # noqa: BLE001  thrown in by the consumer, for the inner one to handle
                    item = await inner.athrow(error)
                else:
                    item = await inner.asend(sent)
        except StopAsyncIteration:
            stream.ended()
        except GeneratorExit:
            stream.ended()
            raise
        except BaseException as error:
            stream.failed(error)
            raise

    return tracked
