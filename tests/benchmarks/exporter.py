"""Benchmarks of the Prometheus exporter: a scrape compared with a read of the same data through the API."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator

from prometheus_client.exposition import generate_latest

from agentperf_redis.agentperf import AgentPerf
from agentperf_redis.export.prometheus import Collector, Exporter, listening
from tests.benchmarks.measure import Bench, Row
from tests.benchmarks.metrics import fill

AGENTS = 1000
ACCEPTED = {
    "classic": "text/plain;version=0.0.4",
    "native": "application/openmetrics-text;version=2.0.0",
}


def rows(bench: Bench) -> Iterator[Row]:
    """Yield all rows of the exporter."""
    fill(bench, "exporter", AGENTS)
    with AgentPerf(bench.url, namespace="exporter") as perf:
        for number in range(AGENTS):
            perf.metrics.record_execution(f"agent-{number}", 1.0, success=False, error_type="TimeoutError")
            perf.metrics.record_llm(f"agent-{number}", model="gpt-x", tokens_in=100, tokens_out=20, cost=0.25)
        perf.metrics.flush()
        server = listening(Exporter(perf), "127.0.0.1", 0)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/metrics"

        def overview(times: int) -> None:
            for _ in range(times):
                perf.metrics.snapshots()

        for kind, accept in ACCEPTED.items():
            request = urllib.request.Request(url, headers={"Accept": accept, "Accept-Encoding": "gzip"})

            def scrape(times: int, request: urllib.request.Request = request) -> None:
                for _ in range(times):
                    with urllib.request.urlopen(request) as reply:
                        reply.read()

            pair = bench.pair(scrape, overview, 2)
            yield Row(
                f"scrape of {AGENTS} agents over HTTP, {kind} histograms",
                f"{pair.ours_s * 1e3:.3g} ms",
                f"overview of all time {pair.reference_s * 1e3:.3g} ms",
                pair.ratio,
                "<= 1.5 x",
                pair.ratio <= 1.5,
            )
        server.shutdown()
        server.server_close()
        thread.join()

        def by_the_library(times: int) -> None:
            for _ in range(times):
                generate_latest(Collector(perf))

        pair = bench.pair(by_the_library, overview, 2)
        yield Row(
            f"the same of {AGENTS} agents by prometheus_client's writer",
            f"{pair.ours_s * 1e3:.3g} ms",
            f"overview of all time {pair.reference_s * 1e3:.3g} ms",
            pair.ratio,
            "",
            None,
        )
