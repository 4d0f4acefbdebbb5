"""Tests of the circuit breaker with simulated servers: when it opens, refuses commands and closes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from agentperf_redis.command import Command
from agentperf_redis.errors import BackendUnavailable
from agentperf_redis.transport.address import parse_url
from agentperf_redis.transport.breaker import Breaker
from agentperf_redis.transport.delivery import Backoff, Exchange, ExchangeFailed, deliver
from agentperf_redis.transport.topology import Node, Topology
from tests.support.servers import wait_until

NODE = Node("localhost", 6379)
TIMEOUT_S = 5.0


class Fleet:
    """A breaker and its simulated servers, which answer probes only while `up` is set."""

    def __init__(self, url: str = "redis://localhost") -> None:
        self.topology = Topology(parse_url(url))
        self.up = threading.Event()
        self.probes = 0
        self.recoveries = 0
        self.breaker = Breaker(self.topology, TIMEOUT_S, self._answers, None, self._recovered)

    def _answers(self, node: Node) -> bool:
        self.probes += 1
        return self.up.is_set()

    def _recovered(self) -> None:
        self.recoveries += 1

    def open(self) -> None:
        self.breaker.suspect(NODE, TIMEOUT_S)
        wait_until(lambda: self.breaker.open, "the breaker to open")

    def idle(self) -> bool:
        """Whether no probe is running or scheduled."""
        return not any(watch.running for watch in self.breaker._watches.values())


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    made = Fleet()
    yield made
    made.breaker.stop()
    wait_until(made.idle, "the probing to end")


def echo() -> Command[bytes]:
    return Command("ECHO", ("key",), (), lambda reply: reply)


def test_node_without_answer_is_refused_until_recovery(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    fleet.open()
    refusals = [fleet.breaker.refusal(NODE) for _ in range(3)]
    assert [refusal.outcome for refusal in refusals if refusal is not None] == ["not_applied"] * 3
    assert "fail at once" in str(refusals[0])
    fleet.up.set()
    wait_until(lambda: fleet.recoveries == 1, "the recovery")
    assert fleet.breaker.refusal(NODE) is None
    texts = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(texts) == 2, "one log message when the breaker opens, one when it closes"
    assert texts[0] == "redis://localhost:6379/0 does not answer: commands for it fail at once until it does"
    assert "answers again" in texts[1]
    assert texts[1].endswith("commands that failed at once: 3")


def test_answered_probe_stops_further_probes(fleet: Fleet) -> None:
    fleet.up.set()
    for _ in range(5):
        fleet.breaker.suspect(NODE, TIMEOUT_S)
        wait_until(fleet.idle, "the probe")
    assert fleet.probes == 1
    assert not fleet.breaker.open
    assert fleet.recoveries == 0


def test_short_deadline_causes_no_probe(fleet: Fleet) -> None:
    fleet.breaker.suspect(NODE, TIMEOUT_S / 2)
    assert fleet.idle()
    assert fleet.probes == 0


def test_open_breaker_does_not_refuse_other_nodes(fleet: Fleet) -> None:
    fleet.open()
    assert fleet.breaker.refusal(Node("localhost", 7000)) is None
    assert fleet.breaker.refusal(None) is None


def test_removed_node_is_no_longer_probed() -> None:
    fleet = Fleet("redis+sentinel://localhost:26379/service")
    fleet.topology.learn(NODE, [b"localhost", b"6379"])
    fleet.open()
    fleet.topology.learn(NODE, [b"localhost", b"7000"])
    wait_until(lambda: fleet.recoveries == 1, "the watch to end")
    assert not fleet.breaker.open


def test_stopped_breaker_refuses_nothing(fleet: Fleet) -> None:
    fleet.open()
    fleet.breaker.stop()
    assert fleet.breaker.refusal(NODE) is None
    wait_until(fleet.idle, "the probing to end")
    fleet.breaker.suspect(NODE, TIMEOUT_S)
    assert fleet.idle()
    assert fleet.recoveries == 0


def test_breaker_is_closed_in_forked_child(fleet: Fleet) -> None:
    fleet.open()
    inherited = list(fleet.breaker._watches.values())
    fleet.breaker.after_fork()
    assert fleet.breaker.refusal(NODE) is None
    fleet.open()
    assert all(watch.close(10.0) for watch in inherited), (
        "the inherited threads still run in this simulated fork, and must have no work"
    )
    assert fleet.breaker.open


def drive(fleet: Fleet, commands: list[Command[Any]], answer: list[Any] | None) -> tuple[list[Any], int]:
    """Deliver commands. Return the results and the number of exchanges.

    Every exchange gets `answer`; None means that the exchange times out. The clock is simulated; only backoffs advance
    it.
    """
    now = [100.0]
    results: list[Any] = [None] * len(commands)
    delivery = deliver(commands, fleet.topology, TIMEOUT_S, results.__setitem__, fleet.breaker, lambda: now[0])
    exchanges = 0
    try:
        step = next(delivery)
        while True:
            if isinstance(step, Backoff):
                now[0] += step.seconds
                step = delivery.send(None)
                continue
            assert isinstance(step, Exchange)
            exchanges += 1
            now[0] += step.timeout_s if answer is None else 0.0
            failed = ExchangeFailed("no answer", sent=True, timed_out=True)
            step = delivery.throw(failed) if answer is None else delivery.send(answer)
    except StopIteration:
        return results, exchanges


def test_unanswered_delivery_opens_breaker_for_later_ones(fleet: Fleet) -> None:
    results, exchanges = drive(fleet, [echo()], None)
    assert isinstance(results[0], BackendUnavailable)
    assert results[0].outcome == "unknown"
    assert exchanges > 1
    wait_until(lambda: fleet.breaker.open, "the breaker to open")
    results, exchanges = drive(fleet, [echo(), echo()], None)
    assert [error.outcome for error in results] == ["not_applied"] * 2
    assert exchanges == 0
    fleet.up.set()
    wait_until(lambda: not fleet.breaker.open, "the breaker to close")
    assert drive(fleet, [echo()], [b"hello"]) == ([b"hello"], 1)


def test_outage_during_recovery_opens_breaker_again(fleet: Fleet) -> None:
    again = threading.Event()

    def relapse() -> None:  # runs on recovery, and takes the server down again
        fleet.up.clear()
        fleet.breaker.suspect(NODE, TIMEOUT_S)
        again.set()

    fleet.breaker._recovered = relapse
    fleet.open()
    fleet.up.set()
    assert again.wait(10)
    wait_until(lambda: fleet.breaker.open, "the breaker to open again")
