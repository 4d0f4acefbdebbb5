"""The history of a cache: hits, misses, evictions and size for all processes together, one row for each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agentperf_redis.cache.commands.replies import unexpected
from agentperf_redis.command import Batch, Command, Flow, Reply
from agentperf_redis.history import History, HistoryStep, read_history, steps_of
from agentperf_redis.keys import CacheKeys
from agentperf_redis.script import Script
from agentperf_redis.windows import Interval, TimeRange, Timestamp, Window, asked_steps

_SAMPLE = Script("cache/sample")


@dataclass(frozen=True, slots=True)
class CacheSeriesRow:
    """A cache in one step. Figures are None if the cache was not sampled in the step, because no process used it.

    Attributes:
        interval: the step. The current step ends at the time of the read.
        hits: reads that found a value. Each sample counts the reads since the previous sample; the first sample of a
            cache counts none.
        misses: reads that found no value, counted in the same way.
        evictions: evicted entries, counted in the same way.
        size: number of entries at the last sample of the step. A shard that was not sampled then is left out.
        bytes: total size of these entries.
    """

    interval: Interval
    hits: int | None = None
    misses: int | None = None
    evictions: int | None = None
    size: int | None = None
    bytes: int | None = None

    @property
    def hit_rate(self) -> float | None:
        """Share of the reads that found a value, 0 to 1; None without reads."""
        reads = (self.hits or 0) + (self.misses or 0)
        return (self.hits or 0) / reads if reads else None


def sample(keys: CacheKeys) -> Command[int]:
    """Add the figures of a cache to its history, unless a process has already done so in the present ten seconds.

    Returns the time until the next slice begins, ms.
    """

    def decode(reply: Reply) -> int:
        match reply:
            case [0 | 1, int(wait_ms)] if wait_ms >= 0:
                return wait_ms
        raise unexpected(keys.history, reply)

    return Command(_SAMPLE, (keys.meta, keys.size, keys.history), {}, decode)


def series(
    shards: Sequence[CacheKeys], window: Window, step: Window, as_of: Timestamp
) -> Flow[tuple[CacheSeriesRow, ...]]:
    """Read the rows of a cache, given by its shards. The arguments are checked at the call, before the flow runs."""
    return _series(shards, *asked_steps(window, step, as_of))


def _series(shards: Sequence[CacheKeys], time: TimeRange, step_ms: int) -> Flow[tuple[CacheSeriesRow, ...]]:
    history = yield from history_of(shards)
    return tuple(map(_row, steps_of(history, time, step_ms)))


def history_of(shards: Sequence[CacheKeys]) -> Flow[History]:
    """Read the histories of the shards of a cache, and add them up. All figures of a cache are sums over its shards."""
    first, *others = yield from Batch(tuple(read_history(keys.history) for keys in shards))
    if not others:
        return first
    slices: dict[tuple[int, int], dict[str, int]] = {}
    for history in (first, *others):
        for at, sample in history.slices.items():
            total = slices.setdefault(at, {})
            for figure, value in sample.items():
                total[figure] = total.get(figure, 0) + value
    return History(max(each.now_ms for each in (first, *others)), slices)


def _row(step: HistoryStep) -> CacheSeriesRow:
    return CacheSeriesRow(
        step.interval,
        step.total("hits"),
        step.total("misses"),
        step.total("evictions"),
        step.latest("size"),
        step.latest("bytes"),
    )
