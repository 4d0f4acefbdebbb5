"""A window counts exactly the range that it covers. The scripts run on a simulated server with the test's clock."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from unittest import mock

import pytest

from agentperf_redis import keys
from agentperf_redis.errors import InvalidArgument
from agentperf_redis.metrics import commands
from agentperf_redis.metrics.accumulator import OK
from agentperf_redis.metrics.buffer import Buffer
from agentperf_redis.metrics.counters import Counters
from agentperf_redis.metrics.retention import Retention
from agentperf_redis.windows import timestamp_ms
from tests.support.fake import Fake

NAMESPACE = "windows"
SHARD = keys.metrics_shard("research")
TIERS = ((10, 900.0), (60, 3 * 3600.0), (3600, 8 * 86_400.0), (86_400, 90 * 86_400.0))
TIMESTAMPS = [
    datetime(2026, 11, 22, 16, 45, 13, 400_000, tzinfo=UTC),
    datetime(2026, 12, 31, 23, 59, 59, 999_000, tzinfo=UTC),
    datetime(2028, 2, 29, 0, 0, 0, 0, tzinfo=UTC),
    datetime(2100, 3, 1, 0, 0, 0, 1000, tzinfo=UTC),  # 2100 is no leap year
]


class World:
    """A simulated server with a fixed time, and executions at past timestamps."""

    def __init__(self, fake: Fake, now: float) -> None:
        self.fake = fake
        self.now = now
        self.recorded: list[float] = []

    def record(self, timestamps: list[float], retention: Retention) -> None:
        clock = [0.0]
        buffer = Buffer(on_first=lambda: None, clock=lambda: clock[0])
        buffer.synchronise(self.now, 0.0)
        for timestamp in sorted(timestamps):
            clock[0] = timestamp - self.now
            buffer.record("research", 0.5, OK)
        clock[0] = 0.0
        buffer.aggregate()
        buffer.downsample(retention.ttls)
        while batches := buffer.batches():
            (batch,) = batches
            self.fake.run(commands.flush(NAMESPACE, batch, now=0.0, retention=retention))
            buffer.settled(batch, 0)
        self.recorded += timestamps

    def read(self, window_s: float, as_of: float | None) -> Counters:
        reply = self.fake.run(
            commands.read(
                NAMESPACE,
                SHARD,
                ["research"],
                window_ms=round(window_s * 1000),
                as_of_ms=-1 if as_of is None else round(as_of * 1000),
                max_exact=0,
            )
        )
        counters: Counters = reply.counter_sets["research"]
        return counters


@pytest.fixture(params=TIMESTAMPS, ids=lambda timestamp: timestamp.strftime("%Y-%m-%d"))
def world(request: pytest.FixtureRequest, fake: Fake) -> Iterator[World]:
    now = request.param.timestamp()
    with mock.patch("time.time", return_value=now):
        assert fake.client.time()[0] == int(now), "the simulated server uses time.time"
        yield World(fake, now)


def kept(world: World, timestamp: float) -> float:
    """Return the width of the finest slices that are still kept for a timestamp."""
    for width, ttl in TIERS:
        if timestamp // width * width + width + ttl > world.now:
            return width
    return 0.0


def test_window_counts_exactly_the_range_it_covers(world: World) -> None:
    source = random.Random(world.now)
    # Near the border of two slices, rounding to milliseconds would decide which slice counts a timestamp. So each
    # timestamp is at least 10 ms away from a border.
    timestamps = [
        (world.now - age) // 10 * 10 + source.uniform(0.01, 9.9)
        for age in (*(source.uniform(0, 1200) for _ in range(60)), *(10 ** source.uniform(3, 6.8) for _ in range(60)))
    ]
    timestamps = [timestamp for timestamp in timestamps if timestamp < world.now]
    world.record(timestamps, Retention())
    for _ in range(150):
        window = 10 ** source.uniform(0, 6.5)
        as_of = None if source.random() < 0.4 else world.now - 10 ** source.uniform(-1, 6.5)
        end = world.now if as_of is None else as_of
        counters = world.read(window, as_of)
        start_s, end_s = (ms / 1000 for ms in counters.interval_ms)
        inside = sum(start_s <= timestamp < end_s for timestamp in world.recorded)
        assert counters.n == inside, (window, as_of)
        width = kept(world, end - window)
        if width:
            assert end - window - width < start_s <= end - window + 0.001
            assert end_s >= min(end, world.now) - 0.001


def test_slices_are_named_in_utc(world: World) -> None:
    world.record([world.now], Retention())
    timestamp = datetime.fromtimestamp(world.now, tz=UTC)
    tag = keys.metrics_tag(NAMESPACE, SHARD)
    expected = {
        f"{tag}:10s:{timestamp:%Y-%m-%dT%H:%M}:{timestamp.second // 10 * 10:02d}:research",
        f"{tag}:1m:{timestamp:%Y-%m-%dT%H:%M}:research",
        f"{tag}:1h:{timestamp:%Y-%m-%dT%H}:research",
        f"{tag}:1d:{timestamp:%Y-%m-%d}:research",
    }
    assert set(world.fake.client.keys(f"{tag}:1*:research")) == expected


def test_future_window_counts_slices_that_overlap_it(world: World) -> None:
    world.record([world.now - 30.0], Retention())
    for ahead, window, expected in ((20.0, 60.0, 1), (60.0, 60.0, 0), (1000.0, 60.0, 0), (1000.0, 3600.0, 1)):
        assert world.read(window, world.now + ahead).n == expected


def test_wider_slices_replace_missing_fine_ones(world: World) -> None:
    coarse = Retention(slices_10s=0.0, slices_1m=0.0)
    world.record([world.now - 30.0, world.now - 5000.0], coarse)
    for window in (60.0, 300.0, 4000.0, 86_400.0):
        counters = world.read(window, None)
        start_s, end_s = (ms / 1000 for ms in counters.interval_ms)
        assert counters.n == sum(start_s <= timestamp < end_s for timestamp in world.recorded)
        assert start_s <= world.now - window


def test_windows_are_empty_without_slices(world: World) -> None:
    world.record([world.now - 30.0], Retention(slices_10s=0.0, slices_1m=0.0, slices_1h=0.0, slices_1d=0.0))
    assert world.read(300.0, None).n == 0
    assert world.read(0.0, None).n == 1, "all-time counts remain"


class LostZone(tzinfo):
    def utcoffset(self, _: datetime | None) -> timedelta:
        raise RuntimeError("no")

    dst = utcoffset

    def tzname(self, _: datetime | None) -> str:
        raise RuntimeError("no")


def test_time_of_a_faulty_zone_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="as_of"):
        timestamp_ms("as_of", datetime(2026, 1, 1, tzinfo=LostZone()))
