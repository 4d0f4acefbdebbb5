"""In a program that configures no logging, outages and errors are shown, each at most once an hour."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

import agentperf_redis
from agentperf_redis import last_resort
from agentperf_redis.errors import BackendUnavailable
from agentperf_redis.last_resort import OUTAGE, LastResort
from tests.support.places import ROOT

AWAY = BackendUnavailable("redis://localhost:1/0", "not_applied", "connection refused")


def new_logger() -> logging.Logger:
    """Make a logger that only the last resort handles. Call it inside a test: pytest adds handlers before the test."""
    logger = logging.getLogger(f"last_resort.{uuid.uuid4().hex}")
    logger.propagate = False
    logger.addHandler(LastResort())
    return logger


def shown_during(work: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        work()
    return [str(each.message) for each in shown if each.category is RuntimeWarning]


def test_library_has_this_handler() -> None:
    handlers = logging.getLogger(last_resort.LOGGER).handlers
    assert agentperf_redis.__name__ == last_resort.LOGGER
    assert any(isinstance(handler, LastResort) for handler in handlers)


def test_outage_is_shown_once_whoever_reports_it() -> None:
    log = new_logger()

    def report() -> None:
        log.warning("cache %s: computing without the cache: %s", "a", AWAY)
        log.warning("flushing metrics failed, records are kept: %s", AWAY)
        log.warning("%s does not answer", "redis://localhost:1/0", extra=OUTAGE)

    def report_on_threads() -> None:
        with ThreadPoolExecutor(8) as threads:
            for _ in range(24):
                threads.submit(report)

    (text,) = shown_during(report_on_threads)
    assert "redis://localhost:1/0" in text
    assert "'agentperf_redis'" in text, "the name of the logger"


def test_errors_are_shown_despite_an_outage() -> None:
    log = new_logger()

    def report() -> None:
        log.warning("%s", AWAY)
        for number in range(3):
            log.error("%d executions were not counted", number)
        log.warning("settings changed")
        log.info("%s", AWAY)

    assert len(shown_during(report)) == 2


def test_subject_is_shown_again_after_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    log, now = new_logger(), [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def report() -> None:
        for minutes in (0, 1, 59, 61):
            now[0] = 1000.0 + 60 * minutes
            log.warning("%s", AWAY)

    assert len(shown_during(report)) == 2


@pytest.mark.parametrize("place", ["own", "parent"])
def test_configured_handler_replaces_the_last_resort(place: str) -> None:
    parent, logger = logging.getLogger("configured"), logging.getLogger("configured.library")
    parent.propagate = False
    received: list[logging.LogRecord] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            received.append(record)

    logger.addHandler(LastResort())
    logger.addHandler(logging.NullHandler())
    (logger if place == "own" else parent).addHandler(Kept())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logger.warning("%s", AWAY)
    assert len(received) == 1


def test_warnings_as_errors_do_not_reach_the_call(capsys: pytest.CaptureFixture[str]) -> None:
    log = new_logger()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.warning("%s", AWAY)
    assert "connection refused" in capsys.readouterr().err


OUTAGE_PROGRAM = """
import threading, time
from agentperf_redis import AgentPerf

perf = AgentPerf("redis://127.0.0.1:1/0", deadline=0.2)
cache, lb = perf.cache("a"), perf.balancer(on_unavailable="none")

def work():
    for number in range(3):
        perf.metrics.record_execution("planner", 0.1, True)
        cache.get_or_compute(f"k{number}", lambda: 1)
        lb.acquire("coder")

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def test_program_without_logging_shows_an_outage_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OUTAGE_PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    shown = [line for line in done.stderr.splitlines() if "RuntimeWarning: agentperf_redis: " in line]
    assert len(shown) == 1, done.stderr
