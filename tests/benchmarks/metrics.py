"""Benchmarks of metrics: the cost of recording, flushing and reading, and the error of quantiles."""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from agentperf_redis.backend import Backend
from agentperf_redis.metrics import commands
from agentperf_redis.metrics.accumulator import OK
from agentperf_redis.metrics.buffer import Buffer
from agentperf_redis.metrics.client import MetricsCollector
from agentperf_redis.metrics.histogram import RELATIVE_ERROR, bucket_counts, estimated_quantile, exact_quantile
from agentperf_redis.metrics.retention import Retention, memory_forecast
from agentperf_redis.metrics.tracking import track_performance
from agentperf_redis.presence import MAX_EXECUTIONS, OpenCalls, Presence
from agentperf_redis.script import Script
from tests.benchmarks.measure import Bench, Row, Work, micros
from tests.support.filled import fill_slices

SAMPLES_PER_FLUSH = 500
TIMES = 20_000
SECONDS = 0.734


def rows(bench: Bench) -> Iterator[Row]:
    """Yield all rows of the metrics."""
    yield from recording(bench)
    yield from flushing(bench)
    yield from rhythms(bench)
    yield from heartbeats(bench)
    yield from overviews(bench)
    yield trends(bench)
    yield from quantiles(bench)
    yield memory(bench)


Observe = Callable[[float], object]


@dataclass(frozen=True, slots=True)
class Peer:
    """Another library that records durations.

    Attributes:
        observe: records a duration in one series, which was looked up in advance.
        of_agents: returns work that records in the series of many agents in turn. The work looks up each series by
            name, as our library does.
    """

    observe: Observe
    of_agents: Callable[[list[str]], Work]


def peers() -> dict[str, Peer]:
    """Return the installed peers."""
    found: dict[str, Peer] = {}
    if importlib.util.find_spec("prometheus_client"):
        # prometheus_client reads the environment when it is loaded, to choose between its single-process mode and its
        # multi-process mode. So it is loaded once for each mode.
        for name, folder in ((PROMETHEUS, None), (PROMETHEUS_MULTI, tempfile.mkdtemp(prefix="agentperf-bench-"))):
            os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
            if folder is not None:
                os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
            for module in [each for each in sys.modules if each.split(".")[0] == "prometheus_client"]:
                del sys.modules[module]
            found[name] = prometheus()
        os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
    if importlib.util.find_spec("opentelemetry") and importlib.util.find_spec("opentelemetry.sdk"):
        found[OPENTELEMETRY] = opentelemetry()
    return found


def prometheus() -> Peer:
    """Return a peer that uses a histogram of the currently loaded prometheus_client."""
    labels = importlib.import_module("prometheus_client").Histogram("agent_seconds", "s", ["agent"]).labels

    def of_agents(names: list[str]) -> Work:
        def work(times: int) -> None:
            count = len(names)
            for number in range(times):
                labels(names[number % count]).observe(SECONDS)

        return work

    return Peer(labels("research").observe, of_agents)


def opentelemetry() -> Peer:
    """Return a peer that uses a histogram of the OpenTelemetry SDK."""
    sdk = importlib.import_module("opentelemetry.sdk.metrics")
    export = importlib.import_module("opentelemetry.sdk.metrics.export")
    provider = sdk.MeterProvider(metric_readers=[export.InMemoryMetricReader()])
    record = provider.get_meter("agent").create_histogram("agent_seconds").record
    attributes = {"agent": "research"}

    def of_agents(names: list[str]) -> Work:
        def work(times: int) -> None:
            count = len(names)
            for number in range(times):
                record(SECONDS, {"agent": names[number % count]})

        return work

    return Peer(lambda seconds: record(seconds, attributes), of_agents)


PROMETHEUS = "prometheus_client, one process"
PROMETHEUS_MULTI = "prometheus_client, multi-process"
OPENTELEMETRY = "OpenTelemetry"


def recording(bench: Bench) -> Iterator[Row]:
    """Measure the calls that record, while flushes run in the background."""
    backend = Backend(bench.url, namespace="recording")
    collector = MetricsCollector(backend=backend)
    installed_peers = peers()

    def compared(
        work: str,
        ours: Work,
        name: str,
        theirs: Callable[[Peer], Work],
        goal: float | None = None,
        less: tuple[Work, Work] | None = None,
    ) -> Row:
        peer = installed_peers.get(name)
        if peer is None:
            return Row(work, micros(bench.single(ours, TIMES)), f"{name}: not installed", None, "", None)
        pair = bench.pair(ours, theirs(peer), TIMES)
        ours_s, reference_s, ratio = pair.ours_s, pair.reference_s, pair.ratio
        if less is not None:
            without = bench.pair(*less, TIMES)
            ours_s, reference_s = ours_s - without.ours_s, reference_s - without.reference_s
            ratio = ours_s / reference_s
        met = None if goal is None else ratio <= goal
        reference = f"{name} {micros(reference_s)}"
        return Row(work, micros(ours_s), reference, ratio, "" if goal is None else f"<= {goal:g} x", met)

    def one(times: int) -> None:
        record = collector.record_execution
        for _ in range(times):
            record("research", SECONDS, True)

    def many(names: list[str]) -> Work:
        def work(times: int) -> None:
            record, count = collector.record_execution, len(names)
            for number in range(times):
                record(names[number % count], SECONDS, True)

        return work

    yield compared("record_execution, 1 agent", one, PROMETHEUS_MULTI, observed, 0.2)
    for agents in (50, 1000):
        names = [f"agent-{number}" for number in range(agents)]
        yield compared(
            f"record_execution, {agents} agents", many(names), PROMETHEUS_MULTI, partial(named, names=names), 0.2
        )
    for name in (PROMETHEUS, OPENTELEMETRY):
        yield compared("record_execution, 1 agent", one, name, observed)

    def plain() -> None:
        pass

    def spans(times: int) -> None:
        for _ in range(times):
            with collector.span("research", "stage"):
                pass

    tracked = called(track_performance("research", collector)(plain))
    less = (called(plain), nothing)
    yield compared("what track_performance adds to a call", tracked, PROMETHEUS, observed, 3, less)
    yield compared("the same", tracked, PROMETHEUS_MULTI, observed, None, less)
    yield compared("an empty span", spans, PROMETHEUS, observed)
    backend.close()


def observed(peer: Peer) -> Work:
    """Return work that records in one series of the peer."""

    def work(times: int) -> None:
        observe = peer.observe
        for _ in range(times):
            observe(SECONDS)

    return work


def named(peer: Peer, names: list[str]) -> Work:
    """Return work that records in many series of the peer."""
    return peer.of_agents(names)


def called(function: Callable[[], None]) -> Work:
    """Return work that calls a function."""

    def work(times: int) -> None:
        for _ in range(times):
            function()

    return work


def nothing(times: int) -> None:
    """Run an empty loop, as the baseline."""
    for _ in range(times):
        pass


def packed(
    namespace: str, buffer: Buffer, now: float, retention: Retention | None = None, server_ms: int = -1
) -> list[tuple[Any, ...]]:
    """Return the arguments of the EVALSHA calls that flush the whole buffer."""
    calls: list[tuple[Any, ...]] = []
    buffer.aggregate()
    while batches := buffer.batches():
        for batch in batches:
            command = commands.flush(
                namespace, batch, now=now, retention=retention or Retention(), firm=True, server_ms=server_ms
            )
            assert isinstance(command.script, Script)
            calls.append((command.script.sha, len(command.keys), *command.keys, *command.wire_args()))
            buffer.settled(batch, 0)
    return calls


def flushing(bench: Bench) -> Iterator[Row]:
    """Measure the server time of a pipelined flush of one agent, as INFO commandstats reports it."""
    client = bench.client()
    client.script_load(commands.FLUSH.source)
    flushes = 300 if bench.full else 100
    for samples in (5, 50, SAMPLES_PER_FLUSH):
        source = random.Random(samples)
        buffer = Buffer(on_first=lambda: None)
        calls = []
        for _ in range(flushes):
            for _ in range(samples):
                buffer.record("research", source.lognormvariate(0.7, 0.8), OK)
            calls += packed(f"flushing.{samples}", buffer, time.monotonic())
        pipeline = client.pipeline(transaction=False)
        figures = []
        # The flushes are sent in order, because the script does not count a flush with an old sequence number.
        for first in range(0, flushes, flushes // 5):
            part = calls[first : first + flushes // 5]
            for call in part:
                pipeline.execute_command("EVALSHA", *call)
            client.config_resetstat()
            replies = pipeline.execute()
            assert all(reply[0] == commands.COUNTED for reply in replies)
            spent: Any = client.info("commandstats")
            figures.append(spent["cmdstat_evalsha"]["usec"] / 1e6 / len(part) / samples)
        per_sample = statistics.median(figures)
        last = samples == SAMPLES_PER_FLUSH
        yield Row(
            f"flush of {samples} samples, server time per sample",
            micros(per_sample),
            "prototype 1.6 us at 500",
            None,
            "<= 2 us" if last else "",
            per_sample <= 2e-6 if last else None,
        )
    client.close()


RHYTHM_AGENTS = 50


def rhythms(bench: Bench) -> Iterator[Row]:
    """Measure the server time that the flushes of one agent take per second, at several flush intervals.

    Each agent records one execution per second.
    """
    client = bench.client()
    client.script_load(commands.FLUSH.source)
    found = {}
    for every_s in (1, 2, 5, 10):
        clock = [0.0]
        buffer = Buffer(on_first=lambda: None, clock=partial(clock.__getitem__, 0))
        seconds, micro = client.time()
        buffer.synchronise(seconds + micro / 1e6 - 60.0, 0.0)
        source = random.Random(every_s)
        client.config_resetstat()
        for second in range(1, 61):
            clock[0] = float(second)
            for agent in range(RHYTHM_AGENTS):
                buffer.record(f"agent-{agent}", source.lognormvariate(0.7, 0.8), OK)
            if second % every_s == 0:
                for call in packed(f"rhythm.{every_s}", buffer, clock[0], server_ms=buffer.server_ms(clock[0])):
                    client.execute_command("EVALSHA", *call)
        spent: Any = client.info("commandstats")
        found[every_s] = spent["cmdstat_evalsha"]["usec"] / 1e6 / 60 / RHYTHM_AGENTS
        yield Row(
            f"flushed every {every_s} s, server time per second and agent",
            micros(found[every_s]),
            "" if every_s == 1 else f"every second {micros(found[1])}",
            None if every_s == 1 else found[every_s] / found[1],
            "",
            None,
        )
    client.close()


WORKERS = 100


def heartbeats(bench: Bench) -> Iterator[Row]:
    """Measure the server time of a heartbeat. Each process sends one every five seconds."""
    client = bench.client()
    backend = Backend(bench.url, namespace="heartbeats")
    workers = [Presence(Backend(bench.url, namespace="heartbeats")) for _ in range(WORKERS)]
    for running in (0, MAX_EXECUTIONS):
        calls = OpenCalls(tuple((f"agent-{number}", -float(number)) for number in range(running)))
        for _ in range(5):
            client.config_resetstat()
            for worker in workers:
                backend.run(worker.heartbeat(calls))
        spent: Any = client.info("commandstats")
        took = spent["cmdstat_evalsha"]["usec"] / 1e6 / WORKERS
        yield Row(f"heartbeat with {running} running executions, server time", micros(took), "", None, "", None)
    backend.close()
    client.close()


def fill(bench: Bench, namespace: str, agents: int, *, filled_s: int = 360, every_s: int = 10) -> float:
    """Record twelve executions a minute for each agent, over the last `filled_s` seconds.

    Args:
        bench: the environment.
        namespace: the namespace.
        agents: number of agents.
        filled_s: length of the recorded time, s.
        every_s: time between two groups of executions, s.

    Returns:
        A timestamp in seconds since 1970, ten seconds after the start of a minute. A five-minute window that ends at
        this time takes the most work to read, because it has ten slices (five of ten seconds, four of a minute, one of
        ten seconds). A window that ends now may have as few as five slices.
    """
    client = bench.client()
    client.script_load(commands.FLUSH.source)
    clock = [0.0]
    buffer = Buffer(on_first=lambda: None, clock=lambda: clock[0])
    seconds, micro = client.time()
    buffer.synchronise(seconds + micro / 1e6, 0.0)
    source = random.Random(agents)
    for step in range(filled_s // every_s):
        clock[0] = step * float(every_s) - (filled_s - 10.0)
        for agent in range(agents):
            for _ in range(every_s // 5):
                buffer.record(f"agent-{agent}", source.lognormvariate(0.7, 0.8), OK)
    clock[0] = 0.0
    for call in packed(namespace, buffer, 0.0):
        client.execute_command("EVALSHA", *call)
    client.close()
    return (seconds - 10) // 60 * 60 + 10.0


def overviews(bench: Bench) -> Iterator[Row]:
    """Measure an overview of all agents over five minutes, with percentiles."""
    for agents in (10, 100, 1000):
        as_of = fill(bench, f"overview.{agents}", agents)
        backend = Backend(bench.url, namespace=f"overview.{agents}")
        collector = MetricsCollector(backend=backend)

        def look(times: int, collector: MetricsCollector = collector, as_of: float = as_of) -> None:
            for _ in range(times):
                collector.snapshots(window="5m", as_of=as_of)

        took = bench.single(look, 1)
        last = agents == 1000
        yield Row(
            f"overview of {agents} agents, 5 minutes, percentiles",
            f"{took * 1e3:.3g} ms",
            "prototype 148 ms at 1000",
            None,
            "<= 200 ms" if last else "",
            took <= 0.2 if last else None,
        )

        def count(times: int, collector: MetricsCollector = collector, as_of: float = as_of) -> None:
            for _ in range(times):
                collector.snapshots(window="5m", as_of=as_of, percentiles=False)

        took = bench.single(count, 1)
        yield Row(
            f"the same of {agents} agents, counters only",
            f"{took * 1e3:.3g} ms",
            "prototype 40 ms at 1000",
            None,
            "<= 50 ms" if last else "",
            took <= 0.05 if last else None,
        )
        backend.close()


def trends(bench: Bench) -> Row:
    """Compare the series of all agents over an hour, in steps of a minute, with an overview of the same hour."""
    agents = 1000 if bench.full else 100
    as_of = fill(bench, "trends", agents, filled_s=3600, every_s=60)
    backend = Backend(bench.url, namespace="trends")
    collector = MetricsCollector(backend=backend)

    def trend(times: int) -> None:
        for _ in range(times):
            assert len(collector.series(window="1h", step="1m", as_of=as_of)) == agents

    def look(times: int) -> None:
        for _ in range(times):
            assert len(collector.snapshots(window="1h", as_of=as_of)) == agents

    pair = bench.pair(trend, look, 1)
    backend.close()
    return Row(
        f"series of {agents} agents, an hour by minutes",
        f"{pair.ours_s * 1e3:.3g} ms",
        f"overview of the same hour {pair.reference_s * 1e3:.3g} ms",
        pair.ratio,
        "<= 2 x",
        pair.ratio <= 2,
    )


DISTRIBUTIONS: dict[str, Callable[[random.Random], float]] = {
    "lognormal": lambda source: source.lognormvariate(0.7, 0.8),
    "Pareto": lambda source: source.paretovariate(1.2),
    "uniform": lambda source: source.uniform(0.0, 10.0),
    "bimodal": lambda source: source.gauss(0.05, 0.005) if source.random() < 0.6 else source.gauss(8.0, 1.0),
    "constant": lambda _: 0.734,
}


def quantiles(bench: Bench) -> Iterator[Row]:
    """Measure the largest error of p50 to p99.9, relative to exact quantiles.

    An exact quantile is the sample that the in-memory version returns.
    """
    sizes = (100, 10_000, 1_000_000)
    for size in sizes:
        for name, draw in DISTRIBUTIONS.items():
            source = random.Random(size)
            times = sorted(max(0, round(draw(source) * 1e6)) for _ in range(size))
            buckets, zeros = bucket_counts([us / 1e6 for us in times])
            worst = 0.0
            for share in (0.5, 0.9, 0.95, 0.99, 0.999):
                exact = exact_quantile(times, share) / 1e6
                found = estimated_quantile(buckets, zeros, share, minimum=times[0] / 1e6, maximum=times[-1] / 1e6)
                worst = max(worst, abs(found - exact) / exact if exact else abs(found))
            yield Row(
                f"quantile error, {name}, {size} samples",
                f"{worst:.2%}",
                "DDSketch 1 %",
                None,
                f"<= {RELATIVE_ERROR:.2%}",
                worst <= RELATIVE_ERROR * (1 + 1e-9),
            )


def memory(bench: Bench) -> Row:
    """Measure the memory of a busy agent with the default TTLs, when all its time slices exist and are full."""
    client = bench.client()
    agents = 10
    taken = fill_slices(client, "memory", Retention(), agents=agents, per_second=1) / agents
    forecast = memory_forecast(Retention(), agents=1, per_second=1.0).total
    client.close()
    ratio = taken / 0.6e6
    return Row(
        "memory of an agent with one execution per second",
        f"{taken / 1e6:.2f} MB",
        f"forecast {forecast / 1e6:.2f} MB, prototype 0.6 MB",
        ratio,
        "<= 1.3 x",
        ratio <= 1.3,
    )
