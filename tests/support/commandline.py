"""The command line run within the tests' own process. The fixture `program` of its tests runs the real program."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from agentperf_redis.cli import console
from agentperf_redis.cli.app import app

OK, FAILURE, USAGE, UNREACHABLE, NOT_FOUND = range(5)


class Done(NamedTuple):
    """What a command left behind."""

    returncode: object
    stdout: str
    stderr: str


Run = Callable[..., Done]
Program = Callable[..., subprocess.CompletedProcess[str]]


def runner(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return what runs `agentperf` with the words it is given."""
    monkeypatch.setattr(console.out, "width", 140)

    def run(*words: str) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app(words)
        return Done(ended.value.code, *capsys.readouterr())

    return run


def shown(done: Done) -> str:
    """Return what a command printed that went well and had nothing to remark."""
    assert (done.returncode, done.stderr) == (OK, ""), done.stderr
    return done.stdout


def document(done: Done, kind: str) -> dict[str, Any]:
    """Return what a command printed with --json."""

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    found: dict[str, Any] = json.loads(shown(done), parse_constant=refuse)
    assert (found["kind"], found["version"]) == (kind, 1)
    return found


def said(stderr: str) -> list[str]:
    """Return what a program said under `-X dev`, but for asyncio's word that a step took 0.1 s: on a busy machine any may."""
    return [line for line in stderr.splitlines() if not line.startswith("Executing <")]


def has_line(text: str, *words: str) -> bool:
    """Whether one line has all of the words."""
    return any(all(word in line for word in words) for line in text.splitlines())
