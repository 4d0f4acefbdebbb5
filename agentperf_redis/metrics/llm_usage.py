"""Reads token counts out of what model clients return, whichever client it was.

Takes mappings and objects alike, the usage itself or a response that holds it. Names are matched by the table below,
not by the client's type, so nothing is imported. Sources: the clients' published response schemas (OpenAI chat
completions and responses, which litellm and most gateways follow; Anthropic messages; Gemini; Bedrock Converse; Cohere;
Ollama; LangChain `usage_metadata`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

_log = logging.getLogger("agentperf_redis")

_HOLDERS = ("usage", "usage_metadata", "usageMetadata", "meta", "response_metadata")
"""Where a response keeps its usage. Cohere's ``meta`` has ``billed_units`` or ``tokens`` inside."""
_INNER = ("billed_units", "tokens", "token_usage")
_IN = ("prompt_tokens", "input_tokens", "promptTokenCount", "prompt_token_count", "inputTokens", "prompt_eval_count")
_OUT = (
    "completion_tokens",
    "output_tokens",
    "candidatesTokenCount",
    "candidates_token_count",
    "outputTokens",
    "eval_count",
)
_IN_BESIDE = (
    "cache_read_input_tokens",
    "cache_creation_input_tokens",
    "cacheReadInputTokens",
    "cacheWriteInputTokens",
    "toolUsePromptTokenCount",
    "tool_use_prompt_token_count",
)
"""Counted beside the input, not within it (Anthropic, Bedrock, Gemini)."""
_OUT_BESIDE = ("thoughtsTokenCount", "thoughts_token_count")
"""Counted beside the output, not within it (Gemini)."""
_MODEL = ("model", "modelVersion", "model_version", "model_name")
_COST = ("cost", "total_cost")
"""What some gateways add (OpenRouter, litellm)."""
_DEPTH = 4


@dataclass(frozen=True, slots=True)
class Usage:
    """What one call of a model used.

    Attributes:
        tokens_in: tokens sent, those read from or written to the provider's cache included.
        tokens_out: tokens received, thoughts included.
        model: its name, if the response tells.
        cost: if the response tells.
    """

    tokens_in: int = 0
    tokens_out: int = 0
    model: str | None = None
    cost: float = 0.0


def read_usage(response: object) -> Usage | None:
    """Find the token counts of a model's response.

    Args:
        response: what the client returned, or its usage: a mapping or an object.

    Returns:
        The counts, or None when there are none to be found.
    """
    usage = _holder(response, _DEPTH)
    if usage is None:
        return None
    return Usage(
        tokens_in=(_first(usage, _IN) or 0) + sum(_count(usage, name) or 0 for name in _IN_BESIDE),
        tokens_out=(_first(usage, _OUT) or 0) + sum(_count(usage, name) or 0 for name in _OUT_BESIDE),
        model=_text(response, _MODEL) or _text(usage, _MODEL),
        cost=_amount(usage) or _amount(response),
    )


_MAX_KINDS = 100
_NAMES_SHOWN = 8


class UnreadUsage:
    """What a process was given as usage and held no counts: the call is counted, its tokens cannot be."""

    def __init__(self) -> None:
        self.count = 0
        self._said: set[str] = set()
        self._lock = threading.RLock()  # a signal handler may record while the thread it interrupts does

    def note(self, response: object) -> None:
        """Count it, and say so in the log once for each kind of response."""
        kind = _kind(response)
        with self._lock:
            self.count += 1
            if kind in self._said or len(self._said) >= _MAX_KINDS:
                return
            self._said.add(kind)
        _log.warning("record_llm found no token counts in usage=<%s>: such calls are counted without tokens", kind)


def _kind(response: object) -> str:
    """Describe without telling any content: the type, and of a mapping the names in it."""
    name = f"{type(response).__module__}.{type(response).__qualname__}".removeprefix("builtins.")
    if not isinstance(response, Mapping):
        return name
    names = sorted(key[:40] if isinstance(key, str) else type(key).__name__ for key in islice(response, _NAMES_SHOWN))
    return f"{name} with {', '.join(names) or 'nothing'}"


def _holder(source: object, depth: int) -> object:
    if source is None or depth == 0:
        return None
    if _first(source, _IN) is not None or _first(source, _OUT) is not None:
        return source
    for name in (*_HOLDERS, *_INNER):
        found = _holder(_get(source, name), depth - 1)
        if found is not None:
            return found
    return None


def _get(source: object, name: str) -> Any:
    if isinstance(source, Mapping):
        return source.get(name)
    # What a class only defines, such as a property or a method, may compute or raise: fields and slots hold data.
    if isinstance(getattr(type(source), name, None), property) or callable(getattr(type(source), name, None)):
        return None
    return getattr(source, name, None)


def _count(source: object, name: str) -> int | None:
    value = _get(source, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 2**53:
        return None
    return int(value)


def _first(source: object, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = _count(source, name)
        if value is not None:
            return value
    return None


def _text(source: object, names: tuple[str, ...]) -> str | None:
    for name in names:
        value = _get(source, name)
        if isinstance(value, str) and value:
            return value
    return None


def _amount(source: object) -> float:
    for name in _COST:
        value = _get(source, name)
        if not isinstance(value, bool) and isinstance(value, (int, float)) and 0 < value < 1e9:  # noqa: PLR2004
            return float(value)
    return 0.0
