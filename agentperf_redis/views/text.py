"""Writes numbers, times and names for people, in the same way on every screen."""

from __future__ import annotations

_SHORT_S = 0.01
"""Three decimals of a duration below this many seconds have at most one significant digit."""
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86_400


def printable(text: str) -> str:
    """Return text with control characters and line ends escaped. The --json output uses the original text."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode() for each in text
    )


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return ``1 task`` or ``2 tasks``. Nouns whose plural does not end in a plain s need `plural`."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def seconds_cell(seconds: float) -> str:
    """Return a duration for a column of seconds.

    A duration below 10 ms is rounded to 1 µs, because durations are exact to 1 µs. Other durations are rounded to 1 ms.
    """
    return f"{seconds:.6f}" if 0 < seconds < _SHORT_S else f"{seconds:.3f}"


def duration(seconds: float) -> str:
    """Return a duration with its unit: ``12.500 s``, ``3.25 ms``, ``40 µs``."""
    if not 0 < seconds < _SHORT_S:
        return f"{seconds:.3f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"  # noqa: PLR2004


def age_text(seconds: float) -> str:
    """Return an age in its largest unit: ``now``, ``12 s ago``, ``3 min ago``, ``5 h ago``, ``2 d ago``."""
    return "now" if seconds < 1 else f"{length_of_time(seconds)} ago"


def length_of_time(seconds: float) -> str:
    """Return a length of time in its largest unit: ``12 s``, ``3 min``, ``5 h``, ``2 d``."""
    for unit_s, unit in ((_DAY_S, "d"), (_HOUR_S, "h"), (_MINUTE_S, "min")):
        if seconds >= unit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds:.0f} s"


def short_number(number: float) -> str:
    """Return a number in few characters: ``950``, ``12.3k``, ``4.56M``, ``0.125``."""
    for unit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= max(unit, _FIRST_SCALED):
            return _three_digits(number / unit) + suffix
    return f"{number:.0f}" if number == int(number) or abs(number) >= 1000 else _three_digits(number)  # noqa: PLR2004


_FIRST_SCALED = 10_000


def _three_digits(number: float) -> str:
    return f"{number:.0f}" if abs(number) >= 99.95 else f"{number:.3g}"  # noqa: PLR2004  .3g would write 999.6 as 1e+03


def size_text(count: float) -> str:
    """Return a number of bytes with its unit: ``512 B``, ``3.4 KiB``, ``1.2 GiB``."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"
