from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from agentperf_redis.metrics.llm_usage import Usage, read_usage


@dataclass
class Slotted:
    __slots__ = ("input_tokens", "output_tokens")
    input_tokens: int
    output_tokens: int


RESPONSES: dict[str, tuple[Any, Usage]] = {
    "openai chat": (
        {
            "model": "gpt-x",
            "usage": {
                "prompt_tokens": 100,
                "completion_tokens": 20,
                "total_tokens": 120,
                "prompt_tokens_details": {"cached_tokens": 64},
            },
        },
        Usage(100, 20, "gpt-x"),
    ),
    "openai responses": (
        {
            "model": "gpt-x",
            "usage": {"input_tokens": 5, "output_tokens": 7, "input_tokens_details": {"cached_tokens": 1}},
        },
        Usage(5, 7, "gpt-x"),
    ),
    "openai object": (
        SimpleNamespace(model="gpt-x", usage=SimpleNamespace(prompt_tokens=3, completion_tokens=4)),
        Usage(3, 4, "gpt-x"),
    ),
    "anthropic": (
        {
            "model": "claude-x",
            "usage": {
                "input_tokens": 10,
                "cache_creation_input_tokens": 200,
                "cache_read_input_tokens": 3000,
                "output_tokens": 5,
            },
        },
        Usage(3210, 5, "claude-x"),
    ),
    "gemini": (
        {
            "modelVersion": "gemini-x",
            "usageMetadata": {
                "promptTokenCount": 8,
                "candidatesTokenCount": 9,
                "thoughtsTokenCount": 100,
                "totalTokenCount": 117,
            },
        },
        Usage(8, 109, "gemini-x"),
    ),
    "gemini object": (
        SimpleNamespace(
            model_version="gemini-x",
            usage_metadata=SimpleNamespace(prompt_token_count=8, candidates_token_count=9, thoughts_token_count=None),
        ),
        Usage(8, 9, "gemini-x"),
    ),
    "bedrock": (
        {"usage": {"inputTokens": 1, "outputTokens": 2, "totalTokens": 3, "cacheReadInputTokens": 10}},
        Usage(11, 2),
    ),
    "cohere": ({"meta": {"billed_units": {"input_tokens": 6, "output_tokens": 7}}}, Usage(6, 7)),
    "ollama": ({"model": "llama", "prompt_eval_count": 26, "eval_count": 298}, Usage(26, 298, "llama")),
    "langchain": (
        SimpleNamespace(usage_metadata={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}, content="x"),
        Usage(1, 2),
    ),
    "langchain metadata": (
        {"response_metadata": {"token_usage": {"prompt_tokens": 1, "completion_tokens": 2}}},
        Usage(1, 2),
    ),
    "a gateway that tells the cost": (
        {"model": "x/y", "usage": {"prompt_tokens": 1, "completion_tokens": 2, "cost": 0.0125}},
        Usage(1, 2, "x/y", 0.0125),
    ),
    "the usage alone": ({"prompt_tokens": 1, "completion_tokens": 0}, Usage(1, 0)),
    "slots": (Slotted(1, 2), Usage(1, 2)),
    "an embedding": ({"model": "e", "usage": {"prompt_tokens": 12, "total_tokens": 12}}, Usage(12, 0, "e")),
}


@pytest.mark.parametrize("name", RESPONSES)
def test_usage_is_found(name: str) -> None:
    response, expected = RESPONSES[name]
    assert read_usage(response) == expected


class Hostile:
    @property
    def usage(self) -> Any:
        raise RuntimeError

    def prompt_tokens(self) -> int:
        raise RuntimeError


@pytest.mark.parametrize(
    "response",
    [None, 5, "text", [], {}, {"usage": None}, {"usage": {"prompt_tokens": "many"}}, {"usage": {"prompt_tokens": True}},
     {"usage": {"prompt_tokens": -1}}, {"usage": {"prompt_tokens": float("nan")}}, object(), Hostile()],
)  # fmt: skip
def test_what_has_no_usage_has_none(response: object) -> None:
    assert read_usage(response) is None


def test_a_response_that_holds_itself_ends() -> None:
    endless: dict[str, Any] = {}
    endless["usage"] = endless
    assert read_usage(endless) is None
