"""The history of a pool: its load, its waiters and its unhealthy instances, one row for each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agentperf_redis.balancer.commands import Pool
from agentperf_redis.balancer.commands.replies import PoolIsDivided, Status, opened, refusal
from agentperf_redis.balancer.layouts import Layout, Layouts, over_shards
from agentperf_redis.command import Batch, Command, Flow, Reply
from agentperf_redis.history import History, HistoryStep, read_history, steps_of
from agentperf_redis.script import Script
from agentperf_redis.windows import Interval, TimeRange, Timestamp, Window, asked_steps

_SAMPLE = Script("balancer/sample")
_PARTS = 10_000
"""The mean loads of shards are added up as integers, in this many parts of a lease. The mean load of a shard is often
less than one lease."""
LAST_FIGURES = ("last_load", "last_waiters", "last_healthy", "last_unhealthy", "last_overdue", "last_capacity")
"""The figures of the last sample in a slice. A backtest judges rules on them, as an evaluation judges the figures of
`status`."""


@dataclass(frozen=True, slots=True)
class PoolSeriesRow:
    """A pool in one step. Figures are None if no process used the pool in the step, because it was not sampled then.

    Attributes:
        interval: the step. The current step ends at the time of the read.
        load: mean number of leases of all instances. The mean is over samples that are taken every ten seconds.
        waiters: the largest number of queued waiters in a sample.
        unhealthy: the largest number of unhealthy instances in a sample, counted as in `status`.
    """

    interval: Interval
    load: float | None = None
    waiters: int | None = None
    unhealthy: int | None = None


def sample(pool: Pool) -> Command[int]:
    """Add the figures of a pool to its history, unless a process has already added some to the present 10-s slice.

    Returns the time until the next slice begins, ms.
    """

    def decode(reply: Reply) -> int:
        match opened(pool, reply):
            case ((Status.DONE | Status.NOTHING), [int(wait_ms)]) if wait_ms >= 0:
                return wait_ms
            case code, values:
                error = refusal(pool, code, values)
                if isinstance(error, PoolIsDivided):  # this process did not know the shards yet: skip this sample
                    return 0
                raise error

    of = pool.keys
    return Command(_SAMPLE, (*of.core, of.ids, of.history), {}, decode)


def series(
    layouts: Layouts, pool: Pool, window: Window, step: Window, as_of: Timestamp
) -> Flow[tuple[PoolSeriesRow, ...]]:
    """Read the rows of a pool. The arguments are checked at the call, before the flow runs."""
    return _series(layouts, pool, *asked_steps(window, step, as_of))


def _series(layouts: Layouts, pool: Pool, time: TimeRange, step_ms: int) -> Flow[tuple[PoolSeriesRow, ...]]:
    return tuple(map(_row, steps_of((yield from read_pool(layouts, pool)), time, step_ms)))


def read_pool(layouts: Layouts, pool: Pool) -> Flow[History]:
    """Read the history of a whole pool.

    The figures of its shards are added slice by slice. The shards are sampled at slightly different times, so a sum of
    their largest values is an upper bound for the pool.
    """

    def read_in(layout: Layout) -> Flow[History]:
        found = yield from Batch(tuple(read_history(shard.keys.history) for shard in layout.shards))
        return _added(found) if layout.is_divided else found[0]

    return (yield from over_shards(layouts, pool, read_in, lambda history: not history.slices, plain=True))


def _added(histories: Sequence[History]) -> History:
    slices: dict[tuple[int, int], dict[str, int]] = {}
    for width, start in {at for history in histories for at in history.slices}:
        total = slices[width, start] = {"samples": _PARTS, "load": 0}
        for history in histories:
            sample = history.slices.get((width, start))
            # The shards are sampled one after another. So a shard may have a sample in the next slice, but none in this
            # slice. In that case, use the shard's state in the previous slice. Otherwise, the pool would seem to lose
            # some instances.
            last = sample or history.slices.get((width, start - width)) or {}
            if sample is not None:
                # `load` is a sum over samples, and shards may differ in their numbers of samples. So add the means.
                total["load"] += round(_PARTS * sample.get("load", 0) / sample["samples"])
            else:
                total["load"] += _PARTS * last.get("last_load", 0)
            for figure in ("waiters", "unhealthy"):
                at_last = last.get(f"last_{figure}", 0)
                total[figure] = total.get(figure, 0) + (at_last if sample is None else sample.get(figure, 0))
            for figure in LAST_FIGURES:
                total[figure] = total.get(figure, 0) + last.get(figure, 0)
    return History(max(history.now_ms for history in histories), slices)


def _row(step: HistoryStep) -> PoolSeriesRow:
    return PoolSeriesRow(step.interval, step.mean("load"), step.peak("waiters"), step.peak("unhealthy"))
