"""Flushes at SIGTERM, before the action that SIGTERM would have without this library.

That action is the former one: the handler that was installed before, or the end of the process. The handler of this
module only starts a thread and returns. The thread flushes and then sends the signal again. At the second signal, the
handler performs the former action. So the handler never waits. It may interrupt code that holds any lock, even the lock
of a buffer that the flush needs. The interrupted code continues during the flush and releases the lock.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import weakref
from _thread import start_new_thread
from collections.abc import Callable
from types import BuiltinFunctionType, FrameType
from typing import Any

from agentperf_redis import process_end
from agentperf_redis.background import hold_during_fork, register_for_fork
from agentperf_redis.errors import InvalidArgument

_SIGTERM = signal.SIGTERM
_REPEAT_S, _MAX_REPEAT_S = 0.05, 1.0
"""First and longest interval between repeated signals, s.

The handler runs when the main thread next executes Python code. If the signal arrives just before the main thread
blocks in C code, for example while it yields the GIL, the handler may never run. A repeated signal wakes the thread up.
Without it, `multiprocessing.Pool.terminate` waited without end for one in fifty pools on a busy machine."""


class Handler:
    """The handler of SIGTERM.

    Args:
        former: the former handler, or `signal.SIG_DFL`. Its action follows the flush.
    """

    def __init__(self, former: Callable[[int, FrameType | None], Any] | int | signal.Handlers) -> None:
        self.former = former
        self.entered = False
        self._flushing = False
        self._repeated = False
        register_for_fork(self)

    @property
    def installed(self) -> bool:
        """Whether SIGTERM has this handler now."""
        return signal.getsignal(_SIGTERM) is self

    def after_fork(self) -> None:
        """Reset the handler in a forked child, because the flush belongs to the parent.

        A child that records nothing ends by the default action, like any other process. When a child records, `renew`
        installs a handler again.
        """
        self.entered = self._flushing = self._repeated = False
        if self.former is signal.SIG_DFL and self.installed:
            signal.signal(_SIGTERM, signal.SIG_DFL)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Begin to flush. If there is nothing to flush, or a flush has already begun, perform the former action."""
        self.entered = True
        # If SIGTERM arrives again during the flush, the sender does not want to wait for the flush.
        if not (self._repeated or self._flushing) and process_end.pending():
            self._flushing = True
            try:
                start_new_thread(self._flush, (number,))
                return
            except RuntimeError:  # the thread limit is reached
                pass
        self._flushing = self._repeated = False
        self._act(number, frame)

    def _flush(self, number: int) -> None:
        process_end.flush_all()
        if _is_of_loop(self.former):
            self._flushing = False
            return
        self._repeated = True
        pause = _REPEAT_S
        # If the main thread runs the handler between the check of `_repeated` below and `os.kill`, the process gets one
        # signal too many. This was seen only with a thread switch interval of 1 us.
        while self._repeated:
            os.kill(os.getpid(), number)
            time.sleep(pause)
            pause = min(2 * pause, _MAX_REPEAT_S)

    def _act(self, number: int, frame: FrameType | None) -> None:
        if callable(self.former):
            self.former(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


class _Watch:
    """Repeats the first SIGTERM if Python missed it: see `_REPEAT_S`.

    A thread notices the signal through the wake-up file descriptor of the process. A process has only one such
    descriptor. While other code, such as an event loop, uses the descriptor, there is no watch. If trio is imported,
    there is never a watch, because trio warns about other users of the descriptor.
    """

    def __init__(self) -> None:
        self._pipe: tuple[int, int] | None = None
        register_for_fork(self)

    def start(self) -> None:
        """Start the watch, or continue it after an event loop reset the file descriptor. On the main thread only."""
        if not isinstance(start_new_thread, BuiltinFunctionType) or "trio" in sys.modules:
            return  # gevent: a reading thread would block all greenlets; trio: see the docstring of the class
        if self._pipe is None:
            reader, writer = self._pipe = os.pipe()
            os.set_blocking(writer, False)
            try:
                start_new_thread(self._run, (reader,))
            except RuntimeError:  # the thread limit is reached
                os.close(reader)
                os.close(writer)
                self._pipe = None
                return
        other = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        if other not in (-1, self._pipe[1]):
            signal.set_wakeup_fd(other)

    def end(self) -> None:
        """End the watch. On the main thread only."""
        if self._pipe is not None:
            self._reset()
            (_, writer), self._pipe = self._pipe, None
            os.close(writer)  # the thread then reads end-of-file and ends

    def after_fork(self) -> None:
        """End the watch in a forked child, since the inherited file descriptor leads to the parent."""
        if self._pipe is not None:
            self._reset()
            os.close(self._pipe[0])
            os.close(self._pipe[1])
            self._pipe = None

    def _reset(self) -> None:
        other = signal.set_wakeup_fd(-1)
        if self._pipe is not None and other != self._pipe[1]:
            signal.set_wakeup_fd(other)

    def _run(self, reader: int) -> None:
        try:
            while numbers := os.read(reader, 64):
                handler = signal.getsignal(_SIGTERM)
                if _SIGTERM in numbers and isinstance(handler, Handler):
                    self._repeat(handler)
        finally:
            os.close(reader)

    @staticmethod
    def _repeat(handler: Handler) -> None:
        pause = _REPEAT_S
        while not handler.entered:
            time.sleep(pause)
            pause = min(2 * pause, _MAX_REPEAT_S)
            if not handler.installed:
                return
            if not handler.entered:
                os.kill(os.getpid(), _SIGTERM)


_watch = _Watch()


def _is_of_loop(former: object) -> bool:
    """Whether an event loop handles the signal. The loop reads the signal's number from a file descriptor.

    For the first signal, the loop itself calls the callback of `add_signal_handler`. If the signal were sent again, the
    loop would call the callback twice.
    """
    asyncio = sys.modules.get("asyncio")
    if asyncio is None:
        return False
    # The handler that uvloop installs is a method of its loop. The handler of asyncio is a function that does nothing.
    return isinstance(getattr(former, "__self__", None), asyncio.AbstractEventLoop) or (
        getattr(former, "__module__", "") == "asyncio.unix_events"
    )


_owners: set[weakref.ref[object]] = set()


def flush_at_sigterm(owner: object) -> None:
    """Install the handler, and add an owner. The owner is removed by `release(owner)`, or when it no longer exists.

    Raises:
        InvalidArgument: if this is not the main thread, the only one on which Python installs signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        raise InvalidArgument(
            "flush_on_sigterm", True, "False outside the main thread, since Python installs signal handlers only there"
        )
    _owners.add(weakref.ref(owner, _owners.discard))
    hold_during_fork(_SIGTERM)
    _install()


def release(owner: object) -> None:
    """Remove an owner. If no owner is left, restore the former handler.

    Only the main thread can restore the former handler. If another thread removes the last owner, the next call of
    `release` on the main thread restores the former handler.
    """
    _owners.discard(weakref.ref(owner))
    current = signal.getsignal(_SIGTERM)
    if not _owners and isinstance(current, Handler) and threading.current_thread() is threading.main_thread():
        _watch.end()
        signal.signal(_SIGTERM, current.former)


def renew() -> None:
    """Install the handler again if SIGTERM has its default action.

    Event loops reset the signal when they end. Celery and RQ reset it in their children.
    """
    if (
        _owners
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(_SIGTERM) is signal.SIG_DFL
    ):
        _install()


def _install() -> None:
    former = signal.getsignal(_SIGTERM)
    # An ignored signal does not end the process, so no flush is needed. None stands for a handler that was not
    # installed from Python. Python cannot call such a handler.
    if former is not None and former is not signal.SIG_IGN and not isinstance(former, Handler):
        signal.signal(_SIGTERM, Handler(former))
        _watch.start()
