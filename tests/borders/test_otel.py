"""The spans of real instrumentations give the counts that `record_llm` gives for the same responses.

Tests of packages that are not installed are skipped; the extra ``borders`` installs all these packages.
"""

from __future__ import annotations

import asyncio
import contextvars
import importlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agentperf_redis import AgentPerf
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.metrics.model import ModelUsage, PerformanceMetrics
from tests.support.programs import Programs
from tests.support.proxy import Proxy
from tests.support.recipes import recipe
from tests.support.servers import Server, wait_until

pytest.importorskip("opentelemetry.sdk.trace", reason="needs the extra otel")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from opentelemetry.trace import Status, StatusCode, Tracer

from agentperf_redis.integrations.otel import AgentPerfSpanProcessor, RecordingSampler

pytestmark = [
    pytest.mark.thorough,  # the packages take long to import
    pytest.mark.servers("valkey"),  # the kind of server does not affect these tests
    pytest.mark.filterwarnings("default"),  # a warning raised by one of the packages must not make a test fail
]

TRACED = """
agent = {"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": "coder"}
chat = {"gen_ai.operation.name": "chat", "gen_ai.usage.input_tokens": 812}
tracer = provider.get_tracer("my-agent")
with tracer.start_as_current_span("invoke_agent", attributes=agent), tracer.start_as_current_span("chat", attributes=chat):
    pass
"""

CALL = ModelUsage(1, 100, 20, tokens_cached_in=64, tokens_cache_write=5, tokens_reasoning=12)
"""What `record_llm` counts for each response of the fake models."""


def package(name: str) -> Any:
    """Import a module. Skip the test if the package is missing."""
    pytest.importorskip(name.partition(".")[0], reason=f"{name} is not installed; the extra `borders` has it")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        pytest.skip(f"{name} is not installed; the extra `borders` has it")


@pytest.fixture
def provider(perf: AgentPerf) -> Iterator[TracerProvider]:
    made = TracerProvider(shutdown_on_exit=False)
    made.add_span_processor(AgentPerfSpanProcessor(perf, agent="plain"))
    yield made
    made.shutdown()


@pytest.fixture
def tracer(provider: TracerProvider) -> Tracer:
    return provider.get_tracer("test")


@pytest.fixture
def snapshots(perf: AgentPerf) -> Callable[[], dict[str, PerformanceMetrics]]:
    def read() -> dict[str, PerformanceMetrics]:
        perf.metrics.flush()
        return perf.metrics.snapshots()

    return read


Snapshots = Callable[[], dict[str, PerformanceMetrics]]


def genai(operation: str, **attributes: Any) -> dict[str, Any]:
    """Return the attributes of a span. The argument `agent_name` becomes the attribute ``gen_ai.agent.name``."""
    named = {f"gen_ai.{name.replace('_', '.', 1)}": value for name, value in attributes.items()}
    return {"gen_ai.operation.name": operation, **named}


# -- pydantic-ai


def pydantic_agents(provider: TracerProvider) -> tuple[Any, Any, list[Any]]:
    """Return an agent, a failing agent, and the list of responses. A tool of the first agent runs a third agent."""
    ai = package("pydantic_ai")
    messages = package("pydantic_ai.messages")
    function = package("pydantic_ai.models.function")
    capability = package("pydantic_ai.capabilities").Instrumentation
    settings = package("pydantic_ai.models.instrumented").InstrumentationSettings(tracer_provider=provider)
    responses: list[Any] = []

    def reply(history: list[Any], info: Any) -> Any:
        usage = package("pydantic_ai.usage").RequestUsage(
            input_tokens=100,
            output_tokens=20,
            cache_read_tokens=64,
            cache_write_tokens=5,
            details={"reasoning_tokens": 12},
        )
        asked = any(isinstance(part, messages.ToolReturnPart) for each in history for part in each.parts)
        wants_tool = info.function_tools and not asked
        part = messages.ToolCallPart("ask", {"question": "x"}) if wants_tool else messages.TextPart("hi")
        responses.append(messages.ModelResponse(parts=[part], usage=usage, model_name="gpt-x"))
        return responses[-1]

    def fail(history: list[Any], info: Any) -> Any:
        raise ValueError("as the test wants")

    def agent(name: str, function_: Callable[[list[Any], Any], Any]) -> Any:
        model = function.FunctionModel(function_, model_name="gpt-x")
        return ai.Agent(model, name=name, capabilities=[capability(settings=settings)])

    inner, outer, failing = agent("inner", reply), agent("outer", reply), agent("failing", fail)

    async def ask(question: str) -> str:
        return str((await inner.run(question)).output)

    outer.tool_plain(ask)
    return outer, failing, responses


def test_pydantic_ai_counts_as_record_llm_of_its_responses(
    perf: AgentPerf, provider: TracerProvider, snapshots: Snapshots
) -> None:
    outer, failing, responses = pydantic_agents(provider)
    asyncio.run(outer.run("q"))
    with pytest.raises(ValueError, match="as the test wants"):
        asyncio.run(failing.run("q"))
    for response in responses:
        perf.metrics.record_llm("by hand", usage=response)
    found = snapshots()
    assert {name: metrics.task_count for name, metrics in found.items()} == {
        "outer": 1, "inner": 1, "failing": 1, "by hand": 0,
    }  # fmt: skip
    assert found["inner"].models == {"gpt-x": CALL}
    assert _sum(found["outer"], found["inner"]) == found["by hand"].models["gpt-x"]
    assert found["outer"].tool_calls == 1
    assert found["failing"].error_types == {"ValueError": 1}
    assert found["failing"].llm_calls == 0
    report = perf.metrics.spans("outer")
    assert {span.name: span.metrics.task_count for span in report.spans} == {
        "": 1, "chat gpt-x": 2, "execute_tool ask": 1,
    }  # fmt: skip
    assert report.total == pytest.approx(found["outer"].total_execution_time, abs=1e-5)


def _sum(*metrics: PerformanceMetrics) -> ModelUsage:
    parts = [each.models["gpt-x"] for each in metrics]
    names = ("calls", "tokens_in", "tokens_out", "cost", "tokens_cached_in", "tokens_cache_write", "tokens_reasoning")
    return ModelUsage(**{name: sum(getattr(part, name) for part in parts) for name in names})


def test_cancelled_run_of_pydantic_ai_is_a_cancellation(provider: TracerProvider, snapshots: Snapshots) -> None:
    ai, function = package("pydantic_ai"), package("pydantic_ai.models.function")
    capability = package("pydantic_ai.capabilities").Instrumentation
    settings = package("pydantic_ai.models.instrumented").InstrumentationSettings(tracer_provider=provider)
    begun = asyncio.Event()

    async def hang(history: list[Any], info: Any) -> Any:
        begun.set()
        await asyncio.Event().wait()

    async def cancel() -> None:
        task = asyncio.create_task(agent.run("q"))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    agent = ai.Agent(function.FunctionModel(hang), name="slow", capabilities=[capability(settings=settings)])
    asyncio.run(cancel())
    found = snapshots()["slow"]
    assert (found.task_count, found.cancelled_count, found.error_types) == (1, 1, {})


def test_program_that_records_itself_counts_nothing_twice(
    perf: AgentPerf, provider: TracerProvider, snapshots: Snapshots
) -> None:
    outer, _, responses = pydantic_agents(provider)
    with perf.metrics.track("outer"):
        asyncio.run(outer.run("q"))
        for response in responses:
            perf.metrics.record_llm(usage=response)
    found = snapshots()
    assert (found["outer"].task_count, found["outer"].llm_calls, found["outer"].tokens_in) == (1, 3, 300)
    assert found.keys() == {"outer"}


def test_program_that_records_usage_only_counts_nothing_twice(perf: AgentPerf, snapshots: Snapshots) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(AgentPerfSpanProcessor(perf, usage=False))
    outer, _, responses = pydantic_agents(provider)
    asyncio.run(outer.run("q"))
    for response in responses:
        perf.metrics.record_llm("outer", usage=response)
    found = snapshots()
    assert {name: (each.task_count, each.llm_calls) for name, each in found.items()} == {
        "outer": (1, 3),
        "inner": (1, 0),
    }


# -- LangChain


def langchain_model(details: dict[str, Any], responses: list[Any]) -> Any:
    """Return a fake chat model that appends its messages to `responses`."""
    core = package("langchain_core.language_models.chat_models")
    messages, outputs = package("langchain_core.messages"), package("langchain_core.outputs")
    usage = {"input_tokens": 100, "output_tokens": 20, "total_tokens": 120, **details}
    metadata = {"model_name": "gpt-x"}

    class Fake(core.BaseChatModel):  # type: ignore[misc, name-defined, unused-ignore]
        model: str = "gpt-x"
        fails: bool = False

        @property
        def _llm_type(self) -> str:
            return "fake"

        def _generate(self, prompt: Any, stop: Any = None, run_manager: Any = None, **options: Any) -> Any:
            if self.fails:
                raise ValueError("as the test wants")
            message = messages.AIMessage(content="hi", usage_metadata=usage, response_metadata=metadata)
            responses.append(message)
            return outputs.ChatResult(generations=[outputs.ChatGeneration(message=message)], llm_output=metadata)

        def _stream(self, prompt: Any, stop: Any = None, run_manager: Any = None, **options: Any) -> Iterator[Any]:
            chunk = messages.AIMessageChunk
            yield outputs.ChatGenerationChunk(message=chunk(content="h"))
            last = chunk(content="i", usage_metadata=usage, response_metadata=metadata)
            yield outputs.ChatGenerationChunk(message=last)
            responses.append(messages.AIMessage(content="hi", usage_metadata=usage, response_metadata=metadata))

    return Fake


@pytest.mark.parametrize(
    ("module", "name", "details"),
    [
        (
            "openinference.instrumentation.langchain",
            "LangChainInstrumentor",
            {
                "input_token_details": {"cache_read": 64, "cache_creation": 5},
                "output_token_details": {"reasoning": 12},
            },
        ),
        # This instrumentation reports no reasoning tokens.
        (
            "opentelemetry.instrumentation.langchain",
            "LangchainInstrumentor",
            {"input_token_details": {"cache_read": 64, "cache_creation": 5}},
        ),
        (
            "opentelemetry.instrumentation.genai.langchain",
            "LangChainInstrumentor",
            {
                "input_token_details": {"cache_read": 64, "cache_creation": 5},
                "output_token_details": {"reasoning": 12},
            },
        ),
    ],
    ids=["openinference", "openllmetry", "opentelemetry"],
)
def test_langchain_counts_as_record_llm_of_its_responses(
    perf: AgentPerf,
    provider: TracerProvider,
    snapshots: Snapshots,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    name: str,
    details: dict[str, Any],
) -> None:
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    instrumentor = getattr(package(module), name)()
    runnables = package("langchain_core.runnables")
    responses: list[Any] = []
    model = langchain_model(details, responses)
    tool = package("langchain_core.tools").tool

    def search(question: str) -> str:
        """Search."""
        return question

    def work(question: str) -> Any:
        tool(search).invoke({"question": question})
        list(model().stream(question))
        return model().invoke(question)

    def run() -> None:
        runnables.RunnableLambda(work).with_config(run_name="pipeline").invoke("q")
        asyncio.run((runnables.RunnableLambda(str) | model()).with_config(run_name="pipeline").ainvoke("q"))
        with pytest.raises(ValueError, match="as the test wants"):
            model(fails=True).invoke("q")

    # skip_dep_check: one instrumentation declares that it needs langchain, but it uses only langchain-core.
    instrumentor.instrument(tracer_provider=provider, skip_dep_check=True)
    try:
        contextvars.copy_context().run(run)  # a copy: OpenLLMetry leaves spans in the context after a failed call
    finally:
        instrumentor.uninstrument()
    for response in responses:
        perf.metrics.record_llm("by hand", usage=response)
    found = snapshots()
    assert {agent: metrics.task_count for agent, metrics in found.items()} == {
        "pipeline": 2, "plain": 1, "by hand": 0,
    }  # fmt: skip
    assert found["plain"].error_types == {"ValueError": 1}
    pipeline, by_hand = found["pipeline"], found["by hand"]
    assert pipeline.models == by_hand.models
    assert pipeline.llm_calls == 3
    assert pipeline.tool_calls == 1
    assert perf.metrics.delivery().usage_unread == 0


# -- the processor


def test_attributes_of_the_conventions_are_read(tracer: Tracer, snapshots: Snapshots) -> None:
    usage = {
        "usage_input_tokens": 100, "usage_output_tokens": 20, "usage_cache_read.input_tokens": 64,
        "usage_cache_write.input_tokens": 5, "usage_reasoning.output_tokens": 12,
    }  # fmt: skip
    with tracer.start_as_current_span("invoke_agent a", attributes=genai("invoke_agent", agent_name="a")):
        attributes = {**genai("chat", request_model="gpt", response_model="gpt-x", **usage), "operation.cost": 0.25}
        tracer.start_span("chat gpt", attributes=attributes).end()
        tracer.start_span("embeddings e", attributes=genai("embeddings", request_model="e", usage_input_tokens=7)).end()
    found = snapshots()["a"]
    assert found.models["gpt-x"] == ModelUsage(1, 100, 20, 0.25, 64, 5, 12)
    assert found.models["e"] == ModelUsage(1, 7, 0)


def test_error_status_is_a_failure_of_its_type(tracer: Tracer, snapshots: Snapshots) -> None:
    agent = genai("invoke_agent", agent_name="a")
    with pytest.raises(TimeoutError), tracer.start_as_current_span("invoke_agent", attributes=agent):
        raise TimeoutError
    tracer.start_span("invoke_agent", attributes={**agent, "error.type": "429"}).end()
    unnamed = tracer.start_span("invoke_agent", attributes=agent)
    unnamed.set_status(Status(StatusCode.ERROR, "text with an id 1234"))
    unnamed.end()
    tracer.start_span("invoke_agent", attributes=agent).end()
    found = snapshots()["a"]
    assert (found.task_count, found.success_count) == (4, 1)
    assert found.error_types == {"TimeoutError": 1, "429": 1}


def test_sampled_out_spans_count_with_a_recording_sampler(perf: AgentPerf, snapshots: Snapshots) -> None:
    exporter = InMemorySpanExporter()
    for name, sampler in (("dropped", ALWAYS_OFF), ("recorded", RecordingSampler(ParentBased(ALWAYS_OFF)))):
        provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        provider.add_span_processor(AgentPerfSpanProcessor(perf))
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        tracer = provider.get_tracer("test")
        with tracer.start_as_current_span("invoke_agent", attributes=genai("invoke_agent", agent_name=name)):
            tracer.start_span("chat", attributes=genai("chat", usage_input_tokens=5)).end()
    assert {name: (each.task_count, each.tokens_in) for name, each in snapshots().items()} == {"recorded": (1, 5)}
    assert exporter.get_finished_spans() == ()


def test_processors_of_one_agentperf_count_each_span_once(
    perf: AgentPerf, server: Server, provider: TracerProvider, tracer: Tracer, snapshots: Snapshots
) -> None:
    with AgentPerf(server.url, namespace=f"{perf.backend.namespace}-2") as other:
        provider.add_span_processor(AgentPerfSpanProcessor(perf))
        provider.add_span_processor(AgentPerfSpanProcessor(other))
        for _ in range(3):
            tracer.start_span("invoke_agent", attributes=genai("invoke_agent", agent_name="a")).end()
        other.metrics.flush()
        assert other.metrics.snapshots()["a"].task_count == 3
    assert snapshots()["a"].task_count == 3


def test_outermost_span_without_an_agent_counts_for_the_service(perf: AgentPerf, snapshots: Snapshots) -> None:
    resources = importlib.import_module("opentelemetry.sdk.resources")
    resource = resources.Resource.create({"service.name": "shop"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(AgentPerfSpanProcessor(perf))
    tracer = provider.get_tracer("test")
    with tracer.start_as_current_span("GET /"):
        tracer.start_span("chat", attributes=genai("chat", usage_input_tokens=5)).end()
        tracer.start_span("chat", attributes=genai("chat", agent_name="named", usage_input_tokens=6)).end()
    found = snapshots()
    assert {name: (each.task_count, each.tokens_in) for name, each in found.items()} == {
        "shop": (1, 5),
        "named": (1, 6),
    }


def test_span_that_never_ends_counts_nothing_and_is_listed(
    perf: AgentPerf, tracer: Tracer, snapshots: Snapshots
) -> None:
    never = tracer.start_span("invoke_agent", attributes=genai("invoke_agent", agent_name="never"))
    assert snapshots() == {}
    wait_until(lambda: [each.agent for each in perf.metrics.running()] == ["never"], "the heartbeat", timeout=60)
    never.end()
    assert snapshots()["never"].task_count == 1


def test_broken_span_raises_nothing_and_is_logged(
    perf: AgentPerf, provider: TracerProvider, tracer: Tracer, caplog: pytest.LogCaptureFixture, snapshots: Snapshots
) -> None:
    processor = AgentPerfSpanProcessor(perf)
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            processor.on_start(object())  # type: ignore[arg-type, unused-ignore]
            processor.on_end(object())  # type: ignore[arg-type, unused-ignore]
    assert len(caplog.records) == 1
    for value in (True, "text", -5, 2.5, 2**70, ["x"]):
        tracer.start_span("chat", attributes=genai("chat", usage_input_tokens=value, request_model="m")).end()
    odd: dict[str, Any] = {"gen_ai.operation.name": 7, "gen_ai.agent.name": "x" * 500}
    tracer.start_span("odd", attributes=odd).end()
    tracer.start_span("\x00", attributes=genai("invoke_agent", agent_name="\x00" * 300)).end()
    assert snapshots()["plain"].task_count == 6
    with pytest.raises(InvalidArgument, match="perf"):
        AgentPerfSpanProcessor(perf.metrics)  # type: ignore[arg-type]


def test_ending_a_span_never_waits_for_the_server(server: Server, proxy: Proxy, namespace: str) -> None:
    with AgentPerf(proxy.url, namespace=namespace) as perf:
        provider = TracerProvider(shutdown_on_exit=False)
        processor = AgentPerfSpanProcessor(perf)
        provider.add_span_processor(processor)
        tracer = provider.get_tracer("test")
        perf.metrics.flush()
        proxy.go_silent()
        for _ in range(100):
            tracer.start_span("invoke_agent", attributes=genai("invoke_agent", agent_name="a")).end()
        assert perf.metrics.delivery().counted == 0
        assert processor.force_flush(timeout_millis=50) is False
        proxy.speak_again()
        assert processor.force_flush() is True
        assert perf.metrics.snapshots()["a"].task_count == 100


def test_shutdown_flushes_and_ignores_later_spans(
    perf: AgentPerf, provider: TracerProvider, tracer: Tracer, snapshots: Snapshots
) -> None:
    attributes = genai("invoke_agent", agent_name="a")
    tracer.start_span("invoke_agent", attributes=attributes).end()
    late = tracer.start_span("invoke_agent", attributes=attributes)

    async def shut_down() -> None:
        provider.shutdown()  # must also flush when called in an event loop

    asyncio.run(shut_down())
    assert perf.metrics.delivery().counted == 1
    late.end()
    assert provider.force_flush() is True
    assert snapshots()["a"].task_count == 1


def test_shutdown_after_close_raises_nothing(server: Server, namespace: str) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    with AgentPerf(server.url, namespace=namespace) as perf:
        provider.add_span_processor(AgentPerfSpanProcessor(perf))
    provider.shutdown()


def test_spans_of_many_threads_are_all_counted(tracer: Tracer, snapshots: Snapshots) -> None:
    def work() -> None:
        for _ in range(50):
            with tracer.start_as_current_span("invoke_agent", attributes=genai("invoke_agent", agent_name="a")):
                tracer.start_span("chat", attributes=genai("chat", usage_input_tokens=1)).end()

    workers = [threading.Thread(target=work) for _ in range(4)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    found = snapshots()["a"]
    assert (found.task_count, found.llm_calls, found.tokens_in) == (200, 200, 200)


def test_recipe_counts_and_flushes_at_exit(programs: Programs, snapshots: Snapshots) -> None:
    programs.write("recipe.py", recipe("otel") + TRACED)
    programs.run("recipe")
    assert snapshots()["coder"].tokens_in == 812
