"""Limits concurrent exchanges by permits. A permit becomes free even if a signal interrupts its holder."""

from __future__ import annotations

import time
import weakref
from _thread import allocate_lock
from contextlib import suppress
from typing import Final

_POLL_S: Final = 0.005
"""Poll interval of a waiter. A wake-up usually comes earlier, but two waiters may compete for one wake-up."""


class Permit:
    """A permit in use. It becomes free with `Permits.release`, or when this object is garbage-collected."""

    __slots__ = ("__weakref__", "reference")

    reference: weakref.ref[Permit]


class Permits:
    """A bounded number of permits, for the threads of a process.

    A signal handler may raise an exception, such as a soft time limit, at any point in the code of a holder. A counter
    that the holder must decrement could therefore stay too high. Instead, a permit is in use until it is released or
    its object no longer exists. The end of the object is recorded by C code (a weak reference with the callback
    `set.discard`), which no signal interrupts. A semaphore is unsuitable for the same reason: an interrupted thread
    could leave the lock of the semaphore held.

    Args:
        count: number of permits.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._in_use: set[weakref.ref[Permit]] = set()
        # A release of this lock wakes one waiter, which acquires the lock again. So the lock is held unless a wake-up
        # is pending. A `SimpleQueue` is unsuitable: with several waiters, `get` may ignore its timeout and block
        # forever (seen on CPython 3.11.7).
        self._freed = allocate_lock()
        self._freed.acquire()

    def qsize(self) -> int:
        """Return the number of free permits."""
        return max(0, self._count - len(self._in_use))

    def acquire(self, timeout_s: float) -> Permit | None:
        """Acquire a permit.

        Args:
            timeout_s: maximum time to wait, s.

        Returns:
            The permit, to pass to `release`; None if all permits stayed in use for `timeout_s`.
        """
        permit = Permit()
        permit.reference = reference = weakref.ref(permit, self._in_use.discard)
        end = 0.0
        while True:
            self._in_use.add(reference)  # before the check, so that two threads never both get the last permit
            if len(self._in_use) <= self._count:
                if end and len(self._in_use) < self._count:
                    self._wake_one()  # several permits may have been released with only one wake-up
                return permit
            self._in_use.discard(reference)
            now = time.monotonic()
            end = end or now + timeout_s
            if now >= end:
                return None
            self._freed.acquire(timeout=min(end - now, _POLL_S))

    def release(self, permit: Permit) -> None:
        """Release a permit."""
        full = len(self._in_use) >= self._count
        self._in_use.discard(permit.reference)
        if full:
            self._wake_one()

    def _wake_one(self) -> None:
        with suppress(RuntimeError):  # a wake-up is pending already
            self._freed.release()
