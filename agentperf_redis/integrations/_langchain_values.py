"""What the adapters for LangChain and LangGraph share: storable classes and the log of failed writes.

After the import, every cache of the process stores LangChain's messages, generations and documents. Stored values name
these classes by the names in this module, never by an import path, so no stored name causes an import.
"""

from __future__ import annotations

import logging
from typing import Any

from agentperf_redis.codec.storable import REGISTRY, storable
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.extras import extra

with extra("langchain"):  # the message of an adapter with an extra of its own takes the place of this one
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
    """Make a class storable under its own name, unless the program has done it."""
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
