"""LangChain: a cache for the responses of models, and metrics of all runs by callbacks.

    set_llm_cache(AgentPerfCache(perf, default_ttl=3600))
    agent.invoke(question, config={"callbacks": [AgentPerfCallbackHandler(perf, "planner")]})

`AgentPerfCache` stores the generations of a model for the same prompt and the same parameters. If a response cannot be
stored, this is logged, and the call still returns the response. An example is a response that holds an instance of a
class that is not `storable`. While the server is unreachable, every lookup is a miss.

`AgentPerfCallbackHandler` records runs as executions and spans, with tokens, errors and streams. Like all metrics, an
ended run is sent with the next flush. A run that LangChain drops without reporting its end, such as a cancelled call of
a model, counts as cancelled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Unpack

from agentperf_redis.agentperf import AgentPerf, LRUOptions, checked_perf
from agentperf_redis.cache.lru import LRUCache
from agentperf_redis.cache.model import WithoutServer
from agentperf_redis.codec.codec import canonical
from agentperf_redis.errors import AgentPerfError, InvalidArgument
from agentperf_redis.extras import extra

with extra("langchain"):
    from langchain_core.caches import BaseCache
    from langchain_core.outputs import Generation

    from agentperf_redis.integrations._langchain_callbacks import AgentPerfCallbackHandler
    from agentperf_redis.integrations._langchain_values import not_stored

__all__ = ["AgentPerfCache", "AgentPerfCallbackHandler"]


class AgentPerfCache(BaseCache):
    """A cache for LangChain's models: ``set_llm_cache(AgentPerfCache(perf))``, or ``cache=`` of one model.

    A cached response has the tool calls, reasoning and metadata of the original. `AgentPerfCallbackHandler` counts no
    tokens for a hit. Streamed calls do not use LangChain's cache.

    Args:
        perf: the server and namespace.
        name: name of the cache. All objects of this name, in all processes, are the same cache.
        options: as for `LRUCache`, such as `default_ttl` (seconds; by default no expiry) and `max_size`. The default
            of `on_unavailable` is "miss".

    Raises:
        InvalidArgument: an argument is invalid, or another object of this cache has other options.
    """

    def __init__(self, perf: AgentPerf, name: str = "langchain", **options: Unpack[LRUOptions]) -> None:
        options.setdefault("on_unavailable", WithoutServer.MISS)
        self._cache: LRUCache = checked_perf(perf).cache(name, **options)

    def lookup(self, prompt: str, llm_string: str) -> Sequence[Generation] | None:
        """Return the generations for a prompt and the parameters of a model, or None."""
        return _generations(self._cache.get(_key(prompt, llm_string)))

    async def alookup(self, prompt: str, llm_string: str) -> Sequence[Generation] | None:
        """Like `lookup`, for asyncio."""
        return _generations(await self._cache.aio.get(_key(prompt, llm_string)))

    def update(self, prompt: str, llm_string: str, return_val: Sequence[Generation]) -> None:
        """Store the generations for a prompt. A failure is only logged, since the caller has paid for them."""
        key, tag = _key(prompt, llm_string), _tag(llm_string)
        try:
            self._cache.put(key, list(return_val), tags=(tag,))
        except AgentPerfError as error:
            not_stored(self._cache.name, error)

    async def aupdate(self, prompt: str, llm_string: str, return_val: Sequence[Generation]) -> None:
        """Like `update`, for asyncio."""
        key, tag = _key(prompt, llm_string), _tag(llm_string)
        try:
            await self._cache.aio.put(key, list(return_val), tags=(tag,))
        except AgentPerfError as error:
            not_stored(self._cache.name, error)

    def clear(self, *, llm_string: str | None = None, **kwargs: Any) -> None:  # noqa: ARG002  part of the interface
        """Make every entry of this cache a miss; with `llm_string`, only those of one model with its parameters."""
        if llm_string is None:
            self._cache.clear()
        else:
            self._cache.invalidate_tags(_tag(llm_string))

    async def aclear(self, *, llm_string: str | None = None, **kwargs: Any) -> None:  # noqa: ARG002  as above
        """Like `clear`, for asyncio."""
        if llm_string is None:
            await self._cache.aio.clear()
        else:
            await self._cache.aio.invalidate_tags(_tag(llm_string))


def _generations(found: object) -> Sequence[Generation] | None:
    """Return the found value if it is a list of generations. Another program may have stored other values."""
    return found if isinstance(found, list) and all(isinstance(each, Generation) for each in found) else None


def _key(prompt: str, llm_string: str) -> str:
    """Return the cache key. Prompts are long and may be confidential, so the key contains only digests."""
    return f"{_tag(llm_string)[:16]}:{_digest((llm_string, _text('prompt', prompt)))}"


def _tag(llm_string: str) -> str:
    """Return the tag of all responses of one model with one set of parameters."""
    return _digest(_text("llm_string", llm_string))


def _text(argument: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidArgument(argument, value, "a string")
    return value


def _digest(value: object) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()
