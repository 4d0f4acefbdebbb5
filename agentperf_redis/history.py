"""The history of a cache or a pool: figures that are sampled every ten seconds.

Each process that uses a cache or a pool attempts a sample in each slice of ten seconds. The server accepts only the
first attempt. So no process is a leader: if a process is killed, another process takes the next sample. A cache or a
pool that no process uses is not sampled. A history expires eight days after its last sample.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from agentperf_redis.backend import Backend
from agentperf_redis.background import Background, register_for_fork
from agentperf_redis.command import Batch, Command, Reply, whole_number
from agentperf_redis.errors import AgentPerfError, BackendUnavailable, CorruptState
from agentperf_redis.random_numbers import uniform
from agentperf_redis.script import Script
from agentperf_redis.windows import Interval, TimeRange, step_too_narrow

T = TypeVar("T")

_log = logging.getLogger("agentperf_redis")

_HISTORY = Script("namespace/history")
_RINGS = ((3_600_000, 192, "1h"), (60_000, 180, "1m"), (10_000, 90, "10s"))
"""Width in ms, number of slices and name of each ring, the widest first; as in lua/includes/history.lua."""
_SLOT = re.compile(rb"(10s|1m|1h):\d{1,3}")
_FIRST_S = 2.0
"""Time from the first use of a resource to the first attempt to sample it. A process that ends earlier takes none."""
_SPREAD_S = 1.0
"""After the begin of a slice, the attempts of the processes are spread over this many seconds."""
_AT_ONCE = 256
"""Maximum number of samples in one pipeline."""

Sample = Mapping[str, int]
"""The figures of one slice, by name. The figure `samples` is the number of samples in the slice."""


@dataclass(frozen=True, slots=True)
class History:
    """A stored history.

    Attributes:
        now_ms: the server's time, ms since 1970.
        slices: the samples, by width and start of the slice; both in ms.
    """

    now_ms: int
    slices: Mapping[tuple[int, int], Sample]


@dataclass(frozen=True, slots=True)
class HistoryStep:
    """A step of a window, and the samples of the slices in it, oldest first."""

    interval: Interval
    samples: tuple[Sample, ...]

    def total(self, figure: str) -> int | None:
        """Return the sum of a figure; None without samples."""
        return sum(sample.get(figure, 0) for sample in self.samples) if self.samples else None

    def peak(self, figure: str) -> int | None:
        """Return the largest value of a figure; None without samples."""
        return max((sample.get(figure, 0) for sample in self.samples), default=None)

    def latest(self, figure: str) -> int | None:
        """Return the last value of a figure; None without samples."""
        return self.samples[-1].get(figure, 0) if self.samples else None

    def mean(self, figure: str) -> float | None:
        """Return the mean of a figure whose value in a slice is the sum over its samples; None without samples."""
        total, count = self.total(figure), self.total("samples")
        return total / count if total is not None and count else None


def steps_of(history: History, time_range: TimeRange, step_ms: int) -> list[HistoryStep]:
    """Return the steps that cover a window. As in the series of an agent, no step begins after now.

    `windows.asked_steps` returns the last two arguments.

    Raises:
        InvalidArgument: for a part of the window, the server keeps only slices wider than the step.
    """
    now_ms = history.now_ms
    end_ms = time_range.as_of_ms if 0 <= time_range.as_of_ms <= now_ms else now_ms + 1
    start_ms = max(0, (time_range.as_of_ms if time_range.as_of_ms >= 0 else now_ms) - time_range.window_ms)
    starts = range(start_ms // step_ms * step_ms, -(-end_ms // step_ms) * step_ms, step_ms)
    if not starts:
        return []
    width_ms = _width_for(starts[0], now_ms, step_ms)
    found = []
    for begin in starts:
        slices = (history.slices.get((width_ms, at)) for at in range(begin, begin + step_ms, width_ms))
        interval = Interval(begin / 1000, min(begin + step_ms, now_ms + 1) / 1000)
        found.append(HistoryStep(interval, tuple(sample for sample in slices if sample is not None)))
    return found


def _width_for(from_ms: int, now_ms: int, step_ms: int) -> int:
    """Return the largest width that divides the step and whose slices are still kept for the time from `from_ms` on."""
    kept = [width for width, slots, _ in _RINGS if from_ms + width * slots > now_ms - width]
    fitting = [width for width in kept if step_ms % width == 0]
    if fitting:
        return fitting[0]
    if kept:
        raise step_too_narrow(step_ms, kept[-1])
    # No slices of any width go back to `from_ms`, so the first steps are empty. The widest slices go back furthest.
    widest, _, _ = _RINGS[0]
    if step_ms % widest == 0:
        return widest
    raise step_too_narrow(step_ms, widest)


def read_history(key: str) -> Command[History]:
    """Read a whole history."""
    return Command(_HISTORY, (key,), {}, lambda reply: _decoded(key, reply))


def _decoded(key: str, reply: Reply) -> History:
    widths = {name.encode(): width for width, _, name in _RINGS}
    slices = {}
    try:
        now_ms, *flat = reply
        for field, text in zip(flat[::2], flat[1::2], strict=True):
            slot = _SLOT.fullmatch(field)
            if slot is not None:
                sample = {name.decode(): whole_number(number) for name, _, number in _words(text)}
                width = widths[slot[1]]
                at = sample.pop("at")
                if at % width == 0 and sample["samples"]:
                    slices[width, at] = sample
        if type(now_ms) is int:
            return History(now_ms, slices)
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise CorruptState(key, f"an unexpected reply {str(reply)[:200]}")


def _words(text: bytes) -> list[tuple[bytes, bytes, bytes]]:
    return [word.partition(b"=") for word in text.split()]


class Sampler(Generic[T]):
    """Samples the caches or the pools that this process uses. It runs on an existing thread of the service.

    Args:
        backend: sends the commands.
        jobs: the thread that takes the samples.
        samples: returns the commands that sample a resource, one for each of its shards. The result of a command is the
            time in ms until the next slice begins.
        timeout_s: returns the maximum duration, in seconds, of a command on this thread.
        in_use: returns, by name, the resources that are sampled without calls of `used`, such as pools with leases.
    """

    def __init__(
        self,
        backend: Backend,
        jobs: Background,
        samples: Callable[[T], tuple[Command[int], ...]],
        timeout_s: Callable[[], float],
        in_use: Callable[[], dict[str, T]] = dict,
    ) -> None:
        self._backend = backend
        self._jobs = jobs
        self._samples = samples
        self._timeout_s = timeout_s
        self._in_use = in_use
        self.after_fork()
        register_for_fork(self)

    def after_fork(self) -> None:
        """In a forked child: start without resources. Each resource that the child uses is added at its first use."""
        self._used: dict[str, T] = {}
        self._scheduled = False
        self._next = 0.0
        self._failing = False

    def used(self, name: str, resource: T) -> None:
        """Sample a resource in the next slice. Each call of a service runs this method, so it takes no lock.

        Args:
            name: a name that no other resource of this object has.
            resource: the resource.
        """
        self._used[name] = resource
        if not self._scheduled:
            self._scheduled = True
            self._jobs.at(max(self._next, time.monotonic() + _FIRST_S), self._take)

    def _take(self) -> None:
        """Sample the resources used since the last call. Runs on the thread. A later use schedules the next call."""
        self._scheduled = (
            False  # cleared before `_used` is taken, so that a resource added from now on schedules the next call
        )
        used, self._used = self._used, {}
        if self._jobs.closing:
            return
        used.update(self._in_use())
        samples, waits = [sample for each in used.values() for sample in self._samples(each)], [0]
        error: AgentPerfError | None = None
        for first in range(0, len(samples), _AT_ONCE):
            batch = Batch(tuple(samples[first : first + _AT_ONCE]))
            try:
                for result in self._backend.run(batch.settled(), self._timeout_s()):
                    if isinstance(result, AgentPerfError):
                        error = error or result
                    else:
                        waits.append(result)
            except AgentPerfError as met:
                error = met
            except Exception:  # noqa: BLE001  the thread has other work, which must go on
                _log.exception("the history was not sampled")
        if error is not None and not self._failing and not self._jobs.closing:
            # The service that uses the resource already reports an outage. So an outage gets only level DEBUG here.
            level = logging.DEBUG if isinstance(error, BackendUnavailable) else logging.WARNING
            _log.log(level, "the history was not sampled: %s", error)
        self._failing = error is not None
        self._next = time.monotonic() + max(waits) / 1000 + uniform(0.0, _SPREAD_S)
        for name, resource in self._in_use().items():
            self.used(name, resource)
