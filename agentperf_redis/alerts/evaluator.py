"""Evaluates alerts and delivers notifications, on a background thread or in an asyncio task, until stopped.

There is no leader. Any number of processes may evaluate. Each process claims due rules on the server, so the processes
share the work. If a process ends while it evaluates, the rules that it claimed miss one interval.
"""

from __future__ import annotations

import asyncio
import logging
import time

from agentperf_redis.alerts import flows
from agentperf_redis.alerts.flows import AlertService
from agentperf_redis.alerts.notify import Deliveries
from agentperf_redis.background import BackgroundTask
from agentperf_redis.command import Flow
from agentperf_redis.errors import AgentPerfError, BackendUnavailable

_log = logging.getLogger("agentperf_redis")

_RETRY_S = 1.0
_LOOK_S = 1.0
"""Interval at which the evaluator looks for due notifications."""
_CLOSE_S = 5.0


class _Rounds:
    """Runs rounds of evaluation and delivery; used by both the blocking and the asyncio API.

    Args:
        service: the alerts of the process.
    """

    def __init__(self, service: AlertService) -> None:
        self._service = service
        self.deliveries = Deliveries(service)
        self._due = 0.0
        self._waits = False
        self._wrong = ""

    def next(self) -> Flow[float]:
        """Run one round. Returns the seconds until the next one."""
        try:
            if time.monotonic() >= self._due:
                yield from self._evaluate()
            yield from self.deliveries.start_due()
        except BackendUnavailable as error:
            if not self._waits:
                _log.warning("alerts wait for the server: %s", error)
            self._waits = True
            return _RETRY_S
        except AgentPerfError as error:
            self._note(error)
        if self._waits:
            _log.warning("alerts are evaluated again")
            self._waits = False
        return max(0.0, min(_LOOK_S, self._due - time.monotonic()))

    def _evaluate(self) -> Flow[None]:
        try:
            done = yield from flows.evaluate(self._service, None)
        except BackendUnavailable:
            raise
        except AgentPerfError as error:  # not raised again, so that `next` still sends due notifications
            self._due = time.monotonic() + _RETRY_S
            self._note(error)
            return
        if done.rules:
            self._wrong = ""
        self._due = time.monotonic() + done.next_after
        for event in done.events:
            _log.info("alert %s, %s: %s: %s", event.rule, event.target, event.after.value, event.reason)

    def _note(self, error: AgentPerfError) -> None:
        """Log an error unless the previous error was the same."""
        if str(error) != self._wrong:
            _log.warning("alerts cannot be evaluated: %s", error)
        self._wrong = str(error)


class Evaluator(BackgroundTask):
    """Evaluates alerts on a background thread until stopped. The thread does not run in a forked child.

    Args:
        service: the alerts of the process.
    """

    def __init__(self, service: AlertService) -> None:
        self._backend = service.backend
        super().__init__("agentperf-alerts")
        self._rounds = _Rounds(service)
        self._backend.on_close(self.stop)
        self._jobs.put(self._round)

    def __repr__(self) -> str:
        return f"Evaluator({'running' if self.running else 'stopped'})"

    def stop(self) -> None:
        """Stop. Waits at most five seconds for the running evaluation and deliveries."""
        until = time.monotonic() + _CLOSE_S
        self._jobs.close(_CLOSE_S)
        self._rounds.deliveries.wait(max(0.0, until - time.monotonic()))
        self._backend.off_close(self.stop)

    def _round(self) -> None:
        if self._jobs.closing:
            return
        pause = _RETRY_S
        try:
            pause = self._backend.run(self._rounds.next())
        finally:
            self._jobs.at(time.monotonic() + pause, self._round)


async def run(service: AlertService) -> None:
    """Evaluate alerts in this task, until it is cancelled."""
    rounds = _Rounds(service)
    while True:
        pause = await service.backend.arun(rounds.next())
        await asyncio.sleep(pause)
