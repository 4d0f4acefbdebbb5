from __future__ import annotations

import contextvars
import threading
from typing import Any

import pytest

from agentperf_redis.metrics import llm_responses
from agentperf_redis.metrics.llm_responses import Responses
from agentperf_redis.metrics.llm_usage import Found, Part, Usage, merged, read

START = {
    "type": "message_start",
    "message": {"id": "m", "model": "claude-x", "usage": {"input_tokens": 10, "cache_read_input_tokens": 90, "output_tokens": 1}},
}  # fmt: skip
DELTA = {"type": "message_delta", "usage": {"input_tokens": 10, "cache_read_input_tokens": 90, "output_tokens": 15}}
STOP = {"type": "message_stop"}


class Recorded:
    """Records events one by one, and adds up their usages."""

    def __init__(self) -> None:
        self.responses = Responses()
        self.usages: list[Usage] = []
        self.unread = 0

    def record(self, event: Any, agent: str = "a") -> None:
        reading = read(event)
        if reading.found:
            news, first_counts = self.responses.news(agent, merged(reading.found))
            self.usages += news
            self.unread -= first_counts
        else:
            assert reading.part is not None
            known = self.responses.event(agent, reading.part, unread=True)
            self.usages.append(Usage(calls=0 if known else 1))
            self.unread += not known

    def sum(self) -> tuple[int, int, int, int]:
        return (
            sum(each.calls for each in self.usages),
            sum(each.tokens_in for each in self.usages),
            sum(each.tokens_cached_in for each in self.usages),
            sum(each.tokens_out for each in self.usages),
        )


@pytest.fixture(autouse=True)
def no_response_began() -> None:
    llm_responses._latest.set(None)


def test_events_of_a_stream_are_one_call() -> None:
    recorded = Recorded()
    for event in (START, {"type": "content_block_delta", "delta": {}}, DELTA, STOP):
        recorded.record(event)
    assert recorded.sum() == (1, 100, 90, 15)
    assert {each.model for each in recorded.usages if each.tokens_out} == {"claude-x"}
    assert recorded.unread == 0


def test_single_event_is_one_call() -> None:
    for event, expected in ((START, (1, 100, 90, 1)), (DELTA, (1, 100, 90, 15))):
        llm_responses._latest.set(None)
        recorded = Recorded()
        recorded.record(event)
        assert recorded.sum() == expected


def test_event_without_id_never_joins_an_ended_stream() -> None:
    recorded = Recorded()
    for event in (START, DELTA, STOP, DELTA):
        recorded.record(event)
    assert recorded.sum() == (2, 200, 180, 30)


def test_chunks_are_unread_until_the_last_has_counts() -> None:
    recorded = Recorded()
    chunk = {"object": "chat.completion.chunk", "id": "c", "model": "gpt-x", "usage": None}
    for _ in range(3):
        recorded.record(chunk)
    assert (recorded.sum(), recorded.unread) == ((1, 0, 0, 0), 1)
    recorded.record(chunk | {"usage": {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}})
    assert (recorded.sum(), recorded.unread) == ((1, 5, 0, 6), 0)


def test_repeated_id_after_the_end_is_another_call() -> None:
    recorded = Recorded()
    usage = {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    last = {"object": "chat.completion.chunk", "id": "chatcmpl-7", "choices": [], "usage": usage}
    for _ in range(2):
        recorded.record(last)
    assert recorded.sum() == (2, 10, 0, 12)
    for _ in range(2):
        recorded.record(last | {"choices": [{"finish_reason": None}]})
        recorded.record(last | {"choices": [{"finish_reason": "stop"}], "usage": None, "x_groq": {"usage": usage}})
        recorded.record(last)
    assert recorded.sum() == (4, 20, 0, 24)
    assert not recorded.responses._counted


def test_responses_api_is_one_call_from_created_to_completed() -> None:
    recorded = Recorded()
    usage = {"input_tokens": 5, "output_tokens": 6, "total_tokens": 11}
    recorded.record({"type": "response.created", "response": {"id": "r", "usage": None}})
    recorded.record({"type": "response.output_text.delta", "delta": "x"})
    recorded.record({"type": "response.completed", "response": {"id": "r", "model": "gpt-x", "usage": usage}})
    assert (recorded.sum(), recorded.unread) == ((1, 5, 0, 6), 0)


def test_repeated_conversation_counts_only_new_messages() -> None:
    def message(identity: str) -> dict[str, Any]:
        kind = "ai" if identity == "1" else "AIMessageChunk"  # a merged stream has the type AIMessageChunk
        return {"type": kind, "id": identity, "usage_metadata": {"input_tokens": 5, "output_tokens": 6}}

    recorded = Recorded()
    recorded.record({"messages": [message("1")]})
    recorded.record({"messages": [message("1"), {"type": "human", "id": "h"}, message("2")]})
    recorded.record({"messages": [message("1"), message("2")]})
    assert recorded.sum() == (2, 10, 0, 12)
    recorded.record({"messages": [message("1")]}, agent="b")
    assert recorded.sum() == (3, 15, 0, 18), "each agent counts its own messages"


def test_additional_counts_are_added() -> None:
    recorded = Recorded()
    for sent in (5, 0, 0):
        recorded.record(
            {"type": "AIMessageChunk", "id": "1", "usage_metadata": {"input_tokens": sent, "output_tokens": 2}}
        )
    assert recorded.sum() == (1, 5, 0, 6)


def test_streams_in_two_threads_stay_separate() -> None:
    recorded = Recorded()
    recorded.record(START)

    def other() -> None:
        recorded.record(
            {"type": "message_start", "message": {"id": "n", "usage": {"input_tokens": 1, "output_tokens": 1}}}
        )
        recorded.record({"type": "message_delta", "usage": {"output_tokens": 7}})

    thread = threading.Thread(target=contextvars.Context().run, args=(other,))
    thread.start()
    thread.join()
    recorded.record(DELTA)
    assert recorded.sum() == (2, 101, 90, 22)


def test_remembered_responses_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_responses, "MAX_RESPONSES", 3)
    responses = Responses()
    for number in range(10):
        responses.news("a", [Found(Usage(1, 1), Part(str(number)))])
    assert list(responses._counted) == [("a", "7"), ("a", "8"), ("a", "9")]
    responses.news("a", [Found(Usage(1, 1), Part("whole", ends=True))])
    assert ("a", "whole") not in responses._counted, "a whole response has no later parts"
