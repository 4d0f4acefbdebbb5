"""How long what is kept, and what that takes of the server's memory.

The forecast's figures were measured with MEMORY USAGE and MEMORY STATS on Valkey 9.1, Redis 8.2 and Redis 7.0.
Durations were lognormal with sigma 0.8. A test compares the forecast with a server's used_memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from agentperf_redis import arguments

MAX_SLICES = 10_080
"""Slices of one width: a week of minutes. What would read or write more has a wider slice."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How long the server keeps what, and so how far back windows reach. All processes of a namespace should agree.

    Attributes:
        slices_10s: life of the slices of 10 s, s; 0 writes none.
        slices_1m: likewise.
        slices_1h: likewise.
        slices_1d: likewise.
        recent: life of raw samples, s.
        recent_count: raw samples kept for each agent, at most 1000; percentiles of no more samples are exact.
        slow: life of the slowest samples, s.
    """

    slices_10s: float = 15 * 60.0
    slices_1m: float = 3 * 3600.0
    slices_1h: float = 8 * 86_400.0
    slices_1d: float = 90 * 86_400.0
    recent: float = 3600.0
    recent_count: int = 1000
    slow: float = 8 * 86_400.0

    def __post_init__(self) -> None:
        """Check every value."""
        for name, width in (("slices_10s", 10), ("slices_1m", 60), ("slices_1h", 3600), ("slices_1d", 86_400)):
            maximum = min(MAX_SLICES * width, arguments.MAX_SECONDS)
            arguments.seconds(name, getattr(self, name), minimum=0.0, maximum=maximum)
        arguments.seconds("recent", self.recent, minimum=1.0)
        arguments.seconds("slow", self.slow, minimum=1.0)
        arguments.count("recent_count", self.recent_count, maximum=1000)

    @property
    def slices_ms(self) -> tuple[int, int, int, int]:
        """Life of the four kinds of slices, narrowest first, ms."""
        return (
            round(self.slices_10s * 1000),
            round(self.slices_1m * 1000),
            round(self.slices_1h * 1000),
            round(self.slices_1d * 1000),
        )

    @property
    def ttls(self) -> dict[int, float]:
        """Life of the slices by their width, both in s."""
        return {10: self.slices_10s, 60: self.slices_1m, 3600: self.slices_1h, 86_400: self.slices_1d}


_HASH_BYTES, _FIELD_BYTES = 150, 9.5
"""A hash of counters: 281 to 306 bytes with 17 fields, 1520 to 1624 with 156 to 161."""
_KEY_BYTES = 80
"""A key with a TTL has entries in two tables, which MEMORY USAGE leaves out: 44 on Valkey 9.1, 72 on Redis 8.2."""
_FIELDS = 9
"""Counters beside the buckets: n, ok, err, a type of error, sum, min, max, first, last."""
_SAMPLE_BYTES = 140
"""A raw sample in a sorted set, a skip list: 113 on Valkey 9.1, 128 on Redis 8.2, 175 on Redis 7.0."""
_SLOW_SAMPLES, _SLOW_SAMPLE_BYTES = 50, 60
"""The slowest samples are few enough for a listpack, in which one takes 53 on Valkey 9.1, 63 on Redis 8.2."""
_WIDTHS_S = (10, 60, 3600, 86_400)


@dataclass(frozen=True, slots=True)
class MemoryForecast:
    """Bytes of the server's memory once the slices have filled up.

    Attributes:
        slices: counters in slices of time.
        totals: counters of all time.
        samples: raw samples.
    """

    slices: int
    totals: int
    samples: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.slices + self.totals + self.samples


def memory_forecast(retention: Retention, *, agents: int, per_second: float, spans: int = 0) -> MemoryForecast:
    """Forecast memory.

    Args:
        retention: what is kept, and how long.
        agents: how many agents.
        per_second: executions of each, a second, at any time of the day; spans are taken to be as frequent.
        spans: different spans of each agent.

    Returns:
        An estimate, right within a factor of 1.5 for durations that vary like those of a model's calls.

    Raises:
        InvalidArgument: for numbers that cannot be.
    """
    series = arguments.count("agents", agents) * (1 + arguments.count("spans", spans, minimum=0))
    rate = arguments.amount("per_second", per_second, minimum=1e-6, maximum=1e9)
    slices = 0.0
    for width, ttl in zip(_WIDTHS_S, (ms / 1000 for ms in retention.slices_ms), strict=True):
        if ttl:
            written = min(ttl / width + 1, rate * ttl + 1)
            slices += written * _bytes_of_hash(max(1.0, rate * width))
    samples = min(rate * retention.recent, retention.recent_count) * _SAMPLE_BYTES
    samples += min(rate * retention.slow, _SLOW_SAMPLES) * _SLOW_SAMPLE_BYTES
    return MemoryForecast(
        slices=round(series * slices),
        totals=round(series * _bytes_of_hash(rate * 90 * 86_400)),
        samples=round(series * (samples + 2 * _KEY_BYTES)),
    )


def _bytes_of_hash(executions: float) -> float:
    # Different buckets among n lognormal durations: 8 of 10, 39 of 60, 53 of 100, 89 of 600, 121 of 6000.
    buckets = min(executions, 15 * math.log2(1 + executions / 10))
    return _KEY_BYTES + _HASH_BYTES + _FIELD_BYTES * (_FIELDS + buckets)
