"""Records runs of LangChain and LangGraph by callbacks. Programs import the handler from `integrations.langchain`."""

from __future__ import annotations

import asyncio
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import Context
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeAlias
from uuid import UUID

from agentperf_redis import arguments
from agentperf_redis.agentperf import AgentPerf, checked_perf
from agentperf_redis.background import register_for_fork
from agentperf_redis.extras import extra
from agentperf_redis.metrics.llm_usage import read
from agentperf_redis.metrics.recording import ExceptionTypes, exception_types
from agentperf_redis.metrics.spans import Span, current_span

with extra("langchain"):
    from langchain_core.callbacks import BaseCallbackHandler
    from langchain_core.outputs import LLMResult
    from langchain_core.runnables.config import var_child_runnable_config


MAX_OPEN_RUNS = 10_000
"""Maximum number of open runs in a process. When there are more, the oldest one is forgotten and not recorded."""
_HIDDEN = "langsmith:hidden"
"""The tag with which LangChain marks runs that tracers do not show. Models and tools in a hidden chain inherit it."""
_AGENT = "lc_agent_name"
"""The metadata in which LangChain's `create_agent` puts the name of the agent. Nested runs inherit it."""

_Serialized: TypeAlias = dict[str, Any] | None


@dataclass(slots=True)
class _Run:
    """An open run of LangChain.

    Attributes:
        span: the execution or span that records the run. A hidden run has the span of its parent.
        context: a context in which `span` is the current span, so that usage recorded there counts for `span`. The
            context in which a callback runs is unsuitable. It is either the context of the caller, where `span` would
            remain the current span, or a copy that is discarded after the callback.
        around: the run that encloses this one, or None.
        agent: the name of the agent that `create_agent` passed to the run, or None.
        hidden: whether the run is a chain that is recorded as a part of its parent.
        model: the name of the model that LangChain passed to the run of a model.
        began: time at which the run began, seconds by `perf_counter`.
        first_s: seconds from the start to the first token; None before the first token.
        tokens: number of tokens or chunks that were streamed.
        dropped: a weak reference to the id of the run. Its callback ends the run if LangChain drops the id without
            reporting an end.
    """

    span: Span
    context: Context
    around: _Run | None
    agent: str | None
    hidden: bool = False
    model: str | None = None
    began: float = field(default_factory=perf_counter)
    first_s: float | None = None
    tokens: int = 0
    dropped: weakref.ref[UUID] | None = None


class _OpenRuns:
    """The open runs of a process, by id. All handlers of one AgentPerf share them, so no run is recorded twice."""

    def __init__(self) -> None:
        self._runs: dict[UUID, _Run] = {}
        self._lock = threading.RLock()  # reentrant: while the lock is held, garbage collection may end a run
        register_for_fork(self)

    def after_fork(self) -> None:
        """Reset a forked child: the parent records the open runs, and the lock may have been held during the fork."""
        self._lock = threading.RLock()
        self._runs = {}

    def get(self, run_id: UUID | None) -> _Run | None:
        return None if run_id is None else self._runs.get(run_id)

    def add(self, run_id: UUID, run: _Run, on_drop: Callable[[UUID], None]) -> None:
        """Add a run that begins.

        Args:
            run_id: the object that LangChain keeps as long as the run is open.
            run: the run.
            on_drop: called with an id equal to `run_id` if LangChain drops `run_id` while the run is still open here.
        """
        key = UUID(int=run_id.int)  # a copy: the key must not keep the object `run_id` alive
        run.dropped = weakref.ref(run_id, lambda _: on_drop(key))
        with self._lock:
            self._runs[key] = run
            while len(self._runs) > MAX_OPEN_RUNS:
                del self._runs[next(iter(self._runs))]

    def pop(self, run_id: UUID) -> _Run | None:
        with self._lock:
            return self._runs.pop(run_id, None)

    def within(self, run: _Run) -> list[UUID]:
        """Return the ids of the open runs within a run, inner runs first."""
        with self._lock:
            return [each for each, inner in reversed(self._runs.items()) if any(it is run for it in _around(inner))]


def _around(run: _Run) -> Iterator[_Run]:
    while run.around is not None:
        run = run.around
        yield run


def _calling_run() -> UUID | None:
    """Return the id of the run whose code is running, from the context that LangChain keeps for nested runs."""
    manager = (var_child_runnable_config.get() or {}).get("callbacks")
    return getattr(manager, "parent_run_id", None)


class AgentPerfCallbackHandler(BaseCallbackHandler):
    """Records LangChain's and LangGraph's runs: ``config={"callbacks": [AgentPerfCallbackHandler(perf)]}``.

    One handler serves blocking and asyncio code, all threads and any number of runs. It does no I/O.

    **An execution** is a run that no other open run encloses. It may be of any kind: an agent, a graph, a chain, or a
    single call of a model. The agent of the execution is `agent`, else the name of an agent made by
    `create_agent(name=)`, else the name of the run. There are two exceptions:

    - A run that begins within a tracked execution (`track`, `track_performance`) of the same agent is a span of that
      execution. If neither `agent` nor `create_agent(name=)` names the agent of the run, the run is a span of the
      tracked execution, whatever agent that has.
    - A nested run of another agent made by `create_agent(name=)` is an execution of that other agent. But if the
      program passed the config of the outer run to the nested run, the nested run is a span of the outer agent.

    **Every other run is a span** of its agent. The span of a chain or of a graph's node has the name of the run. Other
    spans are named ``model:NAME``, ``tool:NAME`` and ``retriever:NAME``. A chain that LangChain hides from tracers is
    part of the run around it.

    - **Tokens, cost, model** are recorded for the agent and the span, as ``record_llm(usage=response)`` would record
      them. To count nothing twice, do not pass these responses to `record_llm`, and do not record the same runs with an
      OpenTelemetry instrumentation. A response from LangChain's cache is not counted as a call and has no tokens. A
      failed call is counted only if the received part of its stream reports tokens.
    - **Errors**: an error fails the run that raises it, and each enclosing run that does not catch it. LangGraph's
      interrupts and `not_failures` count as success. A cancelled run counts as cancelled. A stream that its consumer
      closes early counts as success. LangChain does not report that a call of a model or a retriever was cancelled. So
      a run that LangChain drops without reporting its end counts as cancelled.
    - **Retries**: with `with_retry`, each attempt is a span, and the execution has the outcome of the last attempt. If
      a model itself retries a call, each retry is recorded as a failed span ``retry`` within the span of the model.
    - **Streams**: the time to the first token of each streamed call of a model is in `streams(agent).first`. The
      duration of a streamed run includes the work of its consumer.

    In the code of a run, such as a tool, the span of the run is not the current span. So this code must pass the name
    of the agent to `record_llm` and similar methods.

    Args:
        perf: the server and namespace.
        agent: the agent of the executions, 1 to 200 characters. If it is None, the agent is chosen as described above.
        not_failures: an exception class or a tuple of them; a run that ends with such an exception is a success.

    Raises:
        InvalidArgument: an argument is invalid.
    """

    run_inline = True  # LangChain may call the handler in the event loop: recording takes only microseconds

    def __init__(self, perf: AgentPerf, agent: str | None = None, *, not_failures: ExceptionTypes = ()) -> None:
        self._metrics = checked_perf(perf).metrics
        self._open: _OpenRuns = perf.backend.share("langchain runs", _OpenRuns)
        self._agent = None if agent is None else arguments.name("agent", agent)
        self._not_failures = exception_types("not_failures", not_failures) if not_failures else ()

    # -- starts

    def on_chain_start(self, serialized: _Serialized, inputs: Any, *, run_id: UUID, **more: Any) -> None:  # noqa: ARG002
        """Begin the run of a chain, a graph or a node."""
        self._start("", serialized, run_id, more)

    def on_tool_start(self, serialized: _Serialized, input_str: str, *, run_id: UUID, **more: Any) -> None:  # noqa: ARG002
        """Begin the run of a tool."""
        self._start("tool:", serialized, run_id, more)

    def on_retriever_start(self, serialized: _Serialized, query: str, *, run_id: UUID, **more: Any) -> None:  # noqa: ARG002
        """Begin the run of a retriever."""
        self._start("retriever:", serialized, run_id, more)

    def on_llm_start(self, serialized: _Serialized, prompts: Any, *, run_id: UUID, **more: Any) -> None:  # noqa: ARG002
        """Begin the run of a model that completes text."""
        self._start("model:", serialized, run_id, more)

    def on_chat_model_start(self, serialized: _Serialized, messages: Any, *, run_id: UUID, **more: Any) -> None:  # noqa: ARG002
        """Begin the run of a chat model."""
        self._start("model:", serialized, run_id, more)

    def _start(self, kind: str, serialized: _Serialized, run_id: UUID, more: dict[str, Any]) -> None:
        if self._open.get(run_id) is not None:
            return  # another handler of this AgentPerf records the run
        parent = self._open.get(more.get("parent_run_id"))
        if parent is not None and not kind and _HIDDEN in (more.get("tags") or ()):
            self._open.add(run_id, _Run(parent.span, parent.context, parent, parent.agent, hidden=True), self._drop)
            return
        around = parent or self._open.get(_calling_run())  # LangChain gives no parent to the runs of fallbacks
        metadata = more.get("metadata") or {}
        name, named = _name(serialized, more), _text_or_none(metadata.get(_AGENT))
        outer = current_span() if around is None else around.span
        agent = self._agent_of(name, named, parent, outer)
        kept = (*self._not_failures, *_interrupts())
        if outer is not None and outer.agent_name == agent:
            label = arguments.nearest_name(kind + name)
            span = self._metrics.span(agent, label, parent=outer, not_failures=kept)
        else:
            span = self._metrics.track(agent, not_failures=kept)
        context = Context()  # an empty context keeps nothing of the caller alive
        context.run(span.__enter__)
        model = _model(metadata, more) if kind == "model:" else None
        self._open.add(run_id, _Run(span, context, around, named, model=model), self._drop)

    def _agent_of(self, name: str, named: str | None, parent: _Run | None, outer: Span | None) -> str:
        if parent is not None:
            if named is None or named == parent.agent:
                return parent.span.agent_name
            return arguments.nearest_name(named)
        chosen = self._agent or named or (name if outer is None else outer.agent_name)
        return arguments.nearest_name(chosen)

    # -- events within a run

    def on_llm_new_token(
        self,
        token: str | list[str | dict[str, Any]],
        *,
        chunk: Any = None,
        run_id: UUID,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Note a token of a stream. A chunk with neither text nor a tool call is not a token."""
        if token or getattr(getattr(chunk, "message", None), "tool_call_chunks", None):
            self._streamed(run_id)

    def on_stream_event(self, event: Any, *, run_id: UUID, **kwargs: Any) -> None:  # noqa: ARG002
        """Note an event of `stream_events` that brings content."""
        if event.get("event") == "content-block-delta":
            self._streamed(run_id)

    def _streamed(self, run_id: UUID) -> None:
        run = self._open.get(run_id)
        if run is not None:
            run.tokens += 1
            if run.first_s is None:
                run.first_s = perf_counter() - run.began

    def on_retry(self, retry_state: Any, *, run_id: UUID, **kwargs: Any) -> None:  # noqa: ARG002
        """Record a retry by a model itself, not by `with_retry`."""
        run = self._open.get(run_id)
        if run is None:
            return
        outcome = retry_state.outcome
        error = outcome.exception() if outcome is not None and outcome.failed else None
        retry = self._metrics.span(run.span.agent_name, "retry", parent=run.span)
        Context().run(retry.__enter__)
        retry.fail(None if error is None else arguments.nearest_name(type(error).__name__))
        retry.__exit__(None, None, None)

    # -- ends

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:  # noqa: ARG002
        """End the run of a chain, a graph or a node."""
        self._end(run_id)

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:  # noqa: ARG002
        """End a run that has failed or was cancelled."""
        self._end(run_id, error)

    def on_tool_end(self, output: Any, *, run_id: UUID, **kwargs: Any) -> None:  # noqa: ARG002
        """End the run of a tool. The run failed if the tool returned its error as a message."""
        run = self._open.get(run_id)
        if run is not None and getattr(output, "status", None) == "error":
            run.span.fail("ToolException")
        self._end(run_id, tool_calls=1)

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:  # noqa: ARG002
        """End the run of a tool that has raised an error."""
        self._end(run_id, error, tool_calls=1)

    def on_retriever_end(self, documents: Any, *, run_id: UUID, **kwargs: Any) -> None:  # noqa: ARG002
        """End the run of a retriever."""
        self._end(run_id)

    def on_retriever_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:  # noqa: ARG002
        """End the run of a retriever that has failed."""
        self._end(run_id, error)

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:  # noqa: ARG002
        """End the run of a model, and count the call and its tokens."""
        self._end(run_id, response=None if _from_cache(response) else response)

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """End the run of a model that has failed, and count the tokens that an interrupted stream reported."""
        response = kwargs.get("response")
        self._end(run_id, error, response=response if response is not None and read(response).found else None)

    def _end(
        self,
        run_id: UUID,
        error: BaseException | None = None,
        *,
        response: LLMResult | None = None,
        tool_calls: int = 0,
    ) -> None:
        run = self._open.pop(run_id)
        if run is None or run.hidden:
            return
        if isinstance(error, asyncio.CancelledError):  # LangChain does not report the end of cancelled model calls
            for inner in self._open.within(run):
                self._end(inner, error)
        try:
            run.context.run(self._count, run, response, tool_calls)
        finally:
            failure = None if isinstance(error, GeneratorExit) else error
            run.span.__exit__(None if failure is None else type(failure), failure, None)

    def _drop(self, run_id: UUID) -> None:
        """End a run that LangChain dropped without an end. Garbage collection calls this at any time, on any thread."""
        self._end(run_id, asyncio.CancelledError())

    def _count(self, run: _Run, response: LLMResult | None, tool_calls: int) -> None:
        agent = run.span.agent_name
        if response is not None:
            named = any(each.usage.model for each in read(response).found)
            self._metrics.record_llm(agent, usage=response, model=None if named else run.model)
        if tool_calls:
            self._metrics.record_tool_calls(agent, calls=tool_calls)
        if run.first_s is not None:
            self._metrics.record_stream(agent, run.tokens, run.first_s)


def _name(serialized: _Serialized, more: dict[str, Any]) -> str:
    """Return the name of a run: that of its config, else that of its class."""
    serialized = serialized or {}
    path = serialized.get("id") or ["run"]
    return str(more.get("name") or serialized.get("name") or path[-1])


def _model(metadata: dict[str, Any], more: dict[str, Any]) -> str | None:
    """Return the name of the model that a run calls, for responses that do not name it."""
    parameters = more.get("invocation_params") or {}
    names = (metadata.get("ls_model_name"), parameters.get("model"), parameters.get("model_name"))
    found = next(filter(None, map(_text_or_none, names)), None)
    return None if found is None else arguments.nearest_name(found)


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _interrupts() -> tuple[type[BaseException], ...]:
    """Return the base class of the exceptions by which LangGraph, if loaded, pauses a graph or leaves a subgraph."""
    found = getattr(sys.modules.get("langgraph.errors"), "GraphBubbleUp", None)
    return () if found is None else (found,)


def _from_cache(response: LLMResult) -> bool:
    """Return whether a response comes from LangChain's cache. For a hit, LangChain sets the cost to the integer 0."""
    messages = (getattr(each, "message", None) for prompt in response.generations for each in prompt)
    usages = [getattr(message, "usage_metadata", None) or {} for message in messages]
    return bool(usages) and all(type(cost := usage.get("total_cost")) is int and cost == 0 for usage in usages)
