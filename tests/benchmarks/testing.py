"""Benchmark of the pytest plugin: the time of a session with it, and its cost in a session that does not use it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.measure import Bench, Row, Work
from tests.support.plugin import FOUR_TESTS, Project

_GOAL_S = 3.0
_FIRST_TEST_GOAL_S = 1.0

_FIRST_TEST = """
    def test_metrics(agentperf):
        agentperf.metrics.record_execution("coder", 0.1, True)
        assert agentperf.metrics.flush()
"""
_UNUSED = """
    def test_other():
        pass
"""


def rows(bench: Bench) -> Iterator[Row]:
    """Measure whole sessions of pytest, from the start of the interpreter to its end."""
    four_s = bench.single(_sessions(FOUR_TESTS), 1)
    yield Row(
        "pytest: four tests with the fixtures", f"{four_s:.2f} s", "", None, f"<= {_GOAL_S:g} s", four_s <= _GOAL_S
    )
    used = bench.pair(_sessions(_FIRST_TEST), _sessions(_UNUSED), 1)
    added_s = used.ours_s - used.reference_s
    goal = f"<= {_FIRST_TEST_GOAL_S:g} s"
    yield Row("pytest: the first test, added", f"{added_s:.2f} s", "", None, goal, added_s <= _FIRST_TEST_GOAL_S)
    unused = bench.pair(_sessions(_UNUSED), _sessions(_UNUSED, with_plugin=False), 1)
    yield Row(
        "pytest: a session without the fixtures",
        f"{unused.ours_s * 1e3:.0f} ms",
        f"without the plugin {unused.reference_s * 1e3:.0f} ms",
        unused.ratio,
        "<= 1.1 x",
        unused.ratio <= 1.1,
    )


def _sessions(source: str, *, with_plugin: bool = True) -> Work:
    """Return a function that runs pytest sessions in a project with these tests."""

    def work(times: int) -> None:
        with tempfile.TemporaryDirectory(prefix="agentperf-bench-") as folder:
            project = Project(Path(folder), test_it=source)
            for _ in range(times):
                code, output = project.run(with_plugin=with_plugin)
                assert code == 0, output

    return work
