"""Numbers, times and names as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentperf_redis.views import text


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0"),
        (0.125, "0.125"),
        (12.34, "12.3"),
        (950, "950"),
        (9999, "9999"),
        (12_345, "12.3k"),
        (123_456, "123k"),
        (1_000_000, "1M"),
        (4_567_000, "4.57M"),
        (7.2e9, "7.2G"),
        (3e12, "3T"),
        (-12_345, "-12.3k"),
    ],
)
def test_short_numbers(number: float, expected: str) -> None:
    assert text.short_number(number) == expected


@given(st.just(0.0) | st.floats(1e-9, 1e15))
def test_short_numbers_are_near_and_short(number: float) -> None:
    shown = text.short_number(number)
    scale = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(shown[-1], 1.0)
    value = float(shown.rstrip("kMGT")) * scale
    assert value == pytest.approx(number, rel=0.01)
    assert len(shown) <= 8


@pytest.mark.parametrize(
    ("count", "expected"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 * 2**20, "3.0 MiB"), (2**41, "2.0 TiB")]
)
def test_sizes_have_units(count: int, expected: str) -> None:
    assert text.size_text(count) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.4, "now"), (12, "12 s ago"), (61, "1 min ago"), (7200, "2 h ago"), (2e5, "2 d ago")]
)
def test_ages_have_one_unit(seconds: float, expected: str) -> None:
    assert text.age_text(seconds) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(12.5, "12.500 s"), (0.00325, "3.25 ms"), (0.00004, "40 µs"), (0.0, "0.000 s")]
)
def test_durations_have_units(seconds: float, expected: str) -> None:
    assert text.duration(seconds) == expected


def test_control_characters_are_escaped() -> None:
    assert text.printable("a\nb\x1b[31m é 名") == "a\\nb\\x1b[31m é 名"
