"""Benchmark of an overview of all agents, against another checkout of the library.

The option `--against FOLDER` names the other checkout. Both checkouts use one server, in turn. First, both record in
real time for longer than the window, about seven minutes, because flushes store older slices in another form. Then
processor times are compared: of the reading thread, and of the scripts as counted by the server. Other load on the
machine can only lengthen these times, so the first decile of many rounds is compared.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from tests.benchmarks import overview_calls
from tests.benchmarks.measure import Bench, Row, first_decile
from tests.benchmarks.scripts import HERE, Build, other_checkout

GOAL = 1.1
"""Maximum ratio of each cost."""
AGENTS, EVERY_S = 1000, 5
WINDOW_S = 300
RECORDED_S = WINDOW_S + 60
KINDS = ("counters", "percentiles")


def rows(bench: Bench, rest: Sequence[str]) -> Iterator[Row]:
    """Yield two rows per kind of overview, or no row without --against."""
    other = other_checkout(rest)
    if other is None:
        return
    program = Path(overview_calls.__file__)
    ours = Build.of(program, HERE, bench.url, "ours", AGENTS, EVERY_S)
    theirs = Build.of(program, other, bench.url, "theirs", AGENTS, EVERY_S)
    with closing(bench.client()) as client, closing(ours), closing(theirs):
        time.sleep(RECORDED_S)
        as_of = _seconds_into_minute(12)
        for build in (ours, theirs):
            build.run("recording", "end")
        what = f"{WINDOW_S // 60}m@{as_of}"
        for kind in KINDS:
            server: list[tuple[float, float]] = []
            reader: list[tuple[float, float]] = []
            for number in range(3 * bench.rounds + 1):
                server_s, reader_s = [0.0, 0.0], [0.0, 0.0]
                for at in (0, 1) if number % 2 else (1, 0):
                    client.config_resetstat()
                    reader_s[at] = (ours, theirs)[at].run(what, kind)
                    server_s[at] = client.info("commandstats")["cmdstat_evalsha"]["usec"] / 1e6
                if number:  # round 0 is not counted, because it loads the scripts
                    server.append((server_s[0], server_s[1]))
                    reader.append((reader_s[0], reader_s[1]))
            for of, pairs in (("server", server), ("reader", reader)):
                first, second = (first_decile([pair[at] for pair in pairs]) for at in (0, 1))
                yield Row(
                    f"overview of {AGENTS:,} agents, 5 minutes, {kind}, {of}",
                    f"{first * 1e3:.3g} ms",
                    f"{other.name}: {second * 1e3:.3g} ms",
                    first / second,
                    f"<= {GOAL} x",
                    first / second <= GOAL,
                )


def _seconds_into_minute(seconds: float) -> float:
    """Wait for this time of a minute. Returns the time ten seconds after the start of the minute.

    A five-minute window that ends then has ten slices: five of ten seconds, four of a minute, one of ten seconds. If it
    ended at a full minute, it would have five.
    """
    time.sleep((seconds - time.time()) % 60)
    return time.time() // 60 * 60 + 10.0
