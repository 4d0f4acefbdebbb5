"""The one background thread that the caches of a backend have in a process: it renews leases, and reports reads."""

from __future__ import annotations

import os
import threading
import time
import weakref

from agentperf_redis.backend import Backend
from agentperf_redis.cache import commands
from agentperf_redis.cache.flows.access_reports import flush
from agentperf_redis.cache.process.compute_lease import Turn
from agentperf_redis.cache.process.shared_state import Binding, log
from agentperf_redis.command import Batch
from agentperf_redis.errors import AgentPerfError, BackendUnavailable

REPORT_AFTER_S = 0.2
"""How long reads wait to be reported. Other processes' evictions do not know of them until then."""
_AFTER_FAILURE_S = 1.0
_CLOSE_S = 1.0
"""How long closing may take for all caches together, should the server not answer."""


class Chores:
    """Starts its thread with the first chore and sleeps while there is none.

    Args:
        backend: where to send what is due.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._start_empty()
        backend.on_close(self._finish)
        _chores.add(self)

    def _start_empty(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._thread: threading.Thread | None = None
        self._turns: dict[Turn, float] = {}
        self._reports: dict[Binding, float] = {}
        self._closed = False

    def report_soon(self, binding: Binding) -> None:
        """Send what a cache has to report, a little later."""
        with self._changed:
            self._reports.setdefault(binding, time.monotonic() + REPORT_AFTER_S)
            self._wake()

    def keep(self, turn: Turn) -> None:
        """Renew a lease until `drop`."""
        if not turn.token:
            return
        with self._changed:
            self._turns[turn] = time.monotonic() + turn.renew_every_s
            self._wake()

    def drop(self, turn: Turn) -> None:
        """Renew a lease no more."""
        if not turn.token:
            return
        with self._changed:
            self._turns.pop(turn, None)

    def _wake(self) -> None:
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._work, name="agentperf-cache", daemon=True)
            self._thread.start()
        self._changed.notify()

    def _work(self) -> None:
        failing = False
        while True:
            with self._changed:
                while not self._closed:
                    due = min((*self._turns.values(), *self._reports.values()), default=None)
                    left = None if due is None else due - time.monotonic()
                    if left is not None and left <= 0:
                        break
                    self._changed.wait(left)
                if self._closed:
                    return
                now = time.monotonic()
                turns = [turn for turn, at in self._turns.items() if at <= now]
                for turn in turns:
                    self._turns[turn] = now + turn.renew_every_s
                reports = [binding for binding, at in self._reports.items() if at <= now]
                for binding in reports:
                    del self._reports[binding]
            try:
                self._renew(turns)
                for binding in reports:
                    self._backend.run(flush(binding))
            except AgentPerfError as error:
                if not failing:
                    log.warning("caches: reads cannot be reported, leases not renewed: %s", error)
                failing = True
                with self._changed:
                    for binding in reports:
                        self._reports.setdefault(binding, time.monotonic() + _AFTER_FAILURE_S)
            except Exception:  # noqa: BLE001  the thread serves all caches: one fault must not end it
                log.exception("caches: a report or a renewal failed")
            else:
                if failing:
                    log.warning("caches: reads are reported again")
                failing = False

    def _renew(self, turns: list[Turn]) -> None:
        if not turns:
            return
        renewals = Batch(
            tuple(commands.renew(turn.binding.keys, turn.name, turn.token, turn.lease_ms) for turn in turns)
        )
        for turn, held in zip(turns, self._backend.run(renewals.settled()), strict=True):
            if held is False:  # given up, or taken over: what is computed will be refused, and nothing is left to renew
                self.drop(turn)

    def _finish(self) -> None:
        """Before the connections go: send what waits, end the thread."""
        end = time.monotonic() + _CLOSE_S
        with self._changed:
            self._closed = True
            reports, self._reports = list(self._reports), {}
            thread = self._thread
            self._changed.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=_CLOSE_S / 2)
        for done, binding in enumerate(reports):
            try:
                self._backend.run(flush(binding), max(0.05, end - time.monotonic()))
            except BackendUnavailable as error:  # the others would wait for the same
                log.warning("%d caches: the last reads could not be reported: %s", len(reports) - done, error)
                return
            except AgentPerfError as error:
                log.warning("cache %s: the last reads could not be reported: %s", binding.name, error)

    def after_fork(self) -> None:
        """In the child: the thread is the parent's, and so are its chores."""
        self._start_empty()


_chores: weakref.WeakSet[Chores] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for chores in list(_chores):
        chores.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
