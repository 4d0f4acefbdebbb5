"""Runs background refreshes: on a few threads for blocking callers, as tasks for asyncio.

A refresh that is a task ends when its event loop ends. The loop may end with the request that runs on it, as with
`asyncio.run` in a synchronous web view. After a refresh was cut off in this way, the next asyncio caller of the key
refreshes the value in the foreground, so that the refresh is completed.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, TypeAlias

from agentperf_redis.backend import Backend
from agentperf_redis.background import register_for_fork, starter
from agentperf_redis.cache.process.shared_state import log
from agentperf_redis.command import running_loop

MAX_THREADS: Final = 4
"""Maximum number of functions that run at the same time for blocking callers. With one thread, a slow function would
delay all others."""
MAX_WAITING: Final = 256
"""Maximum number of refreshes that wait for a thread. Further refreshes are left to the next reader."""
_PAUSE_S = 0.25
"""Minimum time between two attempts of this process to refresh a key, even if the first attempt did nothing."""
_MAX_CUT_OFF = 4096
"""Maximum number of keys in `_cut_off`. It limits the memory: each key takes about 0.3 KB."""
_CLOSE_S = 0.5
"""How long closing waits for running functions. If a function runs longer, its lease expires."""

Subject: TypeAlias = tuple[str, str]
"""A cache and a key."""


class Refresher:
    """Runs refreshes, at most one at a time for each key. Threads start when there is work, and end when there is none.

    This class does not use `Background`, which runs one job after the other. Here, several threads take the user
    functions from one queue.

    Args:
        backend: the refresher closes when this backend closes.
    """

    def __init__(self, backend: Backend) -> None:
        self._start_empty()
        backend.on_close(self._finish)
        register_for_fork(self)

    def _start_empty(self) -> None:
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._jobs: deque[tuple[Subject, Callable[[], object]]] = deque()
        self._taken: dict[Subject, float] = {}
        """Keys that were refreshed recently -> the end of their pause; keys that are being refreshed -> infinity."""
        self._threads = 0
        self._tasks: dict[asyncio.Task[Any], Subject] = {}
        self._cut_off: dict[Subject, None] = {}
        """Keys whose last refresh was cut off by the end of its event loop, the oldest first."""
        self._closed = False

    def submit(self, subject: Subject, job: Callable[[], object]) -> None:
        """Run `job` on a thread soon, in a copy of the caller's context, unless the key is being refreshed already."""
        self._drop_stopped_loops()
        with self._lock:
            self._cut_off.pop(subject, None)
            if len(self._jobs) >= MAX_WAITING or not self._take(subject):
                return
            context = contextvars.copy_context()
            start = starter(threading.Thread(target=self._work, name="agentperf-refresh", daemon=True), self._work)
            self._jobs.append((subject, lambda: context.run(job)))
            if self._threads < MAX_THREADS:
                try:
                    self._threads += 1  # no signal handler runs between this line and the next call
                    start_new_thread(start, ())
                except RuntimeError:  # no thread can start: a running thread takes the job, or a later read retries
                    self._threads -= 1
                    if not self._threads:
                        self._jobs.clear()
                        self._taken.pop(subject, None)

    def spawn(self, subject: Subject, make: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Run a coroutine as a task of the running loop, unless the key is being refreshed already."""
        self._drop_stopped_loops()
        with self._lock:
            if not self._take(subject):
                return
        task = asyncio.get_running_loop().create_task(make(), name="agentperf-refresh")
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001  no log if the loop ends first
        with self._lock:  # callers on other threads iterate over the tasks
            self._tasks[task] = subject  # the loop holds only weak references to tasks

        def ended(_: object) -> None:
            with self._lock:
                known = self._tasks.pop(task, None) is not None
                self._idle.notify_all()
            if known:
                self.leave(subject, cut_off=task.cancelled())

        task.add_done_callback(ended)

    def enter(self, subject: Subject) -> bool:
        """Return whether the calling asyncio task should refresh a key itself and then call `leave`.

        The result is True if the end of an event loop has cut off the latest refresh of the key, and no other refresh
        of the key is running.
        """
        if not (self._cut_off or self._tasks):
            return False
        self._drop_stopped_loops()
        with self._lock:
            return subject in self._cut_off and self._take(subject)

    def leave(self, subject: Subject, *, cut_off: bool = False) -> None:
        """Record the end of a refresh, and whether it was cut off by the end of its event loop."""
        with self._lock:
            self._taken[subject] = time.monotonic() + (0.0 if cut_off else _PAUSE_S)
            self._cut_off.pop(subject, None)
            if cut_off:
                self._note_cut_off(subject)

    def _note_cut_off(self, subject: Subject) -> None:
        self._cut_off[subject] = None
        if len(self._cut_off) > _MAX_CUT_OFF:
            del self._cut_off[next(iter(self._cut_off))]

    def _drop_stopped_loops(self) -> None:
        """Give up refreshes whose loop was stopped or closed. Otherwise the keys could not be refreshed again."""
        if not self._tasks:
            return
        with self._lock:
            dropped = [task for task in self._tasks if not task.get_loop().is_running()]
            for task in dropped:
                subject = self._tasks.pop(task)
                self._taken.pop(subject, None)
                self._note_cut_off(subject)
        for task in dropped:
            if task.get_loop().is_closed():
                with suppress(RuntimeError):  # raised if the coroutine ignores GeneratorExit; nothing can resume it
                    task.get_coro().close()

    def _take(self, subject: Subject) -> bool:
        now = time.monotonic()
        if self._closed or self._taken.get(subject, 0.0) > now:
            return False
        if len(self._taken) > 2 * MAX_WAITING:
            self._taken = {other: until for other, until in self._taken.items() if until > now}
        self._taken[subject] = float("inf")
        return True

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._threads -= 1
                    self._idle.notify_all()
                    return
                subject, job = self._jobs.popleft()
            try:
                job()
            except BaseException:  # noqa: BLE001  even SystemExit of a user's function must not end the thread
                log.exception("caches: a refresh failed")
            finally:
                self.leave(subject)

    def _finish(self) -> None:
        """Before the connections close: start no further refreshes, cancel tasks, and let short functions finish."""
        here = running_loop()
        with self._lock:
            self._closed = True
            self._jobs.clear()
            # This call blocks the loop `here`. So it must not wait for the tasks of this loop.
            elsewhere = [task for task in self._tasks if task.get_loop() is not here]
            for task in self._tasks:
                if not task.get_loop().is_closed():
                    task.get_loop().call_soon_threadsafe(task.cancel)
            self._idle.wait_for(lambda: not self._threads and all(task.done() for task in elsewhere), _CLOSE_S)

    def after_fork(self) -> None:
        """In the child: start empty, since threads and tasks stay in the parent."""
        self._start_empty()
