"""Reading the line of a closed slice."""

from __future__ import annotations

import pytest

from agentperf_redis.metrics.closed_slices import add_closed

LINE = b"2026-11-22T16 n=4 ok=3 err=1 sum_us=812 min_us=90 max_us=412 last_ms=17 err:a%20b%3D%25=1 h:zero=1 | -49:1 -44:2,0,1"


def test_line_has_counters_and_buckets() -> None:
    fields: dict[bytes, int] = {}
    buckets: dict[int, int] = {}
    add_closed(LINE, fields, buckets)
    counters = {b"n": 4, b"ok": 3, b"err": 1, b"sum_us": 812, b"min_us": 90, b"max_us": 412, b"last_ms": 17}
    assert fields == {**counters, b"err:a b=%": 1, b"h:zero": 1}
    assert buckets == {-49: 1, -44: 2, -42: 1}


def test_lines_are_added_up() -> None:
    fields = {b"n": 2, b"min_us": 95, b"max_us": 500, b"last_ms": -1}
    buckets = {-44: 1, 3: 1}
    add_closed(LINE, fields, buckets)
    assert (fields[b"n"], fields[b"min_us"], fields[b"max_us"], fields[b"last_ms"]) == (6, 90, 500, 17)
    assert buckets == {-49: 1, -44: 3, -42: 1, 3: 1}


def test_line_without_buckets_is_read() -> None:
    fields: dict[bytes, int] = {}
    add_closed(b"2026-11-22 n=1 llm_calls=2 cost_nano=1.5e+17", fields, {})
    assert fields == {b"n": 1, b"llm_calls": 2, b"cost_nano": 150_000_000_000_000_000}


@pytest.mark.parametrize(
    "line",
    [
        b"2026-11-22 n",
        b"2026-11-22 n=",
        b"2026-11-22 n=-1",
        b"2026-11-22 n=nan",
        b"2026-11-22 n=1e400",
        b"2026-11-22 max_us=9999999999999999",
        b"2026-11-22 n=1 | x:1",
        b"2026-11-22 n=1 | 1:",
        b"2026-11-22 n=1 | 1:-2",
        b"2026-11-22 n=1 | 1:1,9999999999999999999999999",
        b"2026-11-22 n=1 | 1",
    ],
)
def test_damaged_lines_are_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match=r".*"):
        add_closed(line, {}, {})
