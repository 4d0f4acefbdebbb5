from __future__ import annotations

import asyncio
import contextvars
import os
import random
import sys
import threading
import time
from collections.abc import Generator

import pytest

from agentperf_redis.errors import AgentPerfError, InvalidArgument
from agentperf_redis.metrics import spans
from agentperf_redis.metrics.model import PerformanceMetrics
from agentperf_redis.metrics.spans import Span, current_span, executions_around, span_report
from tests.support.forks import in_child


class Clock:
    """Replaces the real clock; the test advances it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(spans, "perf_counter", made)
    return made


class Book:
    """Records every ended span by path: duration, self time, outcome."""

    def __init__(self) -> None:
        self.ended: dict[str, tuple[float, float, str]] = {}

    def finish(self, span: Span, outcome: str) -> None:
        self.ended["/".join((span.agent_name, *span.path))] = (
            round(span.seconds, 9),
            round(span.self_seconds, 9),
            outcome,
        )

    def track(self, agent: str) -> Span:
        return Span(agent, None, self.finish)

    def span(self, agent: str, name: str, parent: Span | None = None) -> Span:
        return Span(agent, name, self.finish, parent)

    @property
    def own(self) -> float:
        return sum(own for _, own, _ in self.ended.values())


@pytest.fixture
def book() -> Book:
    return Book()


def test_nested_self_times_add_up(clock: Clock, book: Book) -> None:
    with book.track("a"):
        clock.now += 1
        with book.span("a", "plan"):
            clock.now += 2
            with book.span("a", "search"):
                clock.now += 4
            clock.now += 8
        clock.now += 16
    assert book.ended == {"a/plan/search": (4, 4, "ok"), "a/plan": (14, 10, "ok"), "a": (31, 17, "ok")}
    assert current_span() is None


def test_concurrent_spans_divide_their_time_equally(clock: Clock, book: Book) -> None:
    root, one, two = book.track("a"), book.span("a", "one"), book.span("a", "two")
    with root:
        one = book.span("a", "one", root)
        two = book.span("a", "two", root)
        one.__enter__()
        clock.now += 2  # only `one` is open
        two.__enter__()
        clock.now += 6  # both are open
        one.__exit__(None, None, None)
        clock.now += 3  # only `two` is open
        two.__exit__(None, None, None)
        clock.now += 1  # only the root is open
    assert book.ended == {"a/one": (8, 5, "ok"), "a/two": (9, 6, "ok"), "a": (12, 1, "ok")}
    assert book.own == 12


def test_nested_agent_has_its_own_tree(clock: Clock, book: Book) -> None:
    with book.track("boss"):
        clock.now += 1
        with book.track("helper"), book.span("helper", "read"):
            clock.now += 2
        with book.span("boss", "think"):
            clock.now += 4
    assert book.ended == {
        "helper/read": (2, 2, "ok"),
        "helper": (2, 0, "ok"),
        "boss/think": (4, 4, "ok"),
        "boss": (7, 3, "ok"),
    }


def test_spans_nest_across_tasks(book: Book) -> None:
    async def leaf(name: str) -> None:
        with book.span("a", name):
            await asyncio.sleep(0.02)

    async def main() -> None:
        with book.track("a"), book.span("a", "gather"):
            await asyncio.gather(leaf("one"), leaf("two"), leaf("three"))

    asyncio.run(main())
    assert set(book.ended) == {"a", "a/gather", "a/gather/one", "a/gather/two", "a/gather/three"}
    assert book.own == pytest.approx(book.ended["a"][0], abs=1e-6)


def test_spans_nest_in_threads_through_parent(book: Book) -> None:
    with book.track("a") as root:

        def work(name: str) -> None:
            assert current_span() is None, "threads start outside any span"
            with book.span("a", name, root), book.span("a", "inner"):
                time.sleep(0.02)

        threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(book.ended) == {"a", "a/one", "a/one/inner", "a/two", "a/two/inner"}
    assert book.own == pytest.approx(book.ended["a"][0], abs=1e-6)


def test_task_outliving_its_span_counts_for_itself(clock: Clock, book: Book) -> None:
    with book.track("a") as root:
        context = contextvars.copy_context()
        clock.now += 1
        outer = book.span("a", "outer", root).__enter__()
        late = book.span("a", "late", outer)
        outer.__exit__(None, None, None)
        late.__enter__()  # `outer` has ended, so `late` nests in the nearest open span around `outer`
        clock.now += 2
    assert root.self_seconds == 1
    clock.now += 4
    late.__exit__(None, None, None)
    assert book.ended["a/late"] == (6, 6, "ok")
    assert context.run(current_span) is None, "an ended span is no parent"


def test_span_starting_after_its_root_left_counts_alone(
    clock: Clock, book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = book.track("a").__enter__()
    around = Span._parent_around

    def left_meanwhile(span: Span, outer: Span | None) -> Span | None:
        parent = around(span, outer)
        root.__exit__(None, None, None)  # as if another thread ended the root just after this thread found it open
        return parent

    monkeypatch.setattr(Span, "_parent_around", left_meanwhile)
    clock.now += 1
    with book.span("a", "one", root) as late:
        clock.now += 2
    assert late.parent is root
    assert book.ended == {"a": (1, 1, "ok"), "a/one": (2, 2, "ok")}, "the root is no longer active"
    assert root.self_seconds == 1


def test_span_starting_while_its_root_leaves_counts_alone(clock: Clock, book: Book) -> None:
    late = book.span("a", "one")
    late._process = spans._process  # as `__enter__` does

    class Leaving(Span):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "is_open" and value is False and hasattr(self, "_start"):
                super().__setattr__(name, value)
                late._open_within(self)  # as if another thread had just found the root open, and entered `late` now
            else:
                super().__setattr__(name, value)

    root = Leaving("a", None, book.finish).__enter__()
    clock.now += 1
    root.__exit__(None, None, None)
    clock.now += 2
    late.__exit__(None, None, None)
    assert book.ended == {"a": (1, 1, "ok"), "a/one": (2, 2, "ok")}


def test_spans_starting_at_once_share_one_tree(clock: Clock, book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    made = spans._Tree

    def another_meanwhile(began: float) -> spans._Tree:
        tree = made(began)
        monkeypatch.setattr(spans, "_Tree", made)
        other.__enter__()  # as if another thread or a signal handler entered this span
        clock.now += 2
        return tree

    with book.track("a") as root:
        other, one = book.span("a", "other", root), book.span("a", "one", root)
        monkeypatch.setattr(spans, "_Tree", another_meanwhile)
        with one:
            clock.now += 4
        other.__exit__(None, None, None)
    assert one._tree is other._tree
    assert book.ended == {"a/one": (4, 2, "ok"), "a/other": (6, 4, "ok"), "a": (6, 0, "ok")}


def test_roots_leave_safely_while_threads_start_spans(book: Book) -> None:
    trees: list[spans._Tree | None] = []
    source = random.Random(7)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for turn in range(150):
            root = book.track("a")
            begun, left = threading.Barrier(3), threading.Event()

            def stages(
                turn: int = turn, root: Span = root, begun: threading.Barrier = begun, left: threading.Event = left
            ) -> None:
                def one() -> None:
                    with book.span("a", "stage", root) as stage:
                        pass
                    trees.append(stage._tree if stage.parent is root else None)

                if turn % 2:  # this span creates the root's tree before the exit
                    one()
                begun.wait(20)
                for _ in range(5):  # these spans may start during the exit
                    one()
                assert left.wait(20)
                one()  # this span starts after the exit

            others = [threading.Thread(target=stages) for _ in range(2)]
            with root:
                for other in others:
                    other.start()
                begun.wait(20)
                for _ in range(source.randrange(1000)):
                    current_span()
            left.set()
            for other in others:
                other.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(trees) == 75 * 2 * (6 + 7)
    within = [tree for tree in trees if tree is not None]
    assert 150 <= len(within) <= len(trees) - 300, (
        "in each thread, one span began before the root's exit, and one after it"
    )
    assert {tree.active for tree in within} == {0}


def test_self_times_of_random_trees_add_up(clock: Clock, book: Book) -> None:
    source = random.Random(7)
    for turn in range(50):
        book.ended.clear()
        root = book.track("a").__enter__()
        opened = [root]
        for number in range(source.randrange(1, 30)):
            clock.now += source.random()
            if len(opened) > 1 and source.random() < 0.5:
                opened.pop(source.randrange(1, len(opened))).__exit__(None, None, None)
            else:
                opened.append(book.span("a", f"{turn}.{number}", source.choice(opened)).__enter__())
        while opened:
            clock.now += source.random()
            opened.pop().__exit__(None, None, None)
        assert book.own == pytest.approx(root.seconds, abs=1e-6)


def test_blocks_record_their_outcomes(book: Book) -> None:
    with pytest.raises(KeyError), book.span("a", "raises"):
        raise KeyError
    with pytest.raises(asyncio.CancelledError), book.span("a", "cancelled"):
        raise asyncio.CancelledError
    with book.span("a", "marked") as span:
        span.fail("RateLimited")
    with book.span("a", "unnamed") as span:
        span.fail()
    assert {path: outcome for path, (_, _, outcome) in book.ended.items()} == {
        "a/raises": "err:KeyError",
        "a/cancelled": "cancelled",
        "a/marked": "err:RateLimited",
        "a/unnamed": "err",
    }
    with pytest.raises(InvalidArgument, match="error_type"):
        book.span("a", "x").fail("")


def test_span_is_entered_only_once(book: Book) -> None:
    with book.span("a", "x") as span, pytest.raises(AgentPerfError, match="once"):
        span.__enter__()


def test_span_depth_is_bounded(book: Book) -> None:
    def descend(depth: int) -> None:
        with book.span("a", f"{depth}"):
            if depth < 30:
                descend(depth + 1)

    descend(1)
    assert max(len(path.split("/")) for path in book.ended) == 1 + spans.MAX_SPAN_DEPTH


def test_abandoned_generator_releases_its_span(book: Book) -> None:
    def work() -> Generator[int, None, None]:
        with book.span("a", "inside"):
            yield 1
            yield 2

    stream = work()
    next(stream)
    with book.span("a", "outside"):
        stream.close()
        inner = current_span()
        assert inner is not None
        assert inner.path == ("inside", "outside")  # a plain generator runs in its consumer's context


def test_report_names_the_bottleneck() -> None:
    found = {
        (): (PerformanceMetrics("a", task_count=2), 1_000_000),
        ("plan",): (PerformanceMetrics("a/plan", task_count=2), 2_000_000),
        ("plan", "search"): (PerformanceMetrics("a/plan/search", task_count=9), 5_000_000),
        ("old",): (PerformanceMetrics("a/old"), 0),
    }
    report = span_report("a", found)
    assert report.total == 8.0
    assert report.bottleneck is not None
    assert (report.bottleneck.name, report.bottleneck.share, report.bottleneck.self_time) == ("plan/search", 0.625, 5.0)
    assert [span.name for span in report.spans] == ["plan/search", "plan", ""]
    assert [span.name for span in report.tree] == ["", "plan", "plan/search"]
    assert sum(span.share for span in report.spans) == 1.0
    assert span_report("a", {}).bottleneck is None


def test_forked_child_does_not_record_the_parents_span() -> None:
    reading, writing = os.pipe()
    recorded: list[str] = []
    with Span("agent", None, lambda span, outcome: recorded.append(outcome)):
        child = os.fork()
        if child:
            os.waitpid(child, 0)
    if child == 0:
        with Span("agent", None, lambda span, outcome: recorded.append(f"own {outcome}")):
            pass
        os.write(writing, ",".join(recorded).encode())
        os._exit(0)
    assert recorded == ["ok"]
    assert os.read(reading, 100) == b"own ok"
    os.close(reading)
    os.close(writing)


def test_child_records_a_span_that_it_enters_itself() -> None:
    recorded: list[str] = []
    span = Span("agent", None, lambda span, outcome: recorded.append(outcome))

    def child() -> None:
        with span:
            pass
        assert recorded == ["ok"]

    in_child(child)
    assert recorded == []


def test_child_cannot_defer_a_span_of_its_parent() -> None:
    with Span("agent", None, lambda span, outcome: None) as span:

        def child() -> None:
            assert span.defer() is False

        in_child(child)


def test_executions_around_are_listed_innermost_first(book: Book) -> None:
    assert executions_around() == ()
    with book.track("outer"), book.span("outer", "plan"), book.track("inner"):
        assert executions_around() == (("inner", ()), ("outer", ("plan",)))
        with book.span("inner", "a"), book.span("inner", "b"):
            assert executions_around()[0] == ("inner", ("a", "b"))
    with book.span("stage", "of no execution"):
        assert executions_around() == ()


def test_executions_around_follow_the_given_parent(book: Book) -> None:
    found = []
    with book.track("a") as root:

        def work() -> None:
            with book.span("a", "in a thread", root):
                found.append(executions_around())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [(("a", ("in a thread",)),)]


def test_measured_span_is_recorded_as_given(book: Book) -> None:
    book.track("a").record_measured(("plan", "search"), 4.0, 1.5, "err:KeyError")
    assert book.ended == {"a/plan/search": (4.0, 1.5, "err:KeyError")}


def test_call_within_a_span_leaves_no_trace(book: Book) -> None:
    found = []

    def look() -> None:
        span = current_span()
        assert span is not None
        found.append((span.agent_name, span.path))

    with book.track("outer"):
        book.track("a").call_within(("plan",), look)
        assert executions_around() == (("outer", ()),)
    assert found == [("a", ("plan",))]
    assert list(book.ended) == ["outer"]


def test_renamed_span_keeps_its_place(book: Book) -> None:
    with book.track("a") as root, book.span("a", "plan"), book.span("a", "response") as inner:
        inner.rename("chat m")
        root.rename("ignored")
        with pytest.raises(InvalidArgument):
            inner.rename("")
    assert sorted(book.ended) == ["a", "a/plan", "a/plan/chat m"]
