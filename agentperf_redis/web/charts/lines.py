"""Lines over time, such as percentiles. Each line has its own colour and dash, and its name in the legend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from agentperf_redis.web.charts.axis import ticks
from agentperf_redis.web.charts.svg import TOP, Written, curve, element, frame, joined, stretched
from agentperf_redis.windows import Interval


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a chart.

    Attributes:
        name: its name in the legend.
        values: one value per step; None for a step without a value.
        style: class of its colour and dash, ``s1`` to ``s6``.
    """

    name: str
    values: Sequence[float | None]
    style: str = "s1"


def line_chart(
    intervals: Sequence[Interval],
    lines: Sequence[Line],
    written: Written,
    label: str,
    *,
    height: int = 160,
    whole: bool = False,
    base: float = 10.0,
    top: float | None = None,
) -> Markup:
    """Return a chart of lines with its legend.

    Args:
        intervals: the steps.
        lines: the lines, the most important line first; that line is drawn on top.
        written: returns the text of a value.
        label: a sentence that describes the chart.
        height: height of the plot, px.
        whole: whether values are counts.
        base: base of the round numbers on the axis: 1024 for bytes, else 10.
        top: fixed upper end of the axis.
    """
    largest = max((value for line in lines for value in line.values if value is not None), default=0.0)
    at = ticks(largest, whole=whole, base=base, top=top)
    paths = [element("path", d=curve(line.values, at[-1], height), class_=f"line {line.style}") for line in lines]
    texts = [
        ", ".join(
            f"{line.name} {'no data' if value is None else written(value)}"
            for line, value in zip(lines, row, strict=True)
        )
        for row in zip(*(line.values for line in lines), strict=True)
    ]
    plot = stretched(*reversed(paths), y=TOP, height=height)
    chart = frame(label, intervals, plot, height=height, ticks=at, written=written, texts=texts)
    return joined((legend([(line.name, f"line {line.style}") for line in lines]), chart))


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """Return a legend; empty for a single entry. Each entry is a name and the class of its drawing."""
    if len(entries) < 2:  # noqa: PLR2004
        return Markup("")
    return element(
        "ul",
        *(element("li", _sample(style), " ", name) for name, style in entries),
        class_="legend",
    )


def _sample(style: str) -> Markup:
    drawn = (
        element("path", d="M0 6H22", class_=style)
        if style.startswith("line")
        else element("rect", x="4", y="0", width="12", height="12", class_=style)
    )
    return element("svg", drawn, width="22", height="12", aria_hidden="true", class_="sample")
