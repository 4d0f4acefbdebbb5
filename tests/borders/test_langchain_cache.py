"""Tests of the cache for LangChain's models: LangChain's suites, all kinds of responses, outages and refused values."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agentperf_redis import AgentPerf
from agentperf_redis.errors import InvalidArgument
from tests.support.servers import Server

pytest.importorskip("langchain_core", reason="needs the extra langchain")
pytest.importorskip("langchain_tests", reason="needs the extra borders")

from langchain_core import messages, outputs
from langchain_core.documents import Document
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.outputs import ChatGeneration, Generation
from langchain_tests.integration_tests.cache import AsyncCacheTestSuite, SyncCacheTestSuite

from agentperf_redis.integrations.langchain import AgentPerfCache

pytestmark = [pytest.mark.thorough, pytest.mark.servers("valkey", "cluster")]  # the packages take long to import

UNCHECKED: Any = AgentPerfCache
NOWHERE = "redis://127.0.0.1:1/0"
USAGE = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def cache(perf: AgentPerf) -> AgentPerfCache:
    return AgentPerfCache(perf)


class TestSync(SyncCacheTestSuite):
    @pytest.fixture
    def cache(self, perf: AgentPerf) -> AgentPerfCache:
        return AgentPerfCache(perf)


@pytest.mark.anyio
class TestAsync(AsyncCacheTestSuite):
    @pytest.fixture
    def cache(self, server: Server, namespace: str) -> Iterator[AgentPerfCache]:
        with AgentPerf(server.url, namespace=namespace) as perf:
            yield AgentPerfCache(perf)


class Cached:
    """The methods of the cache, blocking or for asyncio."""

    def __init__(self, cache: AgentPerfCache, runner: asyncio.Runner | None) -> None:
        self._cache, self._runner = cache, runner

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if self._runner is None:
            return getattr(self._cache, name)  # type: ignore[no-any-return]
        runner, method = self._runner, getattr(self._cache, f"a{name}")
        return lambda *args, **kwargs: runner.run(method(*args, **kwargs))


@pytest.fixture(params=["sync", "async"])
def cached(request: pytest.FixtureRequest, cache: AgentPerfCache, runner: asyncio.Runner) -> Cached:
    return Cached(cache, runner if request.param == "async" else None)


def answer(text: str = "hi", **fields: Any) -> ChatGeneration:
    return ChatGeneration(message=AIMessage(text, **fields), generation_info={"finish_reason": "stop"})


def model(cache: AgentPerfCache) -> tuple[GenericFakeChatModel, Iterator[int]]:
    """Return a model that uses the cache, and the counter of the model's answers."""
    count = itertools.count(1)
    answers = (AIMessage(f"answer {number}", usage_metadata=USAGE) for number in count)
    return GenericFakeChatModel(messages=answers, cache=cache), count


RESPONSES: dict[str, Any] = {
    "text": Generation(text="hi", generation_info={"reason": "stop"}),
    "chunk": outputs.GenerationChunk(text="hi"),
    "chat": answer(),
    "chat chunk": outputs.ChatGenerationChunk(message=messages.AIMessageChunk("hi", chunk_position="last")),
    "usage": answer(usage_metadata={**USAGE, "input_token_details": {"cache_read": 4}}, id="run-1"),
    "tools": answer(
        "",
        tool_calls=[{"name": "search", "args": {"q": "é", "n": 1}, "id": "c1", "type": "tool_call"}],
        invalid_tool_calls=[{"name": "x", "args": "{", "id": "c2", "error": "bad", "type": "invalid_tool_call"}],
    ),
    "blocks": ChatGeneration(
        message=AIMessage([{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "hi"}])
    ),
    "metadata": answer(response_metadata={"model_name": "m", "logprobs": None, "list": [1, 2.5, {"a": b"x"}]}),
    "other role": ChatGeneration(message=messages.ChatMessage("hi", role="critic")),
    "tool": ChatGeneration(message=messages.ToolMessage("42", tool_call_id="c1", artifact={"rows": [1]})),
    "document": ChatGeneration(
        message=messages.ToolMessage("d", tool_call_id="c", artifact=[Document("page", id="1")])
    ),
}


@pytest.mark.parametrize("response", RESPONSES.values(), ids=RESPONSES.keys())
def test_response_comes_back_equal_and_of_same_types(cached: Cached, response: Generation) -> None:
    cached.update("prompt", "model", [response])
    (found,) = cached.lookup("prompt", "model")
    assert found == response
    assert type(found) is type(response)
    assert type(found.text) is type(response.text)
    if isinstance(response, ChatGeneration):
        assert type(found.message) is type(response.message)
        assert found.message.__dict__ == response.message.__dict__
        assert found.message.model_fields_set == response.message.model_fields_set


def test_generations_come_back_as_a_list(cached: Cached) -> None:
    cached.update("prompt", "model", (answer("hi"),))
    assert type(cached.lookup("prompt", "model")) is list, "LangChain takes other types for a miss"


def test_prompts_and_models_have_keys_of_their_own(cached: Cached) -> None:
    pairs = [("a", "bc"), ("ab", "c"), ("", "abc"), ("abc", ""), ("\ud800", "c"), ("x" * 100_000, "c")]
    for prompt, parameters in pairs:
        cached.update(prompt, parameters, [Generation(text=f"{len(prompt)} {parameters}")])
    found = [cached.lookup(prompt, parameters)[0].text for prompt, parameters in pairs]
    assert found == [f"{len(prompt)} {parameters}" for prompt, parameters in pairs]


def test_clear_leaves_other_caches(perf: AgentPerf, cached: Cached) -> None:
    other = AgentPerfCache(perf, "others")
    for each in (cached, other):
        each.update("prompt", "model", [answer()])
    cached.clear()
    assert cached.lookup("prompt", "model") is None
    assert other.lookup("prompt", "model") == [answer()]


def test_clear_of_one_model_leaves_other_models(cached: Cached) -> None:
    cached.update("prompt", "a", [answer("a")])
    cached.update("prompt", "b", [answer("b")])
    cached.clear(llm_string="a")
    assert cached.lookup("prompt", "a") is None
    assert cached.lookup("prompt", "b") == [answer("b")]


def test_model_is_called_once_for_all_processes(server: Server, namespace: str, cache: AgentPerfCache) -> None:
    first, _ = model(cache)
    assert first.invoke("why?").content == "answer 1"
    with AgentPerf(server.url, namespace=namespace) as elsewhere:
        second, count = model(AgentPerfCache(elsewhere))
        assert second.invoke("why?").content == "answer 1"
        assert next(count) == 1, "the second model was not called"


def test_entries_have_the_ttl_of_the_options(perf: AgentPerf) -> None:
    cache = AgentPerfCache(perf, "short", default_ttl=60, max_size=50)
    cache.update("prompt", "model", [answer()])
    (key,) = perf.cache("short").keys()
    ttl = perf.cache("short").ttl(key)
    assert ttl is not None
    assert 0 < ttl <= 60


def test_value_that_cannot_be_stored_is_logged_and_returned(
    cache: AgentPerfCache, caplog: pytest.LogCaptureFixture, runner: asyncio.Runner
) -> None:
    odd = (AIMessage("hi", additional_kwargs={"parsed": object()}) for _ in range(4))
    asked = GenericFakeChatModel(messages=odd, cache=cache)
    with caplog.at_level(logging.WARNING, "agentperf_redis"):
        assert asked.invoke("why?").content == "hi"
        assert runner.run(asked.ainvoke("why?")).content == "hi"
    assert caplog.text.count("a value was not stored in the cache 'langchain'") == 2
    assert "parsed" in caplog.text, "the part of the value is named"


def test_log_of_a_refused_response_leaves_out_its_text(cache: AgentPerfCache, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "agentperf_redis"):
        cache.update("prompt", "model", [Generation(text="secret" * 400_000)])
        cache.update("prompt", "model", [Generation(text="hi", generation_info={"parsed": {"secret"}.__iter__()})])
    assert caplog.text.count("a value was not stored") == 2
    assert "secret" not in caplog.text


def test_call_goes_on_while_the_server_is_away(runner: asyncio.Runner, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with AgentPerf(NOWHERE, deadline=0.2) as perf:
            asked, _ = model(AgentPerfCache(perf))
            contents = [(await asyncio.to_thread(asked.invoke, "why?")).content, (await asked.ainvoke("why?")).content]
            assert contents == ["answer 1", "answer 2"]

    runner.run(main())


@pytest.mark.servers("valkey")
def test_call_goes_on_when_the_server_is_full(
    own_server: Server, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    with AgentPerf(own_server.url, namespace=namespace) as perf, own_server.client() as raw:
        asked, _ = model(AgentPerfCache(perf))
        asked.invoke("first")
        raw.config_set("maxmemory", 1)
        assert asked.invoke("second").content == "answer 2"
        assert "BackendFull" in caplog.text


def test_foreign_bytes_are_a_miss(perf: AgentPerf, cache: AgentPerfCache) -> None:
    cache.update("prompt", "model", [answer()])
    (key,) = perf.cache("langchain").keys()
    perf.cache("langchain").put(key, "no list")
    asked, _ = model(cache)
    assert cache.lookup("prompt", "model") is None
    assert asked.invoke("prompt").content == "answer 1"


@pytest.mark.parametrize(
    "misuse",
    [
        lambda perf: UNCHECKED("redis://localhost"),
        lambda perf: UNCHECKED(perf, ""),
        lambda perf: UNCHECKED(perf, max_size=-1),
        lambda perf: UNCHECKED(perf).lookup(b"prompt", "model"),
        lambda perf: UNCHECKED(perf).update("prompt", None, []),
        lambda perf: UNCHECKED(perf).clear(llm_string=3),
    ],
)
def test_invalid_argument_is_refused(perf: AgentPerf, misuse: Callable[[AgentPerf], object]) -> None:
    with pytest.raises(InvalidArgument):
        misuse(perf)
