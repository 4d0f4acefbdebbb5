"""Processes that a test session started and did not end."""

from __future__ import annotations

import contextlib
import multiprocessing.resource_tracker
import os
import uuid
from pathlib import Path

from tests.support.servers import gone, wait_until
from tests.support.workers import server_pid

END_PATIENCE_S = 5.0
"""How long the processes of a session have to end after its last test."""
_MARK = "AGENTPERF_TEST_SESSION"
"""An environment variable that every process started during the session inherits, and is found by at its end."""


def mark_session() -> None:
    """Mark this process, and with it every process that it starts from now on."""
    os.environ[_MARK] = uuid.uuid4().hex


def after_patience(folder: Path) -> dict[int, str]:
    """Return `left_over` once it is empty, or when the processes have had their time."""
    try:
        wait_until(lambda: not left_over(folder), "the session's processes to end", timeout=END_PATIENCE_S)
    except TimeoutError:
        return left_over(folder)
    return {}


def left_over(folder: Path) -> dict[int, str]:
    """Return pid and command of every process that was started during this session, however indirectly, and still runs.

    They are known by the mark in their environment. A server overwrites its own with its title, and is known by its
    working folder or its parent.

    Args:
        folder: in which every `tmp_path` of the session lies.
    """
    mark = f"{_MARK}={os.environ[_MARK]}".encode()
    # Python ends these two itself, when this process ends.
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
