"""The newest close callback runs first. An interrupted callback runs again; a callback that failed does not."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from agentperf_redis.background import Background
from agentperf_redis.closing import CloseCallbacks
from tests.support.forks import in_child

LIMIT_S = 30.0


@pytest.fixture
def callbacks() -> CloseCallbacks:
    return CloseCallbacks("a backend", threading.RLock())


@pytest.fixture
def ran() -> list[str]:
    """The callbacks that ran to their end, in order."""
    return []


def noted(ran: list[str], name: str) -> Callable[[], None]:
    return lambda: ran.append(name)


def test_newest_callback_runs_first_and_each_once(callbacks: CloseCallbacks, ran: list[str]) -> None:
    for name in ("old", "middle", "new"):
        callbacks.add(noted(ran, name))
    assert callbacks.run()
    assert callbacks.run()
    assert ran == ["new", "middle", "old"]


def test_callback_added_while_others_run_runs_too(callbacks: CloseCallbacks, ran: list[str]) -> None:
    callbacks.add(lambda: callbacks.add(noted(ran, "added")))
    assert callbacks.run()
    assert ran == ["added"]


def test_callback_added_after_all_have_run_runs_at_once(callbacks: CloseCallbacks, ran: list[str]) -> None:
    assert callbacks.run()
    callbacks.add(noted(ran, "late"))
    assert ran == ["late"]

    def failing() -> None:
        raise ValueError("the reason")

    with pytest.raises(ValueError, match="the reason"):
        callbacks.add(failing)


def test_removed_callback_does_not_run(callbacks: CloseCallbacks, ran: list[str]) -> None:
    removed = noted(ran, "removed")
    callbacks.add(removed)
    callbacks.add(noted(ran, "kept"))
    callbacks.remove(removed)
    callbacks.remove(removed)
    assert callbacks.run()
    assert ran == ["kept"]


def test_callback_that_fails_is_logged_and_the_others_run(
    callbacks: CloseCallbacks, ran: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    def failing() -> None:
        raise ValueError("the reason")

    callbacks.add(noted(ran, "other"))
    callbacks.add(failing)
    assert callbacks.run()
    assert ran == ["other"]
    assert "closing a backend: the close callback of a service failed" in caplog.text
    assert "ValueError: the reason" in caplog.text
    assert callbacks.run()
    assert caplog.text.count("closing a backend") == 1, "a failed callback has ended"


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_interrupted_callback_runs_again(callbacks: CloseCallbacks, ran: list[str], error: type[BaseException]) -> None:
    attempts = iter([error(), None])

    def interrupted() -> None:
        failure = next(attempts)
        if failure is not None:
            raise failure
        ran.append("interrupted")

    for callback in (noted(ran, "old"), interrupted, noted(ran, "new")):
        callbacks.add(callback)
    with pytest.raises(error):
        callbacks.run()
    assert ran == ["new"]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(callbacks.run).result(LIMIT_S), "the interrupted call has released its lock"
    assert ran == ["new", "interrupted", "old"]


def test_call_inside_a_callback_leaves_the_rest_to_the_outer_call(callbacks: CloseCallbacks, ran: list[str]) -> None:
    inner: list[bool] = []
    callbacks.add(noted(ran, "old"))
    callbacks.add(lambda: inner.append(callbacks.run()))
    assert callbacks.run()
    assert (inner, ran) == ([False], ["old"])


def test_another_thread_waits_for_the_running_callbacks(callbacks: CloseCallbacks, ran: list[str]) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        go_on.wait(LIMIT_S)
        ran.append("slow")

    callbacks.add(slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(callbacks.run)
        assert begun.wait(LIMIT_S)
        second = pool.submit(callbacks.run)
        with pytest.raises(TimeoutError):
            second.result(0.1)
        go_on.set()
        assert (first.result(LIMIT_S), second.result(LIMIT_S)) == (True, True)
    assert ran == ["slow"]


def test_wait_for_another_thread_is_bounded(callbacks: CloseCallbacks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentperf_redis.closing._OTHER_CLOSE_S", 0.05)
    found: list[bool] = []

    def waits_for_a_thread_that_closes() -> None:
        closing = threading.Thread(target=lambda: found.append(callbacks.run()), daemon=True)
        closing.start()
        closing.join(LIMIT_S)

    callbacks.add(waits_for_a_thread_that_closes)
    assert callbacks.run()
    assert found == [False]


def test_background_job_does_not_wait_for_the_running_callbacks(
    callbacks: CloseCallbacks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentperf_redis.closing._OTHER_CLOSE_S", 10 * LIMIT_S)
    found: list[bool] = []
    ended: list[bool] = []
    jobs = Background("agentperf-test-closing")

    def waits_for_a_job_that_closes() -> None:
        jobs.put(lambda: found.append(callbacks.run()))
        ended.append(jobs.close(LIMIT_S))

    callbacks.add(waits_for_a_job_that_closes)
    assert callbacks.run()
    assert (found, ended) == ([False], [True])


def test_callbacks_wait_while_a_service_is_created(ran: list[str]) -> None:
    lock = threading.RLock()
    callbacks = CloseCallbacks("a backend", lock)
    with ThreadPoolExecutor(1) as pool:
        with lock:
            callbacks.add(noted(ran, "first half"))
            closing = pool.submit(callbacks.run)
            with pytest.raises(TimeoutError):
                closing.result(0.1)
            callbacks.add(noted(ran, "second half"))
        assert closing.result(LIMIT_S)
    assert ran == ["second half", "first half"]


def test_forked_child_closes_while_its_parent_does(callbacks: CloseCallbacks, ran: list[str]) -> None:
    """A thread of the parent holds the lock at the fork, and does not exist in the child."""
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        begun.set()
        go_on.wait(LIMIT_S)

    def child() -> None:
        callbacks.after_fork(threading.RLock())
        callbacks.remove(slow)
        callbacks.add(noted(ran, "child"))
        assert callbacks.run()
        assert ran == ["child"]

    callbacks.add(slow)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(callbacks.run)
        assert begun.wait(LIMIT_S)
        in_child(child)
        go_on.set()
        assert running.result(LIMIT_S)
    assert ran == []


def test_child_forked_in_a_callback_closes(callbacks: CloseCallbacks, ran: list[str]) -> None:
    def child() -> None:
        callbacks.after_fork(threading.RLock())
        callbacks.remove(forks)
        assert callbacks.run()
        assert ran == ["old"]

    def forks() -> None:
        in_child(child)
        ran.append("forked")

    callbacks.add(noted(ran, "old"))
    callbacks.add(forks)
    assert callbacks.run()
    assert ran == ["forked", "old"]


def test_child_that_returns_from_the_callback_goes_on(callbacks: CloseCallbacks, ran: list[str]) -> None:
    """As `os.fork` does in the callback of a service: the child leaves `run` with the lock of its parent."""
    parent = os.getpid()
    children: list[int] = []

    def forks() -> None:
        children.append(os.fork())
        if os.getpid() != parent:
            signal.alarm(int(LIMIT_S))
            callbacks.after_fork(threading.RLock())

    callbacks.add(noted(ran, "old"))
    callbacks.add(forks)
    code = 1
    try:
        done = callbacks.run()
        code = 0 if done and ran == ["old"] and callbacks.run() else 2
    finally:
        if os.getpid() != parent:
            os._exit(code)
    assert code == 0
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
