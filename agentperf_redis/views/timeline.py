"""The windows that screens offer, and the steps of their charts."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import TypeVar

from agentperf_redis.command import Flow
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.windows import Timestamp, asked_time, window_seconds

T = TypeVar("T")

WINDOWS = ("5m", "10m", "1h", "2h", "24h", "7d")
"""The windows that screens offer. Any other window works too. For an offered window, slices narrow enough for a
detailed chart are kept a little longer than the window lasts."""
DEFAULT_WINDOW = "10m"
CHART_STEPS = 60
"""Maximum number of steps of a chart."""
SPARKLINE_STEPS = 30
"""Maximum number of steps of a sparkline."""
MAX_HISTORIES = 25
"""Maximum number of histories of caches or pools in one view. Each has up to 25 kB."""

_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86_400
_STEPS_S = (
    *(10, 20, 30, 60, 120, 300, 600, 900, 1800),
    *(_HOUR_S, 2 * _HOUR_S, 4 * _HOUR_S, 6 * _HOUR_S, 12 * _HOUR_S),
    *(_DAY_S, 2 * _DAY_S, 7 * _DAY_S, 30 * _DAY_S),
)
"""Lengths of steps that people read easily. Each is a multiple of a width of slices."""
_KEPT = ((15 * _MINUTE_S, 10), (3 * _HOUR_S, _MINUTE_S), (8 * _DAY_S, _HOUR_S))
"""Age up to which slices are kept by default, and their width, s. Older slices are a day wide."""


def check_window(window: object, as_of: Timestamp) -> None:
    """Check a window and its end. Unlike other reads, a screen needs a window, because a chart needs steps in time.

    Raises:
        InvalidArgument: if the window is invalid or None, or if the end is invalid.
    """
    if window is None:
        raise InvalidArgument("window", window, 'a length such as 600 or "10m"')
    asked_time(window, as_of)  # type: ignore[arg-type]  # `asked_time` checks the type


def step_choices(window: str | float, as_of: Timestamp, most: int) -> list[int]:
    """Return the lengths of steps, in s, that a chart of a window may have, the best length first.

    Args:
        window: length of the window.
        as_of: end of the window; None for now.
        most: maximum number of steps.

    Raises:
        InvalidArgument: for an invalid window.
    """
    length = window_seconds(window)
    end = as_of.timestamp() if isinstance(as_of, datetime) else as_of
    age = length + (max(0.0, time.time() - end) if end is not None else 0.0)
    kept = [step for step in _STEPS_S if step <= length and _is_kept(step, age)]
    return [step for step in kept if length <= most * step] or kept[-1:]


def _is_kept(step: int, age: float) -> bool:
    """Whether the server keeps slices for such steps, even if the first step begins a whole step before the window.

    Without this margin, a chart that is read repeatedly would change its steps whenever its first slice expires.
    """
    return step % _DAY_S == 0 or any(step % width == 0 and age + step <= kept for kept, width in _KEPT)


def steps_read(read: Callable[[int], Flow[T]], empty: T, window: str | float, as_of: Timestamp, most: int) -> Flow[T]:
    """Read a chart with the narrowest steps that the server keeps for the whole window.

    Args:
        read: returns the flow that reads steps of a given length, s.
        empty: the result if the server keeps no such slices.
        window: length of the window.
        as_of: end of the window; None for now.
        most: maximum number of steps.
    """
    for step in step_choices(window, as_of, most):
        try:
            return (yield from read(step))
        except InvalidArgument as error:  # the namespace may keep slices of this step for less than the default time
            if error.argument != "step":
                raise
    return empty
