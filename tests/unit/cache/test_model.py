"""The data model of a cache: settings, TTLs, entries and counts."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest

from agentperf_redis.cache.model import (
    CacheEntry,
    CacheStats,
    Policy,
    Settings,
    TierStats,
    chosen_tier,
    default_ttl_ms,
    ttl_ms,
)
from agentperf_redis.errors import InvalidArgument

SETTINGS = Settings(Policy.LRU, (0, 0, 5), 0, (0, 0, 60_000))


def test_settings_survive_their_text_form() -> None:
    for settings in (SETTINGS, Settings(Policy.TINYLFU, (1, 2, 3), 2**50, (1, 2, 3))):
        assert Settings.parse(settings.text) == settings
    assert SETTINGS.text == "lru capacity 0/0/5 bytes 0 ttl 0/0/60000"
    assert SETTINGS.shown("cache") == "max_size=5, max_bytes=None, default_ttl=60, policy='lru'"
    tiers = "hot_size=1, warm_size=2, cold_size=3, max_bytes=9, hot_ttl=0.5, warm_ttl=None, cold_ttl=60"
    assert Settings(Policy.LRU, (1, 2, 3), 9, (500, 0, 60_000)).shown("tiered") == f"{tiers}, policy='lru'"
    assert Settings.parse("mru capacity 1/2/3 bytes 0 ttl 0/0/0") is None


def test_ttls_are_milliseconds_rounded_up() -> None:
    assert [ttl_ms("ttl", ttl) for ttl in (None, math.inf, 1, 0.001, 0.0015)] == [-1, 0, 1000, 1, 2]
    assert [default_ttl_ms("ttl", ttl) for ttl in (None, math.inf, 300)] == [0, 0, 300_000]
    with pytest.raises(InvalidArgument):
        ttl_ms("ttl", 0)


@pytest.mark.parametrize("ttl", [5, 0.5])
def test_number_in_place_of_tier_names_ttl(ttl: float) -> None:
    with pytest.raises(InvalidArgument, match=f"one of 'hot', 'warm', 'cold'; for a TTL, write ttl={ttl}"):
        chosen_tier(ttl)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument) as error:
        chosen_tier("lukewarm")
    assert "ttl" not in str(error.value)


def test_entry_is_expired_after_its_expiry_time() -> None:
    now = datetime.now(UTC)
    assert CacheEntry("k", 1, now, now - timedelta(seconds=1)).is_expired()
    assert not CacheEntry("k", 1, now, now + timedelta(seconds=60)).is_expired()
    assert not CacheEntry("k", 1, now, None).is_expired()


def test_rates_of_an_unused_cache_are_zero() -> None:
    unused = TierStats(0, 5, 0, 0)
    assert (unused.hit_rate, unused.render()["hit_rate"]) == (0.0, "0.0%")
    assert CacheStats("c", "lru", SETTINGS, unused, unused, unused, 0, 0, 0, 0, 0, 0, 0, 0.0).hit_rate == 0.0
