"""Shared by the adapters for LangChain and LangGraph: storable classes, and the log of failed writes.

Once this module is imported, every cache of the process can store LangChain's messages, generations and documents. A
stored value names its class as registered here, not by an import path. So no stored name causes an import.
"""

from __future__ import annotations

import logging
from typing import Any

from agentperf_redis.codec.storable import REGISTRY, storable
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.extras import extra

with extra("langchain"):  # if langgraph.py imports this module, the error names the extra langgraph instead
    from langchain_core import messages, outputs
    from langchain_core.documents import Document
    from langchain_core.messages.base import TextAccessor

_log = logging.getLogger("agentperf_redis")

_MODELS: tuple[type, ...] = (
    messages.AIMessage,
    messages.AIMessageChunk,
    messages.ChatMessage,
    messages.ChatMessageChunk,
    messages.FunctionMessage,
    messages.FunctionMessageChunk,
    messages.HumanMessage,
    messages.HumanMessageChunk,
    messages.RemoveMessage,
    messages.SystemMessage,
    messages.SystemMessageChunk,
    messages.ToolMessage,
    messages.ToolMessageChunk,
    outputs.Generation,
    outputs.GenerationChunk,
    outputs.ChatGeneration,
    outputs.ChatGenerationChunk,
    Document,
)


def register(cls: type, **how: Any) -> None:
    """Make a class storable under its package and name, unless it is storable already."""
    if REGISTRY.of_class(cls) is None:
        storable(cls, name=f"{cls.__module__.partition('.')[0]}.{cls.__name__}", **how)


for _each in _MODELS:
    register(_each)
register(TextAccessor, dump=lambda text: str.__str__(text), load=lambda text: TextAccessor(text))  # noqa: PLW0108


def not_stored(cache: str, error: Exception) -> None:
    """Log that a value was not stored. The caller has paid for the value, so a failed write must not raise.

    The log gets the type of a refused value but not its text, which may be the reply of a model.
    """
    text = str(error)
    if isinstance(error, InvalidArgument):
        text = f"{error.argument} is of type {type(error.value).__name__}; allowed: {error.allowed}"
    _log.warning("a value was not stored in the cache %r: %s: %s", cache, type(error).__name__, text)
