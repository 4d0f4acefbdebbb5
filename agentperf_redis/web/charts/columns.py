"""Stacked columns over time, such as executions by outcome: each band has its own colour and hatching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from agentperf_redis.web.charts.axis import ticks
from agentperf_redis.web.charts.lines import legend
from agentperf_redis.web.charts.svg import TOP, Written, element, frame, joined, percent
from agentperf_redis.windows import Interval

_FILLED = 0.8
"""Share of a step that its column fills."""
_MIN_PX = 1.5
"""Minimum height of a band whose value is not zero. Even one error among thousands must be visible."""


@dataclass(frozen=True, slots=True)
class Band:
    """A band of the columns.

    Attributes:
        name: its name in the legend.
        values: one value per step, at least 0.
        style: class of its colour and hatching.
    """

    name: str
    values: Sequence[float]
    style: str


def column_chart(
    intervals: Sequence[Interval], bands: Sequence[Band], written: Written, label: str, *, height: int = 160
) -> Markup:
    """Return a chart of stacked columns with its legend.

    Args:
        intervals: the steps.
        bands: the bands from the bottom up.
        written: returns the text of a count.
        label: a sentence that describes the chart.
        height: height of the plot, px.
    """
    steps = [tuple(row) for row in zip(*(band.values for band in bands), strict=True)]
    at = ticks(max(map(sum, steps), default=0.0), whole=True)
    rects: list[Markup] = []
    for number, row in enumerate(steps):
        y = float(TOP + height)
        for band, value in zip(bands, row, strict=True):
            if value > 0:
                tall = max(height * value / at[-1], _MIN_PX)
                y -= tall
                x = (number + (1 - _FILLED) / 2) / len(steps)
                rects.append(
                    element(
                        "rect",
                        x=percent(x),
                        width=percent(_FILLED / len(steps)),
                        y=y,
                        height=tall,
                        class_=band.style,
                    )
                )
    texts = [
        ", ".join(f"{band.name} {written(value)}" for band, value in zip(bands, row, strict=True) if value) or "none"
        for row in steps
    ]
    chart = frame(label, intervals, joined(rects), height=height, ticks=at, written=written, texts=texts)
    return joined((legend([(band.name, band.style) for band in bands]), chart))
