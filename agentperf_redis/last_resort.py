"""Shows outages and internal errors in programs that configure no logging.

Without these warnings, an outage could stay unnoticed: recording metrics never raises, and caches compute without the
server.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from typing import Final

from agentperf_redis.errors import BackendUnavailable

LOGGER: Final = "agentperf_redis"
"""The name of the one logger of the library."""
OUTAGE: Final = {"outage": True}
"""`extra=` of a log record about a server that does not answer. All records with it count as one subject."""
REPEAT_AFTER_S: Final = 3600.0
"""A subject is shown again only after this many seconds, even if the server has recovered in the meantime. So an
unstable network cannot fill the log of a process that runs for weeks."""


class LastResort(logging.Handler):
    """A handler that shows records as a `RuntimeWarning`, if no other handler would receive them.

    It shows errors, and warnings about an outage. All records about an outage form one subject. Errors whose messages
    differ only in their arguments form one subject. A subject is shown at most once an hour, however many calls and
    threads report it.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._shown_at: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record, unless the program handles it or its subject was shown less than an hour ago."""
        outage = _is_outage(record)
        if not (outage or record.levelno >= logging.ERROR) or self._handled_elsewhere(record):
            return
        subject, now = "outage" if outage else str(record.msg), time.monotonic()
        if now - self._shown_at.get(subject, -math.inf) < REPEAT_AFTER_S:
            return
        self._shown_at[subject] = now
        text = (
            f"agentperf_redis: {record.getMessage()} (shown at most once an hour, since no handler is configured for "
            f"the logger {LOGGER!r})"
        )
        try:
            warnings.warn_explicit(text, RuntimeWarning, record.pathname, record.lineno)
        except RuntimeWarning:  # warnings are errors in this program, but a log record must not make a call fail
            if logging.lastResort is not None:
                logging.lastResort.handle(record)

    def _handled_elsewhere(self, record: logging.LogRecord) -> bool:
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(each is not self and not isinstance(each, logging.NullHandler) for each in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False


def _is_outage(record: logging.LogRecord) -> bool:
    args = record.args if isinstance(record.args, tuple) else ()
    return getattr(record, "outage", False) or any(isinstance(each, BackendUnavailable) for each in args)
