"""Runs the callbacks of the services when their backend closes, even if a signal interrupts some of them."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable

from agentperf_redis.background import runs_jobs

_log = logging.getLogger("agentperf_redis")

_OTHER_CLOSE_S = 30.0
"""How long a thread waits for the callbacks that another thread runs, s. The callbacks usually take milliseconds, and a
few seconds if the server does not reply. This limit matters only if both threads wait for each other."""


class CloseCallbacks:
    """The callbacks that run before the connections of a backend close. The newest callback runs first.

    A callback that `SystemExit` or `KeyboardInterrupt` interrupts is called again by the next `run`, so a second call
    must continue where the first one ended.

    Args:
        owner: the name of the backend in log messages.
        lock: the lock of the backend. While another thread creates a service under it, the callbacks wait.
    """

    def __init__(self, owner: str, lock: threading.RLock) -> None:
        self._owner = owner
        self._callbacks: list[Callable[[], None]] = []
        self._ran = False
        self.after_fork(lock)

    def after_fork(self, lock: threading.RLock) -> None:
        """In a forked child: replace the locks, because another thread of the parent may have held them.

        If the child was forked inside a callback, its own `run` calls this callback again.
        """
        self._lock = lock
        self._running = threading.RLock()
        self._in_callback = False

    def add(self, callback: Callable[[], None]) -> None:
        """Call `callback` on closing. If all callbacks have already run, call it at once."""
        with self._lock:
            late = self._ran
            if not late:
                self._callbacks.append(callback)
        if late:
            callback()

    def remove(self, callback: Callable[[], None]) -> None:
        """Remove a callback. Does nothing if the callback is not registered or was called already."""
        with contextlib.suppress(ValueError):
            self._callbacks.remove(callback)

    def run(self) -> bool:
        """Run the callbacks, one after another. If another thread does so already, wait for it.

        Returns:
            False if another call goes on with the callbacks. There are three cases. First, the current call is made
            inside a callback, usually by a signal handler that interrupted it. If the handler raises `SystemExit`, the
            next call continues with this callback, at the latest the call at exit. Second, a background job made the
            current call while another thread, which may wait for this job, runs the callbacks. Third, the wait reached
            its limit.
        """
        running = self._running  # a child that is forked in a callback has another one
        locked = running.acquire(timeout=0.0 if runs_jobs() else _OTHER_CLOSE_S)
        try:
            if not locked or self._in_callback:
                return False
            while True:
                with self._lock:
                    callback = self._callbacks[-1] if self._callbacks else None
                    self._ran = callback is None
                if callback is None:
                    return True
                self._in_callback = True
                try:
                    callback()
                except Exception:  # noqa: BLE001  the other services must still flush
                    _log.exception("closing %s: the close callback of a service failed", self._owner)
                finally:
                    self._in_callback = False
                self.remove(callback)  # only now, so that the next call continues an interrupted callback
        finally:
            if locked:
                running.release()
