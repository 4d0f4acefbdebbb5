"""Times on the command line: windows and their ends, and ages."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from agentperf_redis.cli.console import WrongUsage
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.views.text import age_text as age_text  # noqa: PLC0414  other modules import it from here
from agentperf_redis.windows import window_seconds

_AGO = re.compile(r"(\S+) +ago")
_END_ALLOWED = (
    "a time such as 2026-11-29T15:00 or 2026-11-29T15:00+01:00 (local time without a zone), seconds since 1970, or "
    "a text such as '2h ago'"
)


def parsed_window(window: str | None) -> str | float | None:
    """Convert a window from the command line: a number without a unit becomes a float of seconds."""
    if window is None:
        return None
    try:
        return float(window)
    except ValueError:
        return window


def window_text(window: str | None, as_of: str | None = None) -> str:
    """Return a window in words: ``all time``, ``the last 5m``, ``the 5m until 2026-11-29T15:00``."""
    if window is None:
        return "all time"
    length = window if isinstance(parsed_window(window), str) else f"{window} s"
    return f"the last {length}" if as_of is None else f"the {length} until {as_of}"


def asked_end(text: str | None, window: str | None, option: str = "--as-of") -> datetime | float | None:
    """Convert the end of a window from the command line.

    Raises:
        InvalidArgument: the text has none of the allowed forms.
        WrongUsage: there is no window.
    """
    if text is None:
        return None
    if window is None:
        raise WrongUsage(f"give --window with {option}: the counts of all time have no history")
    ago = _AGO.fullmatch(text.strip())
    try:
        if ago is not None:
            return datetime.now(UTC) - timedelta(seconds=window_seconds(ago[1]))
        return float(text)
    except InvalidArgument:
        raise InvalidArgument(option, text, _END_ALLOWED) from None
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise InvalidArgument(option, text, _END_ALLOWED) from None
