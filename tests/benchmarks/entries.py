"""The bytes that an entry takes beyond a plain `SET key value PX`, and the server time of hits, puts and touches.

The server time is compared with another checkout of the library, which the option `--against FOLDER` names; see
`scripts` for the method. `--put-goal RATIO` sets the goal of a put that evicts.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import redis

from agentperf_redis.backend import Backend
from tests.benchmarks import entry_calls
from tests.benchmarks.cache import servers
from tests.benchmarks.measure import Bench, Row, first_decile, micros
from tests.benchmarks.scripts import HERE, Build, other_checkout

BYTES_GOAL = {"Valkey": 180, "Redis": 245}
"""Maximum bytes of an entry beyond those of `SET key value PX` with the same key and value."""
TIME_GOAL = 1.05
"""Maximum ratio of the server times."""
SIZES = (50, 200, 1000)
WORKS = {"hit": "mget", "put": "evalsha", "replace": "evalsha", "touch": "evalsha"}
"""For each work, the command in which the server spends its time."""


def rows(bench: Bench, rest: Sequence[str]) -> Iterator[Row]:
    """Yield the rows about bytes. With --against, also yield the rows about server times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--put-goal", type=float, default=TIME_GOAL)
    options = parser.parse_known_args(rest)[0]
    other = other_checkout(rest)
    for server, url in servers(bench):
        with closing(redis.Redis.from_url(url, protocol=2)) as client:
            for kind in ("LRU", "tiered"):
                yield from memory(client, url, server, kind, 50_000 if bench.full else 20_000)
            if other is not None:
                yield from times(bench, client, url, server, other, options.put_goal)


def memory(client: Any, url: str, server: str, kind: str, count: int) -> Iterator[Row]:
    """Measure the bytes that an entry takes beyond a plain SET, for each size of a value."""
    for size in SIZES:
        values = {f"key{number:06d}": os.urandom(size) for number in range(count)}
        plain = _bytes_each(client, lambda values=values: _set_all(client, values), count)  # type: ignore[misc]
        backend = Backend(url)
        cache = entry_calls.make(kind, count, backend)
        cache.put("first", 1)
        ours = _bytes_each(client, lambda cache=cache, values=values: cache.put_many(values), count)  # type: ignore[misc]
        backend.close()
        client.flushall()
        goal, more = BYTES_GOAL[server], ours - plain
        work = f"bytes of an entry of {size:,} B over SET, {server}, {kind}"
        yield Row(work, f"{more:.0f} B", f"SET key value PX: {plain:.0f} B", more / goal, f"<= {goal} B", more <= goal)


def _set_all(client: Any, values: dict[str, bytes]) -> None:
    pipeline = client.pipeline(transaction=False)
    for key, value in values.items():
        pipeline.set(key, value, px=entry_calls.TTL_S * 1000)
    pipeline.execute()


def _bytes_each(client: Any, fill: Callable[[], object], count: int) -> float:
    before = _used(client)
    fill()
    return (_used(client) - before) / count


def _used(client: Any) -> int:
    end = time.monotonic() + 30
    while client.info("memory")["lazyfree_pending_objects"]:
        assert time.monotonic() < end, "the server is still freeing memory"
    used: int = client.info("memory")["used_memory"]
    return used


def times(bench: Bench, client: Any, url: str, server: str, other: Path, put_goal: float) -> Iterator[Row]:
    """Compare the server times of two checkouts."""
    goals = dict.fromkeys(WORKS, TIME_GOAL) | {"put": put_goal}
    entries, calls = (10_000 if bench.full else 1000), 100
    program = Path(entry_calls.__file__)
    ours = Build.of(program, HERE, url, "ours", entries, calls)
    theirs = Build.of(program, other, url, "theirs", entries, calls)
    works = dict(WORKS)
    if "def touch" not in (other / "agentperf_redis" / "cache" / "client.py").read_text():
        del works["touch"]
    with closing(ours), closing(theirs):
        for kind in entry_calls.KINDS:
            for build in (ours, theirs):
                build.run(kind, "fill")
            figures: dict[str, list[tuple[float, float]]] = {work: [] for work in works}
            for number in range(12 * bench.rounds + 1):
                for work, command in works.items():
                    found = [0.0, 0.0]
                    for at in (0, 1) if number % 2 else (1, 0):
                        client.config_resetstat()
                        (ours, theirs)[at].run(kind, work)
                        stats = client.info("commandstats")[f"cmdstat_{command}"]
                        found[at] = stats["usec"] / stats["calls"]
                    if number:  # round 0 is not counted, because it loads the scripts
                        figures[work].append((found[0], found[1]))
            for work, pairs in figures.items():
                first, second = (first_decile([pair[at] for pair in pairs]) for at in (0, 1))
                yield Row(
                    f"server time of {work}, {kind}, {entries:,} entries, {server}",
                    micros(first / 1e6),
                    f"{other.name}: {micros(second / 1e6)}",
                    first / second,
                    f"<= {goals[work]} x",
                    first / second <= goals[work],
                )
