"""What the metrics of some agents will take of the server's memory.

Measured with MEMORY USAGE on Valkey 9.1 and Redis 7.0, durations lognormal with sigma 0.8. A test holds the forecast
against a server's used_memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from agentperf_redis import arguments
from agentperf_redis.metrics.model import Retention

_HASH_BYTES, _FIELD_BYTES = 150, 9.5
"""A hash of counters: 281 to 306 bytes with 17 fields, 1520 to 1624 with 156 to 161."""
_KEY_BYTES = 130
"""A key with a life costs its entries in two tables beside what MEMORY USAGE tells."""
_FIELDS = 9
"""Counters beside the buckets: n, ok, err, a type of error, sum, min, max, first, last."""
_SAMPLE_BYTES = 150
"""A raw sample in a sorted set: 128 on Valkey, 175 on Redis 7.0."""
_SLOW_SAMPLES = 50
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
    series = arguments.count("agents", agents) * (1 + arguments.count("spans", spans, least=0))
    rate = arguments.amount("per_second", per_second, least=1e-6, most=1e9)
    slices = 0.0
    for width, life in zip(_WIDTHS_S, (ms / 1000 for ms in retention.slices_ms), strict=True):
        if life:
            touched = min(life / width + 1, rate * life + 1)
            slices += touched * _bytes_of_hash(max(1.0, rate * width))
    samples = min(rate * retention.recent, retention.recent_count) + min(rate * retention.slow, _SLOW_SAMPLES)
    return MemoryForecast(
        slices=round(series * slices),
        totals=round(series * _bytes_of_hash(rate * 90 * 86_400)),
        samples=round(series * (samples * _SAMPLE_BYTES + 2 * _KEY_BYTES)),
    )


def _bytes_of_hash(executions: float) -> float:
    # Different buckets among n lognormal durations: 8 of 10, 39 of 60, 53 of 100, 89 of 600, 121 of 6000.
    buckets = min(executions, 15 * math.log2(1 + executions / 10))
    return _KEY_BYTES + _HASH_BYTES + _FIELD_BYTES * (_FIELDS + buckets)
