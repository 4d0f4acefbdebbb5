"""`track_performance`: one decorator for functions, coroutines, generators and async generators, including methods.

A stream (generator) is recorded once: when it is exhausted, when it is closed, or when it fails. A stream that its
consumer closes early counts as a success. The time of a stream runs from the first request for an item to the end of
the stream. Cancellation is a separate outcome.

Each call is an open execution while it runs, so spans of `MetricsCollector.span` nest within it. A stream is open only
while it produces an item, and not while its consumer works.

A plain function may return an awaitable, as functions in the clients of model vendors do. The execution then lasts
until the awaitable ends.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Iterator
from time import perf_counter
from typing import Any, ParamSpec, TypeAlias, TypeVar, cast

from agentperf_redis import arguments
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.metrics.client import MetricsCollector
from agentperf_redis.metrics.recording import ExceptionTypes, exception_types
from agentperf_redis.metrics.spans import Span, not_recorded

P = ParamSpec("P")
R = TypeVar("R")

_Note: TypeAlias = Callable[[str, int, float, float | None], None]
"""The signature of `MetricsCollector.record_stream`."""


def track_performance(
    agent_name: str, collector: MetricsCollector, *, not_failures: ExceptionTypes = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that records every call of a function.

    Args:
        agent_name: the agent.
        collector: the collector that records.
        not_failures: an exception class or a tuple of them. These exceptions count as success, because they are used as
            control flow. Examples are GraphInterrupt and ModelRetry.

    Returns:
        A decorator for functions, coroutine functions, generators and async generators. These may be methods, static
        methods or class methods. The decorated function is of the same kind, and forwards arguments, results,
        exceptions and sent values. The decorator raises InvalidArgument for other objects. A decorated tool object, for
        example, would lose its methods.

    Raises:
        InvalidArgument: for an invalid name, collector or exception class.
    """
    arguments.name("agent_name", agent_name)
    if not callable(getattr(collector, "track", None)):
        raise InvalidArgument("collector", collector, "a MetricsCollector, such as perf.metrics")
    kept = exception_types("not_failures", not_failures)
    options = {"not_failures": kept} if kept else {}
    begin = functools.partial(collector.track, agent_name, **options)

    def decorator(func: Callable[P, R]) -> Callable[P, R]:
        if isinstance(func, (staticmethod, classmethod)):
            return cast("Callable[P, R]", type(func)(decorator(func.__func__)))
        called = _called(func)
        return cast("Callable[P, R]", _wrapper_for(called)(func, begin, collector.record_stream))

    return decorator


def _called(func: Any) -> Callable[..., Any]:
    """Return the function that runs when `func` is called. Reject an object that has other public methods."""
    if inspect.isroutine(func) or isinstance(func, functools.partial):
        if callable(func):
            return cast("Callable[..., Any]", func)
    elif callable(func) and not isinstance(func, type) and not any(_public_methods(type(func))):
        return type(func).__call__
    allowed = "a function; for a class or an object with further methods, such as a tool, decorate the method"
    raise InvalidArgument("func", func, allowed)


def _public_methods(cls: type) -> Iterator[str]:
    yield from (name for name in dir(cls) if name[0] != "_" and callable(inspect.getattr_static(cls, name, None)))


def _wrapper_for(called: Callable[..., Any]) -> Callable[[Any, Callable[[], Span], _Note], Callable[..., Any]]:
    if inspect.isasyncgenfunction(called):
        return _async_stream
    if inspect.iscoroutinefunction(called):
        return _coroutine
    if inspect.isgeneratorfunction(called):
        return _stream
    return _function


def _function(func: Callable[..., Any], begin: Callable[[], Span], note: _Note) -> Callable[..., Any]:  # noqa: ARG001
    @functools.wraps(func)
    def tracked(*args: Any, **kwargs: Any) -> Any:
        with begin() as span:
            result = func(*args, **kwargs)
            if type(result) in _NOT_AWAITED or not _ends_later(result) or not span.defer():
                return result
        return _tracked_until_over(result, span)

    return tracked


_NOT_AWAITED = frozenset({type(None), bool, int, float, str, bytes, list, tuple, dict, set})
"""Types of most results, which are not awaitable. Only results of other types are checked."""


def _ends_later(result: Any) -> bool:
    """Return whether the caller is expected to await a result. If so, the execution lasts until the awaitable ends.

    An awaitable object with methods of its own, such as a future of another library, may be used without an ``await``.
    Therefore, for such an object, the execution ends when the function returns.
    """
    if not inspect.isawaitable(result):
        return False
    if asyncio.isfuture(result) or isinstance(result, Coroutine):
        return True
    kind = type(result)
    return hasattr(kind, "__aenter__") or not (hasattr(kind, "__aiter__") or any(_public_methods(kind)))


def _tracked_until_over(result: Any, span: Span) -> Any:
    """Return an awaitable of the same kind to replace `result`. The suspended span ends when this awaitable ends."""
    if asyncio.isfuture(result):
        result.add_done_callback(functools.partial(_leave_with, span))
        return result
    if isinstance(result, Coroutine) and not hasattr(result, "__aenter__"):
        return _awaited(result, span)
    return _TrackedAwaitable(result, span)


async def _awaited(awaitable: Awaitable[R], span: Span) -> R:
    span.resume()
    try:
        value = await awaitable
    except BaseException as error:
        span.__exit__(type(error), error, None)
        raise
    span.__exit__(None, None, None)
    return value


def _leave_with(span: Span, future: asyncio.Future[Any]) -> None:
    error = asyncio.CancelledError() if future.cancelled() else future.exception()
    span.resume()
    span.__exit__(None if error is None else type(error), error, None)


class _TrackedAwaitable:
    """Wraps an object that supports ``await`` or ``async with``. The span ends when the object's first use ends."""

    def __init__(self, awaitable: Any, span: Span) -> None:
        self._awaitable = awaitable
        self._span: Span | None = span
        self._running: Coroutine[Any, Any, Any] | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # so that isinstance sees the wrapped type
        return type(self._awaitable)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._awaitable, name)

    def _tracked(self, awaitable: Any) -> Any:
        span, self._span = self._span, None
        return awaitable if span is None else _awaited(awaitable, span)

    def __await__(self) -> Generator[Any, Any, Any]:
        found: Generator[Any, Any, Any] = self._tracked(self._awaitable).__await__()
        return found

    async def __aenter__(self) -> Any:
        return await self._tracked(self._awaitable.__aenter__())

    async def __aexit__(self, *error: object) -> Any:
        return await self._awaitable.__aexit__(*error)

    # Some wrapped objects, such as the requests of HTTP clients, are also Coroutines. A task runs a Coroutine with
    # `send`, `throw` and `close`, so this class has these methods too.

    def _coroutine(self) -> Coroutine[Any, Any, Any]:
        if self._running is None:
            self._running = self._tracked(self._awaitable)
        return self._running

    def send(self, value: Any) -> Any:
        return self._coroutine().send(value)

    def throw(self, *error: Any) -> Any:
        return self._coroutine().throw(*error)

    def close(self) -> None:
        self._coroutine().close()

    def __del__(self) -> None:
        span = self.__dict__.get("_span")
        if span is not None:  # the object was never used, so the span ends here
            span.resume()
            span.__exit__(None, None, None)


def _coroutine(
    func: Callable[..., Awaitable[Any]],
    begin: Callable[[], Span],
    note: _Note,  # noqa: ARG001
) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(func)
    async def tracked(*args: Any, **kwargs: Any) -> Any:
        with begin():
            return await func(*args, **kwargs)

    return tracked


class _Stream:
    """One run of a generator: an execution that is suspended at each item and resumed for the next."""

    __slots__ = ("_first_s", "_items", "_made_s", "_note", "_resumed_at", "_span", "_start")

    def __init__(self, begin: Callable[[], Span], note: _Note) -> None:
        self._span = begin()
        self._note = note
        self._items = 0
        self._first_s = 0.0
        self._made_s = 0.0
        self._span.__enter__()
        self._start = self._resumed_at = perf_counter()

    def yields(self) -> None:
        """Note that the generator yields an item: from now on, the consumer works."""
        now = perf_counter()
        self._items += 1
        if self._items == 1:
            self._first_s = now - self._start
        else:
            self._made_s += now - self._resumed_at
        self._span.suspend()

    def resumed(self) -> None:
        """Note that the consumer requests the next item."""
        self._span.resume()
        self._resumed_at = perf_counter()

    def ended(self, error: BaseException | None = None) -> None:
        """Note that the generator is exhausted or closed, or has raised."""
        failure = None if isinstance(error, GeneratorExit) else error
        self._span.__exit__(type(failure) if failure else None, failure, None)
        if self._items:
            between_s = self._made_s / (self._items - 1) if self._items > 1 else None
            try:
                self._note(self._span.agent_name, self._items, self._first_s, between_s)
            except Exception:  # noqa: BLE001  a failed record must not affect the generator
                not_recorded(self._span.agent_name)


def _stream(
    func: Callable[..., Generator[Any, Any, Any]], begin: Callable[[], Span], note: _Note
) -> Callable[..., Generator[Any, Any, Any]]:
    @functools.wraps(func)
    def tracked(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        stream = _Stream(begin, note)
        try:
            inner = func(*args, **kwargs)
            # This is `yield from inner`, written out as in PEP 380, because `stream` must act at each item.
            item = next(inner)
            while True:
                stream.yields()
                try:
                    sent = yield item
                except GeneratorExit:
                    stream.resumed()
                    inner.close()
                    raise
                except BaseException as error:  # noqa: BLE001  the consumer threw this error; `inner` may handle it
                    stream.resumed()
                    item = inner.throw(error)
                else:
                    stream.resumed()
                    item = inner.send(sent)
        except StopIteration as end:
            stream.ended()
            return end.value
        except BaseException as error:
            stream.ended(error)
            raise

    return tracked


def _async_stream(
    func: Callable[..., AsyncGenerator[Any, Any]], begin: Callable[[], Span], note: _Note
) -> Callable[..., AsyncGenerator[Any, Any]]:
    @functools.wraps(func)
    async def tracked(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        stream = _Stream(begin, note)
        try:
            inner = func(*args, **kwargs)
            item = await anext(inner)
            while True:
                stream.yields()
                try:
                    sent = yield item
                except GeneratorExit:
                    stream.resumed()
                    await inner.aclose()
                    raise
                except BaseException as error:  # noqa: BLE001  as above
                    stream.resumed()
                    item = await inner.athrow(error)
                else:
                    stream.resumed()
                    item = await inner.asend(sent)
        except StopAsyncIteration:
            stream.ended()
        except BaseException as error:
            stream.ended(error)
            raise

    return tracked
