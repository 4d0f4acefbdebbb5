"""Evaluators of alerts in processes of their own. One of them is killed while it evaluates."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterable
from typing import Any

from agentperf_redis import AgentPerf
from agentperf_redis.alerts.flows import evaluation, targets
from agentperf_redis.alerts.model import AlertEvent
from tests.support.workers import Worker, WorkerFailed

_KILLED_AFTER = (3, 10**9, 10**9)
"""Number of evaluations after which each evaluator is killed. It is killed between a claim and the report."""


def _evaluate(url: str, namespace: str, killed_after: int) -> Generator[list[AlertEvent], float, None]:
    done = 0
    with AgentPerf(url, namespace=namespace) as perf:
        judge: Any = targets.judged_targets

        def dying(*args: Any) -> Any:
            nonlocal done
            done += 1
            if done == killed_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return judge(*args)

        evaluation.judged_targets = dying  # type: ignore[assignment, attr-defined]  # `evaluation` imports this name
        at = yield []
        while True:
            at = yield list(perf.alerts.evaluate(as_of=at).events)


class Evaluators:
    """Three processes that evaluate the alerts at the same time.

    Args:
        start: starts a worker process with a function and its arguments.
        url: the server.
        namespace: the namespace.

    Attributes:
        killed: number of processes that have been killed.
    """

    def __init__(self, start: Callable[..., Worker], url: str, namespace: str) -> None:
        self._alive = [start(_evaluate, url, namespace, killed_after) for killed_after in _KILLED_AFTER]
        self.killed = 0
        for worker in self._alive:
            worker.said()

    def evaluate(self, times: Iterable[float]) -> list[AlertEvent]:
        """Evaluate as of each time. Returns the transitions that all processes have reported."""
        found: list[AlertEvent] = []
        for number, at in enumerate(times):
            first = number % len(self._alive)
            order = self._alive[first:] + self._alive[:first]
            # Only the first process gets killed, at its third evaluation. If the other processes were always faster, it
            # would never evaluate an alert. Until it is killed, it therefore gets every third element of `times` before
            # the other processes.
            groups = [order] if first or self.killed else [order[:1], order[1:]]
            for together in groups:
                for worker in together:
                    worker.answer(at)
                for worker in together:
                    try:
                        found += worker.said()
                    except WorkerFailed:
                        self._alive.remove(worker)
                        self.killed += 1
        return sorted(found, key=lambda event: event.at)
