"""Flushes the buffers of a process that ends without running its exit handlers.

`atexit` covers a process whose interpreter shuts down. It does not cover the following processes:

- A child of multiprocessing or billiard ends with `os._exit`, after the finalizers of `multiprocessing.util`.
- A pool process of Celery ends with `os._exit`, after the signal `worker_process_shutdown`.
- A work horse of RQ ends with `os._exit`, directly after its job.
- uvicorn ends its process by SIGTERM with the default action, directly after `Server.shutdown`.

This module never imports these packages. `watch` attaches a hook to each package that is already in `sys.modules`. A
buffer calls `watch` when the buffer is created and again at the first record of each flush interval. So `watch` also
finds packages that are imported later. The module `sigterm` covers other processes that end by SIGTERM.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from agentperf_redis.background import register_for_fork

if TYPE_CHECKING:
    from multiprocessing.util import Finalize

_log = logging.getLogger("agentperf_redis")

_MAX_INTERRUPTIONS = 10
"""So many exceptions `SystemExit` may interrupt a step. Code that always raises the exception must not prevent the end
of the process."""


class Buffered(Protocol):
    """An object with data to flush."""

    @property
    def pending(self) -> bool:
        """Whether there is data to flush. Takes no lock, because a signal handler reads it."""

    @property
    def present(self) -> bool:
        """Whether the server lists this process as a worker. Takes no lock."""

    def begin_last_flush(self) -> Callable[[], None]:
        """Start to flush. Return a function that waits for a bounded time until the flush ends."""


_buffers: set[weakref.ref[Buffered]] = set()


def register(buffer: Buffered) -> None:
    """Flush this buffer when the process ends, as long as the buffer exists."""
    # An addition or removal is a single call of C code, so a signal handler never finds the set half changed.
    _buffers.add(weakref.ref(buffer, _buffers.discard))
    watch()


def _registered() -> list[Buffered]:
    return [buffer for reference in tuple(_buffers) if (buffer := reference()) is not None]


def _is_unfinished(buffer: Buffered) -> bool:
    return buffer.pending or buffer.present


def pending() -> bool:
    """Whether a buffer has data to flush. Takes no lock."""
    return any(buffer.pending for buffer in _registered())


def flush_all() -> None:
    """Flush all buffers at the same time, and wait for a bounded time. Errors are logged.

    After the flush, the server no longer lists this process as a worker.
    """
    waits: list[Callable[[], None]] = []
    for buffer in _registered():
        try:
            if _is_unfinished(buffer):
                despite_exit(functools.partial(_begin, buffer, waits))
        except Exception:  # noqa: BLE001  the process must end, and the other buffers must be flushed
            _log.exception("the last flush failed")
    for wait in waits:
        try:
            despite_exit(wait)
        except Exception:  # noqa: BLE001  as above; a warning filter may turn the warning of lost records into an error
            _log.exception("the last flush failed")


def _begin(buffer: Buffered, waits: list[Callable[[], None]]) -> None:
    waits.append(buffer.begin_last_flush())


def despite_exit(step: Callable[[], None]) -> None:
    """Call a function that can continue after an interruption. Continue if it is interrupted by `SystemExit`.

    `SystemExit` asks the process to end, and the process is ending already. It comes from a signal handler, for example
    at a second SIGTERM. It also comes from gunicorn's gevent workers: at SIGQUIT, a greenlet waits for 0.1 s and then
    raises `SystemExit` in the main greenlet, which may be flushing at interpreter exit by then (gunicorn 27.0.1).
    """
    for _ in range(_MAX_INTERRUPTIONS):
        with contextlib.suppress(SystemExit):
            return step()
    return step()


async def aflush_all() -> None:
    """Like `flush_all`, without blocking the event loop."""
    if any(map(_is_unfinished, _registered())):
        import asyncio
        from concurrent.futures import ThreadPoolExecutor

        # The default executor of the event loop is not used: it may be full of requests that did not end before the
        # shutdown.
        with ThreadPoolExecutor(1, "agentperf-end") as executor:
            await asyncio.get_running_loop().run_in_executor(executor, flush_all)


class _Process:
    """Facts about this process that differ in a forked child."""

    def __init__(self) -> None:
        self.forked = False
        self.finalizer: Finalize | None = None
        register_for_fork(self)

    def after_fork(self) -> None:
        """Note that this process is a forked child. A child does not inherit the finalizers of multiprocessing."""
        self.forked = True
        self.finalizer = None


_process = _Process()


def is_child() -> bool:
    """Whether this process was forked, or started by multiprocessing or billiard. Such a process may be short-lived."""
    multiprocessing, billiard = sys.modules.get("multiprocessing.process"), sys.modules.get("billiard.process")
    return (
        _process.forked
        or (multiprocessing is not None and multiprocessing.parent_process() is not None)
        or (billiard is not None and billiard.current_process()._parent_pid is not None)  # noqa: SLF001  not public
    )


def watch() -> None:
    """Attach the hooks of all packages that are already imported. This costs little if there is nothing to attach."""
    for name in tuple(_hooks):
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            hook = _hooks.pop(name, None)  # only one of several threads gets the hook
            if hook is not None:
                _attach(name, hook, module)
    # Before a child starts its work, multiprocessing drops all finalizers. `_process.finalizer` may be among them: if a
    # forkserver preloads modules, the import of the main module may have registered it. So register a new finalizer.
    finalizer = _process.finalizer
    if (finalizer is None or not finalizer.still_active()) and "multiprocessing.util" in sys.modules and is_child():
        from multiprocessing.util import Finalize

        _process.finalizer = Finalize(None, flush_all, exitpriority=10)


def _attach(name: str, hook: Callable[[Any], None], module: ModuleType) -> None:
    try:
        hook(module)
    except Exception:  # noqa: BLE001  an unknown version of a package must not make recording fail
        _log.warning(
            "%s is of an unknown version: metrics may be lost when its processes end. Call flush() at the end of the "
            "work",
            name,
            exc_info=True,
        )


def _attach_to_celery(signals: Any) -> None:
    signals.worker_process_shutdown.connect(_flush_at_signal, weak=False, dispatch_uid=__name__)


def _flush_at_signal(**_: object) -> None:
    flush_all()


def _attach_to_rq(worker: Any) -> None:
    """Make the module of RQ's worker flush before it calls `os._exit`.

    RQ has no hook at the end of a work horse. When a job records for the first time, the frame that will call
    `os._exit` is already running, so only the name `os` in the module can still be replaced.
    """
    names = worker.Worker.main_work_horse.__globals__
    if isinstance(names["os"], _OsOfRq):
        return
    names["os"] = _OsOfRq("os")


class _OsOfRq(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _exit(self, status: int) -> None:
        try:
            flush_all()
        finally:
            os._exit(status)


def _attach_to_uvicorn(server: Any) -> None:
    """Flush after `Server.shutdown`, when all requests have ended and the application has shut down."""
    shutdown = server.Server.shutdown

    @functools.wraps(shutdown)
    async def flushing(*args: Any, **kwargs: Any) -> Any:
        try:
            return await shutdown(*args, **kwargs)
        finally:
            await aflush_all()

    server.Server.shutdown = flushing


_hooks: dict[str, Callable[[Any], None]] = {
    "celery.signals": _attach_to_celery,
    "rq.worker": _attach_to_rq,
    "uvicorn.server": _attach_to_uvicorn,
}
"""Hooks that are not attached yet, by the module that must be imported first."""
