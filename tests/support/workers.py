"""Worker processes for the tests. Each runs one function of a test module.

Workers are forked from a clean process that has only imported the library (Python's forkserver). So they inherit no
connections, threads or locks of the test process. Spawning sixteen new workers took 8.7 s of processor time, which was
most of the time of tests with many processes. Sixteen forked workers start and end within 0.4 s.

A worker's function is a plain function or a generator. Its return value is the result of the worker. A generator also
sends a value to the test at each `yield`, and continues when the test replies:

    def hold(url, namespace):
        with AgentPerf(url, namespace=namespace) as perf:
            lease = perf.balancer().acquire("planner").lease
            yield lease.token                      # worker.said() returns it; the lease is held until worker.answer()

    worker = workers.start(hold, server.url, namespace)
    token = worker.said()
    worker.kill()
"""

from __future__ import annotations

import ctypes
import inspect
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any

_TIMEOUT = 60.0
"""Time limit for a message of a worker, s. A second of work on an idle machine takes much longer on a loaded one."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["tests.support.proxy", "tests.support.servers", "agentperf_redis", "redis.asyncio", "pytest"]
)


class WorkerFailed(Exception):
    """A worker's function raised an exception, or its process ended early; the text contains the traceback."""


class Worker:
    """One worker process."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._name = f"{function.__module__}.{function.__qualname__}"
        self._pipe, theirs = _context.Pipe()
        # The worker gets the current environment. The forkserver still has the environment from its own start.
        self._process = _context.Process(target=_work, args=(theirs, dict(os.environ), function, args), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def _receive(self, expected: str, timeout: float) -> Any:
        try:
            if not self._pipe.poll(timeout):
                raise TimeoutError(f"{self._name} sent nothing for {timeout:g} s")
            kind, value = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(timeout)
            raise WorkerFailed(f"{self._name} ended with exit code {self._process.exitcode}") from None
        if kind == "failed":
            raise WorkerFailed(f"{self._name} failed:\n{value}")
        if kind != expected:
            raise WorkerFailed(f"{self._name}: expected {expected!r}, but it {kind} {value!r}")
        return value

    def ready(self, timeout: float = _TIMEOUT) -> None:
        """Wait until the worker has imported its function."""
        self._receive("is ready", timeout)

    def go(self) -> None:
        """Start the function of the worker."""
        self._pipe.send(None)

    def said(self, timeout: float = _TIMEOUT) -> Any:
        """Return the next value that the generator yields."""
        return self._receive("said", timeout)

    def answer(self, value: object = None) -> None:
        """Continue the generator; its `yield` returns the value."""
        self._pipe.send(value)

    def result(self, timeout: float = _TIMEOUT) -> Any:
        """Wait for the function's return value."""
        value = self._receive("returned", timeout)
        self._process.join(timeout)
        return value

    def kill(self) -> None:
        """Kill the worker with SIGKILL, and wait until it has ended."""
        self._process.kill()
        self._process.join()

    def pause(self) -> None:
        """Stop the worker with SIGSTOP."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Resume the worker with SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """End the worker in any state."""
        self.kill()
        self._pipe.close()
        self._process.close()


class Workers:
    """The workers of one test."""

    def __init__(self) -> None:
        self._started: list[Worker] = []

    def start(self, function: Callable[..., Any], *args: Any) -> Worker:
        """Start a worker and its function."""
        worker = self._launch(function, args)
        worker.ready()
        worker.go()
        return worker

    def start_all(self, function: Callable[..., Any], args: Iterable[tuple[Any, ...]]) -> list[Worker]:
        """Start one worker per tuple of arguments. All workers start together."""
        workers = [self._launch(function, each) for each in args]
        for worker in workers:
            worker.ready()
        for worker in workers:
            worker.go()
        return workers

    def run(
        self, function: Callable[..., Any], args: Iterable[tuple[Any, ...]], timeout: float = _TIMEOUT
    ) -> list[Any]:
        """Run one worker per tuple of arguments. All workers start together. Return their results in order."""
        return [worker.result(timeout) for worker in self.start_all(function, args)]

    def _launch(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Worker:
        worker = Worker(function, args)
        self._started.append(worker)
        return worker

    def close(self) -> None:
        """Kill the remaining workers."""
        for worker in self._started:
            worker.close()


def server_pid() -> int | None:
    """Return the pid of the forkserver, which ends with this process."""
    pid: int | None = getattr(multiprocessing.forkserver._forkserver, "_forkserver_pid", None)
    return pid


def _work(pipe: Connection, environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _end_with_parent()
    os.environ.clear()
    os.environ.update(environment)
    try:
        pipe.send(("is ready", None))
        pipe.recv()
        result = function(*args)
        if inspect.isgenerator(result):
            try:
                value = next(result)
                while True:
                    pipe.send(("said", value))
                    value = result.send(pipe.recv())
            except StopIteration as end:
                result = end.value
        pipe.send(("returned", result))
    except EOFError:
        pass  # the test process has ended
    except BaseException:  # noqa: BLE001  the test reports every error
        pipe.send(("failed", traceback.format_exc()))


def _end_with_parent() -> None:
    """Make this worker end when the forkserver ends. The forkserver ends when the test process ends or is killed."""
    # The forkserver reads a pipe, and ends when no process has the write end of this pipe open. Every worker inherits
    # the write end, and closes it here. If a worker kept the write end open, the forkserver would not end, and so the
    # worker would not end either.
    server: Any = multiprocessing.forkserver._forkserver
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
