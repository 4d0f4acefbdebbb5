"""The methods that record. Blocking and asyncio code share them, because no method waits for the server."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal
from typing import Any, TypeAlias, cast

from agentperf_redis import arguments, keys
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.metrics.accumulator import CANCELLED, FAILED, OK, Part
from agentperf_redis.metrics.flusher import Flusher
from agentperf_redis.metrics.llm_usage import Found, Reading, Usage, merged, read, total
from agentperf_redis.metrics.model import BETWEEN, FIRST
from agentperf_redis.metrics.spans import Span, current_span

ExceptionTypes: TypeAlias = type[BaseException] | tuple[type[BaseException], ...]

_MAX_S = 366 * 86_400.0
_DURATION_ALLOWED = "seconds from 0 to 31622400 (a year)"
_MAX_KNOWN_ERRORS = 4096
_MAX_COST = 1e9
_NO_USAGE = dict.fromkeys(("llm_calls", "tool_calls", "tok_in", "tok_out", "cost_nano"), 0)
"""Counters that are always written together. If a reader finds one of them, it finds all of them."""


class Recording:
    """The recording methods of a `MetricsCollector`.

    Args:
        flusher: the flusher of this process and namespace.
    """

    def __init__(self, flusher: Flusher) -> None:
        self._flusher = flusher
        self._record = flusher.buffer.record
        self._recorded = flusher.buffer.recorded
        self._executions = flusher.executions
        self._outcomes: dict[str | None, str] = {None: FAILED, "": FAILED}

    def record_execution(
        self, agent_name: str, execution_time: float, success: bool, error_type: str | None = None
    ) -> None:
        """Record an execution. Takes about a microsecond and does no I/O.

        Args:
            agent_name: the agent, 1 to 200 characters.
            execution_time: duration in seconds, 0 to a year; rounded to 1 us.
            success: whether the execution succeeded.
            error_type: error type of a failure, 1 to 200 characters, or None.

        Raises:
            InvalidArgument: for an invalid argument; nothing is recorded.
        """
        if success is True and type(execution_time) is float and 0.0 <= execution_time <= _MAX_S:
            self._record(agent_name, execution_time, OK)
        else:
            seconds = _duration("execution_time", execution_time)
            self._record(agent_name, seconds, OK if arguments.flag("success", success) else self._failure(error_type))

    def record_cancellation(self, agent_name: str, execution_time: float) -> None:
        """Record an execution that was cancelled. It counts neither as a success nor as a failure.

        Args:
            agent_name: the agent.
            execution_time: duration in seconds.
        """
        self._record(agent_name, _duration("execution_time", execution_time), CANCELLED)

    def track(self, agent_name: str, *, not_failures: ExceptionTypes = ()) -> Span:
        """Return a context manager that records its block as an execution, with duration, outcome and error type.

        Spans that are opened in the block, or in tasks started there, nest within the execution.

        Args:
            agent_name: the agent.
            not_failures: an exception class or a tuple of them. An execution that ends with such an exception counts as
                a success. An example is the GraphInterrupt of an agent that asks its user a question.

        Returns:
            A context manager for one use. Coroutines enter it with plain ``with`` too, because it does no I/O.

        Raises:
            InvalidArgument: for an invalid name or exception class.
        """
        kept = exception_types("not_failures", not_failures) if not_failures else ()
        if type(agent_name) is not str or agent_name not in self._recorded:  # a recorded name was checked before
            agent_name = arguments.name("agent_name", agent_name)
        return Span(agent_name, None, self._finish, None, kept, self._executions)

    def span(
        self, agent_name: str, name: str, *, parent: Span | None = None, not_failures: ExceptionTypes = ()
    ) -> Span:
        """Return a context manager that records its block as a named stage of the agent's work.

        Args:
            agent_name: the agent.
            name: name of the stage, such as ``tool:search``; 1 to 200 characters. The path of the span consists of the
                names of the spans around it, followed by this name.
            parent: the parent span; None takes the current span. Pass the parent in a new thread, because threads do
                not inherit the current span.
            not_failures: as for `track`.

        Returns:
            A context manager for one use, entered with plain ``with``.

        Raises:
            InvalidArgument: for an invalid name, parent or exception class.
        """
        if parent is not None and not isinstance(parent, Span):
            raise InvalidArgument("parent", parent, "a span that was entered, or None")
        kept = exception_types("not_failures", not_failures) if not_failures else ()
        if type(agent_name) is not str or agent_name not in self._recorded:  # as in `track`
            agent_name = arguments.name("agent_name", agent_name)
        return Span(agent_name, arguments.name("name", name), self._finish, parent, kept, self._executions)

    def _finish(self, span: Span, outcome: str) -> None:
        self._record(span.part if span.path else span.agent_name, span.seconds, outcome, span.self_seconds)

    def record_llm(
        self,
        agent_name: str | None = None,
        *,
        tokens_in: int | None = None,
        tokens_out: int | None = None,
        tokens_cached_in: int | None = None,
        tokens_cache_write: int | None = None,
        tokens_reasoning: int | None = None,
        cost: float | Decimal | None = None,
        model: str | None = None,
        usage: object = None,
        calls: int | None = None,
    ) -> None:
        """Record the usage of a language model, for the agent and for the current span.

        Args:
            agent_name: the agent; None takes the agent of the current span or tracked execution.
            tokens_in: tokens sent, including those read from and written to the provider's cache.
            tokens_out: tokens received, including reasoning.
            tokens_cached_in: the part of `tokens_in` that was read from the provider's cache.
            tokens_cache_write: the part of `tokens_in` that was written to the provider's cache.
            tokens_reasoning: the part of `tokens_out` that was reasoning.
            cost: the cost, rounded to 10^-9. All records must use the same unit.
            model: name of the model, 1 to 200 characters.
            usage: a response, an event of its stream, the result of an agent, or a list of these. Any object is
                allowed. Values that are not passed as arguments are read from this object; see
                `agentperf_redis.metrics.llm_usage`. A usage without token counts is recorded as a call without tokens,
                and is reported in the log and in `delivery().usage_unread`. A total that is not input plus output is
                reported in the log and in `delivery().usage_inconsistent`. Events of one stream, and messages of a
                conversation that is passed again, are counted once per process.
            calls: number of calls; None takes the number in the usage, or 1.

        Raises:
            InvalidArgument: for an invalid argument, for a part larger than its whole, and if there is no agent.
                Nothing is recorded.
        """
        agent, span = self._target(agent_name)
        reading = read(usage) if usage is not None else Reading()
        found = merged(reading.found)
        tokens = {
            "tokens_in": tokens_in,
            "tokens_out": tokens_out,
            "tokens_cached_in": tokens_cached_in,
            "tokens_cache_write": tokens_cache_write,
            "tokens_reasoning": tokens_reasoning,
        }
        given: dict[str, Any] = _given_tokens(tokens, total([each.usage for each in found]) or Usage())
        if cost is not None:
            given["cost"] = _cost(cost)
        if model is not None:
            given["model"] = arguments.name("model", model)
        if calls is not None:
            calls = arguments.count("calls", calls, minimum=0)

        usages = self._usages(agent, usage, reading, found, counted="tokens_in" in given or "tokens_out" in given)
        if given:
            usages = [_with_given(total(usages) or usages[0], given, usages[0].model)]
        for index, each in enumerate(usages):
            counted = each if calls is None else replace(each, calls=0 if index else calls)
            self._add_to(agent, span, _counters(counted))

    def _usages(self, agent: str, usage: object, reading: Reading, found: list[Found], *, counted: bool) -> list[Usage]:
        """Return the usages that are not counted yet. There is always at least one.

        A usage without counts is returned as a call without tokens.

        Args:
            agent: the agent.
            usage: the passed usage.
            reading: the result of reading this usage.
            found: the usages in the reading, merged by response.
            counted: whether the caller passed token counts as arguments.
        """
        flusher = self._flusher
        if found:
            if any(each.usage.differs for each in found):
                flusher.inconsistent_usage.note(usage)
            news, first_counts = flusher.responses.news(agent, found)
            if first_counts:
                flusher.unread_usage.add(-first_counts)
            return news
        unread = usage is not None and not counted
        known = None if reading.part is None else flusher.responses.event(agent, reading.part, unread=unread)
        if unread and known is None:
            flusher.unread_usage.note(usage)
        elif unread and not known:
            flusher.unread_usage.add(1)  # counted, but not logged: a later event may have the token counts
        return [Usage(calls=0 if known else 1)]

    def record_tool_calls(self, agent_name: str | None = None, *, calls: int = 1) -> None:
        """Record tool calls.

        Args:
            agent_name: as for `record_llm`.
            calls: number of tool calls.
        """
        self._add(agent_name, _NO_USAGE | {"tool_calls": arguments.count("calls", calls, minimum=0)})

    def record_stream(self, agent_name: str, items: int, first: float, between: float | None = None) -> None:
        """Record the timing of a stream, separately from its execution. `track_performance` does this for generators.

        Args:
            agent_name: the agent.
            items: number of items.
            first: seconds until the first item.
            between: mean seconds to produce each further item, without the consumer's time; None for a single item.
        """
        agent = arguments.name("agent_name", agent_name)
        buffer = self._flusher.buffer
        counts = {"items": arguments.count("items", items, minimum=0)}
        first_s = _duration("first", first)
        if between is not None:
            buffer.record(Part(agent, (), BETWEEN), _duration("between", between), OK)
        buffer.record(Part(agent, (), FIRST), first_s, OK)
        buffer.add(agent, counts)

    def _add(self, agent_name: str | None, counts: dict[str, int]) -> None:
        self._add_to(*self._target(agent_name), counts)

    def _target(self, agent_name: str | None) -> tuple[str, Span | None]:
        """Return the agent and the current span. The span is None if no span is open, or if it has another agent."""
        span = current_span()
        if agent_name is None and span is None:
            raise InvalidArgument("agent_name", None, "a name; None is allowed only in a span or a tracked execution")
        agent = span.agent_name if agent_name is None and span is not None else agent_name
        inner = span if span is not None and span.path and span.agent_name == agent else None
        return arguments.name("agent_name", agent), inner

    def _add_to(self, agent: str, span: Span | None, counts: dict[str, int]) -> None:
        buffer = self._flusher.buffer
        buffer.add(agent, counts)
        if span is not None:
            buffer.add(span.part, counts)

    def _failure(self, error_type: object) -> str:
        try:
            return self._outcomes[error_type]  # type: ignore[index]  # unknown and unhashable keys raise
        except (KeyError, TypeError):
            name = arguments.name("error_type", error_type)
            outcome = f"{FAILED}:{name}"
        if len(self._outcomes) < _MAX_KNOWN_ERRORS:
            self._outcomes[name] = outcome
        return outcome


def exception_types(argument: str, value: object) -> tuple[type[BaseException], ...]:
    """Check one exception class or a tuple of them, and return the tuple."""
    found = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(each, type) and issubclass(each, BaseException) for each in found):
        raise InvalidArgument(argument, value, "an exception class, or a tuple of them")
    return cast("tuple[type[BaseException], ...]", found)


def _duration(argument: str, value: object) -> float:
    seconds = arguments.number(argument, value, _DURATION_ALLOWED)
    if not 0.0 <= seconds <= _MAX_S:
        raise InvalidArgument(argument, value, _DURATION_ALLOWED)
    return seconds


_PARTS = {"tokens_in": ("tokens_cached_in", "tokens_cache_write"), "tokens_out": ("tokens_reasoning",)}


def _given_tokens(tokens: dict[str, int | None], read_ones: Usage) -> dict[str, int]:
    """Check the passed counts. Passed parts may not exceed their whole, whether the whole was passed or read."""
    given = {name: arguments.count(name, count, minimum=0) for name, count in tokens.items() if count is not None}
    for whole, parts in _PARTS.items():
        left = given.get(whole, getattr(read_ones, whole))
        for part in parts:
            if given.get(part, 0) > left:
                raise InvalidArgument(part, given[part], f"a whole number from 0 to {left}: it is a part of {whole}")
            left -= given.get(part, 0)
    return given


def _with_given(usage: Usage, given: dict[str, Any], model: str | None) -> Usage:
    """Let passed values override values that were read. If a part that was read exceeds its whole, reduce the part."""
    usage = replace(usage, **({"model": usage.model or model} | given))
    if "tokens_in" in given:
        cached = min(usage.tokens_cached_in, usage.tokens_in)
        written = min(usage.tokens_cache_write, usage.tokens_in - cached)
        usage = replace(usage, tokens_cached_in=cached, tokens_cache_write=written)
    if "tokens_out" in given:
        usage = replace(usage, tokens_reasoning=min(usage.tokens_reasoning, usage.tokens_out))
    return usage


def _cost(given: float | Decimal) -> float:
    if isinstance(given, Decimal):
        given = float(given) if given.is_finite() else math.nan
    return arguments.amount("cost", given, maximum=_MAX_COST)


def _counters(usage: Usage) -> dict[str, int]:
    """Return the counters of a usage. Parts that are zero are omitted, since most models report no parts."""
    parts = {
        "tok_cached_in": usage.tokens_cached_in,
        "tok_cache_write": usage.tokens_cache_write,
        "tok_reasoning": usage.tokens_reasoning,
    }
    counts = {
        "tok_in": usage.tokens_in,
        "tok_out": usage.tokens_out,
        "cost_nano": round(min(usage.cost, _MAX_COST) * 1e9),
        **{name: count for name, count in parts.items() if count},
    }
    if usage.model is None:
        return _NO_USAGE | counts | {"llm_calls": usage.calls}
    start = f"mdl:{keys.encoded(usage.model)}"
    of_model = {f"{start}:{name}": count for name, count in counts.items()}
    return _NO_USAGE | counts | {"llm_calls": usage.calls, f"{start}:n": usage.calls} | of_model
