"""Runs of the OpenAI Agents SDK, with a fake model, give the counts that `record_llm` gives for the same responses.

The tests are skipped if the SDK is not installed; the extra ``borders`` installs it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from agentperf_redis import AgentPerf
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.metrics.model import PerformanceMetrics
from agentperf_redis.metrics.spans import current_span
from tests.support.programs import Programs
from tests.support.proxy import Proxy
from tests.support.recipes import recipe
from tests.support.servers import Server

pytest.importorskip("agents", reason="needs the extra openai-agents")

import agents
from agents import Agent, Runner, function_tool, set_trace_processors
from agents.tracing import custom_span, generation_span, response_span, trace
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText

from agentperf_redis.integrations.openai_agents import AgentPerfTracingProcessor

pytestmark = [
    pytest.mark.thorough,  # the package takes long to import
    pytest.mark.servers("valkey"),  # the kind of server does not affect these tests
    pytest.mark.filterwarnings("default"),  # a warning raised by the package must not make a test fail
]

TRACED = """
from agents.tracing import agent_span, generation_span, trace

with trace("my workflow"), agent_span("coder"), generation_span(model="gpt-x", usage={"input_tokens": 812}):
    pass
"""

USAGE: dict[str, Any] = {
    "input_tokens": 100,
    "output_tokens": 20,
    "total_tokens": 120,
    "input_tokens_details": {"cached_tokens": 64, "cache_write_tokens": 5},
    "output_tokens_details": {"reasoning_tokens": 12},
}
Snapshots = Callable[[], dict[str, PerformanceMetrics]]


class FakeModel(agents.Model):
    """Calls the first tool, then the first handoff, and then replies. Reports the same traces as the SDK's models.

    Args:
        responses: the list to which each response is appended.
        fails: whether each call fails.
        as_responses: whether the traces are those of the SDK's model for OpenAI's Responses API. Otherwise, they are
            those of the SDK's model for chat completions.
    """

    def __init__(self, responses: list[Any], *, fails: bool = False, as_responses: bool = False) -> None:
        self._responses = responses
        self._fails = fails
        self._as_responses = as_responses

    async def get_response(
        self,
        system_instructions: Any,
        input: Any,  # noqa: A002  the interface has this name
        model_settings: Any,
        tools: Any,
        output_schema: Any,
        handoffs: Any,
        tracing: Any,
        **options: Any,
    ) -> Any:
        span: Any = response_span() if self._as_responses else generation_span(model="gpt-x")
        with span:
            await asyncio.sleep(0)
            if self._fails:
                raise ValueError("as the test wants")
            output = self._output(input, tools, handoffs)
            response = Response.model_validate({
                "id": "r", "created_at": 1, "model": "gpt-x", "object": "response", "parallel_tool_calls": True,
                "tool_choice": "auto", "tools": [], "output": output, "usage": USAGE,
            })  # fmt: skip
            if self._as_responses:
                span.span_data.response = response
            else:
                span.span_data.usage = {"requests": 1, **USAGE}
            self._responses.append(response)
            usage = agents.Usage(requests=1, **{name: getattr(response.usage, name) for name in USAGE})
            return agents.ModelResponse(output=output, usage=usage, response_id=None)

    async def stream_response(self, *arguments: Any, **options: Any) -> AsyncIterator[Any]:
        answer = await self.get_response(*arguments, **options)
        completed = Response.model_validate({**self._responses[-1].model_dump(), "output": answer.output})
        from openai.types.responses import ResponseCompletedEvent

        yield ResponseCompletedEvent(response=completed, sequence_number=1, type="response.completed")

    @staticmethod
    def _output(input: Any, tools: Any, handoffs: Any) -> list[Any]:  # noqa: A002  as above
        used = isinstance(input, list) and any(each.get("type") == "function_call_output" for each in input)
        if tools and not used:
            return [
                ResponseFunctionToolCall(
                    type="function_call", call_id="1", name=tools[0].name, arguments='{"input": "x"}'
                )
            ]
        if handoffs:
            return [
                ResponseFunctionToolCall(type="function_call", call_id="2", name=handoffs[0].tool_name, arguments="{}")
            ]
        text = ResponseOutputText(text="hi", type="output_text", annotations=[])
        return [ResponseOutputMessage(id="m", type="message", role="assistant", status="completed", content=[text])]


@pytest.fixture(autouse=True)
def _no_processor_is_left() -> Iterator[None]:
    yield
    set_trace_processors([])


@pytest.fixture
def processor(perf: AgentPerf) -> AgentPerfTracingProcessor:
    made = AgentPerfTracingProcessor(perf)
    set_trace_processors([made])
    return made


@pytest.fixture
def snapshots(perf: AgentPerf) -> Snapshots:
    def read() -> dict[str, PerformanceMetrics]:
        perf.metrics.flush()
        return perf.metrics.snapshots()

    return read


@pytest.mark.parametrize("as_responses", [False, True], ids=["chats", "responses"])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_runs_count_as_record_llm_of_their_responses(
    perf: AgentPerf, processor: AgentPerfTracingProcessor, snapshots: Snapshots, as_responses: bool, streamed: bool
) -> None:
    responses: list[Any] = []
    model = FakeModel(responses, as_responses=as_responses)

    @function_tool
    def search(input: str) -> str:  # noqa: A002  the fake model passes this argument
        perf.metrics.record_llm(model="by the tool", tokens_in=1)  # this usage counts for the agent that calls the tool
        return input

    expert = Agent(name="expert", model=model, tools=[search])
    writer = Agent(name="writer", model=model)
    planner = Agent(
        name="planner",
        model=model,
        tools=[expert.as_tool(tool_name="ask", tool_description="asks the expert")],
        handoffs=[writer],
    )

    async def run() -> None:
        if not streamed:
            await Runner.run(planner, "q")
            return
        result = Runner.run_streamed(planner, "q")
        async for _ in result.stream_events():
            pass

    asyncio.run(run())
    for response in responses:
        perf.metrics.record_llm("by hand", usage=response)
    found = snapshots()
    assert {name: metrics.task_count for name, metrics in found.items()} == {
        "planner": 1, "expert": 1, "writer": 1, "by hand": 0,
    }  # fmt: skip
    assert {name: metrics.llm_calls for name, metrics in found.items()} == {
        "planner": 2, "expert": 3, "writer": 1, "by hand": 5,
    }  # fmt: skip
    assert found["expert"].models["by the tool"].tokens_in == 1
    by_hand = found["by hand"].models["gpt-x"]
    for field in ("calls", "tokens_in", "tokens_out", "tokens_cached_in", "tokens_cache_write", "tokens_reasoning"):
        total = sum(getattr(found[name].models["gpt-x"], field) for name in ("planner", "expert", "writer"))
        assert total == getattr(by_hand, field), field
    assert (found["planner"].tool_calls, found["expert"].tool_calls) == (1, 1)
    report = perf.metrics.spans("planner")
    assert {span.name: span.metrics.task_count for span in report.spans} == {
        "": 1, "chat gpt-x": 2, "execute_tool ask": 1, "handoff writer": 1,
    }  # fmt: skip
    assert report.total == pytest.approx(found["planner"].total_execution_time, abs=1e-5)
    assert perf.metrics.running() == ()


def served(request: Any) -> Any:
    """Answer a request for OpenAI's Responses API, as one response or as a stream."""
    import httpx

    content = [{"type": "output_text", "text": "hi", "annotations": []}]
    message = {"id": "m", "type": "message", "role": "assistant", "status": "completed", "content": content}
    response = {
        "id": "r", "created_at": 1, "model": "gpt-x", "object": "response", "status": "completed", "tools": [],
        "parallel_tool_calls": True, "tool_choice": "auto", "output": [message], "usage": USAGE,
    }  # fmt: skip
    if not json.loads(request.content).get("stream"):
        return httpx.Response(200, json=response)
    event = {"type": "response.completed", "sequence_number": 0, "response": response}
    body = f"event: response.completed\ndata: {json.dumps(event)}\n\n"
    return httpx.Response(200, headers={"content-type": "text/event-stream"}, text=body)


@pytest.mark.parametrize("sensitive", [False, True], ids=["redacted", "whole"])
def test_own_model_of_the_sdk_counts_with_and_without_its_texts(
    processor: AgentPerfTracingProcessor, snapshots: Snapshots, sensitive: bool
) -> None:
    import httpx
    from openai import AsyncOpenAI

    async def run() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(served)) as http:
            options: dict[str, Any] = {"http_client": http}  # Any: the type of http_client depends on openai's version
            client = AsyncOpenAI(api_key="none", **options)
            agent = Agent(name="a", model=agents.OpenAIResponsesModel("gpt-x", client))
            config = agents.RunConfig(trace_include_sensitive_data=sensitive)
            await Runner.run(agent, "q", run_config=config)
            async for _ in Runner.run_streamed(agent, "q", run_config=config).stream_events():
                pass

    asyncio.run(run())
    found = snapshots()["a"]
    assert (found.task_count, found.llm_calls, found.tokens_in, found.tokens_out) == (2, 2, 200, 40)
    assert (found.tokens_cached_in, found.tokens_cache_write, found.tokens_reasoning) == (128, 10, 24)
    assert list(found.models) == (["gpt-x"] if sensitive else [])


def test_failed_run_is_a_failure_of_its_type(processor: AgentPerfTracingProcessor, snapshots: Snapshots) -> None:
    agent = Agent(name="a", model=FakeModel([], fails=True))
    with pytest.raises(ValueError, match="as the test wants"):
        asyncio.run(Runner.run(agent, "q"))
    found = snapshots()["a"]
    assert (found.task_count, found.llm_calls, found.error_types) == (1, 0, {"ValueError": 1})


def test_cancelled_run_is_a_cancellation(processor: AgentPerfTracingProcessor, snapshots: Snapshots) -> None:
    begun = asyncio.Event()

    class Hangs(FakeModel):
        async def get_response(self, *arguments: Any, **options: Any) -> Any:
            begun.set()
            await asyncio.Event().wait()

    async def cancel() -> None:
        task = asyncio.create_task(Runner.run(Agent(name="a", model=Hangs([])), "q"))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    found = snapshots()["a"]
    assert (found.task_count, found.cancelled_count) == (1, 1)


def test_errors_of_spans_are_failures(
    perf: AgentPerf, processor: AgentPerfTracingProcessor, snapshots: Snapshots
) -> None:
    with trace("flow"), custom_span("step") as span:
        span.set_error({"message": "too long", "data": None})
    try:
        raise KeyError("x")
    except KeyError:
        with trace("flow"), custom_span("retry"):  # the exception is older than the span, so the span has no error
            pass
    assert snapshots()["flow"].error_types == {"too long": 1}


def test_outermost_span_without_an_agent_counts_for_the_workflow(
    processor: AgentPerfTracingProcessor, snapshots: Snapshots, perf: AgentPerf
) -> None:
    with trace("flow"), custom_span("step"), generation_span(model="m", usage={"input_tokens": 5}):
        pass
    found = snapshots()
    assert {name: (each.task_count, each.tokens_in) for name, each in found.items()} == {"flow": (1, 5)}
    assert [span.name for span in perf.metrics.spans("flow").tree] == ["", "chat m"]


def test_span_that_never_ends_counts_nothing(
    perf: AgentPerf, processor: AgentPerfTracingProcessor, snapshots: Snapshots
) -> None:
    with trace("flow"):
        never = agents.agent_span("never")
        never.start()
        assert snapshots() == {}
        never.finish()
    assert snapshots()["never"].task_count == 1


def test_span_dropped_without_an_end_is_forgotten(processor: AgentPerfTracingProcessor) -> None:
    with trace("flow"):
        never = agents.agent_span("never")
        never.start()
        assert len(processor._open) == 1
        del never
    assert len(processor._open) == 0


def test_span_that_cannot_be_recorded_is_not_left_open(
    perf: AgentPerf, processor: AgentPerfTracingProcessor, snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise OSError("as the test wants")

    with trace("flow"), agents.agent_span("a") as span:
        span.set_error({"data": None})  # type: ignore[typeddict-item, unused-ignore]
        with monkeypatch.context() as patch, generation_span(model="m", usage={"input_tokens": 1}):
            patch.setattr(processor._metrics, "record_llm", fail)
    assert current_span() is None
    assert snapshots()["a"].failure_count == 1


@pytest.mark.parametrize("ending", ["dropped", "ended after the shutdown"])
def test_span_that_is_not_recorded_is_not_left_open(
    perf: AgentPerf, processor: AgentPerfTracingProcessor, ending: str
) -> None:
    with trace("flow"):
        lost = agents.agent_span("lost")
        lost.start()
        if ending != "dropped":
            processor.shutdown()
            lost.finish()
        del lost
    assert current_span() is None
    with pytest.raises(InvalidArgument, match="agent_name"):
        perf.metrics.record_llm(tokens_in=1)  # if the span were open, the call would count for the agent "lost"


def test_disabled_tracing_counts_nothing(processor: AgentPerfTracingProcessor, snapshots: Snapshots) -> None:
    config = agents.RunConfig(tracing_disabled=True)
    asyncio.run(Runner.run(Agent(name="a", model=FakeModel([])), "q", run_config=config))
    assert snapshots() == {}


def test_processors_of_one_agentperf_count_each_span_once(
    perf: AgentPerf, server: Server, snapshots: Snapshots
) -> None:
    with AgentPerf(server.url, namespace=f"{perf.backend.namespace}-2") as other:
        set_trace_processors([
            AgentPerfTracingProcessor(perf), AgentPerfTracingProcessor(perf), AgentPerfTracingProcessor(other),
        ])  # fmt: skip
        asyncio.run(Runner.run(Agent(name="a", model=FakeModel([])), "q"))
        other.metrics.flush()
        found = other.metrics.snapshots()["a"]
        assert (found.task_count, found.llm_calls) == (1, 1)
    found = snapshots()["a"]
    assert (found.task_count, found.llm_calls) == (1, 1)


@pytest.mark.parametrize("first", ["this processor", "OpenTelemetry"])
def test_runs_traced_by_opentelemetry_too_count_once(perf: AgentPerf, snapshots: Snapshots, first: str) -> None:
    pytest.importorskip("opentelemetry.sdk.trace", reason="needs the extra otel")
    from opentelemetry.sdk.trace import TracerProvider

    from agentperf_redis.integrations.otel import AgentPerfSpanProcessor

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(AgentPerfSpanProcessor(perf))
    processors = [AgentPerfTracingProcessor(perf), Bridge(provider)]
    set_trace_processors(processors if first == "this processor" else processors[::-1])
    responses: list[Any] = []
    inner = Agent(name="inner", model=FakeModel(responses))
    outer = Agent(name="outer", model=FakeModel(responses), tools=[inner.as_tool("ask", "asks")])
    asyncio.run(Runner.run(outer, "q"))
    found = snapshots()
    assert {name: (each.task_count, each.llm_calls, each.tool_calls) for name, each in found.items()} == {
        "outer": (1, 2, 1), "inner": (1, 1, 0),
    }  # fmt: skip


class Bridge(agents.TracingProcessor):
    """Passes spans on to OpenTelemetry, as the instrumentations of this SDK do."""

    def __init__(self, provider: Any) -> None:
        self._tracer = provider.get_tracer("bridge")
        self._spans: dict[str, Any] = {}

    def on_span_start(self, span: Any) -> None:
        from opentelemetry.trace import set_span_in_context

        data = span.span_data
        operation = {"agent": "invoke_agent", "function": "execute_tool", "generation": "chat"}.get(data.type)
        attributes = {} if operation is None else {"gen_ai.operation.name": operation, "gen_ai.usage.input_tokens": 100}
        if operation == "invoke_agent":
            attributes |= {"gen_ai.agent.name": data.name}
        parent = self._spans.get(span.parent_id)
        context = None if parent is None else set_span_in_context(parent)
        self._spans[span.span_id] = self._tracer.start_span(data.type, context, attributes=attributes)

    def on_span_end(self, span: Any) -> None:
        self._spans.pop(span.span_id).end()

    def on_trace_start(self, trace: Any) -> None:
        pass

    def on_trace_end(self, trace: Any) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def force_flush(self) -> None:
        pass


def test_broken_span_raises_nothing_and_is_logged(
    perf: AgentPerf, processor: AgentPerfTracingProcessor, caplog: pytest.LogCaptureFixture, snapshots: Snapshots
) -> None:
    class Broken:
        span_id, parent_id, trace_id = "s", None, "t"

    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            processor.on_span_start(Broken())  # type: ignore[arg-type, unused-ignore]
            processor.on_span_end(Broken())  # type: ignore[arg-type, unused-ignore]
    assert len(caplog.records) == 1
    with trace("\x00" * 300), agents.agent_span("\x00" * 300), custom_span(""), custom_span("x" * 500):
        pass
    assert [metrics.task_count for metrics in snapshots().values()] == [1]
    with pytest.raises(InvalidArgument, match="perf"):
        AgentPerfTracingProcessor(perf.metrics)  # type: ignore[arg-type]


def test_ending_a_span_never_waits_for_the_server(server: Server, proxy: Proxy, namespace: str) -> None:
    with AgentPerf(proxy.url, namespace=namespace) as perf:
        processor = AgentPerfTracingProcessor(perf)
        set_trace_processors([processor])
        perf.metrics.flush()
        proxy.go_silent()
        with trace("flow"):
            for _ in range(100):
                with agents.agent_span("a"):
                    pass
        assert perf.metrics.delivery().counted == 0
        proxy.speak_again()
        processor.force_flush()
        assert perf.metrics.snapshots()["a"].task_count == 100


def test_shutdown_flushes_and_ignores_later_spans(
    perf: AgentPerf, processor: AgentPerfTracingProcessor, snapshots: Snapshots
) -> None:
    with trace("flow"):
        with agents.agent_span("a"):
            pass
        late = agents.agent_span("a")
        late.start()

        async def shut_down() -> None:
            processor.shutdown()  # must also flush when called in an event loop

        asyncio.run(shut_down())
        assert perf.metrics.delivery().counted == 1
        late.finish()
    assert snapshots()["a"].task_count == 1


def test_spans_of_many_threads_are_all_counted(processor: AgentPerfTracingProcessor, snapshots: Snapshots) -> None:
    def work() -> None:
        for _ in range(50):
            with trace("flow"), agents.agent_span("a"), generation_span(model="m", usage={"input_tokens": 1}):
                pass

    workers = [threading.Thread(target=work) for _ in range(4)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    found = snapshots()["a"]
    assert (found.task_count, found.llm_calls, found.tokens_in) == (200, 200, 200)


def test_recipe_counts_and_flushes_at_exit(programs: Programs, snapshots: Snapshots) -> None:
    programs.write("recipe.py", recipe("openai_agents") + TRACED)
    programs.run("recipe")
    assert snapshots()["coder"].tokens_in == 812
