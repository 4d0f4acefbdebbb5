"""Benchmark of the import time of the library, against that of redis-py, which the library imports."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from tests.benchmarks.measure import Bench, Row, Work

# redis-py loads OpenTelemetry if OpenTelemetry is installed. Here it is installed for another benchmark, but most users
# do not have it. So the measured programs do not load it.
_ALONE = "import sys; sys.modules['opentelemetry'] = None; "


def rows(bench: Bench) -> Iterator[Row]:
    """Measure programs in new interpreters, without the time that an interpreter needs to start.

    A service is loaded on first use, so the import is also measured with one service and with the whole package. An
    installed library is already compiled to bytecode. So both libraries are compiled before the measurement, even if
    this environment writes no bytecode.
    """
    with tempfile.TemporaryDirectory(prefix="agentperf-bench-") as folder:
        compiled = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        compiled["PYTHONPYCACHEPREFIX"] = folder

        def program(text: str) -> Work:
            """Return work that runs a program repeatedly, each time in a new interpreter."""

            def work(times: int) -> None:
                for _ in range(times):
                    subprocess.run([sys.executable, "-c", _ALONE + text], check=True, env=compiled)

            return work

        start_s = bench.single(program("pass"), 3)
        for work, text, goal in (
            ("import of AgentPerf", "from agentperf_redis import AgentPerf", 1.2),
            ("the same, and the metrics", "from agentperf_redis import AgentPerf; AgentPerf().metrics", None),
            ("import of everything", "from agentperf_redis import *", None),
        ):
            pair = bench.pair(program(text), program("import redis"), 3)
            ours_s, reference_s = pair.ours_s - start_s, pair.reference_s - start_s
            ratio = ours_s / reference_s
            yield Row(
                work,
                f"{ours_s * 1e3:.3g} ms",
                f"import redis {reference_s * 1e3:.3g} ms",
                ratio,
                "" if goal is None else f"<= {goal:g} x",
                None if goal is None else ratio <= goal,
            )
