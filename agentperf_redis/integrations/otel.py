"""Turns the GenAI spans of OpenTelemetry into executions, spans, model calls, tokens and cost.

::

    provider = TracerProvider()
    provider.add_span_processor(AgentPerfSpanProcessor(perf))

Any instrumentation whose spans have the attributes in `agentperf_redis.export.otel_names` feeds the metrics of `perf`.
Examples are pydantic-ai, OpenLLMetry, OpenInference and OpenTelemetry's own instrumentations. The rules in
`agentperf_redis.metrics.traces` say which spans are executions, and prevent double counting. Prompts and replies are
not read. For LangChain, use either this library's callback handler or an OpenTelemetry instrumentation, because both
record the same runs.

These are lost, in addition to the losses in the README's table:

- spans that never end, and spans that began before the processor was added
- spans that a sampler drops, unless the sampler is wrapped: ``TracerProvider(sampler=RecordingSampler(sampler))``
- attributes that the SDK drops because the span has more than 128 (OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT changes this number)

The processor raises nothing into the program, and does no I/O except in `force_flush` and `shutdown`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agentperf_redis import arguments
from agentperf_redis.agentperf import AgentPerf, checked_perf
from agentperf_redis.export import otel_names
from agentperf_redis.extras import extra
from agentperf_redis.metrics.accumulator import OK
from agentperf_redis.metrics.traces import (
    SHUTDOWN_S,
    Description,
    Ended,
    Failures,
    Kind,
    ModelCall,
    OpenSpans,
    Traces,
    failure,
    flush,
)

with extra("otel"):
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
    from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
    from opentelemetry.trace import Link, SpanContext, SpanKind, StatusCode, TraceState
    from opentelemetry.util.types import Attributes


class AgentPerfSpanProcessor(SpanProcessor):
    """Feeds finished GenAI spans into the metrics of an `AgentPerf`.

    Args:
        perf: gets the metrics. The processor never closes it. If several processors share one `AgentPerf`, each span
            counts once. If they have several `AgentPerf` objects, a span counts once for each of these objects, even
            in one namespace.
        agent: the agent of executions outside of agent spans, such as a model call of a plain program. If it is None,
            the ``service.name`` of the span's resource is used.
        in_tracked: whether to record all spans within executions that the program itself tracks with `track` or
            `track_performance`. With False, only agent spans of agents other than the tracked one, and the spans within
            them, are recorded, because the program is expected to record its own model calls. With True, the remaining
            spans are also recorded, as spans of the tracked execution without self time.
        usage: whether to count model calls, tokens and cost. Pass False if the program passes all its responses to
            `record_llm` itself. With True, the responses that it passes outside of `track` would count twice.

    Raises:
        InvalidArgument: for an invalid argument.
    """

    def __init__(
        self, perf: AgentPerf, *, agent: str | None = None, in_tracked: bool = False, usage: bool = True
    ) -> None:
        self._metrics = checked_perf(perf).metrics
        self._given_agent = None if agent is None else arguments.name("agent", agent)
        self._traces = Traces(
            perf.metrics,
            perf.backend.share("otel.open_spans", OpenSpans),
            describe=self._describe,
            is_late=_is_late,
            agent=self._given_agent or "?",
            in_tracked=arguments.flag("in_tracked", in_tracked),
            usage=arguments.flag("usage", usage),
        )
        self._is_over = False
        self._failures = Failures()

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:  # noqa: ARG002  span.parent is used
        """Note the start of a span."""
        if self._is_over:
            return
        try:
            self._traces.begin(_key(span.context), _key(span.parent), span)
        except Exception:  # noqa: BLE001  the traced program must not fail
            self._failures.log()

    def on_end(self, span: ReadableSpan) -> None:
        """Note the end of a span, and record all spans that are now complete."""
        if self._is_over:
            return
        try:
            self._traces.end(_key(span.context), lambda: self._ended(span))
        except Exception:  # noqa: BLE001  as above
            self._failures.log()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Wait until the server has counted all records.

        Args:
            timeout_millis: max milliseconds to wait.

        Returns:
            Whether all records are counted; after `shutdown` always True. Uncounted records are kept and sent again.
        """
        return self._is_over or flush(self._metrics, timeout_millis / 1000)

    def shutdown(self) -> None:
        """Flush for five seconds at most, and ignore all later spans."""
        if not self._is_over:
            self._is_over = True
            flush(self._metrics, SHUTDOWN_S)

    def _ended(self, span: ReadableSpan) -> Ended:
        description = self._describe(span)
        if description is None:
            return Ended(None, 0, 0)
        start = span.start_time or 0
        call = _call(span.attributes or {}) if description.kind in (Kind.MODEL, Kind.AGENT) else None
        return Ended(description, start, span.end_time or start, _outcome(span), call)

    def _describe(self, span: ReadableSpan) -> Description | None:
        attributes = span.attributes or {}
        operation = _operation(attributes)
        if operation is None:
            return None
        kind = Kind(otel_names.OPERATIONS.get(operation, Kind.STEP.value))
        agent = _first(attributes, otel_names.SPAN_AGENT)
        if kind is Kind.AGENT:
            name = span.name.removeprefix("invoke_agent").strip()
            agent = agent or _first(attributes, otel_names.SPAN_STEP) or name or None
            return Description(kind, f"invoke_agent {agent or ''}".strip(), agent or self._fallback(span))
        if kind is Kind.MODEL:
            target = _first(attributes, otel_names.SPAN_MODEL_REQUESTED) or _first(attributes, otel_names.SPAN_MODEL)
            return Description(kind, f"{operation} {target or ''}".strip(), agent or self._fallback(span))
        if kind is Kind.TOOL:
            target = _first(attributes, otel_names.SPAN_TOOL) or span.name
            return Description(kind, f"execute_tool {target}", agent or self._fallback(span))
        name = _first(attributes, otel_names.SPAN_STEP) or span.name
        return Description(kind, name, agent or name)

    def _fallback(self, span: ReadableSpan) -> str | None:
        """Return the agent to use for an execution whose spans name no agent."""
        return self._given_agent or _text(span.resource.attributes.get("service.name"))


class RecordingSampler(Sampler):
    """Lets span processors see the spans that another sampler drops. Exporters still skip these spans.

    The SDK has an `AlwaysRecordSampler` for this. But its spans lack the attributes given at their start, because
    samplers return no attributes for a span that they drop.

    Args:
        root: the sampler that decides which spans are exported.
    """

    def __init__(self, root: Sampler) -> None:
        self._root = root

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """Return the decision of the wrapped sampler, or RECORD_ONLY if the wrapped sampler drops the span."""
        found = self._root.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)
        if found.decision is not Decision.DROP:
            return found
        return SamplingResult(Decision.RECORD_ONLY, attributes, found.trace_state)

    def get_description(self) -> str:
        """Return the names of this sampler and of the wrapped sampler."""
        return f"RecordingSampler{{{self._root.get_description()}}}"


def _key(context: SpanContext | None) -> tuple[int, int] | None:
    return None if context is None else (context.trace_id, context.span_id)


def _is_late(span: ReadableSpan) -> bool:
    scope = span.instrumentation_scope
    return scope is not None and scope.name.startswith(otel_names.LATE_SCOPES)


def _operation(attributes: Mapping[str, Any]) -> str | None:
    """Return the operation of a span; None if the span is no GenAI span."""
    for attribute, operations in otel_names.SPAN_KINDS.items():
        value = _text(attributes.get(attribute))
        if value is not None:
            return operations.get(value, value)
    return None


def _call(attributes: Mapping[str, Any]) -> ModelCall:
    usage: dict[str, Any] = {}
    for name, candidates in otel_names.SPAN_TOKENS.items():
        found = next((each for each in candidates if attributes.get(each) is not None), None)
        if found is not None:
            usage[name] = attributes[found]
    if usage:
        usage.setdefault("cache_read_tokens", 0)  # `llm_shapes` recognises the format by this name
    cost = next((attributes[each] for each in otel_names.SPAN_COST if each in attributes), 0.0)
    return ModelCall(usage, _first(attributes, otel_names.SPAN_MODEL), cost)


def _outcome(span: ReadableSpan) -> str:
    error_type = (span.attributes or {}).get("error.type")
    if error_type is None and span.status.status_code is not StatusCode.ERROR:
        return OK
    if error_type in (None, "_OTHER"):
        exceptions = [event for event in span.events if event.name == "exception"]
        error_type = (exceptions[-1].attributes or {}).get("exception.type") if exceptions else None
    return failure(error_type)


def _first(attributes: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((text for name in names if (text := _text(attributes.get(name))) is not None), None)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value not in otel_names.NO_NAMES else None
