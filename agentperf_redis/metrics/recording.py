"""The calls that record, the same for blocking and asyncio code: none of them waits for the server."""

from __future__ import annotations

from typing import TypeAlias, cast

from agentperf_redis import arguments, keys
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.metrics.accumulator import CANCELLED, FAILED, OK, Part
from agentperf_redis.metrics.flusher import Flusher
from agentperf_redis.metrics.llm_usage import Usage, read_usage
from agentperf_redis.metrics.model import BETWEEN, FIRST
from agentperf_redis.metrics.spans import Span, current_span

ExceptionTypes: TypeAlias = type[BaseException] | tuple[type[BaseException], ...]

_MAX_S = 366 * 86_400.0
_DURATION_ALLOWED = "seconds from 0 to 31622400 (a year)"
_MAX_KNOWN_ERRORS = 4096
_NO_USE = dict.fromkeys(("llm_calls", "tool_calls", "tok_in", "tok_out", "cost_nano"), 0)
"""Written together, so that who reads sees from one of them whether there are the others."""


class Recording:
    """What a `MetricsCollector` does to record.

    Args:
        flusher: of the process and namespace.
    """

    def __init__(self, flusher: Flusher) -> None:
        self._flusher = flusher
        self._record = flusher.buffer.record
        self._outcomes: dict[str | None, str] = {None: FAILED, "": FAILED}

    def record_execution(
        self, agent_name: str, execution_time: float, success: bool, error_type: str | None = None
    ) -> None:
        """Record an execution. Takes about a microsecond and does no I/O.

        Args:
            agent_name: the agent, 1 to 200 characters.
            execution_time: s, 0 to a year; kept to 1 us.
            success: whether it succeeded.
            error_type: of a failure, 1 to 200 characters, or None.

        Raises:
            InvalidArgument: for anything else; nothing is recorded.
        """
        if success is True and type(execution_time) is float and 0.0 <= execution_time <= _MAX_S:
            self._record(agent_name, execution_time, OK)
        else:
            seconds = _duration("execution_time", execution_time)
            self._record(agent_name, seconds, OK if arguments.flag("success", success) else self._failure(error_type))

    def record_cancellation(self, agent_name: str, execution_time: float) -> None:
        """Record an execution that was cancelled: neither a success nor a failure.

        Args:
            agent_name: the agent.
            execution_time: s.
        """
        self._record(agent_name, _duration("execution_time", execution_time), CANCELLED)

    def track(self, agent_name: str, *, not_failures: ExceptionTypes = ()) -> Span:
        """Return a context manager that records its block as an execution: duration, outcome, error type.

        Spans opened within, also in tasks started there, nest within it.

        Args:
            agent_name: the agent.
            not_failures: an exception class, or a tuple of them, with which a block ends as it should, such as the
                GraphInterrupt of an agent that asks its user.

        Returns:
            To be entered once, with plain ``with``, in coroutines too: leaving it does no I/O.

        Raises:
            InvalidArgument: for a name that cannot be, or what is no exception class.
        """
        kept = exception_types("not_failures", not_failures)
        return Span(arguments.name("agent_name", agent_name), None, self._finish, None, kept)

    def span(
        self, agent_name: str, name: str, *, parent: Span | None = None, not_failures: ExceptionTypes = ()
    ) -> Span:
        """Return a context manager that records its block as a named stage of the agent's work.

        Args:
            agent_name: the agent.
            name: of the stage, such as ``tool:search``; 1 to 200 characters. Its path is this name after those of the
                spans around it.
            parent: the span it is part of, where that cannot be seen: in a thread started within one. None takes the
                one that the code runs in.
            not_failures: as for `track`.

        Returns:
            To be entered once, with plain ``with``.

        Raises:
            InvalidArgument: for a name that cannot be.
        """
        if parent is not None and not isinstance(parent, Span):
            raise InvalidArgument("parent", parent, "a span that was entered, or None")
        kept = exception_types("not_failures", not_failures)
        return Span(arguments.name("agent_name", agent_name), arguments.name("name", name), self._finish, parent, kept)

    def _finish(self, span: Span, outcome: str) -> None:
        self._record(span.part if span.path else span.agent_name, span.seconds, outcome, span.self_seconds)

    def record_llm(
        self,
        agent_name: str | None = None,
        *,
        tokens_in: int | None = None,
        tokens_out: int | None = None,
        cost: float | None = None,
        model: str | None = None,
        usage: object = None,
        calls: int = 1,
    ) -> None:
        """Record the use of a language model, for the agent and for the span that the code runs in.

        Args:
            agent_name: the agent; None takes that of the span or tracked execution that the code runs in.
            tokens_in: tokens sent.
            tokens_out: tokens received.
            cost: in any one unit; kept to 10^-9.
            model: its name, 1 to 200 characters.
            usage: a response or usage as model clients return it, to read from it what is not given; see
                `agentperf_redis.metrics.llm_usage`. Of one that holds no token counts the call is counted all the
                same: it is said in the log, and in `delivery().usage_unread`.
            calls: how many calls these were.

        Raises:
            InvalidArgument: for anything else, or without an agent; nothing is recorded.
        """
        found = None if usage is None else read_usage(usage)
        read = found or Usage()
        counts = _NO_USE | {
            "llm_calls": arguments.count("calls", calls, minimum=0),
            "tok_in": _tokens("tokens_in", tokens_in, read.tokens_in),
            "tok_out": _tokens("tokens_out", tokens_out, read.tokens_out),
            "cost_nano": round(arguments.amount("cost", read.cost if cost is None else cost, maximum=1e9) * 1e9),
        }
        model = read.model if model is None else arguments.name("model", model)
        if model is not None:
            start = f"mdl:{keys.encoded(model[: arguments.MAX_NAME_CHARACTERS])}"
            counts |= {
                f"{start}:n": calls,
                f"{start}:tok_in": counts["tok_in"],
                f"{start}:tok_out": counts["tok_out"],
                f"{start}:cost_nano": counts["cost_nano"],
            }
        self._add(agent_name, counts)
        if usage is not None and found is None and tokens_in is None and tokens_out is None:
            self._flusher.unread_usage.note(usage)

    def record_tool_calls(self, agent_name: str | None = None, *, calls: int = 1) -> None:
        """Record that tools were called.

        Args:
            agent_name: as for `record_llm`.
            calls: how often.
        """
        self._add(agent_name, _NO_USE | {"tool_calls": arguments.count("calls", calls, minimum=0)})

    def record_stream(self, agent_name: str, items: int, first: float, between: float | None = None) -> None:
        """Record how a stream of items came, beside its execution. `track_performance` does so for generators.

        Args:
            agent_name: the agent.
            items: how many there were.
            first: s until the first item.
            between: mean time to make each further item, s, without what its consumer took; None with one item.
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
        span = current_span()
        if agent_name is None and span is None:
            raise InvalidArgument("agent_name", None, "a name; None only within a span or a tracked execution")
        agent = span.agent_name if agent_name is None and span is not None else agent_name
        buffer = self._flusher.buffer
        buffer.add(arguments.name("agent_name", agent), counts)
        if span is not None and span.path and span.agent_name == agent:
            buffer.add(span.part, counts)

    def _failure(self, error_type: object) -> str:
        try:
            return self._outcomes[error_type]  # type: ignore[index]  # what is no string is not found
        except (KeyError, TypeError):
            outcome = f"{FAILED}:{arguments.name('error_type', error_type)}"
        if len(self._outcomes) < _MAX_KNOWN_ERRORS:
            self._outcomes[cast("str", error_type)] = outcome
        return outcome


def exception_types(argument: str, value: object) -> tuple[type[BaseException], ...]:
    """Check one exception class or a tuple of them; return the tuple."""
    found = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(each, type) and issubclass(each, BaseException) for each in found):
        raise InvalidArgument(argument, value, "an exception class, or a tuple of them")
    return cast("tuple[type[BaseException], ...]", found)


def _duration(argument: str, value: object) -> float:
    seconds = arguments.number(argument, value, _DURATION_ALLOWED)
    if not 0.0 <= seconds <= _MAX_S:
        raise InvalidArgument(argument, value, _DURATION_ALLOWED)
    return seconds


def _tokens(argument: str, given: int | None, read: int) -> int:
    return read if given is None else arguments.count(argument, given, minimum=0)
