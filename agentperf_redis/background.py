"""One thread that does the background jobs of a service, and the one fork hook of the package.

Six mechanics that every service needs stand here once: the thread starts with the first job, sleeps until something is
due, outlives whatever a job raises, does what is left when it is closed, starts again for a job that comes later, and
begins empty in a forked child.

A signal handler may raise anywhere on a caller's way, as it does for Ctrl-C, and `__del__` may run there. So callers
use C code alone: `SimpleQueue`, whose `put` may even interrupt itself, and a plain lock while they start the thread.
`threading.Condition` is Python code: an exception there may leave its lock held for good. `Thread.start` waits with
one, so a thread of no name calls it: signals are handled on the main thread only.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import threading
import time
import weakref
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from queue import Empty, SimpleQueue
from typing import Protocol, TypeAlias

_log = logging.getLogger("agentperf_redis")

Job: TypeAlias = Callable[[], object]


class Background:
    """Does jobs on one daemon thread, in the order in which they were put.

    Jobs with a due time go first once they are due, since a lease has to be renewed however many jobs wait.

    Args:
        name: of the thread.
        lingers: whether the thread sleeps while there is nothing to do; else it ends, and the next job starts another.
    """

    def __init__(self, name: str, *, lingers: bool = True) -> None:
        self._name = name
        self._lingers = lingers
        self.after_fork()
        register_for_fork(self)

    def after_fork(self) -> None:
        """In a forked child: the thread stayed with the parent, and its jobs are the parent's."""
        # Reentrant: `__del__` or a signal handler may put a job while this very thread holds it.
        self._starting = threading.RLock()
        self._inbox: SimpleQueue[tuple[float, Job] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._closers: deque[SimpleQueue[None]] = deque()
        # Only the thread changes what follows.
        self._identity = 0
        self._draining = False
        self._ready: deque[Job] = deque()
        self._due_times: dict[Job, float] = {}
        self._heap: list[tuple[float, int, Job]] = []
        self._numbers = itertools.count()

    @property
    def running(self) -> bool:
        """Whether the thread runs, or is being started."""
        return self._thread is not None

    @property
    def closing(self) -> bool:
        """Whether it was closed. A job that comes back at intervals has nothing more to do then."""
        return self._closing

    def put(self, job: Job) -> bool:
        """Have a job done soon. May be called from `__del__`, and from a signal handler.

        Returns:
            False when no thread can be started, as when the interpreter ends. The job waits for `close` then.
        """
        self._inbox.put((-math.inf, job))
        return self._thread is not None or self._start()

    def at(self, due: float, job: Job) -> bool:
        """Have a job done at a moment of `time.monotonic`. A job waits once, for the soonest time it was given.

        So a caller first notes what the job is to find, and then calls this: the job runs after that note.

        Returns:
            As `put`.
        """
        # Only the thread changes due times, after it took them from the inbox. So an interrupted call leaves no due
        # time behind that nothing in the heap stands for.
        if self._due_times.get(job, math.inf) <= due:
            return True
        if self._identity == threading.get_ident():
            if not self._draining:
                self._schedule(due, job)
            return True
        self._inbox.put((due, job))
        return self._thread is not None or self._start()

    def close(self, limit_s: float) -> bool:
        """Do what is left at once, once, and end the thread. May be called again, to wait longer.

        Jobs that are put meanwhile or later are still done, by another thread if need be. What a job schedules for
        itself while it is done here is dropped: it was tried a last time.

        Args:
            limit_s: how long to wait for that, s. What is not done by then goes on without a caller.

        Returns:
            Whether all is done.
        """
        self._closing = True
        if self._identity == threading.get_ident():  # a job closes; the rest follows it
            return False
        thread = self._thread
        if thread is None and self._inbox.empty():
            return True
        ended: SimpleQueue[None] = SimpleQueue()
        self._closers.append(ended)
        self._inbox.put(None)
        if self._thread is None and not self._start():
            self._drain(time.monotonic() + limit_s)  # the interpreter ends
            return True
        try:
            ended.get(timeout=limit_s)
        except Empty:
            return False
        if thread is not None and thread.is_alive():
            thread.join(limit_s)
        return True

    def _start(self) -> bool:
        thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        start = starter(thread, lambda: self._work(thread))
        with self._starting:
            if self._thread is None:
                self._thread = thread  # no signal is handled between this and the next call, which is C code
                try:
                    start_new_thread(start, ())
                except RuntimeError:
                    self._thread = None
                    return False
        return True

    # Everything below runs on the thread, or in `close` when there can be none.

    def _work(self, unnamed: threading.Thread | None = None) -> None:
        me = unnamed or threading.current_thread()
        while self._claims(me):
            while not self._closing and (self._lingers or self._ready or self._heap or not self._inbox.empty()):
                self._take(self._pause())
                self._run(self._due_jobs(time.monotonic()))
                if self._ready:
                    self._run((self._ready.popleft(),))
            if self._closing:
                self._drain(math.inf)
            self._identity = 0
            # A caller puts first and then looks for a thread; this does the reverse. So one of them sees the other.
            self._thread = None
        with contextlib.suppress(IndexError):
            while self._closing:
                self._closers.popleft().put(None)

    def _claims(self, me: threading.Thread) -> bool:
        """Whether this is the thread, at first, or because jobs came as it was ending."""
        with self._starting:
            if self._thread is None and not self._inbox.empty():
                self._thread = me
            if self._thread is not me:
                return False
            self._identity = threading.get_ident()
            return True

    def _pause(self) -> float | None:
        if self._ready:
            return 0.0
        if self._heap:
            return min(max(0.0, self._heap[0][0] - time.monotonic()), threading.TIMEOUT_MAX)
        return None

    def _take(self, pause: float | None) -> None:
        with contextlib.suppress(Empty):
            self._accept(self._inbox.get(timeout=pause))
            for _ in range(self._inbox.qsize()):  # no more: what is put meanwhile must not keep what is due waiting
                self._accept(self._inbox.get_nowait())

    def _accept(self, item: tuple[float, Job] | None) -> None:
        if item is None:
            return
        due, job = item
        if due == -math.inf:
            self._ready.append(job)
        else:
            self._schedule(due, job)

    def _schedule(self, due: float, job: Job) -> None:
        if due < self._due_times.get(job, math.inf):
            self._due_times[job] = due
            heappush(self._heap, (due, next(self._numbers), job))

    def _due_jobs(self, now: float) -> list[Job]:
        jobs = []
        while self._heap and self._heap[0][0] <= now:
            due, _, job = heappop(self._heap)
            if self._due_times.get(job) == due:  # else it had a sooner time, and is done
                del self._due_times[job]
                jobs.append(job)
        return jobs

    def _drain(self, until: float) -> None:
        self._identity = threading.get_ident()
        self._draining = True
        while self._heap or self._ready or not self._inbox.empty():
            self._take(0.0)
            jobs = [*self._due_jobs(math.inf), *self._ready]
            self._ready.clear()
            self._run(jobs, until)
        self._draining = False
        self._identity = 0

    def _run(self, jobs: Iterable[Job], until: float = math.inf) -> None:
        for job in jobs:
            if time.monotonic() > until:
                return
            try:
                job()
            except BaseException:  # noqa: BLE001  the thread serves other jobs, too; SystemExit of a user's is no reason
                _log.exception("%s: a background job failed", self._name)


def starter(thread: threading.Thread, otherwise: Callable[[], object]) -> Callable[[], None]:
    """Return a function that starts a thread, to be called by `start_new_thread`, which is C code.

    So the caller's thread does nothing that an exception from a signal handler could leave half done.

    Args:
        thread: to start.
        otherwise: what to do on the calling thread, which has no name, if there are too many threads for another.
    """

    def start() -> None:
        try:
            thread.start()
        except RuntimeError:  # there are too many threads, but here is one
            otherwise()

    return start


class Forkable(Protocol):
    """What a forked child has to make anew."""

    def after_fork(self) -> None:
        """In the child: forget what is the parent's, and replace locks that another thread may have held."""


_forkables: weakref.WeakValueDictionary[int, Forkable] = weakref.WeakValueDictionary()
_registrations = itertools.count()


def register_for_fork(forkable: Forkable) -> None:
    """Have `after_fork` called in each child that this process forks, for as long as the object lives.

    Children call it in the order of registration. So a backend, which is made before its services, has new connections
    and a new name of its process before a service begins anew.
    """
    _forkables[next(_registrations)] = forkable


def _after_fork_in_child() -> None:
    for forkable in list(_forkables.values()):
        try:
            forkable.after_fork()
        except Exception:  # noqa: BLE001  one service's trouble must not leave the locks of the next as they were
            _log.exception("after a fork: %r could not begin anew", forkable)


os.register_at_fork(after_in_child=_after_fork_in_child)


class ModuleLock:
    """A lock that belongs to a module: a forked child has a new one.

    Args:
        make: returns a lock.

    Attributes:
        lock: the lock. It is looked up each time, because a fork replaces it.
    """

    def __init__(self, make: Callable[[], contextlib.AbstractContextManager[bool]] = threading.Lock) -> None:
        self._make = make
        self.after_fork()
        register_for_fork(self)

    def after_fork(self) -> None:
        """In a forked child: another thread may have held it."""
        self.lock = self._make()
