"""Checks of docker-compose.yml that need no Docker."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.places import ROOT

_COMPOSE = (ROOT / "docker-compose.yml").read_text()


def _dockerfile() -> list[list[str]]:
    """Return the instructions of the inline Dockerfile, each as a list of words."""
    found = re.search(r"dockerfile_inline: \|\n((?: {6}.*\n)+)", _COMPOSE)
    assert found
    return [shlex.split(line) for line in textwrap.dedent(found[1]).splitlines()]


@pytest.mark.thorough
def test_image_copies_everything_its_wheel_needs(tmp_path: Path) -> None:
    context = tmp_path / "app"
    context.mkdir()
    for _, *sources, target in (words for words in _dockerfile() if words[0] == "COPY"):
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, context / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, context / target)
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(context)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.glob("agentperf_redis-*.whl"))


def test_build_context_contains_only_copied_files() -> None:
    everything, *kept = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [source for words in _dockerfile() if words[0] == "COPY" for source in words[1:-1]]
    assert everything == "*"
    assert sorted(line for line in kept if line.startswith("!")) == sorted(f"!{source}" for source in copied)
    assert [line for line in kept if not line.startswith("!")] == ["**/__pycache__"]


def test_image_runs_the_command_with_its_extra() -> None:
    words = _dockerfile()
    assert words[0] == ["FROM", "python:3.11-slim"]
    assert ["RUN", "pip", "install", "--no-cache-dir", ".[cli]"] in words
    assert words[-1] == ["ENTRYPOINT", "[agentperf]"]
    assert words[-2][0] == "USER"
    assert 'command: [demo, --url, "redis://redis:6379/0"]' in _COMPOSE


def test_server_persists_data_and_never_evicts() -> None:
    command = re.search(r"command:\n((?: {6}- .*\n)+)", _COMPOSE)
    assert command
    words = [line.partition("- ")[2].partition(" #")[0].strip('"') for line in command[1].splitlines()]
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert words[0] == "valkey-server"
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"
    assert "- data:/data" in _COMPOSE
    assert '"127.0.0.1:6379:6379"' in _COMPOSE
