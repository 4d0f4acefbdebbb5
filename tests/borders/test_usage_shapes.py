"""Token counts are read from objects of real packages. The packages' own parsers and converters make these objects.

Tests of packages that are not installed are skipped; the extra ``borders`` installs all of them. If a new version of a
package reports counts in another form, the test of that package fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agentperf_redis.metrics.llm_usage import Usage, merged, read, read_usage
from tests.support.servers import wait_until

pytestmark = [
    pytest.mark.thorough,  # the packages take long to import
    pytest.mark.filterwarnings("default"),  # a warning raised by one of the packages must not make a test fail
]


def event_loops() -> list[asyncio.AbstractEventLoop]:
    """Return the event loops of this process, including loops to which no reference is left."""
    return [each for each in gc.get_objects() if issubclass(type(each), asyncio.AbstractEventLoop)]


@pytest.fixture(autouse=True, scope="module")
def _no_event_loop_is_left() -> Iterator[None]:
    """Close the event loops that the packages leave open. Otherwise Python may warn about one during a later test."""
    earlier = event_loops()
    yield
    left = [loop for loop in event_loops() if not any(loop is each for each in earlier)]
    for loop in left:
        with contextlib.suppress(TimeoutError):  # a package may keep a thread and its loop running
            wait_until(lambda loop=loop: not loop.is_running(), "the loop to end", timeout=2)  # type: ignore[misc]
            loop.close()
    del left[:], earlier[:]
    gc.collect()


CHAT = {
    "prompt_tokens": 100,
    "completion_tokens": 20,
    "total_tokens": 120,
    "prompt_tokens_details": {"cached_tokens": 64},
    "completion_tokens_details": {"reasoning_tokens": 12},
}
CHOICE = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "x"}}
COMPLETION = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "gpt-x",
    "choices": [CHOICE],
    "usage": CHAT,
}
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "model": "gpt-x",
    "output": [],
    "usage": {
        "input_tokens": 50,
        "input_tokens_details": {"cached_tokens": 10, "cache_write_tokens": 5},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 57,
    },
}
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-x",
    "content": [{"type": "text", "text": "x"}],
    "stop_reason": "end_turn",
    "usage": {
        "input_tokens": 12,
        "cache_creation_input_tokens": 5,
        "cache_creation": {"ephemeral_5m_input_tokens": 5, "ephemeral_1h_input_tokens": 0},
        "cache_read_input_tokens": 2483,
        "output_tokens": 40,
        "output_tokens_details": {"thinking_tokens": 30},
    },
}
GEMINI = {
    "modelVersion": "gemini-x",
    "responseId": "r1",
    "candidates": [{"finishReason": "STOP", "content": {"parts": [{"text": "x"}]}}],
    "usageMetadata": {
        "promptTokenCount": 8,
        "candidatesTokenCount": 9,
        "thoughtsTokenCount": 100,
        "toolUsePromptTokenCount": 3,
        "cachedContentTokenCount": 4,
        "totalTokenCount": 120,
    },
}
OF_CHAT = Usage(100, 20, "gpt-x", tokens_cached_in=64, tokens_reasoning=12)
OF_RESPONSE = Usage(50, 7, "gpt-x", tokens_cached_in=10, tokens_cache_write=5, tokens_reasoning=3)
OF_MESSAGE = Usage(2500, 40, "claude-x", tokens_cached_in=2483, tokens_cache_write=5, tokens_reasoning=30)
OF_GEMINI = Usage(11, 109, "gemini-x", tokens_cached_in=4, tokens_reasoning=100)


def package(name: str) -> Any:
    """Import a module. Skip the test if the package is missing; fail if the package no longer has the module."""
    installed = "google.genai" if name.startswith("google.genai") else name.partition(".")[0]
    pytest.importorskip(installed, reason=f"{installed} is not installed; the extra `borders` has it")
    return importlib.import_module(name)


def unnamed(usage: Usage) -> Usage:
    return Usage(**{name: getattr(usage, name) for name in Usage.__slots__} | {"model": None})


def openai_chat() -> tuple[Any, Usage]:
    return package("openai.types.chat").ChatCompletion.model_validate(COMPLETION), OF_CHAT


def openai_chunk() -> tuple[Any, Usage]:
    chunk = {**COMPLETION, "object": "chat.completion.chunk", "choices": []}
    return package("openai.types.chat").ChatCompletionChunk.model_validate(chunk), OF_CHAT


def openai_response() -> tuple[Any, Usage]:
    make = package("openai._models").construct_type
    return make(type_=package("openai.types.responses").Response, value=RESPONSE), OF_RESPONSE


def openai_response_completed() -> tuple[Any, Usage]:
    event = {"type": "response.completed", "sequence_number": 3, "response": RESPONSE}
    make = package("openai._models").construct_type
    return make(type_=package("openai.types.responses").ResponseCompletedEvent, value=event), OF_RESPONSE


def openai_realtime() -> tuple[Any, Usage]:
    usage = {
        "input_tokens": 10,
        "output_tokens": 20,
        "total_tokens": 30,
        "input_token_details": {"cached_tokens": 4},
        "output_token_details": {"text_tokens": 20},
    }
    event = {"type": "response.done", "event_id": "e", "response": {"id": "r", "usage": usage}}
    make = package("openai._models").construct_type
    return make(type_=package("openai.types.realtime").ResponseDoneEvent, value=event), Usage(
        10, 20, tokens_cached_in=4
    )


def xai_through_openai() -> tuple[Any, Usage]:
    usage = {"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 135, "completion_tokens_details": {"reasoning_tokens": 94}}  # fmt: skip
    answer = {**COMPLETION, "model": "grok-x", "usage": usage}
    return package("openai.types.chat").ChatCompletion.model_validate(answer), Usage(
        32, 103, "grok-x", tokens_reasoning=94
    )


def gemini_through_openai() -> tuple[Any, Usage]:
    answer = {
        **COMPLETION,
        "model": "gemini-x",
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 35},
    }
    return package("openai.types.chat").ChatCompletion.model_validate(answer), Usage(
        10, 25, "gemini-x", tokens_reasoning=20
    )


def anthropic_message() -> tuple[Any, Usage]:
    make = package("anthropic._models").construct_type
    return make(type_=package("anthropic.types").Message, value=MESSAGE), OF_MESSAGE


def anthropic_events() -> tuple[Any, Usage]:
    types, make = package("anthropic.types"), package("anthropic._models").construct_type
    started = {**MESSAGE, "usage": {**MESSAGE["usage"], "output_tokens": 1, "output_tokens_details": None}}  # type: ignore[dict-item]
    usage = {"input_tokens": 12, "cache_read_input_tokens": 2483, "cache_creation_input_tokens": 5, "output_tokens": 40, "output_tokens_details": {"thinking_tokens": 30}}  # fmt: skip
    return [
        make(type_=types.RawMessageStartEvent, value={"type": "message_start", "message": started}),
        make(type_=types.RawMessageDeltaEvent, value={"type": "message_delta", "delta": {}, "usage": usage}),
        make(type_=types.RawMessageStopEvent, value={"type": "message_stop"}),
    ], OF_MESSAGE


def anthropic_compaction() -> tuple[Any, Usage]:
    def entry(kind: str, tokens_in: int, tokens_out: int) -> dict[str, Any]:
        return {"type": kind, "input_tokens": tokens_in, "output_tokens": tokens_out, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}  # fmt: skip

    entries = [entry("compaction", 180_000, 3_500), entry("message", 23_000, 1_000)]
    answer = {**MESSAGE, "usage": {"input_tokens": 23_000, "output_tokens": 1_000, "iterations": entries}}
    make = package("anthropic._models").construct_type
    return make(type_=package("anthropic.types.beta").BetaMessage, value=answer), Usage(203_000, 4_500, "claude-x")


def anthropic_batch_row() -> tuple[Any, Usage]:
    row = {"custom_id": "1", "result": {"type": "succeeded", "message": MESSAGE}}
    make = package("anthropic._models").construct_type
    return make(type_=package("anthropic.types.messages").MessageBatchIndividualResponse, value=row), OF_MESSAGE


def gemini() -> tuple[Any, Usage]:
    return package("google.genai.types").GenerateContentResponse.model_validate(GEMINI), OF_GEMINI


def gemini_live() -> tuple[Any, Usage]:
    usage = {"promptTokenCount": 8, "responseTokenCount": 9, "totalTokenCount": 17}
    return package("google.genai.types").LiveServerMessage.model_validate({"usageMetadata": usage}), Usage(8, 9)


def gemini_interaction() -> tuple[Any, Usage]:
    types = package("google.genai._gaos.types.interactions.usage")
    usage = {"total_input_tokens": 10, "total_output_tokens": 5, "total_thought_tokens": 20, "total_cached_tokens": 4, "total_tokens": 35}  # fmt: skip
    return {"usage": types.Usage.model_validate(usage)}, Usage(10, 25, tokens_cached_in=4, tokens_reasoning=20)


def cohere_v2() -> tuple[Any, Usage]:
    types, cohere = package("cohere.types"), package("cohere")
    usage = types.Usage(
        billed_units=types.UsageBilledUnits(input_tokens=5.0, output_tokens=7.0),
        tokens=types.UsageTokens(input_tokens=71.0, output_tokens=9.0),
        cached_tokens=3.0,
    )
    return cohere.V2ChatResponse.model_construct(id="x", usage=usage), Usage(71, 9, tokens_cached_in=3)


def groq_last_chunk() -> tuple[Any, Usage]:
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "llama", "choices": [], "x_groq": {"id": "r", "usage": CHAT}}  # fmt: skip
    expected = Usage(100, 20, "llama", tokens_cached_in=64, tokens_reasoning=12)
    return package("groq.types.chat").ChatCompletionChunk.model_validate(chunk), expected


def mistral_event() -> tuple[Any, Usage]:
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    chunk = {"id": "m", "object": "chat.completion.chunk", "model": "mistral-x", "choices": [], "usage": usage}
    return package("mistralai.client.models").CompletionEvent.model_validate({"data": chunk}), Usage(3, 4, "mistral-x")


def mistral_conversation() -> tuple[Any, Usage]:
    make = package("mistralai.client.models").ConversationUsageInfo
    return make(prompt_tokens=10, completion_tokens=5, total_tokens=115, connector_tokens=100), Usage(110, 5)


def ollama() -> tuple[Any, Usage]:
    answer = {"model": "llama", "message": {"role": "assistant", "content": "x"}, "done": True, "prompt_eval_count": 26, "eval_count": 298}  # fmt: skip
    return package("ollama").ChatResponse.model_validate(answer), Usage(26, 298, "llama")


def xai() -> tuple[Any, Usage]:
    usages, chats = package("xai_sdk.proto").usage_pb2, package("xai_sdk.proto").chat_pb2
    usage = usages.SamplingUsage(
        prompt_tokens=32, completion_tokens=9, reasoning_tokens=94, total_tokens=135,
        cached_prompt_text_tokens=5, cost_in_usd_ticks=5_000_000,
    )  # fmt: skip
    answer = chats.GetChatCompletionResponse(id="x", model="grok-x", usage=usage)
    expected = Usage(32, 103, "grok-x", 0.0005, tokens_cached_in=5, tokens_reasoning=94)
    return package("xai_sdk.chat").Response(answer, 0), expected


def litellm_of_anthropic() -> tuple[Any, Usage]:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    config = package("litellm.llms.anthropic.chat.transformation").AnthropicConfig()
    usage = config.calculate_usage(usage_object=MESSAGE["usage"], reasoning_content=None)
    answer = package("litellm.types.utils").ModelResponse(model="claude-x", usage=usage)
    return answer, OF_MESSAGE


def langchain_result() -> Any:
    package("langchain_openai")
    model = package("langchain_openai").ChatOpenAI(model="gpt-x", api_key="none")
    return model._create_chat_result({**COMPLETION, "choices": [CHOICE, {**CHOICE, "index": 1}]})


def langchain_llm_result() -> tuple[Any, Usage]:
    result = langchain_result()
    outputs = package("langchain_core.outputs")
    return outputs.LLMResult(generations=[result.generations], llm_output=result.llm_output), OF_CHAT


def langchain_llm_result_without_output() -> tuple[Any, Usage]:
    return package("langchain_core.outputs").LLMResult(generations=[langchain_result().generations]), unnamed(OF_CHAT)


def langchain_state() -> tuple[Any, Usage]:
    messages = package("langchain_core.messages")
    answer = langchain_result().generations[0].message
    answer.response_metadata["model_name"] = "gpt-x"
    state = {"messages": [messages.HumanMessage("x", id="h"), answer, answer.model_copy(update={"id": "2"})]}
    return state, Usage(200, 40, "gpt-x", calls=2, tokens_cached_in=128, tokens_reasoning=24)


def langchain_of_anthropic() -> tuple[Any, Usage]:
    model = package("langchain_anthropic").ChatAnthropic(model="claude-x", api_key="none")
    make = package("anthropic._models").construct_type
    answer = model._format_output(make(type_=package("anthropic.types").Message, value=MESSAGE))
    return answer.generations[0].message, unnamed(OF_MESSAGE)


def langchain_usage_by_model() -> tuple[Any, Usage]:
    outputs = package("langchain_core.outputs")
    handler = package("langchain_core.callbacks").UsageMetadataCallbackHandler()
    message = langchain_result().generations[0].message
    message.response_metadata["model_name"] = "gpt-x"
    handler.on_llm_end(outputs.LLMResult(generations=[[outputs.ChatGeneration(message=message)]]))
    return handler.usage_metadata, OF_CHAT


def pydantic_ai_run() -> tuple[Any, Usage]:
    result = package("pydantic_ai").Agent(package("pydantic_ai.models.test").TestModel()).run_sync("hi")
    return result, Usage(result.usage.input_tokens, result.usage.output_tokens, "test", calls=1)


def openai_agents_context() -> tuple[Any, Usage]:
    agents = package("agents")
    context = agents.RunContextWrapper(context=None)
    context.usage = agents.Usage(requests=3, input_tokens=100, output_tokens=20, total_tokens=120)
    context.usage.input_tokens_details.cached_tokens = 10
    result = object.__new__(package("agents.result").RunResult)  # a complete RunResult needs a run with a model
    result.__dict__["context_wrapper"] = context
    return result, Usage(100, 20, calls=3, tokens_cached_in=10)


def dspy_prediction() -> tuple[Any, Usage]:
    prediction = package("dspy").Prediction(answer="x")
    prediction.set_lm_usage({"openai/gpt-x": CHAT})
    return prediction, Usage(100, 20, "openai/gpt-x", tokens_cached_in=64, tokens_reasoning=12)


def haystack_replies() -> tuple[Any, Usage]:
    make = package("haystack.dataclasses").ChatMessage.from_assistant
    return {"replies": [make("x", meta={"model": "gpt-x", "usage": CHAT}) for _ in range(2)]}, OF_CHAT


def strands_result() -> tuple[Any, Usage]:
    metrics = package("strands.telemetry.metrics")
    loop = metrics.EventLoopMetrics()
    loop.accumulated_usage.update(inputTokens=100, outputTokens=10, totalTokens=110)
    usage = {"inputTokens": 10, "outputTokens": 5, "totalTokens": 65, "cacheReadInputTokens": 50}
    loop.agent_invocations.append(metrics.AgentInvocation(cycles=[1, 2], usage=usage))
    make = package("strands.agent.agent_result").AgentResult
    message = {"role": "assistant", "content": []}
    return make("end_turn", message, loop, None), Usage(60, 5, calls=2, tokens_cached_in=50)


MADE: list[Callable[[], tuple[Any, Usage]]] = [
    openai_chat, openai_chunk, openai_response, openai_response_completed, openai_realtime, xai_through_openai,
    gemini_through_openai, anthropic_message, anthropic_events, anthropic_compaction, anthropic_batch_row, gemini,
    gemini_live, gemini_interaction, cohere_v2, groq_last_chunk, mistral_event, mistral_conversation, ollama, xai,
    litellm_of_anthropic, langchain_llm_result, langchain_llm_result_without_output, langchain_state,
    langchain_of_anthropic, langchain_usage_by_model, pydantic_ai_run, openai_agents_context, dspy_prediction,
    haystack_replies, strands_result,
]  # fmt: skip


@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
def test_usage_of_a_real_object_is_read(make: Callable[[], tuple[Any, Usage]]) -> None:
    made, expected = make()
    assert read_usage(made) == expected
    assert len({each.part.id for each in merged(read(made).found) if each.part}) <= expected.calls
