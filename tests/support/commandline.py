"""Runs the command line in the process of the tests.

The fixture `program` in tests/integration/cli runs the command line as a separate program.
"""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from agentperf_redis.cli import console
from agentperf_redis.cli.app import app

OK, FAILURE, USAGE, UNREACHABLE, NOT_FOUND = range(5)


class Done(NamedTuple):
    """The exit code and the output of a command."""

    returncode: object
    stdout: str
    stderr: str


Run = Callable[..., Done]
Program = Callable[..., subprocess.CompletedProcess[str]]


class Watching:
    """A command that runs as a separate program and prints lines.

    Args:
        process: the program. Its stdout is a pipe, its stderr goes to a file.
        stderr: the file with the stderr of the program.
    """

    def __init__(self, process: subprocess.Popen[str], stderr: Path) -> None:
        self.process = process
        self._stderr = stderr
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._wanted = threading.Event()
        self._wanted.set()
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        while self._wanted.is_set() and (line := self.process.stdout.readline()):
            self._lines.put(line)

    def line(self) -> str:
        """Return the next line, which must come within a minute."""
        return self._lines.get(timeout=60)

    def forget_lines(self) -> None:
        """Forget the lines so far."""
        while not self._lines.empty():
            self._lines.get()

    def errors(self) -> str:
        """Return stderr so far."""
        return self._stderr.read_text()

    def close_output(self) -> None:
        """Close the reading end of the pipe."""
        self._wanted.clear()
        self._reader.join(60)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def end(self) -> tuple[int, str]:
        """Wait for the end. Return the exit code and stderr."""
        return self.process.wait(60), self.errors()


@cache
def _command() -> Callable[[tuple[str, ...]], object]:
    """Return the whole command line. Each call of `app` would build the command line again, which takes 30 ms."""
    return typer.main.get_command(app)


def runner(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs `agentperf` with the given arguments."""
    monkeypatch.setattr(console.out, "width", 140)

    def run(*words: str) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            _command()(words)
        return Done(ended.value.code, *capsys.readouterr())

    return run


def shown(done: Done) -> str:
    """Return the output of a command that succeeded without a message on stderr."""
    assert (done.returncode, done.stderr) == (OK, ""), done.stderr
    return done.stdout


def document(done: Done, kind: str) -> dict[str, Any]:
    """Return the --json output of a command."""

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    found: dict[str, Any] = json.loads(shown(done), parse_constant=refuse)
    assert (found["kind"], found["version"]) == (kind, 1)
    return found


def said(stderr: str) -> list[str]:
    """Return the lines of stderr under `-X dev` without asyncio's slow-step warnings, which busy machines cause."""
    return [line for line in stderr.splitlines() if not line.startswith("Executing <")]


def has_line(text: str, *words: str) -> bool:
    """Return whether one line contains all of the words."""
    return any(all(word in line for word in words) for line in text.splitlines())
