"""redis-py's own lock tests pass unchanged with the locks of this library.

The tests are taken from a source distribution of redis-py, which pip downloads; without a network they are skipped. The
file `tests/support/redis_py_locks.py` is their conftest.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import downloads
from tests.support.places import ROOT
from tests.support.redis_py_locks import URL
from tests.support.servers import Server

REDIS_PY = "redis==8.1.0"
PYTEST_ASYNCIO = "pytest-asyncio==1.5.0"
"""Exact versions, so that a new release does not change these tests."""
LEFT_OUT = {
    "test_lock_token": "it chooses the token of a request; here each request has a token of its own, since a repeated "
    "request with the same token gets the same lease",
    "test_lock_token_thread_local_false": "as test_lock_token",
    "test_blocking_timeout": "it counts the pauses between polls with a fake clock in redis-py's module; this lock is "
    "woken, and does not poll",
    "test_context_manager_blocking_timeout": "as test_blocking_timeout",
    "test_high_sleep_small_blocking_timeout": "as test_blocking_timeout",
    "test_lock_class_argument": "it tests the method `lock` of redis-py's client",
}
"""Tests that are left out because they test redis-py's internals -> the reason."""
PASSED = {"blocking": 26, "asyncio": 25}
"""Minimum number of tests that pass: the version `REDIS_PY` has this many."""

pytestmark = [pytest.mark.thorough, pytest.mark.standalone]


@pytest.fixture(scope="module")
def suites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages blocking_suite and asyncio_suite, and with pytest-asyncio."""
    folder = tmp_path_factory.mktemp("redis-py")
    downloads.pip("install", "--no-deps", "--target", str(folder / "plugins"), PYTEST_ASYNCIO)
    unpacked = downloads.unpack(folder, REDIS_PY, "--no-build-isolation")
    for package, name in (("blocking", "tests/test_lock.py"), ("asyncio", "tests/test_asyncio/test_lock.py")):
        suite = folder / f"{package}_suite"
        suite.mkdir()
        (suite / "__init__.py").touch()
        (suite / "conftest.py").write_text("from tests.support.redis_py_locks import *\n")
        (suite / "test_lock.py").write_bytes((unpacked / name).read_bytes())
    return folder


def test_missing_network_skips_the_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # the socket does not listen, so connections are refused
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{unused.getsockname()[1]}/simple")
        with pytest.raises(pytest.skip.Exception, match="no network: pip cannot reach its package index for pytest-a"):
            downloads.pip("download", "--no-deps", "--dest", str(tmp_path), PYTEST_ASYNCIO)


@pytest.mark.parametrize("package", PASSED)
def test_redis_pys_tests_of_locks_pass(server: Server, suites: Path, package: str) -> None:
    suite = suites / f"{package}_suite"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull]
    options = [
        "-p",
        "pytest_asyncio",
        "-o",
        "asyncio_mode=auto",
        "-W",
        "ignore::RuntimeWarning",
        "--rootdir",
        str(suites),
        str(suite),
    ]
    omitted = [f"--deselect={suite.name}/test_lock.py::{owner}::{name}" for owner, name in _left_out(suite)]
    environment = {
        **os.environ,
        URL: server.url,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(suites / "plugins"), str(suites))),
    }
    done = subprocess.run(
        [*command, *options, *omitted],
        check=False,
        cwd=suites,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|deselected)", done.stdout)}
    assert counts["passed"] >= PASSED[package]
    assert counts["deselected"] == len(omitted)


def _left_out(suite: Path) -> list[tuple[str, str]]:
    """Return the tests of a suite that are left out, each as its class and its name."""
    text = (suite / "test_lock.py").read_text()
    names = [name for name in LEFT_OUT if f"def {name}(" in text]
    return [("TestLockClassSelection" if name == "test_lock_class_argument" else "TestLock", name) for name in names]
