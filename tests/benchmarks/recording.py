"""Benchmark of the costs of recording and of flushing, against another checkout of the library.

The option `--against FOLDER` names the other checkout. Both checkouts use one server, in turn. Processor times are
compared: of the recording thread, of the process that flushes, and of the scripts as counted by the server. Other load
on the machine can only lengthen these times, so the first decile of many short rounds is compared.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from tests.benchmarks import recording_calls
from tests.benchmarks.measure import Bench, Row, micros
from tests.benchmarks.scripts import HERE, Build, other_checkout

GOAL = 1.1
"""Maximum ratio of each cost."""
AGENTS, SAMPLES = 10, 500
"""Number of agents in a flush, and of samples."""


def rows(bench: Bench, rest: Sequence[str]) -> Iterator[Row]:
    """Yield one row per cost, or no row without --against."""
    other = other_checkout(rest)
    if other is None:
        return
    program = Path(recording_calls.__file__)
    ours = Build.of(program, HERE, bench.url, "ours", AGENTS, SAMPLES)
    theirs = Build.of(program, other, bench.url, "theirs", AGENTS, SAMPLES)
    figures: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with closing(bench.client()) as client, closing(ours), closing(theirs):
        for number in range(24 * bench.rounds + 1):
            found: dict[str, dict[int, float]] = defaultdict(dict)
            for at in (0, 1) if number % 2 else (1, 0):
                build = (ours, theirs)[at]
                client.config_resetstat()
                found["record_execution"][at] = build.run("executions", "record")
                found[f"flush of {SAMPLES} samples, client"][at] = build.run("executions", "flush")
                found[f"flush of {SAMPLES} samples, server"][at] = (
                    client.info("commandstats")["cmdstat_evalsha"]["usec"] / 1e6
                )
            if number:  # round 0 is not counted, because it loads the scripts
                for work, times in found.items():
                    figures[work].append((times[0], times[1]))
    for work, pairs in figures.items():
        first, second = (statistics.quantiles([pair[at] for pair in pairs], n=10)[0] for at in (0, 1))
        yield Row(
            f"processor time of {work}",
            micros(first),
            f"{other.name}: {micros(second)}",
            first / second,
            f"<= {GOAL} x",
            first / second <= GOAL,
        )
