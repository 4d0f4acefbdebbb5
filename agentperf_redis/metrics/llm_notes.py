"""Counts usages without token counts and usages with an inconsistent total, and logs each kind of response once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from itertools import islice

_log = logging.getLogger("agentperf_redis")

_MAX_KINDS = 100
_NAMES_SHOWN = 8
_NAME_CHARACTERS = 40


class UsageNotes:
    """Counts the usages of this process that have a certain problem, and logs each kind of response once.

    Args:
        message: the text that is logged once for each kind of response; ``%s`` stands for the kind.
    """

    def __init__(self, message: str) -> None:
        self.count = 0
        self._message = message
        self._logged: set[str] = set()
        self._lock = threading.RLock()  # reentrant: a signal handler may record while this thread holds the lock

    def note(self, response: object) -> None:
        """Count a usage, and log each kind of response once."""
        kind = _kind(response)
        with self._lock:
            self.count += 1
            if kind in self._logged or len(self._logged) >= _MAX_KINDS:
                return
            self._logged.add(kind)
        _log.warning(self._message, kind)

    def add(self, count: int) -> None:
        """Add a number to the count without logging; -1 removes one usage."""
        with self._lock:
            self.count += count


def unread_usages() -> UsageNotes:
    """Return a counter of usages without token counts. Their calls are counted, their tokens are not."""
    return UsageNotes("record_llm found no token counts in usage=<%s>: such calls are counted without tokens")


def inconsistent_usages() -> UsageNotes:
    """Return a counter of usages whose total differs from the sum of their parts in every reading of `llm_shapes`."""
    return UsageNotes(
        "record_llm found a total in usage=<%s> that is not input plus output: the parts are counted unchanged"
    )


def _kind(response: object) -> str:
    """Describe a response without its content: by its type and, for a mapping, by its keys."""
    try:
        cls = type(response)
        name = f"{cls.__module__}.{cls.__qualname__}".removeprefix("builtins.")
        if not issubclass(cls, Mapping):
            return name
        shown = islice(response, _NAMES_SHOWN)  # type: ignore[call-overload]  # a Mapping
        names = sorted(
            str.__str__(key)[:_NAME_CHARACTERS] if isinstance(key, str) else type(key).__name__ for key in shown
        )
        return f"{name} with {', '.join(names) or 'nothing'}"
    except Exception:  # noqa: BLE001  any access may raise
        return "an object that cannot be described"
