"""The kinds of keys whose memory is shown."""

from __future__ import annotations

import pytest

from agentperf_redis import keys
from agentperf_redis.views.memory import MAX_KINDS, KindMemory, _rows, group_of


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (keys.meta("n"), "namespace"),
        (keys.metrics_total("n", 3, "a"), "metrics, counts of all time"),
        ("n:{metrics:03}:1m:2026-11-29T12:00:a", "metrics, slices of a minute"),
        (keys.metrics_latest("n", 3, "a"), "metrics, latest executions"),
        (keys.metrics_agents("n", 3), "metrics, indexes"),
        (keys.cache("n", "cache", "an swers:1").entry("k:1"), "cache an swers:1"),
        (keys.cache("n", "tiered", "docs").size, "tiered cache docs"),
        (keys.pool("n", "coder}x").state, "pool coder}x"),
        (keys.workers_seen("n"), "workers"),
        (keys.alerts("n").rules, "alerts"),
        ("n:other", "namespace"),
    ],
)
def test_keys_are_sorted_by_kind(key: str, expected: str) -> None:
    assert group_of(key)[0] == expected


def test_entries_and_indexes_of_a_cache_are_measured_apart() -> None:
    where = keys.cache("n", "cache", "answers")
    assert group_of(where.entry("a")) == group_of(where.entry("b:1")) == ("cache answers", "e")
    assert group_of(where.size) == ("cache answers", "size")


def test_small_kinds_are_added_up() -> None:
    found = {f"cache {number:03d}": (1, 10) for number in range(MAX_KINDS + 3)}
    found["pool coder"] = (5, 470)
    rows = _rows(found)
    assert len(rows) == MAX_KINDS + 1
    assert rows[0] == KindMemory("pool coder", 5, 470, 0.47)
    assert rows[-1] == KindMemory("others", 4, 40, 0.04)
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert _rows({}) == ()
