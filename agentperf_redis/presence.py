"""The heartbeat of a process: other processes see that it lives, what it holds, and which of its executions hang.

The presence of a process begins with its first record, its first tracked execution or its first lease. From then on, a
heartbeat is sent at least every `BEAT_S`, even while the process is idle. If a metrics flush is sent anyway, it carries
the heartbeat. Otherwise, the background thread of the service that began first sends the heartbeat. Closing the client
ends the presence at once. A killed process is forgotten `FORGET_S` after its last heartbeat.

A heartbeat carries the whole state, so a lost heartbeat need not be repeated. An error of a heartbeat affects no other
call. A heartbeat takes the server about 30 us, or 85 us with 50 running executions. On the same machine, a flush of
five records takes about 260 us.
"""

from __future__ import annotations

import functools
import logging
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from agentperf_redis import keys
from agentperf_redis.backend import Backend
from agentperf_redis.background import Background, register_for_fork
from agentperf_redis.command import Arg, Command, Flow, Reply
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, CorruptState
from agentperf_redis.script import Script

_log = logging.getLogger("agentperf_redis")

BEAT_S = 5.0
"""Maximum time between two heartbeats."""
ALIVE_S = 12.0
"""A process counts as dead if its last heartbeat is older than this: two are overdue, the second one by 2 s."""
FORGET_S = 25.0
"""A process whose last heartbeat is older is forgotten."""
MAX_WORKERS = 10_000
"""Maximum number of workers of a namespace. Each takes 0.3 kB on the server, and 3 kB with 50 running executions."""
MAX_EXECUTIONS = 50
"""Maximum number of open executions that a heartbeat lists. Of any further ones, it has only the number."""
MIN_AGE_S = 1.0
"""Minimum age of an open execution that a heartbeat lists. Younger ones end before anyone could look at them."""
_RIDE_S = 4.0
"""If the last heartbeat is at least this old, the next flush carries a heartbeat. So the thread rarely has to send one.
If the open executions have changed, the flush need not wait for this age."""
_FIRST_S = 1.1
"""Time until the thread sends the first heartbeat. Usually the first flush, after 1 s, has already carried it."""
_MIN_INTERVAL_S = 0.9
"""Minimum time before the first heartbeat, and between two. Many processes end earlier and never send one."""
_BEAT_TIMEOUT_S = 1.0
_LEAVE_S = 0.5
"""How long a process that ends waits for its removal from the list. If this fails, `FORGET_S` applies."""
_MAX_ERROR_CHARACTERS = 200

_BEAT = Script("namespace/beat")
_LEAVE = Script("namespace/leave")


@dataclass(frozen=True, slots=True)
class FlushState:
    """What a process has not delivered.

    Attributes:
        pending: executions that wait because the last flush failed; 0 if that flush succeeded.
        dropped: executions that were dropped and never counted.
        error: error of the last flush; empty if it succeeded.
    """

    pending: int = 0
    dropped: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class OpenCalls:
    """Open executions of a process: those that have begun and not ended.

    Attributes:
        oldest: agent and start of each of the oldest ones, the oldest first. The start is a time of `perf_counter`.
        more: number of the other open executions, which are younger.
    """

    oldest: tuple[tuple[str, float], ...] = ()
    more: int = 0


class Presence:
    """The presence of one process on one backend. `presence_of` returns it.

    Args:
        backend: the server and namespace.

    Attributes:
        leases: returns the number of leases that this process holds.
        flush_state: returns what this process has not delivered.
        open_calls: takes a time of `perf_counter`. Returns the executions that are open and older than `MIN_AGE_S` at
            that time: the `MAX_EXECUTIONS` oldest of them, and the number of the others.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.leases: Callable[[], int] = int
        self.flush_state: Callable[[], FlushState] = FlushState
        self.open_calls: Callable[[float], OpenCalls] = lambda _: OpenCalls()
        # The job refers to this object only weakly, so that a dropped client can be garbage-collected while the
        # background thread waits.
        self._job = functools.partial(_beat_if_present, weakref.ref(self))
        self._closed = False
        self.after_fork()
        backend.on_close(self.close)
        register_for_fork(self)

    def after_fork(self) -> None:
        """In a forked child, start without a presence. The child becomes a worker once it records, tracks or leases."""
        self._jobs: Background | None = None
        self._timeout_s: Callable[[], float] = float
        self._began = 0.0
        self._sent: float | None = None
        self._carried = OpenCalls()
        self._failing = False

    @property
    def begun(self) -> bool:
        """Whether this process has recorded, tracked or leased anything."""
        return self._jobs is not None

    @property
    def present(self) -> bool:
        """Whether the server should list this process: a heartbeat was sent, and the last one did not fail."""
        return self._sent is not None and not self._failing

    def begin(self, jobs: Background, timeout_s: Callable[[], float] = lambda: _BEAT_TIMEOUT_S) -> None:
        """Send heartbeats from now on, if none are sent yet. May be called from `__del__` and from a signal handler.

        Args:
            jobs: the background thread that sends heartbeats while no flush carries them.
            timeout_s: returns how long this thread may wait for the server, s.
        """
        if self._jobs is None and not self._closed:
            self._began = time.monotonic()
            self._timeout_s = timeout_s
            self._jobs = jobs
            jobs.at(self._began + _FIRST_S, self._job)

    def riding(self) -> Command[bool] | None:
        """Return the heartbeat that a flush should carry now, if any. The flush passes the reply to `settle`.

        After a failed heartbeat, only the background thread sends heartbeats. So an unreachable node does not delay the
        flushes to other nodes.
        """
        if not self.begun or self._closed or self._failing:
            return None
        now = time.monotonic()
        if now - (self._began if self._sent is None else self._sent) < _MIN_INTERVAL_S:
            return None
        calls = self.open_calls(time.perf_counter())
        if self._sent is not None and now - self._sent < _RIDE_S and calls == self._carried:
            return None
        return self.heartbeat(calls)

    def settle(self, result: bool | AgentPerfError) -> None:
        """Note the result of a heartbeat. A damaged key is logged once. Other errors are temporary and not logged."""
        failed = isinstance(result, AgentPerfError)
        if isinstance(result, CorruptState) and not self._failing:
            _log.warning("this process is not in the list of workers: %s", result)
        self._failing = failed

    def refreshed(self) -> Flow[None]:
        """Send a heartbeat if this process has a presence, so that a program that lists the workers finds itself.

        Raises:
            BackendUnavailable: if the server cannot be reached. Other errors of the heartbeat do not prevent reading.
        """
        if self.begun and not self._closed:
            try:
                self.settle((yield from self.heartbeat(self.open_calls(time.perf_counter()))))
            except AgentPerfError as error:
                self.settle(error)
                if isinstance(error, BackendUnavailable):
                    raise

    def leave(self) -> None:
        """Make the server forget this process, which is about to end. If it runs on, its next heartbeat lists it again.

        Blocks for a bounded time.
        """
        if not self.present or self.flush_state().error:  # do not wait for a server that does not reply
            return
        sent = self._sent
        try:
            self._backend.run(self.departure(), min(_LEAVE_S, self._backend.deadline))
        except AgentPerfError as error:
            _log.debug("this process stays in the list of workers for %g s: %s", FORGET_S, error)
        if self._sent == sent:  # otherwise another thread has sent a heartbeat meanwhile
            self._sent = None

    def close(self) -> None:
        """End the presence. The services are closed earlier, so no heartbeat is in flight.

        If `SystemExit` or `KeyboardInterrupt` of a signal handler ends this call early, the next call continues.
        """
        self._closed = True
        if self.present and self._jobs is not None:
            self._jobs.put(self.leave)  # on the background thread, because the caller may be an event loop
            self._jobs.close(_LEAVE_S)

    @property
    def _name(self) -> str:
        return keys.worker_name(self._backend.process)

    def departure(self) -> Command[None]:
        """Make the command that removes this process from the list of workers."""
        namespace, name = self._backend.namespace, self._name
        seen = keys.workers_seen(namespace)
        return Command(_LEAVE, (seen, keys.worker(namespace, name)), {"worker": name}, lambda reply: _left(seen, reply))

    def heartbeat(self, calls: OpenCalls) -> Command[bool]:
        """Make the command for a heartbeat. The caller must send it at once.

        Args:
            calls: the open executions.

        Returns:
            The command. Its result is True if the server lists the worker, and False if the server already lists
            `MAX_WORKERS` others.
        """
        self._carried = calls
        self._sent = now = time.monotonic()
        clock = time.perf_counter()
        namespace, name = self._backend.namespace, self._name
        host, pid, _ = self._backend.process.rsplit(":", 2)
        flush_state = self.flush_state()
        executions: tuple[Arg, ...] = tuple(
            part for agent, start in calls.oldest for part in (keys.encoded(agent), _ms(clock - start))
        )
        seen = keys.workers_seen(namespace)
        return Command(
            _BEAT,
            (seen, keys.worker(namespace, name)),
            {
                "worker": name,
                "age_ms": _ms(now - self._began),
                "keep_ms": _ms(FORGET_S),
                "max_workers": MAX_WORKERS,
                "host": host,
                "pid": int(pid),
                "python": f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}",
                "version": _version(),
                "leases": self.leases(),
                "pending": flush_state.pending,
                "dropped": flush_state.dropped,
                "error": flush_state.error.encode(errors="replace").decode()[:_MAX_ERROR_CHARACTERS],
                "more": calls.more,
                "executions...": executions,
            },
            lambda reply: _recorded(seen, reply),
        )

    def beat_due(self) -> None:
        """Send a heartbeat if the last one is old, and schedule the next one. Runs on the background thread."""
        jobs = self._jobs
        if jobs is None or jobs.closing or self._closed:
            return
        now = time.monotonic()
        if self._sent is None or now - self._sent >= BEAT_S:
            try:
                heartbeat = self.heartbeat(self.open_calls(time.perf_counter()))
                self.settle(self._backend.run(heartbeat, min(self._timeout_s(), self._backend.deadline)))
            except AgentPerfError as error:
                self.settle(error)
        jobs.at((self._sent or now) + BEAT_S, self._job)


def _beat_if_present(reference: weakref.ref[Presence]) -> None:
    presence = reference()
    if presence is not None:
        presence.beat_due()


def presence_of(backend: Backend) -> Presence:
    """Return the presence of this process on a backend."""
    return backend.share("presence", lambda: Presence(backend))


def _recorded(key: str, reply: Reply) -> bool:
    try:
        status, _ = reply
        if status in (0, 1):
            return bool(status)
    except (TypeError, ValueError):
        pass
    raise CorruptState(key, f"an unexpected reply {reply!r}")


def _left(key: str, reply: Reply) -> None:
    if reply != 1:
        raise CorruptState(key, f"an unexpected reply {reply!r}")


@functools.cache
def _version() -> str:
    """Return the version of this library; "?" if it is not installed."""
    try:
        return version("agentperf-redis")
    except PackageNotFoundError:
        return "?"


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))
