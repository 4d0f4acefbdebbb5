"""How long the server keeps metrics, and a forecast of the memory that the metrics take there.

The figures of the forecast were measured with MEMORY USAGE and MEMORY STATS on Valkey 9.1, Redis 8.2 and Redis 7.0. The
recorded durations were lognormal with sigma 0.8. A test compares the forecast with a server's used_memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from agentperf_redis import arguments
from agentperf_redis.errors import InvalidArgument

MAX_SLICES = 10_080
"""Maximum number of slices of one width: the minutes of a week. A longer retention needs wider slices."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How long the server keeps data, and so how far back windows can reach. All processes should use equal values.

    Attributes:
        slices_10s: TTL in s of the 10-second slices; 0 writes no such slices.
        slices_1m: TTL in s of the 1-minute slices; 0 writes no such slices.
        slices_1h: TTL in s of the 1-hour slices; 0 writes no such slices.
        slices_1d: TTL in s of the 1-day slices; 0 writes no such slices.
        recent: TTL of raw samples, s.
        recent_count: number of raw samples per agent, at most 1000. Percentiles of up to that many samples are exact.
        slow: TTL of the slowest samples, s.
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
        """TTLs in ms of the slices of each width, the narrowest first."""
        return (
            round(self.slices_10s * 1000),
            round(self.slices_1m * 1000),
            round(self.slices_1h * 1000),
            round(self.slices_1d * 1000),
        )

    @property
    def ttls(self) -> dict[int, float]:
        """Maps each slice width, in s, to the TTL of the slices, in s."""
        return {10: self.slices_10s, 60: self.slices_1m, 3600: self.slices_1h, 86_400: self.slices_1d}


_HASH_BYTES, _FIELD_BYTES = 150, 9.5
"""Memory of a hash of counters without its fields, and memory of one field. Measured for whole hashes: 281 to 306 bytes
with 17 fields, 1520 to 1624 bytes with 156 to 161 fields."""
_KEY_BYTES = 80
"""Memory that MEMORY USAGE omits for each key: the slots of the key in the tables of keys and of TTLs. Measured: 44
bytes on Valkey 9.1, 72 bytes on Redis 8.2."""
_FIELDS = 9
"""Number of counters besides the buckets: n, ok, err, an error type, sum, min, max, first, last."""
_LINE_BYTES, _RUN_BYTES = 110, 2.2
"""Memory of a closed slice without its buckets, and memory of one bucket without the digits of its count. Measured for
whole lines: 213 bytes with 39 buckets, 426 bytes with 117, 666 bytes with 147."""
_MIN_FIELDS, _MIN_CLOSED_S = 24, 60
"""A slice with fewer fields remains a hash, and so does a narrower slice; see `lua/metrics/flush.lua`."""
_SAMPLE_BYTES = 30
"""Memory of a raw sample in a list. Measured: 28 bytes."""
_SLOW_SAMPLES, _SLOW_SAMPLE_BYTES = 50, 60
"""The slowest samples fit into a listpack, in which a sample takes 53 bytes on Valkey 9.1, 63 on Redis 8.2."""
_WIDTHS_S = (10, 60, 3600, 86_400)


@dataclass(frozen=True, slots=True)
class MemoryForecast:
    """Bytes of memory that metrics take on the server once all slices are filled.

    Attributes:
        slices: counters in time slices.
        totals: all-time counters.
        samples: raw samples.
    """

    slices: int
    totals: int
    samples: int

    @property
    def total(self) -> int:
        """The total memory, bytes."""
        return self.slices + self.totals + self.samples


def memory_forecast(retention: Retention, *, agents: int, per_second: float, spans: int = 0) -> MemoryForecast:
    """Forecast the memory of metrics.

    Args:
        retention: the retention.
        agents: number of agents.
        per_second: executions per second of each agent, day and night. The forecast assumes that each span occurs once
            in each execution.
        spans: number of different spans per agent.

    Returns:
        An estimate. It is accurate within a factor of 1.5 if durations vary like those of model calls.

    Raises:
        InvalidArgument: for invalid numbers.
    """
    if not isinstance(retention, Retention):
        raise InvalidArgument("retention", retention, "a Retention")
    series = arguments.count("agents", agents) * (1 + arguments.count("spans", spans, minimum=0))
    rate = arguments.amount("per_second", per_second, minimum=1e-6, maximum=1e9)
    slices = 0.0
    for width, ttl in zip(_WIDTHS_S, (ms / 1000 for ms in retention.slices_ms), strict=True):
        if ttl:
            written = min(ttl / width + 1, rate * ttl + 1)
            slices += written * _bytes_of_slice(width, max(1.0, rate * width))
    samples = min(rate * retention.recent, retention.recent_count) * _SAMPLE_BYTES
    samples += min(rate * retention.slow, _SLOW_SAMPLES) * _SLOW_SAMPLE_BYTES
    return MemoryForecast(
        slices=round(series * slices),
        totals=round(series * _bytes_of_hash(rate * 90 * 86_400)),
        samples=round(series * (samples + 2 * _KEY_BYTES)),
    )


def _bytes_of_slice(width: int, executions: float) -> float:
    buckets = _buckets(executions)
    if width < _MIN_CLOSED_S or _FIELDS + buckets < _MIN_FIELDS:
        return _bytes_of_hash(executions)
    return _LINE_BYTES + buckets * (_RUN_BYTES + 0.6 * math.log10(1 + executions / buckets))


def _bytes_of_hash(executions: float) -> float:
    return _KEY_BYTES + _HASH_BYTES + _FIELD_BYTES * (_FIELDS + _buckets(executions))


def _buckets(executions: float) -> float:
    # The formula approximates measured numbers of buckets. With lognormal durations, 10 durations fell into 8 distinct
    # buckets, 60 into 39, 100 into 53, 600 into 89, and 6000 into 121.
    return min(executions, 15 * math.log2(1 + executions / 10))
