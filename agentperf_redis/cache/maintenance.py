"""The one background thread for all caches of a backend in this process.

It renews leases, reports reads, and samples the caches for their histories.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from agentperf_redis.backend import Backend
from agentperf_redis.background import Background, register_for_fork
from agentperf_redis.cache import commands
from agentperf_redis.cache.flows.access_reports import flush
from agentperf_redis.cache.history import sample
from agentperf_redis.cache.process.compute_lease import ComputeLease
from agentperf_redis.cache.process.shard import Shard
from agentperf_redis.cache.process.shared_state import SharedState, log
from agentperf_redis.command import Batch, Command
from agentperf_redis.errors import AgentPerfError, BackendUnavailable
from agentperf_redis.history import Sampler
from agentperf_redis.transport.topology import Node

T = TypeVar("T")

REPORT_AFTER_S = 0.2
"""How long reads are buffered before they are reported. Until the report, other processes' evictions ignore them."""
_MAX_TIMES_LATER = 25.0
"""With more than 4 shards, the report of each shard is delayed in proportion to their number, so that the number of
reports stays bounded. This is the maximum factor, reached at 100 shards."""
_AFTER_FAILURE_S = 1.0
_MAX_SAMPLE_S = 0.5
_CLOSE_S = 1.0
"""How long closing may take for all caches together if the server does not answer."""


class Maintenance:
    """Renews compute leases and reports reads on a background thread.

    Args:
        backend: sends the commands.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._jobs = Background("agentperf-cache")
        self._sampler = Sampler(backend, self._jobs, _samples, self._sample_timeout_s)
        self.after_fork()
        backend.on_close(self._finish)
        register_for_fork(self)

    def after_fork(self) -> None:
        """In a forked child: start empty, since the parent keeps its leases and reports."""
        # Reentrant: a signal handler or `__del__` may use a cache on the thread that holds this lock.
        self._lock = threading.RLock()
        self._compute_leases: dict[ComputeLease, float] = {}
        self._reports: dict[Shard, float] = {}
        self._last_reports: dict[Shard, float] = {}
        self._closed = False
        self._failing = False

    def report_soon(self, shard: Shard) -> None:
        """Report the buffered reads of a shard after REPORT_AFTER_S, or later if the cache has many shards."""
        due = time.monotonic() + REPORT_AFTER_S * min(_MAX_TIMES_LATER, max(1.0, len(shard.cache.shards) / 4))
        with self._lock:
            self._reports.setdefault(shard, due)
        self._schedule(due)

    def used(self, shared: SharedState) -> None:
        """Sample a cache for its history in the next slice, since this process has used it."""
        self._sampler.used(shared.keys.tag, shared)

    def _sample_timeout_s(self) -> float:
        """Return how long a sample may take, s: renewals on the same thread must still have time for a retry."""
        return min(self._backend.deadline, _MAX_SAMPLE_S)

    def keep(self, compute_lease: ComputeLease) -> None:
        """Renew a lease until `drop` is called for it."""
        if not compute_lease.token:
            return
        due = time.monotonic() + compute_lease.renew_every_s
        with self._lock:
            self._compute_leases[compute_lease] = due
        self._schedule(due)

    def drop(self, compute_lease: ComputeLease) -> None:
        """Stop renewing a lease."""
        if not compute_lease.token:
            return
        with self._lock:
            self._compute_leases.pop(compute_lease, None)

    def _expires(self, compute_lease: ComputeLease) -> bool:
        """Return whether to let a lease expire: True if its value is computed on an event loop that has stopped."""
        flight = compute_lease.flight
        if flight is None or not flight.stands_still:
            return False
        if compute_lease.shared.flights.end_if_stuck(flight):
            self.drop(compute_lease)
        return True

    def _schedule(self, due: float) -> None:
        if not self._closed:
            self._jobs.at(due, self._do_due)

    def _do_due(self) -> None:
        """On the background thread: do all renewals and reports that are due, and schedule the next run."""
        now = time.monotonic()
        with self._lock:
            compute_leases = [compute_lease for compute_lease, at in list(self._compute_leases.items()) if at <= now]
            for compute_lease in compute_leases:
                self._compute_leases[compute_lease] = now + compute_lease.renew_every_s
            compute_leases = [each for each in compute_leases if not self._expires(each)]
            reports = [shard for shard, at in list(self._reports.items()) if at <= now]
            for shard in reports:
                del self._reports[shard]
        if compute_leases or reports:
            self._send(compute_leases, reports)
        with self._lock:
            due = min((*self._compute_leases.values(), *self._reports.values()), default=math.inf)
        self._schedule(due)

    def _send(self, compute_leases: list[ComputeLease], reports: list[Shard]) -> None:
        first = self._failure(self._renew, compute_leases)
        for shard in reports:
            failure = self._failure(self._report, shard)
            if failure is not None:
                first = first or failure
                with self._lock:
                    self._reports.setdefault(shard, time.monotonic() + _AFTER_FAILURE_S)
        if first is not None and not self._failing:
            log.warning("caches: reads cannot be reported, leases are not renewed: %s", first)
        elif first is None and self._failing:
            log.warning("caches: reads can be reported again")
        self._failing = first is not None

    def _failure(self, work: Callable[[T], None], subject: T) -> AgentPerfError | None:
        """Do work and return its error, if any. Only one node may have failed, so the work for others goes on."""
        try:
            work(subject)
        except AgentPerfError as error:
            return error
        except Exception:  # noqa: BLE001  the thread works for all caches: one fault must not end it
            log.exception("caches: a report or a renewal failed")
        return None

    def _report(self, shard: Shard) -> None:
        self._backend.run(flush(shard))

    def _renew(self, compute_leases: list[ComputeLease]) -> None:
        if not compute_leases:
            return
        renewals = Batch(
            tuple(
                commands.renew(each.shared.shard(each.name).keys, each.name, each.token, each.lease_ms)
                for each in compute_leases
            )
        )
        for compute_lease, held in zip(compute_leases, self._backend.run(renewals.settled()), strict=True):
            if held is False:  # the lease was released or replaced, so the server will refuse the value
                self.drop(compute_lease)

    def _finish(self) -> None:
        """Before the connections close: send all pending reports and end the thread.

        If `SystemExit` or `KeyboardInterrupt` of a signal handler ends this call early, the next call continues.
        """
        end = time.monotonic() + _CLOSE_S
        with self._lock:
            self._closed = True
            self._last_reports |= self._reports
            self._reports = {}
            self._compute_leases.clear()
        self._jobs.close(_CLOSE_S / 2)
        lost: dict[Node | None, BackendUnavailable] = {}
        unreported = set()
        for shard in list(self._last_reports):
            node = self._backend.node_of(shard.keys.meta)
            if node in lost:  # the node did not answer before, so do not wait for it again
                unreported.add(shard.cache)
            else:
                try:
                    self._backend.run(flush(shard), max(0.05, end - time.monotonic()))
                except BackendUnavailable as error:
                    lost[node] = error
                    unreported.add(shard.cache)
                except AgentPerfError as error:
                    log.warning("cache %s: the last reads could not be reported: %s", shard.cache.name, error)
            self._last_reports.pop(shard, None)
        if lost:
            reason = next(iter(lost.values()))
            log.warning("%d caches: the last reads could not be reported: %s", len(unreported), reason)


def _samples(shared: SharedState) -> tuple[Command[int], ...]:
    return tuple(sample(shard.keys) for shard in shared.shards)
