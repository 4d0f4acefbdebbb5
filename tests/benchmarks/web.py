"""Benchmarks of the web page: how fast and how large the first page is, and what open pages cost the server."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from tests.benchmarks.measure import Bench, Row
from tests.benchmarks.metrics import fill

AGENTS = 1000
PAGES = 20
REFRESH_S = 1.0
TIMEOUT_S = 60.0


def rows(bench: Bench) -> Iterator[Row]:
    """Yield all rows of the web page."""
    fill(bench, "web", AGENTS)
    with _site(bench) as (program, port), bench.client() as client:
        times, busy = [], []
        for _ in range(bench.rounds):
            time.sleep(2 * REFRESH_S)  # the last result becomes too old for reuse, so the next view reads the server
            before = _processor_s(client) + _own_s(program)
            took, size = _first_view(port)
            times.append(took)
            busy.append(_processor_s(client) + _own_s(program) - before)
        taken, needed = statistics.median(times), statistics.median(busy)
        work = f"first view of the overview of {AGENTS} agents"
        known = f"processor time {needed * 1e3:.3g} ms"
        yield Row(work, f"{taken * 1e3:.3g} ms", known, None, "<= 1 s", taken <= 1.0)
        yield Row(
            "the same, on the wire with its files", f"{size / 1e3:.3g} kB", "", None, "<= 200 kB", size <= 200_000
        )
        one, many = _cost(bench, port, 1), _cost(bench, port, PAGES)
        yield Row(
            f"processor time of the server for {PAGES} open pages",
            f"{many * 1e3:.3g} ms/s",
            f"one page {one * 1e3:.3g} ms/s",
            many / one,
            "<= 1.5 x",
            many <= 1.5 * one,
        )


@contextlib.contextmanager
def _site(bench: Bench) -> Iterator[tuple[int, int]]:
    """Run `agentperf serve`. Yields its process ID and its port."""
    words = ["serve", "--port", "0", "--json", "--every", str(REFRESH_S), "--url", bench.url, "--namespace", "web"]
    command = [sys.executable, "-c", "from agentperf_redis.cli import main; main()", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as program:
        try:
            assert program.stdout is not None
            text = ""
            while not text.endswith("}\n"):
                line = program.stdout.readline()
                assert line, "agentperf serve has ended"
                text += line
            yield program.pid, urlsplit(json.loads(text)["url"]).port or 0
        finally:
            program.terminate()


def _first_view(port: int) -> tuple[float, int]:
    """Load the page and its files as a browser does. Returns the time in seconds and the number of bytes received."""
    began, size = time.perf_counter(), 0
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)) as connection:

        def load(path: str, encoding: str) -> bytes:
            nonlocal size
            connection.request("GET", path, headers={"Accept": "text/html,*/*", "Accept-Encoding": encoding})
            reply = connection.getresponse()
            body = reply.read()
            assert reply.status == http.HTTPStatus.OK, f"{path}: {reply.status}"
            size += len(body) + len(str(reply.headers))
            return body

        load("/", "gzip")
        took = time.perf_counter() - began
        # A second load finds the names of the page's files. Its time is not measured. For this load, the program
        # reuses the result of the first load.
        page = load("/", "identity").decode()
        size -= len(page)
        began = time.perf_counter()
        for path in re.findall(r'<(?:script|link|img)\b[^>]*?(?:src|href)="([^"]+)"', page):
            load(path, "gzip")
    return took + time.perf_counter() - began, size


def _cost(bench: Bench, port: int, pages: int) -> float:
    """Open live pages, and return how many seconds of processor time the server uses per second."""
    with contextlib.ExitStack() as stack:
        for _ in range(pages):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
            stack.callback(connection.close)
            connection.request("GET", "/live?page=/", headers={"Accept": "text/event-stream"})
            connection.getresponse().readline()
        client = stack.enter_context(bench.client())
        before, began = _processor_s(client), time.perf_counter()
        time.sleep(20 if bench.full else 10)
        return (_processor_s(client) - before) / (time.perf_counter() - began)


def _processor_s(client: object) -> float:
    facts = client.info("cpu")  # type: ignore[attr-defined]
    return float(facts["used_cpu_user"]) + float(facts["used_cpu_sys"])


def _own_s(program: int) -> float:
    """Return the processor time of a process in seconds."""
    fields = Path(f"/proc/{program}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
