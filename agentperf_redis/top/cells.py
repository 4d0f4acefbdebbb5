"""The texts of cells: numbers, times, bars and sparklines. Characters carry the meaning; colours only repeat it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime

from agentperf_redis.views.text import age_text, seconds_cell, short_number
from agentperf_redis.windows import Interval

NONE = "–"
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_DAY_S = 86_400
_LEAST_RATE = 0.0005
"""The lowest rate that three decimals do not round to zero."""


def seconds(value: float | None, *, exact: bool = True) -> str:
    """Return a duration in seconds; ≈ marks an estimate."""
    return NONE if value is None else ("" if exact else "≈") + seconds_cell(value)


def share(value: float | None) -> str:
    """Return a share as a percentage."""
    return NONE if value is None else f"{value:.1%}"


def rate(value: float) -> str:
    """Return a rate per second in at most six characters."""
    if 0 < value < _LEAST_RATE:
        return "<0.001"
    return f"{value:.3f}" if 0 < value < 0.1 else short_number(value)  # noqa: PLR2004


def money(value: float) -> str:
    """Return a cost in the caller's unit."""
    return f"{value:.4g}" if value else "0"


def age(seconds: float | None) -> str:
    """Return an age, such as ``12 s ago``."""
    return NONE if seconds is None else age_text(seconds)


def ago(at: float | None) -> str:
    """Return how long ago a time was, by this machine's clock. The time is given in s since 1970."""
    return NONE if at is None else age_text(max(0.0, time.time() - at))


def clock(at: float) -> str:
    """Return a time, given in s since 1970, as a local time of day; with the date if it is more than a day away."""
    form = "%H:%M:%S" if abs(time.time() - at) < _DAY_S else "%m-%d %H:%M"
    return datetime.fromtimestamp(at).astimezone().strftime(form)


def start(interval: Interval) -> str:
    """Return the local time at which an interval begins."""
    return clock(interval.start)


def bar(value: float, width: int = 10) -> str:
    """Return a bar for a share from 0 to 1, such as ``████······``."""
    full = min(width, max(0, round(value * width)))
    if value > 0 and not full:
        return "▏" + "·" * (width - 1)
    return "█" * full + "·" * (width - full)


def sparkline(values: Sequence[float | None], width: int = 15) -> str:
    """Return values over time as a line of at most `width` bars. If there are more values, neighbours are averaged.

    The bar of the largest value is full. A missing value leaves a gap.
    """
    size = max(1, -(-len(values) // width))
    first = len(values) % size  # the first group may be smaller, so that the latest group is complete
    groups = [values[max(0, at - size) : at] for at in range(first or size, len(values) + 1, size)]
    means = [_mean(group) for group in groups]
    top = max((mean for mean in means if mean is not None), default=0.0)
    return "".join(
        " " if mean is None else _EIGHTHS[1 + round(mean / top * 7)] if mean > 0 else _EIGHTHS[1] if top else " "
        for mean in means
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
