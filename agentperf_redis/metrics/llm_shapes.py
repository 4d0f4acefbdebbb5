"""The formats of token counts from vendors and libraries: a table, and the arithmetic that reads the formats.

The field names leave two questions open. Are the cached tokens part of the input count, or separate? Are the reasoning
tokens part of the output count, or separate? The table has each vendor's answer. But gateways send one vendor's numbers
under another vendor's names. Therefore, if the usage has a total, the total decides: the right reading is the one whose
parts add up to the total. A part that is larger than its whole is separate, whatever the table says.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import lru_cache
from typing import Any, cast

Count = Callable[[str], int | None]
"""Returns the count at a path such as ``prompt_tokens_details.cached_tokens``, or None."""

WITHIN, BESIDE = False, True
_MAX_TOKENS = 2**53
"""Counts of this size or more are ignored. The server adds counts as doubles, which are exact only for smaller ones."""
_MAX_COST = 1e9
"""The maximum cost that `record_llm` accepts."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The format of one vendor's or library's token counts.

    A path names a field, or a field of a field; ``a.b+c`` is the sum of ``a.b`` and ``a.c``. If there are several
    paths, the first one with a value above zero applies.

    Attributes:
        vendor: the vendor or library.
        source: where the format is documented, and the version that was read.
        tokens_in: the field of the input count; further input fields are in `more_in`.
        tokens_out: the field of the output count.
        marks: fields of which a usage in this format has at least one; needed if other formats have the same input and
            output fields.
        more_in: further input fields, whose counts are never part of `tokens_in`.
        cached_in: paths of the tokens read from the provider's cache.
        cache_write: paths of the tokens written to the provider's cache.
        cached: whether cached and written tokens are part of `tokens_in` (`WITHIN`) or separate (`BESIDE`).
        reasoning: paths of the reasoning tokens.
        thought: whether reasoning tokens are part of `tokens_out` (`WITHIN`) or separate (`BESIDE`).
        total: the field of the total.
        hides_reasoning: whether the part of the total that exceeds input plus output is reasoning that has no field.
        iterations: whether the usage may have a list ``iterations``, with the counts of each request of the call.
    """

    vendor: str
    source: str
    tokens_in: str
    tokens_out: str
    marks: tuple[str, ...] = ()
    more_in: tuple[str, ...] = ()
    cached_in: tuple[str, ...] = ()
    cache_write: tuple[str, ...] = ()
    cached: bool = WITHIN
    reasoning: tuple[str, ...] = ()
    thought: bool = WITHIN
    total: str = "total_tokens"
    hides_reasoning: bool = False
    iterations: bool = False


_ANTHROPIC_WRITE = (
    "cache_creation_input_tokens",
    "cache_creation.ephemeral_5m_input_tokens+ephemeral_1h_input_tokens",
)

SHAPES: tuple[Shape, ...] = (
    # -- prompt and completion
    Shape(
        "litellm, for models with Anthropic's cache",
        "litellm 1.110.2, types/utils.py Usage: repeats the cached tokens beside prompt_tokens_details",
        "prompt_tokens", "completion_tokens", marks=("cache_read_input_tokens", "cache_creation_input_tokens"),
        cached_in=("cache_read_input_tokens", "prompt_tokens_details.cached_tokens"),
        cache_write=(
            "cache_creation_input_tokens",
            "prompt_tokens_details.cache_creation_tokens",
            "prompt_tokens_details.cache_write_tokens",
        ),
        reasoning=("completion_tokens_details.reasoning_tokens",),
    ),
    Shape(
        "DeepSeek", "api-docs.deepseek.com, create chat completion, 2026-11: prompt = hit + miss",
        "prompt_tokens", "completion_tokens", marks=("prompt_cache_hit_tokens",),
        cached_in=("prompt_cache_hit_tokens",), reasoning=("completion_tokens_details.reasoning_tokens",),
    ),
    Shape(
        "xAI's own SDK", "xai-sdk 1.21.0, proto/v6/usage.proto SamplingUsage",
        "prompt_tokens", "completion_tokens", marks=("cached_prompt_text_tokens",),
        cached_in=("cached_prompt_text_tokens",), reasoning=("reasoning_tokens",), thought=BESIDE,
    ),
    Shape(
        "Mistral, conversations", "mistralai 3.7.0, models/conversationusageinfo.py",
        "prompt_tokens", "completion_tokens", marks=("connector_tokens",), more_in=("connector_tokens",),
    ),
    Shape(
        "CrewAI", "crewai 1.x, types/usage_metrics.py UsageMetrics",
        "prompt_tokens", "completion_tokens", marks=("cached_prompt_tokens",),
        cached_in=("cached_prompt_tokens",), cache_write=("cache_creation_tokens",), reasoning=("reasoning_tokens",),
    ),
    Shape(
        "LangChain's OpenAI callback", "langchain-community 0.4, callbacks/openai_info.py OpenAICallbackHandler",
        "prompt_tokens", "completion_tokens", marks=("prompt_tokens_cached",),
        cached_in=("prompt_tokens_cached",), reasoning=("reasoning_tokens",),
    ),
    Shape(
        # This is also the format of Azure, Groq, Mistral, Together, Moonshot, Zhipu, Perplexity, Cerebras, Fireworks,
        # OpenRouter, vLLM, SGLang and most gateways. xAI does not include reasoning tokens in completion_tokens.
        # Gemini's OpenAI endpoint includes reasoning tokens in total_tokens only.
        "OpenAI chat completions", "openai 3.57.0, types/completion_usage.py; groq 1.7.0; mistralai 3.7.0",
        "prompt_tokens", "completion_tokens",
        cached_in=("prompt_tokens_details.cached_tokens", "cached_tokens", "num_cached_tokens"),
        cache_write=("prompt_tokens_details.cache_write_tokens", "prompt_tokens_details.cache_creation_tokens"),
        reasoning=("completion_tokens_details.reasoning_tokens", "reasoning_tokens"), hides_reasoning=True,
    ),
    # -- input and output
    Shape(
        "Anthropic messages", "anthropic 2.14.0, types/usage.py, types/beta/beta_usage.py",
        "input_tokens", "output_tokens",
        marks=("cache_read_input_tokens", "cache_creation_input_tokens", "cache_creation", "iterations"),
        cached_in=("cache_read_input_tokens",), cache_write=_ANTHROPIC_WRITE, cached=BESIDE,
        reasoning=("output_tokens_details.thinking_tokens",), iterations=True,
    ),
    Shape(
        "LangChain", "langchain-core 1.8.3, messages/ai.py UsageMetadata; a service tier precedes the names",
        "input_tokens", "output_tokens", marks=("input_token_details", "output_token_details"),
        cached_in=(
            "input_token_details.cache_read",
            "input_token_details.priority_cache_read",
            "input_token_details.flex_cache_read",
            "input_token_details.cached_tokens",  # OpenAI's realtime API: openai 3.57.0, types/realtime
        ),
        cache_write=(
            "input_token_details.cache_creation+ephemeral_5m_input_tokens+ephemeral_1h_input_tokens",
            "input_token_details.priority_cache_creation",
            "input_token_details.flex_cache_creation",
        ),
        reasoning=(
            "output_token_details.reasoning",
            "output_token_details.priority_reasoning",
            "output_token_details.flex_reasoning",
            "output_token_details.reasoning_tokens",
        ),
    ),
    Shape(
        "pydantic-ai, Agno", "pydantic-ai-slim 2.68.0, usage.py RunUsage; agno 2.x, models/metrics.py",
        "input_tokens", "output_tokens", marks=("cache_read_tokens", "cache_write_tokens"),
        cached_in=("cache_read_tokens",), cache_write=("cache_write_tokens",),
        reasoning=("output_reasoning_tokens", "reasoning_tokens", "details.reasoning_tokens"),
    ),
    Shape(
        "OpenAI responses", "openai 3.57.0, types/responses/response_usage.py; openai-agents 0.24.0, usage.py",
        "input_tokens", "output_tokens",
        cached_in=("input_tokens_details.cached_tokens", "prompt_tokens_details.cached_tokens", "cached_tokens"),
        cache_write=("input_tokens_details.cache_write_tokens",),
        reasoning=(
            "output_tokens_details.reasoning_tokens",
            "output_tokens_details.thinking_tokens",
            "completion_tokens_details.reasoning_tokens",
            "reasoning_tokens",
        ),
    ),
    # -- Google
    Shape(
        "Gemini", "google-genai 3.6.1, types.py GenerateContentResponseUsageMetadata",
        "prompt_token_count", "candidates_token_count", more_in=("tool_use_prompt_token_count",),
        cached_in=("cached_content_token_count",), reasoning=("thoughts_token_count",), thought=BESIDE,
        total="total_token_count",
    ),
    Shape(
        "Gemini over HTTP", "ai.google.dev, UsageMetadata of v1beta, 2026-11",
        "promptTokenCount", "candidatesTokenCount", more_in=("toolUsePromptTokenCount",),
        cached_in=("cachedContentTokenCount",), reasoning=("thoughtsTokenCount",), thought=BESIDE,
        total="totalTokenCount",
    ),
    Shape(
        "Gemini Live", "google-genai 3.6.1, types.py UsageMetadata",
        "prompt_token_count", "response_token_count", more_in=("tool_use_prompt_token_count",),
        cached_in=("cached_content_token_count",), reasoning=("thoughts_token_count",), thought=BESIDE,
        total="total_token_count",
    ),
    Shape(
        "Gemini Live over its socket", "ai.google.dev, UsageMetadata of BidiGenerateContent, 2026-11",
        "promptTokenCount", "responseTokenCount", more_in=("toolUsePromptTokenCount",),
        cached_in=("cachedContentTokenCount",), reasoning=("thoughtsTokenCount",), thought=BESIDE,
        total="totalTokenCount",
    ),
    Shape(
        "Gemini interactions", "google-genai 3.6.1, _gaos/types/interactions/usage.py",
        "total_input_tokens", "total_output_tokens", more_in=("total_tool_use_tokens",),
        cached_in=("total_cached_tokens",), reasoning=("total_thought_tokens", "total_reasoning_tokens"),
        thought=BESIDE,
    ),
    # -- Amazon
    Shape(
        # Strands uses these names for all vendors. For OpenAI, the input count includes the cached tokens; for
        # Anthropic, it does not. The total shows which case applies.
        "Bedrock Converse, Strands", "Converse API, TokenUsage, 2026-11; strands-agents 1.62.0, types/event_loop.py",
        "inputTokens", "outputTokens",
        cached_in=("cacheReadInputTokens", "cacheReadInputTokenCount"),
        cache_write=("cacheWriteInputTokens", "cacheWriteInputTokenCount", "cacheCreationInputTokens"), cached=BESIDE,
        total="totalTokens",
    ),
    Shape(
        "Bedrock InvokeModel, invocation metrics", "Bedrock user guide, InvokeModelWithResponseStream, 2026-11",
        "inputTokenCount", "outputTokenCount",
        cached_in=("cacheReadInputTokenCount",), cache_write=("cacheWriteInputTokenCount",), cached=BESIDE, total="",
    ),
    Shape("Llama on Bedrock", "Bedrock user guide, Meta Llama models, 2026-11",
          "prompt_token_count", "generation_token_count", total=""),
    # -- others
    Shape(
        "Cohere", "cohere 7.3.1, types/usage.py, types/api_meta.py; billed units exclude free tokens",
        "tokens.input_tokens", "tokens.output_tokens", cached_in=("cached_tokens",), total="",
    ),
    Shape("Cohere, billed units only", "cohere 7.3.1, types/usage_billed_units.py",
          "billed_units.input_tokens", "billed_units.output_tokens", cached_in=("cached_tokens",), total=""),
    Shape("Ollama", "ollama 0.6.3, _types.py BaseGenerateResponse", "prompt_eval_count", "eval_count", total=""),
    Shape("llama.cpp", "llama.cpp server, POST /completion, 2026-11", "tokens_evaluated", "tokens_predicted", total=""),
    Shape("watsonx.ai", "IBM watsonx.ai, text generation, 2026-11",
          "input_token_count", "generated_token_count", total=""),
    Shape("pydantic-ai before 0.8", "pydantic-ai 0.7, usage.py Usage", "request_tokens", "response_tokens"),
    Shape("LlamaIndex's token counter", "llama-index-core 0.14, callbacks/token_counting.py",
          "prompt_llm_token_count", "completion_llm_token_count", total="total_llm_token_count"),
    Shape(
        "Oracle Cloud, Vercel AI SDK", "litellm 1.110.2, types/llms/oci.py; ai 4",
        "promptTokens", "completionTokens", cached_in=("promptTokensDetails.cachedTokens",),
        reasoning=("completionTokensDetails.reasoningTokens",), total="totalTokens",
    ),
    Shape("embeddings with one count (Voyage)", "docs.voyageai.com, POST /v1/embeddings, 2026-11",
          "total_tokens", "", total=""),
)  # fmt: skip
"""In order of precedence: the first match applies."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Token counts in the form in which they are recorded.

    Attributes:
        tokens_in: all tokens sent.
        tokens_out: all tokens received.
        cached_in: input tokens read from the provider's cache.
        cache_write: input tokens written to the provider's cache.
        reasoning: output tokens that were reasoning.
        differs: whether the usage has a total that differs from the sum of its parts in every reading.
        hidden: whether the tokens by which the total exceeds this sum were counted as reasoning that has no field.
    """

    tokens_in: int
    tokens_out: int
    cached_in: int = 0
    cache_write: int = 0
    reasoning: int = 0
    differs: bool = False
    hidden: bool = False


@lru_cache(maxsize=512)
def fitting(names: frozenset[str]) -> tuple[Shape, ...]:
    """Return the shapes that match an object with fields of these names, in the order of the table."""
    return tuple(
        shape
        for shape in SHAPES
        if not names.isdisjoint({_head(shape.tokens_in), _head(shape.tokens_out)})
        and (not shape.marks or not names.isdisjoint(shape.marks))
    )


def _head(path: str) -> str:
    return path.partition(".")[0]


def counts(shape: Shape, count: Count) -> Counts | None:
    """Read a usage by one shape.

    Args:
        shape: the shape.
        count: returns the count of the usage at a path.

    Returns:
        The counts, or None when neither the input nor the output has a count.
    """
    count_in = count(shape.tokens_in)
    count_out = count(shape.tokens_out) if shape.tokens_out else None
    if count_in is None and count_out is None:
        return None
    more = sum(count(name) or 0 for name in shape.more_in)
    parts = _Parts(
        sent=(count_in or 0) + more,
        received=count_out or 0,
        cached=_first(shape.cached_in, count),
        written=_first(shape.cache_write, count),
        reasoning=_first(shape.reasoning, count),
    )
    total = (count(shape.total) if shape.total else None) or 0  # 0 means no total: several libraries default to 0
    nearest = None
    for cached, written, thought in _readings(shape.cached, shape.thought):
        reading = parts.read(cached, written, thought)
        if reading is not None and (not total or reading.tokens_in + reading.tokens_out == total):
            return reading
        nearest = nearest or reading
    # `nearest` is never None: the reading in which all parts are BESIDE always succeeds.
    return _with_rest(shape, cast("Counts", nearest), total, count_in, count_out)


def _with_rest(shape: Shape, read: Counts, total: int, count_in: int | None, count_out: int | None) -> Counts:
    """Assign the rest of the total to a missing input or output count, or to reasoning if the shape hides it."""
    rest = total - read.tokens_in - read.tokens_out
    if rest > 0 and count_in is None:
        return replace(read, tokens_in=read.tokens_in + rest)
    if rest > 0 and count_out is None:
        return replace(read, tokens_out=read.tokens_out + rest)
    if rest > 0 and shape.hides_reasoning and not read.reasoning:
        return replace(read, tokens_out=read.tokens_out + rest, reasoning=rest, differs=True, hidden=True)
    return replace(read, differs=True)


@dataclass(frozen=True, slots=True)
class _Parts:
    sent: int
    received: int
    cached: int
    written: int
    reasoning: int

    def read(self, cached_beside: bool, written_beside: bool, thought_beside: bool) -> Counts | None:
        """Return the counts of one reading; None if a part is larger than its whole in this reading."""
        within = self.cached * (not cached_beside) + self.written * (not written_beside)
        if within > self.sent or (self.reasoning > self.received and not thought_beside):
            return None
        return Counts(
            tokens_in=self.sent + self.cached + self.written - within,
            tokens_out=self.received + self.reasoning * thought_beside,
            cached_in=self.cached,
            cache_write=self.written,
            reasoning=self.reasoning,
        )


@lru_cache(maxsize=8)
def _readings(cached: bool, thought: bool) -> tuple[tuple[bool, bool, bool], ...]:
    """Return all readings of the parts, sorted by their similarity to the reading in the table, which is the first."""
    table = (cached, cached, thought)
    sides = (WITHIN, BESIDE)
    ways = [(one, other, third) for one in sides for other in sides for third in sides]
    return tuple(sorted(ways, key=lambda way: sum(a != b for a, b in zip(way, table, strict=True))))


def _first(paths: tuple[str, ...], count: Count) -> int:
    for path in paths:
        start, dot, last = path.rpartition(".")
        found = sum(count(f"{start}{dot}{name}") or 0 for name in last.split("+"))
        if found:
            return found
    return 0


_NUMBERS: Any = (int, float, Decimal, numbers.Real)


def whole(value: Any) -> int | None:
    """Return a value as a token count, or None if it is none. Some clients and databases return floats or Decimals."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        return None
    return int(value) if 0 <= value < _MAX_TOKENS else None


def amount(value: Any) -> float:
    """Return a value as a cost, or 0.0 if it is not one."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        return 0.0
    found = float(value)
    return found if 0 < found < _MAX_COST else 0.0
