"""Axes: round numbers for values, and labels for points in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime

from agentperf_redis.windows import Interval

_MINUTE_S, _DAY_S = 60, 86_400
_EVERY_S = (
    *(10, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400),
    *(2 * _DAY_S, 5 * _DAY_S, 10 * _DAY_S, 30 * _DAY_S, 90 * _DAY_S, 365 * _DAY_S),
)
"""Distances of labels on the time axis, s."""
_MAX_LABELS = 6
_ROUND = (1.0, 2.0, 2.5, 5.0, 10.0)


def ticks(largest: float, *, whole: bool = False, base: float = 10.0, top: float | None = None) -> tuple[float, ...]:
    """Return three to five round values from 0 to at least the largest value, evenly spaced.

    Args:
        largest: the largest value of the chart.
        whole: whether the values are counts, so that no tick is a fraction.
        base: 1024 for bytes, whose round numbers are multiples of powers of 1024.
        top: a fixed upper end, such as 1.0 for shares. The ticks then divide the range from 0 to `top` into four parts.
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


def time_labels(intervals: Sequence[Interval]) -> tuple[tuple[float, str], ...]:
    """Return at most six labels for round times (UTC) on the time axis: for each, its position, 0 to 1, and its text.

    Examples: ``14:03:20``, ``14:03``, and ``Nov 29`` for the beginning of a day.
    """
    if not intervals:
        return ()
    start, end = intervals[0].start, intervals[-1].end
    span = end - start
    if span <= 0:
        return ()
    every = next((each for each in _EVERY_S if span / each <= _MAX_LABELS), _EVERY_S[-1])
    first = math.ceil(start / every) * every
    return tuple(((at - start) / span, _time_text(at, every)) for at in range(first, math.floor(end) + 1, every))


def _time_text(seconds: int, every: int) -> str:
    at = datetime.fromtimestamp(seconds, UTC)
    if seconds % _DAY_S == 0:
        return f"{at:%b} {at.day}"
    return f"{at:%H:%M}" if every >= _MINUTE_S else f"{at:%H:%M:%S}"


def step_text(interval: Interval) -> str:
    """Return a step in words: ``Nov 29 14:03:00 to 14:04:00 UTC``."""
    start, end = (datetime.fromtimestamp(round(each), UTC) for each in (interval.start, interval.end))
    until = f"{end:%H:%M:%S}" if start.date() == end.date() else f"{end:%b} {end.day} {end:%H:%M:%S}"
    return f"{start:%b} {start.day} {start:%H:%M:%S} to {until} UTC"
