"""Counts the usages that could not be read, or not be trusted, and says so in the log once for each kind of them."""

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
    """Counts usages of one sort in a process.

    Args:
        message: said in the log for each kind of response; ``%s`` is the kind.
    """

    def __init__(self, message: str) -> None:
        self.count = 0
        self._message = message
        self._said: set[str] = set()
        self._lock = threading.RLock()  # a signal handler may record while the thread it interrupts does

    def note(self, response: object) -> None:
        """Count it, and say so once for each kind of response."""
        kind = _kind(response)
        with self._lock:
            self.count += 1
            if kind in self._said or len(self._said) >= _MAX_KINDS:
                return
            self._said.add(kind)
        _log.warning(self._message, kind)

    def add(self, count: int) -> None:
        """Count without a word; -1 takes one back."""
        with self._lock:
            self.count += count


def unread_usages() -> UsageNotes:
    """Return the notes on usages without counts: the call is counted, its tokens cannot be."""
    return UsageNotes("record_llm found no token counts in usage=<%s>: such calls are counted without tokens")


def inconsistent_usages() -> UsageNotes:
    """Return the notes on usages with a total that no reading of their parts adds up to."""
    return UsageNotes(
        "record_llm found a total in usage=<%s> that is not input plus output: the parts are counted as they stand"
    )


def _kind(response: object) -> str:
    """Describe without telling any content: the type, and of a mapping the names in it."""
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
    except Exception:  # noqa: BLE001  it may do anything when it is looked at
        return "an object that cannot be described"
