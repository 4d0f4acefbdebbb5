"""Sends the buffer to the server: once per flush interval (by default a second), on request, and on closing.

The first intervals of a child process are shorter, because it may be killed soon: see `_FIRST_FLUSH_S`.

One background thread of the process does all sending. The first record starts the thread. Requests reach it through a
`SimpleQueue`, because `SimpleQueue.put` is safe everywhere, even in a signal handler or in `__del__`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from agentperf_redis import process_end, sigterm
from agentperf_redis.backend import Backend
from agentperf_redis.background import Background, register_for_fork
from agentperf_redis.command import Batch, Command, Flow, Wait, WakeUp
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, CorruptState, InvalidArgument
from agentperf_redis.metrics import commands
from agentperf_redis.metrics.buffer import Buffer, FlushBatch
from agentperf_redis.metrics.commands import Flushed
from agentperf_redis.metrics.llm_notes import inconsistent_usages, unread_usages
from agentperf_redis.metrics.llm_responses import Responses
from agentperf_redis.metrics.model import Delivery
from agentperf_redis.metrics.open_executions import OpenExecutions
from agentperf_redis.metrics.retention import Retention
from agentperf_redis.presence import MAX_EXECUTIONS, MIN_AGE_S, FlushState, OpenCalls, presence_of

_log = logging.getLogger("agentperf_redis")

FLUSH_EVERY_S = 1.0
"""The default flush interval, s. After a failed flush, it applies even if the user has chosen another one."""
MAX_FLUSH_EVERY_S = 60.0
_FIRST_FLUSH_S = 0.05
"""The first flush interval of a child process, s. Each further interval is twice as long, until the flush interval is
reached. If a child is killed before that, it loses about the second half of its records. Each child needs about five
additional flushes."""
CLOSE_S, CLOSE_AFTER_FAILURE_S = 2.0, 1.0
"""How long the flush on closing may run without progress, s. The second value applies if the previous flush failed."""
MAX_LAST_FLUSH_S = 8.0
"""Maximum time for the last flush of a process that ends without `close`, s. It applies if the server makes progress.
Docker and other supervisors kill a process 10 s after SIGTERM."""
_CLOSING_POLL_S = 0.005
"""Interval at which a thread checks whether `close` has ended, s."""
_LAST_COMMAND_SHARE = 0.8
"""Share of the time for a flush on closing that one command may take. So its error is known before the time is over."""
_UNLIMITED_S = 3600.0
_PROMPT_S = 0.5


@dataclass(slots=True)
class _Request:
    """A caller's request for a flush. Only a flush that begins after the request completes it."""

    wake_up: WakeUp = field(default_factory=WakeUp)
    error: AgentPerfError | None = None


class Flusher:
    """The buffer of a process and namespace, and the thread that empties it.

    Args:
        backend: backend of the namespace.
        retention: how long the server keeps the data; None takes the retention stored for the namespace.
    """

    def __init__(self, backend: Backend, retention: Retention | None = None) -> None:
        _import_what_flushes_import()
        self.backend = backend
        self.retention = retention or Retention()
        self._firm = retention is not None
        self._flush_every: float | None = None
        self.buffer = Buffer(on_first=self._wake)
        self.executions = OpenExecutions(on_first=self._begin_presence)
        self._begin_usages()
        self._closed = self._closing = self._ended = False
        self._warned_closed = False
        self._settled = 0
        """Number of settled batches. While it rises, the last flush makes progress."""
        self._jobs = Background("agentperf-metrics")
        self._begin()
        self.presence = presence_of(backend)
        self.presence.flush_state = self._flush_state
        self.presence.open_calls = self._open_calls
        backend.on_close(self.close)
        register_for_fork(self)
        process_end.register(self)

    def settle(self, retention: Retention) -> None:
        """Set the retention.

        Raises:
            InvalidArgument: if this process has already set a different retention.
        """
        if self._firm and retention != self.retention:
            raise InvalidArgument("retention", retention, f"that of this namespace's other collector, {self.retention}")
        self.retention, self._firm = retention, True

    def settle_rhythm(self, flush_every: float) -> None:
        """Set the time between two flushes, s.

        Raises:
            InvalidArgument: if this process has already set a different time.
        """
        if self._flush_every not in (None, flush_every):
            raise InvalidArgument(
                "flush_every", flush_every, f"that of this namespace's other collector, {self._flush_every:g}"
            )
        self._flush_every = flush_every

    def _rhythm(self) -> float:
        if self._last_error is not None:
            return FLUSH_EVERY_S
        regular = FLUSH_EVERY_S if self._flush_every is None else self._flush_every
        return min(regular, self._early) if process_end.is_child() else regular

    def after_fork(self) -> None:
        """In a forked child: start empty, as a new writer. The parent flushes the records that the fork copied."""
        self._closing = False
        self.buffer.reset()
        self.executions.reset()
        self._begin_usages()
        self._begin()

    def _begin_usages(self) -> None:
        self.unread_usage = unread_usages()
        self.inconsistent_usage = inconsistent_usages()
        self.responses = Responses()

    def _begin(self) -> None:
        self._requests: queue.SimpleQueue[_Request] = queue.SimpleQueue()
        self._last_error: AgentPerfError | None = None
        self._tried_last = False
        self._early = _FIRST_FLUSH_S

    def _wake(self) -> None:
        if self._closed:
            self._warn_closed()
            return
        process_end.watch()
        sigterm.renew()
        self._begin_presence()
        self._jobs.at(time.monotonic() + self._rhythm(), self._flush_due)

    def _begin_presence(self) -> None:
        self.presence.begin(self._jobs)

    def _flush_state(self) -> FlushState:
        error = self._last_error
        if error is None:
            return FlushState(0, self.buffer.dropped)
        return FlushState(self.delivery_state().pending, self.buffer.dropped, str(error))

    def _open_calls(self, now: float) -> OpenCalls:
        return self.executions.oldest(now, MIN_AGE_S, MAX_EXECUTIONS)

    def _warn_closed(self) -> None:
        if self._warned_closed:
            return
        self._warned_closed = True
        frame = sys._getframe()  # noqa: SLF001  no `stacklevel` fits all recording methods
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("agentperf_redis."):
            frame = frame.f_back
        warnings.warn_explicit(
            f"{self.backend!r} is closed: later records of its MetricsCollector are not counted",
            RuntimeWarning,
            frame.f_code.co_filename,
            frame.f_lineno,
            module=frame.f_globals.get("__name__"),
            registry={},  # an empty registry, so that a second client with the same URL can warn at the same line
        )

    def _flush_due(self) -> None:
        if self._closed:  # `close` makes the last flush
            return
        self._flush(self._take_requests())
        self._early = min(2 * self._early, MAX_FLUSH_EVERY_S)
        if not self.buffer.empty:
            self._jobs.at(time.monotonic() + self._rhythm(), self._flush_due)

    def _flush_requested(self) -> None:
        requests = self._take_requests()
        if requests:  # another flush may already have completed all requests
            self._flush(requests)

    def _flush_last(self) -> None:
        if not self._tried_last:  # if the server did not answer a first try, a second one would wait in vain
            self._flush(self._take_requests())

    def _take_requests(self) -> list[_Request]:
        """Remove and return the waiting requests. The flush that begins now completes all of them."""
        requests = []
        with contextlib.suppress(queue.Empty):
            while True:
                requests.append(self._requests.get_nowait())
        return requests

    def _flush(self, requests: list[_Request]) -> None:
        last = self._closed
        error: AgentPerfError | None = AgentPerfError("flushing metrics failed; see the log")
        try:
            error = self._deliver(_LAST_COMMAND_SHARE * self._attempt_timeout() if last else None)
            self._tried_last |= last
        finally:  # wake the waiting callers, even after an unexpected error
            for request in requests:
                request.error = error
                request.wake_up.send()

    def _deliver(self, deadline: float | None = None) -> AgentPerfError | None:
        try:
            error = self.backend.run(self.delivery(), deadline)
        except AgentPerfError as met:
            error = met
        except Exception as met:  # noqa: BLE001  the thread must go on, and the records are kept
            _log.exception("flushing metrics failed")
            error = AgentPerfError(f"flushing metrics failed: {met!r}")
        if error is not None:
            self.buffer.downsample(self.retention.ttls)
            if self._last_error is None and not self._closed:  # `close` itself warns of lost records
                _log.warning("flushing metrics failed, records are kept: %s", error)
        elif self._last_error is not None:
            _log.warning("flushing metrics works again; executions counted so far: %d", self.delivery_state().counted)
        self._last_error = error
        return error

    def delivery(self) -> Flow[AgentPerfError | None]:
        """Send everything that was recorded before this call.

        Returns:
            The first error, or None when everything was counted.
        """
        buffer = self.buffer
        buffer.announce_next()
        buffer.aggregate()
        if buffer.empty:
            return None
        yield from self.backend.enter("metrics", "all")
        first: AgentPerfError | None = None
        failed: set[int] = set()
        heartbeat = self.presence.riding()
        while batches := [batch for batch in buffer.batches() if batch.shard not in failed]:
            sent = time.monotonic()
            flushes = tuple(
                commands.flush(
                    self.backend.namespace,
                    batch,
                    now=sent,
                    retention=self.retention,
                    firm=self._firm,
                    server_ms=buffer.server_ms(sent),
                )
                for batch in batches
            )
            carried: tuple[Command[Any], ...] = () if heartbeat is None else (heartbeat,)
            try:
                results = yield from Batch(flushes + carried).settled()
            except BaseException:
                for batch in batches:
                    buffer.unanswered(batch, sent)
                raise
            replied = time.monotonic()
            if heartbeat is not None:
                self.presence.settle(results.pop())
                heartbeat = None
            for batch, result in zip(batches, results, strict=True):
                if isinstance(result, AgentPerfError):
                    first = first or result
                    if not self._dropped_corrupt(batch, result, sent):
                        failed.add(batch.shard)
                else:
                    self._settle(batch, result, sent, replied)
        return first

    def _settle(self, batch: FlushBatch, flushed: Flushed, sent: float, replied: float) -> None:
        self.buffer.settled(batch, flushed.other, flushed.outdated)
        self._settled += 1
        if replied - sent < _PROMPT_S:  # only a prompt reply shows when the server read its clock
            self.buffer.synchronise(flushed.now, (sent + replied) / 2)

    def _dropped_corrupt(self, batch: FlushBatch, error: AgentPerfError, sent: float) -> bool:
        """Drop a corrupt series from a failed batch. Returns whether the rest can be sent at once."""
        if isinstance(error, BackendUnavailable) and error.outcome == "unknown":
            self.buffer.unanswered(batch, sent)
        if not isinstance(error, CorruptState):
            return False
        lost = self.buffer.refused(batch, error.key.partition("}:")[2])
        if lost:
            _log.error("%d executions were not counted: %s", lost, error)
        return lost > 0

    def flushed(self, timeout: float | None = None) -> Flow[tuple[bool, AgentPerfError | None]]:
        """Wait until the records of this process are counted.

        Args:
            timeout: max seconds to wait; None waits until the flush succeeds or fails.

        Returns:
            Whether the flush has ended, and its error or None.
        """
        if self.buffer.empty:
            return True, None
        request = _Request()
        if not self._closed:
            self._requests.put(request)
        if self._closed or not self._jobs.put(self._flush_requested):
            return True, (yield from self.delivery())
        ended = yield from Wait(request.wake_up, _UNLIMITED_S if timeout is None else timeout)
        return ended, request.error

    def close(self) -> None:
        """Flush a last time and end the thread. Later records are not sent.

        The call keeps waiting while the server counts one batch after another. If the server does not reply, it waits
        at most `CLOSE_S`. If `SystemExit` or `KeyboardInterrupt` of a signal handler ends this call early, the next
        call continues.
        """
        self._close(math.inf)

    def _close(self, until: float) -> None:
        if self._ended:
            return
        self._closing = self._closed = True
        try:
            attempt_timeout = self._attempt_timeout()
            self.buffer.announce_next()  # so that a later record calls `_wake`, which warns
            if not self.buffer.empty:
                self._jobs.put(self._flush_last)
            ended = self._while_counting(self._jobs.close, attempt_timeout, until)
            first, self._ended = not self._ended, True
            if first and not self.buffer.empty:
                self._warn_lost(attempt_timeout, in_flight=not ended)
        finally:
            self._closing = False

    def _while_counting(self, wait: Callable[[float], bool], attempt_timeout: float, until: float = math.inf) -> bool:
        """Call `wait` repeatedly while it returns False, the server counts batches, and the time is before `until`."""
        settled, ended = -1, False
        while not ended and settled < (settled := self._settled) and time.monotonic() < until:
            ended = wait(attempt_timeout)
        return ended

    @property
    def pending(self) -> bool:
        """Whether there is data to flush. Until `close` has flushed the data, this is True. Takes no lock."""
        return not self._ended and not self.buffer.empty

    @property
    def present(self) -> bool:
        """Whether the server lists this process as a worker. Takes no lock."""
        return not self._closed and self.presence.present

    def begin_last_flush(self) -> Callable[[], None]:
        """Begin the last flush of a process that ends soon and may not call `close`.

        Returns:
            A function that waits for the end of this flush, as long as `close` would, but at most `MAX_LAST_FLUSH_S`.
            If records are still uncounted after the wait, the function warns about them. If `close` is already running,
            the function only waits for `close`, which flushes and warns. It continues a `close` that was interrupted.
        """
        until = time.monotonic() + MAX_LAST_FLUSH_S
        if self._closed:
            return partial(self._await_close, until)
        request, ended = _Request(), _Request()

        def flush_and_leave() -> None:
            try:
                self._flush_requested()
                ended.error = request.error
                self.presence.leave()
            finally:
                ended.wake_up.send()

        self._requests.put(request)
        if not self._jobs.put(flush_and_leave):
            flush_and_leave()  # no thread can be started, so flush on this thread
        return partial(self._await_last_flush, ended, until)

    def _await_close(self, until: float) -> None:
        # A signal handler that interrupts `close` may call this method. So take no lock that `close` may hold.
        while self._closing and time.monotonic() < until:
            time.sleep(_CLOSING_POLL_S)
        if not self._closing and time.monotonic() < until:
            self._close(until)

    def _await_last_flush(self, request: _Request, until: float) -> None:
        attempt_timeout = self._attempt_timeout()
        ended = self._while_counting(
            lambda seconds: self.backend.run(iter(Wait(request.wake_up, seconds))), attempt_timeout, until
        )
        if (not ended or request.error is not None) and not self.buffer.empty:
            self._warn_lost(attempt_timeout, in_flight=not ended)

    def _attempt_timeout(self) -> float:
        maximum = CLOSE_S if self._last_error is None else CLOSE_AFTER_FAILURE_S
        return min(maximum, self.backend.deadline)

    def _warn_lost(self, attempt_timeout: float, *, in_flight: bool) -> None:
        pending = self.delivery_state().pending
        lost = (
            "1 execution" if pending == 1 else f"{pending} executions" if pending else "some usage of models or tools"
        )
        unknown = self.buffer.doubtful or in_flight
        verb = "may not have been" if unknown else "was not" if pending <= 1 else "were not"
        error = self._last_error
        if isinstance(error, BackendUnavailable):  # `outcome` is left out, because it describes only the last attempt
            cause = f"{error.address}: {error.reason}"
        else:
            cause = str(error or f"{self.backend.address.masked} did not reply within {attempt_timeout:g} s")
        warnings.warn(f"{lost} {verb} counted: {cause}", RuntimeWarning, stacklevel=2)

    def delivery_state(self) -> Delivery:
        """Return how many records of this process are counted, pending or dropped."""
        counted, pending, dropped, uncertain, samples_dropped, other = self.buffer.delivery_counts()
        return Delivery(
            recorded=counted + pending + dropped,
            counted=counted,
            pending=pending,
            dropped=dropped,
            uncertain=uncertain,
            samples_dropped=samples_dropped,
            other=other,
            usage_unread=self.unread_usage.count,
            usage_inconsistent=self.inconsistent_usage.count,
            last_error=None if self._last_error is None else str(self._last_error),
        )


def _import_what_flushes_import() -> None:
    """Import the modules that the first flush would import on its thread.

    If the process forks while the thread imports a module, the lock of the module stays held in the child. The first
    flush of the child would wait for this lock without end.
    """
    import encodings.idna  # noqa: F401  `socket.getaddrinfo` imports it

    import agentperf_redis.script_header  # noqa: F401  the error for a key of a wrong type imports it

    commands.FLUSH.source  # noqa: B018  reading a script imports `importlib.resources`
