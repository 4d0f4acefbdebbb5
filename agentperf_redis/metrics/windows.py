"""The names of `agentperf_redis.windows` that the modules of the metrics use."""

from agentperf_redis.windows import (
    ALL_TIME,
    LAST_MS,
    TimeRange,
    Timestamp,
    Window,
    asked_time,
    length_text,
    local_timestamp,
    timestamp_ms,
    window_seconds,
)

__all__ = [
    "ALL_TIME",
    "LAST_MS",
    "TimeRange",
    "Timestamp",
    "Window",
    "asked_time",
    "length_text",
    "local_timestamp",
    "timestamp_ms",
    "window_seconds",
]
