from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from agentperf_redis import AgentPerf
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.metrics.spans import Span, current_span, outcome_of
from agentperf_redis.metrics.tracking import track_performance

STEP_S = 0.01


class Notes:
    """Replaces a collector. It keeps the agent, the duration and the outcome of each execution."""

    def __init__(self) -> None:
        self.recorded: list[tuple[str, float, str]] = []
        self.streams: list[tuple[int, float, float | None]] = []

    def track(self, agent_name: str) -> Span:
        return Span(
            agent_name, None, lambda span, outcome: self.recorded.append((span.agent_name, span.seconds, outcome))
        )

    def record_stream(self, agent_name: str, items: int, first: float, between: float | None) -> None:
        self.streams.append((items, first, between))

    def once(self, outcome: str, *, at_least: float = 0.0) -> None:
        """Assert that exactly one execution was recorded, with this outcome and a plausible duration."""
        ((agent, seconds, found),) = self.recorded
        assert (agent, found) == ("agent", outcome)
        assert at_least <= seconds < at_least + 5.0


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def track(notes: Notes) -> Callable[[Any], Any]:
    collector: Any = notes
    return track_performance("agent", collector)


@pytest.mark.parametrize("collector", [AgentPerf("redis://unknown.invalid"), "perf", None])
def test_invalid_collector_is_rejected_before_decoration(collector: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"collector is .*; allowed: a MetricsCollector, such as perf\.metrics"):
        track_performance("agent", collector)


def test_function_records_one_success(notes: Notes, track: Callable[[Any], Any]) -> None:
    @track
    def work(first: int, *, second: int) -> int:
        """Add."""
        time.sleep(STEP_S)
        return first + second

    assert work(1, second=2) == 3
    assert (work.__name__, work.__doc__) == ("work", "Add.")
    notes.once("ok", at_least=STEP_S)


def test_failing_function_records_its_error_type(notes: Notes, track: Callable[[Any], Any]) -> None:
    @track
    def work() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        work()
    notes.once("err:KeyError")


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (type("Bad\nName\x85", (Exception,), {}), "err:Bad?Name?"),
        (type("", (Exception,), {}), "err:?"),
        (type("x" * 300, (Exception,), {}), "err:" + "x" * 200),
        (type("Fehlgröße", (Exception,), {}), "err:Fehlgröße"),
    ],
    ids=["controls", "none", "long", "letters"],
)
def test_errors_with_unusual_names_reach_the_caller(
    notes: Notes, track: Callable[[Any], Any], error: type[Exception], outcome: str
) -> None:
    @track
    def work() -> None:
        raise error

    with pytest.raises(error) as caught:
        work()
    assert type(caught.value) is error
    notes.once(outcome)


def test_error_with_a_raising_name_reaches_the_caller(notes: Notes, track: Callable[[Any], Any]) -> None:
    class RaisingName(type):
        @property
        def __name__(cls) -> str:  # type: ignore[override]  # must raise
            raise ZeroDivisionError

    class Odd(Exception, metaclass=RaisingName):
        pass

    @track
    def work() -> None:
        raise Odd

    found: type | None = None
    try:
        work()
    except Exception as error:  # noqa: BLE001  pytest.raises would read the type's name
        found = type(error)
    assert found is Odd
    notes.once("err:Odd")


class BrokenNotes(Notes):
    """A collector that cannot record."""

    def track(self, agent_name: str) -> Span:
        def finish(span: Span, outcome: str) -> None:
            raise InvalidArgument("outcome", outcome, "something else")

        return Span(agent_name, None, finish)

    def record_stream(self, *_: Any) -> None:
        raise InvalidArgument("items", 1, "something else")


def test_failing_recorder_never_disturbs_calls(caplog: pytest.LogCaptureFixture) -> None:
    unwilling: Any = BrokenNotes()
    track = track_performance("agent", unwilling)

    @track
    def work() -> int:
        return 1

    @track
    def fail() -> None:
        raise KeyError("x")

    @track
    def stream() -> Generator[int, None, None]:
        yield 1

    assert work() == 1
    with pytest.raises(KeyError):
        fail()
    assert list(stream()) == [1]
    assert current_span() is None
    assert caplog.text.count("could not be recorded") == 4
    assert "'agent'" in caplog.text


def test_interrupted_function_records_a_named_failure(notes: Notes, track: Callable[[Any], Any]) -> None:
    @track
    def work() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    notes.once("err:KeyboardInterrupt")


def test_coroutine_records_one_success(notes: Notes, track: Callable[[Any], Any]) -> None:
    @track
    async def work(value: int) -> int:
        await asyncio.sleep(STEP_S)
        return value

    assert inspect.iscoroutinefunction(work)
    assert asyncio.run(work(7)) == 7
    notes.once("ok", at_least=STEP_S)


def test_failing_coroutine_records_its_error_type(notes: Notes, track: Callable[[Any], Any]) -> None:
    @track
    async def work() -> None:
        await asyncio.sleep(0)
        raise TimeoutError

    with pytest.raises(TimeoutError):
        asyncio.run(work())
    notes.once("err:TimeoutError")


def test_cancelled_task_records_a_cancellation(notes: Notes, track: Callable[[Any], Any]) -> None:
    begun = asyncio.Event()

    @track
    async def work() -> None:
        begun.set()
        await asyncio.sleep(60)

    async def main() -> None:
        task = asyncio.create_task(work())
        await begun.wait()
        await asyncio.sleep(STEP_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    notes.once("cancelled", at_least=STEP_S / 2)


def test_generator_is_recorded_when_exhausted(notes: Notes, track: Callable[[Any], Any]) -> None:
    @track
    def work(count: int) -> Generator[int, str, str]:
        heard = []
        for number in range(count):
            time.sleep(STEP_S)
            heard.append((yield number))
        return ",".join(heard)

    assert inspect.isgeneratorfunction(work)
    stream = work(3)
    assert not notes.recorded
    assert [next(stream), stream.send("a"), stream.send("b")] == [0, 1, 2]
    assert not notes.recorded
    with pytest.raises(StopIteration) as end:
        stream.send("c")
    assert end.value.value == "a,b,c"
    notes.once("ok", at_least=3 * STEP_S)
    ((items, first, between),) = notes.streams
    assert items == 3
    assert first >= STEP_S
    assert between is not None
    assert between >= STEP_S


def test_consumer_time_is_excluded_between_items(notes: Notes, track: Callable[[Any], Any]) -> None:
    @track
    def work() -> Iterator[int]:
        assert current_span() is not None, "the generator runs as an execution"
        yield 1
        yield 2

    for _ in work():
        assert current_span() is None, "its consumer does not run in it"
        time.sleep(10 * STEP_S)
    notes.once("ok", at_least=20 * STEP_S)
    ((items, _, between),) = notes.streams
    assert items == 2
    assert between is not None
    assert between < 5 * STEP_S


def test_span_open_across_a_yield_is_suspended(notes: Notes, track: Callable[[Any], Any]) -> None:
    inner = Span("agent", "inside", lambda span, _: None)

    @track
    def work() -> Iterator[int]:
        with inner:
            time.sleep(STEP_S)
            yield 1
            assert current_span() is inner
        yield 2

    for _ in work():
        assert current_span() is None
        time.sleep(10 * STEP_S)
    assert STEP_S <= inner.self_seconds < 5 * STEP_S
    notes.once("ok", at_least=20 * STEP_S)


def test_closed_generator_counts_as_success(notes: Notes, track: Callable[[Any], Any]) -> None:
    cleaned = []

    @track
    def work() -> Iterator[int]:
        try:
            yield 1
            yield 2
        finally:
            cleaned.append(True)

    stream = work()
    next(stream)
    stream.close()
    assert cleaned
    notes.once("ok")


def test_dropped_generator_is_recorded(notes: Notes, track: Callable[[Any], Any]) -> None:
    @track
    def work() -> Iterator[int]:
        yield 1
        yield 2

    for _ in work():
        break
    notes.once("ok")


def test_failing_generator_records_its_error_type(notes: Notes, track: Callable[[Any], Any]) -> None:
    @track
    def work() -> Iterator[int]:
        yield 1
        raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        list(work())
    notes.once("err:ValueError")


def test_thrown_exceptions_reach_the_inner_generator(notes: Notes, track: Callable[[Any], Any]) -> None:
    @track
    def work() -> Iterator[str]:
        try:
            yield "first"
        except KeyError:
            yield "caught"

    stream: Any = work()
    next(stream)
    assert stream.throw(KeyError()) == "caught"
    assert list(stream) == []
    notes.once("ok")


def test_async_generator_records_one_success(notes: Notes, track: Callable[[Any], Any]) -> None:
    @track
    async def work() -> AsyncIterator[int]:
        for number in range(3):
            await asyncio.sleep(STEP_S)
            yield number

    async def main() -> list[int]:
        return [number async for number in work()]

    assert inspect.isasyncgenfunction(work)
    assert asyncio.run(main()) == [0, 1, 2]
    notes.once("ok", at_least=3 * STEP_S)


def test_async_generator_receives_sent_and_thrown_values(notes: Notes, track: Callable[[Any], Any]) -> None:
    @track
    async def work() -> Any:
        heard = yield "first"
        try:
            yield heard
        except KeyError:
            yield "caught"

    async def main() -> list[str]:
        stream = work()
        found = [await stream.asend(None), await stream.asend("sent"), await stream.athrow(KeyError())]
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        return found

    assert asyncio.run(main()) == ["first", "sent", "caught"]
    notes.once("ok")


def test_closed_async_generator_counts_as_success(notes: Notes, track: Callable[[Any], Any]) -> None:
    cleaned = []

    @track
    async def work() -> AsyncIterator[int]:
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)

    async def main() -> None:
        stream: Any = work()
        await anext(stream)
        await stream.aclose()

    asyncio.run(main())
    assert cleaned
    notes.once("ok")


def test_async_generator_records_failure_and_cancellation(notes: Notes, track: Callable[[Any], Any]) -> None:
    @track
    async def failing() -> AsyncIterator[int]:
        yield 1
        raise ValueError

    @track
    async def waiting() -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(60)

    async def consume(stream: AsyncIterator[int]) -> None:
        async for _ in stream:
            pass

    async def main() -> None:
        with pytest.raises(ValueError):
            await consume(failing())
        task = asyncio.create_task(consume(waiting()))
        await asyncio.sleep(STEP_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert [outcome for _, _, outcome in notes.recorded] == ["err:ValueError", "cancelled"]


def test_methods_of_every_kind_are_recorded(notes: Notes, track: Callable[[Any], Any]) -> None:
    class Agent:
        base = 10

        def __init__(self, value: int) -> None:
            self.value = value

        @track
        def plain(self, more: int) -> int:
            return self.value + more

        @track
        async def asynchronous(self) -> int:
            return self.value

        @track
        def stream(self) -> Iterator[int]:
            yield self.value

        @track
        @classmethod
        def of_class(cls) -> int:
            return cls.base

        @staticmethod
        @track
        def static(value: int) -> int:
            return value

        @track
        @staticmethod
        def static_below(value: int) -> int:
            return value

    agent = Agent(1)
    assert agent.plain(2) == 3
    assert asyncio.run(agent.asynchronous()) == 1
    assert list(agent.stream()) == [1]
    assert (Agent.of_class(), Agent.static(5), agent.static_below(6)) == (10, 5, 6)
    assert [outcome for _, _, outcome in notes.recorded] == ["ok"] * 6


def test_partials_and_callable_objects_are_recorded(notes: Notes, track: Callable[[Any], Any]) -> None:
    class Doubles:
        async def __call__(self, value: int) -> int:
            await asyncio.sleep(STEP_S)
            return 2 * value

    async def add(first: int, second: int) -> int:
        await asyncio.sleep(STEP_S)
        return first + second

    assert asyncio.run(track(Doubles())(4)) == 8
    assert asyncio.run(track(functools.partial(add, 1))(2)) == 3
    assert all(seconds >= STEP_S / 2 for _, seconds, _ in notes.recorded)
    assert [outcome for _, _, outcome in notes.recorded] == ["ok", "ok"]


def test_invalid_agent_name_is_rejected_at_decoration(notes: Notes) -> None:
    collector: Any = notes
    with pytest.raises(InvalidArgument, match="agent_name"):
        track_performance("", collector)


class Tool:
    """The result of a framework's decorator: a callable object with further methods."""

    def __call__(self) -> None: ...

    def invoke(self, arguments: object) -> object:
        return arguments


class Plain:
    name = "search"


@pytest.mark.parametrize(
    "thing",
    [Plain(), Tool(), Tool, None, "text", 3, property(len), asyncio, [len]],
    ids=["instance", "tool", "class", "none", "text", "number", "property", "module", "list"],
)
def test_tools_and_classes_are_rejected_at_decoration(track: Callable[[Any], Any], thing: object) -> None:
    with pytest.raises(InvalidArgument, match="decorate the method"):
        track(thing)


def test_c_functions_and_cached_functions_are_accepted(notes: Notes, track: Callable[[Any], Any]) -> None:
    assert track(len)("ab") == 2
    assert track(functools.lru_cache(lambda x: x))(1) == 1
    assert [outcome for _, _, outcome in notes.recorded] == ["ok", "ok"]


async def later(fails: bool = False) -> str:
    await asyncio.sleep(STEP_S)
    if fails:
        raise ConnectionError("down")
    return "an answer"


def test_execution_lasts_until_returned_coroutine_ends(notes: Notes, track: Callable[[Any], Any]) -> None:
    ask = track(lambda fails: later(fails))  # noqa: PLW0108  must be a plain function

    async def main() -> None:
        call = ask(False)
        assert asyncio.iscoroutine(call)
        assert current_span() is None, "code after the call is not part of it"
        assert await call == "an answer"
        assert await asyncio.create_task(ask(False)) == "an answer"
        with pytest.raises(ConnectionError):
            await ask(True)
        task = asyncio.create_task(ask(False))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert current_span() is None

    asyncio.run(main())
    assert [outcome for _, _, outcome in notes.recorded] == ["ok", "ok", "err:ConnectionError", "cancelled"]
    assert all(seconds >= STEP_S / 2 for _, seconds, outcome in notes.recorded if outcome == "ok")


def test_spans_inside_an_awaited_result_are_nested(track: Callable[[Any], Any]) -> None:
    seen: list[Span | None] = []

    async def inner() -> None:
        seen.append(current_span())

    asyncio.run(track(lambda: inner())())  # noqa: PLW0108  must be a plain function
    assert seen[0] is not None
    assert seen[0].agent_name == "agent"


def test_execution_lasts_until_returned_task_ends(notes: Notes, track: Callable[[Any], Any]) -> None:
    start = track(lambda fails: asyncio.ensure_future(later(fails)))

    async def main() -> None:
        task = start(False)
        assert isinstance(task, asyncio.Task)
        assert await task == "an answer"
        with pytest.raises(ConnectionError):
            await start(True)
        stopped = start(False)
        stopped.cancel()
        await asyncio.gather(stopped, return_exceptions=True)

    asyncio.run(main())
    assert [outcome for _, _, outcome in notes.recorded] == ["ok", "err:ConnectionError", "cancelled"]
    assert notes.recorded[0][1] >= STEP_S / 2


class Request:
    """Imitates a request of an HTTP client, which is awaitable and an async context manager."""

    url = "http://127.0.0.1/"

    def __await__(self) -> Generator[Any, Any, str]:
        return later().__await__()

    async def __aenter__(self) -> str:
        return await later()

    async def __aexit__(self, *error: object) -> None: ...


def test_execution_lasts_until_returned_awaitable_ends(notes: Notes, track: Callable[[Any], Any]) -> None:
    get = track(lambda: Request())  # noqa: PLW0108  must be a plain function

    async def main() -> None:
        request = get()
        assert (request.url, isinstance(request, Request)) == (Request.url, True)
        assert await request == "an answer"
        async with get() as answer:
            assert answer == "an answer"

    asyncio.run(main())
    assert [outcome for _, _, outcome in notes.recorded] == ["ok", "ok"]
    assert all(seconds >= STEP_S / 2 for _, seconds, _ in notes.recorded)


def test_function_that_fails_before_its_awaitable_is_recorded(notes: Notes, track: Callable[[Any], Any]) -> None:
    def ask() -> Any:
        raise ValueError("no key")

    with pytest.raises(ValueError, match="no key"):
        track(ask)()
    notes.once("err:ValueError")


class Interrupt(Exception):
    """An exception that a framework uses as control flow."""


@pytest.mark.parametrize("kind", ["function", "coroutine", "awaitable", "stream"])
def test_control_flow_exceptions_count_as_success(kind: str, perf_notes: list[str]) -> None:
    collector: Any = Tracks(perf_notes)
    track = track_performance("agent", collector, not_failures=(Interrupt,))

    async def interrupted() -> None:
        raise Interrupt

    def plain() -> None:
        raise Interrupt

    def stream() -> Iterator[int]:
        yield 1
        raise Interrupt

    runs: dict[str, Callable[[], object]] = {
        "function": track(plain),
        "coroutine": lambda: asyncio.run(track(interrupted)()),
        "awaitable": lambda: asyncio.run(track(lambda: interrupted())()),  # noqa: PLW0108  must be a plain function
        "stream": lambda: list(track(stream)()),
    }
    with pytest.raises(Interrupt):
        runs[kind]()
    assert perf_notes == ["ok"]


class Tracks(Notes):
    """A collector whose `track` accepts `not_failures`, like the `track` of a real collector."""

    def __init__(self, outcomes: list[str]) -> None:
        super().__init__()
        self._outcomes = outcomes

    def track(self, agent_name: str, **options: Any) -> Span:
        return Span(agent_name, None, lambda span, outcome: self._outcomes.append(outcome), None, **options)


@pytest.fixture
def perf_notes() -> list[str]:
    return []


@pytest.mark.parametrize("wrong", ["GraphInterrupt", [ValueError], ValueError("x"), (ValueError, 3), object])
def test_invalid_exception_classes_are_rejected(wrong: Any) -> None:
    metrics = AgentPerf("redis://unknown.invalid").metrics
    for call in (
        lambda: track_performance("agent", metrics, not_failures=wrong),
        lambda: metrics.track("agent", not_failures=wrong),
        lambda: metrics.span("agent", "s", not_failures=wrong),
    ):
        with pytest.raises(InvalidArgument, match=r"not_failures is .* an exception class"):
            call()


def test_trio_cancellation_records_a_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cancelled(BaseException):
        pass

    monkeypatch.setitem(sys.modules, "trio", SimpleNamespace(Cancelled=Cancelled))
    assert outcome_of(Cancelled()) == "cancelled"
    assert outcome_of(BaseExceptionGroup("several", [Cancelled(), asyncio.CancelledError()])) == "cancelled"
    assert outcome_of(BaseExceptionGroup("several", [Cancelled(), KeyError()])) == "err:BaseExceptionGroup"


class ClientRequest(Coroutine[Any, Any, str]):
    """A coroutine that is also an async context manager, like `session.get(url)` of an HTTP client."""

    def __init__(self) -> None:
        self.coroutine = later()

    def send(self, value: Any) -> Any:
        return self.coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        return self.coroutine.throw(*error)

    def close(self) -> None:
        self.coroutine.close()

    def __await__(self) -> Generator[Any, Any, str]:
        return self.coroutine.__await__()

    async def __aenter__(self) -> str:
        return await self.coroutine

    async def __aexit__(self, *error: object) -> None: ...


def test_requests_run_as_tasks_are_tracked(notes: Notes, track: Callable[[Any], Any]) -> None:
    get = track(lambda: ClientRequest())  # noqa: PLW0108  must be a plain function

    async def main() -> None:
        assert await asyncio.create_task(get()) == "an answer"
        assert list(await asyncio.gather(get(), get())) == ["an answer", "an answer"]
        async with get() as answer:
            assert answer == "an answer"

    asyncio.run(main())
    assert [outcome for _, _, outcome in notes.recorded] == ["ok"] * 4
    assert all(seconds >= STEP_S / 2 for _, seconds, _ in notes.recorded)


class ForeignFuture:
    """A future of another library: it is awaitable, and has a method `result`."""

    def __await__(self) -> Generator[Any, Any, str]:
        return later().__await__()

    def result(self) -> str:
        return "an answer"


class Cursor:
    def __await__(self) -> Generator[Any, Any, str]:
        return later().__await__()

    async def __aiter__(self) -> AsyncIterator[int]:
        yield 1


def test_awaitables_with_other_uses_are_returned_unchanged(notes: Notes, track: Callable[[Any], Any]) -> None:
    future = track(lambda: ForeignFuture())()  # noqa: PLW0108  must be a plain function
    assert type(future) is ForeignFuture
    assert future.result() == "an answer"
    cursor = track(lambda: Cursor())  # noqa: PLW0108  must be a plain function

    async def main() -> None:
        assert [number async for number in cursor()] == [1]

    asyncio.run(main())
    assert [outcome for _, _, outcome in notes.recorded] == ["ok", "ok"]


def test_awaitable_used_twice_is_recorded_once(notes: Notes, track: Callable[[Any], Any]) -> None:
    get = track(lambda: Request())  # noqa: PLW0108  must be a plain function

    async def main() -> None:
        twice = get()
        assert [await twice, await twice] == ["an answer", "an answer"]

    asyncio.run(main())
    assert [outcome for _, _, outcome in notes.recorded] == ["ok"]
    get()
    gc.collect()
    assert [outcome for _, _, outcome in notes.recorded] == ["ok", "ok"], "it was not awaited"
