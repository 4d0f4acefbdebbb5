"""Check that nothing grows or slows down while four processes use all services for minutes, at half their top rate.

Two processes are blocking, with two threads each; two use asyncio, with four tasks each. After a first minute, in which
caches and histories fill, the figures of each further minute must stay level. With `--full`, this takes 11 minutes;
otherwise a minute is 5 s long, which proves little.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from agentperf_redis import AgentInstance, AgentPerf, MetricsCollector, Retention
from tests.benchmarks.measure import Bench, Row
from tests.support.traces import zipf
from tests.support.workers import Workers

PROCESSES, MINUTES = 4, 11
THREADS, TASKS = 2, 4
CEILING_S = 5.0
"""How long to measure the highest possible rate of calls, s."""
KEYS, CACHE_SIZE, AGENTS, INSTANCES = 4000, 1000, 20, 10
NAMESPACE = "soak"
BRIEF = Retention(
    slices_10s=60.0, slices_1m=60.0, slices_1h=0.0, slices_1d=0.0, recent=60.0, recent_count=100, slow=60.0
)
"""With this retention, the metrics no longer grow after the first minute."""
LATENCY_GOAL, TAIL_GOAL, LEVEL_GOAL = 1.2, 1.5, 1.1


@dataclass(frozen=True, slots=True)
class Minute:
    """What a process reports at the end of a minute.

    Attributes:
        calls: seconds that each call took.
        resident: bytes of memory of the process.
        threads: number of its threads.
        files: number of its open files and connections.
    """

    calls: list[float]
    resident: int
    threads: int
    files: int


@dataclass
class Figures:
    """The figures of all processes and of the server, with one value for each minute."""

    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)
    threads: list[float] = field(default_factory=list)
    files: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    keys: list[float] = field(default_factory=list)
    connections: list[float] = field(default_factory=list)


def rows(bench: Bench) -> Iterator[Row]:
    """Yield a row for each figure. It compares the last minute with the second, because the first fills the caches."""
    minute_s = 60.0 if bench.full else 5.0
    with AgentPerf(bench.url, namespace=NAMESPACE) as perf:
        MetricsCollector(backend=perf.backend, retention=BRIEF)
        for number in range(INSTANCES):
            perf.balancer().register_instance(AgentInstance(f"coder-{number}", "coder", max_capacity=20))
    workers = Workers()
    figures = Figures()
    try:
        crowd = workers.start_all(work, [(bench.url, number, minute_s) for number in range(PROCESSES)])
        ceiling = sum(worker.said() for worker in crowd)
        for worker in crowd:
            worker.answer(ceiling / PROCESSES / 2)
        for _ in range(MINUTES):
            reports: list[Minute] = [worker.said(4 * minute_s + 60.0) for worker in crowd]
            _add(figures, reports, bench)
            for worker in crowd:
                worker.answer()
        counts = sum(worker.result() for worker in crowd)
    finally:
        workers.close()
    yield Row("calls of the soak", f"{counts}", f"highest rate {ceiling:.3g}/s", None, "", None)
    for name, unit, values, goal in (
        ("p50 of a call", "ms", [each * 1e3 for each in figures.p50], LATENCY_GOAL),
        ("p99 of a call", "ms", [each * 1e3 for each in figures.p99], TAIL_GOAL),
        ("memory of the server", "MB", [each / 1e6 for each in figures.memory], LEVEL_GOAL),
        ("memory of the processes", "MB", [each / 1e6 for each in figures.resident], LEVEL_GOAL),
        ("keys", "", figures.keys, LEVEL_GOAL),
        ("connections of the server", "", figures.connections, LEVEL_GOAL),
        ("threads of the processes", "", figures.threads, LEVEL_GOAL),
        ("open files of the processes", "", figures.files, LEVEL_GOAL),
    ):
        first, last = values[1], values[-1]
        ratio = last / first
        yield Row(
            f"{name}, minute {MINUTES}",
            f"{last:.4g} {unit}",
            f"minute 2: {first:.4g} {unit}",
            ratio,
            f"<= {goal:g}",
            ratio <= goal,
        )


def _add(figures: Figures, reports: list[Minute], bench: Bench) -> None:
    calls = sorted(each for report in reports for each in report.calls)
    figures.p50.append(statistics.median(calls))
    figures.p99.append(calls[len(calls) * 99 // 100])
    figures.resident.append(sum(report.resident for report in reports))
    figures.threads.append(sum(report.threads for report in reports))
    figures.files.append(sum(report.files for report in reports))
    with bench.client() as client:
        info = client.info()
        figures.memory.append(info["used_memory_dataset"])
        figures.connections.append(info["connected_clients"])
        figures.keys.append(client.dbsize())


# The processes


def work(url: str, number: int, minute_s: float) -> Iterator[float | Minute]:
    """Yield the highest possible rate of calls, then receive the rate to use, then yield a report after each minute.

    Returns the number of calls.
    """
    with AgentPerf(url, namespace=NAMESPACE) as perf:
        MetricsCollector(backend=perf.backend, retention=BRIEF)
        load = (_with_asyncio if number % 2 else _with_threads)(perf, number)
        done = len(load(CEILING_S, 0.0))
        rate = yield done / CEILING_S
        assert isinstance(rate, float)
        for _ in range(MINUTES):
            calls = load(minute_s, rate)
            done += len(calls)
            status = dict(
                line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line
            )
            resident = int(status["VmRSS"].split()[0]) * 1024
            yield Minute(calls, resident, int(status["Threads"]), len(list(Path("/proc/self/fd").iterdir())))
    return done


Load = Callable[[float, float], list[float]]
"""Works for the given seconds at the given rate of calls per second (0: as fast as possible). Returns the duration of
each call, s."""


class _Pace:
    """Spaces the calls evenly, however long the previous calls took.

    Args:
        seconds: length of the work.
        rate: calls a second; 0 for as many as possible.
    """

    def __init__(self, seconds: float, rate: float) -> None:
        self._next = time.perf_counter()
        self.end = self._next + seconds
        self._gap_s = 1 / rate if rate else 0.0

    def wait_s(self) -> float | None:
        """Return the seconds until the next call; None at the end."""
        now = time.perf_counter()
        if now >= self.end:
            return None
        self._next = max(self._next + self._gap_s, now - 1.0)  # after a pause, catch up on at most one second of calls
        return max(0.0, self._next - now)


def _with_threads(perf: AgentPerf, number: int) -> Load:
    cache, balancer = perf.cache("answers", max_size=CACHE_SIZE, local_size=200), perf.balancer()
    chance = random.Random(number)
    keys = zipf(50_000, KEYS, 0.9, seed=number)

    def call() -> None:
        agent, key = f"agent-{chance.randrange(AGENTS)}", keys[chance.randrange(len(keys))]
        match chance.randrange(4):
            case 0:
                with balancer.lease("coder"):
                    pass
            case 1:
                cache.put(key, "x" * 200, ttl=30, tags=[agent])
            case 2:
                cache.get_or_compute(key, lambda: "x" * 200, 30)
            case _:
                with perf.metrics.track(agent):
                    cache.get(key)

    def load(seconds: float, rate: float) -> list[float]:
        pace, times, threads = _Pace(seconds, rate), [], []
        lock = threading.Lock()

        def loop() -> None:
            while True:
                with lock:
                    wait_s = pace.wait_s()
                if wait_s is None:
                    return
                time.sleep(wait_s)
                begun = time.perf_counter()
                call()
                times.append(time.perf_counter() - begun)

        for _ in range(THREADS):
            threads.append(threading.Thread(target=loop))
            threads[-1].start()
        for thread in threads:
            thread.join()
        return times

    return load


def _with_asyncio(perf: AgentPerf, number: int) -> Load:
    cache, balancer = perf.cache("answers", max_size=CACHE_SIZE, local_size=200).aio, perf.balancer().aio
    chance = random.Random(number)
    keys = zipf(50_000, KEYS, 0.9, seed=number)
    loop_of_process = asyncio.Runner()

    async def compute() -> str:
        return "x" * 200

    async def call() -> None:
        agent, key = f"agent-{chance.randrange(AGENTS)}", keys[chance.randrange(len(keys))]
        match chance.randrange(4):
            case 0:
                async with balancer.lease("coder"):
                    pass
            case 1:
                await cache.put(key, "x" * 200, ttl=30, tags=[agent])
            case 2:
                await cache.get_or_compute(key, compute, 30)
            case _:
                with perf.metrics.track(agent):
                    await cache.get(key)

    async def run(seconds: float, rate: float) -> list[float]:
        pace, times = _Pace(seconds, rate), list[float]()

        async def loop() -> None:
            while (wait_s := pace.wait_s()) is not None:
                await asyncio.sleep(wait_s)
                begun = time.perf_counter()
                await call()
                times.append(time.perf_counter() - begun)

        await asyncio.gather(*(loop() for _ in range(TASKS)))
        return times

    return lambda seconds, rate: loop_of_process.run(run(seconds, rate))
