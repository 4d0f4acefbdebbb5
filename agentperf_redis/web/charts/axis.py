"""Axes: round numbers for values, and labels for points in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime

from agentperf_redis.windows import Interval

_DAY_S = 86_400.0
_MINUTE_S = 60.0
_ROUND = (1.0, 2.0, 2.5, 5.0, 10.0)


def ticks(largest: float, *, whole: bool = False, base: float = 10.0, top: float | None = None) -> tuple[float, ...]:
    """Return three to five round values from 0 to at least the largest value, evenly spaced.

    Args:
        largest: the largest value of the chart.
        whole: whether the values are counts, so that no tick is a fraction.
        base: 1024 for bytes, whose round numbers are multiples of powers of 1024.
        top: a fixed upper end, such as 1.0 for shares; the ticks then divide the range to this end by four.
    """
    if top is not None:
        return tuple(top * quarter / 4 for quarter in range(5))
    if not largest > 0 or not math.isfinite(largest):
        return (0.0, 1.0)
    unit = 1.0 if base == 10.0 else base ** max(0, math.floor(math.log(largest, base)))  # noqa: PLR2004
    scaled = largest / unit
    power = 10.0 ** math.floor(math.log10(scaled / 4))
    steps = [power * each for each in _ROUND if scaled / (power * each) <= 4]  # noqa: PLR2004
    step = (steps[0] if steps else power * 10) * unit
    if whole:
        step = max(1.0, math.ceil(step))
    return tuple(step * number for number in range(math.ceil(round(largest / step, 9)) + 1))


def time_label(seconds: float, span: float) -> str:
    """Return a point in time, in UTC, as precise as a chart of this span needs; seconds since 1970, and s.

    Examples: ``14:03:20`` in a chart of ten minutes, ``14:03``, ``Nov 29 14:00``, ``Nov 29``.
    """
    at = datetime.fromtimestamp(seconds, UTC)
    if span <= 15 * _MINUTE_S:
        return f"{at:%H:%M:%S}"
    if span <= _DAY_S:
        return f"{at:%H:%M}"
    return f"{at:%b} {at.day} {at:%H:%M}" if span <= 4 * _DAY_S else f"{at:%b} {at.day}"


def time_labels(intervals: Sequence[Interval]) -> tuple[tuple[float, str], ...]:
    """Return five evenly spaced labels for the time axis: position as a share, 0 to 1, and the point in time."""
    if not intervals:
        return ()
    start, end = intervals[0].start, intervals[-1].end
    return tuple(
        (share, time_label(start + (end - start) * share, end - start)) for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    )


def step_text(interval: Interval) -> str:
    """Return a step in words: ``Nov 29 14:03:00 to 14:04:00 UTC``."""
    start, end = (datetime.fromtimestamp(round(each), UTC) for each in (interval.start, interval.end))
    until = f"{end:%H:%M:%S}" if start.date() == end.date() else f"{end:%b} {end.day} {end:%H:%M:%S}"
    return f"{start:%b} {start.day} {start:%H:%M:%S} to {until} UTC"
