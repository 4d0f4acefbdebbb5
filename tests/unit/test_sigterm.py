"""The handler of SIGTERM is installed, chained and removed without a trace. Other tests cover real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from agentperf_redis import AgentPerf, process_end, sigterm
from agentperf_redis.errors import InvalidArgument
from tests.support.servers import wait_until

NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture(autouse=True)
def default_action() -> Iterator[None]:
    """SIGTERM has its default action before the test, and again after it."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    assert not sigterm._owners
    signal.signal(signal.SIGTERM, before)


def current() -> object:
    return signal.getsignal(signal.SIGTERM)


def test_handler_is_opt_in() -> None:
    with AgentPerf(NOWHERE):
        assert current() is signal.SIG_DFL


def test_handler_stays_until_the_last_close() -> None:
    first = AgentPerf(NOWHERE, flush_on_sigterm=True)
    handler = current()
    assert isinstance(handler, sigterm.Handler)
    second = AgentPerf(NOWHERE, flush_on_sigterm=True)
    assert current() is handler, "one handler is enough"
    first.close()
    assert current() is handler
    second.close()
    second.close()
    assert current() is signal.SIG_DFL


def test_close_on_an_event_loop_restores_the_former_action() -> None:
    async def work() -> None:
        async with AgentPerf(NOWHERE, flush_on_sigterm=True):
            assert isinstance(current(), sigterm.Handler)
        assert current() is signal.SIG_DFL

    asyncio.run(work())


def test_handler_stays_until_a_close_on_the_main_thread() -> None:
    """Python changes signal handlers on the main thread only."""
    perf = AgentPerf(NOWHERE, flush_on_sigterm=True)
    thread = threading.Thread(target=perf.close)
    thread.start()
    thread.join()
    assert isinstance(current(), sigterm.Handler)
    with AgentPerf(NOWHERE):
        pass
    assert current() is signal.SIG_DFL


def test_forgotten_owner_needs_no_handler_any_more() -> None:
    perf = AgentPerf(NOWHERE, flush_on_sigterm=True)
    perf.close()
    del perf
    sigterm.renew()
    assert current() is signal.SIG_DFL


def test_other_thread_is_refused() -> None:
    errors: list[InvalidArgument] = []

    def make() -> None:
        try:
            AgentPerf(NOWHERE, flush_on_sigterm=True)
        except InvalidArgument as error:
            errors.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert "flush_on_sigterm" in str(errors[0])
    assert "main thread" in str(errors[0])
    assert current() is signal.SIG_DFL


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_value_that_is_no_flag_is_refused(value: object) -> None:
    with pytest.raises(InvalidArgument, match="flush_on_sigterm"):
        AgentPerf(NOWHERE, flush_on_sigterm=value)  # type: ignore[arg-type]


def test_renewal_replaces_only_the_default_action() -> None:
    with AgentPerf(NOWHERE, flush_on_sigterm=True):
        for other in (lambda *_: None, signal.SIG_IGN):
            signal.signal(signal.SIGTERM, other)
            sigterm.renew()
            assert current() is other
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sigterm.renew()
        assert isinstance(current(), sigterm.Handler)


def test_handler_of_another_owner_is_kept_at_close() -> None:
    def other(number: int, frame: FrameType | None) -> None:
        pass

    with AgentPerf(NOWHERE, flush_on_sigterm=True):
        signal.signal(signal.SIGTERM, other)
    assert current() is other


class Buffer:
    """A buffer whose flush ends when the test allows it."""

    def __init__(self) -> None:
        self.pending = True
        self.present = False
        self.allowed = threading.Event()

    def begin_last_flush(self) -> Callable[[], None]:
        return self._wait

    def _wait(self) -> None:
        self.allowed.wait(30)
        self.pending = False


@pytest.fixture
def buffer(monkeypatch: pytest.MonkeyPatch) -> Buffer:
    monkeypatch.setattr(process_end, "_buffers", set())
    made = Buffer()
    process_end.register(made)
    return made


def test_former_handler_runs_after_the_flush(buffer: Buffer) -> None:
    calls: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: calls.append(buffer.pending))
    with AgentPerf(NOWHERE, flush_on_sigterm=True):
        os.kill(os.getpid(), signal.SIGTERM)
        assert calls == []
        buffer.allowed.set()
        wait_until(lambda: calls, "the former handler")
        assert calls == [False]
        os.kill(os.getpid(), signal.SIGTERM)
        assert calls == [False, False], "at once, because nothing is pending"


def test_second_signal_does_not_wait_for_the_flush(buffer: Buffer) -> None:
    calls: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: calls.append(buffer.pending))
    with AgentPerf(NOWHERE, flush_on_sigterm=True):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert calls == [True]
        buffer.allowed.set()
        wait_until(lambda: len(calls) == 2, "the action of the first signal")
        assert calls == [True, False]


def test_signal_that_python_missed_is_repeated(buffer: Buffer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second signal is lost here; the third one has its effect."""
    calls: list[bool] = []
    kills: list[int] = []
    real = os.kill

    def kill(pid: int, number: int) -> None:
        kills.append(number)
        if len(kills) > 1:
            real(pid, number)

    signal.signal(signal.SIGTERM, lambda *_: calls.append(True))
    with AgentPerf(NOWHERE, flush_on_sigterm=True):
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(os, "kill", kill)
        buffer.allowed.set()
        wait_until(lambda: calls, "the former handler")
    assert calls == [True]
    assert kills == [signal.SIGTERM] * 2


def test_signal_before_a_blocking_call_is_repeated() -> None:
    """The watch is notified of a signal whose handler has not run. The test writes only the notification."""
    handled: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: handled.append(True))
    with AgentPerf(NOWHERE, flush_on_sigterm=True):
        assert sigterm._watch._pipe is not None
        os.write(sigterm._watch._pipe[1], bytes((signal.SIGTERM,)))
        wait_until(lambda: handled, "the repeated signal")
        os.write(sigterm._watch._pipe[1], bytes((signal.SIGINT, signal.SIGTERM)))
        time.sleep(0.2)
    assert handled == [True], "the handler was entered, so nothing is repeated"


def test_signal_of_another_handler_is_not_repeated() -> None:
    handled: list[bool] = []
    with AgentPerf(NOWHERE, flush_on_sigterm=True):
        signal.signal(signal.SIGTERM, lambda *_: handled.append(True))
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert handled == [True]


def test_wake_up_file_of_another_user_is_kept() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    try:
        with AgentPerf(NOWHERE, flush_on_sigterm=True):
            pass
    finally:
        assert signal.set_wakeup_fd(-1) == writer
        os.close(reader)
        os.close(writer)


def test_close_ends_the_watch() -> None:
    with AgentPerf(NOWHERE, flush_on_sigterm=True):
        pass
    assert sigterm._watch._pipe is None
    assert signal.set_wakeup_fd(-1) == -1


def test_watch_continues_after_an_event_loop() -> None:
    async def handle() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, print)

    with AgentPerf(NOWHERE, flush_on_sigterm=True):
        assert sigterm._watch._pipe is not None
        writer = sigterm._watch._pipe[1]
        asyncio.run(handle())
        sigterm.renew()
        assert signal.set_wakeup_fd(-1) == writer
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
