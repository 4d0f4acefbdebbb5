"""Numbers and times as text, each with its unit."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from markupsafe import Markup, escape

from agentperf_redis.views.text import age_text, printable, size_text

NONE = "–"
"""Stands for a value that is not known or does not exist."""

_MINUTE_S, _HOUR_S, _DAY_S = 60.0, 3600.0, 86_400.0
_MILLION = 1e6
_WHOLE = 1e-9


def duration(seconds: float | None) -> str:
    """Return a duration: ``40 µs``, ``820 ms``, ``2.10 s``, ``3 min 20 s``, ``2 h 5 min``, ``3 d 4 h``."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    if seconds < 0:
        return f"-{duration(-seconds)}"
    if seconds < 59.95:  # noqa: PLR2004  59.95 s and more would be shown as 60.0 s
        if seconds == 0:
            return "0 s"
        if seconds < 0.9995e-3:  # noqa: PLR2004
            return f"{_significant(seconds * 1e6)} µs"
        return f"{_significant(seconds * 1e3)} ms" if seconds < 0.9995 else f"{_significant(seconds)} s"  # noqa: PLR2004
    if seconds < _HOUR_S - 0.5:
        return _two(round(seconds), 60, "min", "s")
    if seconds < _DAY_S - 30:
        return _two(round(seconds / _MINUTE_S), 60, "h", "min")
    return _two(round(seconds / _HOUR_S), 24, "d", "h")


def _two(whole: int, per: int, large: str, small: str) -> str:
    first, rest = divmod(whole, per)
    return f"{first:,} {large}" + (f" {rest} {small}" if rest else "")


def _significant(number: float) -> str:
    """Return a number below 1,000 with three significant digits."""
    if number >= 99.95:  # noqa: PLR2004
        return f"{number:.0f}"
    return f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"  # noqa: PLR2004


def number(value: float | None) -> str:
    """Return a count: ``1,234``, ``12.3 M``, ``4.56 G``; a mean such as ``2.5``."""
    if value is None or not math.isfinite(value):
        return NONE
    if abs(value) < _MILLION:
        return f"{value:,.0f}" if abs(value - round(value)) < _WHOLE else f"{value:,.1f}"
    for unit, size in (("M", 1e6), ("G", 1e9), ("T", 1e12)):
        if abs(value) < 999.5 * size or unit == "T":
            return f"{_significant(value / size)} {unit}"
    raise AssertionError(value)


def rate(per_second: float | None) -> str:
    """Return how often something happens: ``12.3/s``, ``4.2/min``, ``3.0/h``."""
    if per_second is None or not math.isfinite(per_second):
        return NONE
    if per_second == 0:
        return "0/s"
    if per_second >= 0.995:  # noqa: PLR2004
        return f"{number(round(per_second)) if per_second >= 999.5 else _significant(per_second)}/s"  # noqa: PLR2004
    if per_second * _MINUTE_S >= 0.995:  # noqa: PLR2004
        return f"{_significant(per_second * _MINUTE_S)}/min"
    return f"{_significant(per_second * _HOUR_S)}/h"


def share(value: float | None) -> str:
    """Return a share as a percentage: ``99.2%``. Only 1 is ``100%``, and only 0 is ``0%``."""
    if value is None or not math.isfinite(value):
        return NONE
    if value in (0.0, 1.0):
        return f"{value:.0%}"
    text = f"{value:.1%}"
    if text == "100.0%":
        return "99.99%" if value < 0.9999 else ">99.99%"  # noqa: PLR2004
    return "<0.1%" if text == "0.0%" else text


def size(count: float | None) -> str:
    """Return a number of bytes: ``512 B``, ``1.2 MiB``."""
    return NONE if count is None or not math.isfinite(count) else size_text(count)


def cost(value: float | None) -> str:
    """Return a cost in the unit in which it was recorded: ``12.35``, ``0.00042``."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    return f"{value:,.2f}" if abs(value) >= 0.995 else f"{value:.2g}"  # noqa: PLR2004


def times(ratio: float | None) -> str:
    """Format the ratio of a value to its earlier value: ``2.1×``; ``new`` if the earlier value was zero."""
    if ratio is None or not math.isfinite(ratio):
        return "new"
    return f"{ratio:.0f}×" if ratio >= 9.95 else f"{ratio:.2f}×" if ratio < 0.095 else f"{ratio:.1f}×"  # noqa: PLR2004


def ago(seconds: float | None) -> str:
    """Return an age in its largest unit: ``now``, ``12 s ago``, ``3 min ago``, ``5 h ago``, ``2 d ago``."""
    return NONE if seconds is None or not math.isfinite(seconds) else age_text(seconds)


def moment(at: datetime | float | None) -> Markup:
    """Return a point in time as HTML, in UTC and with its zone.

    Args:
        at: a datetime (local time without a zone), or seconds since 1970.
    """
    when = _utc(at)
    if when is None:
        return escape(NONE)
    text = f"{when:%b} {when.day} {when:%H:%M:%S} UTC"
    return Markup('<time datetime="{}">{}</time>').format(when.isoformat(timespec="seconds"), text)


def clock(at: datetime | float | None) -> Markup:
    """Return the time of day as HTML, in UTC and with its zone."""
    when = _utc(at)
    if when is None:
        return escape(NONE)
    return Markup('<time datetime="{}">{}</time>').format(when.isoformat(timespec="seconds"), f"{when:%H:%M:%S} UTC")


def _utc(at: datetime | float | None) -> datetime | None:
    if at is None:
        return None
    return at.astimezone(UTC) if isinstance(at, datetime) else datetime.fromtimestamp(at, UTC)


def plural(count: int, noun: str, many: str | None = None) -> str:
    """Return ``1 task`` or ``2 tasks``. Nouns whose plural does not end in a plain s need `many`."""
    return f"{number(count)} {noun if count == 1 else many or noun + 's'}"


def visible(name: str) -> str:
    """Return a name with its control characters escaped; ``(empty)`` for an empty name."""
    return printable(name) if name else "(empty)"


def breakable(name: str) -> Markup:
    """Return a name as HTML that may be broken after a separator, so that a long one fits a narrow screen."""
    text = str(escape(visible(name)))  # escaped characters, such as &#39;, contain no separator
    for separator in ("/", "_", "-", ".", ":"):
        text = text.replace(separator, f"{separator}<wbr>")
    return Markup(text)  # noqa: S704  escaped above
