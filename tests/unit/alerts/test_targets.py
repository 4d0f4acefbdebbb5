from __future__ import annotations

import pytest

from agentperf_redis.alerts.targets import cache_of_target, cache_target


@pytest.mark.parametrize("kind", ["lru", "tiered"])
def test_target_of_a_cache_names_it_and_its_kind(kind: str) -> None:
    assert cache_of_target(cache_target(kind, "x")) == ("x", kind)
