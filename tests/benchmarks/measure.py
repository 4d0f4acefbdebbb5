"""How things are measured: ours and what it is held against in turn, in one run; medians of several rounds.

Machines are noisy: the ratio is what is judged, the times are only shown.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import redis

Work = Callable[[int], object]
"""Does something so many times."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        work: what was done.
        ours: our figure, with its unit.
        reference: what it is held against, and its figure.
        ratio: ours over the reference's; None where the figure itself is judged.
        goal: in words, such as "<= 2.3 x".
        met: whether the goal was reached; None where there is none.
    """

    work: str
    ours: str
    reference: str
    ratio: float | None
    goal: str
    met: bool | None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two works measured in turn: seconds per operation, and the median of the ratios round by round."""

    ours_s: float
    reference_s: float
    ratio: float


@dataclass(frozen=True, slots=True)
class Bench:
    """What a benchmark is given.

    Attributes:
        url: a server of the run's own.
        full: take the time that trustworthy figures need, instead of a quick look.
    """

    url: str
    full: bool = False

    @property
    def rounds(self) -> int:
        """How often to measure each of a pair."""
        return 15 if self.full else 5

    def client(self) -> redis.Redis:
        """A plain redis-py client, to measure against and to look inside."""
        return redis.Redis.from_url(self.url, protocol=2)

    def pair(self, ours: Work, reference: Work, times: int) -> Pair:
        """Measure two works in turn, each `times` operations a round, after one round to warm up."""
        ours(max(1, times // 5))
        reference(max(1, times // 5))
        first, second = [], []
        for _ in range(self.rounds):
            first.append(timed(ours, times))
            second.append(timed(reference, times))
        ratios = [one / other for one, other in zip(first, second, strict=True)]
        return Pair(statistics.median(first), statistics.median(second), statistics.median(ratios))

    def single(self, work: Work, times: int) -> float:
        """Measure one work: median seconds per operation."""
        work(max(1, times // 5))
        return statistics.median(timed(work, times) for _ in range(self.rounds))


def timed(work: Work, times: int) -> float:
    """Seconds per operation of one round."""
    start = time.perf_counter()
    work(times)
    return (time.perf_counter() - start) / times


def micros(seconds: float) -> str:
    """Show seconds as microseconds."""
    return f"{seconds * 1e6:.3g} us"
