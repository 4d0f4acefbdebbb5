"""Downloads test suites of other projects with pip. Without a network, the tests that need them are skipped."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest


def pip(*words: str) -> None:
    """Run pip. Skip the test if no package index can be reached."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--retries", "1", *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    if done.returncode and "connection broken by" in done.stderr:
        pytest.skip(f"no network: pip cannot reach its package index for {words[-1]}")
    assert done.returncode == 0, done.stdout + done.stderr


def unpack(folder: Path, requirement: str, *options: str) -> Path:
    """Download a source distribution, and unpack it in a folder. Return the path of its root.

    Args:
        folder: an existing folder.
        requirement: a package with its exact version, so that a new release does not change the tests.
        options: further options of ``pip download``.
    """
    name = requirement.partition("==")[0]
    pip("download", "--no-deps", "--no-binary", name, *options, "--dest", str(folder), requirement)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")
