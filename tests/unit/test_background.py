"""Tests of each mechanism of a background thread, without a server."""

from __future__ import annotations

import gc
import logging
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest

from agentperf_redis import background
from agentperf_redis.background import Background, ModuleLock, register_for_fork
from tests.support.forks import in_child
from tests.support.servers import wait_until

NAME = "agentperf-under-test"
LIMIT_S = 10.0


@pytest.fixture
def jobs() -> Iterator[Background]:
    made = Background(NAME)
    yield made
    assert made.close(LIMIT_S)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == NAME]


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    yield
    wait_until(lambda: not threads(), "the threads to end")


def do(jobs: Background, job: Callable[[], object] = lambda: None) -> None:
    """Run a job, and wait until it has run."""
    done = threading.Event()

    def work() -> None:
        try:
            job()
        finally:
            done.set()

    assert jobs.put(work)
    assert done.wait(LIMIT_S)


def test_thread_starts_with_first_job_and_stays(jobs: Background) -> None:
    assert not jobs.running
    assert not threads()
    identities: set[int] = set()
    for _ in range(3):
        do(jobs, lambda: identities.add(threading.get_ident()))
    assert len(identities) == 1
    assert threading.get_ident() not in identities
    assert [thread.daemon for thread in threads()] == [True]


def test_jobs_run_in_order_of_put(jobs: Background) -> None:
    done: list[int] = []
    for number in range(100):
        jobs.put(lambda number=number: done.append(number))  # type: ignore[misc]
    do(jobs)
    assert done == list(range(100))


def test_job_never_runs_before_its_due_time(jobs: Background) -> None:
    done: list[tuple[str, float]] = []
    now = time.monotonic()
    for name, after in (("late", 0.2), ("early", 0.05)):
        jobs.at(now + after, lambda name=name: done.append((name, time.monotonic())))  # type: ignore[misc]
    wait_until(lambda: len(done) == 2, "both jobs")
    assert [name for name, _ in done] == ["early", "late"]
    assert done[0][1] >= now + 0.05
    assert done[1][1] >= now + 0.2


def test_job_runs_once_at_its_earliest_time(jobs: Background) -> None:
    done: list[float] = []

    def job() -> None:
        done.append(time.monotonic())

    now = time.monotonic()
    jobs.at(now + 3600, job)
    jobs.at(now + 0.05, job)
    jobs.at(now + 0.1, job)
    wait_until(lambda: done, "the job")
    do(jobs)
    assert not jobs._due_times, "the later times are obsolete"
    jobs.at(time.monotonic(), job)
    wait_until(lambda: len(done) == 2, "the second run of the job")
    assert now + 0.05 <= done[0]


def test_due_job_runs_before_waiting_jobs(jobs: Background) -> None:
    order: list[str] = []
    begin = threading.Event()
    jobs.put(lambda: begin.wait(LIMIT_S))
    for _ in range(3):
        jobs.put(lambda: order.append("put"))
    jobs.at(time.monotonic(), lambda: order.append("due"))
    begin.set()
    do(jobs)
    assert order == ["due", "put", "put", "put"]


def test_repeating_job_does_not_starve_others(jobs: Background) -> None:
    ended = threading.Event()

    def again() -> None:
        if not ended.is_set():
            jobs.at(0.0, again)

    jobs.at(0.0, again)
    do(jobs)
    ended.set()


@pytest.mark.parametrize("error", [ValueError("by the test"), SystemExit(1)])
def test_thread_survives_and_logs_exceptions(
    jobs: Background, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    def fail() -> None:
        raise error

    jobs.put(fail)
    jobs.at(time.monotonic(), fail)
    do(jobs)
    records = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(records) == 2
    assert all(NAME in record.getMessage() and record.exc_info for record in records)
    assert all(record.exc_info is not None and record.exc_info[1] is error for record in records)


def test_close_runs_waiting_and_later_due_jobs(jobs: Background) -> None:
    done: list[str] = []
    begin = threading.Event()
    jobs.put(lambda: begin.wait(LIMIT_S))
    jobs.put(lambda: done.append("put"))
    jobs.at(time.monotonic() + 3600, lambda: done.append("due in an hour"))
    threading.Timer(0.05, begin.set).start()
    assert jobs.close(LIMIT_S)
    assert sorted(done) == ["due in an hour", "put"]
    assert jobs.closing
    assert not threads()


def test_close_without_any_job_starts_no_thread(jobs: Background) -> None:
    assert jobs.close(LIMIT_S)
    assert not jobs.running


def test_self_rescheduling_job_runs_once_during_close(jobs: Background) -> None:
    done: list[float] = []

    def again() -> None:
        done.append(time.monotonic())
        jobs.at(time.monotonic() + 3600, again)

    do(jobs, again)
    assert jobs.close(LIMIT_S)
    assert len(done) == 2


def test_close_waits_no_longer_than_its_limit(jobs: Background) -> None:
    end = threading.Event()
    done: list[str] = []
    jobs.put(lambda: end.wait(LIMIT_S))
    jobs.put(lambda: done.append("later"))
    began = time.monotonic()
    assert not jobs.close(0.05)
    assert time.monotonic() - began >= 0.05
    assert not done, "the limit is up before the jobs are done"
    end.set()
    assert jobs.close(LIMIT_S), "a second call waits for the rest"
    assert done == ["later"]


def test_close_on_own_thread_does_not_deadlock(jobs: Background) -> None:
    answers: list[bool] = []
    do(jobs, lambda: answers.append(jobs.close(LIMIT_S)))
    assert answers == [False]
    wait_until(lambda: not jobs.running, "the thread to end")


def test_job_put_during_close_still_runs(jobs: Background) -> None:
    done: list[str] = []

    def late() -> None:
        assert jobs.closing
        jobs.put(lambda: done.append("from a job"))

    begin = threading.Event()
    jobs.put(lambda: begin.wait(LIMIT_S))
    jobs.put(late)
    closing = threading.Thread(target=jobs.close, args=(LIMIT_S,))
    closing.start()
    wait_until(lambda: jobs.closing, "close to begin")
    jobs.put(lambda: done.append("put"))
    jobs.at(time.monotonic() + 3600, lambda: done.append("due in an hour"))
    begin.set()
    closing.join()
    assert sorted(done) == ["due in an hour", "from a job", "put"]


def test_job_put_after_close_runs_on_new_thread(jobs: Background) -> None:
    do(jobs)
    assert jobs.close(LIMIT_S)
    for _ in range(3):
        do(jobs)
        wait_until(lambda: not jobs.running, "the thread to end")


@pytest.mark.parametrize("lingers", [True, False])
def test_no_job_is_lost_between_successive_threads(lingers: bool) -> None:
    jobs = Background(NAME, lingers=lingers)
    done: list[int] = []
    if lingers:
        jobs.close(LIMIT_S)  # after `close`, each thread ends as soon as possible
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        putting = [
            threading.Thread(target=lambda: [jobs.put(lambda: done.append(1)) for _ in range(500)]) for _ in range(4)
        ]
        for thread in putting:
            thread.start()
        for thread in putting:
            thread.join()
        wait_until(lambda: len(done) == 2000, "all jobs")
    finally:
        sys.setswitchinterval(interval)


def test_non_lingering_thread_ends_and_restarts() -> None:
    jobs = Background(NAME, lingers=False)
    done: list[float] = []
    do(jobs)
    wait_until(lambda: not threads(), "the thread to end")
    jobs.at(time.monotonic() + 0.05, lambda: done.append(time.monotonic()))
    assert jobs.running, "it waits for the due time"
    wait_until(lambda: done, "the job")
    wait_until(lambda: not threads(), "the thread to end")


def test_close_runs_jobs_if_no_thread_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Background(NAME)
    done: list[int] = []

    def refuse(*_: object) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(background, "start_new_thread", refuse)
    assert not jobs.put(lambda: done.append(threading.get_ident()))
    assert not jobs.at(time.monotonic() + 3600, lambda: done.append(threading.get_ident()))
    assert jobs.close(LIMIT_S)
    assert done == [threading.get_ident()] * 2

    slow = Background(NAME)
    slow.put(lambda: time.sleep(0.02))
    slow.put(lambda: done.append(0))
    slow.close(0.01)
    assert len(done) == 2, "it stops at its limit"


class Dropped:
    """An object that puts a job when the object is garbage-collected."""

    def __init__(self, jobs: Background, done: list[int]) -> None:
        self._jobs = jobs
        self._done = done
        self.me = self  # a reference cycle, so that only the garbage collector frees the object

    def __del__(self) -> None:
        self._jobs.put(lambda: self._done.append(1))


def test_put_from_destructor_works_at_any_time(jobs: Background) -> None:
    done: list[int] = []
    thresholds = gc.get_threshold()
    gc.set_threshold(1)  # nearly every allocation triggers a collection, also inside `put` and on the background thread
    try:
        for number in range(300):
            Dropped(jobs, done)
            jobs.put(lambda: None)
            jobs.at(time.monotonic() + 3600 - number, print)
    finally:
        gc.set_threshold(*thresholds)

    def all_are_done() -> bool:
        gc.collect()  # does nothing while a collection runs on the background thread
        return len(done) == 300

    wait_until(all_are_done, "all jobs from __del__")


def test_put_from_destructor_works_during_thread_start(jobs: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    make = threading.Thread.__init__

    def make_and_collect(thread: threading.Thread, *args: Any, **options: Any) -> None:
        if options["name"] == NAME and not done:
            done.append(0)
            Dropped(jobs, done)
            gc.collect()
        make(thread, *args, **options)

    monkeypatch.setattr(threading.Thread, "__init__", make_and_collect)
    do(jobs)
    monkeypatch.undo()
    do(jobs)
    assert done == [0, 1]
    assert len(threads()) == 1


class Interrupted(Exception):
    """Raised by the signal handler."""


class Alarm:
    """A signal that interrupts the main thread once, at a random time."""

    def __init__(self) -> None:
        self._chance = random.Random(1)
        self.came = True

    def set(self) -> None:
        self.came = False
        signal.setitimer(signal.ITIMER_REAL, self._chance.uniform(1e-5, 1e-3))

    def handle(self, _: int, __: FrameType | None) -> None:
        self.came = True
        raise Interrupted

    def interrupts(self, work: Callable[[], object]) -> bool:
        """Run `work` with the alarm set. Returns whether the signal interrupted it.

        `work` is a function that is called inside the `try` block, and not code of the block itself. If the block ended
        with a loop, Python 3.12 and later would not catch an exception that arrives while the loop jumps back.
        """
        try:
            self.set()
            work()
        except Interrupted:
            return True
        return False


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    made = Alarm()
    before = signal.signal(signal.SIGALRM, made.handle)
    yield made
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


# Threads use weak references with callbacks. If the signal handler raises inside such a callback, Python only reports
# the exception and does not propagate it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("lingers", [True, False])
def test_interrupted_callers_leave_the_thread_working(alarm: Alarm, lingers: bool) -> None:
    interrupted = 0
    for _ in range(60):
        jobs = Background(NAME, lingers=lingers)

        def add_jobs(jobs: Background = jobs) -> None:
            while not alarm.came:
                jobs.put(lambda: None)
                jobs.at(time.monotonic() + 1e-4, gc.isenabled)

        interrupted += alarm.interrupts(add_jobs)
        do(jobs)
        due = threading.Event()
        jobs.at(time.monotonic(), due.set)
        jobs.at(time.monotonic(), gc.isenabled)
        assert due.wait(LIMIT_S)
        assert jobs.close(LIMIT_S)
    assert interrupted > 30


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupted_close_may_be_called_again(alarm: Alarm) -> None:
    ended = 0
    for _ in range(30):
        jobs = Background(NAME)
        done: list[int] = []
        end = threading.Event()
        jobs.put(lambda end=end: end.wait(LIMIT_S))  # type: ignore[misc]
        jobs.put(lambda done=done: done.append(1))  # type: ignore[misc]

        def close(jobs: Background = jobs) -> None:
            nonlocal ended
            jobs.close(0.02)
            ended += 1
            while not alarm.came:
                time.sleep(0.001)

        alarm.interrupts(close)
        end.set()
        assert jobs.close(LIMIT_S)
        assert done == [1]
    assert ended < 30, "some were interrupted"


def test_unnamed_thread_takes_over_at_thread_limit(jobs: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    do(jobs)
    do(jobs)
    due = threading.Event()
    jobs.at(time.monotonic() + 0.02, due.set)
    assert due.wait(LIMIT_S)
    assert not threads()
    assert jobs.close(LIMIT_S)
    assert not jobs.running


def test_forked_child_starts_empty_and_works(jobs: Background) -> None:
    done: list[str] = []
    begin = threading.Event()
    jobs.put(lambda: begin.wait(LIMIT_S))
    jobs.put(lambda: done.append("the parent's"))
    jobs.at(time.monotonic() + 0.01, lambda: done.append("the parent's, due"))

    def child() -> None:
        assert not jobs.running
        due = threading.Event()
        jobs.at(time.monotonic() + 0.05, due.set)
        do(jobs)
        assert due.wait(LIMIT_S)
        assert done == []
        assert jobs.close(LIMIT_S)

    in_child(child)
    assert not jobs.closing, "the close in the child does not affect the parent"
    begin.set()
    wait_until(lambda: len(done) == 2, "the parent's jobs")


def test_forked_child_works_after_close_or_during_start(jobs: Background) -> None:
    jobs.close(LIMIT_S)
    holding, end = threading.Event(), threading.Event()

    def hold() -> None:
        with jobs._starting:
            holding.set()
            end.wait(LIMIT_S)

    holder = threading.Thread(target=hold)
    holder.start()
    assert holding.wait(LIMIT_S)

    def child() -> None:
        assert not jobs.closing
        do(jobs)
        do(jobs)

    in_child(child)
    end.set()
    holder.join()


def test_fork_hook_keeps_order_and_survives_errors() -> None:
    calls: list[str] = []

    class Registered:
        def __init__(self, name: str, error: Exception | None = None) -> None:
            self._name = name
            self._error = error
            register_for_fork(self)

        def after_fork(self) -> None:
            calls.append(self._name)
            if self._error is not None:
                raise self._error

    kept: list[Any] = [Registered("backend"), Registered("faulty", ValueError("by the test")), Registered("service")]
    gone = Registered("gone")
    del gone
    gc.collect()

    def child() -> None:
        assert calls == ["backend", "faulty", "service"]

    in_child(child)
    assert not calls
    assert len(kept) == 3


def test_module_lock_is_free_in_forked_child() -> None:
    lock = ModuleLock(threading.RLock)
    holding, end = threading.Event(), threading.Event()

    def hold() -> None:
        with lock.lock:
            holding.set()
            end.wait(LIMIT_S)

    holder = threading.Thread(target=hold)
    holder.start()
    assert holding.wait(LIMIT_S)

    def child() -> None:
        with lock.lock:
            pass

    in_child(child)
    end.set()
    holder.join()


def test_package_registers_exactly_one_fork_hook() -> None:
    folder = Path(background.__file__).parent
    sources = {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in folder.rglob("*.py")}
    assert [name for name, text in sources.items() if "register_at_fork(" in text] == ["background.py"]


def test_close_without_a_thread_reports_unrun_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(background, "start_new_thread", refused)
    done: list[int] = []
    jobs = background.Background("test")

    def slow() -> None:
        time.sleep(0.05)
        done.append(1)

    jobs.put(slow)
    jobs.put(lambda: done.append(2))
    assert jobs.close(0.01) is False
    assert done == [1]
    assert jobs.close(5.0) is True
    assert done == [1, 2]


def test_late_patch_of_gevent_warns_once_and_uses_the_real_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the patch, `Thread.start` would start a greenlet on the real thread, and might never return."""
    monkey = ModuleType("gevent.monkey")
    monkey.is_module_patched = lambda name: name == "threading"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gevent.monkey", monkey)
    background._warn_patched.cache_clear()
    made = Background(NAME)
    with pytest.warns(RuntimeWarning, match=r"Call gevent.monkey.patch_all\(\) before the import"):
        do(made)
    assert not threads(), "there is no Thread object of the name"
    assert made.close(LIMIT_S)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        do(Background(NAME, lingers=False))
