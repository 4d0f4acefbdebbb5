"""A hook is attached to another package when that package is imported. A hook flushes all buffers in a bounded time."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing.util
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from agentperf_redis import process_end


class Buffer:
    """A buffer that notes its flushes."""

    def __init__(self, *, takes_s: float = 0.0, error: Exception | None = None) -> None:
        self.pending = True
        self.present = False
        self.flushes = 0
        self._takes_s = takes_s
        self._error = error

    def begin_last_flush(self) -> Callable[[], None]:
        until = time.monotonic() + self._takes_s
        return partial(self._wait, until)

    def _wait(self, until: float) -> None:
        time.sleep(max(0.0, until - time.monotonic()))
        if self._error is not None:
            raise self._error
        self.flushes += 1
        self.pending = self.present = False


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No buffer is registered, and no hook is attached."""
    monkeypatch.setattr(process_end, "_buffers", set())
    monkeypatch.setattr(process_end, "_hooks", dict(ALL_HOOKS))
    monkeypatch.setattr(process_end, "_process", SimpleNamespace(forked=False, finalizer=None))
    for name in ALL_HOOKS:
        monkeypatch.delitem(sys.modules, name, raising=False)


ALL_HOOKS = {
    "celery.signals": process_end._attach_to_celery,
    "rq.worker": process_end._attach_to_rq,
    "uvicorn.server": process_end._attach_to_uvicorn,
}


def imported(monkeypatch: pytest.MonkeyPatch, name: str, **names: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(names)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_buffers_are_flushed_together() -> None:
    buffers = [Buffer(takes_s=1.0) for _ in range(4)]
    for buffer in buffers:
        process_end.register(buffer)
    assert process_end.pending()
    begin = time.monotonic()
    process_end.flush_all()
    assert time.monotonic() - begin < 3.5, "not 1 s for each"
    assert [buffer.flushes for buffer in buffers] == [1] * 4
    assert not process_end.pending()
    process_end.flush_all()
    assert [buffer.flushes for buffer in buffers] == [1] * 4, "nothing is pending"


def test_idle_worker_is_forgotten_at_its_end() -> None:
    buffer = Buffer()
    buffer.pending, buffer.present = False, True
    process_end.register(buffer)
    assert not process_end.pending(), "SIGTERM does not wait for it"
    process_end.flush_all()
    process_end.flush_all()
    assert buffer.flushes == 1


def test_failing_flush_is_logged_and_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    bad, good = Buffer(error=RuntimeWarning("1 execution was not counted")), Buffer()
    process_end.register(bad)
    process_end.register(good)
    process_end.flush_all()
    assert good.flushes == 1
    assert "1 execution was not counted" in caplog.text


def test_exit_while_flushes_begin_and_end_loses_none() -> None:
    class Interrupted(Buffer):
        def begin_last_flush(self) -> Callable[[], None]:
            if interruptions:
                raise interruptions.pop()
            return super().begin_last_flush()

        def _wait(self, until: float) -> None:
            if ends:
                raise ends.pop()
            super()._wait(until)

    interruptions, ends = [SystemExit(0)], [SystemExit(0)]
    buffers = [Interrupted(), Buffer()]
    for buffer in buffers:
        process_end.register(buffer)
    process_end.flush_all()
    assert [buffer.flushes for buffer in buffers] == [1, 1]
    assert (interruptions, ends) == ([], [])


def test_exit_during_a_flush_is_ignored_until_it_ends() -> None:
    interruptions = [SystemExit(0), SystemExit(1)]

    def step() -> None:
        if interruptions:
            raise interruptions.pop()

    process_end.despite_exit(step)
    assert not interruptions


@pytest.mark.parametrize(("error", "calls"), [(SystemExit, 11), (KeyboardInterrupt, 1), (ValueError, 1)])
def test_step_that_never_ends_is_given_up(error: type[BaseException], calls: int) -> None:
    called = []

    def step() -> None:
        called.append(1)
        raise error

    with pytest.raises(error):
        process_end.despite_exit(step)
    assert len(called) == calls


def test_buffer_that_is_gone_is_forgotten() -> None:
    process_end.register(Buffer())
    assert not process_end.pending()
    assert process_end._buffers == set()


def test_no_package_is_imported_for_its_hook() -> None:
    process_end.register(Buffer())
    assert not set(ALL_HOOKS) & set(sys.modules)
    assert set(process_end._hooks) == set(ALL_HOOKS)


class Signal:
    def __init__(self) -> None:
        self.receivers: dict[str, Callable[..., object]] = {}

    def connect(self, receiver: Callable[..., object], *, weak: bool, dispatch_uid: str) -> None:
        assert not weak
        self.receivers[dispatch_uid] = receiver


def test_celery_signal_of_a_later_import_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = Buffer()
    process_end.register(buffer)
    ends = Signal()
    imported(monkeypatch, "celery.signals", worker_process_shutdown=ends)
    process_end.watch()
    process_end.watch()
    (receiver,) = ends.receivers.values()
    receiver(sender=None, pid=1, exitcode=0)
    assert buffer.flushes == 1


def test_package_that_is_still_importing_is_left_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    module = imported(monkeypatch, "celery.signals")
    module.__spec__ = SimpleNamespace(_initializing=True)  # type: ignore[assignment]
    process_end.watch()
    assert "celery.signals" in process_end._hooks


def test_unknown_version_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    imported(monkeypatch, "uvicorn.server")
    process_end.watch()
    process_end.watch()
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1
    assert "uvicorn.server is of an unknown version" in warned[0].getMessage()


def test_rq_flushes_before_its_exit_and_keeps_the_rest_of_os(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = Buffer()
    statuses: list[int] = []
    process_end.register(buffer)
    names: dict[str, Any] = {"os": os}
    exec("class Worker:\n    def main_work_horse(self): os._exit(3)", names)
    imported(monkeypatch, "rq.worker", Worker=names["Worker"])
    process_end.watch()
    monkeypatch.setattr(os, "_exit", statuses.append)
    assert names["os"].getpid() == os.getpid()
    names["Worker"]().main_work_horse()
    assert statuses == [3]
    assert buffer.flushes == 1


def test_uvicorn_flushes_after_shutdown_on_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    class Noting(Buffer):
        def _wait(self, until: float) -> None:
            steps.append(f"flushed, on the loop: {threading.current_thread() is threading.main_thread()}")
            super()._wait(until)

    class Server:
        async def shutdown(self, sockets: list[object] | None = None) -> str:
            steps.append(f"shut down {sockets}")
            return "as before"

    buffer = Noting()
    process_end.register(buffer)
    imported(monkeypatch, "uvicorn.server", Server=Server)
    process_end.watch()
    assert asyncio.run(Server().shutdown(sockets=[])) == "as before"
    assert steps == ["shut down []", "flushed, on the loop: False"]
    assert Server.shutdown.__name__ == "shutdown"


def test_finalizer_of_multiprocessing_is_set_once_in_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    set_callbacks: list[Callable[[], None]] = []
    active = True

    def finalize(_: None, callback: Callable[[], None], *, exitpriority: int) -> SimpleNamespace:
        assert exitpriority >= 0
        set_callbacks.append(callback)
        return SimpleNamespace(still_active=lambda: active)

    monkeypatch.setattr(multiprocessing.util, "Finalize", finalize)
    process_end.watch()
    assert set_callbacks == [], "in the first process, atexit is enough"
    buffer = Buffer()
    process_end.register(buffer)
    process_end._process.forked = True
    assert process_end.is_child()
    process_end.watch()
    process_end.watch()
    (callback,) = set_callbacks
    callback()
    assert buffer.flushes == 1
    active = False
    process_end.watch()
    assert len(set_callbacks) == 2, "multiprocessing has dropped the first one"


def test_process_of_billiard_is_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    process = SimpleNamespace(_parent_pid=None)
    imported(monkeypatch, "billiard.process", current_process=lambda: process)
    assert not process_end.is_child()
    process._parent_pid = 1
    assert process_end.is_child()
