"""Spans: the stages of an agent's work, and the time that each takes.

A span is a named part of the work within another span or an execution. A context variable holds the current span, so
spans nest through functions, coroutines and tasks. A new thread has no current span, so pass `parent=` there.

Self time: an open span without an open child is *active*. Time in which several spans are active (in tasks or threads)
is divided among them equally. The self times of a tree therefore add up exactly to its total time, even if spans ran
concurrently. Self times are computed with a virtual clock, which runs at 1/k of real time while k spans are active. The
self time of a span is the advance of this clock while the span was active. Opening and closing a span therefore costs
O(1).
(The virtual clock is that of processor sharing: Parekh and Gallager, "A generalized processor sharing approach to flow
control", 1993.)
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Self

from agentperf_redis import arguments
from agentperf_redis.background import ModuleLock, register_for_fork
from agentperf_redis.errors import AgentPerfError
from agentperf_redis.metrics.accumulator import CANCELLED, FAILED, OK, Part
from agentperf_redis.metrics.model import OTHER, PerformanceMetrics
from agentperf_redis.metrics.open_executions import OpenExecutions

_log = logging.getLogger("agentperf_redis")

MAX_SPAN_DEPTH = 16
"""Spans nested deeper than this count as part of the span at this depth."""


class _Tree:
    """The shared state of a root span and all spans within it.

    The first nested span creates the tree. Most executions have no nested spans and never need a tree: a span without
    children is always active.

    Attributes:
        lock: held during every change of this state and of the spans in this tree.
        clock: real time to which `virtual` has been advanced.
        virtual: the virtual clock; see the module docstring.
        active: number of active spans.
        late: whether the block of the root was already ending when the tree was created. If so, `active` does not count
            the root.
    """

    __slots__ = ("active", "clock", "late", "lock", "virtual")

    def __init__(self, began: float) -> None:
        self.lock = threading.RLock()
        self.clock = began
        self.virtual = 0.0
        self.active = 0
        self.late = False

    def advance(self, now: float) -> None:
        if now > self.clock:
            if self.active:
                self.virtual += (now - self.clock) / self.active
            self.clock = now


_tree_creation = ModuleLock(threading.RLock)
"""Held only while a tree is created, and never during a wait."""


class _Forks:
    """Replaces the token of this process in each forked child."""

    def __init__(self) -> None:
        register_for_fork(self)

    def after_fork(self) -> None:
        global _process  # noqa: PLW0603  each span reads it, and a global is the fastest to read
        _process = object()


_process = object()
"""Identifies this process. A span that a fork has copied from the parent still has the parent's object."""
_forks = _Forks()
_DEFERRED = object()
_UNLISTED = OpenExecutions(lambda: None)
_UNLISTED.add = _UNLISTED.discard
"""A list that stays empty. It is for spans that no collector has made."""

_current: contextvars.ContextVar[Span | None] = contextvars.ContextVar("agentperf_span", default=None)


def current_span() -> Span | None:
    """Return the open span that the running code is in; None if there is none."""
    span = _current.get()
    while span is not None and not span.is_open:
        span = span.parent
    return span


def executions_around() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the tracked executions that the running code is in, the innermost first.

    Returns:
        For each execution, its agent and the path of its innermost span around the running code.
    """
    found = []
    span = _current.get()
    while span is not None:
        path = span.path if span.is_open else None
        while span.parent is not None:
            span = span.parent
            path = span.path if path is None and span.is_open else path
        if path is not None and not span.path:
            found.append((span.agent_name, path))
        span = span._outer  # noqa: SLF001  the same module
    return tuple(found)


class Span:
    """An open execution or span: ``with collector.track("research"):``, ``with collector.span("research", "plan"):``.

    A span can be entered once. An exception that leaves the block is recorded as a failure of its type, or as a
    cancellation.

    Attributes:
        agent_name: the agent.
        path: names from the outermost span to this one; empty for an execution.
        parent: the span around this one, or None.
        seconds: duration of the span, once it is over.
        self_seconds: self time of the span; see the module docstring.
    """

    __slots__ = (
        "__weakref__",
        "_children",
        "_executions",
        "_failure",
        "_finish",
        "_innermost",
        "_not_failures",
        "_outer",
        "_parent_given",
        "_process",
        "_start",
        "_tree",
        "_virtual_start",
        "agent_name",
        "is_open",
        "parent",
        "path",
        "seconds",
        "self_seconds",
    )

    _innermost: Span
    _outer: Span | None
    _process: object
    _start: float

    def __init__(
        self,
        agent_name: str,
        name: str | None,
        finish: Callable[[Span, str], None],
        parent: Span | None = None,
        not_failures: tuple[type[BaseException], ...] = (),
        executions: OpenExecutions = _UNLISTED,
    ) -> None:
        self.agent_name = agent_name
        self.path: tuple[str, ...] = () if name is None else (name,)
        self.parent: Span | None = None
        self.seconds = 0.0
        self.self_seconds = 0.0
        self.is_open = False
        self._parent_given = parent
        self._finish = finish
        self._children = 0
        self._failure: str | None = None
        self._not_failures = not_failures
        self._executions = executions
        self._tree: _Tree | None = None
        self._virtual_start: float | None = None
        """Time on the virtual clock when this span became active; None while the tree does not count it as active."""

    def fail(self, error_type: str | None = None) -> None:
        """Record the block as a failure, even if it ends without an exception.

        Args:
            error_type: type of the failure, 1 to 200 characters, or None.

        Raises:
            InvalidArgument: for an invalid type.
        """
        self._failure = FAILED if error_type is None else f"{FAILED}:{arguments.name('error_type', error_type)}"

    def __enter__(self) -> Self:
        if self.is_open or self.seconds:
            raise AgentPerfError("a span can be entered only once; make a new one")
        self._process = _process
        outer = self._outer = _current.get()
        parent = self._parent_around(outer) if self.path else None
        if parent is None:
            self._start = perf_counter()
            self.is_open = True
            self._executions.add(self)
        else:
            self._open_within(parent)
        _current.set(self)
        return self

    def _open_within(self, parent: Span) -> None:
        self.parent = parent
        self.path = (parent.path + self.path)[:MAX_SPAN_DEPTH]
        tree = self._tree = parent._shared_tree()
        with tree.lock:
            now = self._start = perf_counter()
            tree.advance(now)
            parent._child_opened(tree)
            self.is_open = True
            self._put_to_work(tree)

    def _shared_tree(self) -> _Tree:
        """Return the tree of this span. If this span is a root that had no children yet, create the tree.

        While there is no tree, `__exit__` takes no lock: it first clears `is_open`, then reads `_tree`. This method
        first sets `_tree`, then reads `is_open`. If both methods run at the same time, at least one of them sees the
        change of the other. Under the lock of the tree, both methods then see whether the tree counts the root.
        """
        if self._tree is None:
            tree = _Tree(self._start)
            with _tree_creation.lock, tree.lock:
                if self._tree is None:
                    self._tree = tree
                    tree.late = not self.is_open
                    if not tree.late:
                        self._put_to_work(tree)
        return self._tree

    def _parent_around(self, outer: Span | None) -> Span | None:
        """Return the open span around this one. None if that span has another agent: each agent has its own tree."""
        parent = self._parent_given
        if parent is None or not parent.is_open:
            parent = outer if parent is None else parent.parent
            while parent is not None and not parent.is_open:
                parent = parent.parent
        return parent if parent is not None and parent.agent_name == self.agent_name else None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not _process:
            self._exit_without_record()
            return
        self.is_open = False
        tree = self._tree
        if tree is None:
            self.seconds = self.self_seconds = perf_counter() - self._start
            self._executions.discard(self)
        else:
            self._leave(tree)
        if _current.get() is self:
            _current.set(self._outer)
        try:
            normal = error is None or isinstance(error, self._not_failures)
            self._finish(self, (self._failure or OK) if normal else outcome_of(error))
        except Exception:  # noqa: BLE001  a failed record must not affect the block
            not_recorded(self.agent_name)

    def list_as_open(self) -> None:
        """List the execution among the open ones, until `unlist` is called or the execution is garbage-collected.

        The execution must never be entered, and it does not become the current span.
        """
        self._start = perf_counter()
        self.is_open = True
        self._executions.add(self)

    def unlist(self) -> None:
        """Remove the execution from the list of open ones. Nothing is recorded."""
        self.is_open = False
        self._executions.discard(self)

    def record_measured(self, path: tuple[str, ...], seconds: float, self_seconds: float, outcome: str) -> None:
        """Record the values that another tracer measured for this span. The span itself must not be entered.

        Args:
            path: names from the outermost span to this one; empty for an execution.
            seconds: duration.
            self_seconds: self time.
            outcome: ``ok``, ``err``, ``err:<type>`` or ``cancelled``.
        """
        self.path, self.seconds, self.self_seconds = path[:MAX_SPAN_DEPTH], seconds, self_seconds
        self._finish(self, outcome)

    def rename(self, name: str) -> None:
        """Rename an entered span. Spans opened in it later have the new path. An execution keeps its agent's name."""
        if self.path:
            self.path = (*self.path[:-1], arguments.name("name", name))

    def call_within(self, path: tuple[str, ...], function: Callable[[], None]) -> None:
        """Call a function as if the code ran in this span, and record no time.

        Args:
            path: names from the outermost span to this one; empty for an execution.
            function: is called once, with a copy of the context variables.
        """
        self.path, self._outer, self.is_open = path[:MAX_SPAN_DEPTH], None, True

        def call() -> None:
            _current.set(self)
            function()

        try:
            contextvars.copy_context().run(call)
        finally:
            self.is_open = False

    def defer(self) -> bool:
        """Keep the span open but suspended when its block ends. A later `resume` and `__exit__` end the span.

        Returns:
            False in a child that was forked within the block, since the span belongs to the parent process.
        """
        if self._process is not _process:
            return False
        self._process = _DEFERRED
        return True

    def _exit_without_record(self) -> None:
        if self._process is _DEFERRED:
            self._process = _process
            self.suspend()
            return
        # This process was forked within the block. The parent process records the span.
        self.is_open = False
        if _current.get() is self:
            _current.set(self._outer)

    def _leave(self, tree: _Tree) -> None:
        with tree.lock:
            now = perf_counter()
            tree.advance(now)
            self.seconds = now - self._start
            if self.parent is None:
                self._executions.discard(self)
                if tree.late:
                    self.self_seconds = self.seconds
            self._stop_working(tree)
            if self.parent is not None:
                self.parent._child_closed(tree)  # noqa: SLF001  the same class

    def suspend(self) -> None:
        """Pause the span. A generator does this at each ``yield``: the work of its consumer is not part of the span."""
        tree = self._shared_tree()
        inner = _current.get()
        self._innermost = inner if inner is not None and inner.is_open and inner._tree is tree else self  # noqa: SLF001
        with tree.lock:
            tree.advance(perf_counter())
            self._innermost._child_opened(tree)  # noqa: SLF001  the consumer counts as an unrecorded child
        _current.set(self._outer)

    def resume(self) -> None:
        """Continue after `suspend`."""
        tree = self._shared_tree()
        with tree.lock:
            tree.advance(perf_counter())
            self._innermost._child_closed(tree)  # noqa: SLF001  as above
        self._outer = _current.get()
        _current.set(self._innermost)

    def _child_opened(self, tree: _Tree) -> None:
        self._children += 1
        self._stop_working(tree)

    def _child_closed(self, tree: _Tree) -> None:
        self._children -= 1
        if self._children == 0 and self.is_open:
            self._put_to_work(tree)

    def _put_to_work(self, tree: _Tree) -> None:
        tree.active += 1
        self._virtual_start = tree.virtual

    def _stop_working(self, tree: _Tree) -> None:
        if self._virtual_start is not None:
            tree.active -= 1
            self.self_seconds += tree.virtual - self._virtual_start
            self._virtual_start = None

    @property
    def part(self) -> str | Part:
        """The series under which the span is recorded: an agent, or a part of an agent."""
        return Part(self.agent_name, self.path) if self.path else self.agent_name


def outcome_of(error: BaseException | None) -> str:
    """Return the outcome of a block that ended with this error; None stands for no error."""
    if error is None:
        return OK
    if _is_cancellation(error):
        return CANCELLED
    return f"{FAILED}:{arguments.nearest_name(_class_name(type(error)))}"


def _is_cancellation(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_cancellation, error.exceptions))
    if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
        return True
    trio = None if isinstance(error, Exception) else sys.modules.get("trio")  # anyio on trio raises trio.Cancelled too
    return trio is not None and isinstance(error, trio.Cancelled)


_class_name: Callable[[type], str] = type.__dict__["__name__"].__get__
"""Returns the name with which a class was created. Reading ``__name__`` might run code of a metaclass."""


def not_recorded(agent_name: str) -> None:
    """Log the current exception instead of raising it: the tracked code keeps its own result or exception."""
    _log.exception("an execution of %r could not be recorded", agent_name)


@dataclass(frozen=True, slots=True)
class SpanMetrics:
    """All occurrences of one span of an agent.

    Attributes:
        path: names from the outermost span to this one; empty for the executions themselves.
        metrics: count, durations and errors. Durations run from start to end and include nested spans.
        self_time: time spent outside nested spans, s; see `agentperf_redis.metrics.spans`.
        share: self time of this span, divided by the sum of the self times of all spans of the agent; 0 to 1.
    """

    path: tuple[str, ...]
    metrics: PerformanceMetrics
    self_time: float
    share: float

    @property
    def name(self) -> str:
        """The path as text: ``plan/search``; empty for the executions themselves."""
        return "/".join(self.path)


@dataclass(frozen=True, slots=True)
class SpanReport:
    """How much time an agent spent in each of its spans.

    Attributes:
        agent_name: the agent.
        total: sum of the self times of all spans, s.
        spans: all spans, the most expensive first.
    """

    agent_name: str
    total: float
    spans: tuple[SpanMetrics, ...]

    @property
    def bottleneck(self) -> SpanMetrics | None:
        """The span with the largest self time; None when there are no spans."""
        return self.spans[0] if self.spans else None

    @property
    def tree(self) -> tuple[SpanMetrics, ...]:
        """The spans in nesting order: each follows the span around it."""
        return tuple(sorted(self.spans, key=lambda span: span.path))


def span_report(agent_name: str, found: Mapping[tuple[str, ...], tuple[PerformanceMetrics, int]]) -> SpanReport:
    """Make the report of an agent.

    Args:
        agent_name: the agent.
        found: maps the path of each span to its metrics and its self time in us.
    """
    total = sum(self_us for _, self_us in found.values())
    spans = [
        SpanMetrics(path, metrics, self_us / 1e6, self_us / total if total else 0.0)
        for path, (metrics, self_us) in found.items()
        if metrics.task_count or self_us
    ]
    spans.sort(key=lambda span: (-span.self_time, span.path == (OTHER,), span.path))
    return SpanReport(agent_name, total / 1e6, tuple(spans))
