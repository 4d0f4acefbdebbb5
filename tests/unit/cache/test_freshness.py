"""The rules of freshness, without a server."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from agentperf_redis.cache.entry_format import Stored
from agentperf_redis.cache.freshness import UNTIL_EXPIRY, Age, Freshness
from agentperf_redis.errors import InvalidArgument

NOW_MS = 1_784_635_500_000


def entry(fresh_until_ms: int = 0, expires_ms: int = 0, cost_ms: int = 0) -> Stored:
    return Stored(NOW_MS * 100, expires_ms, cost_ms, fresh_until_ms, (), b"")


@pytest.mark.parametrize(
    ("options", "stored", "age"),
    [
        ({}, entry(0, NOW_MS + 1), Age.FRESH),
        ({}, entry(NOW_MS + 1), Age.FRESH),
        ({}, entry(NOW_MS), Age.DUE),
        ({"soft_ttl": 1}, entry(0), Age.FRESH),
        ({"soft_ttl": 1}, entry(NOW_MS - 10**9), Age.DUE),
        ({"soft_ttl": 1, "stale_if_error": 5}, entry(NOW_MS - 4999), Age.DUE),
        ({"soft_ttl": 1, "stale_if_error": 5}, entry(NOW_MS - 5000), Age.OLD),
        ({"soft_ttl": 1, "stale_if_error": 0}, entry(NOW_MS), Age.OLD),
        ({"stale_if_error": 5}, entry(0), Age.FRESH),
        ({"early_refresh": 1.0}, entry(0, NOW_MS + 1, 0), Age.FRESH),
        ({"early_refresh": 1.0}, entry(0, 0, 1000), Age.FRESH),
    ],
)
def test_age_depends_on_entry_and_reader_options(options: dict[str, Any], stored: Stored, age: Age) -> None:
    freshness = Freshness.of(options, None)
    assert freshness.age(stored, NOW_MS) is age
    assert age is Age.FRESH or freshness.concerns(stored)


@pytest.mark.parametrize("early", [0.5, 1.0, 3.0])
def test_early_refresh_follows_the_xfetch_probability(early: float) -> None:
    """P(refresh) = P(-ln(u) >= gap / (cost * beta)) = exp(-gap / (cost * beta))."""
    chance, draws, cost_ms = random.Random(1), 20_000, 200
    freshness = Freshness.of({"early_refresh": early}, 60)
    for gap_ms in (100, 400, 1000):
        for stored in (entry(0, NOW_MS + gap_ms, cost_ms), entry(NOW_MS + gap_ms, 0, cost_ms)):
            due = sum(freshness.age(stored, NOW_MS, chance.random) is Age.DUE for _ in range(draws))
            assert due / draws == pytest.approx(math.exp(-gap_ms / (cost_ms * early)), abs=0.012)


def test_jitter_spreads_evenly_and_changes_nothing_else() -> None:
    freshness = Freshness.of({"soft_ttl": 10, "jitter": 0.1}, 60)
    spread = [freshness.spread(freshness.soft_ms) for _ in range(2000)]
    assert min(spread) in range(9000, 9100)
    assert max(spread) in range(10_900, 11_001)
    assert [freshness.spread(ms) for ms in (0, -1)] == [0, -1], "no expiry, and the cache's default"
    assert UNTIL_EXPIRY.spread(1000) == 1000


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"soft_ttl": 0}, "soft_ttl"),
        ({"soft_ttl": math.inf}, "soft_ttl"),
        ({"soft_ttl": "5"}, "soft_ttl"),
        ({"soft_ttl": 60}, "soft_ttl"),
        ({"jitter": -0.1}, "jitter"),
        ({"jitter": 0.6}, "jitter"),
        ({"early_refresh": math.nan}, "early_refresh"),
        ({"soft_ttl": 1, "stale_if_error": -1}, "stale_if_error"),
        ({"softttl": 5}, "softttl"),
    ],
)
def test_invalid_option_is_refused_by_its_name(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        Freshness.of(options, 60)
    assert refused.value.argument == argument


def test_retry_delay_scales_with_the_soft_ttl() -> None:
    assert [Freshness.of({"soft_ttl": soft}, None).retry_ms for soft in (1, 60, 3600)] == [1000, 6000, 30_000]


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ({}, 0),
        ({"jitter": 0.1}, 0),
        ({"soft_ttl": 1}, math.inf),
        ({"stale_if_error": 5}, 5),
        ({"soft_ttl": 1, "stale_if_error": 5}, 5),
    ],
)
def test_stale_copies_require_an_option(options: dict[str, Any], seconds: float) -> None:
    assert Freshness.of(options, None).serve_stale_s == seconds
