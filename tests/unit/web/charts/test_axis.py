from __future__ import annotations

from itertools import pairwise

import pytest

from agentperf_redis.web.charts.axis import step_text, ticks, time_labels
from agentperf_redis.windows import Interval

NOON = 1_796_212_800.0  # 2026-12-02 12:00 UTC


def steps(count: int, seconds: float, start: float = NOON) -> list[Interval]:
    return [Interval(start + at * seconds, start + (at + 1) * seconds) for at in range(count)]


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (0.0, (0, 1)),
        (float("nan"), (0, 1)),
        (1.0, (0, 0.25, 0.5, 0.75, 1)),
        (3.1, (0, 1, 2, 3, 4)),
        (0.00042, (0, 0.0002, 0.0004, 0.0006)),
        (987.0, (0, 250, 500, 750, 1000)),
    ],
)
def test_ticks_are_round_and_cover_the_largest_value(largest: float, expected: tuple[float, ...]) -> None:
    assert ticks(largest) == pytest.approx(expected)


@pytest.mark.parametrize("largest", [1, 2, 3, 4, 5, 7, 9, 11, 99, 101, 12_345, 10**12])
def test_ticks_of_counts_are_whole_and_few(largest: int) -> None:
    found = ticks(largest, whole=True)
    assert all(each == int(each) for each in found)
    assert found[-1] >= largest
    assert 2 <= len(found) <= 6
    assert len({after - before for before, after in pairwise(found)}) == 1


def test_ticks_of_bytes_are_round_in_binary_units() -> None:
    assert ticks(3 * 2**20, base=1024) == (0, 2**20, 2 * 2**20, 3 * 2**20)


def test_ticks_keep_a_fixed_end() -> None:
    assert ticks(0.03, top=1.0) == (0, 0.25, 0.5, 0.75, 1)


@pytest.mark.parametrize(
    ("count", "seconds", "expected"),
    [
        (6, 10, ["12:00:00", "12:00:10", "12:00:20", "12:00:30", "12:00:40", "12:00:50", "12:01:00"]),
        (60, 10, ["12:00", "12:02", "12:04", "12:06", "12:08", "12:10"]),
        (24, 3600, ["12:00", "18:00", "Dec 3", "06:00", "12:00"]),
        (42, 14_400, ["Dec 3", "Dec 5", "Dec 7", "Dec 9"]),
    ],
)
def test_time_labels_stand_at_round_times(count: int, seconds: float, expected: list[str]) -> None:
    found = time_labels(steps(count, seconds))
    assert [text for _, text in found] == expected
    assert all(0 <= share <= 1 for share, _ in found)
    assert len(found) <= 7


def test_time_axis_without_steps_has_no_labels() -> None:
    assert time_labels([]) == ()
    assert time_labels([Interval(NOON, NOON)]) == ()


def test_step_is_described_with_its_zone() -> None:
    assert step_text(Interval(NOON, NOON + 60)) == "Dec 2 12:00:00 to 12:01:00 UTC"
    assert step_text(Interval(NOON, NOON + 86_400)) == "Dec 2 12:00:00 to Dec 3 12:00:00 UTC"
