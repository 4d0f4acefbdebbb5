"""Fixtures of the tests of the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.support.commandline import Program, Watching
from tests.support.places import ROOT


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Run `agentperf` as a separate program, with a separate data folder and without a URL in the environment."""
    env = {name: value for name, value in os.environ.items() if name not in ("AGENTPERF_REDIS_URL", "REDIS_URL")}
    env |= {"PYTHONPATH": str(ROOT), "XDG_DATA_HOME": str(tmp_path / "data"), "NO_COLOR": "1", "COLUMNS": "140"}

    def run(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-X", "dev", "-W", "error", "-c", "from agentperf_redis.cli import main; main()"]
        return subprocess.run(
            [*command, *words], env=env | more, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False
        )

    return run


@pytest.fixture
def program_line(tmp_path: Path) -> Callable[..., AbstractContextManager[Watching]]:
    """Run `agentperf` as a separate program whose lines are read while it runs."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "XDG_DATA_HOME": str(tmp_path / "data"), "NO_COLOR": "1"}

    @contextmanager
    def run(*words: str) -> Iterator[Watching]:
        stderr = tmp_path / "stderr"
        command = [sys.executable, "-c", "from agentperf_redis.cli import main; main()", *words]
        with (
            stderr.open("w") as file,
            subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=file, text=True) as process,
        ):
            try:
                yield Watching(process, stderr)
            finally:
                process.kill()

    return run
