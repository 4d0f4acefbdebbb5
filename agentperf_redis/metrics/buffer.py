"""The records of one process, until the server has confirmed them. No I/O here.

The path of a sample:

- `Buffer.record` appends the sample to the sample buffer of its series. This buffer is a plain list and needs no lock.
- `Buffer.aggregate` empties the sample buffers into accumulators. Each series has one `Accumulator` for every ten
  seconds of server time. So a sample that is sent late, after an outage, still counts in the right slice.
- `Buffer.batches` packs the accumulators of each shard into a `FlushBatch` with the shard's next sequence number. A
  batch does not change until the server has counted it, and new records wait for the next batch. A batch can therefore
  be sent any number of times, and is counted once.

Bounds:

- Series beyond `MAX_SERIES` are counted under ``__other__``.
- When a sample buffer has `MAX_BUFFERED_SAMPLES` samples, the recording thread aggregates it.
- Raw samples of an accumulator beyond `MAX_RAW` are counted but not kept.
- Accumulators that could not be sent are downsampled: they are merged into wider slices. This happens when they are
  older than the TTL of their slices, or when there are too many of them.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from agentperf_redis import arguments, keys
from agentperf_redis.metrics.accumulator import ITEMS, MAX_RAW, Accumulator, Part, Samples, Series
from agentperf_redis.metrics.model import OTHER

STEP_S = 10
"""Width of the finest slice."""
MAX_SERIES = 4000
"""Maximum number of series that one process counts separately. It is twice the number of agents that the server
accepts, since spans are additional series."""
RAW_REFILL_PER_S = 50.0
"""Raw samples per second that a busy series may send after its first 1000. This rate keeps the samples on the server
recent without flooding it."""
MAX_ACCUMULATORS = 20_000
"""Maximum number of waiting accumulators. An accumulator with 60 different durations takes about 1.6 kB, so after an
outage of days all of them take 32 MB. Beyond the limit, accumulators are downsampled before their slices expire."""
MAX_WAITING_RAW = 100_000
"""Maximum number of raw samples that wait during an outage; they take 13 MB. The newest are kept."""
MAX_BUFFERED_SAMPLES = 1000
"""Maximum number of samples in a sample buffer. Normally, the next flush aggregates them before that. At this limit,
the recording thread aggregates them itself."""
_MAX_BUFFERED_ITEMS = MAX_BUFFERED_SAMPLES * ITEMS
MAX_BATCH_ACCUMULATORS = 32
"""Maximum number of accumulators in one script call. They take about 3 ms of server time."""
MAX_BATCH_SAMPLES = 2000
"""A batch with this many raw samples is full. The samples take about 3 ms of server time, in addition to the
accumulators."""
WRITER_KEEP_S = 3600.0
"""How long the server remembers the sequence number of a writer's last batch."""
_UNCERTAIN_S = WRITER_KEEP_S - 60.0

WIDER = {10: 60, 60: 3600, 3600: 86_400, 86_400: 86_400}
"""The next wider slice width for each width, s. The widest width maps to itself."""


class PackedAccumulator(NamedTuple):
    """An accumulator to send, with its series and the width (s) of the slice that contains all of its samples."""

    series: Series
    width_s: int
    accumulator: Accumulator


@dataclass(slots=True)
class FlushBatch:
    """The accumulators of one shard that are sent together. The server counts all of them or none."""

    shard: int
    writer: str
    seq: int
    accumulators: list[PackedAccumulator]
    first_sent: float | None = None
    """Time of the first attempt with an unknown outcome, s by the buffer's clock; None if there was none."""

    @property
    def samples(self) -> int:
        """Number of executions in the batch."""
        return sum(packed.accumulator.counts["n"] for packed in self.accumulators)


@dataclass(slots=True)
class _Shard:
    writer: str
    seq: int = 0
    waiting: dict[tuple[str, int, int], PackedAccumulator] = field(default_factory=dict)
    """Accumulators by series, step and width."""
    batch: FlushBatch | None = None


def _no_wider(limit: int, _step: int, width: int) -> bool:
    return width <= limit


class Buffer:
    """The unconfirmed samples of one process.

    Args:
        on_first: called on the first record after `announce_next`. Must be quick, since the recording thread runs it.
        clock: monotonic clock, s.

    Attributes:
        recorded: the agents, and parts of agents, that have recorded executions so far. Their names are valid.
    """

    def __init__(self, *, on_first: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._on_first = on_first
        self._clock = clock
        self._sample_buffers: dict[str | Part, Samples] = {}
        self.recorded: Container[str | Part] = self._sample_buffers
        self.reset()

    def reset(self) -> None:
        """Start empty and with a new writer name.

        Also called in a forked child, because the parent flushes the records that the fork copied.
        """
        self.writer = uuid.uuid4().hex[:12]
        self._sample_buffers.clear()
        self._series: dict[str | Part, Series] = {}
        self._check_at = 0
        """Number of items in a sample buffer at which `record` calls `_after_record`; 0 for every record."""
        self._offset = time.time() - self._clock()  # uses the local time until the server's time is known
        self._synchronised = False
        # Reentrant: a signal handler or a garbage-collected generator may record while this thread aggregates.
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
        """Record an execution. No lock is needed: `list +=` is atomic, and `_aggregate` deletes only items it has read.

        Args:
            agent: the agent, or a part of it.
            seconds: duration of the execution.
            outcome: ``ok``, ``err``, ``err:<type>`` or ``cancelled``.
            own: for a span, its self time, s.
        """
        try:
            sample_buffer = self._sample_buffers[agent]
        except Exception:  # noqa: BLE001  usually a KeyError; hashing an object that is not a name may raise any error
            sample_buffer = self._sample_buffer(agent)
        sample_buffer += (self._clock(), seconds, outcome, own)
        if len(sample_buffer) >= self._check_at:
            self._after_record(sample_buffer)

    def add(self, agent: str | Part, counts: Mapping[str, int]) -> None:
        """Add to counters that do not count executions, such as tokens (``tok_in``, ``mdl:<model>:tok_in``)."""
        now = self._clock()
        with self._lock:
            self._accumulator(self._known(agent), now).add(counts)
        self._after_record([])

    def _after_record(self, sample_buffer: Samples) -> None:
        """Do the occasional work after a record: call `on_first`, or aggregate a full sample buffer."""
        if not self._check_at:
            self._check_at = _MAX_BUFFERED_ITEMS
            self._on_first()
        if len(sample_buffer) >= _MAX_BUFFERED_ITEMS:
            self.aggregate()

    def _sample_buffer(self, given: object) -> Samples:
        with self._lock:
            return self._sample_buffers.setdefault(self._known(given), [])

    def _known(self, given: object) -> str | Part:
        """Return the series to count under: the given one, or `OTHER` if there are too many series."""
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
        """Call `on_first` again on the next record."""
        self._check_at = 0

    def aggregate(self) -> None:
        """Move everything recorded so far from the sample buffers to the accumulators."""
        with self._lock:
            if self._aggregating:  # `aggregate` is already running on this thread; see `_lock`
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
        del sample_buffer[: len(samples)]  # keeps the items that other threads have appended since
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
        """Return the accumulator that collects the records of a series at a timestamp. Create it if there is none."""
        series = self._series[key]
        shard = self._shards.get(series.shard)
        if shard is None:
            shard = self._shards[series.shard] = _Shard(self.writer)
        slot = (series.name, self._step(when), STEP_S)
        packed = shard.waiting.get(slot)
        if packed is None:
            packed = shard.waiting[slot] = PackedAccumulator(series, STEP_S, Accumulator(when))
        else:
            packed.accumulator.newest = max(packed.accumulator.newest, when)
        return packed.accumulator

    def _wait(self, packed: PackedAccumulator, step: int) -> None:
        shard = self._shards.get(packed.series.shard)
        if shard is None:
            shard = self._shards[packed.series.shard] = _Shard(self.writer)
        slot = (packed.series.name, step, packed.width_s)
        known = shard.waiting.get(slot)
        if known is None:
            shard.waiting[slot] = packed
        else:
            known.accumulator.merge(packed.accumulator)

    def downsample(self, ttls: dict[int, float]) -> None:
        """Keep the waiting records within bounds. Called after a flush that failed.

        Accumulators older than the TTL of their slices are merged into wider slices. If too many accumulators remain,
        others are merged too. Each series keeps its newest raw samples, as many as the server would keep. Each
        accumulator also keeps its slowest raw samples. All series together keep at most `MAX_WAITING_RAW`.

        Args:
            ttls: maps each slice width, in s, to the TTL of these slices after their end, in s.
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
        for slot, packed in list(shard.waiting.items()):
            _, step, width = slot
            wider = width
            while wider < WIDER[wider] and due(step // wider * wider, wider):
                wider = WIDER[wider]
            if wider != width:
                del shard.waiting[slot]
                self._wait(PackedAccumulator(packed.series, wider, packed.accumulator), step // wider * wider)

    @property
    def waiting_accumulators(self) -> int:
        """Number of accumulators that wait to be packed."""
        return sum(len(shard.waiting) for shard in self._shards.values())

    def batches(self) -> list[FlushBatch]:
        """Return one batch for each shard with data: the unconfirmed batch if there is one, otherwise a new batch."""
        with self._lock:
            now = self._clock()
            found = []
            for number, shard in self._shards.items():
                batch = shard.batch
                if batch is None and shard.waiting:
                    shard.seq += 1
                    batch = shard.batch = FlushBatch(number, shard.writer, shard.seq, self._take(shard, now))
                elif batch is not None and batch.first_sent is not None and now - batch.first_sent > _UNCERTAIN_S:
                    # By now, the server may have forgotten the sequence number. Without the number, the server cannot
                    # tell whether it has counted the batch. Probably, the batch was not counted. So the batch is sent
                    # again, under a new writer name.
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
        for slot in list(shard.waiting)[:MAX_BATCH_ACCUMULATORS]:
            packed = shard.waiting.pop(slot)
            self._ration(packed, now)
            accumulators.append(packed)
            samples += packed.accumulator.raw_count
            if samples >= MAX_BATCH_SAMPLES:
                break
        return accumulators

    def _ration(self, packed: PackedAccumulator, now: float) -> None:
        """Limit a series' raw samples by a token bucket: at most `MAX_RAW` at once, `RAW_REFILL_PER_S` on average."""
        allowance, since = self._raw_allowance.get(packed.series, (float(MAX_RAW), now))
        allowance = min(MAX_RAW, allowance + (now - since) * RAW_REFILL_PER_S)
        accumulator = packed.accumulator
        accumulator.sample(int(allowance))
        self._raw_allowance[packed.series] = (max(0.0, allowance - accumulator.raw_count), now)
        self._samples_dropped += accumulator.raw_dropped
        accumulator.raw_dropped = 0

    def unanswered(self, batch: FlushBatch, sent: float) -> None:
        """Note that a batch was sent, and that the server may or may not have counted it."""
        if batch.first_sent is None:
            batch.first_sent = sent

    def settled(self, batch: FlushBatch, other: int = 0, outdated: int = 0) -> None:
        """Mark a batch as counted by the server.

        Args:
            batch: the sent batch.
            other: executions of the batch that the server counted under ``__other__``.
            outdated: raw samples of the batch that were too old to keep.
        """
        with self._lock:
            shard = self._shards.get(batch.shard)
            if shard is not None and shard.batch is batch:
                shard.batch = None
                self._counted += batch.samples
                self._other += other
                self._samples_dropped += outdated

    def refused(self, batch: FlushBatch, part: str) -> int:
        """Drop the series with a corrupt key from a batch. The server rejected the whole batch and wrote nothing.

        Args:
            batch: the sent batch.
            part: the corrupt key without its tag, such as ``total:research``.

        Returns:
            Number of dropped executions; 0 when the key belongs to no series of the batch.
        """
        with self._lock:
            shard = self._shards.get(batch.shard)
            kind, colon, name = part.partition(":")
            if shard is None or shard.batch is not batch or not colon or kind == "w":
                return 0
            name = name.rpartition(":")[2]  # in a slice's key, the time precedes the name; names contain no colon

            def is_corrupt(series: Series) -> bool:
                if kind == "parts":
                    return series.name.startswith((name + "/", name + "#"))
                return series.name == name

            lost = sum(packed.accumulator.counts["n"] for packed in batch.accumulators if is_corrupt(packed.series))
            batch.accumulators = [packed for packed in batch.accumulators if not is_corrupt(packed.series)]
            self._dropped += lost
            shard.seq += 1  # because of the new number, the server rejects a late copy of the old batch
            batch.seq = shard.seq
            if not batch.accumulators:
                shard.batch = None
            return lost

    def synchronise(self, server_s: float, at: float) -> None:
        """Note that the server's time was `server_s` when this process's clock showed `at`.

        The time steps of the buffer follow the server's time, so that they align with its slices.
        """
        with self._lock:
            self._offset = server_s - at
            self._synchronised = True

    def server_ms(self, at: float) -> int:
        """Return the server's time in ms since 1970 when this process's clock shows `at`; -1 before `synchronise`."""
        return int((at + self._offset) * 1000) if self._synchronised else -1

    # -- state

    @property
    def empty(self) -> bool:
        """Whether the server has confirmed all records."""
        return not any(list(self._sample_buffers.values())) and not any(
            shard.batch or shard.waiting for shard in list(self._shards.values())
        )

    @property
    def dropped(self) -> int:
        """Number of executions that were dropped and never counted."""
        return self._dropped

    @property
    def doubtful(self) -> bool:
        """Whether a sent batch has an unknown result: the server may or may not have counted it."""
        batches = [shard.batch for shard in list(self._shards.values())]
        return any(batch is not None and batch.first_sent is not None for batch in batches)

    def delivery_counts(self) -> tuple[int, int, int, int, int, int]:
        """Return six counts.

        The first four are the counted, the pending, the dropped and the uncertain executions. The fifth is the number
        of dropped raw samples. The sixth is the number of executions counted under ``__other__``.
        """
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
