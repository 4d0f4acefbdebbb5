"""The history of a pool: its load, its waiters and its unhealthy instances, one row for each step."""

from __future__ import annotations

from dataclasses import dataclass

from agentperf_redis.balancer.commands import Pool
from agentperf_redis.balancer.commands.replies import Status, opened, refusal
from agentperf_redis.command import Command, Flow, Reply
from agentperf_redis.history import HistoryStep, read_history, steps_of
from agentperf_redis.script import Script
from agentperf_redis.windows import Interval, TimeRange, Timestamp, Window, asked_steps

_SAMPLE = Script("balancer/sample")


@dataclass(frozen=True, slots=True)
class PoolSeriesRow:
    """A pool in one step. Figures are None if no process used the pool in the step, and so none sampled it.

    Attributes:
        interval: the step. The current step ends at the time of the read.
        load: number of leases of all instances: the mean of the samples, which are taken every ten seconds.
        waiters: the largest number of queued waiters in a sample.
        unhealthy: the largest number of unhealthy instances in a sample.
    """

    interval: Interval
    load: float | None = None
    waiters: int | None = None
    unhealthy: int | None = None


def sample(pool: Pool) -> Command[int]:
    """Add the figures of a pool to its history, unless a process has already done so in the present ten seconds.

    Returns the time until the next slice begins, ms.
    """

    def decode(reply: Reply) -> int:
        match opened(pool, reply):
            case ((Status.DONE | Status.NOTHING), [int(wait_ms)]) if wait_ms >= 0:
                return wait_ms
            case code, values:
                raise refusal(pool, code, values)

    return Command(_SAMPLE, (pool.keys.state, pool.keys.waitq, pool.keys.history), {}, decode)


def series(pool: Pool, window: Window, step: Window, as_of: Timestamp) -> Flow[tuple[PoolSeriesRow, ...]]:
    """Read the rows of a pool. The arguments are checked at the call, before the flow runs."""
    return _series(pool, *asked_steps(window, step, as_of))


def _series(pool: Pool, time: TimeRange, step_ms: int) -> Flow[tuple[PoolSeriesRow, ...]]:
    history = yield from read_history(pool.keys.history)
    return tuple(map(_row, steps_of(history, time, step_ms)))


def _row(step: HistoryStep) -> PoolSeriesRow:
    return PoolSeriesRow(step.interval, step.mean("load"), step.peak("waiters"), step.peak("unhealthy"))
