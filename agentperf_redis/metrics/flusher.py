"""Brings what the buffer holds to the server: once a second or as often as asked for, when asked, and at the end.

All sending is done by one thread of the process, started when something was first recorded. It is woken through a
`SimpleQueue`, which may be put into from anywhere, also from a signal handler or while objects are being collected.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
import warnings
import weakref
from dataclasses import dataclass, field

from agentperf_redis.backend import Backend
from agentperf_redis.command import Batch, Flow, Hint, Wait
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, CorruptState, InvalidArgument
from agentperf_redis.metrics import commands
from agentperf_redis.metrics.buffer import Buffer, Parcel
from agentperf_redis.metrics.commands import Flushed
from agentperf_redis.metrics.llm_notes import inconsistent_usages, unread_usages
from agentperf_redis.metrics.llm_responses import Responses
from agentperf_redis.metrics.model import Delivery
from agentperf_redis.metrics.retention import Retention

_log = logging.getLogger("agentperf_redis")

FLUSH_EVERY_S = 1.0
"""By default, and after a flush that failed: what waits is tried again soon, however rarely it is flushed otherwise."""
FLUSH_EVERY_MOST_S = 60.0
CLOSE_S, CLOSE_AFTER_FAILURE_S = 2.0, 1.0
"""How long the last flush may go on without anything being counted; and where the one before it failed."""
_LAST_COMMAND_SHARE = 0.8
"""Of that, what a command may take: so that it is there to say why it failed."""
_AS_LONG_AS_IT_TAKES_S = 3600.0
_PROMPT_S = 0.5


@dataclass(slots=True)
class _Request:
    """Somebody waits for a flush that begins after this."""

    hint: Hint = field(default_factory=Hint)
    error: AgentPerfError | None = None
    last: bool = False


class Recorder:
    """The buffer of a process and namespace, and the thread that empties it.

    Args:
        backend: where it goes.
        retention: how long the server keeps it; None takes what the namespace has.
    """

    def __init__(self, backend: Backend, retention: Retention | None = None) -> None:
        self.backend = backend
        self.retention = retention or Retention()
        self._firm = retention is not None
        self._flush_every: float | None = None
        self.buffer = Buffer(on_first=self._wake)
        self._begin_usages()
        self._closed = False
        self._said_closed = False
        self._settled = 0
        """Parcels confirmed, by which it is seen that the last flush gets on."""
        self._begin()
        backend.on_close(self.close)
        _recorders.add(self)

    def settle(self, retention: Retention) -> None:
        """Make a retention the one asked for.

        Raises:
            InvalidArgument: if another was asked for in this process.
        """
        if self._firm and retention != self.retention:
            raise InvalidArgument("retention", retention, f"that of this namespace's other collector, {self.retention}")
        self.retention, self._firm = retention, True

    def settle_rhythm(self, flush_every: float) -> None:
        """Make this the time between two flushes, s.

        Raises:
            InvalidArgument: if another was asked for in this process.
        """
        if self._flush_every not in (None, flush_every):
            raise InvalidArgument(
                "flush_every", flush_every, f"that of this namespace's other collector, {self._flush_every:g}"
            )
        self._flush_every = flush_every

    def _rhythm(self) -> float:
        return FLUSH_EVERY_S if self._flush_every is None or self._last_error is not None else self._flush_every

    def _begin(self) -> None:
        self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        # Reentrant: while a thread is being started, a collected generator may record, and want it started.
        self._starting = threading.RLock()
        self._thread: threading.Thread | None = None
        self._last_error: AgentPerfError | None = None

    def after_fork(self) -> None:
        """In a forked child: begin empty, under another writer's name. The parent flushes what it has."""
        self.buffer.reset()
        self._begin_usages()
        self._begin()

    def _begin_usages(self) -> None:
        self.unread_usage = unread_usages()
        self.inconsistent_usage = inconsistent_usages()
        self.responses = Responses()

    def _wake(self) -> None:
        if self._closed:
            self._say_closed()
        elif self._running():
            self._queue.put(None)

    def _say_closed(self) -> None:
        if not self._said_closed:
            self._said_closed = True
            warnings.warn(
                f"{self.backend!r} is closed: what its MetricsCollector records from now on is not counted",
                RuntimeWarning,
                stacklevel=6,  # who recorded: this, _wake, Buffer._look_up, record, MetricsCollector.record_execution
            )

    def _running(self) -> bool:
        """Whether the thread runs, after starting it if need be."""
        if self._thread is not None:
            return True
        with self._starting:
            if self._thread is None:
                thread = threading.Thread(target=self._work, args=(self._queue,), name="agentperf-metrics", daemon=True)
                self._thread = thread
                try:
                    thread.start()
                except RuntimeError:  # the interpreter is shutting down; the flush at exit comes without a thread
                    self._thread = None
                    return False
                self._flush_at_end_of_worker()
        return True

    def _flush_at_end_of_worker(self) -> None:
        """Processes of multiprocessing end without atexit; they have finalizers of their own."""
        process = sys.modules.get("multiprocessing.process")
        if process is not None and process.parent_process() is not None:
            from multiprocessing.util import Finalize

            Finalize(None, self.close, exitpriority=10)

    def _work(self, requests: queue.SimpleQueue[_Request | None]) -> None:
        waiting = False
        while True:
            due = time.monotonic() + self._rhythm()
            asked: list[_Request] = []
            while not asked:
                try:
                    item = requests.get(timeout=max(0.0, due - time.monotonic()) if waiting else None)
                except queue.Empty:
                    break
                if item is not None:
                    asked.append(item)
                elif not waiting:
                    waiting, due = True, time.monotonic() + self._rhythm()
            while True:
                try:
                    item = requests.get_nowait()
                except queue.Empty:
                    break
                if item is not None:
                    asked.append(item)
            error = self._deliver(_LAST_COMMAND_SHARE * self._patience() if self._closed else None)
            waiting = not self.buffer.empty
            for request in asked:
                request.error = error
                request.hint.give()
            if any(request.last for request in asked):
                return

    def _deliver(self, deadline: float | None = None) -> AgentPerfError | None:
        try:
            error = self.backend.run(self.delivery(), deadline)
        except AgentPerfError as met:
            error = met
        except Exception as met:  # noqa: BLE001  the thread must live on, and what waits is kept
            _log.exception("flushing metrics failed")
            error = AgentPerfError(f"flushing metrics failed: {met!r}")
        if error is not None:
            self.buffer.coarsen(self.retention.lives)
            if self._last_error is None:
                _log.warning("metrics are held back: %s", error)
        elif self._last_error is not None:
            _log.warning("metrics flow again; counted so far: %d", self.delivery_state().counted)
        self._last_error = error
        return error

    def delivery(self) -> Flow[AgentPerfError | None]:
        """Send all that was recorded until now.

        Returns:
            The first error met, or None when all was counted.
        """
        buffer = self.buffer
        buffer.announce_next()
        buffer.fold()
        if buffer.empty:
            return None
        yield from self.backend.enter("metrics", "all")
        first: AgentPerfError | None = None
        failed: set[int] = set()
        while parcels := [parcel for parcel in buffer.parcels() if parcel.shard not in failed]:
            sent = time.monotonic()
            flushes = tuple(
                commands.flush(
                    self.backend.namespace,
                    parcel,
                    now=sent,
                    retention=self.retention,
                    firm=self._firm,
                    server_ms=buffer.server_ms(sent),
                )
                for parcel in parcels
            )
            try:
                results = yield from Batch(flushes).settled()
            except BaseException:
                for parcel in parcels:
                    buffer.unanswered(parcel, sent)
                raise
            answered = time.monotonic()
            for parcel, result in zip(parcels, results, strict=True):
                if isinstance(result, AgentPerfError):
                    first = first or result
                    if not self._lightened(parcel, result, sent):
                        failed.add(parcel.shard)
                else:
                    self._settle(parcel, result, sent, answered)
        return first

    def _settle(self, parcel: Parcel, flushed: Flushed, sent: float, answered: float) -> None:
        self.buffer.settled(parcel, flushed.other, flushed.outdated)
        self._settled += 1
        if answered - sent < _PROMPT_S:  # an answer that was long on its way does not tell when the server gave it
            self.buffer.synchronise(flushed.now, (sent + answered) / 2)

    def _lightened(self, parcel: Parcel, error: AgentPerfError, sent: float) -> bool:
        """Whether the rest of a refused parcel can be tried at once."""
        if isinstance(error, BackendUnavailable) and error.outcome == "unknown":
            self.buffer.unanswered(parcel, sent)
        if not isinstance(error, CorruptState):
            return False
        lost = self.buffer.refused(parcel, error.key.partition("}:")[2])
        if lost:
            _log.error("%d executions were not counted: %s", lost, error)
        return lost > 0

    def flushed(self, timeout: float | None = None) -> Flow[tuple[bool, AgentPerfError | None]]:
        """Wait until what this process has recorded is counted.

        Args:
            timeout: s; None waits as long as the server's deadlines allow.

        Returns:
            Whether the flush has come to an end, and the error it met.
        """
        if self.buffer.empty:
            return True, None
        request = _Request()
        if self._closed or not self._running():
            return True, (yield from self.delivery())
        self._queue.put(request)
        ended = yield from Wait(request.hint, _AS_LONG_AS_IT_TAKES_S if timeout is None else timeout)
        return ended, request.error

    def close(self) -> None:
        """Flush a last time and end the thread. What is recorded later stays here.

        Waits for a server that counts, and not for one that does not answer: see `CLOSE_S`.
        """
        if self._closed:
            return
        self._closed = True
        patience = self._patience()
        self.buffer.announce_next()  # so that who records after the end is told
        thread = self._thread
        if thread is not None and thread.is_alive():
            self._queue.put(_Request(last=True))
            settled = -1
            while thread.is_alive() and settled < (settled := self._settled):
                thread.join(patience)
        elif not self.buffer.empty:
            self._deliver(_LAST_COMMAND_SHARE * patience)
        if not self.buffer.empty:
            self._say_lost(patience)

    def _patience(self) -> float:
        most = CLOSE_S if self._last_error is None else CLOSE_AFTER_FAILURE_S
        return min(most, self.backend.deadline)

    def _say_lost(self, patience: float) -> None:
        pending = self.delivery_state().pending
        what = "1 execution" if pending == 1 else f"{pending} executions" if pending else "some use of models or tools"
        unknown = self.buffer.doubtful or (self._thread is not None and self._thread.is_alive())
        verb = "may not have been" if unknown else "was not" if pending <= 1 else "were not"
        error = self._last_error
        if isinstance(error, BackendUnavailable):  # what it says of being applied is true of the last attempt only
            cause = f"{error.address}: {error.reason}"
        else:
            cause = str(error or f"{self.backend.address.masked} did not answer within {patience:g} s")
        warnings.warn(f"{what} {verb} counted: {cause}", RuntimeWarning, stacklevel=2)

    def delivery_state(self) -> Delivery:
        """Return how this process's records fare."""
        counted, pending, dropped, uncertain, samples_dropped, other = self.buffer.tallies()
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


_recorders: weakref.WeakSet[Recorder] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for recorder in list(_recorders):
        recorder.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
