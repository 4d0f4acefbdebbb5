"""Benchmark of the server time of acquire and release, against another checkout of the library.

The option `--against FOLDER` names the other checkout, and `--acquire-goal RATIO` sets the goal of acquire. Both
checkouts send their own scripts to one server, in turn. The compared time is the time spent in scripts, as counted by
the server. It excludes client and network. Other load on the machine can only lengthen this time, so the first decile
of many short rounds is shown.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentperf_redis.balancer import LoadBalancingStrategy
from tests.benchmarks import script_calls
from tests.benchmarks.measure import Bench, Row, first_decile, micros

HERE = Path(__file__).resolve().parents[2]
GOAL = 1.1
"""Maximum ratio of the server times. The goal was set when records got field names; before, they were packed."""
WORKS = ("acquire", "release")


@dataclass(frozen=True, slots=True)
class Build:
    """A process that calls the scripts of one checkout."""

    process: subprocess.Popen[str]

    @staticmethod
    def of(program: Path, checkout: Path, url: str, namespace: str, size: int, calls: int) -> Build:
        """Start the process; `program` explains the other arguments."""
        command = [sys.executable, str(program), url, namespace, str(size), str(calls)]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        return Build(
            subprocess.Popen(
                command, cwd=checkout, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        )

    def run(self, name: str, work: str) -> float:
        """Send one piece of work to the process, and wait until the work is done.

        Returns:
            The figure that the program prints after "done"; 0 if it prints none.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(name, work, file=self.process.stdin, flush=True)
        done, _, figure = self.process.stdout.readline().strip().partition(" ")
        if done != "done":
            raise RuntimeError(f"the build in {self.process.args!r} failed at {name} {work}")
        return float(figure or 0)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def other_checkout(rest: Sequence[str]) -> Path | None:
    """Return the folder that --against names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--against", type=Path)
    found: Path | None = parser.parse_known_args(rest)[0].against
    return found and found.resolve()


def rows(bench: Bench, rest: Sequence[str]) -> Iterator[Row]:
    """Yield one row per strategy and script, or no row without --against."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--acquire-goal", type=float, default=GOAL)
    options = parser.parse_known_args(rest)[0]
    other = other_checkout(rest)
    if other is None:
        return
    goals = {"acquire": options.acquire_goal, "release": GOAL}
    instances, calls = (10_000, 100) if bench.full else (1000, 100)
    program = Path(script_calls.__file__)
    ours = Build.of(program, HERE, bench.url, "ours", instances, calls)
    theirs = Build.of(program, other, bench.url, "theirs", instances, calls)
    with closing(bench.client()) as client, closing(ours), closing(theirs):
        names = [strategy.value for strategy in LoadBalancingStrategy]
        for name in (*names, f"{LoadBalancingStrategy.LEAST_LOADED.value}-metered"):
            for build in (ours, theirs):
                build.run(name, "fill")
            figures = _measured(client, (ours, theirs), name, 12 * bench.rounds)
            for work in WORKS:
                pairs = figures[work]
                first, second = (first_decile([pair[at] for pair in pairs]) for at in (0, 1))
                ratio = first / second
                # The goal applies only to instances without rate limits. For instances with rate limits, the scripts
                # take a slower, general path.
                has_goal = name in names
                yield Row(
                    f"server time of {work}, {name}, {instances:,} instances",
                    micros(first / 1e6),
                    f"{other.name}: {micros(second / 1e6)}",
                    ratio,
                    f"<= {goals[work]} x" if has_goal else "",
                    ratio <= goals[work] if has_goal else None,
                )


def _measured(client: Any, builds: Sequence[Build], name: str, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return the microseconds per call of both checkouts in each round.

    The first round is left out, because it sends the scripts.
    """
    figures: dict[str, list[tuple[float, float]]] = {work: [] for work in WORKS}
    for number in range(rounds + 1):
        found: dict[tuple[str, int], float] = {}
        order = (0, 1) if number % 2 else (1, 0)
        for at in order:
            for work in WORKS:
                client.config_resetstat()
                builds[at].run(name, work)
                stats = client.info("commandstats")["cmdstat_evalsha"]
                found[work, at] = stats["usec"] / stats["calls"]
        if number:
            for work in WORKS:
                figures[work].append((found[work, 0], found[work, 1]))
    return figures
