"""Histories, rules and receivers for the tests of alerts."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from agentperf_redis import AgentPerf
from agentperf_redis.alerts.model import AlertEvent, AlertState
from agentperf_redis.backend import Backend
from agentperf_redis.metrics import commands
from agentperf_redis.metrics.accumulator import FAILED, OK
from agentperf_redis.metrics.buffer import Buffer
from agentperf_redis.metrics.retention import Retention

MINUTE = 60


class History:
    """Writes executions with end times in the past, into the slices that the retention still keeps.

    Args:
        backend: the server and namespace.
        retention: how long slices live.

    Attributes:
        now: the server's time when this object was made, a whole minute, s since 1970.
    """

    def __init__(self, backend: Backend, retention: Retention | None = None) -> None:
        self._backend = backend
        self._retention = retention or Retention()
        self._clock = self.server_time()
        self.now = self._clock // MINUTE * MINUTE
        self._buffer = Buffer(on_first=lambda: None, clock=lambda: self._clock)
        self._buffer.synchronise(self._clock, self._clock)

    def server_time(self) -> float:
        """Return the server's time, s since 1970."""
        now = commands.read(self._backend.namespace, 0, (), window_ms=0, as_of_ms=-1, max_exact=-1)
        return self._backend.run(now).now_ms / 1000

    def minutes(self, first: int, last: int) -> list[float]:
        """Return whole minutes, from `first` to `last` minutes before now."""
        return [self.now - MINUTE * back for back in range(first, last - 1, -1)]

    def record(self, agent: str, at: float, seconds: float, *, failed: int = 0, succeeded: int = 1) -> None:
        """Record executions that ended at `at`, s since 1970. `at` must not be less than in an earlier call."""
        self._clock = at
        for outcome, count in ((OK, succeeded), (FAILED, failed)):
            for _ in range(count):
                self._buffer.record(agent, seconds, outcome)

    def count(self) -> None:
        """Send everything recorded."""
        self._clock = self.server_time()
        self._buffer.aggregate()
        self._buffer.downsample(self._retention.ttls)
        while batches := self._buffer.batches():
            for batch in batches:
                self._backend.run(
                    commands.flush(
                        self._backend.namespace, batch, now=self._clock, retention=self._retention, firm=True
                    )
                )
                self._buffer.settled(batch, 0)


def evaluated(perf: AgentPerf, times: Iterable[float]) -> list[AlertEvent]:
    """Evaluate all rules as of each time. Returns the transitions."""
    return [event for at in times for event in perf.alerts.evaluate(as_of=at).events]


def changes(events: Iterable[AlertEvent]) -> list[tuple[str, str]]:
    """Return target and next state of each transition."""
    return [(event.target, event.after.value) for event in events]


def firings(events: Iterable[AlertEvent]) -> list[tuple[str, str, float, float | None]]:
    """Return rule, target, start and end of each firing; the end is None while the alert fires."""
    found: list[tuple[str, str, float, float | None]] = []
    open_ones: dict[tuple[str, str], int] = {}
    for event in events:
        key = (event.rule, event.target)
        if event.after is AlertState.FIRING:
            open_ones[key] = len(found)
            found.append((*key, event.at, None))
        elif event.before is AlertState.FIRING:
            at = open_ones.pop(key)
            found[at] = (*key, found[at][2], event.at)
    return sorted(found, key=lambda each: (each[2], each[0], each[1]))


class Receiver:
    """A local HTTP server that keeps the messages posted to it.

    Args:
        answer: returns the status of the answer to a request. If None, every answer has status 200.
    """

    def __init__(self, answer: Callable[[], int] | None = None) -> None:
        posted: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = answer() if answer is not None else 200
                if status == 200:
                    posted.append(json.loads(body))
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.posted = posted
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The address for apprise, with a secret in it."""
        return f"json://user:hunter2@127.0.0.1:{self._server.server_address[1]}/tok3n"

    def ids(self) -> list[str]:
        """Return the id of each delivered message."""
        return [each["message"].rpartition("id ")[2] for each in self.posted]

    def titles(self) -> list[str]:
        return [each["title"] for each in self.posted]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
