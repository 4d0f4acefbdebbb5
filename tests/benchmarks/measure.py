"""The measurement: our work and its reference run in turn for several rounds. The result is the median of the ratios.

Times on one machine vary, so most goals apply to ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import redis

Work = Callable[[int], object]
"""A function that does its work the given number of times."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        work: name of the work.
        ours: our figure, with its unit.
        reference: the reference and its figure.
        ratio: our figure divided by the reference's figure; None if the goal applies to the figure itself.
        goal: the goal as text, such as "<= 2.3 x".
        met: whether the goal was reached; None if there is no goal.
    """

    work: str
    ours: str
    reference: str
    ratio: float | None
    goal: str
    met: bool | None


@dataclass(frozen=True, slots=True)
class Pair:
    """The median times of two functions that were measured alternately, in seconds per operation.

    `ratio` is the median of the rounds' ratios.
    """

    ours_s: float
    reference_s: float
    ratio: float


@dataclass(frozen=True, slots=True)
class Bench:
    """The environment of a benchmark.

    Attributes:
        url: the run's own server.
        full: whether to run long enough for reliable figures; otherwise the run is a quick check.
    """

    url: str
    full: bool = False

    @property
    def rounds(self) -> int:
        """Number of rounds of a measurement."""
        return 15 if self.full else 5

    def client(self) -> redis.Redis:
        """Return a redis-py client of the server, for reference measurements and to inspect the server."""
        return redis.Redis.from_url(self.url, protocol=2)

    def pair(self, ours: Work, reference: Work, times: int) -> Pair:
        """Measure two functions alternately, `times` operations each per round, after a warm-up round."""
        ours(max(1, times // 5))
        reference(max(1, times // 5))
        first, second = [], []
        for _ in range(self.rounds):
            first.append(timed(ours, times))
            second.append(timed(reference, times))
        ratios = [one / other for one, other in zip(first, second, strict=True)]
        return Pair(statistics.median(first), statistics.median(second), statistics.median(ratios))

    def single(self, work: Work, times: int) -> float:
        """Measure one function, and return the median of the seconds per operation."""
        work(max(1, times // 5))
        return statistics.median(timed(work, times) for _ in range(self.rounds))


def timed(work: Work, times: int) -> float:
    """Return the seconds per operation of one round."""
    start = time.perf_counter()
    work(times)
    return (time.perf_counter() - start) / times


def processor_times(work: Work, client: redis.Redis, times: int) -> tuple[float, float]:
    """Return the processor time per operation that this process and the server need, in seconds."""

    def used() -> tuple[float, float]:
        server: dict[str, float] = client.info("cpu")
        return time.process_time(), server["used_cpu_user"] + server["used_cpu_sys"]

    work(max(1, times // 5))
    before = used()
    work(times)
    after = used()
    return (after[0] - before[0]) / times, (after[1] - before[1]) / times


def first_decile(figures: Sequence[float]) -> float:
    """Return the first decile: of times that other load can only lengthen, it shows the time without such load."""
    return statistics.quantiles(figures, n=10)[0]


def micros(seconds: float) -> str:
    """Format seconds as microseconds."""
    return f"{seconds * 1e6:.3g} us"
