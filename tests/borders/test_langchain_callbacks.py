"""Runs of LangChain and LangGraph are recorded as executions and spans, with the counts that `record_llm` reads."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from agentperf_redis import AgentPerf
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.metrics.model import PerformanceMetrics

pytest.importorskip("langchain_core", reason="needs the extra langchain")

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.language_models.fake import FakeListLLM
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult, LLMResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnableParallel
from langchain_core.tools import ToolException, tool

from agentperf_redis.integrations import _langchain_callbacks as callbacks
from agentperf_redis.integrations.langchain import AgentPerfCache, AgentPerfCallbackHandler
from tests.support.forks import in_child

pytestmark = [pytest.mark.thorough, pytest.mark.servers("valkey")]  # the packages take long to import

UNCHECKED: Any = AgentPerfCallbackHandler
PROMPT = ChatPromptTemplate.from_template("say {x}")
USAGE = {
    "input_tokens": 100,
    "output_tokens": 20,
    "total_tokens": 120,
    "input_token_details": {"cache_read": 64, "cache_creation": 6},
    "output_token_details": {"reasoning": 12},
}
COUNTS = ("llm_calls", "tokens_in", "tokens_out", "tokens_cached_in", "tokens_cache_write", "tokens_reasoning", "cost")


class Model(BaseChatModel):
    """A chat model that reports its usage. Its calls can fail, and its streams can break or wait."""

    failures: list[BaseException] = []  # noqa: RUF012  a pydantic field
    breaks: bool = False
    wait: Any = None
    usage: dict[str, Any] = USAGE
    named: bool = True

    @property
    def _llm_type(self) -> str:
        return "test"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        return {"ls_model_name": "model-of-the-run", "ls_model_type": "chat"}

    def _message(self) -> AIMessage:
        if self.failures:
            raise self.failures.pop()
        metadata = {"model_name": "gpt-x"} if self.named else {}
        return AIMessage("one two", usage_metadata=self.usage, response_metadata=metadata)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self._message())])

    async def _agenerate(self, *args: Any, **kwargs: Any) -> ChatResult:
        if self.wait is not None:
            self.wait.set()
            await asyncio.sleep(60)
        return self._generate([])

    def _stream(self, messages: list[BaseMessage], **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        message = self._message()
        yield ChatGenerationChunk(message=AIMessageChunk(""))
        yield ChatGenerationChunk(message=AIMessageChunk("one ", usage_metadata=message.usage_metadata))
        if self.breaks:
            raise ConnectionError("cut off")
        yield ChatGenerationChunk(message=AIMessageChunk("two", response_metadata=message.response_metadata))

    async def _astream(self, messages: list[BaseMessage], **kwargs: Any) -> AsyncIterator[ChatGenerationChunk]:
        for chunk in self._stream(messages):
            yield chunk


class Runs:
    """Runs a runnable with a handler, blocking or with asyncio."""

    def __init__(self, perf: AgentPerf, runner: asyncio.Runner | None) -> None:
        self.perf, self._runner = perf, runner

    def __call__(self, runnable: Any, value: Any = None, agent: str | None = "planner", **options: Any) -> Any:
        return self.with_handlers(runnable, value, AgentPerfCallbackHandler(self.perf, agent, **options))

    def with_handlers(self, runnable: Any, value: Any, *handlers: Any) -> Any:
        value, config = {"x": 1} if value is None else value, {"callbacks": list(handlers)}
        if self._runner is None:
            return runnable.invoke(value, config=config)

        async def run() -> Any:
            return await runnable.ainvoke(value, config=config)

        return self._runner.run(run())

    def stream(self, runnable: Any, items: int | None = None) -> list[Any]:
        """Return the first items of a stream, and close the stream."""
        config = {"callbacks": [AgentPerfCallbackHandler(self.perf, "planner")]}
        if self._runner is None:
            stream = runnable.stream({"x": 1}, config=config)
            found = [each for each, _ in zip(stream, range(items or 99), strict=False)]
            stream.close()
            return found

        async def run() -> list[Any]:
            found = []
            stream = runnable.astream({"x": 1}, config=config)
            async for each in stream:
                found.append(each)
                if len(found) == items:
                    break
            await stream.aclose()
            del stream
            # Wait, because Python closes the inner generators in later steps of the event loop.
            deadline = time.monotonic() + 30
            while open_runs(self.perf) and time.monotonic() < deadline:
                await asyncio.sleep(0.005)
            return found

        return self._runner.run(run())

    def of(self, agent: str = "planner") -> PerformanceMetrics:
        return self.perf.metrics.get_or_create_metrics(agent)

    def spans(self, agent: str = "planner") -> dict[str, PerformanceMetrics]:
        return {span.name: span.metrics for span in self.perf.metrics.spans(agent).spans}


@pytest.fixture(params=["sync", "async"])
def runs(request: pytest.FixtureRequest, perf: AgentPerf, runner: asyncio.Runner) -> Iterator[Runs]:
    yield Runs(perf, runner if request.param == "async" else None)
    assert open_runs(perf) == {}


def open_runs(perf: AgentPerf) -> dict[Any, Any]:
    return perf.backend.share("langchain runs", callbacks._OpenRuns)._runs


def counts(metrics: PerformanceMetrics) -> dict[str, Any]:
    return {name: getattr(metrics, name) for name in COUNTS} | {"models": metrics.models}


def outcomes(metrics: PerformanceMetrics) -> tuple[int, int, int]:
    return metrics.success_count, metrics.failure_count, metrics.cancelled_count


def test_chain_is_one_execution_and_its_steps_are_spans(runs: Runs) -> None:
    assert runs(PROMPT | Model() | StrOutputParser()) == "one two"
    assert outcomes(runs.of()) == (1, 0, 0)
    assert {name: each.task_count for name, each in runs.spans().items()} == {
        "": 1,
        "ChatPromptTemplate": 1,
        "model:Model": 1,
        "StrOutputParser": 1,
    }
    assert runs.spans()["model:Model"].tokens_in == 100


@pytest.mark.parametrize(
    "usage",
    [USAGE, {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}],
    ids=["with parts", "plain"],
)
def test_counts_equal_those_of_record_llm(runs: Runs, usage: dict[str, Any]) -> None:
    model = Model(usage=usage)
    for _ in range(3):
        runs(PROMPT | model)
    for _ in range(3):
        response = LLMResult(generations=[model._generate([]).generations])
        runs.perf.metrics.record_llm("expected", usage=response)
    assert counts(runs.of()) == counts(runs.of("expected"))
    assert runs.of().tokens_in == 3 * usage["input_tokens"]


def test_batch_counts_each_call(runs: Runs) -> None:
    chain = PROMPT | Model()
    chain.batch([{"x": 1}] * 4, config={"callbacks": [AgentPerfCallbackHandler(runs.perf, "planner")]})
    assert outcomes(runs.of()) == (4, 0, 0)
    assert (runs.of().llm_calls, runs.of().tokens_in) == (4, 400)


def test_text_model_counts_its_calls(runs: Runs) -> None:
    runs(FakeListLLM(responses=["hi"]), "why?")
    assert outcomes(runs.of()) == (1, 0, 0)
    assert runs.of().llm_calls == 1


def test_call_without_a_chain_is_an_execution_of_its_name(runs: Runs) -> None:
    runs(Model(), "why?", agent=None)
    assert outcomes(runs.of("Model")) == (1, 0, 0)
    assert runs.of("Model").llm_calls == 1


def test_model_named_by_the_run_serves_responses_without_a_name(runs: Runs) -> None:
    runs(Model(named=False), "why?")
    assert runs.of().models["model-of-the-run"].tokens_in == 100


def test_name_of_the_run_is_the_agent_without_another(runs: Runs) -> None:
    runs((PROMPT | Model()).with_config(run_name="writer"), agent=None)
    assert outcomes(runs.of("writer")) == (1, 0, 0)


def test_long_and_odd_names_are_recorded(runs: Runs) -> None:
    runs((PROMPT | Model()).with_config(run_name="x\n" * 300), agent=None)
    (found,) = runs.perf.metrics.snapshots()
    assert len(found) == 200


def test_stream_counts_tokens_and_time_to_first_token(runs: Runs) -> None:
    assert "".join(runs.stream(PROMPT | Model() | StrOutputParser())) == "one two"
    assert outcomes(runs.of()) == (1, 0, 0)
    assert (runs.of().llm_calls, runs.of().tokens_in, runs.of().tokens_out) == (1, 100, 20)
    stream = runs.perf.metrics.streams("planner")
    assert (stream.first.task_count, stream.items) == (1, 2), "empty chunks are no tokens"


def test_stream_closed_early_is_a_success(runs: Runs) -> None:
    assert runs.stream(PROMPT | Model(), 1)
    assert outcomes(runs.of()) == (1, 0, 0)


def test_stream_that_breaks_counts_its_tokens_and_fails(runs: Runs) -> None:
    with pytest.raises(ConnectionError):
        runs.stream(PROMPT | Model(breaks=True) | StrOutputParser())
    assert outcomes(runs.of()) == (0, 1, 0)
    assert runs.of().error_types == {"ConnectionError": 1}
    assert (runs.of().llm_calls, runs.of().tokens_in) == (1, 100)


def test_error_fails_the_run_and_its_execution(runs: Runs) -> None:
    with pytest.raises(ValueError, match="no"):
        runs(PROMPT | Model(failures=[ValueError("no")]))
    assert runs.of().error_types == {"ValueError": 1}
    assert outcomes(runs.spans()["model:Model"]) == (0, 1, 0)
    assert outcomes(runs.spans()["ChatPromptTemplate"]) == (1, 0, 0)
    assert runs.of().llm_calls == 0


def test_not_failures_count_as_success(runs: Runs) -> None:
    with pytest.raises(KeyError):
        runs(PROMPT | Model(failures=[KeyError("no")]), not_failures=LookupError)
    assert outcomes(runs.of()) == (1, 0, 0)


def test_retries_are_spans_and_the_last_outcome_counts(runs: Runs) -> None:
    model = Model(failures=[ConnectionError(), ConnectionError()])
    retried = model.with_retry(wait_exponential_jitter=False, stop_after_attempt=3)
    runs(PROMPT | retried)
    assert outcomes(runs.of()) == (1, 0, 0)
    attempts = [each for name, each in runs.spans().items() if name.endswith("model:Model")]
    assert [outcomes(each) for each in attempts] == [(1, 2, 0)]
    assert (runs.of().llm_calls, runs.of().tokens_in) == (1, 100)


def test_retry_within_a_model_is_a_failed_span(perf: AgentPerf) -> None:
    runs = Runs(perf, None)
    from langchain_core.language_models.llms import create_base_retry_decorator

    class Retrying(Model):
        def _generate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
            retry = create_base_retry_decorator([ConnectionError], max_retries=3, run_manager=run_manager)
            sleepless = retry(lambda: ChatResult(generations=[ChatGeneration(message=self._message())]))
            sleepless.retry.sleep = lambda _: None
            result: ChatResult = sleepless()
            return result

    runs(Retrying(failures=[ConnectionError()]), "why?")
    assert outcomes(runs.of()) == (1, 0, 0)
    assert runs.spans()["retry"].error_types == {"ConnectionError": 1}


def test_fallback_saves_the_execution(runs: Runs) -> None:
    runs(Model(failures=[ConnectionError()]).with_fallbacks([Model()]), "why?")
    assert outcomes(runs.of()) == (1, 0, 0)
    assert outcomes(runs.spans()["model:Model"]) == (1, 1, 0)


def test_cancelled_run_is_a_cancellation(perf: AgentPerf, runner: asyncio.Runner) -> None:
    async def main() -> None:
        started = asyncio.Event()
        handler = AgentPerfCallbackHandler(perf, "planner")
        chain = PROMPT | Model(wait=started)
        task = asyncio.create_task(chain.ainvoke({"x": 1}, config={"callbacks": [handler]}))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    runner.run(main())
    runs = Runs(perf, None)
    assert outcomes(runs.of()) == (0, 0, 1)
    assert outcomes(runs.spans()["model:Model"]) == (0, 0, 1), "though LangChain does not report its end"
    assert open_runs(perf) == {}


def test_cancelled_call_without_a_chain_is_a_cancellation(perf: AgentPerf, runner: asyncio.Runner) -> None:
    class Shelf(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Any]:
            return []

        async def _aget_relevant_documents(self, query: str, *, run_manager: Any) -> list[Any]:
            started.set()
            await asyncio.sleep(60)
            return []

    started = asyncio.Event()

    async def main() -> None:
        config: Any = {"callbacks": [AgentPerfCallbackHandler(perf, "planner")]}
        for called in (Model(wait=started), Shelf()):
            task = asyncio.create_task(called.ainvoke("why?", config=config))
            await started.wait()
            started.clear()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    runner.run(main())
    gc.collect()
    assert outcomes(Runs(perf, None).of()) == (0, 0, 2), "though LangChain reports no end"
    assert open_runs(perf) == {}
    assert perf.metrics.running() == ()


def test_response_from_a_cache_has_no_tokens(runs: Runs) -> None:
    chain = PROMPT | Model(cache=AgentPerfCache(runs.perf))
    for _ in range(3):
        runs(chain)
    assert outcomes(runs.spans()["model:Model"]) == (3, 0, 0)
    assert (runs.of().llm_calls, runs.of().tokens_in) == (1, 100)
    assert runs.perf.metrics.delivery().usage_unread == 0


@tool
def search(query: str) -> str:
    """Search."""
    if query == "bad":
        raise ToolException("no such page")
    return query.upper()


def test_tools_are_spans_and_tool_calls(runs: Runs) -> None:
    runs(RunnableLambda(lambda x: x["query"]).with_config(run_name="pick") | search, {"query": "a"})
    with pytest.raises(ToolException):
        runs(search, {"query": "bad"})
    assert outcomes(runs.of()) == (1, 1, 0)
    assert outcomes(runs.spans()["tool:search"]) == (1, 0, 0)
    assert runs.of().tool_calls == 2


def test_tool_that_turns_its_error_into_a_message_has_failed(runs: Runs) -> None:
    handling = search.model_copy(update={"handle_tool_error": True})
    call = {"name": "search", "args": {"query": "bad"}, "id": "c1", "type": "tool_call"}
    assert runs(handling, call).status == "error"
    assert runs.of().error_types == {"ToolException": 1}


def test_retrievers_are_spans(runs: Runs) -> None:
    class Shelf(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Any]:
            return []

    runs(RunnableLambda(lambda _: "q") | Shelf())
    assert outcomes(runs.spans()["retriever:Shelf"]) == (1, 0, 0)


def test_self_times_of_parallel_runs_add_up(runs: Runs) -> None:
    runs(RunnableParallel(a=PROMPT | Model(), b=PROMPT | Model()))
    report = runs.perf.metrics.spans("planner")
    (whole,) = [span for span in report.spans if not span.path]
    assert sum(span.self_time for span in report.spans) == pytest.approx(
        whole.metrics.total_execution_time, rel=0.01, abs=0.001
    )
    assert runs.of().llm_calls == 2


def test_run_within_a_tracked_execution_is_a_span_of_it(perf: AgentPerf, runner: asyncio.Runner) -> None:
    chain, runs = PROMPT | Model(), Runs(perf, None)

    async def main() -> None:
        with perf.metrics.track("planner"):
            runs(chain, agent=None)
            await chain.ainvoke({"x": 1}, config={"callbacks": [AgentPerfCallbackHandler(perf, "planner")]})

    runner.run(main())
    assert outcomes(runs.of()) == (1, 0, 0)
    assert runs.spans()["RunnableSequence/model:Model"].llm_calls == 2
    with perf.metrics.track("boss"):
        runs(chain)
    assert outcomes(runs.of()) == (2, 0, 0), "of another agent"


def test_run_that_a_tool_begins_is_a_span_of_the_tool(perf: AgentPerf) -> None:
    runs = Runs(perf, None)

    @tool
    def ask(question: str) -> str:
        """Ask."""
        runs(Model(), question, agent=None)
        runs(Model(), question, agent="critic")
        return question

    runs(ask, {"question": "why?"})
    assert outcomes(runs.of()) == outcomes(runs.of("critic")) == (1, 0, 0)
    assert set(runs.spans()) == {"", "model:Model"}
    assert (runs.of().llm_calls, runs.of("critic").llm_calls) == (1, 1)


def test_two_handlers_record_a_run_once(runs: Runs) -> None:
    first, second = AgentPerfCallbackHandler(runs.perf, "planner"), AgentPerfCallbackHandler(runs.perf, "critic")
    model = Model(callbacks=[AgentPerfCallbackHandler(runs.perf)])
    runs.with_handlers(PROMPT | model, None, first, second, first)
    assert outcomes(runs.of()) == (1, 0, 0)
    assert runs.of().llm_calls == 1
    assert list(runs.perf.metrics.snapshots()) == ["planner"]


def test_nested_agents_have_executions_of_their_own(runs: Runs) -> None:
    inner = (PROMPT | Model()).with_config(metadata={"lc_agent_name": "researcher"})

    @tool
    def research(x: str) -> str:
        """Research."""
        return str(inner.invoke({"x": x}).content)

    boss = (RunnableLambda(lambda x: x).with_config(run_name="plan") | research).with_config(
        metadata={"lc_agent_name": "boss"}
    )
    runs(boss, {"x": "a"}, agent=None)
    assert outcomes(runs.of("boss")) == outcomes(runs.of("researcher")) == (1, 0, 0)
    assert (runs.of("boss").llm_calls, runs.of("researcher").llm_calls) == (0, 1)
    assert set(runs.spans("boss")) == {"", "plan", "tool:research"}
    assert set(runs.spans("researcher")) == {"", "ChatPromptTemplate", "model:Model"}


def test_hidden_chains_are_part_of_the_run_around_them(runs: Runs) -> None:
    hidden = RunnableLambda(lambda x: Model().invoke(x)).with_config(tags=["langsmith:hidden"])
    runs(RunnableLambda(lambda _: "why?").with_config(run_name="ask") | hidden)
    assert set(runs.spans()) == {"", "ask", "model:Model"}
    assert runs.spans()["model:Model"].llm_calls == 1


def test_runs_that_never_end_are_bounded(perf: AgentPerf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "MAX_OPEN_RUNS", 3)
    handler, streams = AgentPerfCallbackHandler(perf, "planner"), []
    for _ in range(9):
        streams.append(Model().stream("why?", config={"callbacks": [handler]}))
        next(streams[-1])
    assert len(handler._open._runs) == 3
    for stream in streams:
        stream.close()
    assert perf.metrics.get_or_create_metrics("planner").task_count == 3


def test_many_threads_count_exactly(perf: AgentPerf) -> None:
    chain, handler = PROMPT | Model() | StrOutputParser(), AgentPerfCallbackHandler(perf, "planner")

    def work() -> None:
        for _ in range(20):
            chain.invoke({"x": 1}, config={"callbacks": [handler]})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = perf.metrics.get_or_create_metrics("planner")
    assert (found.task_count, found.llm_calls, found.tokens_in) == (80, 80, 8000)


def test_forked_child_records_its_own_runs_only(perf: AgentPerf) -> None:
    handler = AgentPerfCallbackHandler(perf, "planner")
    open_stream = Model().stream("why?", config={"callbacks": [handler]})
    next(open_stream)
    held, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with handler._open._lock:
            held.set()
            forked.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(60)

    def child() -> None:
        open_stream.close()
        Model().invoke("why?", config={"callbacks": [handler]})
        perf.metrics.flush()

    in_child(child)
    forked.set()
    holder.join()
    assert perf.metrics.get_or_create_metrics("planner").task_count == 1
    open_stream.close()
    assert perf.metrics.get_or_create_metrics("planner").task_count == 2


@pytest.mark.parametrize(
    "misuse",
    [
        lambda perf: UNCHECKED(None),
        lambda perf: UNCHECKED(perf, ""),
        lambda perf: UNCHECKED(perf, "x", not_failures="KeyError"),
    ],
)
def test_invalid_argument_is_refused(perf: AgentPerf, misuse: Callable[[AgentPerf], object]) -> None:
    with pytest.raises(InvalidArgument):
        misuse(perf)


def served(request: Any) -> Any:
    """Answer a request of OpenAI's client, as one response or as a stream."""
    import httpx

    usage = {
        "prompt_tokens": 100,
        "completion_tokens": 20,
        "total_tokens": 120,
        "prompt_tokens_details": {"cached_tokens": 64},
        "completion_tokens_details": {"reasoning_tokens": 12},
    }
    shared = {"id": "c", "created": 1, "model": "gpt-x"}
    if not json.loads(request.content).get("stream"):
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "one two"}}
        return httpx.Response(200, json={**shared, "object": "chat.completion", "choices": [choice], "usage": usage})
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"index": 0, "delta": {"content": "one "}}]},
        {"choices": [{"index": 0, "delta": {"content": "two"}, "finish_reason": "stop"}]},
        {"choices": [], "usage": usage},
    ]
    events = [json.dumps({**shared, "object": "chat.completion.chunk", **chunk}) for chunk in chunks]
    body = "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"])
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, text=body)


def test_counts_of_openai_equal_those_of_record_llm(runs: Runs) -> None:
    openai = pytest.importorskip("langchain_openai", reason="needs the extra borders")
    import httpx

    transport = httpx.MockTransport(served)
    model = openai.ChatOpenAI(
        model="gpt-x",
        api_key="none",
        stream_usage=True,
        http_client=httpx.Client(transport=transport),
        http_async_client=httpx.AsyncClient(transport=transport),
    )
    runs(PROMPT | model)
    assert "".join(runs.stream(PROMPT | model | StrOutputParser())) == "one two"
    for _ in range(2):
        runs.perf.metrics.record_llm("expected", usage=model.invoke("hi"))
    assert counts(runs.of()) == counts(runs.of("expected"))
    assert (runs.of().llm_calls, runs.of().tokens_in, runs.of().tokens_reasoning) == (2, 200, 24)
    assert runs.perf.metrics.streams("planner").items == 2
