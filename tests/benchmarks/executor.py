"""Benchmark of one command through the blocking executor, against the client of redis-py."""

from __future__ import annotations

from collections.abc import Iterator

from agentperf_redis.backend import Backend
from agentperf_redis.command import Command
from tests.benchmarks.measure import Bench, Row, micros


def rows(bench: Bench) -> Iterator[Row]:
    """Measure a blocking command against redis-py's client on the same server."""
    backend, client = Backend(bench.url), bench.client()
    echo = Command("ECHO", ("hello",), (), bytes)

    def ours(times: int) -> None:
        for _ in range(times):
            backend.run(echo)

    def theirs(times: int) -> None:
        for _ in range(times):
            client.echo("hello")

    pair = bench.pair(ours, theirs, 2000)
    yield Row(
        "one command, blocking, retries and deadline included",
        micros(pair.ours_s),
        f"redis-py {micros(pair.reference_s)}",
        pair.ratio,
        "<= 1 x",
        pair.ratio <= 1,
    )
    backend.close()
    client.close()
