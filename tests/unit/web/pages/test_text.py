from __future__ import annotations

import math
from datetime import UTC, datetime

import pytest

from agentperf_redis.web.pages import text


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0 s"),
        (0.000_04, "40.0 µs"),
        (0.000_999_9, "1.00 ms"),
        (0.82, "820 ms"),
        (0.9996, "1.00 s"),
        (2.1, "2.10 s"),
        (12.34, "12.3 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min"),
        (200, "3 min 20 s"),
        (3599.6, "1 h"),
        (7500, "2 h 5 min"),
        (86_380, "1 d"),
        (100 * 3600, "4 d 4 h"),
        (-1.5, "-1.50 s"),
        (None, "–"),
        (math.inf, "–"),
    ],
)
def test_durations_have_a_fitting_unit(seconds: float | None, expected: str) -> None:
    assert text.duration(seconds) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (2.5, "2.5"),
        (1234, "1,234"),
        (999_999, "999,999"),
        (12_345_678, "12.3 M"),
        (999_600_000, "1.00 G"),
        (5e15, "5000 T"),
        (None, "–"),
    ],
)
def test_numbers_are_short(value: float | None, expected: str) -> None:
    assert text.number(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0/s"), (1234, "1,234/s"), (12.34, "12.3/s"), (0.5, "30.0/min"), (0.001, "3.60/h"), (None, "–")],
)
def test_rates_have_a_fitting_unit(value: float | None, expected: str) -> None:
    assert text.rate(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.0, "100%"),
        (0.0, "0%"),
        (0.992, "99.2%"),
        (0.99996, ">99.99%"),
        (0.9996, "99.99%"),
        (0.0001, "<0.1%"),
        (1.5, "150.0%"),
        (None, "–"),
    ],
)
def test_only_everything_is_a_hundred_percent(value: float | None, expected: str) -> None:
    assert text.share(value) == expected


@pytest.mark.parametrize(("value", "expected"), [(0, "0"), (12.345, "12.35"), (0.000_42, "0.00042"), (None, "–")])
def test_small_costs_keep_their_digits(value: float | None, expected: str) -> None:
    assert text.cost(value) == expected


@pytest.mark.parametrize(("value", "expected"), [(None, "new"), (2.14, "2.1×"), (12.0, "12×"), (0.05, "0.05×")])
def test_ratios_are_rounded(value: float | None, expected: str) -> None:
    assert text.times(value) == expected


def test_times_have_a_zone() -> None:
    at = datetime(2026, 11, 29, 14, 3, 12, tzinfo=UTC)
    expected = '<time datetime="2026-11-29T14:03:12+00:00">Nov 29 14:03:12 UTC</time>'
    assert text.moment(at) == text.moment(at.timestamp()) == expected
    assert text.moment(at.astimezone().replace(tzinfo=None)) == expected  # local time, as the API returns it
    assert ">14:03:12 UTC<" in text.clock(at)
    assert text.moment(None) == "–"


def test_names_are_escaped_and_may_be_broken() -> None:
    assert text.breakable("a/b<c>") == "a/<wbr>b&lt;c&gt;"
    assert text.breakable("") == "(empty)"
    assert text.visible("a\nb\x00") == "a\\nb\\x00"


def test_plural_follows_the_count() -> None:
    assert text.plural(1, "task") == "1 task"
    assert text.plural(1200, "entry", "entries") == "1,200 entries"
