"""What importing the library costs, held against importing redis-py, which it needs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

from tests.benchmarks.measure import Bench, Row, Work

# redis-py loads OpenTelemetry where it is installed, as it is beside the peers of other benchmarks, but not with users.
_ALONE = "import sys; sys.modules['opentelemetry'] = None; "


def rows(bench: Bench) -> Iterator[Row]:
    """One row: the ratio of two programs in new interpreters, without what starting an interpreter takes."""
    pair = bench.pair(program("from agentperf_redis import AgentPerf"), program("import redis"), 3)
    start_s = bench.single(program("pass"), 3)
    ours_s, reference_s = pair.ours_s - start_s, pair.reference_s - start_s
    ratio = ours_s / reference_s
    yield Row(
        "import of agentperf_redis", f"{ours_s * 1e3:.3g} ms", f"import redis {reference_s * 1e3:.3g} ms", ratio, "<= 1.3 x",
        ratio <= 1.3,
    )  # fmt: skip


def program(text: str) -> Work:
    """Run a program so many times, each in an interpreter of its own."""

    def work(times: int) -> None:
        for _ in range(times):
            subprocess.run([sys.executable, "-c", _ALONE + text], check=True)

    return work
