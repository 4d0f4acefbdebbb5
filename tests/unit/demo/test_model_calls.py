"""The tokens and the cost of a step, counted from its input and output."""

from __future__ import annotations

import pytest

from agentperf_redis.demo.model_calls import LARGE, MODELS, ModelCall, call_of
from agentperf_redis.demo.team import AGENTS


def test_each_agent_has_a_model() -> None:
    assert set(MODELS) == set(AGENTS)


def test_tokens_are_a_quarter_of_the_characters() -> None:
    # Input: "größe" has 5 characters (in 7 bytes), and [1] has 3 characters. These 8 characters are 2 tokens. Output:
    # (1, 2) has 6 characters, which are 1.5 tokens, rounded up to 2.
    call = call_of("critic", ("größe".encode(), [1]), (1, 2), from_cache=False)
    assert call == ModelCall("demo-large", 2, 0, 2, 2 * LARGE.per_token_in + 2 * LARGE.per_token_out)


def test_step_from_a_cache_reads_the_provider_cache() -> None:
    call = call_of("critic", (b"x" * 400,), "", from_cache=True)
    assert (call.tokens_in, call.tokens_cached_in, call.tokens_out) == (100, 100, 1)
    assert call.cost == pytest.approx(100 * LARGE.per_token_cached + LARGE.per_token_out)


def test_undecodable_source_is_counted_too() -> None:
    assert call_of("reader", (b"\xff" * 8,), "", from_cache=False).tokens_in == 2
