"""Windows and timestamps in the public API.

A timestamp has one of three forms:

- a datetime with a zone;
- a datetime without a zone: local time, as from ``datetime.now()``. Results have this form too (`last_execution`,
  `Execution.ended`), as in the in-memory version. In an hour that a clock change repeats, ``datetime.fold`` says which
  of the two hours is meant;
- a number: seconds since 1970, as from ``time.time()`` and in `Interval`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

from agentperf_redis import arguments
from agentperf_redis.errors import InvalidArgument

Window = str | float | None
Timestamp = datetime | float | None

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_WINDOW_ALLOWED = 'None, seconds, or a text such as "30s", "5m", "1h", "3d"'
_TIMESTAMP_ALLOWED = "None, a datetime (local time when it has no zone), or seconds since 1970; between 1970 and 9999"
LAST_MS = 253_402_300_799_000
"""The end of the year 9999, ms since 1970. It is the last year that datetimes and the names of slices can express."""


MAX_STEPS = 2000
"""Maximum number of steps in a window. Reading this many steps of one agent takes about 20 ms of server time."""
NARROWEST_MS = 10_000
"""Width of the narrowest slices, ms."""


@dataclass(frozen=True, slots=True)
class Interval:
    """The time range of a result. It consists of whole slices, so it may be slightly longer than the window.

    Attributes:
        start: start of the range (inclusive), s since 1970 by the server's clock.
        end: end of the range (exclusive), s since 1970 by the server's clock.
    """

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Length of the range, s."""
        return max(0.0, self.end - self.start)


@dataclass(frozen=True, slots=True)
class TimeRange:
    """A checked time range.

    Attributes:
        window_ms: length of the range, ms; 0 for all time.
        as_of_ms: end of the range, ms since 1970; -1 for now.
    """

    window_ms: int = 0
    as_of_ms: int = -1


ALL_TIME = TimeRange()


def asked_time(window: Window, as_of: Timestamp, *, names: tuple[str, str] = ("window", "as_of")) -> TimeRange:
    """Check a window and the timestamp of its end.

    Args:
        window: length of the window.
        as_of: end of the window.
        names: names of these two arguments in the public call, for error messages.

    Raises:
        InvalidArgument: for an invalid window or timestamp, and for `as_of` without a window.
    """
    if window is None:
        if as_of is not None:
            raise InvalidArgument(names[1], as_of, "None without a window: all-time counts have no history")
        return ALL_TIME
    return TimeRange(
        round(window_seconds(window, names[0]) * 1000), -1 if as_of is None else timestamp_ms(names[1], as_of)
    )


def asked_steps(window: Window, step: Window, as_of: Timestamp) -> tuple[TimeRange, int]:
    """Check a window and the length of its steps.

    Returns:
        The window, and the length of a step in ms.

    Raises:
        InvalidArgument: if a value is invalid; if the window or the step is missing; if the step is no multiple of ten
            seconds, or is longer than the window; if the window has more than `MAX_STEPS` steps.
    """
    if window is None:
        raise InvalidArgument("window", window, "a length such as 3600 or '1h': all-time counts have no steps")
    time = asked_time(window, as_of)
    if step is None:
        raise InvalidArgument("step", step, "a length such as 60 or '1m'")
    step_ms = round(window_seconds(step, "step") * 1000)
    if step_ms % NARROWEST_MS:
        raise InvalidArgument("step", step, "a multiple of 10 seconds, the width of the narrowest slices")
    if step_ms > time.window_ms:
        raise InvalidArgument("step", step, f"at most the window, {length_text(time.window_ms)}")
    if time.window_ms > MAX_STEPS * step_ms:
        at_least = length_text(math.ceil(time.window_ms / MAX_STEPS / NARROWEST_MS) * NARROWEST_MS)
        raise InvalidArgument("step", step, f"at least {at_least}: a window has at most {MAX_STEPS} steps")
    return time, step_ms


def step_too_narrow(step_ms: int, needed_ms: int) -> InvalidArgument:
    """Return the error for a step that needs narrower slices than those kept for a part of the window."""
    needed = length_text(needed_ms)
    allowed = f"a multiple of {needed} for this window: narrower slices are not kept for so long"
    return InvalidArgument("step", length_text(step_ms), allowed)


def window_seconds(window: str | float, argument: str = "window") -> float:
    """Convert ``"5m"`` or a number of seconds to seconds."""
    number: object = window
    scale = 1.0
    if isinstance(window, str):
        scale = _UNITS.get(window[-1:], 0.0)
        digits = window[:-1]
        if not scale or not digits.isascii() or not digits.replace(".", "", 1).isdigit():
            raise InvalidArgument(argument, window, _WINDOW_ALLOWED)
        number = float(digits)
    length = arguments.number(argument, number, _WINDOW_ALLOWED) * scale
    if not 1.0 <= length <= arguments.MAX_SECONDS:
        raise InvalidArgument(argument, window, "one second to ten years")
    return length


def length_text(ms: int) -> str:
    """Return a length of time in the form of `Window`, such as ``"90s"``, ``"5m"`` or ``"1h"``."""
    for unit, scale in reversed(_UNITS.items()):
        if ms % (scale * 1000) == 0:
            return f"{ms // (scale * 1000):.0f}{unit}"
    return f"{ms / 1000:g}s"


def timestamp_ms(argument: str, given: object) -> int:
    """Convert a timestamp to milliseconds since 1970. The timestamp is a datetime or a number of seconds since 1970.

    Raises:
        InvalidArgument: for any other value, such as a date, a text or milliseconds, and for a time before
            1970 or after 9999.
    """
    try:
        seconds = given.timestamp() if isinstance(given, datetime) else None
    except Exception:  # noqa: BLE001  near the years 1 and 9999, a zone's offset may leave the calendar; some zones are faulty
        raise InvalidArgument(argument, given, _TIMESTAMP_ALLOWED) from None
    if seconds is None:
        seconds = arguments.number(argument, given, _TIMESTAMP_ALLOWED)
    if not 0.0 <= seconds * 1000 <= LAST_MS:
        raise InvalidArgument(argument, given, _TIMESTAMP_ALLOWED)
    return round(seconds * 1000)


def local_timestamp(ms: int) -> datetime:
    """Convert the server's milliseconds to local time without a zone, as from ``datetime.now()``."""
    return datetime.fromtimestamp(ms / 1000)  # noqa: DTZ006  naive local time, as in the in-memory version
