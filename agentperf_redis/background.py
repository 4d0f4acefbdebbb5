"""A thread that runs the background jobs of a service, and the one fork hook of the package.

The background threads of all services follow the same rules. A thread starts with the first job, sleeps until the next
due time, and survives exceptions of jobs. When the service closes, the thread finishes the remaining jobs and ends; a
later job starts another thread. A forked child begins without jobs and without a thread.

A signal handler, such as that of Ctrl-C, may raise an exception at any point in the Python code of a caller. `__del__`
may also run at any point. Therefore the code on a caller's thread uses only primitives written in C: a `SimpleQueue`,
whose `put` is reentrant, and an `RLock` for starting the background thread. `threading.Condition` is Python code: an
exception in it may leave its lock held permanently. `Thread.start` waits on such a condition, so it is called on a
temporary thread. No signal handler runs there, because Python runs signal handlers on the main thread only.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
import weakref
from _thread import start_new_thread
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from functools import cache
from heapq import heappop, heappush
from queue import Empty, SimpleQueue
from types import BuiltinFunctionType, TracebackType
from typing import Protocol, Self, TypeAlias

_log = logging.getLogger("agentperf_redis")

Job: TypeAlias = Callable[[], object]


class _Here(threading.local):
    """Facts about the current thread."""

    runs_jobs = False


_here = _Here()


def runs_jobs() -> bool:
    """Whether the current thread is one that runs background jobs."""
    return _here.runs_jobs


class Background:
    """Runs jobs on one daemon thread, in the order of `put`.

    Once a job with a due time is due, it runs before all waiting jobs: a lease must be renewed even if many jobs wait.

    Args:
        name: the name of the thread.
        lingers: whether the idle thread sleeps until the next job. If not, the idle thread ends, and the next job
            starts another thread.
    """

    def __init__(self, name: str, *, lingers: bool = True) -> None:
        self._name = name
        self._lingers = lingers
        self.after_fork()
        register_for_fork(self)

    def after_fork(self) -> None:
        """In a forked child: start without jobs. The thread and its jobs belong to the parent."""
        # Reentrant: a signal handler or `__del__` may call `put` on the thread that holds this lock.
        self._starting = threading.RLock()
        self._inbox: SimpleQueue[tuple[float, Job] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._closers: deque[SimpleQueue[None]] = deque()
        # Only the thread that runs the jobs changes the attributes below.
        self._identity = 0
        self._draining = False
        self._ready: deque[Job] = deque()
        self._due_times: dict[Job, float] = {}
        self._heap: list[tuple[float, int, Job]] = []
        self._numbers = itertools.count()

    @property
    def running(self) -> bool:
        """Whether the thread runs or is being started."""
        return self._thread is not None

    @property
    def closing(self) -> bool:
        """Whether `close` was called. After that, a periodic job should not reschedule itself."""
        return self._closing

    def put(self, job: Job) -> bool:
        """Run a job soon. May be called from `__del__` and from a signal handler.

        Returns:
            False if no thread can be started, for example at interpreter shutdown. Then `close` runs the job.
        """
        self._inbox.put((-math.inf, job))
        return self._thread is not None or self._start()

    def at(self, due: float, job: Job) -> bool:
        """Run a job when `time.monotonic` reaches `due`. A job with several due times runs once, at the first of them.

        Store the data that the job needs before this call. The job may have an earlier due time, and start at any
        moment.

        Returns:
            As for `put`.
        """
        # Only the thread that runs the jobs changes due times. Other threads put the job into the inbox. If another
        # thread changed a due time itself, an exception of a signal handler could leave this due time without an entry
        # in the heap.
        if self._due_times.get(job, math.inf) <= due:
            return True
        if self._identity == threading.get_ident():
            if not self._draining:
                self._schedule(due, job)
            return True
        self._inbox.put((due, job))
        return self._thread is not None or self._start()

    def close(self, limit_s: float) -> bool:
        """Run each remaining job once, even before its due time, and end the thread. Call it again to wait longer.

        Jobs that are put during or after this call still run, on another thread if necessary. A job that reschedules
        itself during this call is not run again.

        Args:
            limit_s: maximum time to wait, s. Jobs not finished by then continue in the background.

        Returns:
            Whether all jobs are done.
        """
        until = time.monotonic() + limit_s
        self._closing = True
        if self._identity == threading.get_ident():  # a job called `close`; the other jobs run after this job
            return False
        thread = self._thread
        if thread is None and self._is_empty():
            return True
        ended: SimpleQueue[None] = SimpleQueue()
        self._closers.append(ended)
        self._inbox.put(None)
        if self._thread is None and not self._start():
            self._drain(until)  # no thread can start, for example at interpreter shutdown: run the jobs here
            return self._is_empty()
        try:
            ended.get(timeout=max(0.0, until - time.monotonic()))
        except Empty:
            return False
        if thread is not None and thread.is_alive():
            thread.join(max(0.0, until - time.monotonic()))
        return True

    def _is_empty(self) -> bool:
        return self._inbox.empty() and not (self._ready or self._heap)

    def _start(self) -> bool:
        thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        start = starter(thread, lambda: self._work(thread))
        with self._starting:
            if self._thread is None:
                self._thread = thread  # no signal handler runs from here to `start_new_thread`, which is a C function
                try:
                    start_new_thread(start, ())
                except RuntimeError:
                    self._thread = None
                    return False
        return True

    # The remaining methods of this class run on the background thread, or in `close` if no thread can start.

    def _work(self, unnamed: threading.Thread | None = None) -> None:
        me = unnamed or threading.current_thread()
        _here.runs_jobs = True
        while self._may_run(me):
            while not self._closing and (self._lingers or self._ready or self._heap or not self._inbox.empty()):
                self._receive(self._pause())
                for job in self._due_jobs(time.monotonic()):
                    self._run(job)
                if self._ready:
                    self._run(self._ready.popleft())
            if self._closing:
                self._drain()
            self._identity = 0
            # A caller puts a job and then checks for a thread. This thread first clears `_thread` and then checks for
            # jobs. So either the caller sees that there is no thread, or this thread sees the job.
            self._thread = None
        with self._starting:
            if self._thread is not None:  # a later thread runs the new jobs, and notifies the callers of `close`
                return
        with contextlib.suppress(IndexError):
            while self._closing:
                self._closers.popleft().put(None)

    def _may_run(self, me: threading.Thread) -> bool:
        """Whether this thread may run jobs. If no thread is registered and jobs wait, it registers this thread."""
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

    def _receive(self, pause: float | None) -> None:
        with contextlib.suppress(Empty):
            self._accept(self._inbox.get(timeout=pause))
            for _ in range(self._inbox.qsize()):  # only the jobs that are here now: new jobs must not delay due jobs
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
            if self._due_times.get(job) == due:  # skips old entries: a rescheduled job leaves its old entry in the heap
                del self._due_times[job]
                jobs.append(job)
        return jobs

    def _drain(self, until: float = math.inf) -> None:
        """Run all jobs. `close` calls this with a time limit if no thread can start.

        `SystemExit` or `KeyboardInterrupt` of a signal handler may then end the call early. The interrupted job and the
        remaining jobs are in `_ready` then.
        """
        self._identity = threading.get_ident()
        self._draining = True
        try:
            while (self._heap or self._ready or not self._inbox.empty()) and time.monotonic() <= until:
                self._receive(0.0)
                self._ready.extendleft(reversed(self._due_jobs(math.inf)))
                while self._ready and time.monotonic() <= until:
                    job = self._ready.popleft()
                    try:
                        self._run(job, BaseException if until == math.inf else Exception)
                    except BaseException:  # a signal handler raised it
                        self._ready.append(job)  # at the end, so that a job that always raises blocks no other job
                        raise
        finally:
            self._draining = False
            self._identity = 0

    def _run(self, job: Job, errors: type[BaseException] = BaseException) -> None:
        try:
            job()
        except errors:  # even a SystemExit of user code must not end the thread
            _log.exception("%s: a background job failed", self._name)


class BackgroundTask(ABC):
    """A task that runs on a background thread until its owner calls `stop` or leaves the `with` block.

    A forked child does not continue the task of its parent.

    Args:
        name: the name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._jobs = Background(name)

    @property
    def running(self) -> bool:
        """Whether this process runs the task: False after `stop`, and in a forked child."""
        return self._jobs.running and not self._jobs.closing

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @abstractmethod
    def stop(self) -> None:
        """Stop the task."""


def starter(thread: threading.Thread, otherwise: Callable[[], object]) -> Callable[[], None]:
    """Return a function that starts a thread. Pass the function to `start_new_thread`, which is C code.

    So `Thread.start` does not run on the caller's thread, where an exception of a signal handler could interrupt it.

    Args:
        thread: the thread to start.
        otherwise: called if the thread limit or gevent prevents the start. The call is made on the thread that
            runs the returned function.
    """
    patched = _patched_since_import()
    if patched:
        _warn_patched()

    def start() -> None:
        if patched:
            otherwise()
            return
        try:
            thread.start()
        except RuntimeError:  # the thread limit is reached: `otherwise` runs on the current thread
            otherwise()

    return start


def _patched_since_import() -> bool:
    """Whether gevent has replaced threads by greenlets after this module was imported.

    If so, this module uses real threads, queues and locks. A greenlet that waits for one of these blocks all other
    greenlets, and `Thread.start` may never return on a real thread. For example, gunicorn replaces threads after the
    import if it runs with ``--preload`` and gevent workers.
    """
    monkey = sys.modules.get("gevent.monkey")
    return (
        monkey is not None
        and isinstance(start_new_thread, BuiltinFunctionType)
        and monkey.is_module_patched("threading")
    )


@cache
def _warn_patched() -> None:
    warnings.warn(
        "gevent replaced threads and sockets after agentperf_redis was imported. Metrics are sent, but other calls may "
        "fail or block all greenlets. Call gevent.monkey.patch_all() before the import; for gunicorn --preload, at the "
        "top of its configuration file",
        RuntimeWarning,
        stacklevel=3,
    )


class Forkable(Protocol):
    """An object that a forked child has to reset."""

    def after_fork(self) -> None:
        """In the child: drop the state of the parent, and replace locks that another thread may have held."""


_forkables: weakref.WeakValueDictionary[int, Forkable] = weakref.WeakValueDictionary()
_registrations = itertools.count()


def register_for_fork(forkable: Forkable) -> None:
    """From now on, call the object's `after_fork` in each child that this process forks, while the object exists.

    A child calls the registered objects in the order of registration. A backend is created before its services, so it
    has new connections and a new process name when its services reset.
    """
    _forkables[next(_registrations)] = forkable


_held: set[int] = set()
_masks: dict[int, set[int | signal.Signals]] = {}
"""The signal masks of the threads that are forking at this moment, by thread."""


def hold_during_fork(number: int) -> None:
    """From now on, deliver this signal to a forked child only after the child has called every `after_fork`.

    Suppose that a signal has a handler written in Python, and arrives before the child has run its first line of Python
    code. Python drops such a signal. `multiprocessing.Pool.terminate` would then wait without end for a worker that was
    just forked. This signal is therefore blocked during the fork: a blocked signal stays pending.
    """
    _held.add(number)


def _before_fork() -> None:
    if _held:
        _masks[threading.get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, _held)


def _after_fork() -> None:
    mask = _masks.pop(threading.get_ident(), None)
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _after_fork_in_child() -> None:
    try:
        for forkable in list(_forkables.values()):
            try:
                forkable.after_fork()
            except Exception:  # noqa: BLE001  the other objects must still replace their locks
                _log.exception("in a forked child, %r could not reset its state", forkable)
    finally:
        _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


class ModuleLock:
    """A module-level lock that is replaced in a forked child.

    Args:
        make: creates the lock.

    Attributes:
        lock: the lock. Look it up for each use, because a fork replaces it.
    """

    def __init__(self, make: Callable[[], contextlib.AbstractContextManager[bool]] = threading.Lock) -> None:
        self._make = make
        self.after_fork()
        register_for_fork(self)

    def after_fork(self) -> None:
        """In a forked child: replace the lock, because another thread may have held it at the fork."""
        self.lock = self._make()
