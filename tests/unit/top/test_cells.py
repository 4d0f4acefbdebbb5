"""The texts of cells."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentperf_redis.top import cells


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ""),
        ([0, 0], "  "),
        ([0, 1, 2], "▁▅█"),
        ([None, 8, 1], " █▂"),
        ([None, None], "  "),
        ([1, 1, 3, 3], "▃█"),
        ([9, 1, 1, 3, 3], "█▂▃"),
    ],
)
def test_sparkline_is_relative_to_the_largest_value(values: list[float | None], expected: str) -> None:
    assert cells.sparkline(list(values), 3) == expected


@given(st.lists(st.none() | st.floats(0, 1e9), max_size=50))
def test_sparkline_shows_all_steps_in_its_width(values: list[float | None]) -> None:
    line = cells.sparkline(values)
    assert len(line) <= 15
    assert len(line) == len(values) or len(line) > 7


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "····"), (0.01, "▏···"), (0.5, "██··"), (1, "████"), (1.5, "████")]
)
def test_bar_has_a_fixed_width(value: float, expected: str) -> None:
    assert cells.bar(value, 4) == expected


def test_missing_figures_are_dashes() -> None:
    assert (cells.seconds(None), cells.share(None), cells.age(None), cells.ago(None)) == ("–",) * 4
    assert cells.seconds(0.25, exact=False) == "≈0.250"
    assert cells.share(0.125) == "12.5%"
    assert cells.age(61.0) == "1 min ago"
    assert cells.ago(time.time() + 5) == "now"
    assert (cells.money(0.0), cells.money(0.12345)) == ("0", "0.1235")


def test_old_times_have_a_date() -> None:
    assert cells.clock(time.time()).count(":") == 2
    assert cells.clock(time.time() - 200_000).count("-") == 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, "0"), (0.0001, "<0.001"), (0.00992, "0.010"), (0.123, "0.123"), (12.34, "12.3"), (45_678.0, "45.7k")],
)
def test_rates_are_short(value: float, expected: str) -> None:
    assert cells.rate(value) == expected
