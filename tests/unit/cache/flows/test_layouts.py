"""The limits of a cache hold while its entries are divided between two layouts."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from agentperf_redis.cache.flows.layouts import continued, limits_allowed, limits_in_use, related_shards
from agentperf_redis.cache.model import Policy, Settings

CHANGES = [(1, 16), (16, 4), (4, 1), (1, 2), (256, 1), (8, 256)]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_both_layouts_together_stay_within_the_limits(before: int, after: int) -> None:
    luck = random.Random(before)
    for capacities, size in (((0, 0, 64_013), 0), ((1000, 2000, 70_001), 9_999_999)):
        settings = Settings(Policy.LRU, capacities, size, (0, 0, 0), before)
        allowed = limits_allowed(settings, after)
        left = [(luck.randint(0, entries), luck.randint(0, most)) for entries, most in allowed]
        for old in (allowed, left, [(0, 0)] * before):
            kept = [limits_in_use(dict(enumerate(old)), at, before, after) for at in range(after)]
            shares = [replace(settings, shards=after).of_shard(at) for at in range(after)]
            free = [sum(share.capacities) - entries for share, (entries, _) in zip(shares, kept, strict=True)]
            assert min(free) >= min(sum(share.capacities) for share in shares) // 16, "each new shard can store entries"
            assert sum(free) + sum(entries for entries, _ in old) <= sum(settings.capacities)
            if size:
                bytes_free = [share.max_bytes - most for share, (_, most) in zip(shares, kept, strict=True)]
                assert min(bytes_free) > 0
                assert sum(bytes_free) + sum(most for _, most in old) <= size


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_related_shards_share_the_keys(before: int, after: int) -> None:
    for number in range(1024):
        assert number % after in related_shards(number % before, before, after)


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_counters_continue_with_the_same_sums(before: int, after: int) -> None:
    counters = [(number, 2 * number) for number in range(before)]
    found = continued(counters, after)
    assert len(found) == after
    assert [sum(each) for each in zip(*found, strict=True)] == [sum(each) for each in zip(*counters, strict=True)]
