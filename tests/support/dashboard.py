"""`agentperf serve` as a program of its own, for tests with a browser."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.places import ROOT
from tests.support.servers import free_port, wait_until


@contextmanager
def dashboard(url: str, namespace: str, log: Path, *options: str) -> Iterator[str]:
    """Serve the web page of a namespace. Yields its scheme, host and port.

    Args:
        url: the server.
        namespace: the namespace.
        log: file for the output of the program.
        options: further options of `agentperf serve`.
    """
    port = free_port()
    words = ["serve", "--url", url, "--namespace", namespace, "--port", str(port), *options]
    with log.open("ab") as file:
        program = subprocess.Popen(
            [sys.executable, "-c", "from agentperf_redis.cli import main; main()", *words],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    origin = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: program.poll() is not None or _answers(origin), "the dashboard to listen")
        assert program.poll() is None, log.read_text()
        yield origin
    finally:
        program.terminate()
        program.wait(30)


def _answers(origin: str) -> bool:
    try:
        with urllib.request.urlopen(f"{origin}/static/style.css", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False
