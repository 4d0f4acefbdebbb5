from __future__ import annotations

import pytest

from agentperf_redis.web.charts.heat_map import heat_map, shade
from agentperf_redis.windows import Interval

STEPS = [Interval(0, 60), Interval(60, 120)]


@pytest.mark.parametrize(
    ("count", "largest", "expected"), [(1, 1, 6), (1, 100, 1), (25, 100, 3), (100, 100, 6), (1, 10**6, 1)]
)
def test_shade_grows_with_the_root_of_the_count(count: int, largest: int, expected: int) -> None:
    assert shade(count, largest) == expected


def test_cells_are_described_and_empty_ones_left_out() -> None:
    found = heat_map(STEPS, ["≤ 1 s", "≤ 2 s"], {(0, 0): 3, (1, 1): 12, (0, 1): 0}, "Durations")
    cells = found[found.index('class="chart"') :]
    assert cells.count('class="cell') == 2
    assert "≤ 2 s: 12" in cells
    assert "12 in a cell" in found


def test_map_without_rows_is_nothing() -> None:
    assert heat_map(STEPS, [], {}, "Durations") == ""


def test_many_rows_have_fewer_labels() -> None:
    found = heat_map(STEPS, [f"row {number}" for number in range(24)], {(0, 0): 1}, "Durations")
    assert 5 <= found.count('text-anchor="end" class="tick">row') <= 12
