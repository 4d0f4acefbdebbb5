"""What importing the library costs, held against importing redis-py, which it needs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from tests.benchmarks.measure import Bench, Row, Work

# redis-py loads OpenTelemetry where it is installed, as it is beside the peers of other benchmarks, but not with users.
_ALONE = "import sys; sys.modules['opentelemetry'] = None; "


def rows(bench: Bench) -> Iterator[Row]:
    """The ratio of two programs in new interpreters, without what starting an interpreter takes.

    A service is loaded when it is first asked for: so also with one of them, and with all that the package has. Both
    libraries are compiled before, as an installation leaves them, whatever this environment says of bytecode.
    """
    with tempfile.TemporaryDirectory(prefix="agentperf-bench-") as folder:
        compiled = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        compiled["PYTHONPYCACHEPREFIX"] = folder

        def program(text: str) -> Work:
            """Run a program so many times, each in an interpreter of its own."""

            def work(times: int) -> None:
                for _ in range(times):
                    subprocess.run([sys.executable, "-c", _ALONE + text], check=True, env=compiled)

            return work

        start_s = bench.single(program("pass"), 3)
        for work, text, goal in (
            ("import of AgentPerf", "from agentperf_redis import AgentPerf", 1.3),
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
