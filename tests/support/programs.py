"""Programs that a test writes and runs as processes of their own, with the server and namespace of the test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.support.places import ROOT
from tests.support.servers import Server

LIMIT_S = 60.0
"""Seconds that a program may take to end. A loaded machine needs many times the usual time."""


class Programs:
    """The programs of one test.

    Args:
        folder: where the programs are written and run.
        server: `AgentPerf()` uses it in the programs.
        namespace: `AgentPerf()` uses it in the programs.
    """

    def __init__(self, folder: Path, server: Server, namespace: str) -> None:
        self._folder = folder
        self.broker = f"redis://127.0.0.1:{server.port}/1"
        self._environment = {
            **os.environ,
            "AGENTPERF_REDIS_URL": server.url,
            "AGENTPERF_NAMESPACE": namespace,
            "BROKER": self.broker,
            "PYTHONPATH": f"{folder}:{ROOT}",
        }
        self._started: list[subprocess.Popen[bytes]] = []

    def write(self, name: str, source: str) -> None:
        """Write a module, which the programs can import."""
        (self._folder / name).write_text(textwrap.dedent(source), encoding="utf-8")

    def start(self, *words: str, url: str | None = None) -> subprocess.Popen[bytes]:
        """Start ``python -m words`` in a process group of its own. Its output goes into the file `log`."""
        environment = self._environment if url is None else {**self._environment, "AGENTPERF_REDIS_URL": url}
        with (self._folder / "log").open("ab") as log:
            program = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=self._folder,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(program)
        return program

    def run(self, *words: str) -> None:
        """Run a program to its end, and check that it succeeds."""
        assert self.start(*words).wait(LIMIT_S) == 0, self.log()

    def log(self) -> str:
        """Return the output of all programs so far."""
        return (self._folder / "log").read_text(encoding="utf-8", errors="replace")

    def said(self, word: str) -> bool:
        """Return whether a program printed this line."""
        return word in self.log().splitlines()

    def close(self) -> None:
        """Kill the programs that still run, with their children."""
        for program in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()
