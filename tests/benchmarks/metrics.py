"""Recording, flushing and reading metrics: what they cost, and how far quantiles are off."""

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
from typing import Any

from agentperf_redis.backend import Backend
from agentperf_redis.metrics import commands
from agentperf_redis.metrics.buffer import Buffer
from agentperf_redis.metrics.cell import OK
from agentperf_redis.metrics.client import MetricsCollector
from agentperf_redis.metrics.histogram import RELATIVE_ERROR, bucket_counts, estimated_quantile, exact_quantile
from agentperf_redis.metrics.retention import Retention, memory_forecast
from agentperf_redis.metrics.tracking import track_performance
from agentperf_redis.script import Script
from tests.benchmarks.measure import Bench, Row, Work, micros

SAMPLES_PER_FLUSH = 500


def rows(bench: Bench) -> Iterator[Row]:
    """All rows of the metrics."""
    yield from recording(bench)
    yield from flushing(bench)
    yield from overviews(bench)
    yield from quantiles(bench)
    yield memory(bench)


def peers() -> dict[str, Callable[[float], object]]:
    """Return the ways to record a duration with what is installed beside: one series, known by its labels."""
    found: dict[str, Callable[[float], object]] = {}
    if importlib.util.find_spec("prometheus_client"):
        # Which kind of value it keeps is decided when the module is loaded, by the environment: so once for each.
        for name, folder in ((PROMETHEUS, None), (PROMETHEUS_MULTI, tempfile.mkdtemp(prefix="agentperf-bench-"))):
            os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
            if folder is not None:
                os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
            for module in [each for each in sys.modules if each.split(".")[0] == "prometheus_client"]:
                del sys.modules[module]
            client = importlib.import_module("prometheus_client")
            found[name] = client.Histogram("agent_seconds", "s", ["agent"]).labels("research").observe
        os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
    if importlib.util.find_spec("opentelemetry") and importlib.util.find_spec("opentelemetry.sdk"):
        sdk = importlib.import_module("opentelemetry.sdk.metrics")
        export = importlib.import_module("opentelemetry.sdk.metrics.export")
        provider = sdk.MeterProvider(metric_readers=[export.InMemoryMetricReader()])
        record = provider.get_meter("agent").create_histogram("agent_seconds").record
        attributes = {"agent": "research"}
        found[OPENTELEMETRY] = lambda seconds: record(seconds, attributes)
    return found


PROMETHEUS = "prometheus_client, one process"
PROMETHEUS_MULTI = "prometheus_client, multi-process"
OPENTELEMETRY = "OpenTelemetry"


def recording(bench: Bench) -> Iterator[Row]:
    """The call that workers make, while the flushes go on."""
    backend = Backend(bench.url, namespace="recording")
    collector = MetricsCollector(backend=backend)
    beside = peers()

    def judged(work: str, ours: Work, name: str, goal: float | None, less: Work | None = None) -> Row:
        peer = beside.get(name)
        if peer is None:
            return Row(work, micros(bench.single(ours, 20_000)), f"{name}: not installed", None, "", None)

        def theirs(times: int) -> None:
            for _ in range(times):
                peer(0.734)

        pair = bench.pair(ours, theirs, 20_000)
        ours_s, ratio = pair.ours_s, pair.ratio
        if less is not None:
            ours_s -= bench.single(less, 20_000)
            ratio = ours_s / pair.reference_s
        reference = f"{name} {micros(pair.reference_s)}"
        met = None if goal is None else ratio <= goal
        return Row(work, micros(ours_s), reference, ratio, "" if goal is None else f"<= {goal:g} x", met)

    def recorded(agents: int) -> Work:
        names = [f"agent-{number}" for number in range(agents)]

        def ours(times: int) -> None:
            record, count = collector.record_execution, len(names)
            for number in range(times):
                record(names[number % count], 0.734, True)

        return ours

    for agents in (1, 50, 1000):
        yield judged(f"record_execution, {agents} agents", recorded(agents), PROMETHEUS_MULTI, 0.2)
    for name in (PROMETHEUS, OPENTELEMETRY):
        yield judged("record_execution, 50 agents", recorded(50), name, None)

    def plain() -> None:
        pass

    tracked = track_performance("research", collector)(plain)

    def called(function: Callable[[], None]) -> Work:
        def work(times: int) -> None:
            for _ in range(times):
                function()

        return work

    def spans(times: int) -> None:
        for _ in range(times):
            with collector.span("research", "stage"):
                pass

    yield judged("what track_performance adds to a call", called(tracked), PROMETHEUS, 3, less=called(plain))
    yield judged("the same", called(tracked), PROMETHEUS_MULTI, None, less=called(plain))
    yield judged("an empty span", spans, PROMETHEUS, None)
    backend.close()


def packed(namespace: str, buffer: Buffer, now: float, retention: Retention | None = None) -> list[tuple[Any, ...]]:
    """Return the EVALSHA arguments of all that the buffer holds."""
    calls: list[tuple[Any, ...]] = []
    buffer.fold()
    while parcels := buffer.parcels():
        for parcel in parcels:
            command = commands.flush(namespace, parcel, now=now, retention=retention or Retention(), firm=True)
            assert isinstance(command.script, Script)
            calls.append((command.script.sha, len(command.keys), *command.keys, *command.args))
            buffer.settled(parcel, 0)
    return calls


def flushing(bench: Bench) -> Iterator[Row]:
    """The server's own time for a flush of one agent, by INFO commandstats, pipelined."""
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
        for first in range(0, flushes, flushes // 5):  # in order: a flush whose number was passed is not counted again
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
            f"flush of {samples} samples, server time for each",
            micros(per_sample),
            "prototype 1.6 us at 500",
            None,
            "<= 2 us" if last else "",
            per_sample <= 2e-6 if last else None,
        )
    client.close()


def fill(bench: Bench, namespace: str, agents: int) -> None:
    """Record 60 executions of each agent over the last five minutes."""
    client = bench.client()
    client.script_load(commands.FLUSH.source)
    clock = [0.0]
    buffer = Buffer(on_first=lambda: None, clock=lambda: clock[0])
    seconds, micro = client.time()
    buffer.synchronise(seconds + micro / 1e6, 0.0)
    source = random.Random(agents)
    for step in range(30):
        clock[0] = step * 10.0 - 290.0
        for agent in range(agents):
            for _ in range(2):
                buffer.record(f"agent-{agent}", source.lognormvariate(0.7, 0.8), OK)
    clock[0] = 0.0
    for call in packed(namespace, buffer, 0.0):
        client.execute_command("EVALSHA", *call)
    client.close()


def overviews(bench: Bench) -> Iterator[Row]:
    """All agents over five minutes, percentiles included, as the overview shows them."""
    for agents in (10, 100, 1000):
        fill(bench, f"overview.{agents}", agents)
        backend = Backend(bench.url, namespace=f"overview.{agents}")
        collector = MetricsCollector(backend=backend)

        def look(times: int, collector: MetricsCollector = collector) -> None:
            for _ in range(times):
                collector.snapshots(window="5m")

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

        def count(times: int, collector: MetricsCollector = collector) -> None:
            for _ in range(times):
                collector.snapshots(window="5m", percentiles=False)

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


DISTRIBUTIONS: dict[str, Callable[[random.Random], float]] = {
    "lognormal": lambda source: source.lognormvariate(0.7, 0.8),
    "Pareto": lambda source: source.paretovariate(1.2),
    "uniform": lambda source: source.uniform(0.0, 10.0),
    "bimodal": lambda source: source.gauss(0.05, 0.005) if source.random() < 0.6 else source.gauss(8.0, 1.0),
    "constant": lambda _: 0.734,
}


def quantiles(bench: Bench) -> Iterator[Row]:
    """The largest error of p50, p90, p95, p99 and p99.9, against the exact ones by the reference's index rule."""
    sizes = (100, 10_000, 1_000_000)
    for size in sizes:
        for name, draw in DISTRIBUTIONS.items():
            source = random.Random(size)
            times = sorted(max(0, round(draw(source) * 1e6)) for _ in range(size))
            buckets, zeros = bucket_counts([us / 1e6 for us in times])
            worst = 0.0
            for share in (0.5, 0.9, 0.95, 0.99, 0.999):
                exact = exact_quantile(times, share) / 1e6
                found = estimated_quantile(buckets, zeros, share, least=times[0] / 1e6, most=times[-1] / 1e6)
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
    """A busy agent's memory with the default lives of slices, from the sizes of what 15 minutes leave."""
    client = bench.client()
    client.script_load(commands.FLUSH.source)
    clock = [0.0]
    buffer = Buffer(on_first=lambda: None, clock=lambda: clock[0])
    seconds, micro = client.time()
    buffer.synchronise(seconds + micro / 1e6, 0.0)
    source = random.Random(1)
    for step in range(89):
        clock[0] = step * 10.0 - 890.0
        for _ in range(10):
            buffer.record("busy", source.lognormvariate(0.7, 0.8), OK)
    clock[0] = 0.0
    for call in packed("memory", buffer, 0.0):
        client.execute_command("EVALSHA", *call)
    sizes: dict[str, list[int]] = {}
    for key in client.scan_iter("memory:*:busy", count=1000):
        kind = key.decode().split(":")[3]
        sizes.setdefault(kind, []).append(int(client.execute_command("MEMORY", "USAGE", key, "SAMPLES", 0)))
    lives = {"10s": 91, "1m": 181, "1h": 193, "1d": 91, "total": 1, "recent": 1, "slow": 1}
    taken = sum(statistics.mean(each) * lives[kind] for kind, each in sizes.items())
    forecast = memory_forecast(Retention(), agents=1, per_second=1.0).total
    client.close()
    ratio = taken / 0.6e6
    return Row(
        "memory of an agent with one execution a second",
        f"{taken / 1e6:.2f} MB",
        f"forecast {forecast / 1e6:.2f} MB, prototype 0.6 MB",
        ratio,
        "<= 1.3 x",
        ratio <= 1.3,
    )
