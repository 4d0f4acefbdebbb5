from __future__ import annotations

import re

from agentperf_redis.web.charts.columns import Band, column_chart
from agentperf_redis.windows import Interval

STEPS = [Interval(0, 60), Interval(60, 120)]


def rects(svg: str, style: str) -> list[tuple[float, float]]:
    """Return top and height of the columns' parts with a style."""
    plot = svg[svg.index('class="plot"') if 'class="legend"' not in svg else svg.index('class="chart"') :]
    found = re.findall(rf'y="([\d.]+)" height="([\d.]+)" class="{style}"', plot)
    return [(float(top), float(height)) for top, height in found]


def chart(*bands: Band) -> str:
    return column_chart(STEPS, bands, lambda value: f"{value:.0f}", "Executions", height=100)


def test_bands_stand_on_each_other() -> None:
    found = chart(Band("ok", [60, 80], "s1"), Band("failed", [20, 0], "s2"))
    (first, second), (failed,) = rects(found, "s1"), rects(found, "s2")
    assert (first, second) == ((33.0, 75.0), (8.0, 100.0))
    assert failed[0] + failed[1] == first[0]


def test_single_error_among_thousands_is_visible() -> None:
    ((_, height),) = rects(chart(Band("ok", [10_000, 1], "s1"), Band("failed", [1, 0], "s2")), "s2")
    assert height == 1.5


def test_steps_name_the_bands_that_they_have() -> None:
    found = chart(Band("ok", [60, 0], "s1"), Band("failed", [20, 0], "s2"))
    assert "ok 60, failed 20" in found
    assert "UTC: none" in found
