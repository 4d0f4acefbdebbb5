"""A program whose records cannot be counted exits soon, with a warning."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import pytest

from agentperf_redis import AgentPerf
from agentperf_redis.backend import Backend
from agentperf_redis.errors import BackendUnavailable
from agentperf_redis.metrics import commands
from agentperf_redis.metrics.client import MetricsCollector
from agentperf_redis.metrics.recording import Recording
from agentperf_redis.metrics.tracking import track_performance
from tests.support.places import ROOT
from tests.support.proxy import Proxy
from tests.support.servers import Raw, Server
from tests.support.stalls import StallDetector, hurry

pytestmark = pytest.mark.thorough

SLACK_S = 0.7
"""Time that a busy machine may add to an upper bound, s."""

SCRIPT = """
import atexit
import time

from tests.support.stalls import StallDetector

stalls = StallDetector().__enter__()
atexit.register(lambda: print(stalls.own(begin, time.monotonic()), flush=True))  # registered first, so called last

from agentperf_redis import AgentPerf, track_performance

perf = AgentPerf({url!r}, namespace={namespace!r})


@track_performance("planner", perf.metrics)
def plan():
    pass


for _ in range(3):
    plan()
begin = time.monotonic()
{rest}
"""
"""A program that prints how many seconds passed from the end of its work to its exit, without stalls of the machine."""


def run(url: str, namespace: str, rest: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(url=url, namespace=namespace, rest=rest)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("rest", ["", "perf.close()"])
def test_program_with_wrong_url_warns_and_exits_normally(namespace: str, rest: str) -> None:
    done = run("redis://me:hunter2@127.0.0.1:1/0", namespace, rest)
    assert float(done.stdout) < 2.0 + SLACK_S
    assert done.returncode == 0
    assert re.search(r"RuntimeWarning: 3 executions were not counted: .*redis://me:\*+@127\.0\.0\.1:1/0", done.stderr)
    assert done.stderr.count("RuntimeWarning") == 1
    assert "hunter2" not in done.stderr


def test_program_with_counted_records_exits_silently(server: Server, namespace: str, raw: Raw) -> None:
    done = run(server.url, namespace)
    assert (done.returncode, done.stderr) == (0, "")
    assert float(done.stdout) < 2.0 + SLACK_S
    assert raw.keys(f"{namespace}:*:total:planner")


@pytest.mark.parametrize("trouble", ["close_port", "go_silent"])
def test_close_after_failed_flush_takes_at_most_a_second(
    proxy: Proxy, connect: Callable[..., Backend], trouble: str
) -> None:
    backend = connect(proxy.url)
    collector = MetricsCollector(backend=backend)
    collector.record_execution("research", 0.1, True)
    assert collector.flush()
    hurry(backend, 0.3)
    getattr(proxy, trouble)()
    collector.record_execution("research", 0.1, True)
    with pytest.raises(BackendUnavailable):
        collector.flush()
    hurry(backend, 5.0)
    with StallDetector() as stalls:
        begin = time.monotonic()
        with pytest.warns(RuntimeWarning, match=f"1 execution may not have been counted: {re.escape(proxy.url)}: "):
            backend.close()
        assert stalls.own(begin, time.monotonic()) < 1.0 + SLACK_S
    assert collector.delivery().pending == 1


def test_close_during_an_attempt_takes_two_seconds(proxy: Proxy, connect: Callable[..., Backend]) -> None:
    backend = connect(proxy.url, deadline=20.0)
    collector = MetricsCollector(backend=backend)
    collector.record_execution("research", 0.1, True)
    assert collector.flush()
    held = proxy.swallow(only=commands.FLUSH, times=1000)
    collector.record_execution("research", 0.1, True)
    held.wait()
    with StallDetector() as stalls:
        begin = time.monotonic()
        with pytest.warns(RuntimeWarning, match="1 execution may not have been counted"):
            asyncio.run(backend.aclose())
        assert stalls.own(begin, time.monotonic()) < 2.0 + SLACK_S


def test_close_waits_for_a_slow_server_with_progress(
    proxy: Proxy, connect: Callable[..., Backend], raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time limit applies only while the server does not reply. While the server replies, `close` waits longer."""
    monkeypatch.setattr("agentperf_redis.metrics.buffer.MAX_BATCH_ACCUMULATORS", 1)
    backend = connect(proxy.url)
    collector = MetricsCollector(backend=backend)
    collector.record_execution("warm", 0.1, True)
    assert collector.flush()
    proxy.delay(0.2, only=commands.FLUSH, times=1000)
    for number in range(15):
        collector.record_llm("research", tokens_in=1)
        with collector.span("research", f"step-{number}"):
            pass
    begin = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.close()
    assert time.monotonic() - begin > 2.0
    assert collector.delivery().pending == 0


def test_recording_after_close_warns_once(server: Server, namespace: str) -> None:
    with AgentPerf(server.url, namespace=namespace) as perf:
        collector = perf.metrics
        collector.record_execution("planner", 0.1, True)
    with pytest.warns(RuntimeWarning, match=rf"{re.escape(namespace)}.*is closed") as warned:
        collector.record_execution("planner", 0.1, True)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collector.record_execution("planner", 0.1, True)
    delivery = collector.delivery()
    assert (delivery.counted, delivery.pending) == (1, 2)


def test_first_record_after_close_warns(server: Server, namespace: str) -> None:
    with AgentPerf(server.url, namespace=namespace) as perf:
        collector = perf.metrics
    with pytest.warns(RuntimeWarning, match="is closed"):
        collector.record_llm("planner", tokens_in=5)


def in_a_span(perf: AgentPerf) -> None:
    with perf.metrics.track("planner"), perf.metrics.span("planner", "think"):
        pass


RECORDING: dict[str, Callable[[AgentPerf], object]] = {
    "execution": lambda perf: perf.metrics.record_execution("planner", 0.1, True),
    "cancellation": lambda perf: perf.metrics.record_cancellation("planner", 0.1),
    "model": lambda perf: perf.metrics.record_llm("planner", tokens_in=5),
    "tools": lambda perf: perf.metrics.record_tool_calls("planner"),
    "stream": lambda perf: perf.metrics.record_stream("planner", 1, 0.1),
    "span": in_a_span,
    "function": lambda perf: track_performance("planner", perf.metrics)(lambda: 5)(),
    "generator": lambda perf: list(track_performance("planner", perf.metrics)(iterate)()),
}


def iterate() -> Iterator[int]:
    yield 1


def test_recording_covers_every_method() -> None:
    assert {name for name in vars(Recording) if name.startswith("record_")} == {
        *("record_execution", "record_cancellation", "record_llm", "record_tool_calls", "record_stream")
    }


@pytest.mark.parametrize("record", RECORDING.values(), ids=RECORDING)
@pytest.mark.parametrize("used", ["before", "after"])
def test_every_record_after_close_warns_once(
    server: Server, namespace: str, record: Callable[[AgentPerf], object], used: str
) -> None:
    perf = AgentPerf(server.url, namespace=namespace)
    if used == "before":
        record(perf)
    perf.close()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        record(perf)  # warns even if this call creates the collector
        record(perf)
    (warned,) = told
    assert (warned.category, warned.filename) == (RuntimeWarning, __file__)
    assert re.search(r"is closed: later records .* not counted", str(warned.message))


def test_each_client_warns_of_late_records(server: Server, namespace: str) -> None:
    with warnings.catch_warnings(record=True) as told:
        # With "default", Python shows equal warnings from one line only once. Every client must warn nevertheless.
        warnings.simplefilter("default")
        for _ in range(3):
            perf = AgentPerf(server.url, namespace=namespace)
            perf.close()
            perf.metrics.record_llm("planner", tokens_in=5)
    assert len(told) == 3


def test_block_that_ends_after_close_warns(server: Server, namespace: str) -> None:
    perf = AgentPerf(server.url, namespace=namespace)
    with pytest.warns(RuntimeWarning, match="is closed"), perf.metrics.track("planner"):
        perf.close()


def test_tracked_call_after_close_is_undisturbed(server: Server, namespace: str) -> None:
    perf = AgentPerf(server.url, namespace=namespace)
    work = track_performance("planner", perf.metrics)(lambda: 5)
    assert work() == 5
    perf.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert work() == 5, "also when warnings are errors"
