from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType, SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock, MagicMock, Mock, NonCallableMock, PropertyMock, create_autospec

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict, PrivateAttr, computed_field

from agentperf_redis.metrics.llm_usage import Found, Part, Usage, merged, read, read_usage


def used(tokens_in: int, tokens_out: int, model: str | None = None, **more: Any) -> Usage:
    parts = {"cached": "tokens_cached_in", "written": "tokens_cache_write", "reasoning": "tokens_reasoning"}
    return Usage(tokens_in, tokens_out, model, **{parts.get(name, name): value for name, value in more.items()})


# -- responses of vendors; the table in `llm_shapes` has the sources and versions

CHAT = {
    "prompt_tokens": 100,
    "completion_tokens": 20,
    "total_tokens": 120,
    "prompt_tokens_details": {"cached_tokens": 64, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 12, "audio_tokens": 0},
}
CLAUDE = {
    "input_tokens": 10,
    "cache_creation_input_tokens": 200,
    "cache_read_input_tokens": 3000,
    "cache_creation": {"ephemeral_5m_input_tokens": 200, "ephemeral_1h_input_tokens": 0},
    "output_tokens": 50,
    "output_tokens_details": {"thinking_tokens": 30},
}
RESPONSE = {
    "input_tokens": 50,
    "input_tokens_details": {"cached_tokens": 10, "cache_write_tokens": 5},
    "output_tokens": 7,
    "output_tokens_details": {"reasoning_tokens": 3},
    "total_tokens": 57,
}
WIRE: dict[str, tuple[Any, Usage]] = {
    "openai chat": ({"model": "gpt-x", "usage": CHAT}, used(100, 20, "gpt-x", cached=64, reasoning=12)),
    "openai responses": ({"model": "gpt-x", "usage": RESPONSE}, used(50, 7, "gpt-x", cached=10, written=5, reasoning=3)),
    "openai realtime": (
        {
            "type": "response.done",
            "response": {
                "usage": {
                    "input_tokens": 10,
                    "output_tokens": 20,
                    "total_tokens": 30,
                    "input_token_details": {"cached_tokens": 4, "text_tokens": 10},
                    "output_token_details": {"text_tokens": 20},
                }
            },
        },
        used(10, 20, cached=4),
    ),
    "an embedding": ({"model": "e", "usage": {"prompt_tokens": 12, "total_tokens": 12}}, used(12, 0, "e")),
    "voyage": ({"model": "v", "data": [], "usage": {"total_tokens": 9}}, used(9, 0, "v")),
    "openrouter": (
        {"model": "x/y", "usage": {"prompt_tokens": 1, "completion_tokens": 2, "cost": 0.0125}},
        used(1, 2, "x/y", cost=0.0125),
    ),
    "litellm, anthropic read from the cache": (
        {
            "model": "claude-x",
            "usage": {
                "prompt_tokens": 2495,
                "completion_tokens": 40,
                "total_tokens": 2535,
                "prompt_tokens_details": {"cached_tokens": 2483, "cache_creation_tokens": 0},
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 2483,
            },
        },
        used(2495, 40, "claude-x", cached=2483),
    ),
    "litellm without a total": (
        {"prompt_tokens": 2010, "completion_tokens": 7, "cache_creation_input_tokens": 1998},
        used(2010, 7, written=1998),
    ),
    "xai: reasoning beside completion": (
        {
            "model": "grok-x",
            "usage": {
                "prompt_tokens": 32,
                "completion_tokens": 9,
                "total_tokens": 135,
                "completion_tokens_details": {"reasoning_tokens": 94},
                "cost_in_usd_ticks": 5_000_000,
            },
        },
        used(32, 103, "grok-x", reasoning=94, cost=0.0005),
    ),
    "more reasoning than completion, no total": (
        {"prompt_tokens": 32, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 94}},
        used(32, 103, reasoning=94),
    ),
    "gemini's openai endpoint: reasoning in the total only": (
        {"model": "gemini-x", "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 35}},
        used(10, 25, "gemini-x", reasoning=20),
    ),
    "deepseek": (
        {
            "prompt_tokens": 20,
            "completion_tokens": 5,
            "total_tokens": 25,
            "prompt_cache_hit_tokens": 12,
            "prompt_cache_miss_tokens": 8,
        },
        used(20, 5, cached=12),
    ),
    "moonshot": ({"prompt_tokens": 20, "completion_tokens": 5, "cached_tokens": 12}, used(20, 5, cached=12)),
    "groq's last chunk": (
        {"id": "c", "model": "llama", "usage": None, "x_groq": {"id": "r", "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}},
        used(3, 4, "llama"),
    ),
    "mistral's conversation with connectors": (
        {"usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 115, "connector_tokens": 100}},
        used(110, 5),
    ),
    "anthropic": ({"model": "claude-x", "usage": CLAUDE}, used(3210, 50, "claude-x", cached=3000, written=200, reasoning=30)),
    "anthropic, written by ttl only": (
        {"input_tokens": 1, "output_tokens": 2, "cache_creation": {"ephemeral_5m_input_tokens": 3, "ephemeral_1h_input_tokens": 4}},
        used(8, 2, written=7),
    ),
    "gemini": (
        {
            "modelVersion": "gemini-x",
            "usageMetadata": {
                "promptTokenCount": 8,
                "candidatesTokenCount": 9,
                "thoughtsTokenCount": 100,
                "toolUsePromptTokenCount": 3,
                "cachedContentTokenCount": 4,
                "totalTokenCount": 120,
            },
        },
        used(11, 109, "gemini-x", cached=4, reasoning=100),
    ),
    "gemini object": (
        SimpleNamespace(
            model_version="gemini-x",
            usage_metadata=SimpleNamespace(prompt_token_count=8, candidates_token_count=9, thoughts_token_count=None),
        ),
        used(8, 9, "gemini-x"),
    ),
    "gemini with reasoning and no output": (
        {"usageMetadata": {"promptTokenCount": 8, "thoughtsTokenCount": 100, "totalTokenCount": 108}},
        used(8, 100, reasoning=100),
    ),
    "gemini live": (
        {"usageMetadata": {"promptTokenCount": 8, "responseTokenCount": 9, "totalTokenCount": 17}},
        used(8, 9),
    ),
    "gemini live object": (
        SimpleNamespace(usage_metadata=SimpleNamespace(prompt_token_count=8, response_token_count=9, total_token_count=17)),
        used(8, 9),
    ),
    "gemini interactions": (
        {
            "event_type": "interaction.completed",
            "interaction": {
                "model": "gemini-x",
                "usage": {
                    "total_input_tokens": 10,
                    "total_cached_tokens": 4,
                    "total_output_tokens": 5,
                    "total_thought_tokens": 20,
                    "total_tool_use_tokens": 2,
                    "total_tokens": 37,
                },
            },
        },
        used(12, 25, "gemini-x", cached=4, reasoning=20),
    ),
    "bedrock": (
        {"usage": {"inputTokens": 1, "outputTokens": 2, "totalTokens": 13, "cacheReadInputTokens": 10}},
        used(11, 2, cached=10),
    ),
    "bedrock's names, openai's numbers (strands)": (
        {"inputTokens": 30, "outputTokens": 2, "totalTokens": 32, "cacheReadInputTokens": 10},
        used(30, 2, cached=10),
    ),
    "bedrock's stream": ({"metadata": {"usage": {"inputTokens": 1, "outputTokens": 2, "totalTokens": 3}}}, used(1, 2)),
    "bedrock's invocation metrics": (
        {"type": "message_stop", "amazon-bedrock-invocationMetrics": {"inputTokenCount": 7, "outputTokenCount": 8}},
        used(7, 8),
    ),
    "cohere v1": (
        {"meta": {"billed_units": {"input_tokens": 6, "output_tokens": 7}, "tokens": {"input_tokens": 70, "output_tokens": 9}}},
        used(70, 9),
    ),
    "cohere v2": (
        {"usage": {"billed_units": {"input_tokens": 5.0, "output_tokens": 7.0}, "tokens": {"input_tokens": 71.0, "output_tokens": 9.0}, "cached_tokens": 3.0}},
        used(71, 9, cached=3),
    ),
    "cohere, billed units only": ({"meta": {"billed_units": {"input_tokens": 6}, "tokens": None}}, used(6, 0)),
    "cohere's stream": (
        {"type": "message-end", "delta": {"usage": {"tokens": {"input_tokens": 215, "output_tokens": 6}}}},
        used(215, 6),
    ),
    "ollama": ({"model": "llama", "prompt_eval_count": 26, "eval_count": 298}, used(26, 298, "llama")),
    "perplexity's deep research": (
        {"usage": {"prompt_tokens": 33, "completion_tokens": 100, "total_tokens": 133, "reasoning_tokens": 900, "cost": {"total_cost": 0.5}}},
        used(33, 1000, reasoning=900, cost=0.5, differs=True),
    ),
    "the usage alone": ({"prompt_tokens": 1, "completion_tokens": 0}, used(1, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", WIRE)
def test_vendor_responses_are_read(name: str) -> None:
    response, expected = WIRE[name]
    assert read_usage(response) == expected


def objects(value: Any) -> Any:
    """Convert mappings to objects, as clients do."""
    if isinstance(value, dict):
        return SimpleNamespace(**{key: objects(item) for key, item in value.items()})
    return [objects(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", [name for name in WIRE if "invocation metrics" not in name])
def test_responses_are_read_from_objects(name: str) -> None:
    response, expected = WIRE[name]
    assert read_usage(objects(response)) == expected


def test_compaction_and_advisor_are_counted_separately() -> None:
    entries = [
        {"type": "compaction", "input_tokens": 180_000, "output_tokens": 3_500, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0},
        {"type": "message", "input_tokens": 23_000, "output_tokens": 1_000, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 40},
        {"type": "advisor_message", "model": "claude-advisor", "input_tokens": 100, "output_tokens": 10, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 50},
    ]  # fmt: skip
    usage = {"input_tokens": 23_000, "output_tokens": 1_000, "cache_read_input_tokens": 40, "iterations": entries}
    found = [each.usage for each in read({"model": "claude-x", "usage": usage}).found]
    assert found == [used(203_040, 4_500, "claude-x", cached=40), used(150, 10, "claude-advisor", cached=50)]
    usage["iterations"] = []
    assert read_usage({"model": "claude-x", "usage": usage}) == used(23_040, 1_000, "claude-x", cached=40)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 14}, used(10, 5, differs=True)),
        ({"input_tokens": 10, "output_tokens": 5, "total_tokens": 99}, used(10, 5, differs=True)),
        ({"inputTokens": 10, "outputTokens": 5, "totalTokens": 99}, used(10, 5, differs=True)),
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 99}, used(10, 89, reasoning=84, differs=True)),
        ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 0}, used(10, 5)),  # 0 counts as no total
        ({"prompt_tokens": 10, "total_tokens": 15}, used(10, 5)),
        ({"completion_tokens": 5, "total_tokens": 15}, used(10, 5)),
    ],
)
def test_inconsistent_total_is_marked(usage: Any, expected: Usage) -> None:
    assert read_usage({"usage": usage}) == expected


# -- results of frameworks


def ai(identity: str | None, tokens_in: int, tokens_out: int, **more: Any) -> SimpleNamespace:
    usage = {"input_tokens": tokens_in, "output_tokens": tokens_out, "total_tokens": tokens_in + tokens_out, **more}
    return SimpleNamespace(type="ai", id=identity, usage_metadata=usage, response_metadata={"model_name": "gpt-x"})


HUMAN = SimpleNamespace(type="human", id="h", content="x", response_metadata={})
DETAILS = {
    "input_token_details": {"cache_read": 3, "cache_creation": 0, "ephemeral_5m_input_tokens": 2},
    "output_token_details": {"reasoning": 1},
}
TIERED = {
    "input_token_details": {"priority": 5, "priority_cache_read": 3},
    "output_token_details": {"priority_reasoning": 1},
}
CHAT_RESULT = {"token_usage": {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}, "model_name": "gpt-x"}


class Hidden:
    """Imitates pydantic-ai's result before 2.0: `usage` is a method, and the state holds the usage."""

    def __init__(self) -> None:
        self._state = SimpleNamespace(
            usage=SimpleNamespace(input_tokens=7, output_tokens=8, requests=2, cost=Decimal("0.25"))
        )

    def usage(self) -> Any:
        raise AssertionError("methods are not called")


class Shown:
    """Imitates pydantic-ai's result since 2.0: `usage` is a property."""

    @property
    def usage(self) -> Any:
        return SimpleNamespace(
            input_tokens=7,
            output_tokens=8,
            cache_read_tokens=3,
            cache_write_tokens=1,
            output_reasoning_tokens=2,
            requests=2,
        )

    @property
    def response(self) -> Any:
        return SimpleNamespace(model_name="gpt-x", usage=None)


class Computed(BaseModel):
    """A pydantic model with normal, extra, computed and private fields."""

    model_config = ConfigDict(extra="allow")
    prompt_tokens: int = 5
    _hidden_params: dict[str, Any] = PrivateAttr({"response_cost": 0.5})

    @computed_field  # type: ignore[prop-decorator]  # as in pydantic's documentation
    @property
    def completion_tokens(self) -> int:
        return 6


class Callback:
    """Imitates LangChain's OpenAI callback: the class holds the default values."""

    total_tokens = 0
    prompt_tokens = 0
    prompt_tokens_cached = 0
    completion_tokens = 0
    reasoning_tokens = 0
    successful_requests = 0
    total_cost = 0.0

    def __init__(self) -> None:
        self.prompt_tokens, self.completion_tokens, self.total_tokens = 10, 4, 14
        self.prompt_tokens_cached, self.successful_requests, self.total_cost = 6, 3, 0.5


class Wrapped:
    """Imitates a response that instrumentation has wrapped. The inner object provides all attributes except `model`."""

    def __init__(self, inner: Any) -> None:
        self.model = None
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@dataclass
class Slotted:
    __slots__ = ("input_tokens", "output_tokens")
    input_tokens: int
    output_tokens: int


@dataclass
class Invocations:
    accumulated_usage: dict[str, int] = field(
        default_factory=lambda: {"inputTokens": 100, "outputTokens": 10, "totalTokens": 110}
    )
    agent_invocations: list[Any] = field(
        default_factory=lambda: [
            SimpleNamespace(cycles=[1], usage={"inputTokens": 90, "outputTokens": 5, "totalTokens": 95}),
            SimpleNamespace(cycles=[1, 2], usage={"inputTokens": 10, "outputTokens": 5, "totalTokens": 15}),
        ]
    )


Tupled = namedtuple("Tupled", "prompt_tokens completion_tokens")  # noqa: PYI024  as in old code

HELD: dict[str, tuple[Any, Usage]] = {
    "langchain message": (ai("1", 10, 2, **DETAILS), used(10, 2, "gpt-x", cached=3, written=2, reasoning=1)),
    "langchain message of a service tier": (ai("1", 10, 2, **TIERED), used(10, 2, "gpt-x", cached=3, reasoning=1)),
    "langchain metadata only": (
        SimpleNamespace(usage_metadata=None, response_metadata={"token_usage": CHAT, "model_name": "gpt-x"}),
        used(100, 20, "gpt-x", cached=64, reasoning=12),
    ),
    "langchain LLMResult: each generation repeats the usage": (
        SimpleNamespace(generations=[[SimpleNamespace(message=ai("1", 10, 4))] * 2], llm_output=CHAT_RESULT),
        used(10, 4, "gpt-x"),
    ),
    "langchain LLMResult of two prompts": (
        SimpleNamespace(generations=[[SimpleNamespace(message=ai("1", 5, 2))]] * 2, llm_output=CHAT_RESULT),
        used(10, 4, "gpt-x", calls=2),
    ),
    "langchain LLMResult without its output": (
        SimpleNamespace(generations=[[SimpleNamespace(message=ai("1", 5, 2))] * 2, [SimpleNamespace(message=ai("2", 7, 3))]], llm_output={}),
        used(12, 5, "gpt-x", calls=2),
    ),
    "langchain state": ({"messages": [HUMAN, ai("1", 1, 2), HUMAN, ai("2", 10, 20)]}, used(11, 22, "gpt-x", calls=2)),
    "langgraph update, by node": ({"model": {"messages": [ai("1", 1, 2)]}}, used(1, 2, "gpt-x")),
    "langchain usage by model": ({"gpt-x": {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}}, used(1, 2, "gpt-x")),
    "langchain callback": (Callback(), used(10, 4, cached=6, calls=3, cost=0.5)),
    "pydantic-ai, a method": (Hidden(), used(7, 8, calls=2, cost=0.25)),
    "pydantic-ai, a property": (Shown(), used(7, 8, "gpt-x", cached=3, written=1, reasoning=2, calls=2)),
    "openai-agents": (
        SimpleNamespace(context_wrapper=SimpleNamespace(context=None, usage=SimpleNamespace(requests=3, **objects(RESPONSE).__dict__))),
        used(50, 7, cached=10, written=5, reasoning=3, calls=3),
    ),
    "dspy": (SimpleNamespace(_store={}, _lm_usage={"openai/gpt-x": CHAT}), used(100, 20, "openai/gpt-x", cached=64, reasoning=12)),
    "haystack: each reply repeats the usage": (
        {"replies": [SimpleNamespace(_meta={"model": "gpt-x", "usage": CHAT})] * 2},
        used(100, 20, "gpt-x", cached=64, reasoning=12),
    ),
    "haystack generator in a pipeline": (
        {"llm": {"replies": ["a", "b"], "meta": [{"model": "gpt-x", "usage": CHAT}] * 2}},
        used(100, 20, "gpt-x", cached=64, reasoning=12),
    ),
    "strands result: its own invocation": (SimpleNamespace(metrics=Invocations(), message={}), used(10, 5, calls=2)),
    "strands metrics: the whole": (Invocations(), used(100, 10)),
    "openai batch rows": (
        [{"id": "b", "response": {"status_code": 200, "body": {"model": "gpt-x", "usage": CHAT}}, "error": None}] * 3,
        used(300, 60, "gpt-x", cached=192, reasoning=36, calls=3),
    ),
    "anthropic batch row": (
        {"custom_id": "1", "result": {"type": "succeeded", "message": {"type": "message", "model": "claude-x", "usage": CLAUDE}}},
        used(3210, 50, "claude-x", cached=3000, written=200, reasoning=30),
    ),
    "gemini batch row": ({"key": "1", "response": WIRE["gemini"][0]}, WIRE["gemini"][1]),
    "bedrock model name of langchain": (
        SimpleNamespace(usage_metadata={"input_tokens": 1, "output_tokens": 2}, response_metadata={"model_id": "nova"}),
        used(1, 2, "nova"),
    ),
    "pydantic fields, computed, extra and private": (
        Computed(completion_tokens_details={"reasoning_tokens": 4}),  # type: ignore[call-arg]  # an extra field
        used(5, 6, reasoning=4, cost=0.5),
    ),
    "a wrapper": (Wrapped(objects({"usage": CHAT})), used(100, 20, cached=64, reasoning=12)),
    "slots": (Slotted(1, 2), used(1, 2)),
    "a named tuple": (Tupled(1, 2), used(1, 2)),
    "another mapping": (MappingProxyType({"usage": OrderedDict(prompt_tokens=1, completion_tokens=2)}), used(1, 2)),
    "a mock with numbers": (Mock(usage=Mock(prompt_tokens=3, completion_tokens=4), model="gpt-x"), used(3, 4, "gpt-x")),
    "numpy's numbers": ({"prompt_tokens": np.int64(3), "completion_tokens": np.uint8(4)}, used(3, 4)),
    "a database's numbers": ({"prompt_tokens": Decimal(3), "completion_tokens": Fraction(4), "cost": Decimal("0.5")}, used(3, 4, cost=0.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_usage_is_found_in_every_known_holder(name: str) -> None:
    response, expected = HELD[name]
    assert read_usage(response) == expected


def test_models_of_one_result_are_separated() -> None:
    found = read({"gpt-x": CHAT, "claude-x": CLAUDE}).found
    assert [(each.usage.model, each.usage.tokens_in) for each in found] == [("gpt-x", 100), ("claude-x", 3210)]


# -- streams


def test_events_of_a_list_are_one_response() -> None:
    start = {
        "type": "message_start",
        "message": {
            "id": "m",
            "model": "claude-x",
            "usage": CLAUDE | {"output_tokens": 1, "output_tokens_details": None},
        },
    }
    delta = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 50}}
    other = {
        "type": "message_start",
        "message": {"id": "n", "model": "claude-x", "usage": {"input_tokens": 1, "output_tokens": 1}},
    }
    found = merged(read([start, {"type": "ping"}, delta, {"type": "message_stop"}, other, delta]).found)
    assert [each.usage for each in found] == [
        used(3210, 50, "claude-x", cached=3000, written=200),
        used(1, 50, "claude-x"),
    ]


def test_langchain_chunks_add_up_and_gemini_chunks_replace() -> None:
    chunks = [
        SimpleNamespace(
            type="AIMessageChunk", id="1", usage_metadata={"input_tokens": 5 * (n == 0), "output_tokens": 2}
        )
        for n in range(3)
    ]
    assert read_usage(chunks) is not None
    assert [each.usage for each in merged(read(chunks).found)] == [used(5, 6)]
    parts = [
        {"responseId": "r", "candidates": [{"finishReason": reason}], "usageMetadata": {"promptTokenCount": 8, "candidatesTokenCount": count}}
        for count, reason in ((2, None), (9, "STOP"))
    ]  # fmt: skip
    assert [each.usage for each in merged(read(parts).found)] == [used(8, 9)]
    assert read(parts[0]).found == (Found(used(8, 2), Part("r")),)
    assert read(parts[1]).found == (Found(used(8, 9), Part("r", ends=True)),)


@pytest.mark.parametrize(
    ("event", "part"),
    [
        ({"type": "response.created", "response": {"id": "r", "usage": None}}, Part("r", leads=True)),
        ({"type": "response.output_text.delta", "delta": "x"}, Part(None, leads=True)),
        ({"type": "message_stop"}, Part(None, ends=True, leads=True)),
        ({"object": "chat.completion.chunk", "id": "c", "usage": None}, Part("c")),
        ({"data": {"object": "chat.completion.chunk", "id": "c"}}, Part("c")),
        ({"type": "text", "text": "x"}, None),
    ],
)
def test_event_without_counts_identifies_its_response(event: Any, part: Part | None) -> None:
    assert read(event).found == ()
    assert read(event).part == part


# -- hostile and broken objects


class CountedMock(MagicMock):
    """Counts the attributes that it creates on access."""

    invented = 0

    def __getattr__(self, name: str) -> Any:
        CountedMock.invented += 1
        return super().__getattr__(name)


@pytest.mark.parametrize(
    "make", [Mock, MagicMock, AsyncMock, NonCallableMock, CountedMock, lambda: create_autospec(Computed)]
)
def test_mock_attributes_are_never_created(make: Any) -> None:
    mock = make()
    CountedMock.invented = 0
    before = set(vars(mock)["_mock_children"])
    assert read(mock).found == ()
    assert read({"usage": mock, "messages": [mock] * 10}).found == ()
    assert set(vars(mock)["_mock_children"]) == before
    assert CountedMock.invented == 0


def test_property_of_a_mock_is_read() -> None:
    mock = MagicMock()
    type(mock).usage = PropertyMock(return_value={"prompt_tokens": 1, "completion_tokens": 2})
    assert read_usage(mock) == used(1, 2)


class Inventing:
    """Has every attribute, like the mocks of other libraries, and counts the reads."""

    looks = 0

    def __getattr__(self, name: str) -> Any:
        Inventing.looks += 1
        return Inventing()


class Silent:
    """Has no attribute, and counts the attempts to read one."""

    looks = 0

    def __getattr__(self, name: str) -> Any:
        Silent.looks += 1
        raise AttributeError(name)


class InventingMapping(Mapping[str, Any]):
    """A mapping that has every key."""

    looks = 0

    def __getitem__(self, key: str) -> Any:
        InventingMapping.looks += 1
        return InventingMapping()

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0


def test_dynamic_lookups_are_bounded() -> None:
    Inventing.looks = Silent.looks = 0
    assert read(Inventing()).found == ()
    assert Inventing.looks == 1, "one invented name is enough"
    assert read(InventingMapping()).found == ()
    assert InventingMapping.looks <= 4, "tried as a mapping and as an object with fields"
    assert read([Silent() for _ in range(100)]).found == ()
    assert Silent.looks <= 256 + 100, "the names of one reading, and one lookup each"


class Breaking:
    @property
    def usage(self) -> Any:
        raise RuntimeError

    @property
    def metrics(self) -> Any:
        raise ReferenceError

    def prompt_tokens(self) -> int:
        raise RuntimeError


class Untouchable:
    def __getattribute__(self, name: str) -> Any:
        raise SystemError(name)


class Panicking:
    @property
    def usage(self) -> Any:
        raise BaseException  # noqa: TRY002  as Rust extensions do


class BrokenMapping(OrderedDict[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise RuntimeError

    def get(self, key: str, default: Any = None) -> Any:
        raise RuntimeError


class BrokenNumber(int):
    def __int__(self) -> int:
        raise RuntimeError

    def __le__(self, other: object) -> bool:
        raise RuntimeError

    __lt__ = __ge__ = __gt__ = __le__


class BrokenMeta(type):
    def __hash__(cls) -> int:
        raise RuntimeError


class BrokenType(metaclass=BrokenMeta):
    usage = None


class BrokenList(list[Any]):
    def __iter__(self) -> Any:
        raise RuntimeError


class BrokenKey:
    def __hash__(self) -> int:
        return hash("usage")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError


@pytest.mark.parametrize(
    "response",
    [None, 5, "text", b"bytes", [], (), {}, {"usage": None}, {"usage": {"prompt_tokens": "many"}},
     {"usage": {"prompt_tokens": True}}, {"usage": {"prompt_tokens": -1}}, {"usage": {"prompt_tokens": float("nan")}},
     {"prompt_tokens": Decimal("sNaN")}, {"prompt_tokens": 2**53}, {"prompt_tokens": 1j}, object(), int, pytest,
     {"choices": [{"message": {"content": "{}"}}], "id": "c"}],
)  # fmt: skip
def test_object_without_counts_is_unread(response: object) -> None:
    assert read(response).found == ()
    assert read_usage(response) is None


HOSTILE: dict[str, Any] = {
    "breaking properties": Breaking,
    "no attribute at all": Untouchable,
    "a panic": Panicking,
    "a class that breaks": BrokenType,
    "a number that breaks": lambda: {"prompt_tokens": BrokenNumber(3)},
    "a list that breaks": lambda: BrokenList([1]),
    "a key that breaks": lambda: {BrokenKey(): 1},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_errors_of_objects_never_fail_the_read(name: str) -> None:
    make = HOSTILE[name]
    assert read(make()).found == ()
    assert read({"usage": make()}).found == ()


def test_broken_mapping_is_read_from_its_storage() -> None:
    assert read_usage(BrokenMapping(prompt_tokens=1, completion_tokens=2)) == used(1, 2)


def test_failing_field_hides_no_other_field() -> None:
    class Partly:
        input_tokens = 3
        output_tokens = 4

        @property
        def cost(self) -> float:
            raise RuntimeError

    assert read_usage(Partly()) == used(3, 4)


def test_signals_are_not_suppressed() -> None:
    class Interrupted:
        @property
        def usage(self) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(Interrupted())


def test_cyclic_object_ends_the_search() -> None:
    endless: dict[str, Any] = {}
    endless.update(dict.fromkeys(("usage", "response", "message", "result", "data"), endless))
    assert read_usage(endless) is None
    node = SimpleNamespace()
    node.usage = node.response = node.messages = [node, node, node]
    assert read_usage(node) is None


def test_only_searches_without_finds_are_bounded() -> None:
    looked = 0

    class Message:
        @property
        def usage(self) -> Any:
            nonlocal looked
            looked += 1
            return {}

    assert read([Message() for _ in range(5000)]).found == ()
    assert 200 <= looked <= 500
    assert read([0.5] * 1_000_000).found == ()
    assert len(read([CHAT] * 5000).found) == 5000
    assert len(read([*["text"] * 5000, *[{}] * 100, CHAT]).found) == 1


def test_object_with_invented_content_ends_the_search() -> None:
    class Endless:
        looks = 0

        @property
        def usage(self) -> Any:
            Endless.looks += 1
            return Endless()

        response = message = result = data = body = usage

    assert read(Endless()).found == ()
    assert Endless.looks <= 30


def test_deepest_known_nesting_is_found() -> None:
    state = {"messages": [HUMAN] * 100 + [{"response_metadata": {"token_usage": CHAT}}]}
    assert read_usage([{"data": {"output": {"agent": state}}}]) == used(100, 20, cached=64, reasoning=12)


def test_model_name_is_converted_to_a_storable_one() -> None:
    found = read_usage({"model": "m\ud800\n" + "x" * 300, "usage": {"prompt_tokens": 1}})
    assert found is not None
    assert found.model == "m??" + "x" * 197
