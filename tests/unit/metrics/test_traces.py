from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from agentperf_redis.metrics import traces
from agentperf_redis.metrics.client import MetricsCollector
from agentperf_redis.metrics.llm_usage import read_usage
from agentperf_redis.metrics.open_executions import OpenExecutions
from agentperf_redis.metrics.spans import Span, current_span
from agentperf_redis.metrics.traces import (
    Description,
    Ended,
    Failures,
    Kind,
    ModelCall,
    OpenSpans,
    Traces,
    failure,
    flush,
    self_times,
)
from tests.support.forks import in_child

USAGE = {"input_tokens": 100, "output_tokens": 20}


class Book:
    """Stands in for a collector: keeps the records, by agent and path."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, float, float, str]] = []
        self.calls: list[tuple[str, int]] = []
        self.tools: list[str] = []
        self.open = OpenExecutions(lambda: None)

    def track(self, agent: str) -> Span:
        return Span(agent, None, self._finish, executions=self.open)

    @property
    def running(self) -> list[str]:
        return [agent for agent, _ in self.open.oldest(time.perf_counter(), 0, 10).oldest]

    def _finish(self, span: Span, outcome: str) -> None:
        self.ended.append((_place(span), round(span.seconds, 6), round(span.self_seconds, 6), outcome))

    def record_llm(self, *, usage: object) -> None:
        found = read_usage(usage)
        self.calls.append((_place(current_span()), 0 if found is None else found.tokens_in))

    def record_tool_calls(self) -> None:
        self.tools.append(_place(current_span()))

    @property
    def names(self) -> list[str]:
        return sorted(place for place, *_ in self.ended)


def _place(span: Span | None) -> str:
    return "none" if span is None else "/".join((span.agent_name, *span.path))


class FakeSpan:
    """A span of the test's tracer. If `late` is True, the tracer describes the span only when it ends."""

    def __init__(self, description: Description | None, parent: FakeSpan | None, late: bool) -> None:
        self.description = description
        self.parent = parent
        self.late = late
        self.key = next(_keys)
        self.ended = False


_keys = itertools.count()


class Tracer:
    """A tracer whose time, in seconds, is set by the test."""

    def __init__(
        self, book: Book, open_spans: OpenSpans | None = None, *, in_tracked: bool = False, usage: bool = True
    ) -> None:
        self.now = 0.0
        self.open = OpenSpans() if open_spans is None else open_spans
        self.traces = Traces(
            cast("MetricsCollector", book),
            self.open,
            describe=lambda span: None if span.late and not span.ended else span.description,
            is_late=lambda span: span.late,
            agent="fallback",
            in_tracked=in_tracked,
            usage=usage,
        )

    def begin(
        self, kind: Kind | None, name: str = "", parent: FakeSpan | None = None, *, late: bool = False
    ) -> FakeSpan:
        agent = name if kind in (Kind.AGENT, Kind.STEP) else None
        span = FakeSpan(None if kind is None else Description(kind, name, agent), parent, late)
        self.traces.begin(span.key, None if parent is None else parent.key, span)
        return span

    def end(self, span: FakeSpan, outcome: str = "ok", usage: dict[str, Any] | None = None, took: float = 1.0) -> None:
        span.ended = True
        start = int((self.now - took) * 1e9)
        call = ModelCall(usage or {})
        self.traces.end(span.key, lambda: Ended(span.description, start, int(self.now * 1e9), outcome, call))

    @contextlib.contextmanager
    def span(
        self,
        kind: Kind | None,
        name: str = "",
        parent: FakeSpan | None = None,
        *,
        late: bool = False,
        usage: dict[str, Any] | None = None,
    ) -> Iterator[FakeSpan]:
        """Report a span that takes one second more than all spans within it together."""
        began = self.now
        made = self.begin(kind, name, parent, late=late)
        yield made
        self.now += 1
        self.end(made, usage=usage, took=self.now - began)

    def work(self, kind: Kind, name: str, parent: FakeSpan | None = None) -> None:
        """Report a span that contains no spans. A model call uses 100 input tokens and 20 output tokens."""
        with self.span(kind, name, parent, usage=USAGE if kind is Kind.MODEL else None):
            pass


@pytest.fixture
def book() -> Book:
    return Book()


@pytest.fixture
def tracer(book: Book) -> Tracer:
    return Tracer(book)


def test_agent_span_is_an_execution_with_spans_within(book: Book, tracer: Tracer) -> None:
    with tracer.span(Kind.AGENT, "planner") as agent:
        tracer.work(Kind.MODEL, "chat m", agent)
        with tracer.span(Kind.STEP, "node", agent) as node, tracer.span(Kind.TOOL, "search", node):
            pass
    assert sorted(book.ended) == [
        ("planner", 4, 1, "ok"),
        ("planner/chat m", 1, 1, "ok"),
        ("planner/node", 2, 1, "ok"),
        ("planner/node/search", 1, 1, "ok"),
    ]
    assert book.calls == [("planner/chat m", 100)]
    assert book.tools == ["planner/node/search"]


def test_nested_agent_has_an_execution_of_its_own(book: Book, tracer: Tracer) -> None:
    with (
        tracer.span(Kind.AGENT, "outer") as outer,
        tracer.span(Kind.TOOL, "ask", outer) as ask,
        tracer.span(Kind.AGENT, "inner", ask) as inner,
    ):
        tracer.work(Kind.MODEL, "chat", inner)
    assert sorted(book.ended) == [
        ("inner", 2, 1, "ok"),
        ("inner/chat", 1, 1, "ok"),
        ("outer", 4, 1, "ok"),
        ("outer/ask", 3, 3, "ok"),  # `ask` waited for the agent `inner`
    ]
    assert book.calls == [("inner/chat", 100)]


def test_without_agent_the_outermost_described_span_is_an_execution(book: Book, tracer: Tracer) -> None:
    with (
        tracer.span(None) as http,
        tracer.span(Kind.STEP, "chain", http) as chain,
        tracer.span(None, parent=chain) as inner,
    ):
        tracer.work(Kind.MODEL, "chat", inner)
    tracer.work(Kind.MODEL, "chat")
    assert book.names == ["chain", "chain/chat", "fallback"]
    assert book.calls == [("chain/chat", 100), ("fallback", 100)]


def test_preparing_an_agent_is_no_execution(book: Book, tracer: Tracer) -> None:
    with tracer.span(Kind.SETUP, "create_agent a") as setup:
        assert book.ended == []
        tracer.work(Kind.MODEL, "chat", setup)
    assert book.ended == [("fallback", 1, 1, "ok")]


def test_kind_known_at_the_end_places_spans_within(book: Book, tracer: Tracer) -> None:
    with tracer.span(Kind.STEP, "graph", late=True) as graph, tracer.span(Kind.AGENT, "a", graph, late=True) as agent:
        with tracer.span(Kind.MODEL, "chat", agent, late=True, usage=USAGE):
            pass
        assert book.calls == []
    assert sorted(book.ended) == [("a", 2, 1, "ok"), ("a/chat", 1, 1, "ok"), ("graph", 3, 3, "ok")]
    assert book.calls == [("a/chat", 100)]


def test_call_seen_by_two_instrumentations_counts_once(book: Book, tracer: Tracer) -> None:
    with tracer.span(Kind.AGENT, "a") as agent:
        with (
            tracer.span(Kind.MODEL, "chat", agent, usage=USAGE) as outer,
            tracer.span(None, parent=outer) as client,
        ):
            tracer.work(Kind.MODEL, "chat", client)
        with tracer.span(Kind.MODEL, "bare", agent) as bare:
            tracer.work(Kind.MODEL, "chat", bare)
    assert book.calls == [("a/chat", 100), ("a/bare", 100)]


def test_agent_seen_by_two_instrumentations_counts_once(book: Book, tracer: Tracer) -> None:
    with tracer.span(Kind.AGENT, "a") as outer, tracer.span(Kind.AGENT, "a", outer) as inner:
        tracer.work(Kind.MODEL, "chat", inner)
    assert sorted(book.ended) == [("a", 3, 2, "ok"), ("a/chat", 1, 1, "ok")]
    assert book.calls == [("a/chat", 100)]


def test_agent_that_calls_itself_by_a_tool_counts_twice(book: Book, tracer: Tracer) -> None:
    with tracer.span(Kind.AGENT, "a") as outer, tracer.span(Kind.TOOL, "again", outer) as tool:
        tracer.work(Kind.AGENT, "a", tool)
    assert book.names == ["a", "a", "a/again"]


def test_usage_of_an_agent_counts_only_without_model_spans(book: Book, tracer: Tracer) -> None:
    with tracer.span(Kind.AGENT, "local", usage={"input_tokens": 200}) as agent:
        tracer.work(Kind.MODEL, "chat", agent)
    with tracer.span(Kind.AGENT, "remote", usage={"input_tokens": 200, "output_tokens": 1}):
        pass
    assert book.calls == [("local/chat", 100), ("remote", 200)]


def test_failed_call_without_usage_is_no_model_call(book: Book, tracer: Tracer) -> None:
    tracer.end(tracer.begin(Kind.MODEL, "chat"), failure("openai.RateLimitError"))
    tracer.end(tracer.begin(Kind.MODEL, "chat"), failure("Late"), USAGE)
    tracer.end(tracer.begin(Kind.MODEL, "chat"))
    assert [outcome for *_, outcome in book.ended] == ["err:RateLimitError", "err:Late", "ok"]
    assert book.calls == [("fallback", 100), ("fallback", 0)]


def test_executions_of_the_program_are_not_counted_again(book: Book, tracer: Tracer) -> None:
    with book.track("planner"):
        with tracer.span(Kind.AGENT, "planner") as agent:
            tracer.work(Kind.MODEL, "chat", agent)
        tracer.work(Kind.MODEL, "chat")
    assert (book.names, book.calls) == (["planner"], [])


def test_agents_within_another_tracked_execution_are_counted(book: Book, tracer: Tracer) -> None:
    with book.track("POST /ask"), tracer.span(Kind.AGENT, "planner") as agent:
        tracer.work(Kind.MODEL, "chat", agent)
    assert book.names == ["POST /ask", "planner", "planner/chat"]
    assert book.calls == [("planner/chat", 100)]


def test_execution_tracked_within_an_agent_records_its_own_calls(book: Book, tracer: Tracer) -> None:
    with tracer.span(Kind.AGENT, "planner") as agent, book.track("helper"):
        tracer.work(Kind.MODEL, "chat", agent)
    assert (book.names, book.calls) == (["helper", "planner"], [])


def test_execution_that_another_adapter_tracks_later_counts_once(book: Book, tracer: Tracer) -> None:
    agent = tracer.begin(Kind.AGENT, "planner")
    with book.track("planner"):
        tracer.work(Kind.MODEL, "chat", agent)
        tracer.end(agent)
    assert (book.names, book.calls) == (["planner"], [])


def test_in_tracked_records_spans_of_the_tracked_execution(book: Book) -> None:
    tracer = Tracer(book, in_tracked=True)
    with book.track("planner"):
        with tracer.span(Kind.AGENT, "planner") as agent:
            tracer.work(Kind.MODEL, "chat", agent)
        tracer.work(Kind.MODEL, "chat m")
    assert [each for each in book.ended if "/" in each[0]] == [
        ("planner/chat", 1, 0, "ok"),
        ("planner/chat m", 1, 0, "ok"),
    ]
    assert book.names.count("planner") == 1
    with tracer.span(Kind.AGENT, "outer") as outer, book.track("helper"), tracer.span(Kind.STEP, "node", outer) as node:
        tracer.work(Kind.MODEL, "chat", node)
    assert book.names[:3] == ["helper", "helper/chat", "helper/node"]
    assert book.calls == [("planner/chat", 100), ("planner/chat m", 100), ("helper/chat", 100)]


@pytest.mark.parametrize(("in_tracked", "names"), [(False, ["outer"]), (True, ["inner", "inner/chat", "outer"])])
def test_agents_within_an_agent_left_to_the_program_are_left_too(
    book: Book, in_tracked: bool, names: list[str]
) -> None:
    tracer = Tracer(book, in_tracked=in_tracked)
    with (
        book.track("outer"),
        tracer.span(Kind.AGENT, "outer") as outer,
        tracer.span(Kind.AGENT, "inner", outer) as inner,
    ):
        tracer.work(Kind.MODEL, "chat", inner)
    assert book.names == names


def test_usage_can_be_left_to_the_program(book: Book) -> None:
    tracer = Tracer(book, usage=False)
    with tracer.span(Kind.AGENT, "planner", usage=USAGE) as agent:
        tracer.work(Kind.MODEL, "chat", agent)
        tracer.work(Kind.TOOL, "search", agent)
    assert (book.names, book.calls) == (["planner", "planner/chat", "planner/search"], [])
    assert book.tools == ["planner/search"]


def test_open_agent_is_listed_as_running_until_it_ends(book: Book, tracer: Tracer) -> None:
    with (
        tracer.span(Kind.AGENT, "a") as agent,
        tracer.span(Kind.AGENT, "a", agent),
        tracer.span(Kind.AGENT, "b", agent),
    ):
        assert book.running == ["a", "b"]
        assert current_span() is None
    assert book.running == []
    with book.track("a"):
        tracer.end(tracer.begin(Kind.AGENT, "a"))
        assert book.running == ["a"]
    never = tracer.begin(Kind.AGENT, "never")
    assert book.running == ["never"]
    del never
    gc.collect()
    assert book.running == []


def test_stage_of_the_program_hides_no_call(book: Book, tracer: Tracer) -> None:
    with Span("planner", "stage", book._finish):
        tracer.work(Kind.MODEL, "chat")
    assert book.calls == [("fallback", 100)]


def test_processors_that_share_open_spans_count_each_span_once(book: Book, tracer: Tracer) -> None:
    second = Tracer(book, tracer.open)
    for order in ((tracer, second), (second, tracer)):
        span = FakeSpan(Description(Kind.AGENT, "a", "a"), None, late=False)
        for each in (tracer, second):
            each.traces.begin(span.key, None, span)
        for each in order:
            each.end(span)
    assert book.names == ["a", "a"]
    assert tracer.open == {}


def test_span_that_never_ends_is_forgotten_with_its_object(book: Book, tracer: Tracer) -> None:
    agent = tracer.begin(Kind.AGENT, "a")
    never = tracer.begin(Kind.STEP, "never", agent)
    tracer.work(Kind.MODEL, "chat", never)
    tracer.end(agent)
    assert sorted(name for name in book.names) == ["a", "a/never/chat"]
    del never
    gc.collect()
    assert tracer.open == {}


def test_span_that_outlives_its_execution_is_recorded_without_self_time(book: Book, tracer: Tracer) -> None:
    agent = tracer.begin(Kind.AGENT, "a")
    late = tracer.begin(Kind.MODEL, "chat", agent)
    tracer.end(agent)
    tracer.end(late, usage=USAGE)
    assert book.ended == [("a", 1, 1, "ok"), ("a/chat", 1, 0, "ok")]
    assert book.calls == [("a/chat", 100)]


def test_span_that_outlives_an_ignored_span_is_recorded(book: Book, tracer: Tracer) -> None:
    ignored = tracer.begin(None, late=True)
    span = tracer.begin(Kind.MODEL, "chat", ignored)
    tracer.end(ignored)
    tracer.end(span, usage=USAGE)
    assert (book.names, book.calls) == (["fallback"], [("fallback", 100)])


def test_spans_beyond_the_limit_are_recorded_at_once(
    book: Book, tracer: Tracer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "MAX_KEPT", 2)
    with tracer.span(Kind.AGENT, "a") as agent:
        for _ in range(3):
            with tracer.span(Kind.TOOL, "t", agent):
                pass
        assert book.ended == [("a/t", 1, 0, "ok")]
    assert len(book.ended) == 4
    assert book.tools == ["a/t"] * 3


def test_cancelled_span_is_a_cancellation(book: Book, tracer: Tracer) -> None:
    span = tracer.begin(Kind.AGENT, "a")
    try:
        raise asyncio.CancelledError
    except asyncio.CancelledError:
        tracer.end(span)
        within = tracer.begin(Kind.AGENT, "cleanup")  # the cancellation does not end this second span
        tracer.end(within)
    assert [(place, outcome) for place, *_, outcome in book.ended] == [("a", "cancelled"), ("cleanup", "ok")]


@pytest.mark.parametrize(
    ("error_type", "outcome"),
    [
        ("ValueError", "err:ValueError"),
        ("openai.RateLimitError", "err:RateLimitError"),
        ("429", "err:429"),
        ("ratio 1.5", "err:ratio 1.5"),
        ("asyncio.exceptions.CancelledError", "cancelled"),
        ("", "err"),
        (None, "err"),
        (7, "err"),
        ("x" * 300, "err:" + "x" * 200),
    ],
)
def test_error_types_are_those_of_tracked_calls(error_type: object, outcome: str) -> None:
    assert failure(error_type) == outcome


def test_forked_child_records_no_span_of_its_parent(book: Book, tracer: Tracer) -> None:
    span = tracer.begin(Kind.AGENT, "a")

    def child() -> None:
        tracer.end(span)
        assert not book.ended

    in_child(child)
    tracer.end(span)
    assert book.names == ["a"]


def test_threads_record_every_span(book: Book, tracer: Tracer) -> None:
    agent = tracer.begin(Kind.AGENT, "a")

    def work() -> None:
        for _ in range(200):
            tracer.end(tracer.begin(Kind.TOOL, "t", agent))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    tracer.end(agent)
    assert len(book.ended) == 801


def test_self_times_add_up_for_any_overlap() -> None:
    chance = random.Random(7)
    for _ in range(200):
        spans = [(0, 1000, -1)]
        for index in range(1, chance.randrange(2, 12)):
            parent = chance.randrange(index)
            start = chance.randrange(spans[parent][0], spans[parent][1])
            spans.append((start, chance.randrange(start + 1, 1001), parent))
        assert sum(self_times(spans)) == pytest.approx(1000)


def test_self_times_of_parallel_spans_are_shares() -> None:
    spans = [(0, 12, -1), (2, 8, 0), (4, 10, 0), (5, 6, 2)]
    assert self_times(spans) == [4, 2 + 2, 2 + 1.5, 0.5]
    assert self_times([(5, 5, -1), (1, 9, 0)]) == [0, 0]


def test_failures_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    failures = Failures()
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            try:
                raise KeyError("x")
            except KeyError:
                failures.log()
    assert len(caplog.records) == 1


class Flushing:
    """Stands in for a collector that flushes."""

    def __init__(self, result: Callable[[float], bool]) -> None:
        self.flush = result


def test_flush_reports_success_and_never_raises() -> None:
    def fail(seconds: float) -> bool:
        raise OSError("away")

    async def within_a_loop() -> bool:
        return flush(cast("MetricsCollector", Flushing(lambda seconds: seconds == 2)), 2)

    assert flush(cast("MetricsCollector", Flushing(lambda seconds: seconds == 0)), -1)
    assert not flush(cast("MetricsCollector", Flushing(fail)), 1)
    assert asyncio.run(within_a_loop())
