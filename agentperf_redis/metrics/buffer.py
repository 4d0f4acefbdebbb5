"""What a process has recorded and the server has not confirmed yet. No I/O here.

The way of a sample: `Buffer.record` appends it to the sample buffer of its series, a plain list, without a lock.
`Buffer.aggregate` empties the sample buffers into one `Accumulator` for each series and each ten seconds of server
time, so that a sample delayed by an outage still lands in the slice it belongs to. `Buffer.batches` packs the
accumulators of each shard into a `FlushBatch` with the next number of that shard. A batch never changes until it is
settled; what is recorded meanwhile waits for the next one. So a batch can be sent any number of times, and counts once.

What is bounded: series (`MAX_SERIES`, then ``__other__``), samples in a sample buffer (`MAX_BUFFERED_SAMPLES`, then the
recording thread aggregates), raw samples of an accumulator (`MAX_RAW`, the rest is counted only), accumulators (they
are downsampled as they age beyond the TTL of the finer slices, and when there are too many).
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from agentperf_redis import arguments, keys
from agentperf_redis.metrics.accumulator import ITEMS, MAX_RAW, Accumulator, Part, Samples, Series
from agentperf_redis.metrics.model import OTHER

STEP_S = 10
"""Width of the finest slice."""
MAX_SERIES = 4000
"""Series one process holds apart; 2000 agents are what the server takes, spans come on top."""
RAW_REFILL_PER_S = 50.0
"""Raw samples a second that a busy series may send on after its first 1000: a sample of now, and no flood."""
MAX_ACCUMULATORS = 20_000
"""About 1.6 kB each with 60 different durations, so 32 MB in an outage of days; then steps become coarser early."""
MAX_WAITING_RAW = 100_000
"""Raw samples that wait through an outage, 13 MB; the newest stay."""
MAX_BUFFERED_SAMPLES = 1000
"""Samples of a series that are not added up yet; the next second's flush does it, or else the thread that records."""
_MAX_BUFFERED_ITEMS = MAX_BUFFERED_SAMPLES * ITEMS
MAX_BATCH_ACCUMULATORS = 32
"""Cells of one script call: about 3 ms of the server's time."""
MAX_BATCH_SAMPLES = 2000
"""Raw samples after which a parcel is full: about as much again."""
WRITER_KEEP_S = 3600.0
"""How long the server remembers the number of a writer's last parcel."""
_UNCERTAIN_S = WRITER_KEEP_S - 60.0

WIDER = {10: 60, 60: 3600, 3600: 86_400, 86_400: 86_400}
"""The next wider slice."""


class PackedAccumulator(NamedTuple):
    """A cell on its way: the series it belongs to, and the width in s of the slice it must stay within."""

    series: Series
    width_s: int
    accumulator: Accumulator


@dataclass(slots=True)
class FlushBatch:
    """The cells of one shard that travel, and count, together."""

    shard: int
    writer: str
    seq: int
    accumulators: list[PackedAccumulator]
    first_sent: float | None = None
    """When an attempt was first made whose outcome is unknown."""

    @property
    def samples(self) -> int:
        """Executions in it."""
        return sum(packed.accumulator.counts["n"] for packed in self.accumulators)


@dataclass(slots=True)
class _Shard:
    writer: str
    seq: int = 0
    waiting: dict[tuple[str, int, int], PackedAccumulator] = field(default_factory=dict)
    """By series, step and width."""
    batch: FlushBatch | None = None


def _no_wider(limit: int, _step: int, width: int) -> bool:
    return width <= limit


class Buffer:
    """The samples of one process.

    Args:
        on_first: called when something was recorded after a time of nothing; quick, on the recording thread.
        clock: seconds that never go back.
    """

    def __init__(self, *, on_first: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._on_first = on_first
        self._clock = clock
        self._sample_buffers: dict[str | Part, Samples] = {}
        self.reset()

    def reset(self) -> None:
        """Begin empty, as another writer: at first, and in a forked child, where the parent flushes its own."""
        self.writer = uuid.uuid4().hex[:12]
        self._sample_buffers.clear()
        self._series: dict[str | Part, Series] = {}
        self._check_at = 0
        """Items of a lane at which who records has more to do: fold it, or with 0, announce that there is something."""
        self._offset = time.time() - self._clock()  # until the server told its time
        self._synchronised = False
        # Reentrant, since a signal handler or a collected generator may record while this very thread folds.
        self._lock = threading.RLock()
        self._aggregating = False
        self._shards: dict[int, _Shard] = {}
        self._raw_allowance: dict[Series, tuple[float, float]] = {}
        self._counted = 0
        self._dropped = 0
        self._uncertain = 0
        self._samples_dropped = 0
        self._other = 0

    # -- recording

    def record(self, agent: str | Part, seconds: float, outcome: str, own: float = 0.0) -> None:
        """Note an execution. Needs no lock: extending a list is one step, and a fold leaves what comes after it.

        Args:
            agent: the agent, or a part of it.
            seconds: its duration.
            outcome: ``ok``, ``err``, ``err:<type>`` or ``cancelled``.
            own: of a span, how much of it was its own, s.
        """
        try:
            sample_buffer = self._sample_buffers[agent]
        except (KeyError, TypeError):
            sample_buffer = self._sample_buffer(agent)
        sample_buffer += (self._clock(), seconds, outcome, own)
        if len(sample_buffer) >= self._check_at:
            self._look_up(sample_buffer)

    def add(self, agent: str | Part, counts: Mapping[str, int]) -> None:
        """Add to further counters of a series, such as tokens: ``tok_in``, ``mdl:<model>:tok_in``."""
        now = self._clock()
        with self._lock:
            self._accumulator(self._known(agent), now).add(counts)
        self._look_up([])

    def _look_up(self, sample_buffer: Samples) -> None:
        """Do what is due now and then, after something was recorded."""
        if not self._check_at:
            self._check_at = _MAX_BUFFERED_ITEMS
            self._on_first()
        if len(sample_buffer) >= _MAX_BUFFERED_ITEMS:
            self.aggregate()

    def _sample_buffer(self, given: object) -> Samples:
        with self._lock:
            return self._sample_buffers.setdefault(self._known(given), [])

    def _known(self, given: object) -> str | Part:
        """Return the series to count under: what was given, or `OTHER` when there are too many."""
        key = given if isinstance(given, Part) else arguments.name("agent_name", given)
        if key in self._series:
            return key
        if len(self._series) >= MAX_SERIES:
            key = Part(OTHER, (OTHER,)) if isinstance(key, Part) else OTHER
        part = key if isinstance(key, Part) else Part(key)
        self._series[key] = Series(keys.metrics_shard(part.agent), keys.metrics_series(*part))
        return key

    # -- packing

    def announce_next(self) -> None:
        """Call `on_first` again for what is recorded from now on."""
        self._check_at = 0

    def aggregate(self) -> None:
        """Add up everything recorded so far, to wait for being packed."""
        with self._lock:
            if self._aggregating:  # by a record made within, see __init__
                return
            self._aggregating = True
            try:
                for key, sample_buffer in list(self._sample_buffers.items()):
                    if sample_buffer:
                        self._aggregate(key, sample_buffer)
            finally:
                self._aggregating = False

    def _aggregate(self, key: str | Part, sample_buffer: Samples) -> None:
        samples = sample_buffer[:]
        del sample_buffer[: len(samples)]  # others may have appended since
        while samples:
            step = self._step(samples[0])
            end = len(samples)
            if self._step(samples[-ITEMS]) != step:
                ends = range(0, end, ITEMS)
                end = next((at for at in ends if self._step(samples[at]) != step), end)
            self._accumulator(key, samples[0]).aggregate(samples[:end] if end < len(samples) else samples)
            del samples[:end]

    def _step(self, when: float) -> int:
        return int((when + self._offset) // STEP_S) * STEP_S

    def _accumulator(self, key: str | Part, when: float) -> Accumulator:
        """Return the waiting cell of a series for a moment."""
        series = self._series[key]
        shard = self._shards.get(series.shard)
        if shard is None:
            shard = self._shards[series.shard] = _Shard(self.writer)
        place = (series.name, self._step(when), STEP_S)
        packed = shard.waiting.get(place)
        if packed is None:
            packed = shard.waiting[place] = PackedAccumulator(series, STEP_S, Accumulator(when))
        else:
            packed.accumulator.newest = max(packed.accumulator.newest, when)
        return packed.accumulator

    def _wait(self, packed: PackedAccumulator, step: int) -> None:
        shard = self._shards.get(packed.series.shard)
        if shard is None:
            shard = self._shards[packed.series.shard] = _Shard(self.writer)
        place = (packed.series.name, step, packed.width_s)
        known = shard.waiting.get(place)
        if known is None:
            shard.waiting[place] = packed
        else:
            known.accumulator.merge(packed.accumulator)

    def downsample(self, ttls: dict[int, float]) -> None:
        """Hold what waits within bounds: for when it could not be sent.

        Cells that are older than the slices they were made for are merged, and more when there are too many. Of raw
        samples, the newest of each series are kept, as many as the server would keep, and the slowest of each cell, all
        while there is room.

        Args:
            ttls: for each width in s, how long such a slice lives after its end, s.
        """
        with self._lock:
            now = self._clock() + self._offset
            for shard in self._shards.values():
                self._downsample(shard, lambda step, width: step + width + ttls.get(width, 0.0) <= now)
            width = STEP_S
            while self.waiting_accumulators > MAX_ACCUMULATORS and width < WIDER[width]:
                for shard in self._shards.values():
                    self._downsample(shard, partial(_no_wider, width))
                width = WIDER[width]
            self._sample()

    def _sample(self) -> None:
        total = 0
        newest_first = sorted(
            (packed for shard in self._shards.values() for packed in shard.waiting.values()),
            key=lambda packed: -packed.accumulator.newest,
        )
        left: dict[str, int] = {}
        for packed in newest_first:
            accumulator, name = packed.accumulator, packed.series.name
            accumulator.sample(left.get(name, MAX_RAW))
            left[name] = max(0, left.get(name, MAX_RAW) - accumulator.raw_count)
            if total + accumulator.raw_count > MAX_WAITING_RAW:
                accumulator.drop_raw()
            total += accumulator.raw_count

    def _downsample(self, shard: _Shard, due: Callable[[int, int], bool]) -> None:
        for place, packed in list(shard.waiting.items()):
            _, step, width = place
            wider = width
            while wider < WIDER[wider] and due(step // wider * wider, wider):
                wider = WIDER[wider]
            if wider != width:
                del shard.waiting[place]
                self._wait(PackedAccumulator(packed.series, wider, packed.accumulator), step // wider * wider)

    @property
    def waiting_accumulators(self) -> int:
        """Cells that wait to be packed."""
        return sum(len(shard.waiting) for shard in self._shards.values())

    def batches(self) -> list[FlushBatch]:
        """Return one parcel for each shard that has cells waiting: the one under way, or else a new one."""
        with self._lock:
            now = self._clock()
            found = []
            for number, shard in self._shards.items():
                batch = shard.batch
                if batch is None and shard.waiting:
                    shard.seq += 1
                    batch = shard.batch = FlushBatch(number, shard.writer, shard.seq, self._take(shard, now))
                elif batch is not None and batch.first_sent is not None and now - batch.first_sent > _UNCERTAIN_S:
                    # Whether it was counted can no longer be found out. More likely not: send it as another writer.
                    self._uncertain += batch.samples
                    shard.writer = batch.writer = uuid.uuid4().hex[:12]
                    shard.seq = batch.seq = 1
                    batch.first_sent = None
                if batch is not None:
                    found.append(batch)
            return found

    def _take(self, shard: _Shard, now: float) -> list[PackedAccumulator]:
        accumulators: list[PackedAccumulator] = []
        samples = 0
        for place in list(shard.waiting)[:MAX_BATCH_ACCUMULATORS]:
            packed = shard.waiting.pop(place)
            self._ration(packed, now)
            accumulators.append(packed)
            samples += packed.accumulator.raw_count
            if samples >= MAX_BATCH_SAMPLES:
                break
        return accumulators

    def _ration(self, packed: PackedAccumulator, now: float) -> None:
        """Let a series send its first 1000 raw samples, and then as many as it earns with time."""
        allowance, since = self._raw_allowance.get(packed.series, (float(MAX_RAW), now))
        allowance = min(MAX_RAW, allowance + (now - since) * RAW_REFILL_PER_S)
        accumulator = packed.accumulator
        accumulator.sample(int(allowance))
        self._raw_allowance[packed.series] = (max(0.0, allowance - accumulator.raw_count), now)
        self._samples_dropped += accumulator.raw_dropped
        accumulator.raw_dropped = 0

    def unanswered(self, batch: FlushBatch, sent: float) -> None:
        """Note that a parcel was sent and may or may not have been counted."""
        if batch.first_sent is None:
            batch.first_sent = sent

    def settled(self, batch: FlushBatch, other: int = 0, outdated: int = 0) -> None:
        """Note that the server has counted a parcel.

        Args:
            batch: what was sent.
            other: executions of it that went to ``__other__``.
            outdated: raw samples of it that were too old to be kept.
        """
        with self._lock:
            shard = self._shards.get(batch.shard)
            if shard is not None and shard.batch is batch:
                shard.batch = None
                self._counted += batch.samples
                self._other += other
                self._samples_dropped += outdated

    def refused(self, batch: FlushBatch, part: str) -> int:
        """Give up the series of a parcel whose key is corrupt; the server refused before it wrote anything.

        Args:
            batch: what was sent.
            part: the corrupt key without its tag, such as ``total:research``.

        Returns:
            How many executions were given up; 0 when the key is none of a series of the parcel.
        """
        with self._lock:
            shard = self._shards.get(batch.shard)
            kind, colon, name = part.partition(":")
            if shard is None or shard.batch is not batch or not colon or kind == "w":
                return 0
            name = name.rpartition(":")[2]  # a slice has its time before its name, and a name has no colon

            def concerned(series: Series) -> bool:
                if kind == "parts":
                    return series.name.startswith((name + "/", name + "#"))
                return series.name == name

            lost = sum(packed.accumulator.counts["n"] for packed in batch.accumulators if concerned(packed.series))
            batch.accumulators = [packed for packed in batch.accumulators if not concerned(packed.series)]
            self._dropped += lost
            shard.seq += 1  # another content, another number: a late copy of the old one is refused
            batch.seq = shard.seq
            if not batch.accumulators:
                shard.batch = None
            return lost

    def synchronise(self, server_s: float, at: float) -> None:
        """Learn the server's time: `server_s` at our clock's `at`. Used to cut steps where the server cuts slices."""
        with self._lock:
            self._offset = server_s - at
            self._synchronised = True

    def server_ms(self, at: float) -> int:
        """Return the server's time at our clock's `at`, ms since 1970; -1 while it has not told it."""
        return int((at + self._offset) * 1000) if self._synchronised else -1

    # -- looking

    @property
    def empty(self) -> bool:
        """Whether everything recorded was confirmed."""
        return not any(list(self._sample_buffers.values())) and not any(
            shard.batch or shard.waiting for shard in list(self._shards.values())
        )

    @property
    def doubtful(self) -> bool:
        """Whether something was sent of which it is not known whether it was counted."""
        batches = [shard.batch for shard in list(self._shards.values())]
        return any(batch is not None and batch.first_sent is not None for batch in batches)

    def delivery_counts(self) -> tuple[int, int, int, int, int, int]:
        """Return executions counted, pending, dropped, uncertain; raw samples dropped; executions under __other__."""
        with self._lock:
            self.aggregate()
            pending = 0
            samples_dropped = self._samples_dropped
            for shard in self._shards.values():
                waiting = [packed.accumulator for packed in shard.waiting.values()]
                pending += sum(accumulator.counts["n"] for accumulator in waiting)
                samples_dropped += sum(accumulator.raw_dropped for accumulator in waiting)
                if shard.batch is not None:
                    pending += shard.batch.samples
            return self._counted, pending, self._dropped, self._uncertain, samples_dropped, self._other
