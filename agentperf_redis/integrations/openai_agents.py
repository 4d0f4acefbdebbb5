"""Turns the traces of the OpenAI Agents SDK into executions, spans, model calls and tokens.

::

    add_trace_processor(AgentPerfTracingProcessor(perf))

Each agent span is an execution of its agent. This is also true if another agent calls the agent as a tool or hands off
to it. Model calls, tools, handoffs, guardrails and custom spans are spans within the execution. Outside of agents, the
outermost of these spans is an execution of the trace's workflow. Spans of tasks and turns are not recorded, because
they repeat the usage of their model calls.

The error type of a failed span is the class of the exception that ends it. Without an exception, the error type is the
message that the SDK or the program passed to `set_error`. So keep texts of users out of that message.

Each execution is tracked in the same way as by `MetricsCollector.track`. So tools may call `record_llm` and
`MetricsCollector.span`, and `AgentPerfSpanProcessor` does not record the execution a second time. A program that uses
this processor must not record the same runs itself.

Lost: runs with tracing disabled (``set_tracing_disabled``, ``RunConfig(tracing_disabled=True)``) and spans that never
end. With ``RunConfig(trace_include_sensitive_data=False)``, the tokens of OpenAI's Responses API have no model name.
The processor raises nothing into the program, and does no I/O except in `force_flush` and `shutdown`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agentperf_redis.agentperf import AgentPerf, checked_perf
from agentperf_redis.arguments import nearest_name
from agentperf_redis.extras import extra
from agentperf_redis.metrics.spans import Span
from agentperf_redis.metrics.traces import SHUTDOWN_S, Failures, OpenSpans, flush

with extra("openai-agents"):
    from agents.tracing import Span as TracedSpan
    from agents.tracing import Trace, TracingProcessor

_FLUSH_S = 30.0
_AGENT, _TOOL, _MODEL = "agent", "function", ("generation", "response")
_NAMES: dict[str, Callable[[Any], str]] = {
    _TOOL: lambda data: f"execute_tool {data.name}",
    "generation": lambda data: f"chat {data.model or ''}".strip(),
    "response": lambda data: f"chat {getattr(data.response, 'model', None) or ''}".strip(),
    "handoff": lambda data: f"handoff {data.to_agent or ''}".strip(),
    "guardrail": lambda data: f"guardrail {data.name}",
    "mcp_tools": lambda data: f"mcp_tools {data.server or ''}".strip(),
    "transcription": lambda data: f"transcription {data.model or ''}".strip(),
    "speech": lambda data: f"speech {data.model or ''}".strip(),
    "speech_group": lambda _: "speech_group",
    "custom": lambda data: str(data.name),
}
"""Type of a span, as of openai-agents 0.24.0 -> its name within an execution. Some names are known only at the end."""


@dataclass(slots=True)
class _Open:
    """A span of the SDK that has begun."""

    owner: AgentPerfTracingProcessor
    span: Span | None
    """The span that records this span of the SDK; None if it is not recorded."""
    parent: str | None
    error_before: int
    """Id of the exception that was being handled when the span began."""
    dropped: weakref.ref[Any]
    """A weak reference to the SDK's span. If the SDK drops the span without an end, its callback forgets the span."""


class AgentPerfTracingProcessor(TracingProcessor):
    """Feeds the spans of the OpenAI Agents SDK into the metrics of an `AgentPerf`.

    Args:
        perf: the metrics. The processor never closes it. Several processors of one `AgentPerf` count each span once;
            processors of several AgentPerf objects count a span several times, even in one namespace.

    Raises:
        InvalidArgument: if `perf` is no AgentPerf.
    """

    def __init__(self, perf: AgentPerf) -> None:
        self._metrics = checked_perf(perf).metrics
        self._open = perf.backend.share("openai_agents.open_spans", OpenSpans)
        self._traces: weakref.WeakValueDictionary[str, Trace] = weakref.WeakValueDictionary()
        self._is_over = False
        self._failures = Failures()

    def on_trace_start(self, trace: Trace) -> None:
        """Note a trace."""
        self._traces[trace.trace_id] = trace

    def on_trace_end(self, trace: Trace) -> None:
        """Forget a trace."""
        self._traces.pop(trace.trace_id, None)

    def on_span_start(self, span: TracedSpan[Any]) -> None:
        """Begin an execution or a span."""
        if self._is_over or span.span_id in self._open:
            return
        try:
            self._begin(span)
        except Exception:  # noqa: BLE001  the traced program must not fail
            self._failures.log()

    def on_span_end(self, span: TracedSpan[Any]) -> None:
        """Record the execution or the span."""
        found: _Open | None = self._open.get(span.span_id)
        if found is None or found.owner is not self:
            return
        del self._open[span.span_id]
        if found.span is None:
            return
        if self._is_over:
            found.span.unlist()
            return
        try:
            self._end(span, found.span, found.error_before)
        except Exception:  # noqa: BLE001  as above
            self._failures.log()

    def force_flush(self) -> None:
        """Wait until the server has counted all records, for 30 seconds at most."""
        flush(self._metrics, _FLUSH_S)

    def shutdown(self) -> None:
        """Flush for five seconds at most, and ignore all later spans."""
        if not self._is_over:
            self._is_over = True
            flush(self._metrics, SHUTDOWN_S)

    def _begin(self, span: TracedSpan[Any]) -> None:
        span_id = span.span_id
        dropped = weakref.ref(span, lambda _: self._forget(span_id))
        made = self._made(span)
        if made is not None:
            made.__enter__()
        self._open[span_id] = _Open(self, made, span.parent_id, id(sys.exception()), dropped)

    def _forget(self, span_id: str) -> None:
        """Forget a span that the SDK has dropped without an end."""
        found: _Open | None = self._open.pop(span_id, None)
        if found is not None and found.span is not None:
            found.span.unlist()

    def _made(self, span: TracedSpan[Any]) -> Span | None:
        data = span.span_data
        if data.type == _AGENT:
            return self._metrics.track(nearest_name(data.name))
        if data.type not in _NAMES:
            return None
        around = self._around(span.parent_id)
        if around is None:
            trace = self._traces.get(span.trace_id)
            return self._metrics.track(nearest_name("workflow" if trace is None else trace.name))
        return self._metrics.span(around.agent_name, nearest_name(_NAMES[data.type](data)), parent=around)

    def _around(self, parent_id: str | None) -> Span | None:
        while parent_id is not None and parent_id in self._open:
            found: _Open = self._open[parent_id]
            if found.span is not None:
                return found.span
            parent_id = found.parent
        return None

    def _end(self, traced: TracedSpan[Any], span: Span, error_before: int) -> None:
        error = sys.exception()
        if id(error) == error_before:
            error = None
        try:
            if traced.error is not None:
                span.fail(nearest_name(str(traced.error.get("message"))))
            self._count(traced.span_data, span)
        finally:  # end the span even after an error, so that usage recorded later does not count for this span
            span.__exit__(None if error is None else type(error), error, None)

    def _count(self, data: Any, span: Span) -> None:
        if data.type in _NAMES:
            span.rename(nearest_name(_NAMES[data.type](data)))
        if data.type == _TOOL:
            self._metrics.track(span.agent_name).call_within(span.path, self._metrics.record_tool_calls)
        if data.type in _MODEL:
            usage = getattr(data, "response", None) or (data if data.usage else None)
            if usage is not None:
                record = self._metrics.record_llm
                self._metrics.track(span.agent_name).call_within(span.path, lambda: record(usage=usage))
