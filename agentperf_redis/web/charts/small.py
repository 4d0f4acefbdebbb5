"""Small drawings in tables and tiles: sparklines and meters."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from agentperf_redis.web.charts.svg import WIDTH, curve, element, percent, stretched

_HEIGHT = 24


def sparkline(values: Sequence[float | None], label: str, *, style: str = "s1") -> Markup:
    """Return a line without axes.

    Args:
        values: one value per step; None for a step without a value.
        label: the course of the line in words, for people who cannot see it.
        style: class of its colour.
    """
    known = [value for value in values if value is not None]
    largest = max(known, default=0.0)
    line = curve(values, largest or 1.0, _HEIGHT - 4)
    filled = f"M0 {_HEIGHT}H{WIDTH}" if not known else ""
    return element(
        "svg",
        stretched(element("path", d=line or filled, class_=f"line {style}"), y=2, height=_HEIGHT - 4),
        class_="spark",
        width="100%",
        height=_HEIGHT,
        role="img",
        aria_label=label,
    )


def meter(value: float, maximum: float, label: str, *, style: str = "s1") -> Markup:
    """Return a bar that is full at the maximum. The number stands beside it as text.

    Args:
        value: the value, at least 0.
        maximum: the value of a full bar; if it is 0, the bar is empty.
        label: the bar in words.
        style: class of its colour.
    """
    share = min(1.0, value / maximum) if maximum > 0 else 0.0
    return element(
        "svg",
        element("rect", x="0", y="1", width="100%", height="8", rx="4", class_="track"),
        element("rect", x="0", y="1", width=percent(share), height="8", rx="4", class_=style) if share else "",
        class_="meter",
        width="100%",
        height="10",
        role="img",
        aria_label=label,
    )
