"""Tests of how the command line reads windows and the ends of windows, and how it shows windows and ages."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest

from agentperf_redis.cli.console import WrongUsage
from agentperf_redis.cli.times import age_text, asked_end, parsed_window, window_text
from agentperf_redis.errors import InvalidArgument


def test_ends_are_times_seconds_or_ages() -> None:
    assert asked_end(None, None) is None
    assert asked_end("1700000000.5", "1h") == 1700000000.5
    assert asked_end("2026-11-29T15:00", "1h") == datetime(2026, 11, 29, 15)  # noqa: DTZ001  local time
    assert asked_end("2026-11-29T15:00Z", "1h") == datetime(2026, 11, 29, 15, tzinfo=UTC)
    before = time.time()
    ago = asked_end("2h ago", "1h")
    assert isinstance(ago, datetime)
    assert before - 1 <= (ago + timedelta(hours=2)).timestamp() <= time.time()


@pytest.mark.parametrize("text", ["", "yesterday", "2h", "2 parsecs ago", "2026-13-01", "12:00"])
def test_other_ends_are_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^--other-as-of is .*; allowed: a time such as"):
        asked_end(text, "1h", "--other-as-of")


def test_end_needs_a_window() -> None:
    with pytest.raises(WrongUsage, match="give --window with --as-of"):
        asked_end("2h ago", None)


def test_windows_are_shown_in_words() -> None:
    assert (parsed_window("300"), parsed_window("5m"), parsed_window(None)) == (300.0, "5m", None)
    assert window_text(None) == "all time"
    assert window_text("300") == "the last 300 s"
    assert window_text("5m", "2h ago") == "the 5m until 2h ago"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "now"),
        (0.4, "now"),
        (59, "59 s ago"),
        (60, "1 min ago"),
        (3600, "1 h ago"),
        (86_399, "24 h ago"),
        (200_000, "2 d ago"),
    ],
)
def test_ages_have_their_largest_unit(seconds: float, text: str) -> None:
    assert age_text(seconds) == text
