"""Records the spans of another tracer as executions, spans and model calls. Does no I/O and imports no tracer.

A tracer reports the start and the end of each span, on any thread. Spans that stand for the work of agents have a
`Description`: these are the *described* spans. The rules:

1. An agent span is an execution of its agent, even within the span of another agent.
2. Outside of agent spans, the outermost described span is an execution.
3. Any other described span is a span within the innermost execution around it. Spans without a description, such as
   HTTP requests, are ignored: their time belongs to the described span around them.
4. Two instrumentations may report the same work. The span of one then lies directly within the span of the other. A
   model span in a model span is the same call: only the outer span counts. An agent span in an agent span of the same
   agent is the same execution. The usage of an agent span counts only if no model span within it has counted.
5. The program may track executions itself (`track`, `track_performance`, other adapters). A span that begins in such an
   execution is left to the program: it is not recorded here, because the program records it. An agent span of another
   agent is recorded here with all spans within it, unless it lies within an agent span left to the program.

Executions and their spans are recorded when the execution ends. Tokens are recorded when the model call ends.
`MetricsCollector.running` lists each open agent span that names its agent at its start. A span that never ends is not
recorded. When the tracer drops such a span, this module forgets the span and the ended spans that wait for its
description. A forked child does not record the spans of its parent.
"""

from __future__ import annotations

import logging
import sys
import threading
import weakref
from asyncio import _get_running_loop
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias

from agentperf_redis.arguments import nearest_name
from agentperf_redis.background import register_for_fork
from agentperf_redis.metrics.accumulator import CANCELLED, FAILED, OK
from agentperf_redis.metrics.client import MetricsCollector
from agentperf_redis.metrics.spans import Span, executions_around, outcome_of

_log = logging.getLogger("agentperf_redis")

MAX_KEPT = 5000
"""Maximum number of ended spans that wait for the end of an execution. Others are recorded without self time."""
SHUTDOWN_S = 5.0
"""Maximum duration of the flush when a tracer shuts down."""
_MAX_NS = 366 * 86_400 * 10**9


class Kind(Enum):
    """The kind of work that a span stands for."""

    AGENT = "agent"
    MODEL = "model"
    TOOL = "tool"
    STEP = "step"
    SETUP = "setup"
    """Prepares an agent. It is never an execution."""


@dataclass(frozen=True, slots=True)
class Description:
    """The description of a span by its tracer.

    Attributes:
        kind: its kind.
        name: the name of the span within an execution, such as ``chat gpt-x``.
        agent: the agent of the execution, if the span is an execution; None means the fallback agent of `Traces`.
    """

    kind: Kind
    name: str
    agent: str | None = None


@dataclass(frozen=True, slots=True)
class ModelCall:
    """The usage of a model span, in the form that `MetricsCollector.record_llm` reads.

    Attributes:
        usage: token counts; empty if the span has none.
        model: the model, or None.
        cost: the cost, or 0.
    """

    usage: dict[str, Any]
    model: str | None = None
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class Ended:
    """An ended span.

    Attributes:
        description: its description; None if the span is to be ignored.
        start_ns: start, ns since 1970.
        end_ns: end, ns since 1970.
        outcome: ``ok``, ``err``, ``err:<type>`` or ``cancelled``.
        call: the usage of a model span, or the usage that an agent span itself reports; None for other spans.
    """

    description: Description | None
    start_ns: int
    end_ns: int
    outcome: str = OK
    call: ModelCall | None = None


_Tracked: TypeAlias = tuple[str, tuple[str, ...]]
"""Agent and path of a span that the program tracks."""


@dataclass(slots=True, eq=False)
class _Node:
    """A span of the tracer."""

    owner: Traces
    parent: _Node | None
    source: weakref.ref[Any]
    around: tuple[_Tracked, ...]
    """The executions that the program tracks and in which this span began, the innermost first."""
    error_before: int
    """Id of the exception that was being handled when the span began."""
    described: Description | None = None
    """The tracer's description of this span, as far as it is known."""
    repeats: bool | None = None
    """Whether this agent span reports the same work as the agent span around it; None until the span is described."""
    is_over: bool = False
    ended: Ended | None = None
    around_end: tuple[_Tracked, ...] = ()
    """The tracked executions in which this span ended. Another adapter may begin to track one after this span's
    start."""
    settled: bool = False
    listed: Span | None = None
    """The entry for this agent span in the list of open executions; None if the span is not listed."""
    kept: list[_Node] = field(default_factory=list)
    """If this span is an execution: the ended spans in it."""
    waiting: list[_Node] = field(default_factory=list)
    """Ended spans in this span that are not recorded yet, since the tracer describes this span only at its end."""
    inner_call: ModelCall | None = None
    has_calls: bool = False

    @property
    def description(self) -> Description | None:
        """The description; None for a span that is ignored."""
        return None if self.repeats else self.described


class OpenSpans(dict[Hashable, Any]):
    """A tracer's open spans in this process, by key. Processors of one `AgentPerf` share them: each span counts once.

    Attributes:
        lock: held while ended spans are recorded.
    """

    __slots__ = ("__weakref__", "lock")

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.RLock()  # reentrant: garbage collection may end a span while this thread ends another
        register_for_fork(self)

    def after_fork(self) -> None:
        """Forget the open spans that a forked child copied from its parent. The parent records them."""
        self.clear()
        self.lock = threading.RLock()


class Failures:
    """Logs the first failure of a processor. A processor must not raise into the traced program."""

    def __init__(self) -> None:
        self._logged = False

    def log(self) -> None:
        """Log the current exception, if no earlier one was logged."""
        if not self._logged:
            self._logged = True
            _log.exception("a span could not be recorded; further failures are not logged")


def flush(metrics: MetricsCollector, seconds: float) -> bool:
    """Flush on behalf of a tracer. The tracer waits for the result, and gets no exception.

    Args:
        metrics: the collector.
        seconds: max seconds to wait.

    Returns:
        Whether the server has counted all records.
    """
    flushed = False
    seconds = max(0.0, seconds)

    def wait() -> None:
        nonlocal flushed
        try:
            flushed = metrics.flush(seconds)
        except Exception as error:  # noqa: BLE001  the records are kept and sent again
            _log.warning("spans are not counted yet: %s", error)

    if _get_running_loop() is None:
        wait()
    else:  # A tracer has no asyncio method for a flush. So `join` blocks the event loop, as an exporter's flush does.
        thread = threading.Thread(target=wait, name="agentperf-traces-flush", daemon=True)
        thread.start()
        thread.join(seconds)
    return flushed


class Traces:
    """Records the spans that one processor reports.

    Args:
        metrics: the collector.
        open_spans: the open spans of the `AgentPerf`.
        describe: returns the description of an open span, as known so far.
        is_late: returns whether an open span without a description may get one at its end.
        agent: the fallback for executions that name no agent.
        in_tracked: whether rule 5 of this module is off. If so, spans in an execution that the program tracks are
            recorded as spans of that execution, without self time.
        usage: whether to count model calls, tokens and cost.
    """

    def __init__(
        self,
        metrics: MetricsCollector,
        open_spans: OpenSpans,
        *,
        describe: Callable[[Any], Description | None],
        is_late: Callable[[Any], bool],
        agent: str,
        in_tracked: bool,
        usage: bool,
    ) -> None:
        self._metrics = metrics
        self._open = open_spans
        self._describe = describe
        self._is_late = is_late
        self._agent = agent
        self._in_tracked = in_tracked
        self._usage = usage

    def begin(self, key: Hashable, parent: Hashable, span: Any) -> None:
        """Note that a span begins.

        Args:
            key: identifies the span in this process.
            parent: the key of the span around this span, or None.
            span: the tracer's object. It is referenced only weakly.
        """
        if key in self._open:
            return  # another processor of the same AgentPerf has already reported the span
        source = weakref.ref(span, lambda _: self._open.pop(key, None))
        around = self._open.get(parent)
        node = self._open[key] = _Node(self, around, source, executions_around(), id(sys.exception()))
        self._list(node)

    def _list(self, node: _Node) -> None:
        """List an agent span among the open executions, unless the program tracks the same agent around it."""
        if self._known(node) is None or self._kind(node) is not Kind.AGENT:
            return
        agent = self._agent_of(node)
        if all(each[0] != agent for each in node.around):
            node.listed = self._metrics.track(agent)
            node.listed.list_as_open()

    def end(self, key: Hashable, ended: Callable[[], Ended]) -> None:
        """Note that a span ends, and record all spans that are now complete.

        Args:
            key: as for `begin`. Unknown spans are ignored.
            ended: returns the final description of the span.
        """
        node = self._open.get(key)
        if node is None or node.owner is not self:
            return
        del self._open[key]
        if node.listed is not None:
            node.listed.unlist()
        result = ended()
        node.described, node.is_over = result.description, True
        if result.description is not None:
            node.around_end = executions_around()
            node.ended = result = _with_cancellation(result, node.error_before)
        with self._open.lock:
            waiting, node.waiting = node.waiting, []
            for each in waiting:
                self._place(each)
            if node.ended is not None:
                self._place(node)

    def _place(self, node: _Node) -> None:
        """Settle an ended span. If a span around it is not described yet, first wait for the end of that span."""
        around = node.parent
        while around is not None:
            known = self._known(around)
            if known is not None and known.kind is Kind.AGENT:
                break
            if known is None and not around.is_over and len(around.waiting) < MAX_KEPT:
                source = around.source()
                if source is not None and self._is_late(source):
                    around.waiting.append(node)
                    return
            around = around.parent
        self._settle(node)

    def _known(self, node: _Node) -> Description | None:
        if node.described is None and not node.is_over:
            source = node.source()
            node.described = None if source is None else self._describe(source)
        if node.described is not None and node.repeats is None:
            node.repeats = node.described.kind is Kind.AGENT and self._repeats(node)
        return node.description

    def _repeats(self, node: _Node) -> bool:
        outer = self._described_around(node)
        return outer is not None and self._kind(outer) is Kind.AGENT and self._agent_of(outer) == self._agent_of(node)

    def _settle(self, node: _Node) -> None:
        """Record an ended span that no longer waits for the description of a span around it."""
        node.settled = True
        if self._known(node) is None:
            self._pass_on(node)
            return
        execution, names = self._execution_of(node)
        if self._kind(node) is Kind.SETUP and execution is node:
            return
        tracked = self._tracked(execution, node)
        if tracked is not None:
            self._settle_in_tracked(node, execution, names, tracked)
            return
        agent = self._agent_of(execution)
        self._count(node, agent, names)
        if execution is node:
            self._record_execution(node, agent)
        elif not execution.settled and len(execution.kept) < MAX_KEPT:
            execution.kept.append(node)
        else:
            self._record(node, agent, names, 0.0)

    def _settle_in_tracked(self, node: _Node, execution: _Node, names: tuple[str, ...], tracked: _Tracked) -> None:
        if not self._in_tracked:
            self._mark_called(node)
            return
        agent, path = tracked
        if tracked not in (*execution.around, *execution.around_end):
            names = (self._name(node),)  # the tracked execution began within `execution`
        elif self._kind(execution) is not Kind.AGENT:
            names = (self._name(execution), *names)
        self._count(node, agent, path + names)
        if names:
            self._record(node, agent, path + names, 0.0)

    def _execution_of(self, node: _Node) -> tuple[_Node, tuple[str, ...]]:
        """Return the execution of a span, and the path of the span in it."""
        execution, path = node, [self._name(node)]
        around = node.parent
        while around is not None and self._kind(execution) is not Kind.AGENT:
            known = self._known(around)
            if known is not None and known.kind is not Kind.SETUP:
                execution = around
                path.append(self._name(around))
            around = around.parent
        return execution, tuple(reversed(path[:-1]))

    @staticmethod
    def _kind(node: _Node) -> Kind | None:
        return None if node.description is None else node.description.kind

    @staticmethod
    def _name(node: _Node) -> str:
        return "?" if node.description is None else nearest_name(node.description.name)

    def _agent_of(self, execution: _Node) -> str:
        named = None if execution.described is None else execution.described.agent
        return nearest_name(named or self._agent)

    def _tracked(self, execution: _Node, node: _Node) -> _Tracked | None:
        """Return the tracked execution that makes rule 5 leave this span to the program, or None."""
        if node is not execution:
            for each in (*node.around, *node.around_end):
                if each not in execution.around:
                    return each  # this tracked execution began within `execution`
        if self._kind(execution) is not Kind.AGENT:
            return execution.around[0] if execution.around else None
        around: _Node | None = execution
        while around is not None:
            if self._kind(around) is Kind.AGENT:
                agent = self._agent_of(around)
                for each in (*around.around, *around.around_end):
                    if each[0] == agent:
                        return each
            around = None if self._in_tracked else around.parent
        return None

    # -- recording

    def _count(self, node: _Node, agent: str, path: tuple[str, ...]) -> None:
        """Count a tool call, or the usage of a model call, for the agent and for the span."""
        if node.ended is None:
            return
        if self._kind(node) is Kind.TOOL:
            self._metrics.track(agent).call_within(path, self._metrics.record_tool_calls)
            return
        call = node.ended.call
        if self._kind(node) is Kind.MODEL:
            call = _better(call, node.inner_call)
            outer = self._described_around(node)
            if outer is not None and self._kind(outer) is Kind.MODEL:
                outer.inner_call = _better(outer.inner_call, call)
                return
            if call is None or (not call.usage and node.ended.outcome != OK):
                return  # a failed call without usage does not count
        else:
            call = _better(call, node.inner_call)
            if call is None or not call.usage or node.has_calls:
                return
        self._mark_called(node)
        if not self._usage:
            return
        record = self._metrics.record_llm
        self._metrics.track(agent).call_within(path, lambda: record(usage=call))

    def _pass_on(self, node: _Node) -> None:
        """If an agent span repeats the one around it, pass its usage on to that outer span."""
        outer = self._described_around(node)
        if outer is not None and node.ended is not None:
            outer.inner_call = _better(outer.inner_call, _better(node.ended.call, node.inner_call))

    def _described_around(self, node: _Node) -> _Node | None:
        around = node.parent
        while around is not None and self._known(around) is None:
            around = around.parent
        return around

    @staticmethod
    def _mark_called(node: _Node | None) -> None:
        while node is not None:
            node.has_calls = True
            node = node.parent

    def _record(self, node: _Node, agent: str, path: tuple[str, ...], self_s: float) -> None:
        if node.ended is not None:
            seconds = _duration_ns(node.ended) / 1e9
            self._metrics.track(agent).record_measured(path, seconds, self_s, node.ended.outcome)

    def _record_execution(self, node: _Node, agent: str) -> None:
        members = [node, *node.kept]
        node.kept = []
        places = {id(each): index for index, each in enumerate(members)}
        times = []
        for each in members:
            around = each.parent
            while around is not None and id(around) not in places:
                around = around.parent
            times.append((each.ended, -1 if around is None or each is node else places[id(around)]))
        owns = self_times(
            [(ended.start_ns, ended.start_ns + _duration_ns(ended), parent) for ended, parent in times if ended]
        )
        for each, own in zip(members, owns, strict=True):
            self._record(each, agent, self._execution_of(each)[1], own / 1e9)


def _better(one: ModelCall | None, other: ModelCall | None) -> ModelCall | None:
    """Return `one` if it has a usage or is the only call, else `other`."""
    return one if (one is not None and one.usage) or other is None else other


def _duration_ns(ended: Ended) -> int:
    return min(max(0, ended.end_ns - ended.start_ns), _MAX_NS)


def _with_cancellation(ended: Ended, error_before: int) -> Ended:
    """Return the span as cancelled if a cancellation ends it. OpenTelemetry itself reports only errors."""
    error = sys.exception()
    if ended.outcome != OK or error is None or id(error) == error_before or outcome_of(error) != CANCELLED:
        return ended
    return Ended(ended.description, ended.start_ns, ended.end_ns, CANCELLED, ended.call)


def failure(error_type: object) -> str:
    """Return the outcome of a span that failed. A qualified class name counts under its last part, as in `track`.

    Args:
        error_type: the type as the tracer reports it. An empty string, or an object that is not a string, counts as an
            unknown type.
    """
    if not isinstance(error_type, str) or not error_type:
        return FAILED
    last = error_type.rpartition(".")[2]
    name = last if last and all(part.isidentifier() for part in error_type.split(".")) else error_type
    if name in ("CancelledError", "GeneratorExit", "Cancelled"):
        return CANCELLED
    return f"{FAILED}:{nearest_name(name)}"


def self_times(spans: list[tuple[int, int, int]]) -> list[float]:
    """Return the self time of each span of an execution: the time in which it is open without an open child.

    If several spans are open without an open child, they share this time equally, as in
    `agentperf_redis.metrics.spans`. The self times therefore add up to the duration of the execution.

    Args:
        spans: for each span its start, its end and the index of its parent. The first span is the execution; the time
            before its start and after its end does not count. All times have the same unit; any unit will do.
    """
    first, last, _ = spans[0]
    owns = [0.0] * len(spans)
    events = []
    for index, (start, end, _) in enumerate(spans):
        start, end = max(start, first), min(end, last)  # noqa: PLW2901  only time within the execution counts
        if start < end:
            events += [(start, 1, index), (end, 0, -index)]
    events.sort()  # at equal times, ends come before starts; the execution (index 0) starts first and ends last
    return _swept(spans, events, owns)


def _swept(spans: list[tuple[int, int, int]], events: list[tuple[int, int, int]], owns: list[float]) -> list[float]:
    children = [0] * len(spans)
    is_open = [False] * len(spans)
    since: dict[int, float] = {}
    """Index of each active span -> time on the virtual clock when the span became active."""
    virtual = 0.0
    clock = events[0][0] if events else 0

    def stop(index: int) -> None:
        if index in since:
            owns[index] += virtual - since.pop(index)

    for at, starts, number in events:
        if since:
            virtual += (at - clock) / len(since)
        clock = at
        index = abs(number)
        parent = spans[index][2]
        is_open[index] = bool(starts)
        if not starts:
            stop(index)
        elif children[index] == 0:
            since[index] = virtual
        if parent >= 0:
            children[parent] += 1 if starts else -1
            if starts:
                stop(parent)
            elif children[parent] == 0 and is_open[parent]:
                since[parent] = virtual
    return owns
