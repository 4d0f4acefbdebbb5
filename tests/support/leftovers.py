"""Finds the processes that a test session started and that still run at its end."""

from __future__ import annotations

import contextlib
import multiprocessing.resource_tracker
import os
import uuid
from pathlib import Path

from tests.support.servers import gone, wait_until
from tests.support.workers import server_pid

END_PATIENCE_S = 5.0
"""Time in which the processes of a session must end after the last test, s."""
_MARK = "AGENTPERF_TEST_SESSION"
"""Environment variable that every process of the session inherits. It identifies these processes at the end."""


def mark_session() -> None:
    """Mark the environment of this process. Every process that it starts later inherits the mark."""
    os.environ[_MARK] = uuid.uuid4().hex


def after_timeout(folder: Path) -> dict[int, str]:
    """Wait until `left_over` finds no process or the time limit has passed. Return the last result of `left_over`."""
    try:
        wait_until(lambda: not left_over(folder), "the session's processes to end", timeout=END_PATIENCE_S)
    except TimeoutError:
        return left_over(folder)
    return {}


def left_over(folder: Path) -> dict[int, str]:
    """Return pid and command of every running process that this session started, directly or indirectly.

    A process is recognized by the mark in its environment. A server overwrites its environment with its title, so a
    server is recognized by its working folder or its parent.

    Args:
        folder: parent folder of every `tmp_path` of the session.
    """
    mark = f"{_MARK}={os.environ[_MARK]}".encode()
    # The forkserver and the resource tracker do not count: Python ends them when this process ends.
    known = (os.getpid(), server_pid(), getattr(multiprocessing.resource_tracker._resource_tracker, "_pid", None))
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        pid = int(process.name)
        with contextlib.suppress(OSError):
            if pid in known or gone(pid):
                continue
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            marked = mark in (process / "environ").read_bytes().split(b"\0")
            if marked or parent == os.getpid() or folder in (process / "cwd").readlink().parents:
                found[pid] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return found
