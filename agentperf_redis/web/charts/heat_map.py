"""A heat map: for each step, the number of executions in each range of durations. Darker cells hold more executions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from agentperf_redis.web.charts.axis import step_text
from agentperf_redis.web.charts.svg import TOP, element, joined, percent, side_by_side, time_axis
from agentperf_redis.windows import Interval

_HEIGHT_PX, _MIN_ROW_PX, _MAX_ROW_PX = 160, 10, 26
_MIN_LABEL_PX = 20
"""Minimum distance between the labels of two rows."""
_SHADES = 6


def heat_map(
    intervals: Sequence[Interval], rows: Sequence[str], counts: Mapping[tuple[int, int], int], label: str
) -> Markup:
    """Return a heat map with its legend.

    Args:
        intervals: the steps, the columns of the map.
        rows: description of each row, from the bottom up, such as "1 s to 2 s".
        counts: the count of each cell, by column and row; cells without a count are empty.
        label: a sentence that describes the map.

    Returns:
        The map; empty if there are no rows.
    """
    if not rows:
        return Markup("")
    largest = max(counts.values(), default=0)
    row_px = min(max(_HEIGHT_PX // max(1, len(rows)), _MIN_ROW_PX), _MAX_ROW_PX)
    height = len(rows) * row_px
    cells = [
        element(
            "g",
            element("title", f"{step_text(intervals[column])}, {rows[row]}: {count}"),
            element(
                "rect",
                x=percent(column / len(intervals)),
                width=percent(1 / len(intervals)),
                y=TOP + height - (row + 1) * row_px,
                height=row_px,
                class_=f"cell h{shade(count, largest)}",
            ),
        )
        for (column, row), count in sorted(counts.items())
        if count
    ]
    every = max(1, math.ceil(len(rows) / (height / _MIN_LABEL_PX)))
    labels = [(TOP + height - (row + 0.5) * row_px, text) for row, text in enumerate(rows) if row % every == 0]
    plot = [
        element("rect", x="0", y=TOP, width="100%", height=height, class_="ground"),
        *cells,
        time_axis(intervals, TOP + height),
    ]
    return joined((_legend(largest), side_by_side(label, labels, plot, height)))


def shade(count: int, largest: int) -> int:
    """Return the shade of a cell, 1 to 6. It grows with the square root of the count, so small counts stay visible."""
    return max(1, min(_SHADES, math.ceil(_SHADES * math.sqrt(count / largest)))) if largest else 1


def _legend(largest: int) -> Markup:
    if not largest:
        return Markup("")
    shades = [
        element("rect", x=number * 14, y="0", width="14", height="12", class_=f"cell h{number + 1}")
        for number in range(_SHADES)
    ]
    sample = element("svg", *shades, width=str(14 * _SHADES), height="12", aria_hidden="true", class_="sample")
    most = f" {largest} in a cell"
    return element("ul", element("li", "1 ", sample, most), class_="legend")
