"""The choice of benchmarks by the command."""

from __future__ import annotations

import inspect

from tests.benchmarks.__main__ import found


def test_every_benchmark_can_be_run_by_the_command() -> None:
    for name, module in found().items():
        assert tuple(inspect.signature(module.rows).parameters) in {("bench",), ("bench", "rest")}, name
