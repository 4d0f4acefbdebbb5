"""Brings what the buffer holds to the server: once a second or as often as asked for, when asked, and at the end.

All sending is done by one background thread of the process, started when something was first recorded. Requests reach
it through a `SimpleQueue`, which may be put into from anywhere, also from a signal handler or from `__del__`.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import time
import warnings
from dataclasses import dataclass, field

from agentperf_redis.backend import Backend
from agentperf_redis.background import Background, register_for_fork
from agentperf_redis.command import Batch, Flow, Wait, WakeUp
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, CorruptState, InvalidArgument
from agentperf_redis.metrics import commands
from agentperf_redis.metrics.buffer import Buffer, FlushBatch
from agentperf_redis.metrics.commands import Flushed
from agentperf_redis.metrics.llm_notes import inconsistent_usages, unread_usages
from agentperf_redis.metrics.llm_responses import Responses
from agentperf_redis.metrics.model import Delivery
from agentperf_redis.metrics.retention import Retention

_log = logging.getLogger("agentperf_redis")

FLUSH_EVERY_S = 1.0
"""By default, and after a flush that failed: what waits is tried again soon, however rarely it is flushed otherwise."""
MAX_FLUSH_EVERY_S = 60.0
CLOSE_S, CLOSE_AFTER_FAILURE_S = 2.0, 1.0
"""How long the last flush may go on without anything being counted; and where the one before it failed."""
_LAST_COMMAND_SHARE = 0.8
"""Of that, what a command may take: so that it is there to say why it failed."""
_AS_LONG_AS_IT_TAKES_S = 3600.0
_PROMPT_S = 0.5


@dataclass(slots=True)
class _Request:
    """Somebody waits for a flush that begins after this."""

    wake_up: WakeUp = field(default_factory=WakeUp)
    error: AgentPerfError | None = None


class Flusher:
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
        self._jobs = Background("agentperf-metrics")
        self._begin()
        backend.on_close(self.close)
        register_for_fork(self)

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

    def after_fork(self) -> None:
        """In a forked child: begin empty, under another writer's name. The parent flushes what it has."""
        self.buffer.reset()
        self._begin_usages()
        self._begin()

    def _begin_usages(self) -> None:
        self.unread_usage = unread_usages()
        self.inconsistent_usage = inconsistent_usages()
        self.responses = Responses()

    def _begin(self) -> None:
        self._requests: queue.SimpleQueue[_Request] = queue.SimpleQueue()
        self._last_error: AgentPerfError | None = None
        self._ends_with_worker = False
        self._tried_last = False

    def _wake(self) -> None:
        if self._closed:
            self._say_closed()
            return
        self._end_with_worker()
        self._jobs.at(time.monotonic() + self._rhythm(), self._flush_due)

    def _say_closed(self) -> None:
        if not self._said_closed:
            self._said_closed = True
            warnings.warn(
                f"{self.backend!r} is closed: what its MetricsCollector records from now on is not counted",
                RuntimeWarning,
                stacklevel=6,  # who recorded: this, _wake, Buffer._look_up, record, MetricsCollector.record_execution
            )

    def _end_with_worker(self) -> None:
        """Processes of multiprocessing end without atexit; they have finalizers of their own."""
        if self._ends_with_worker:
            return
        self._ends_with_worker = True
        process = sys.modules.get("multiprocessing.process")
        if process is not None and process.parent_process() is not None:
            from multiprocessing.util import Finalize

            Finalize(None, self.close, exitpriority=10)

    def _flush_due(self) -> None:
        if self._closed:  # the last flush follows
            return
        self._flush(self._asked())
        if not self.buffer.empty:
            self._jobs.at(time.monotonic() + self._rhythm(), self._flush_due)

    def _flush_asked(self) -> None:
        asked = self._asked()
        if asked:  # else another flush, begun after the request, has served it
            self._flush(asked)

    def _flush_last(self) -> None:
        if not self._tried_last:  # one deadline is enough for a server that does not answer
            self._flush(self._asked())

    def _asked(self) -> list[_Request]:
        """Take the requests that wait; the flush that begins now serves them all."""
        asked = []
        with contextlib.suppress(queue.Empty):
            while True:
                asked.append(self._requests.get_nowait())
        return asked

    def _flush(self, asked: list[_Request]) -> None:
        last = self._closed
        error = self._deliver(_LAST_COMMAND_SHARE * self._attempt_timeout() if last else None)
        self._tried_last |= last
        for request in asked:
            request.error = error
            request.wake_up.send()

    def _deliver(self, deadline: float | None = None) -> AgentPerfError | None:
        try:
            error = self.backend.run(self.delivery(), deadline)
        except AgentPerfError as met:
            error = met
        except Exception as met:  # noqa: BLE001  the thread must live on, and what waits is kept
            _log.exception("flushing metrics failed")
            error = AgentPerfError(f"flushing metrics failed: {met!r}")
        if error is not None:
            self.buffer.downsample(self.retention.ttls)
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
        buffer.aggregate()
        if buffer.empty:
            return None
        yield from self.backend.enter("metrics", "all")
        first: AgentPerfError | None = None
        failed: set[int] = set()
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
            try:
                results = yield from Batch(flushes).settled()
            except BaseException:
                for batch in batches:
                    buffer.unanswered(batch, sent)
                raise
            answered = time.monotonic()
            for batch, result in zip(batches, results, strict=True):
                if isinstance(result, AgentPerfError):
                    first = first or result
                    if not self._lightened(batch, result, sent):
                        failed.add(batch.shard)
                else:
                    self._settle(batch, result, sent, answered)
        return first

    def _settle(self, batch: FlushBatch, flushed: Flushed, sent: float, answered: float) -> None:
        self.buffer.settled(batch, flushed.other, flushed.outdated)
        self._settled += 1
        if answered - sent < _PROMPT_S:  # an answer that was long on its way does not tell when the server gave it
            self.buffer.synchronise(flushed.now, (sent + answered) / 2)

    def _lightened(self, batch: FlushBatch, error: AgentPerfError, sent: float) -> bool:
        """Whether the rest of a refused parcel can be tried at once."""
        if isinstance(error, BackendUnavailable) and error.outcome == "unknown":
            self.buffer.unanswered(batch, sent)
        if not isinstance(error, CorruptState):
            return False
        lost = self.buffer.refused(batch, error.key.partition("}:")[2])
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
        if not self._closed:
            self._end_with_worker()
            self._requests.put(request)
        if self._closed or not self._jobs.put(self._flush_asked):
            return True, (yield from self.delivery())
        ended = yield from Wait(request.wake_up, _AS_LONG_AS_IT_TAKES_S if timeout is None else timeout)
        return ended, request.error

    def close(self) -> None:
        """Flush a last time and end the thread. What is recorded later stays here.

        Waits for a server that counts, and not for one that does not answer: see `CLOSE_S`.
        """
        if self._closed:
            return
        self._closed = True
        attempt_timeout = self._attempt_timeout()
        self.buffer.announce_next()  # so that a record after the end is noticed
        if not self.buffer.empty:
            self._jobs.put(self._flush_last)
        settled, ended = -1, False
        while not ended and settled < (settled := self._settled):
            ended = self._jobs.close(attempt_timeout)
        if not self.buffer.empty:
            self._say_lost(attempt_timeout, under_way=not ended)

    def _attempt_timeout(self) -> float:
        maximum = CLOSE_S if self._last_error is None else CLOSE_AFTER_FAILURE_S
        return min(maximum, self.backend.deadline)

    def _say_lost(self, attempt_timeout: float, *, under_way: bool) -> None:
        pending = self.delivery_state().pending
        what = "1 execution" if pending == 1 else f"{pending} executions" if pending else "some use of models or tools"
        unknown = self.buffer.doubtful or under_way
        verb = "may not have been" if unknown else "was not" if pending <= 1 else "were not"
        error = self._last_error
        if isinstance(error, BackendUnavailable):  # what it says of being applied is true of the last attempt only
            cause = f"{error.address}: {error.reason}"
        else:
            cause = str(error or f"{self.backend.address.masked} did not answer within {attempt_timeout:g} s")
        warnings.warn(f"{what} {verb} counted: {cause}", RuntimeWarning, stacklevel=2)

    def delivery_state(self) -> Delivery:
        """Return how this process's records fare."""
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
